"""Tables of text as files: ``TABLE.safetensors``, or ``TABLE.npy`` beside ``classes.txt``.

A safetensors file has one tensor, ``text``, float32 (K, C), and metadata ``classes``, a JSON list of K names, and
``source``, what made it. An ``.npy`` file has an array of floats (K, C), and its source is its name.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edgepet.canonical import canonical_json, parse_json
from edgepet.deltas.text import TextTable
from edgepet.errors import InputError
from edgepet.files import read_file, write_file
from edgepet.images.dense_folders import CLASSES, class_names
from edgepet.spec import NpArray
from edgepet.strict import ObjectReader

TENSOR = "text"
SUFFIXES = (".safetensors", ".npy")
_ALIGNED = 8  # bytes, as safetensors lays its tensors
_MAKE = "write the tensor text and the metadata classes and source, as docs/guide/text.md shows"


def read_text(path: Path) -> TextTable:
    """The table in a file.

    Raises:
        InputError: it is of another kind, damaged, or no table as ``TextTable`` says.
    """
    if path.suffix not in SUFFIXES:
        what = f"needs a table in a file that ends in {' or '.join(SUFFIXES)}"
        raise InputError(str(path), what, got=repr(path.name))
    data = read_file(path)
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".npy":
        classes, source = class_names(path.with_name(CLASSES), least=1), path.name
        vectors = _array(data, path)
    else:
        vectors, classes, source = _tensor(data, path)
    return TextTable(classes=classes, vectors=vectors, source=source, sha256=digest, where=str(path))


def write_text(path: Path, classes: tuple[str, ...], vectors: NpArray, source: str) -> TextTable:
    """Write a table as ``TABLE.safetensors``, and read it back.

    Raises:
        InputError: it cannot be written, or is no table as ``TextTable`` says.
    """
    held = np.ascontiguousarray(vectors, "<f4")
    tensor = {"dtype": "F32", "shape": list(held.shape), "data_offsets": [0, held.nbytes]}
    metadata = {"classes": json.dumps(list(classes), ensure_ascii=False), "source": source}
    # safetensors writes metadata in an order of chance: two tables of the same words would differ
    header = canonical_json({"__metadata__": metadata, TENSOR: tensor})
    header += b" " * (-len(header) % _ALIGNED)
    data = len(header).to_bytes(8, "little") + header + held.tobytes()
    digest = hashlib.sha256(data).hexdigest()
    table = TextTable(classes=classes, vectors=held, source=source, sha256=digest, where=str(path))
    write_file(path, data)
    return table


def _array(data: bytes, path: Path) -> NpArray:
    try:
        array: NpArray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(str(path), "is no whole array of NumPy's", got=error) from error
    if array.dtype.kind != "f":
        raise InputError(str(path), "needs an array of floats", got=array.dtype.name)
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite then, and refused
        return array.astype(np.float32)


def _tensor(data: bytes, path: Path) -> tuple[NpArray, tuple[str, ...], str]:
    try:
        tensors = safetensors.numpy.load(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(str(path), "is no whole safetensors file", got=error) from error
    if tensors.keys() != {TENSOR} or tensors[TENSOR].dtype != np.float32:
        got = ", ".join(f"{name} {tensor.dtype.name}" for name, tensor in sorted(tensors.items())) or "no tensor"
        raise InputError(str(path), f"needs one tensor, {TENSOR}, of float32", got=got, fix=_MAKE)
    table = ObjectReader(header, str(path), error=InputError)
    if not table.has("__metadata__"):
        raise InputError(str(path), "needs the metadata classes and source", got="none", fix=_MAKE)
    told = table.nested("__metadata__")
    text, source = told.text("classes"), told.text("source")
    told.end()
    try:
        names = ObjectReader({"classes": parse_json(text)}, str(path), error=InputError)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}.classes", "needs a list in JSON", got=error) from error
    return tensors[TENSOR], names.texts("classes"), source
