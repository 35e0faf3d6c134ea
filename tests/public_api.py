"""The public names with their signatures, as ``public_api.txt`` has them.

A change that was reviewed is accepted by ``python -m tests.public_api``.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import edgepet

REVIEWED = Path(__file__).with_name("public_api.txt")


def signature(name: str) -> str:
    """One line of public_api.txt."""
    thing: Any = getattr(edgepet, name)
    if isinstance(thing, dict):
        return f"{name}: {', '.join(thing)}"
    if isinstance(thing, str):
        return f"{name}: str"
    if isinstance(thing, type) and issubclass(thing, Exception):
        return f"{name}({', '.join(base.__name__ for base in thing.__bases__)}){inspect.signature(thing)}"
    return f"{name}{inspect.signature(thing)}"


def public_api() -> str:
    lines = [signature(name) for name in sorted(edgepet.__all__)]
    # quotes of postponed annotations differ between Python versions, and a function's address between runs
    return "".join(re.sub(r" at 0x[0-9a-f]+", "", line.replace("'", "")) + "\n" for line in lines)


if __name__ == "__main__":
    REVIEWED.write_text(public_api())
