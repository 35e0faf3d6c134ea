"""The text of a training's head: read, put in the order of its labels, and told of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgepet.deltas.heads import Map
from edgepet.errors import InputError, option
from edgepet.networks.head_settings import Form
from edgepet.networks.projection import projection_of
from edgepet.packs.text_file import read_text
from edgepet.reports.tables import format_names
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


def projected(form: Form, spec: str, maps: Sequence[Map]) -> Form:
    """``form`` with the projection of the CLIP tower that ``spec`` is, where it begins with one.

    Raises:
        InputError: the weights have none, it is of another width than the text, or it is read on another map than the
            last one.
    """
    if not form.clip:
        return form
    seen, made = form.of(maps)[-1:] if form.mlp else form.of(maps), projection_of(spec)
    if seen != tuple(maps[-1:]) or made.shape != (form.table.width, seen[0].channels):
        what = f"needs a projection {(form.table.width, maps[-1].channels)} of the last map alone, for clip=true"
        raise InputError(option("head"), what, got=f"{made.shape} on {format_names(each.name for each in seen)}")
    return replace(form, projection=made)


def facts_of_text(form: Form) -> dict[str, object]:
    """What a pack's provenance, and what a training is known by, say of its table."""
    return {} if form.text is None else {"text": form.text.facts}
