"""The text of a training's heads: read, put in the order of their labels, and told of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgepet.deltas.heads import Map
from edgepet.errors import InputError, option
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_forms import MapForm
from edgepet.networks.head_settings import Form
from edgepet.networks.projection import projection_of
from edgepet.packs.text_file import read_text
from edgepet.reports.tables import format_names
from edgepet.spec import FilePath


def worded(
    forms: Sequence[Form], text: FilePath | None, classes: Sequence[Sequence[str]], backbone: Backbone
) -> tuple[Form, ...]:
    """``forms`` with the rows of the table in the file ``text``, those that read some, each those of its ``classes``.

    A head that begins with the projection of the CLIP tower that ``backbone`` is has that too.

    Raises:
        InputError: a table that no form reads, none where one does, or one of other classes; or as ``projected``.
    """
    readers = [form for form in forms if form.reads_text]
    if text is not None and not readers:
        fix = f"ask for {option('head', 'score')} or {option('head', 'mlp,language=1')}, or leave {option('text')} out"
        raise InputError(option("text"), "is read by no head here", got=option("head", forms[0]), fix=fix)
    if not readers:
        return tuple(forms)
    given = zip(forms, classes, strict=True)
    every = dict.fromkeys(name for form, names in given if form.reads_text for name in names)
    table = (readers[0].table if text is None else read_text(Path(text))).of(tuple(every))
    return tuple(
        projected(replace(form, text=table.only(names)), backbone.spec, backbone.maps) if form.reads_text else form
        for form, names in zip(forms, classes, strict=True)
    )


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


def facts_of_text(forms: Sequence[MapForm]) -> dict[str, object]:
    """What a pack's provenance, and what a training is known by, say of the table that its heads read."""
    tables = [form.form.text for form in forms if form.form.text is not None]
    return {"text": tables[0].facts} if tables else {}
