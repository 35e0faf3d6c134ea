"""An ONNX file, told apart without the ``onnx`` package: its nodes, tensors and ports as the bytes that they are.

A device derives graphs from those that it has: cut in two, or with a task's tensors as inputs. Nothing is understood
that this does not need; what is not looked at is carried on as it was. Field numbers are those of ``onnx.proto3``
(ONNX 1.22), the encoding that of protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.spec import NpArray

Attribute: TypeAlias = "int | float | str | tuple[int, ...]"
Shape: TypeAlias = "tuple[int | str | None, ...]"  # of a port: a size, the name of a free one, or a nameless free one

_MODEL_IR, _MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_OPSET = 1, 2, 7, 8
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_TENSOR, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
OPSET, IR_VERSION = 20, 10  # of traced graphs: the newest that ONNX Runtime, OpenVINO and TensorRT all read, with int8
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INTEGER, _ATTRIBUTE_TEXT, _ATTRIBUTE_INTEGERS = 1, 2, 3, 4, 8
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_TYPE = 6, 11, 20
_FLOAT, _INTEGER, _STRING, _INTEGERS = 1, 2, 3, 7  # onnx.AttributeProto.AttributeType
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
_PORT_NAME, _PORT_TYPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}  # onnx.TensorProto.DataType


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its operator, the names that it reads and puts out, and its other fields as their bytes."""

    operator: str
    reads: tuple[str, ...]
    puts_out: tuple[str, ...]
    other: bytes = b""

    def encoded(self) -> bytes:
        """The node's message."""
        reads = b"".join(_text(_NODE_INPUT, name) for name in self.reads)
        puts_out = b"".join(_text(_NODE_OUTPUT, name) for name in self.puts_out)
        return reads + puts_out + _text(_NODE_OPERATOR, self.operator) + self.other

    @property
    def nameless(self) -> Node:
        """The node without a name of its own, of which a model may have one."""
        return replace(self, other=_taken(self.other, {_NODE_NAME})[1])

    def integer(self, attribute: str, default: int) -> int:
        """An attribute that is an integer, or ``default`` where the node has none of this name."""
        for number, message in _fields(self.other):
            if number == _NODE_ATTRIBUTE and isinstance(message, bytes):
                fields = dict(_fields(message))
                if fields.get(_ATTRIBUTE_NAME) == attribute.encode():
                    return int(fields.get(_ATTRIBUTE_INTEGER, 0))
        return default

    def with_attributes(self, **attributes: Attribute) -> Node:
        """The node with these attributes besides its own; integers are not below 0."""
        made = (_text(_ATTRIBUTE_NAME, name) + _attribute(value) for name, value in attributes.items())
        return replace(self, other=self.other + b"".join(_message(_NODE_ATTRIBUTE, each) for each in made))


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFile:
    """A model: ``nodes`` in an order in which they can run, the messages of its tensors and ports by name, and all
    other fields of its graph and of itself as their bytes.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[str, bytes]
    inputs: Mapping[str, bytes]
    outputs: Mapping[str, bytes]
    graph_other: bytes = field(default=b"", repr=False)
    model_other: bytes = field(default=b"", repr=False)

    def encoded(self) -> bytes:
        """The file's bytes."""
        graph = b"".join(_message(_GRAPH_NODE, node.encoded()) for node in self.nodes) + self.graph_other
        for number, messages in (
            (_GRAPH_TENSOR, self.tensors), (_GRAPH_INPUT, self.inputs), (_GRAPH_OUTPUT, self.outputs),
        ):  # fmt: skip
            graph += b"".join(_message(number, data) for data in messages.values())
        return self.model_other + _message(_MODEL_GRAPH, graph)

    def with_constants(self, values: Mapping[str, NpArray]) -> OnnxFile:
        """The same with these of its inputs as tensors of it, inside of the file."""
        inputs = {name: data for name, data in self.inputs.items() if name not in values}
        constants = {name: tensor_of(name, value) for name, value in values.items()}
        return replace(self, inputs=inputs, tensors={**self.tensors, **constants})

    def between(self, begins: Mapping[str, bytes], ends: Mapping[str, bytes]) -> OnnxFile:
        """The part of it that computes ``ends`` from ``begins``, both ports by name; it has no other outputs.

        What the part still reads of the inputs stays an input, and tensors that it does not read are left out.
        """
        wanted, kept = set(ends) - set(begins), list[Node]()
        for node in reversed(self.nodes):
            if wanted.intersection(node.puts_out):
                kept.append(node)
                wanted.difference_update(node.puts_out)
                wanted.update(name for name in node.reads if name and name not in begins)
        missing = wanted - self.tensors.keys() - self.inputs.keys()
        if missing:
            raise InputError("ONNX model", "has nothing that puts out a tensor", got=min(missing))
        inputs = {name: data for name, data in self.inputs.items() if name in wanted}
        tensors = {name: data for name, data in self.tensors.items() if name in wanted}
        return replace(
            self, nodes=tuple(reversed(kept)), tensors=tensors, inputs={**begins, **inputs}, outputs=dict(ends)
        )


def read_onnx(path: Path) -> OnnxFile:
    """Tell a file apart; tensors in files of their own stay there.

    Raises:
        InputError: it cannot be read, is cut short or no protobuf, has several graphs, or a node with graphs inside.
    """
    return parse_onnx(read_file(path), str(path))


def parse_onnx(data: bytes, where: str) -> OnnxFile:
    """As ``read_onnx``, of a file's bytes."""
    try:
        graphs, model_other = _taken(data, {_MODEL_GRAPH})
        ((_, graph),) = graphs
        parts, graph_other = _taken(graph, {_GRAPH_NODE, _GRAPH_TENSOR, _GRAPH_INPUT, _GRAPH_OUTPUT})
        named: dict[int, dict[str, bytes]] = {_GRAPH_TENSOR: {}, _GRAPH_INPUT: {}, _GRAPH_OUTPUT: {}}
        nodes = list[Node]()
        for number, message in parts:
            if number == _GRAPH_NODE:
                nodes.append(_node(message))
            else:
                ((_, name),), _ = _taken(message, {_TENSOR_NAME if number == _GRAPH_TENSOR else _PORT_NAME})
                named[number][name.decode()] = message
    except ValueError as error:  # UnicodeDecodeError is one
        fix = "delete it and make it again"
        raise InputError(where, "is not an ONNX file that can be told apart", got=error, fix=fix) from error
    return OnnxFile(
        nodes=tuple(nodes), tensors=named[_GRAPH_TENSOR], inputs=named[_GRAPH_INPUT], outputs=named[_GRAPH_OUTPUT],
        graph_other=graph_other, model_other=model_other,
    )  # fmt: skip


def new_file(
    name: str, nodes: Iterable[Node], tensors: Mapping[str, bytes], inputs: Mapping[str, bytes],
    outputs: Mapping[str, bytes],
) -> OnnxFile:  # fmt: skip
    """A model that there was not, of the opset and IR version of traced graphs."""
    opset = _text(1, "") + _number(2, OPSET)
    return OnnxFile(
        nodes=tuple(nodes), tensors=tensors, inputs=inputs, outputs=outputs, graph_other=_text(_GRAPH_NAME, name),
        model_other=_number(_MODEL_IR, IR_VERSION) + _text(_MODEL_PRODUCER, "edgepet") + _message(_MODEL_OPSET, opset),
    )  # fmt: skip


def port(name: str, shape: Shape | None, dtype: str = "float32") -> bytes:
    """The message of an input or output; a ``shape`` of None is any, of any number of axes."""
    tensor = _number(1, _TYPES[dtype])
    if shape is not None:
        tensor += _message(2, b"".join(_message(1, _side(side)) for side in shape))
    return _text(_PORT_NAME, name) + _message(_PORT_TYPE, _message(1, tensor))


def tensor_of(name: str, value: NpArray) -> bytes:
    """The message of a tensor that holds ``value``, float32, int32 or int64, inside of the file."""
    dims = b"".join(_number(_TENSOR_DIMS, side) for side in value.shape)
    raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
    return dims + _number(_TENSOR_TYPE, _TYPES[value.dtype.name]) + _text(_TENSOR_NAME, name) + _message(9, raw)


def shape_of(tensor: bytes) -> tuple[int, ...]:
    """The shape that a tensor's message tells."""
    return tuple(side for _, side in _numbers(tensor, _TENSOR_DIMS))


def shape_of_port(port: bytes) -> tuple[int | None, ...]:
    """The shape that an input's or output's message tells, None for a side that is free."""
    tensor = _inside(_inside(port, _PORT_TYPE), 1)
    sides = (side for number, side in _fields(_inside(tensor, 2)) if number == 1 and isinstance(side, bytes))
    return tuple(next((size for _, size in _numbers(side, 1)), None) for side in sides)


def _inside(message: bytes, wanted: int) -> bytes:
    """The last message that a field holds; empty where there is none."""
    found = [value for number, value in _fields(message) if number == wanted and isinstance(value, bytes)]
    return found[-1] if found else b""


def _attribute(value: Attribute) -> bytes:
    """An attribute's value and type."""
    match value:
        case int():
            held, kind = _number(_ATTRIBUTE_INTEGER, value), _INTEGER
        case float():
            held, kind = _encoded(_ATTRIBUTE_FLOAT << 3 | _FIXED32) + struct.pack("<f", value), _FLOAT
        case str():
            held, kind = _text(_ATTRIBUTE_TEXT, value), _STRING
        case _:
            held, kind = b"".join(_number(_ATTRIBUTE_INTEGERS, each) for each in value), _INTEGERS
    return held + _number(_ATTRIBUTE_TYPE, kind)


def _side(side: int | str | None) -> bytes:
    if side is None:
        return b""
    return _number(1, side) if isinstance(side, int) else _text(2, side)


def _node(message: bytes) -> Node:
    parts, other = _taken(message, {_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR})
    for number, attribute in _fields(other):
        inside = _fields(attribute) if number == _NODE_ATTRIBUTE and isinstance(attribute, bytes) else ()
        if any(inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS) for inner, _ in inside):
            raise ValueError("a node with graphs inside")
    texts = [(number, text.decode()) for number, text in parts]
    (operator,) = (text for number, text in texts if number == _NODE_OPERATOR)
    reads = tuple(text for number, text in texts if number == _NODE_INPUT)
    return Node(operator, reads, tuple(text for number, text in texts if number == _NODE_OUTPUT), other)


# -------------------------------------------------------------------------------------------- protobuf's encoding


def _taken(message: bytes, wanted: Iterable[int]) -> tuple[list[tuple[int, bytes]], bytes]:
    """The fields of these numbers, which must be bytes, and what is left of the message without them."""
    taken, other, numbers = list[tuple[int, bytes]](), bytearray(), set(wanted)
    for number, value, start, end in _spans(message):
        if number not in numbers:
            other += message[start:end]
        elif isinstance(value, bytes):
            taken.append((number, value))
        else:
            raise ValueError(f"field {number} is a number")
    return taken, bytes(other)


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    for number, value, _, _ in _spans(message):
        yield number, value


def _numbers(message: bytes, wanted: int) -> Iterator[tuple[int, int]]:
    """Integers of a field, one by one or packed."""
    for number, value in _fields(message):
        if number == wanted and isinstance(value, int):
            yield number, value
        elif number == wanted and isinstance(value, bytes):
            place = 0
            while place < len(value):
                found, place = _varint(value, place)
                yield number, found


def _spans(message: bytes) -> Iterator[tuple[int, bytes | int, int, int]]:
    """Every field: its number, its value, and where it begins and ends."""
    place = 0
    while place < len(message):
        start = place
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value, start, place
            continue
        if kind == _BYTES:
            length, place = _varint(message, place)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + length > len(message):
            raise ValueError("cut short")
        yield number, message[place : place + length], start, place + length
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(message):
            raise ValueError("cut short")
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")


def _encoded(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes((*made, value))


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3 | _VARINT) + _encoded(value)


def _message(number: int, data: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(data)) + data


def _text(number: int, text: str) -> bytes:
    return _message(number, text.encode())
