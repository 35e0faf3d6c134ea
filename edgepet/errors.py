"""What edgepet refuses, and how it says so.

    EdgepetError
    ├── InputError            3  input, model, file or machine at fault
    │   ├── PackError         3  a pack that is not what the format says
    │   └── BackboneError     3  a delta on a backbone it was not made for
    ├── CheckError            4  a check ran and said no
    └── MissingError          5  a package or backend is not installed

The number is the exit code of the command line. A bug is none of these: it keeps its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

_MOST_SHOWN = 300  # characters of a part of a message that comes out of a file


class EdgepetError(Exception):
    """One message: where, what, got; then what to do.

    Args:
        where: the file, tensor or option at fault.
        what: what was needed there.
        got: what was found instead.
        fix: the next thing to do, one line.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, where: str, what: str, *, got: object = None, fix: str | None = None) -> None:
        self.where, self.what, self.got, self.fix = where, what, got, fix
        message = f"{where}: {what}"
        if got is not None:
            message += f", got {got}"
        if fix is not None:
            message += f"\n  fix: {fix}"
        super().__init__(message)


class InputError(EdgepetError):
    """Input, model, file or machine at fault."""


class PackError(InputError):
    """A file that claims to be a pack and is not one; what it brings into the message is cut, and spelled out.

    Args:
        where, what, got, fix: as of ``EdgepetError``, each of them one line of at most 300 characters.
    """

    def __init__(self, where: str, what: str, *, got: object = None, fix: str | None = None) -> None:
        shown = None if got is None else _one_line(str(got))
        super().__init__(_one_line(where), _one_line(what), got=shown, fix=None if fix is None else _one_line(fix))


def _one_line(text: str) -> str:
    spelled = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: _MOST_SHOWN + 1])
    return spelled if len(spelled) <= _MOST_SHOWN else f"{spelled[:_MOST_SHOWN]}…"


class BackboneError(InputError):
    """A delta meets a backbone that it was not trained on."""


class CheckError(EdgepetError):
    """A comparison or a budget that failed."""

    exit_code = 4


class MissingError(EdgepetError):
    """A package that is not installed here, or a backend, such as a GPU, that is not there."""

    exit_code = 5


def option(field: str, value: object = None) -> str:
    """An option of a verb, as messages name it: the field of the library's function, in backquotes.

    The command line writes flags in place of them: ```max_drop=2``` becomes ``--max-drop 2``.
    """
    return f"`{field}`" if value is None else f"`{field}={value}`"


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say which extra brings it.

    Raises:
        MissingError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            purpose, f"needs the package {module!r}", got=str(error), fix=f"pip install 'edgepet[{extra}]'"
        ) from error


@contextlib.contextmanager
def refusing(where: Path, what: str) -> Iterator[None]:
    """Tell an ``OSError`` of the block as an input error.

    Raises:
        InputError: ``where`` ``what``, and what the system says.
    """
    try:
        yield
    except OSError as error:
        raise InputError(str(where), what, got=error.strerror or str(error)) from error
