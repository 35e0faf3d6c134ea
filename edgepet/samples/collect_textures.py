"""Tasks that are cut from photographed textures."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from edgepet.samples.packages import DebianFile
from edgepet.samples.pools import Pools, Task, empty_pools, opaque, split_groups
from edgepet.spec import NpArray

# A texture is of the one material that its file name speaks of.
_MATERIALS = {
    "brick": r"brick",
    "carpet": r"carpet",
    "concrete": r"concrete",
    "dirt": r"dirt|soil|mud|desert|sand",
    "grass": r"grass|hedge",
    "metal": r"metal|rust",
    "rock": r"rock|stone|cliff",
    "roof": r"roof|shingle",
    "tile": r"tile",
    "wallpaper": r"wallpaper",
    "wood": r"wood|plank|bark",
}
_OTHER_THINGS = re.compile(
    r"window|door|sign|crate|path|fence|broke|light|pipe|vent|trim|border|edge|transition|stair|blend|lawn_|_way_"
    r"|dirty|duct|grate|cover|bridge|ceiling"
)
_OTHER_MAPS = re.compile(r"_(nm|gm|sm|norm|spec)\.|/tex_(pics|vehicles|lights|ufo|furniture|common|anim|alienb)/")
_PATCH, _PATCHES = 112, 12  # pixels of a side; of each texture


class _Texture(NamedTuple):
    name: str
    material: str
    picture: Image.Image  # 256 pixels on its shorter side
    look: NpArray  # (576,): 24 x 24 gray values, centred, of norm one


def _materials(contents: Sequence[bytes]) -> Pools:
    """Patches of textures; no two splits share a texture, nor textures of one material that look alike."""
    textures, pools, rng = list(_textures(contents[0])), empty_pools(), np.random.RandomState(6)
    family = _families(np.array([texture.look for texture in textures]))
    for material in _MATERIALS:
        members = [(f"{material}{family[i]}", one) for i, one in enumerate(textures) if one.material == material]
        split = split_groups((name for name, _ in members), seed=7)
        for name, texture in members:
            digest = hashlib.md5(texture.name.encode(), usedforsecurity=False).hexdigest()
            for number in range(_PATCHES):
                x = rng.randint(0, texture.picture.width - _PATCH + 1)
                y = rng.randint(0, texture.picture.height - _PATCH + 1)
                patch = partial(texture.picture.crop, (x, y, x + _PATCH, y + _PATCH))
                pools[split[name]].append((f"{digest[:8]}_{number}", material, patch))
    return pools


def _textures(archive: bytes) -> Iterator[_Texture]:
    """Those of one material, each picture once, by name."""
    files, seen = zipfile.ZipFile(io.BytesIO(archive)), set[bytes]()
    for name in sorted(files.namelist()):
        base = name.rpartition("/")[2].lower()
        spoken_of = [material for material, words in _MATERIALS.items() if re.search(words, base)]
        if not base.endswith((".jpg", ".png", ".tga")) or len(spoken_of) != 1:
            continue
        if _OTHER_MAPS.search(name) or _OTHER_THINGS.search(base):
            continue
        picture = opaque(Image.open(io.BytesIO(files.read(name))), (255, 255, 255))
        gray = picture.convert("L")
        coarse = gray.resize((8, 8), Image.Resampling.BOX).tobytes()
        if min(picture.size) >= 128 and coarse not in seen:
            seen.add(coarse)
            look = np.asarray(gray.resize((24, 24), Image.Resampling.BOX), np.float64).ravel()
            look = look - look.mean()
            scale = 256 / min(picture.size)
            size = (max(256, round(picture.width * scale)), max(256, round(picture.height * scale)))
            resized = picture.resize(size, Image.Resampling.LANCZOS)
            yield _Texture(name, spoken_of[0], resized, look / (np.linalg.norm(look) + 1e-9))


def _families(looks: NpArray) -> list[int]:
    """A number for each of (n, 576): the same for textures that correlate, with others between them or directly.

    They are coloured or dirtied variants of each other. The numbers name the families that splits are drawn from.
    """
    parent = list(range(len(looks)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in np.argwhere(np.tril(np.abs(looks @ looks.T) > 0.7, -1)):  # by rows: each with those before it
        parent[root(i)] = root(j)
    return [root(i) for i in range(len(looks))]


MATERIALS = Task(
    classes=tuple(_MATERIALS),
    licence="GPL-2, GPL-3, CC BY-SA 3.0, CC BY 3.0, MIT or public domain, by file",
    files=(DebianFile("ufoai-textures", "2.5-2", "/usr/share/games/ufoai/base/0textures.pk3", "5fb8813eeb8e1de4"),),
    seed=16,
    collect=_materials,
)
