"""What a runtime says of a model that it does not take, as an error that names the file and a cure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from edgepet.errors import InputError, option
from edgepet.graphs.base import INPUT

_CODE = re.compile(r"Exception from \S+:\d+:|Check '.*' failed at \S+:\d+:")  # a place in the runtime's own source
_LATER = r"opset|IR[_ ]version|No Op registered|operation with type"
_OUTSIDE = r"external data|file_length|weights data in bin|weights in bin"
_ABSENT = r"NO_SUCHFILE|could not open"
_AGAIN = "copy all files of the model again, or export it again"
_OLDER = {"onnxruntime": f"with an older {option('opset')}", "openvino": "with this version"}


@contextlib.contextmanager
def refusing_model(
    where: str, what: str, kinds: type[Exception] | tuple[type[Exception], ...], *, package: str, copied: bool = True
) -> Iterator[None]:
    """Tell errors of these ``kinds`` in the block as those of a model that ``package`` refuses to open or to run.

    Args:
        what: it is, in words.
        copied: whether its files may have come from elsewhere; else no cure is known.

    Raises:
        InputError: there was one.
    """
    try:
        yield
    except kinds as error:
        told = [line.strip() for line in str(error).splitlines()]
        told = [line for line in told if line and _CODE.fullmatch(line) is None] or [type(error).__name__]
        fix = _cure("\n".join(told), package) if copied else None
        raise InputError(where, what, got=told[-1], fix=fix) from error


def _cure(told: str, package: str) -> str:
    cures = (
        (_OUTSIDE, "copy all files of the model again: its weights lie in one beside it"),
        (_LATER, f"update {package} here, or export the model again {_OLDER[package]}"),
        (_ABSENT, "name the folder of an exported model, with all of its files"),
    )
    found = (cure for words, cure in cures if re.search(words, told, re.IGNORECASE))
    return next(found, _AGAIN)


def require_images_alone(names: Sequence[str], *, where: str) -> None:
    """Refuse a model that takes anything else than images: it is none that was exported here.

    Raises:
        InputError: its inputs are others.
    """
    if list(names) != [INPUT]:
        got = ", ".join(names) or "no input"
        raise InputError(where, f"must take one input, {INPUT}", got=got, fix=_AGAIN)
