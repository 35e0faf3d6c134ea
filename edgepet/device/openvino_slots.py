"""Slots of a graph as one state variable of an OpenVINO model, in forms that its CPU plugin fuses."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from edgepet.errors import require

_OpenVino: TypeAlias = Any  # the module, or an object of it: it says no types
Order = dict[str, tuple[int, ...]]  # slots of a state variable, and their shapes
_ELEMENTWISE = frozenset(("Add", "Multiply", "Subtract", "Divide"))


def stateful(model: _OpenVino, reads: str) -> tuple[_OpenVino, Order]:
    """``model`` with its inputs beside ``reads`` in one state variable, whose value a request keeps from call to call;
    and their shapes in the order in which it holds them. One, since each costs its copies at every call.

    What is not read number by number stays an input, whatever becomes of it behind: OpenVINO 2026.4 multiplies by other
    memory than a piece of a state where that is a matrix of a product.
    """
    opset, openvino = _openvino().opset13, _openvino()
    inputs = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    images = inputs.pop(reads)
    slots = {name: slot for name, slot in inputs.items() if slot.output(0).get_target_inputs()}  # padded: no shift
    left = {
        name: slot for name, slot in slots.items() if slot.get_partial_shape().is_dynamic or not _is_elementwise(slot)
    }  # one for each image of a batch cannot lie in a state
    slots = {name: slot for name, slot in slots.items() if name not in left}
    if not slots:
        return openvino.Model(model.get_results(), [images, *left.values()], "slots"), {}
    sizes = [math.prod(slot.get_output_shape(0)) for slot in slots.values()]
    info = openvino.op.util.VariableInfo()
    info.data_shape, info.data_type = openvino.PartialShape([sum(sizes)]), openvino.Type.f32
    info.variable_id = "slots"
    variable = openvino.op.util.Variable(info)
    read = opset.read_value(openvino.op.Constant(np.ones(sum(sizes), np.float32)), variable)
    cut = opset.variadic_split(read, opset.constant(np.int64(0)), opset.constant(np.array(sizes, np.int64)))
    for place, slot in enumerate(slots.values()):
        for target in slot.output(0).get_target_inputs():
            target.replace_source_output(_fused(cut.output(place), tuple(slot.get_output_shape(0)), target))
    stateful = openvino.Model(model.get_results(), [opset.assign(read, variable)], [images, *left.values()], "slots")
    return stateful, {name: tuple(slot.get_output_shape(0)) for name, slot in slots.items()}


def _is_elementwise(slot: _OpenVino) -> bool:
    """Whether all operations that read it take it number by number."""
    return {target.get_node().get_type_name() for target in slot.output(0).get_target_inputs()} <= _ELEMENTWISE


def _fused(cut: _OpenVino, shape: tuple[int, ...], target: _OpenVino) -> _OpenVino:
    """A piece of the state in ``shape``, in a form that ``target`` can be fused with its neighbours in.

    OpenVINO 2026.4 does not fuse an element-wise operation that reads a piece, but one that reads a reshaped piece. It
    keeps a convolution's output with channels last only if most of what is multiplied or added lies so, and only
    convolutions lay out vectors so: hence a depthwise one with ones, without which a ConvNet is twice as slow. Where a
    map is one pixel, it would take the addition for a residual one, of equal shapes whatever the batch.
    """
    opset, reader = _openvino().opset13, target.get_node()
    puts_out = reader.get_output_partial_shape(0)
    if reader.get_type_name() in _ELEMENTWISE:
        shape = (*[1] * (len(puts_out) - len(shape)), *shape)
    piece = opset.reshape(cut, opset.constant(np.array(shape, np.int64)), False)
    if len(shape) == 4 and shape[1] > 1 and [side.get_length() for side in list(puts_out)[2:]] != [1, 1]:
        ones = opset.constant(np.ones((shape[1], 1, 1, 1, 1), np.float32))
        piece = opset.group_convolution(piece, ones, [1, 1], [0, 0], [0, 0], [1, 1])
    return piece.output(0)


def _openvino() -> _OpenVino:
    return require("openvino", extra="openvino", purpose="OpenVINO")
