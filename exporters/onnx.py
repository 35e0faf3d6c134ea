"""A standalone ONNX model: the base graph with a task's dense weights written in, and its head appended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.device.answers import labels_of
from edgepet.device.map_heads import map_heads_of
from edgepet.device.onnxruntime import open_model
from edgepet.errors import CheckError, InputError, first_line, option, require
from edgepet.exporters.constants import compute_constants
from edgepet.exporters.exporter import ExportOptions, Written
from edgepet.exporters.portable import in_opset
from edgepet.files import scratch_folder, write_file, write_parts
from edgepet.graphs.base import FEATURES, INPUT, LOGITS, BaseGraph
from edgepet.graphs.head_graph import with_head
from edgepet.graphs.onnx_file import read_onnx
from edgepet.graphs.tensor_files import laid_out, lightened, put_inside, stored_bytes
from edgepet.spec import NpArray, StoredPrecision, Tensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

MODEL, DATA = "model.onnx", "model.onnx.data"
MAX_SINGLE_FILE_BYTES = 1_900_000_000  # protobuf cannot hold 2 GiB
_HEAD = ("head.weight", "head.bias")


def build_model(graph: BaseGraph, tensors: Tensors, delta: Delta) -> ModelProto:
    """An ``onnx.ModelProto`` that takes images and puts out logits, of masks the mask beside them; nothing is traced.

    Args:
        tensors: merged weights, and tensors of branches, for every initializer of ``graph`` that lies in a file.

    Raises:
        BackboneError, InputError: as ``BaseGraph.require_fit``.
        MissingError: onnx is not installed.
    """
    graph.require_fit(delta)
    onnx = require("onnx", extra="train", purpose="ONNX")
    heads = map_heads_of(delta)
    model: ModelProto
    if not heads:
        model = onnx.load(str(graph.model_path), load_external_data=False)
    else:
        size, file = delta.preprocess.image_size, read_onnx(graph.model_path)
        behind = with_head(file, [head.astype(np.float32) for head in heads], graph.maps, graph.width, size)
        model = onnx.ModelProto.FromString(behind.encoded())
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            put_inside(tensor, tensors[tensor.name])
    if not heads:
        _put_classifier(model, delta)
    facts: dict[str, object] = {"task": delta.task}
    facts |= {} if len(heads) > 1 else {"labels": list(labels_of(delta))}
    facts["preprocess"] = delta.preprocess.as_json()
    if len(heads) > 1:
        facts["heads"] = {head.name: {"answer": head.answer, "labels": list(head.labels)} for head in heads}
    elif heads:
        facts["answer"] = heads[0].answer
    for key, fact in facts.items():
        text = fact if isinstance(fact, str) else canonical_json(fact).decode("utf-8")
        model.metadata_props.add(key=f"edgepet.{key}", value=text)
    compute_constants(model, {name for branch in delta.branches if branch.kind == "prompts" for name in branch.named})
    return model


def _put_classifier(model: ModelProto, delta: Delta) -> None:
    """Put the product of a classifier behind the features of ``model``."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    for name, value in zip(_HEAD, (delta.head.weight, delta.head.bias), strict=True):
        array = np.ascontiguousarray(value, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"edgepet.{name}"))
    inputs = [FEATURES, *(f"edgepet.{name}" for name in _HEAD)]
    model.graph.node.append(onnx.helper.make_node("Gemm", inputs, [LOGITS], name="edgepet.head", transB=1))
    batch = model.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    del model.graph.output[:]
    logits = onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, [batch, len(delta.labels)])
    model.graph.output.append(logits)


def serialize(model: ModelProto) -> bytes:
    """The bytes of a model; the same model gives the same bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def fits_one_file(model: ModelProto) -> bool:
    """Whether protobuf can make bytes of ``model``."""
    return sum(stored_bytes(tensor) for tensor in model.graph.initializer) <= MAX_SINGLE_FILE_BYTES


def write_onnx(
    model: ModelProto, folder: Path, *, external: bool = False, opset: int | None = None, where: str = "ONNX model"
) -> list[str]:
    """Write ``model.onnx``, with ``external`` its weights in ``model.onnx.data`` beside it; returns the file names.

    Weights that one file cannot hold lie beside it in any case. ``model`` is not touched.

    Args:
        opset: an older one than the model's, to say the same in.

    Raises:
        InputError: ``folder`` cannot be written, or ``opset`` has no words for an operator of ``where``.
    """
    beside = external or not fits_one_file(model)
    if opset is None and not beside:
        write_file(folder / MODEL, serialize(model))
        return [MODEL]
    light, outside = lightened(model, DATA)
    if opset is not None:
        light = in_opset(light, opset, where=where)
    if beside:
        write_parts(folder / DATA, _paged(outside))
    else:
        pointing = (tensor for tensor in light.graph.initializer if tensor.data_location == tensor.EXTERNAL)
        for tensor, source in zip(pointing, outside, strict=True):
            tensor.CopyFrom(source)
    write_file(folder / MODEL, serialize(light))
    if opset is not None:
        _require_valid(folder / MODEL, opset, where)
    return [MODEL, DATA] if beside else [MODEL]


def _require_valid(path: Path, opset: int, where: str) -> None:
    """Refuse a model that is not what its opset says: ONNX Runtime is more lenient than the parsers it is made for."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        fix = f"a higher {option('opset')}"
        raise InputError(where, f"cannot be written in opset {opset}", got=first_line(error), fix=fix) from error


def _paged(tensors: Iterable[TensorProto]) -> Iterator[bytes]:
    """What a file of ``tensors`` holds, in pieces: as many weights are in memory as the largest of them."""
    end = 0
    for offset, tensor in laid_out(tensors):
        yield bytes(offset - end)
        yield tensor.raw_data
        end = offset + stored_bytes(tensor)


@contextlib.contextmanager
def readable(model: ModelProto, folder: Path) -> Iterator[bytes | Path]:
    """``model`` as other libraries read it: its bytes, or where one file cannot hold it a path, gone with the block.

    Raises:
        InputError: ``folder``, where it is then written for a while, cannot be.
    """
    if fits_one_file(model):
        yield serialize(model)
        return
    with scratch_folder(folder / "onnx") as scratch:
        write_onnx(model, scratch)
        yield scratch / MODEL


def export(model: ModelProto, precision: StoredPrecision, folder: Path, options: ExportOptions, task: str) -> Written:
    """Write ``model`` itself; see ``Exporter``, and ``write_onnx`` for what it raises."""
    del precision
    names = write_onnx(model, folder, external=options.external_data, opset=options.opset, where=task)
    return Written(names, "onnxruntime")


def simplified(model: ModelProto, images: NpArray, *, where: str) -> ModelProto:
    """``model`` through onnxsim, kept only if ONNX Runtime answers the same within 1e-4 of the largest logit.

    The result has lost parameter names: it is for standalone artefacts, never for a base graph. ``images`` are float32
    (n, 3, H, W).

    Raises:
        MissingError: onnxsim is not installed.
        InputError: onnxsim failed on this model, or it is too large for it.
        CheckError: the simplified model answers otherwise.
    """
    onnxsim = require("onnxsim", extra="onnxsim", purpose=option("simplify"))
    if not fits_one_file(model):
        raise InputError(where, "is larger than what onnxsim takes, 2 GiB", fix=f"leave out {option('simplify')}")
    simple: ModelProto
    simple, checked = onnxsim.simplify(model, check_n=0)
    if not checked:
        raise InputError(where, "could not be simplified by onnxsim", fix=f"leave out {option('simplify')}")
    answers = [open_model(each).run(None, {INPUT: images})[0] for each in (model, simple)]
    worst, limit = float(np.abs(answers[0] - answers[1]).max()), 1e-4 * float(np.abs(answers[0]).max())
    if not worst <= limit:
        raise CheckError(
            where,
            f"the simplified model must answer within {limit:.1e}",
            got=f"{worst:.1e}",
            fix=f"leave out {option('simplify')}",
        )
    return simple
