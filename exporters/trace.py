"""Trace a backbone once: an ONNX graph in which every parameter keeps its state-dict name and shape."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import safetensors.numpy

from edgepet.deltas.branches import ATTENTION, Branch, named_tensors, structure_digest, structure_of
from edgepet.deltas.heads import Map
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.onnxruntime_shared import OnnxRuntimePart
from edgepet.errors import CheckError, InputError, require
from edgepet.files import made_folder, write_file
from edgepet.graphs.base import (
    FEATURES,
    INPUT,
    WEIGHTS,
    BaseGraph,
    graph_folder,
    graph_stem,
    open_graph,
    write_graph_json,
)
from edgepet.graphs.maps import GraphMap
from edgepet.graphs.onnx_file import IR_VERSION, OPSET
from edgepet.graphs.parts import part_of
from edgepet.graphs.tensor_files import Place, point_into, safetensors_places
from edgepet.networks.backbone import Backbone
from edgepet.networks.forms import explicit_attention
from edgepet.networks.sizes import quiet
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn
    from torch.onnx import ONNXProgram

_Ir: TypeAlias = Any  # onnx_ir's model or node, which torch and onnxscript hand on without types


def base_graph(
    backbone: Backbone, branches: Sequence[Branch] = (), *, root: Path | None = None, needs_maps: bool = False
) -> BaseGraph:
    """The graph of ``backbone`` with branches of one structure, from the cache or traced now; then checked.

    Args:
        branches: their values, in any precision, are left out of the graph: each task brings its own.
        needs_maps: one that lists no maps, as earlier versions wrote them, is made again.

    Raises:
        InputError: torch cannot export an operator of this network, or a tensor of it gets lost or another shape.
        CheckError: ONNX Runtime answers otherwise than torch.
        MissingError: onnxscript is not installed.
    """
    branches = [b.with_tensors({n: np.zeros(t.shape, np.float32) for n, t in b.named.items()}) for b in branches]
    structure = structure_digest(structure_of(branches))
    folder = graph_folder(backbone.fingerprint, root)
    if (folder / f"{graph_stem(backbone.preprocess, structure)}.json").is_file():
        with contextlib.suppress(InputError):  # a damaged cache is made again
            found = open_graph(backbone.fingerprint, backbone.preprocess, structure, root=root)
            if found.maps or not needs_maps:
                return found
    _make(backbone, branches, folder)
    graph = open_graph(backbone.fingerprint, backbone.preprocess, structure, root=root)
    _check(graph, backbone, branches)
    return graph


def keep_weights(backbone: Backbone, folder: Path | None = None, *, anew: bool = False) -> None:
    """Write the backbone's tensors where graphs lie, by default the cache: a pack finds its backbone there again.

    A file of the same size is left as it is, unless ``anew``.

    Raises:
        InputError: the file cannot be written.
    """
    folder = folder or graph_folder(backbone.fingerprint)
    made_folder(folder, "backbones and graphs are kept there")
    data = safetensors.numpy.save({name: np.asarray(tensor, order="C") for name, tensor in backbone.native.items()})
    if anew or not (folder / WEIGHTS).is_file() or (folder / WEIGHTS).stat().st_size != len(data):
        write_file(folder / WEIGHTS, data)


def _make(backbone: Backbone, branches: Sequence[Branch], folder: Path) -> None:
    structure = structure_of(branches)
    stem = graph_stem(backbone.preprocess, structure_digest(structure))
    keep_weights(backbone, folder, anew=True)  # what was there may be damaged
    native = backbone.native
    tables = {name: t for name, t in backbone.tensors.items() if name not in native or native[name].shape != t.shape}
    tables |= named_tensors(branches)
    files = [WEIGHTS, f"{stem}.onnx"]
    places = safetensors_places(folder / WEIGHTS)
    if tables:
        files.append(f"{stem}.safetensors")
        write_file(folder / files[-1], safetensors.numpy.save({n: np.asarray(t, order="C") for n, t in tables.items()}))
        places |= safetensors_places(folder / files[-1])
    model, maps = _traced(backbone, branches)
    _externalise(model, places, {*backbone.tensors, *named_tensors(branches)} - backbone.unread, backbone)
    write_file(folder / f"{stem}.onnx", model.SerializeToString(deterministic=True))
    facts = {
        "backbone": backbone.label,
        "architecture": backbone.name,
        "fingerprint": backbone.fingerprint,
        "preprocess": backbone.preprocess.as_json(),
        "width": backbone.width,
        "create_args": backbone.create_args,
        "licence": backbone.licence,
        "branches": structure,
        "versions": {name: version(name) for name in ("torch", "timm", "onnx", "onnxscript")},
        **({"maps": [each.as_json() for each in maps]} if maps else {}),
    }
    write_graph_json(folder, stem, facts, files)


def _traced(backbone: Backbone, branches: Sequence[Branch]) -> tuple[ModelProto, tuple[GraphMap, ...]]:
    """The graph that puts out features, and the tensors of it that maps lie in."""
    import torch

    from edgepet.networks.graft import Grafted, in_torch
    from edgepet.networks.maps import layouts_of

    require("onnxscript", extra="train", purpose="exporting a graph")
    maps = _maps_of(backbone)
    # The exporter passes over hooks of what it is given.
    wrapped = bool(branches) or bool(maps) or backbone.preprocess.frames > 1
    module = Grafted(backbone.module, in_torch(branches), maps) if wrapped else backbone.module
    failures = (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException)
    try:
        try:
            program = _export(module, backbone.preprocess.input_shape)
        except failures:  # torch exports fused attention of four axes only; as two products any number goes
            if any(branch.kind in ATTENTION for branch in branches):
                raise  # further keys and values go into the fused operator
            with explicit_attention(backbone.module):
                program = _export(module, backbone.preprocess.input_shape)
    except failures as error:
        raise InputError(
            backbone.label, "cannot be exported to ONNX", got=_reason(error), fix="export another architecture"
        ) from error
    named = list(named_tensors(branches))
    if wrapped:
        _rename(program.model, {f"tensors.{i}": name for i, name in enumerate(named)})
    _tidy(program.model, {*backbone.tensors, *named})
    tensors = [str(output.name) for output in program.model.graph.outputs][1:]
    del program.model.graph.outputs[1:]  # who wants maps puts them out: the file is what it is without them
    traced: ModelProto = program.model_proto
    layouts = layouts_of(backbone.module, maps, backbone.preprocess.input_shape)
    placed = zip(maps, tensors, strict=True)
    return traced, tuple(GraphMap(map=each, tensor=name, layout=layouts[each.name]) for each, name in placed)


def _maps_of(backbone: Backbone) -> tuple[Map, ...]:
    """The maps that the backbone has; a network without any is traced as well."""
    try:
        return backbone.maps
    except InputError:
        return ()


def _rename(model: _Ir, names: Mapping[str, str]) -> None:
    """Initializers of a grafted network, as the backbone and its branches call them."""
    for old, value in list(model.graph.initializers.items()):
        value.name = names.get(old, old.removeprefix("backbone."))


def _export(module: nn.Module, input_shape: tuple[int, ...]) -> ONNXProgram:
    import torch

    # It reports to stdout, warnings and a logger; what matters comes back as an error.
    with quiet("torch.onnx"), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (torch.zeros(2, *input_shape),),
            dynamo=True,
            optimize=False,  # optimising renames, transposes and merges parameters
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[FEATURES],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return cast("ONNXProgram", program)  # of a file's name alone it would be None


def _tidy(model: _Ir, parameters: set[str]) -> None:
    """Compute what depends on no parameter and no image: TensorRT wants axes and sizes as constants.

    A convolution without a bias gets one of zeros from torch, built at run time from the kernel's shape: it goes.
    """
    from onnxscript.optimizer import fold_constants

    def keeps_parameters(node: _Ir) -> bool | None:
        reads = any(read is not None and read.name in parameters for read in node.inputs)
        return False if reads and node.op_type != "Shape" else None  # None: as the folder itself decides

    fold_constants(model, should_fold=keeps_parameters, output_size_limit=1 << 24)
    for node in reversed(model.graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)  # the library's own pass would take unread parameters with them
            continue
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
        value = None if bias is None or bias.name in parameters else bias.const_value
        if value is not None and not value.numpy().any():  # a parameter may be zeros too, until a task moves it
            node.resize_inputs(2)


def _externalise(model: ModelProto, places: dict[str, Place], wanted: set[str], backbone: Backbone) -> None:
    """Point parameters into the weights files, and take out what torch adds: it is 1.4 MB and names local paths."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "edgepet", "", ""
    for holder in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del model.graph.value_info[:]
    seen = set()
    for tensor in model.graph.initializer:
        place = places.get(tensor.name)
        if place is None:
            continue
        if tuple(tensor.dims) != place.shape:
            raise InputError(backbone.spec, f"{tensor.name} must keep its shape {place.shape}", got=tuple(tensor.dims))
        seen.add(tensor.name)
        point_into(tensor, place.file, place.offset, place.length)
    integers = {name for name, tensor in backbone.tensors.items() if tensor.dtype.kind != "f"}
    lost = sorted(wanted - integers - seen)
    if lost:
        raise InputError(
            backbone.spec, "every tensor must survive as an initializer", got=f"{', '.join(lost[:3])} lost"
        )


def _check(graph: BaseGraph, backbone: Backbone, branches: Sequence[Branch]) -> None:
    import torch

    from edgepet.networks.graft import grafted, in_torch
    from edgepet.networks.maps import taking

    rng, names = np.random.default_rng(0), [each.map.name for each in graph.maps]
    images = rng.normal(size=(3, *graph.preprocess.input_shape)).astype(np.float32)
    drawn = {name: rng.normal(0, 0.05, t.shape).astype(np.float32) for name, t in named_tensors(branches).items()}
    planted = in_torch([branch.with_tensors(drawn) for branch in branches])
    maps = [each.map for each in graph.maps]
    with torch.no_grad(), grafted(backbone.module, planted), taking(backbone.module, maps) as taken:
        features: NpArray = backbone.module(torch.from_numpy(images)).numpy()
    with OnnxRuntime.of_graph(graph, drawn) as runner:
        _require_near(graph, backbone, FEATURES, features, runner(images))
    if names:
        network = OnnxRuntimePart(part_of(graph).putting_out(graph.maps, names), drawn)
        for name, got in zip(names, network.bind({}).outputs(images), strict=True):
            _require_near(graph, backbone, name, taken[name].numpy(), got)
        network.close()


def _require_near(graph: BaseGraph, backbone: Backbone, name: str, expected: NpArray, got: NpArray) -> None:
    worst, limit = float(np.abs(got - expected).max()), 1e-4 * float(np.abs(expected).max())
    if not worst <= limit:
        graph.model_path.with_suffix(".json").unlink()
        what = "" if name == FEATURES else f" in {name}"
        raise CheckError(
            backbone.spec, f"the traced graph must answer as torch does{what}, within {limit:.1e}", got=f"{worst:.1e}"
        )


def _reason(error: BaseException) -> str:
    """The operator that could not be exported, from the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return json.dumps(lines[0][:160]) if lines else type(error).__name__
