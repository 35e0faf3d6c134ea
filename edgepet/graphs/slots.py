"""A task on the int8 backbone: everything of it that the codes are not, in the graph's slots.

What each slot holds is a table of docs/spec/graph-v1.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from edgepet.deltas.branches import named_tensors
from edgepet.deltas.codes import CodedWeight, Range, coded, per_channel
from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import fold_all, fold_each, require_fingerprint
from edgepet.deltas.updates import Push, Targeted, apart, check, keeps_codes, shape_read_by
from edgepet.errors import InputError
from edgepet.graphs.base import require_structure
from edgepet.graphs.int8 import CODE, DIVISOR, OTHER_RANGES, STEP, SUM, Int8Graph, Int8Layer, SlotForm
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slots:
    """What a task puts into ONNX Runtime's graph; ``unit_slots`` makes OpenVINO's of it.

    ``values`` are the slots by name, float32: steps and bias (out,) of each layer, one number for each scale and shift,
    the backbone's vectors, and the tensors of its ``branches``, whose names these are. ``codes`` are its own, int8, in
    place of tensors of the file, by their name and in their shape there. ``ranges`` are by the tensor that they are of.
    """

    values: Mapping[str, NpArray]
    codes: Mapping[str, NpArray]
    ranges: Mapping[str, Range]
    branches: tuple[str, ...] = ()

    @property
    def own_bytes(self) -> int:
        """Bytes of memory that only this task needs, runtime's packing left out."""
        return sum(value.nbytes for value in (*self.values.values(), *self.codes.values()))


def task_slots(graph: Int8Graph, delta: Delta) -> Slots:
    """Express ``delta`` against the codes: vectors are folded, codes stay, or are made again where they must change.

    Neither ``graph`` nor ``delta`` is modified.

    Raises:
        BackboneError: ``delta`` was trained on another backbone.
        InputError: it has no ranges for these codes, or other branches; an update does not fit, or changes what is a
            constant of the graph; or a slot is not finite.
    """
    require_fingerprint(graph.backbone, graph.fingerprint, delta)
    require_structure(graph.structure, delta)
    ranges = task_ranges(graph, delta)
    folded, codes = _folded(graph, delta)
    branches, corrections = named_tensors(delta.branches), task_corrections(graph, delta)
    return _slots(graph, folded, codes, ranges, branches, f"task {delta.task!r}", corrections)


def backbone_slots(graph: Int8Graph) -> Slots | None:
    """What the backbone itself puts into the graph, with its own ranges: a trunk's; None where it has none.

    With branches it is what a trunk reads, before the first one.
    """
    if graph.ranges is None:
        return None
    return _slots(graph, {}, {}, graph.own_ranges, {}, graph.backbone)


def _slots(
    graph: Int8Graph, folded: Mapping[str, NpArray], codes: Mapping[str, CodedWeight], ranges: Mapping[str, Range],
    branches: Mapping[str, NpArray], where: str, corrections: Mapping[str, NpArray] = MappingProxyType({}),
) -> Slots:  # fmt: skip
    values = {name: folded.get(name, graph.tensors[name]) for name in graph.vectors} | dict(branches)
    maps = {each.name: each for each in graph.coded_maps}
    for layer in (each for each in graph.layers if each.reads in ranges):
        fresh = layer.weight in codes
        made = codes[layer.weight] if fresh else graph.coded(layer)
        factor = None if fresh else folded.get(layer.weight)
        of = ranges[layer.reads]
        shift = maps[layer.reads].moved(of) if maps else of.shift
        values |= _layer_slots(layer, made, factor, graph, folded, replace(of, shift=shift), fresh=fresh)
        if layer.name in corrections:
            values[f"{layer.name}.shifted"] = values[f"{layer.name}.shifted"] + corrections[layer.name]
    for each in (one for one in graph.coded_maps if one.name in ranges):
        values[f"{each.name}.scale"] = np.array(ranges[each.name].scale, np.float32)
        values[f"{each.name}.shift"] = np.array(each.moved(ranges[each.name]), np.float32)
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{where}: {name}", "must be finite", got="NaN or infinity")
    values = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
    laid = {layer.weight: layer.kind == "linear" for layer in graph.layers}
    own = {name + CODE: np.ascontiguousarray(m.codes.T if laid[name] else m.codes) for name, m in codes.items()}
    return Slots(values=values, codes=own, ranges=ranges, branches=tuple(branches))


def task_ranges(graph: Int8Graph, delta: Delta) -> dict[str, Range]:
    """The ranges that a task runs with, by tensor: the backbone's own in its trunk, the pack's behind it.

    Raises:
        InputError: the pack brings none, too many or too few, or for other codes or with another trunk; or a shift is
            where there can be none.
    """
    fix = "run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet`"
    if delta.int8 is None:
        raise InputError(f"task {delta.task!r}", "has no activation ranges for the int8 backbone", fix=fix)
    if delta.int8.codes != graph.codes_sha256:
        what = f"has ranges for the int8 codes {delta.int8.codes[:12]}"
        raise InputError(f"task {delta.task!r}", what, got=graph.codes_sha256[:12], fix=fix)
    before = _trunk_ranges(graph, delta, delta.int8.trunk)
    if len(delta.int8.ranges) != len(graph.reads) - len(before):
        trunk = f", behind a trunk of {len(before)}" if before else ""
        what = f"needs {len(graph.reads) - len(before)} activation ranges for the int8 backbone{trunk}"
        newer = not graph.coded_maps and sum(layer.kind == "conv" for layer in graph.layers) > 1
        more = newer and len(delta.int8.ranges) > len(graph.reads)  # those of maps, which the graph has no codes in
        raise InputError(f"task {delta.task!r}", what, got=len(delta.int8.ranges), fix=OTHER_RANGES if more else fix)
    ranges = dict(zip(graph.reads, (*before, *delta.int8.ranges), strict=True))
    odd = next((each.name for each in graph.coded_maps if not each.fits(ranges[each.name])), None)
    if odd is not None:
        what = f"{odd} has codes that begin where the int8 backbone says, and no range can move them"
        raise InputError(f"task {delta.task!r}", what, got=ranges[odd].shift, fix=fix)
    for layer in () if graph.coded_maps else graph.layers:
        if ranges[layer.reads].shift and (layer.padded or scaled_by_norm(layer)):
            what = f"{layer.reads} is read with zeros around it or behind a layer norm, and can have no shift"
            raise InputError(f"task {delta.task!r}", what, got=ranges[layer.reads].shift, fix=fix)
    return ranges


def task_corrections(graph: Int8Graph, delta: Delta) -> dict[str, NpArray]:
    """What a task adds to the biases of layers, by the layer's name: of those behind its trunk; none in most packs.

    Raises:
        InputError: it brings another number of them.
    """
    if delta.int8 is None or not delta.int8.corrections:
        return {}
    before = 0 if delta.int8.trunk is None else graph.trunk_reads(delta)
    layers, given = corrected_layers(graph, before), np.array(delta.int8.corrections)
    sizes = [len(graph.coded(layer).scales) for layer in layers]
    if sum(sizes) != len(given):
        what, fix = f"needs {sum(sizes)} corrections of biases for the int8 backbone, or none", OTHER_RANGES
        raise InputError(f"task {delta.task!r}", what, got=len(given), fix=fix)
    parts = np.split(given, np.cumsum(sizes)[:-1])
    return {layer.name: part for layer, part in zip(layers, parts, strict=True)}


def corrected_layers(graph: Int8Graph, before: int) -> tuple[Int8Layer, ...]:
    """The layers that corrections are of: those that read none of the first ``before`` tensors, a trunk's."""
    own = set(graph.reads[before:])
    return tuple(layer for layer in graph.layers if layer.reads in own)


def _trunk_ranges(graph: Int8Graph, delta: Delta, trunk: str | None) -> tuple[Range, ...]:
    """The backbone's own ranges that hold before the cut of ``delta``; none where it brings all itself."""
    if trunk is None:
        return ()
    if graph.ranges is None or trunk != graph.ranges_sha256:
        got = "none" if graph.ranges_sha256 is None else graph.ranges_sha256[:12]
        what = f"needs the int8 backbone's own ranges {trunk[:12]} for its trunk"
        raise InputError(f"task {delta.task!r}", what, got=got, fix=OTHER_RANGES)
    return graph.ranges[: graph.trunk_reads(delta)]


def _folded(graph: Int8Graph, delta: Delta) -> tuple[dict[str, NpArray], dict[str, CodedWeight]]:
    """Tensors that the delta changes; of a weight whose codes stay it is the factor of each row. And new codes.

    A push reads what codes stand for: those of the backbone, or the task's, with its factors.
    """
    weights = {layer.weight: graph.coded(layer) for layer in graph.layers}
    _require_fitting(graph, delta, weights)
    first, last = apart(delta.updates)
    by_tensor: dict[str, list[Targeted]] = {}
    for targeted in first:
        by_tensor.setdefault(targeted.target.tensor, []).append(targeted)
    folded, codes = dict[str, NpArray](), dict[str, CodedWeight]()
    for name, updates in by_tensor.items():
        made = weights.get(name)
        if made is None:
            folded[name] = fold_all({name: graph.tensors[name]}, updates)[name]
        elif all(map(keeps_codes, updates)):
            folded[name] = fold_all({name: np.ones(len(made.scales), np.float32)}, updates)[name]
        else:
            codes[name] = coded(fold_all({name: made.dense}, updates)[name], made.divisors)
    read = {targeted.update.reads.tensor for targeted in last if isinstance(targeted.update, Push)} & weights.keys()
    frozen = {**graph.tensors, **{name: weights[name].dense for name in read}}
    stand = {name: codes[name].dense for name in read & codes.keys()}
    stand |= {name: frozen[name] * per_channel(folded[name], frozen[name]) for name in read & folded.keys()}
    pushed = fold_each(last, frozen, folded | stand)
    folded |= {targeted.target.tensor: pushed[targeted.target.tensor] for targeted in last}
    return folded, codes


def _require_fitting(graph: Int8Graph, delta: Delta, weights: Mapping[str, CodedWeight]) -> None:
    """Refuse updates that do not fit, or that change what is a constant of the graph."""
    foldable = {*graph.vectors, *weights, *(layer.bias for layer in graph.layers)}
    foldable |= {name for layer in graph.layers for name in layer.batch_norm or ()}
    shapes = {name: tensor.shape for name, tensor in graph.tensors.items()}
    shapes |= {name: made.codes.shape for name, made in weights.items()}
    for targeted in delta.updates:
        name = targeted.target.tensor
        if name not in shapes:
            raise InputError(f"{delta.task}: {name}", f"is no tensor of {graph.backbone}")
        check(targeted, shapes[name], where=delta.task, weight=shape_read_by(targeted, shapes))
        if name not in foldable:
            what = "is a constant of the int8 graph and cannot change"
            raise InputError(f"{delta.task}: {name}", what, fix="run this task in fp32")


def _layer_slots(
    layer: Int8Layer, made: CodedWeight, factor: NpArray | None, graph: Int8Graph, folded: Mapping[str, NpArray],
    of: Range, *, fresh: bool,
) -> dict[str, NpArray]:  # fmt: skip
    """The slots of one layer: the step of each output, the bias, the range of what it reads, and the norm before it."""

    def tensor(name: str) -> NpArray:
        return folded.get(name, graph.tensors[name]).astype(np.float64)

    steps = made.scales.astype(np.float64) * (1.0 if factor is None else factor)
    bias = np.zeros(len(steps)) if layer.bias is None else tensor(layer.bias)
    if layer.batch_norm is not None:
        weight, shift, mean, variance = map(tensor, layer.batch_norm)
        through = weight / np.sqrt(variance + layer.epsilon)
        steps, bias = steps * through, shift + (bias - mean) * through
    if of.shift:
        sums = code_sums(made.codes) if fresh else graph.tensors[layer.weight + SUM]
        bias = bias + of.shift * steps * sums
    slots: dict[str, NpArray] = {
        f"{layer.name}.steps": steps,
        f"{layer.name}.shifted": bias,
        f"{layer.reads}.scale": np.array(of.scale, np.float32),
        f"{layer.reads}.shift": np.array(of.shift, np.float32),
    }
    if layer.norm is not None and made.divisors is not None:
        slots |= {name: tensor(name) / made.divisors for name in layer.norm}
    return slots


def code_sums(codes: NpArray) -> NpArray:
    """The sum of each output's ``codes`` (out, ...), int32 (out,): what one unit of shift makes of them."""
    sums: NpArray = codes.reshape(len(codes), -1).sum(axis=1, dtype=np.int32)
    return sums


def unit_slots(graph: Int8Graph, slots: Slots) -> dict[str, NpArray]:
    """The same task for the graph in which every code stands for itself: scales lie before and behind the products.

    A layer norm divides by the scale of its range; elsewhere one product and one sum do, and where a layer has a
    divisor of its own that is in the product. Steps and bias of a convolution are (1, out, 1, 1). ``slots`` is not
    modified.
    """
    made = {name: slots.values[name] for name in (*graph.vectors, *slots.branches)}
    for layer in (each for each in graph.layers if each.reads in slots.ranges):
        of, values = slots.ranges[layer.reads], slots.values
        made[f"{layer.name}.steps"] = spread(layer, values[f"{layer.name}.steps"] * np.float32(of.scale))
        made[f"{layer.name}.shifted"] = spread(layer, values[f"{layer.name}.shifted"])
        if scaled_by_norm(layer):
            norm = layer.norm or ("", "")
            made |= {name: values[name] / np.float32(of.scale) for name in norm}
        else:
            by = of.scale * graph.tensors[layer.weight + DIVISOR] if layer.divided else of.scale
            made[f"{layer.reads}.scale"] = np.array(1 / by, np.float32)
            made[f"{layer.reads}.shift"] = np.array(-of.shift / of.scale, np.float32)
    return made


def scaled_by_norm(layer: Int8Layer) -> bool:
    """Whether the layer norm in front can bring what it reads to the scale of its codes."""
    return layer.norm is not None and layer.kind == "linear"


def spread(layer: Int8Layer, values: NpArray) -> NpArray:
    """Numbers (out,) in a shape that multiplies what the layer puts out."""
    return values if layer.kind == "linear" else values.reshape(1, -1, 1, 1)


def slot_shapes(
    layers: Sequence[Int8Layer], beside: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]],
    form: SlotForm,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The name and shape of every slot of a graph of this form.

    ``beside`` are the shapes of vectors and of branches' tensors, ``stored`` those of the file of codes, by name.
    """
    shapes = dict(beside)
    for layer in layers:
        wide, (outs,) = form.unit_codes and layer.kind == "conv", stored[layer.weight + STEP]
        out = (1, outs, 1, 1) if wide else (outs,)
        shapes |= {f"{layer.name}.steps": out, f"{layer.name}.shifted": out}
        if not (form.unit_codes and scaled_by_norm(layer)):
            scale = stored[layer.weight + DIVISOR] if form.unit_codes and layer.divided else ()
            shapes |= {f"{layer.reads}.scale": scale, f"{layer.reads}.shift": ()}
    return shapes
