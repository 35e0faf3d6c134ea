"""The suite. Run it from the repository's root."""

import os

# Before anything imports torch: threads that spin while they wait cost a suite on busy cores ten times its time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
