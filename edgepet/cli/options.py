"""Options of a command line: how they are parsed, and how an error about a field is told of its flag."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
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
