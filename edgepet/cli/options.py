"""A command line: how options are parsed, how an error about a field is told of its flag, how a signal ends it."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

_FIELD = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")  # as ``errors.option`` writes them


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations: an option that grows a sibling must not change what a script meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The flag of every field that the options of ``parser`` fill."""
    return {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}


def spelled(message: str, flags: Mapping[str, str]) -> str:
    """``message`` of the library with flags in place of its fields: ```max_drop=2``` becomes ``--max-drop 2``.

    A field that the verb has no option for is one of another verb's, whose flag has the same words.
    """

    def flag(match: re.Match[str]) -> str:
        name = flags.get(match[1], f"--{match[1].replace('_', '-')}")
        return name if match[2] in (None, "True") else f"{name} {match[2]}"

    return _FIELD.sub(flag, message)


def harmless(message: str) -> str:
    """``message`` without what steers a terminal: escape codes and marks of direction become replacement characters.

    Lines stay lines: those of a message are ours, and names in it are spelled by ``repr`` or have none.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in message)


@contextlib.contextmanager
def ends_by_sigterm() -> Iterator[None]:
    """While the block runs SIGTERM ends it as an interrupt does, so that what is half done is cleared away.

    A training sets handlers of its own meanwhile; a signal that the process was told to ignore stays ignored.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt("terminated")

    main = threading.current_thread() is threading.main_thread()  # Python has signals in it only
    before = signal.getsignal(signal.SIGTERM)
    if not main or before is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
