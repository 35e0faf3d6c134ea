"""The one writer of ONNX nodes and tensors: precision passes make a graph anew from another, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edgepet.errors import require
from edgepet.graphs.tensor_files import LEAST_OUTSIDE, hollow, stored_bytes
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    Proto = TypeVar("Proto", ModelProto, NodeProto)


class GraphWriter:
    """Nodes and tensors that take the place of those of ``source``, in the order in which they are written.

    Raises:
        MissingError: onnx is not installed, which ``purpose`` needs.
    """

    def __init__(self, source: ModelProto, *, purpose: str) -> None:
        self._onnx, self._source = require("onnx", extra="train", purpose=purpose), source
        self._nodes: list[NodeProto] = []
        self._tensors: dict[str, TensorProto] = {}

    def add(self, node: NodeProto) -> None:
        """Write a node as it is."""
        self._nodes.append(node)

    def node(self, operator: str, inputs: Sequence[str], output: str, **settings: object) -> str:
        """Write a node with one output, after which it is called; gives back ``output``.

        Args:
            settings: its attributes, and where they differ from ONNX's own and ``output`` its ``domain`` and ``name``.
        """
        told = {"name": output, **settings}
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], **told))
        return output

    def tensor(self, name: str, value: NpArray | np.generic) -> str:
        """Write an initializer, or in the place of one of this name; gives back ``name``."""
        self._tensors[name] = self._onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    @property
    def reads(self) -> set[str]:
        """The names that the nodes written so far read."""
        return {name for node in self._nodes for name in node.input}

    def model(self, tensors: Iterable[TensorProto] = (), *, keep_types: bool = False) -> ModelProto:
        """The source, which is not touched, with what was written; its initializers are ``tensors`` and the written.

        Args:
            keep_types: leave what the source says of the types and shapes of tensors between its nodes.
        """
        made = hollow(self._source)
        del made.graph.node[:]
        if not keep_types:
            del made.graph.value_info[:]
        made.graph.node.extend(self._nodes)
        made.graph.initializer.extend([*tensors, *self._tensors.values()])
        return made


def require_valid(model: ModelProto) -> None:
    """Let onnx check what a pass has made, shapes and types too; large weights by these alone, so of any size.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: a pass is at fault.
    """
    onnx = require("onnx", extra="train", purpose="ONNX")
    light = hollow(model)
    for tensor in model.graph.initializer:
        if stored_bytes(tensor) < LEAST_OUTSIDE:
            light.graph.initializer.add().CopyFrom(tensor)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(light, full_check=True)


def copied(proto: Proto) -> Proto:
    """A message of ONNX that may be changed without changing ``proto``."""
    made = type(proto)()
    made.CopyFrom(proto)
    return made


def settings_of(node: NodeProto) -> Mapping[str, object]:
    """The attributes of a node, as ``GraphWriter.node`` takes them."""
    onnx = require("onnx", extra="train", purpose="ONNX")
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
