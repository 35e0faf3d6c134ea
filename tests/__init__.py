"""The suite. Run it from the repository's root."""

import os

import pytest

# Before anything imports torch: threads that spin while they wait cost a suite on busy cores ten times its time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What these assert is told in full when it fails, as what test files assert is.
pytest.register_assert_rewrite(
    "tests.architectures", "tests.by_hand", "tests.flow", "tests.interpreters", "tests.methods"
)
