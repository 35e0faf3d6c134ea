"""Objects on places: photographs cut out by hand (Tux Paint's stamps), pasted on photographs (Scratch's backgrounds).

Boxes, silhouettes and masks come out of the alpha channel, so they are exact. Splits have objects and places of their
own.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from PIL import Image

from edgepet.samples.packages import DebianFolder
from edgepet.samples.pools import split_groups
from edgepet.samples.scenes import Scene, SceneObject, Scenes, SceneTask
from edgepet.spec import NpArray

_KINDS = {
    "bird": ("animals/birds",),
    "fish_insect_reptile": (
        "animals/fish", "animals/insects", "animals/amphibians", "animals/lizards", "animals/shellfish",
    ),
    "flower_plant": ("plants",),
    "fruit_vegetable": ("food/fruit", "food/vegetables", "food/nuts"),
    "household_tool": ("household", "medical"),
    "instrument": ("hobbies/music",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "vehicle": ("vehicles", "military/vehicles"),
}  # fmt: skip
_PLACES = ("Indoors", "Nature", "Outdoors", "Sports")
_DRAWN = ("cartoon", "toys", "plastic")  # in a path: no photograph
_MIRRORED = ("_mirror", "_flip", "_mirror_flip")
_LARGEST, _SIDE, _SEEN = 320, 256, 0.6  # pixels of an object and of a picture; of an object, or it is composed anew
_SIZES, _MOST_OBJECTS, _LEAST_PIXELS = (40, 150), 4, 60
_COUNTS = {"train": 800, "val": 200, "test": 800}
_CUTS = {"train": (0, 0.44), "val": (0.44, 0.56), "test": (0.56, 1)}  # of the places

_Objects: TypeAlias = dict[str, list[Image.Image]]  # by kind, RGBA, cut to what is there


def _stamps_scene(contents: Sequence[bytes], cap: int | None) -> Scenes:
    objects, places = list(_objects(_files(contents[0]))), [_place(data) for _, data in _files(contents[1])]
    split_of = dict[str, str]()
    for kind in _KINDS:
        split_of |= split_groups([name for of, name, _ in objects if of == kind], seed=15)
    order, scenes = np.random.RandomState(14).permutation(len(places)), Scenes()
    for number, (split, count) in enumerate(_COUNTS.items(), start=1):
        mine: _Objects = {
            kind: [cut for of, name, cut in objects if of == kind and split_of[name] == split] for kind in _KINDS
        }
        first, last = (round(edge * len(order)) for edge in _CUTS[split])
        behind = [places[place] for place in order[first:last]]
        wanted = count if split != "test" or cap is None else min(cap, count)
        scenes[split] = [
            (f"{split}{index:04d}", partial(_composed, mine, behind, 100_000 * number + index))
            for index in range(wanted)
        ]
    return scenes


def _files(archive: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of an archive, by their paths in it, in their order."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as held:
        for member in held:
            file = held.extractfile(member)
            if file is not None:
                yield PurePosixPath(member.name), file.read()


def _objects(files: Iterator[tuple[PurePosixPath, bytes]]) -> Iterator[tuple[str, str, Image.Image]]:
    """Kind, name and picture of every photograph of one object; drawings are told by their paths or few colours."""
    known = {place: data for place, data in files if place.suffix == ".png"}
    for kind, folders in _KINDS.items():
        for folder in folders:
            for place in sorted(each for each in known if each.is_relative_to(folder)):
                if any(word in place.as_posix() for word in _DRAWN) or place.stem.endswith(_MIRRORED):
                    continue
                cut = _cut(known[place])
                if cut is not None:
                    yield kind, place.with_suffix("").as_posix().replace("/", "_"), cut


def _cut(data: bytes) -> Image.Image | None:
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
    except OSError:  # the package has a few that Pillow cannot read
        return None
    box = picture.getchannel("A").point(lambda value: 255 * (value > 64)).getbbox()
    if not box:
        return None
    picture = picture.crop(box)
    if max(picture.size) > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    values = np.asarray(picture)
    solid = values[values[..., 3] > 200][:, :3]
    return picture if len(solid) >= 200 and len(np.unique(solid // 8, axis=0)) >= 120 else None


def _place(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _composed(objects: _Objects, places: Sequence[Image.Image], seed: int) -> Scene:
    """One to four objects on a place, each of which is mostly seen."""
    rng, kinds = np.random.RandomState(seed), list(_KINDS)
    while True:
        canvas, owner, drawn = _background(places, rng), np.zeros((_SIDE, _SIDE), np.uint8), list[tuple[str, int]]()
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


def _background(places: Sequence[Image.Image], rng: np.random.RandomState) -> Image.Image:
    place = places[rng.randint(len(places))]
    least = min(place.size)
    side = rng.uniform(_SIDE + 1, least) if least > _SIDE else least
    x, y = rng.uniform(0, place.width - side), rng.uniform(0, place.height - side)
    seen = place.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else seen


def _turned(piece: Image.Image, rng: np.random.RandomState) -> Image.Image:
    scale = float(np.exp(rng.uniform(*np.log(_SIZES)))) / max(piece.size)
    size = max(1, round(piece.width * scale)), max(1, round(piece.height * scale))
    piece = piece.resize(size, Image.Resampling.LANCZOS)
    if rng.rand() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return piece.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)


def _box(shape: NpArray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


STAMPS_SCENE = SceneTask(
    classes=tuple(_KINDS),
    background="background",
    licence="stamps public domain, GPL-2.0-or-later and CC by file; Scratch's media CC BY-SA",
    files=(
        DebianFolder(
            "tuxpaint-stamps-default", "2022.06.04-1", "/usr/share/tuxpaint/stamps",
            tuple(itertools.chain.from_iterable(_KINDS.values())), "*.png", "bb86e5fa3623f0ce",
        ),
        DebianFolder(
            "scratch", "1.4.0.6~dfsg1-6.1", "/usr/share/scratch/Media/Backgrounds", _PLACES, "*.jpg",
            "6fd92d5cd947a15d",
        ),
    ),
    collect=_stamps_scene,
)  # fmt: skip
