"""The text of a training's head: read, put in the order of its labels, and told of. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgepet.errors import InputError, option
from edgepet.networks.head_settings import Form
from edgepet.packs.text_file import read_text
from edgepet.spec import FilePath


def worded(form: Form, text: FilePath | None, classes: Sequence[str]) -> Form:
    """``form`` with the table in the file ``text``, where it reads one.

    Raises:
        InputError: a table that the form does not read, none where it reads one, or one of other classes.
    """
    if text is not None and not form.reads_text:
        fix = f"ask for {option('head', 'score')} or {option('head', 'mlp,language=1')}, or leave {option('text')} out"
        raise InputError(option("text"), "is read by no head here", got=option("head", form), fix=fix)
    if not form.reads_text:
        return form
    return replace(form, text=form.table if text is None else read_text(Path(text)).of(classes))


def facts_of_text(form: Form) -> dict[str, object]:
    """What a pack's provenance, and what a training is known by, say of its table."""
    return {} if form.text is None else {"text": form.text.facts}
