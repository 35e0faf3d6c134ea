"""Tasks of single objects on places: what it is, and how many there are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from edgepet.samples.cutouts import FILES, KINDS, LICENCE, Cutout, background, read_cutouts, read_places, sized
from edgepet.samples.pools import Pools, Task, empty_pools, split_groups

_SIDE, _OF_A_KIND, _MOST = 224, 270, 6  # pixels of a picture; pictures of a kind, about; objects to be counted
_COUNTED = {"train": 804, "val": 204, "test": 1200}


def _stamps(contents: Sequence[bytes]) -> Pools:
    """Each object on several places; splits have objects and places of their own."""
    objects, places, pools = read_cutouts(contents[0]), read_places(contents[1]), empty_pools()
    of_kind, split_of = Counter(each.kind for each in objects), dict[str, str]()
    for kind in KINDS:
        split_of |= split_groups([each.name for each in objects if each.kind == kind], seed=15)
    for each in objects:
        split = split_of[each.name]
        for number in range(max(2, round(_OF_A_KIND / of_kind[each.kind]))):
            digest = hashlib.md5(f"{each.name}{number}".encode(), usedforsecurity=False).hexdigest()
            made = partial(_placed, each, places[split], int(digest[:7], 16))
            pools[split].append((f"{each.name}_{number}", each.kind, made))
    return pools


def _placed(cutout: Cutout, places: Sequence[Image.Image], seed: int) -> Image.Image:
    rng = np.random.RandomState(seed)
    canvas, piece = background(places, _SIDE, rng), sized(cutout.picture, rng.uniform(90, 190))
    piece = piece.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    if rng.rand() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    room = [_SIDE - piece.width, _SIDE - piece.height]
    x, y = (round(rng.uniform(min(0, free), max(0, free))) for free in room)
    canvas.paste(piece, (x, y), piece)
    return canvas


def _count(contents: Sequence[bytes]) -> Pools:
    """One to six objects that do not hide one another; splits have objects and places of their own."""
    objects, places, pools = read_cutouts(contents[0]), read_places(contents[1]), empty_pools()
    split_of = split_groups([each.name for each in objects], seed=16)
    for number, (split, count) in enumerate(_COUNTED.items()):
        mine = [each.picture for each in objects if split_of[each.name] == split]
        for index in range(count):
            there = index % _MOST + 1
            made = partial(_several, mine, places[split], there, 1_000_000 * number + index)
            pools[split].append((f"{split}{index:04d}", str(there), made))
    return pools


def _several(pieces: Sequence[Image.Image], places: Sequence[Image.Image], count: int, seed: int) -> Image.Image:
    rng = np.random.RandomState(seed)
    canvas, taken = background(places, _SIDE, rng), list[tuple[int, int, int, int]]()
    while len(taken) < count:
        piece = sized(pieces[rng.randint(len(pieces))], rng.uniform(40, 80))
        width, height = piece.size
        x, y = rng.randint(0, _SIDE + 1 - width), rng.randint(0, _SIDE + 1 - height)
        if all(
            x + 0.9 * width < left or left + 0.9 * wide < x or y + 0.9 * height < upper or upper + 0.9 * high < y
            for left, upper, wide, high in taken
        ):
            taken.append((x, y, width, height))
            canvas.paste(piece, (x, y), piece)
    return canvas


STAMPS = Task(classes=tuple(KINDS), licence=LICENCE, files=FILES, seed=23, collect=_stamps)
COUNT = Task(
    classes=tuple(str(number) for number in range(1, _MOST + 1)), licence=LICENCE, files=FILES, seed=24, collect=_count
)
