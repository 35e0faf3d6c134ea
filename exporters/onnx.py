"""A standalone ONNX model: the base graph with a task's dense weights written in, and its head appended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.canonical import canonical_json
from edgepet.deltas.delta import Delta
from edgepet.device.onnxruntime import open_session
from edgepet.errors import CheckError, InputError, option, require
from edgepet.exporters.exporter import ExportOptions, Written
from edgepet.files import write_file
from edgepet.graphs.base import FEATURES, INPUT, LOGITS, BaseGraph
from edgepet.graphs.tensor_files import point_into, put_inside
from edgepet.spec import NpArray, StoredPrecision, Tensors

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

MODEL = "model.onnx"
MAX_SINGLE_FILE_BYTES = 1_900_000_000  # protobuf cannot hold 2 GiB
_HEAD = ("head.weight", "head.bias")


def build_model(graph: BaseGraph, tensors: Tensors, delta: Delta) -> ModelProto:
    """An ``onnx.ModelProto`` that takes images and puts out logits; nothing is traced.

    Args:
        tensors: merged weights, and tensors of branches, for every initializer of ``graph`` that lies in a file.

    Raises:
        BackboneError, InputError: as ``BaseGraph.require_fit``.
        MissingError: onnx is not installed.
    """
    graph.require_fit(delta)
    onnx = require("onnx", extra="train", purpose="ONNX")
    model: ModelProto = onnx.load(str(graph.model_path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            put_inside(tensor, tensors[tensor.name])
    for name, value in zip(_HEAD, (delta.head.weight, delta.head.bias), strict=True):
        array = np.ascontiguousarray(value, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"edgepet.{name}"))
    inputs = [FEATURES, *(f"edgepet.{name}" for name in _HEAD)]
    model.graph.node.append(onnx.helper.make_node("Gemm", inputs, [LOGITS], name="edgepet.head", transB=1))
    batch = model.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    del model.graph.output[:]
    logits = onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, [batch, len(delta.labels)])
    model.graph.output.append(logits)
    facts = {"task": delta.task, "labels": list(delta.labels), "preprocess": delta.preprocess.as_json()}
    for key, fact in facts.items():
        text = fact if isinstance(fact, str) else canonical_json(fact).decode("utf-8")
        model.metadata_props.add(key=f"edgepet.{key}", value=text)
    _compute_prompts(model, {name for branch in delta.branches if branch.kind == "prompts" for name in branch.named})
    return model


def _compute_prompts(model: ModelProto, prompts: set[str]) -> None:
    """Put the keys and values that deep prompts become, which depend on no image, in place of what computes them."""
    graph = model.graph
    known, source = {tensor.name for tensor in graph.initializer}, {name: name for name in prompts}
    constant, gone = [], []
    for node in graph.node if prompts else ():
        if all(name in known for name in node.input if name):
            constant.append(node)
            known |= set(node.output)
            if found := [source[name] for name in node.input if name in source]:
                gone.append(node)
                source |= dict.fromkeys(node.output, found[0])
    for node in gone:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    made = {name: f"{source[name]}.{i}" for i, name in enumerate(n for node in gone for n in node.output if n in read)}
    _replace(graph, made, _evaluate(model, constant, list(made)) if made else [])
    lost = {name for node in gone for name in node.input} - read
    for tensor in [tensor for tensor in graph.initializer if tensor.name in lost]:
        graph.initializer.remove(tensor)


def _evaluate(model: ModelProto, nodes: list[NodeProto], wanted: list[str]) -> list[NpArray]:
    """The values named ``wanted``, which ``nodes`` compute from initializers alone."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    reads = {name for node in nodes for name in node.input}
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in reads]
    part = onnx.helper.make_graph(nodes, "constants", [], outputs, tensors)
    alone = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    values: list[NpArray] = open_session(serialize(alone)).run(wanted, {})
    return values


def _replace(graph: GraphProto, names: dict[str, str], values: list[NpArray]) -> None:
    """Let nodes read initializers of the new ``names`` and ``values`` instead of the old names."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    graph.initializer.extend(map(onnx.numpy_helper.from_array, values, names.values()))


def serialize(model: ModelProto) -> bytes:
    """The bytes of a model; the same model gives the same bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def write_onnx(model: ModelProto, folder: Path, *, external: bool = False) -> list[str]:
    """Write ``model.onnx``, with ``external`` its weights in ``model.onnx.data`` beside it; returns the file names.

    Weights that one file cannot hold lie beside it in any case. ``model`` is not touched.

    Raises:
        InputError: ``folder`` cannot be written.
    """
    if not external and model.ByteSize() <= MAX_SINGLE_FILE_BYTES:
        write_file(folder / MODEL, serialize(model))
        return [MODEL]
    light = type(model)()
    light.CopyFrom(model)
    blob, offset = [], 0
    for tensor in light.graph.initializer:
        data = tensor.raw_data
        if len(data) < 1024:
            continue
        padding = -offset % 4096  # runtimes map the file: page by page
        blob += [bytes(padding), data]
        point_into(tensor, f"{MODEL}.data", offset + padding, len(data))
        offset += padding + len(data)
    write_file(folder / f"{MODEL}.data", *blob)
    write_file(folder / MODEL, serialize(light))
    return [MODEL, f"{MODEL}.data"]


def export(model: ModelProto, precision: StoredPrecision, folder: Path, options: ExportOptions, task: str) -> Written:
    """Write ``model`` itself; see ``Exporter``, and ``write_onnx`` for what it raises."""
    del precision, task
    return Written(write_onnx(model, folder, external=options.external_data), "onnxruntime")


def simplified(model: ModelProto, images: NpArray, *, where: str) -> ModelProto:
    """``model`` through onnxsim, kept only if ONNX Runtime answers the same within 1e-4 of the largest logit.

    The result has lost parameter names: it is for standalone artefacts, never for a base graph. ``images`` are float32
    (n, 3, H, W).

    Raises:
        MissingError: onnxsim is not installed.
        InputError: onnxsim failed on this model.
        CheckError: the simplified model answers otherwise.
    """
    onnxsim = require("onnxsim", extra="onnxsim", purpose=option("simplify"))
    simple: ModelProto
    simple, checked = onnxsim.simplify(model, check_n=0)
    if not checked:
        raise InputError(where, "could not be simplified by onnxsim", fix=f"leave out {option('simplify')}")
    answers = [open_session(serialize(each)).run(None, {INPUT: images})[0] for each in (model, simple)]
    worst, limit = float(np.abs(answers[0] - answers[1]).max()), 1e-4 * float(np.abs(answers[0]).max())
    if not worst <= limit:
        raise CheckError(
            where,
            f"the simplified model must answer within {limit:.1e}",
            got=f"{worst:.1e}",
            fix=f"leave out {option('simplify')}",
        )
    return simple
