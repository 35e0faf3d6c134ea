"""A task's slots in the graphs of backbones that have codes in every map, and of all others: a form for each runtime.

What each slot holds is a table of docs/spec/graph-v1.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgepet.deltas.codes import LEAST_PRODUCT, MOST_BIAS
from edgepet.graphs.int8 import DIVISOR, SLOT_FORMS, STEP, CodedMap, Int8Graph, Int8Layer, SlotForm
from edgepet.graphs.slots import Slots, scaled_by_norm, spread, unit_slots
from edgepet.spec import NpArray


def in_form(graph: Int8Graph, slots: Slots, runtime: str) -> dict[str, NpArray]:
    """A task's slots as the graph for ``runtime`` takes them; ``slots`` is not modified."""
    unit = SLOT_FORMS[runtime].unit_codes
    if not graph.coded_maps:
        return unit_slots(graph, slots) if unit else dict(slots.values)
    return _unit_slots(graph, slots) if unit else _integer_slots(graph, slots)


def _integer_slots(graph: Int8Graph, slots: Slots) -> dict[str, NpArray]:
    """Scales themselves, and biases of convolutions as they are added to sums of products: int32."""
    made = dict(slots.values)
    for layer in (each for each in graph.layers if each.kind == "conv" and each.reads in slots.ranges):
        steps, scale = slots.values[f"{layer.name}.steps"], np.float32(slots.ranges[layer.reads].scale)
        bias = made.pop(f"{layer.name}.shifted")
        made[f"{layer.name}.steps"] = steps = _steps_for(steps, bias, scale)
        made[f"{layer.name}.bias"] = np.rint(bias / (scale * steps)).astype(np.int32)
    return made


def _steps_for(steps: NpArray, bias: NpArray, scale: np.float32) -> NpArray:
    """Float32 steps (out,), none so small that its channel's ``bias`` would be no int32.

    Of a channel with such a step a bias is left, next to which its products are nothing: they become as much larger
    as the step does, and are still no more than a hundredth of it.
    """
    least = np.maximum(np.abs(bias.astype(np.float64)) / MOST_BIAS, LEAST_PRODUCT) / float(scale)
    larger: NpArray = np.where(np.abs(steps) < least, np.copysign(least, steps), steps).astype(np.float32)
    return larger


def _unit_slots(graph: Int8Graph, slots: Slots) -> dict[str, NpArray]:
    """As ``unit_slots``, with what brings every map to the scale of its codes, and back."""
    made = {name: slots.values[name] for name in (*graph.vectors, *slots.branches)}
    by = {each.reads: each for each in graph.layers}
    for layer in (each for each in graph.layers if each.reads in slots.ranges):
        scale = np.float32(slots.ranges[layer.reads].scale)
        made[f"{layer.name}.steps"] = spread(layer, slots.values[f"{layer.name}.steps"] * scale)
        made[f"{layer.name}.shifted"] = spread(layer, slots.values[f"{layer.name}.shifted"])
        if scaled_by_norm(layer):
            made |= {name: slots.values[name] / scale for name in layer.norm or ()}
    for each in (one for one in graph.coded_maps if one.name in slots.ranges):
        of, reader = slots.ranges[each.name], by.get(each.name)
        divided = graph.tensors[reader.weight + DIVISOR] if reader is not None and reader.divided else 1.0
        made[f"{each.name}.scale"] = np.array(1 / (of.scale * divided), np.float32)
        made[f"{each.name}.step"] = np.array(of.scale, np.float32)
        made[f"{each.name}.shift"] = np.array(-each.moved(of) / of.scale, np.float32)
    return made


def map_slot_shapes(
    layers: Sequence[Int8Layer], coded: Sequence[CodedMap], beside: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]], form: SlotForm,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The name and shape of every slot that a graph of this form with codes in its maps may ask for.

    ``beside`` are the shapes of vectors and of branches' tensors, ``stored`` those of the file of codes, by name.
    """
    shapes, divided = dict(beside), {layer.reads: layer.weight for layer in layers if layer.divided}
    for layer in layers:
        wide, (outs,) = form.unit_codes and layer.kind == "conv", stored[layer.weight + STEP]
        out = (1, outs, 1, 1) if wide else (outs,)
        bias = "bias" if layer.kind == "conv" and not form.unit_codes else "shifted"
        shapes |= {f"{layer.name}.steps": out, f"{layer.name}.{bias}": out}
    for each in coded:
        over = form.unit_codes and each.name in divided
        scale = stored[divided[each.name] + DIVISOR] if over else ()
        shapes |= {f"{each.name}.scale": scale, f"{each.name}.step": (), f"{each.name}.shift": ()}
    return shapes
