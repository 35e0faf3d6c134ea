"""The streams of a command: what they cannot encode is spelled out, and a reader who has left is told nothing."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from typing import TextIO

SPELLED = "edgepet.spelled"  # the name of the error handler
STAND_INS = {"–": "-", "…": "...", "×": "x", "Δ": "d", "\N{REPLACEMENT CHARACTER}": "?"}


def take_any_text() -> None:
    """Let stdout and stderr take every character, whatever their encoding: a table is no reason to fail.

    A handler that the user asked for by PYTHONIOENCODING, other than those that Python chooses, stays.
    """
    codecs.register_error(SPELLED, _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=SPELLED)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: ASCII of ours, and the escapes of Python for all others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    texts = (STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lacking)
    return "".join(texts), error.end


def json_line(value: object, encoding: str | None) -> str:
    """One line of JSON, its characters as they are; as JSON's own escapes where ``encoding`` lacks one of them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    return f"{text}\n"


def tell(text: str) -> None:
    """Write to stderr, if there is anybody to read it."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        forget(sys.stderr)


def forget(stream: TextIO) -> None:
    """What is left in the buffer of ``stream`` would fail once more when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
