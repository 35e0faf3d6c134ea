"""Crowns of trees on aerial photographs of 10 cm a pixel, boxes that people drew: what DeepForest carries as samples.

Two photographs of Yellowstone, 13 km apart, are cut into parts without overlap for all three splits; test has two
forests more, in Florida and California.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from edgepet.samples.packages import PackageFile
from edgepet.samples.scenes import NamedScene, Scene, SceneObject, Scenes, SceneTask
from edgepet.spec import NpArray

_TILE, _KEPT = 200, 0.4  # pixels of a tile's side; a crown of which less lies inside is not counted
_FIRST, _SECOND = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
_FILES = {
    _FIRST: ("a9bdb0f4447fdd89", "bd431af6a5086d72"),
    _SECOND: ("178e58a23cc26422", "cefe4b96888bacbf"),
    "OSBS_029": ("d9477c6a00e4902c", "1f68c4011d7b351c"),
    "SOAP_061": ("256508f1a62149be", "4833280af75fd9c4"),
}
_SPLIT_Y, _SPLIT_X = 1900, 649  # of the first photograph, and of the second
_CORNERS = [re.compile(rb"<%s>\s*([0-9.]+)\s*</%s>" % (name, name)) for name in (b"xmin", b"ymin", b"xmax", b"ymax")]


@dataclass(frozen=True, slots=True, eq=False)
class _Photograph:
    name: str
    picture: Image.Image
    boxes: NpArray  # (n, 4): x1, y1, x2, y2

    def tiles(
        self, step: int, *, x0: int = 0, y0: int = 0, x1: int = 1 << 16, y1: int = 1 << 16
    ) -> Iterator[NamedScene]:
        """Tiles of a part of it with a crown or more."""
        right, lower = min(x1, self.picture.width), min(y1, self.picture.height)
        whole = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        for y in range(y0, lower - _TILE + 1, step):
            for x in range(x0, right - _TILE + 1, step):
                near = np.clip(self.boxes - [x, y, x, y], 0, _TILE)
                sides = near[:, 2:] - near[:, :2]
                kept = sides.prod(axis=1) >= _KEPT * whole
                if kept.any():
                    found = [
                        (left, top, *size) for left, top, *size in np.hstack([near[kept, :2], sides[kept]]).tolist()
                    ]
                    yield f"{self.name[:14]}_{x:04d}_{y:04d}", partial(self._scene, x, y, found)

    def _scene(self, x: int, y: int, found: list[tuple[float, float, float, float]]) -> Scene:
        objects = tuple(SceneObject("tree", box) for box in found)
        return Scene(self.picture.crop((x, y, x + _TILE, y + _TILE)), objects)


def _trees(contents: Sequence[bytes], cap: int | None) -> Scenes:
    first, second, *others = (
        _Photograph(name, Image.open(io.BytesIO(picture)).convert("RGB"), _boxes(text))
        for name, picture, text in zip(_FILES, contents[::2], contents[1::2], strict=True)
    )
    test = [*second.tiles(_TILE, x0=_SPLIT_X), *(tile for each in others for tile in each.tiles(_TILE))]
    return {
        "train": [*first.tiles(_TILE // 2, y1=_SPLIT_Y), *second.tiles(_TILE // 2, x1=_SPLIT_X)],
        "val": list(first.tiles(_TILE, y0=_SPLIT_Y)),
        "test": test[:cap],
    }


def _boxes(text: bytes) -> NpArray:
    """The corners of every object of one of Pascal VOC's files, as they are written: the files' digests are known."""
    return np.array([[float(value) for value in corner.findall(text)] for corner in _CORNERS]).T


TREES = SceneTask(
    classes=("tree",),
    licence="package MIT; photographs NEON (National Ecological Observatory Network)",
    files=tuple(
        PackageFile("deepforest", "2.1.0", f"deepforest/data/{name}.{ending}", digest, extra="")
        for name, digests in _FILES.items()
        for ending, digest in zip(("png", "xml"), digests, strict=True)
    ),
    collect=_trees,
)
