"""Objects cut out by hand (Tux Paint's stamps) and photographs of places (Scratch's backgrounds) to put them on."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from edgepet.samples.packages import DebianFolder

KINDS = {
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
LICENCE = "stamps public domain, GPL-2.0-or-later and CC by file; Scratch's media CC BY-SA"
FILES = (
    DebianFolder(
        "tuxpaint-stamps-default", "2022.06.04-1", "/usr/share/tuxpaint/stamps",
        tuple(itertools.chain.from_iterable(KINDS.values())), "*.png", "bb86e5fa3623f0ce",
    ),
    DebianFolder(
        "scratch", "1.4.0.6~dfsg1-6.1", "/usr/share/scratch/Media/Backgrounds",
        ("Indoors", "Nature", "Outdoors", "Sports"), "*.jpg", "6fd92d5cd947a15d",
    ),
)  # fmt: skip
_DRAWN = ("cartoon", "toys", "plastic")  # in a path: no photograph
_MIRRORED = ("_mirror", "_flip", "_mirror_flip")
_LARGEST = 320  # pixels of an object
_CUTS = {"train": (0, 0.44), "val": (0.44, 0.56), "test": (0.56, 1)}  # of the places


@dataclass(frozen=True, slots=True, eq=False)
class Cutout:
    """A photograph of one object, RGBA, cut to what is there."""

    kind: str
    name: str
    picture: Image.Image


def read_cutouts(archive: bytes) -> list[Cutout]:
    """The objects of Tux Paint's stamps, kind by kind; drawings are told by their paths or few colours."""
    known, found = {place: data for place, data in files_in(archive) if place.suffix == ".png"}, list[Cutout]()
    for kind, folders in KINDS.items():
        for folder in folders:
            for place in sorted(each for each in known if each.is_relative_to(folder)):
                if any(word in place.as_posix() for word in _DRAWN) or place.stem.endswith(_MIRRORED):
                    continue
                cut = _cut(known[place])
                if cut is not None:
                    found.append(Cutout(kind, place.with_suffix("").as_posix().replace("/", "_"), cut))
    return found


def read_places(archive: bytes) -> dict[str, list[Image.Image]]:
    """Scratch's photographs of places, by split: no two have one in common."""
    places = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in files_in(archive)]
    order, by_split = np.random.RandomState(14).permutation(len(places)), dict[str, list[Image.Image]]()
    for split, edges in _CUTS.items():
        first, last = (round(edge * len(order)) for edge in edges)
        by_split[split] = [places[place] for place in order[first:last]]
    return by_split


def files_in(archive: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of an archive, by their paths in it, in their order."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as held:
        for member in held:
            file = held.extractfile(member)
            if file is not None:
                yield PurePosixPath(member.name), file.read()


def background(places: Sequence[Image.Image], side: int, rng: np.random.RandomState) -> Image.Image:
    """A square part of one of ``places``, ``side`` pixels wide, half of the time mirrored."""
    place = places[rng.randint(len(places))]
    least = min(place.size)
    part = rng.uniform(side + 1, least) if least > side else least
    x, y = rng.uniform(0, place.width - part), rng.uniform(0, place.height - part)
    seen = place.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + part, y + part))
    return seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else seen


def sized(piece: Image.Image, side: float) -> Image.Image:
    """``piece`` with a longer side of ``side`` pixels."""
    scale = side / max(piece.size)
    size = max(1, round(piece.width * scale)), max(1, round(piece.height * scale))
    return piece.resize(size, Image.Resampling.LANCZOS)


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
