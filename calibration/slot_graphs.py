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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from edgepet.calibration.backbone_ranges import backbone_ranges
from edgepet.calibration.coded_maps import find_maps, has_maps
from edgepet.calibration.cuts import find_cuts
from edgepet.calibration.images import CalibrationImages
from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.calibration.map_slot_writer import WRITERS
from edgepet.calibration.rewriting import lifted
from edgepet.calibration.shared_maps import SHARED_FORMS, coded_maps, places_of
from edgepet.calibration.slot_writer import SlotWriter
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
    IN_FRONT,
    OLDEST,
    SLOT_FORMS,
    STEP,
    SUM,
    VERSION,
    CodedMap,
    Cut,
    Int8Graph,
    Int8Layer,
    int8_stem,
    model_name,
    open_int8,
)
from edgepet.graphs.maps import GraphMap
from edgepet.graphs.onnx_file import read_onnx
from edgepet.graphs.slots import code_sums, scaled_by_norm
from edgepet.graphs.tensor_files import Place, safetensors_places
from edgepet.locks import held_alone
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto

WAIT_S = 600.0  # for another process that measures ranges


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
    if not path.is_file() or _is_older(path):
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


def _is_older(path: Path) -> bool:
    """Whether a description is of an earlier edgepet than would now describe that network otherwise."""
    if not is_older(path, FORMAT, VERSION):
        return False
    kinds = [layer["kind"] for layer in parse_json(read_file(path))["layers"]]
    return is_older(path, FORMAT, IN_FRONT) or kinds.count("conv") > 1


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
    version = VERSION if made.coded_maps else IN_FRONT
    write_graph_json(made.folder, made.stem, kept, list(made.files), kind=FORMAT, version=version)


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
    coded = coded_maps(Graph(structure), layers) if has_maps(layers) else ()
    for runtime, form in SLOT_FORMS.items():
        given = structure, layers, described, {**vectors, **branches}, places, form
        writer = SlotWriter(*given)
        if coded:
            maps = find_maps(Graph(structure), layers, outputs=SHARED_FORMS[runtime].outputs)
            writer = WRITERS[runtime](*given, coded, maps)
        write_file(folder / model_name(stem, runtime), writer.model().SerializeToString(deterministic=True))
        files.append(model_name(stem, runtime))
    cuts = _cuts(Graph(structure), layers, graph, coded)
    trunks = takewhile(lambda cut: branches.keys().isdisjoint(cut.tensors) and _as_without(plain, coded, cut), cuts)
    facts = {
        **({"branches": _branches(graph)} if graph.structure else {}),
        "backbone": graph.backbone,
        "fingerprint": graph.fingerprint,
        "preprocess": graph.preprocess.as_json(),
        "width": graph.width,
        "layers": [_as_json(layer) for layer in described],
        **({"coded": [asdict(each) for each in coded]} if coded else {}),
        "vectors": list(vectors),
        "cuts": [asdict(cut) | {"tensors": list(cut.tensors)} for cut in trunks],
        "ranges": None,
        "measured": None,
        "versions": {name: version(name) for name in ("edgepet", "onnx")},
    }
    write_graph_json(folder, stem, facts, files, kind=FORMAT, version=VERSION if coded else IN_FRONT)


def _cuts(graph: Graph, layers: tuple[Layer, ...], base: BaseGraph, coded: Sequence[CodedMap]) -> tuple[Cut, ...]:
    """The cuts of a graph whose maps have codes, or none of them has."""
    if not coded:
        return find_cuts(graph, layers, base.places)
    within = [graph.made_by[name] for name in find_maps(graph, layers, outputs=True).renamed]
    return find_cuts(graph, layers, base.places, places_of(graph, coded), within)


def _as_without(plain: Int8Graph | None, coded: Sequence[CodedMap], cut: Cut) -> bool:
    """Whether what has codes before ``cut`` has the same ones in the graph without branches."""
    if plain is None:
        return True
    found, there = ([each.codes for each in maps[: cut.reads]] for maps in (coded, plain.coded_maps))
    return found == there


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
