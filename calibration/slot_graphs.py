"""Make the int8 backbone that all tasks share: its codes once, from its weights alone, and a graph for each runtime.

What differs between tasks is an input of the graph, a slot. For ONNX Runtime a linear layer is ``MatMulIntegerToFloat``
(com.microsoft), which ONNX Runtime itself makes of the Q/DQ form where all scales are constants, and whose scales may
also be inputs; a Q/DQ pair of which one scale is an input would fall back to floats. OpenVINO keeps int8 kernels where
Q/DQ scales are constants: there every code stands for itself, and the scales lie before and behind the product.

Branches stay as they are, in float, with their tensors as slots. The graph of a structure of branches is over the same
file of codes, which those know nothing of: where a branch reads what a layer norm puts out as well, the divisor that
would be in the norm is a node of its own in front of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from edgepet.calibration.backbone_ranges import backbone_ranges
from edgepet.calibration.cuts import find_cuts
from edgepet.calibration.images import CalibrationImages
from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.calibration.rewriting import lifted
from edgepet.calibration.writer import GraphWriter, settings_of
from edgepet.canonical import parse_json
from edgepet.deltas.branches import shapes_of
from edgepet.deltas.codes import CodedWeight, coded, norm_smoothing
from edgepet.errors import InputError, require
from edgepet.files import read_file, write_file
from edgepet.graphs.base import WEIGHTS, BaseGraph, is_older, open_graph, write_graph_json
from edgepet.graphs.int8 import (
    CODE,
    CODES,
    DIVISOR,
    FORMAT,
    OLDEST,
    SLOT_FORMS,
    STEP,
    SUM,
    VERSION,
    Int8Graph,
    Int8Layer,
    SlotForm,
    int8_stem,
    model_name,
    open_int8,
)
from edgepet.graphs.maps import GraphMap
from edgepet.graphs.onnx_file import read_onnx
from edgepet.graphs.slots import code_sums, scaled_by_norm, slot_shapes
from edgepet.graphs.tensor_files import Place, point_into, safetensors_places
from edgepet.locks import held_alone
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

WAIT_S = 600.0  # for another process that measures ranges
_ZERO = 128  # ONNX Runtime's int8 products are fastest with unsigned codes of activations: the same codes, moved
_MICROSOFT = "com.microsoft"


def backbone_layers(graph: BaseGraph) -> tuple[Layer, ...]:
    """The layers of a traced backbone that have codes, in the graph's order.

    Raises:
        MissingError: onnx is not installed.
    """
    return find_layers(Graph(_structure(graph)), graph.places)


def coded_backbone(graph: BaseGraph, bits: int = 8) -> dict[str, CodedWeight]:
    """The codes of every linear layer and convolution, by the name of its weight; no image is looked at.

    Their file has those of 8 ``bits``. The tensors of ``graph`` are not modified.

    Raises:
        MissingError: onnx is not installed.
    """
    tensors = graph.base.tensors
    return {
        layer.weight: coded(
            tensors[layer.weight],
            norm_smoothing(tensors, layer.norm, layer.weight) if layer.norm and layer.kind == "linear" else None,
            bits,
        )
        for layer in backbone_layers(graph)
    }


def int8_graph(
    graph: BaseGraph, images: Callable[[], CalibrationImages] | None = None, *, root: Path | None = None
) -> Int8Graph:
    """The int8 backbone of ``graph``, from its folder, or made now where none is or an earlier edgepet made it.

    With branches it stands beside that without them, whose codes and ranges are its own, and which is made first from
    the graph without branches: that one must be there.

    Args:
        images: asked once, where it has no ranges of its own yet: then they are measured on these. With None it stays
            without, and every task on it needs all of its ranges.
        root: of the store that ``graph`` lies in; None for the cache.

    Raises:
        InputError: the backbone has no layer that int8 is for, or branches that read its weights as well; there is no
            graph without branches; a file is damaged or cannot be written; or an activation is not finite.
        MissingError: it has to be made, and onnx is not installed.
    """
    plain = None
    if graph.structure:
        plain = int8_graph(open_graph(graph.fingerprint, graph.preprocess, root=root), images, root=root)
    path = graph.folder / f"{int8_stem(graph.preprocess, graph.structure)}.json"
    if not path.is_file() or is_older(path, FORMAT, VERSION):
        _make(graph, plain)
    made = open_int8(graph.fingerprint, graph.preprocess, graph.structure, root=root)
    if not made.maps and (maps := _kept_maps(graph, made)):  # made just now or by an earlier edgepet: all else stays
        _add(path, made, maps=[each.as_json() for each in maps])
        made = open_int8(graph.fingerprint, graph.preprocess, graph.structure, root=root)
    if plain is not None:
        return _with_ranges_of(plain, made, path, root)
    if made.ranges is not None or images is None:
        return made
    # Packs are bound to the digest of these ranges: of two processes that want some, one measures.
    with held_alone(path.with_suffix(".lock"), "has its ranges measured by another process", wait_s=WAIT_S):
        made = open_int8(graph.fingerprint, graph.preprocess, root=root)
        if made.ranges is None:
            _add_ranges(graph, made, path, images())
    return open_int8(graph.fingerprint, graph.preprocess, root=root)


def _add_ranges(graph: BaseGraph, made: Int8Graph, path: Path, images: CalibrationImages) -> None:
    ranges = backbone_ranges(_structure(graph), graph, made, images.images)
    numbers = [number for each in ranges for number in (each.scale, each.shift)]
    _add(path, made, ranges=numbers, measured={"n": len(images.images), "sha256": images.facts["sha256"]})


def _with_ranges_of(plain: Int8Graph, made: Int8Graph, path: Path, root: Path | None) -> Int8Graph:
    """The int8 backbone with branches with the ranges of that without, where it has a trunk that they may hold in."""
    if made.ranges is not None or plain.ranges is None or not made.cuts:
        return made
    told = parse_json(read_file(plain.folder / f"{plain.stem}.json"))
    _add(path, made, ranges=told["ranges"], measured=told["measured"])
    return open_int8(made.fingerprint, made.preprocess, made.structure, root=root)


def _add(path: Path, made: Int8Graph, **told: object) -> None:
    """Write a description again, with this in it."""
    facts = parse_json(read_file(path)) | told
    kept = {key: fact for key, fact in facts.items() if key not in ("format", "version", "files")}
    write_graph_json(made.folder, made.stem, kept, list(made.files), kind=FORMAT, version=VERSION)


def _kept_maps(graph: BaseGraph, made: Int8Graph) -> list[GraphMap]:
    """The maps of the float graph whose tensors both slot graphs have, as numbers and not over a divisor."""
    if not graph.maps:
        return []
    files = [read_onnx(made.model_path(runtime)) for runtime in SLOT_FORMS]
    there = [{name for node in file.nodes for name in node.puts_out} for file in files]
    divided = {layer.reads for layer in made.layers if scaled_by_norm(layer)}
    return [each for each in graph.maps if all(each.tensor in names for names in there) and each.tensor not in divided]


def _make(graph: BaseGraph, plain: Int8Graph | None) -> None:
    """Write the int8 backbone of ``graph``; ``plain`` is that without its branches, where it has any."""
    structure = _structure(graph)
    coded_there = graph.places if plain is None else frozenset(layer.weight for layer in plain.layers)
    layers = find_layers(Graph(structure), coded_there)
    if not layers and plain is None:
        raise InputError(graph.backbone, "has no linear layer or convolution that int8 is for")
    folder, stem = graph.folder, int8_stem(graph.preprocess, graph.structure)
    if plain is None:
        older = any(is_older(path, FORMAT, OLDEST) for path in folder.glob("*-int8.json"))
        if older or not (folder / CODES).is_file():
            write_file(folder / CODES, safetensors.numpy.save(_stored(graph, layers)))
        files = [CODES, *(name for name in graph.files if name.endswith(".safetensors") and name != WEIGHTS)]
    else:
        _require_all(graph, layers, plain)
        files = [name for name in plain.files if name.endswith(".safetensors")]
    places = {name: place for file in sorted(files) for name, place in safetensors_places(folder / file).items()}
    described = tuple(_described(layer, places) for layer in layers)
    vectors, branches = _vectors(Graph(structure), layers, places), shapes_of(_branches(graph))
    for runtime, form in SLOT_FORMS.items():
        model = _SlotWriter(structure, layers, described, {**vectors, **branches}, places, form).model()
        write_file(folder / model_name(stem, runtime), model.SerializeToString(deterministic=True))
        files.append(model_name(stem, runtime))
    trunks = takewhile(
        lambda cut: branches.keys().isdisjoint(cut.tensors), find_cuts(Graph(structure), layers, graph.places)
    )
    facts = {
        **({"branches": _branches(graph)} if graph.structure else {}),
        "backbone": graph.backbone,
        "fingerprint": graph.fingerprint,
        "preprocess": graph.preprocess.as_json(),
        "width": graph.width,
        "layers": [_as_json(layer) for layer in described],
        "vectors": list(vectors),
        "cuts": [asdict(cut) | {"tensors": list(cut.tensors)} for cut in trunks],
        "ranges": None,
        "measured": None,
        "versions": {name: version(name) for name in ("edgepet", "onnx")},
    }
    write_graph_json(folder, stem, facts, files, kind=FORMAT, version=VERSION)


def _require_all(graph: BaseGraph, layers: tuple[Layer, ...], plain: Int8Graph) -> None:
    """Refuse branches that make a layer of ``plain`` none: what they compute with its weight too, prompts that go
    through a block's own projection, needs floats that are not there beside codes.
    """
    found = {layer.weight for layer in layers}
    lost = [layer.weight for layer in plain.layers if layer.weight not in found]
    if lost:
        what = f"has branches that are computed with {lost[0]} as well, of which the int8 backbone has codes alone"
        fix = "run such a task in fp32, or export it: a model of its own has them computed already"
        raise InputError(graph.backbone, what, fix=fix)


def _branches(graph: BaseGraph) -> list[Any]:
    """The structure of the graph's branches, as its description has it."""
    found: list[Any] = parse_json(read_file(graph.folder / f"{graph.stem}.json"))["branches"]
    return found


def _structure(graph: BaseGraph) -> ModelProto:
    onnx = require("onnx", extra="train", purpose="int8")
    return lifted(onnx.load(str(graph.model_path), load_external_data=False))


def _stored(graph: BaseGraph, layers: tuple[Layer, ...]) -> dict[str, NpArray]:
    """The file of codes: those of a linear layer lie (in, out), as products read them."""
    codes = coded_backbone(graph)
    native = safetensors_places(graph.folder / WEIGHTS)
    stored = {name: np.array(graph.base.tensors[name]) for name in native if name not in codes}
    linear = {layer.weight for layer in layers if layer.kind == "linear"}
    for name, made in codes.items():
        stored[name + CODE] = np.ascontiguousarray(made.codes.T if name in linear else made.codes)
        stored[name + STEP] = made.scales
        stored[name + SUM] = code_sums(made.codes)
        if made.divisors is not None:
            stored[name + DIVISOR] = made.divisors
    return stored


def _described(layer: Layer, places: Mapping[str, Place]) -> Int8Layer:
    return Int8Layer(
        name=layer.name, kind=layer.kind, reads=layer.reads, weight=layer.weight, bias=layer.bias, norm=layer.norm,
        batch_norm=layer.batch_norm, epsilon=layer.epsilon, padded=layer.padded,
        divided=layer.norm is None and layer.weight + DIVISOR in places,
    )  # fmt: skip


def _as_json(layer: Int8Layer) -> dict[str, object]:
    told = asdict(layer) | {"norm": list(layer.norm or ()), "batch_norm": list(layer.batch_norm or ())}
    return {key: fact for key, fact in told.items() if key != "divided" or layer.divided}


def _vectors(graph: Graph, layers: tuple[Layer, ...], places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Vectors of the backbone that nodes outside of the layers read, and their shapes: every one is a slot."""
    inside = {place for layer in layers for place in layer.places}
    read = {name for place, node in enumerate(graph.nodes) if place not in inside for name in node.input}
    known = {name: place for name, place in places.items() if name in read and name in graph.initializers}
    return {name: place.shape for name, place in sorted(known.items()) if len(place.shape) == 1}


class _SlotWriter:
    """Writes a graph with slots in one form, node by node, from the structure of the fp32 graph."""

    def __init__(
        self, structure: ModelProto, layers: tuple[Layer, ...], described: tuple[Int8Layer, ...],
        beside: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], form: SlotForm,
    ) -> None:  # fmt: skip
        # ``beside``: the shapes of further slots, vectors and tensors of branches.
        self._onnx = require("onnx", extra="train", purpose="int8")
        self._writer = GraphWriter(structure, purpose="int8")
        self._graph, self._places, self._form = Graph(structure), places, form
        self._ends = {layer.places[-1]: (layer, told) for layer, told in zip(layers, described, strict=True)}
        self._inside = {place for layer in layers for place in (*layer.places, layer.pad)}
        self._slots = slot_shapes(described, beside, {name: place.shape for name, place in places.items()}, form)
        self._coded = set[str]()

    def model(self) -> ModelProto:
        for place, node in enumerate(self._graph.nodes):
            if place in self._ends:
                self._layer(*self._ends[place])
            elif place not in self._inside:
                self._writer.add(node)
        onnx, read = self._onnx, self._writer.reads - set(self._slots)
        stored = [self._external(name) for name in sorted(read & set(self._places))]
        own = self._graph.model.graph.initializer
        kept = [tensor for tensor in own if tensor.name in read - set(self._places)]
        made = self._writer.model([*stored, *kept], keep_types=True)
        for name, shape in sorted(self._slots.items()):
            made.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        if not self._form.unit_codes:
            made.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
        return made

    def _external(self, name: str) -> TensorProto:
        place, onnx = self._places[name], self._onnx
        kinds = {"<f4": onnx.TensorProto.FLOAT, "|i1": onnx.TensorProto.INT8}
        tensor: TensorProto = onnx.TensorProto(name=name, dims=place.shape, data_type=kinds[place.dtype])
        point_into(tensor, place.file, place.offset, place.length)
        return tensor

    def _layer(self, layer: Layer, told: Int8Layer) -> None:
        if not self._form.unit_codes and layer.kind == "linear":
            self._integer_product(layer, told)
            return
        codes = self._dequantized(layer, told)
        if layer.pad is not None:
            pad = self._graph.nodes[layer.pad]
            self._writer.node("Pad", [codes, *pad.input[1:]], f"{layer.name}.padded")
            codes = f"{layer.name}.padded"
        weight = self._weight(layer)
        steps, bias = f"{layer.name}.steps", f"{layer.name}.shifted"
        settings = settings_of(self._graph.nodes[layer.places[0]]) if layer.kind == "conv" else {}
        if not self._form.unit_codes:
            self._writer.node("Conv", [codes, weight, bias], layer.puts_out, **settings)
            return
        self._writer.node(
            "MatMul" if layer.kind == "linear" else "Conv", [codes, weight], f"{layer.name}.product", **settings
        )
        self._writer.node("Mul", [f"{layer.name}.product", steps], f"{layer.name}.scaled")
        self._writer.node("Add", [f"{layer.name}.scaled", bias], layer.puts_out)

    def _integer_product(self, layer: Layer, told: Int8Layer) -> None:
        scale, zero = f"{layer.reads}.scale", self._writer.tensor("edgepet.int8.zero", np.uint8(_ZERO))
        source = self._shifted(layer, told)
        codes = f"{layer.reads}.codes"
        if layer.reads not in self._coded:
            self._coded.add(layer.reads)
            self._writer.node("QuantizeLinear", [source, scale, zero], codes)
        steps, bias = f"{layer.name}.steps", f"{layer.name}.shifted"
        inputs = [codes, layer.weight + CODE, scale, steps, zero, "", bias]
        self._writer.node("MatMulIntegerToFloat", inputs, layer.puts_out, domain=_MICROSOFT)

    def _shifted(self, layer: Layer, told: Int8Layer) -> str:
        """What the codes are made of: the tensor less its shift; a norm's output and what is padded have none."""
        if scaled_by_norm(told) or layer.padded:
            return layer.reads
        if layer.reads not in self._coded:
            source = layer.reads
            if told.divided:
                source = self._writer.node("Div", [source, layer.weight + DIVISOR], f"{layer.reads}.divided")
            self._writer.node("Sub", [source, f"{layer.reads}.shift"], f"{layer.reads}.centred")
        return f"{layer.reads}.centred"

    def _dequantized(self, layer: Layer, told: Int8Layer) -> str:
        made = f"{layer.reads}.int8"
        if layer.reads in self._coded:
            return made
        if not self._form.unit_codes:
            source, scale = self._shifted(layer, told), f"{layer.reads}.scale"
        else:
            source, scale = self._normalised(layer, told), self._writer.tensor("edgepet.int8.one", np.float32(1))
        self._coded.add(layer.reads)
        zero = self._writer.tensor("edgepet.int8.zero_s8", np.int8(0))
        self._writer.node("QuantizeLinear", [source, scale, zero], f"{layer.reads}.codes")
        self._writer.node("DequantizeLinear", [f"{layer.reads}.codes", scale, zero], made)
        return made

    def _normalised(self, layer: Layer, told: Int8Layer) -> str:
        if scaled_by_norm(told):
            return layer.reads
        self._writer.node("Mul", [layer.reads, f"{layer.reads}.scale"], f"{layer.reads}.unit")
        if layer.padded:
            return f"{layer.reads}.unit"
        self._writer.node("Add", [f"{layer.reads}.unit", f"{layer.reads}.shift"], f"{layer.reads}.centred")
        return f"{layer.reads}.centred"

    def _weight(self, layer: Layer) -> str:
        out = self._slots[f"{layer.name}.steps"][0]
        axis = 0 if layer.kind == "conv" else 1
        if not self._form.unit_codes:
            scales = f"{layer.name}.steps"
        else:
            scales = self._writer.tensor(f"edgepet.int8.ones.{out}", np.ones(out, np.float32))
        zeros = self._writer.tensor(f"edgepet.int8.zeros.{out}", np.zeros(out, np.int8))
        self._writer.node("DequantizeLinear", [layer.weight + CODE, scales, zeros], f"{layer.weight}.int8", axis=axis)
        return f"{layer.weight}.int8"
