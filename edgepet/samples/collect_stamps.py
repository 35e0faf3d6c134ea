"""Objects on places: photographs cut out by hand, pasted on photographs.

Boxes, silhouettes and masks come out of the alpha channel, so they are exact. Splits have objects and places of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.samples.cutouts import FILES, KINDS, LICENCE, background, read_cutouts, read_places, sized
from edgepet.samples.pools import split_groups
from edgepet.samples.scenes import Scene, SceneObject, Scenes, SceneTask
from edgepet.spec import NpArray

_SIDE, _SEEN = 256, 0.6  # pixels of a picture; of an object, or it is composed anew
_SIZES, _MOST_OBJECTS, _LEAST_PIXELS = (40, 150), 4, 60
_COUNTS = {"train": 800, "val": 200, "test": 800}

_Objects: TypeAlias = dict[str, list[Image.Image]]  # by kind


def _stamps_scene(contents: Sequence[bytes], cap: int | None) -> Scenes:
    objects, places = read_cutouts(contents[0]), read_places(contents[1])
    split_of = dict[str, str]()
    for kind in KINDS:
        split_of |= split_groups([each.name for each in objects if each.kind == kind], seed=15)
    scenes = Scenes()
    for number, (split, count) in enumerate(_COUNTS.items(), start=1):
        mine: _Objects = {
            kind: [each.picture for each in objects if each.kind == kind and split_of[each.name] == split]
            for kind in KINDS
        }
        wanted = count if split != "test" or cap is None else min(cap, count)
        scenes[split] = [
            (f"{split}{index:04d}", partial(_composed, mine, places[split], 100_000 * number + index))
            for index in range(wanted)
        ]
    return scenes


def _composed(objects: _Objects, places: Sequence[Image.Image], seed: int) -> Scene:
    """One to four objects on a place, each of which is mostly seen."""
    rng, kinds = np.random.RandomState(seed), list(KINDS)
    while True:
        canvas, owner, drawn = (
            background(places, _SIDE, rng),
            np.zeros((_SIDE, _SIDE), np.uint8),
            list[tuple[str, int]](),
        )
        for number in range(1, rng.randint(1, _MOST_OBJECTS + 1) + 1):
            kind = kinds[rng.randint(len(kinds))]
            of = objects[kind]
            piece = _turned(of[rng.randint(len(of))], rng)
            x, y = rng.randint(0, _SIDE - piece.width + 1), rng.randint(0, _SIDE - piece.height + 1)
            canvas.paste(piece, (x, y), piece)
            solid = np.asarray(piece)[..., 3] > 127
            owner[y : y + piece.height, x : x + piece.width][solid] = number
            drawn.append((kind, int(solid.sum())))
        shapes = [owner == number for number in range(1, len(drawn) + 1)]
        if all(
            shape.sum() >= _SEEN * whole and whole > _LEAST_PIXELS
            for shape, (_, whole) in zip(shapes, drawn, strict=True)
        ):
            break
    mask = np.zeros((_SIDE, _SIDE), np.uint8)
    found = list[SceneObject]()
    for shape, (kind, _) in zip(shapes, drawn, strict=True):
        mask[shape] = kinds.index(kind) + 1
        found.append(SceneObject(kind, _box(shape), shape))
    return Scene(canvas, tuple(found), mask)


def _turned(piece: Image.Image, rng: np.random.RandomState) -> Image.Image:
    piece = sized(piece, float(np.exp(rng.uniform(*np.log(_SIZES)))))
    if rng.rand() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return piece.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)


def _box(shape: NpArray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


STAMPS_SCENE = SceneTask(
    classes=tuple(KINDS),
    background="background",
    licence=LICENCE,
    files=FILES,
    collect=_stamps_scene,
)
