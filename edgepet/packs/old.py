"""Packs as they were before version 1 was final, read once more so that they can be written anew.

Nothing else reads them. They had their layout in the manifest, one codec for all planes, and no signature.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import cast

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import parse_json
from edgepet.deltas.codes import Range
from edgepet.deltas.delta import Delta, Head, Int8Ranges, Score
from edgepet.errors import InputError, PackError
from edgepet.packs.codecs import Rounding
from edgepet.packs.layout import MAX_UPDATES, Reader
from edgepet.packs.manifest import provenance
from edgepet.spec import NpArray, read_preprocess
from edgepet.strict import ObjectReader


def read_old(data: bytes, where: str) -> tuple[Delta, Rounding]:
    """The delta of an old pack (``container.is_old``), and its codec.

    Raises:
        PackError: it was none then either.
    """
    try:
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors: dict[str, NpArray] = safetensors.numpy.load(data)
        table = ObjectReader(parse_json(header["__metadata__"]["edgepet"]), where)
        return _read(table, tensors, where), cast(Rounding, table.text("codec", choices=["fp32", "fp16"]))
    except (SafetensorError, ValueError, KeyError, RecursionError, InputError) as error:
        raise PackError(where, "is no pack of any version", got=str(error)[:200]) from error


def _read(table: ObjectReader, tensors: Mapping[str, NpArray], where: str) -> Delta:
    planes = {name: tensor.reshape(-1) for name, tensor in tensors.items() if not name.startswith("head.")}
    reader = Reader(planes, where, updates=MAX_UPDATES, tensors=len(tensors) * MAX_UPDATES)
    updates = tuple(itertools.chain.from_iterable(map(reader.updates, table.nested_list("updates"))))
    branches = tuple(itertools.chain.from_iterable(map(reader.branches, table.nested_list("branches"))))
    reader.end()
    backbone, method, val = table.nested("backbone"), table.nested("method"), table.nested("val")
    return Delta(
        task=table.text("task"),
        backbone=backbone.text("name"),
        fingerprint=backbone.text("fingerprint"),
        updates=updates,
        branches=branches,
        head=Head(weight=tensors["head.weight"], bias=tensors["head.bias"]),
        labels=table.texts("labels"),
        preprocess=read_preprocess(table.nested("preprocess")),
        method=method.text("name"),
        settings=provenance(method, "settings"),
        training=provenance(table, "training"),
        val=Score(top1=val.number("top1"), n=val.integer("n")),
        licences=table.texts("licences"),
        int8=_ranges(table.nested("int8")) if table.has("int8") else None,
    )


def _ranges(table: ObjectReader) -> Int8Ranges:
    pairs = table.sequence("ranges")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise PackError(f"{table.where}.ranges", "needs pairs", got=json.dumps(pairs)[:80])
    numbers = np.array(pairs, np.float32).reshape(-1, 2)
    ranges = tuple(Range(scale=float(scale), shift=float(shift)) for scale, shift in numbers)
    return Int8Ranges(codes=table.text("codes"), ranges=ranges)
