"""Where the maps of a backbone flow in its graph, and the graph that puts them out as well.

The file of a graph puts out features alone, and who classifies runs it as it is. What a description says of maps is
enough to put them out: a device derives that graph, and computes no layer that the maps asked for do not need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

import numpy as np

from edgepet.deltas.heads import FEATURES, MAP_NAME, Map
from edgepet.errors import InputError
from edgepet.graphs.onnx_file import Node, OnnxFile, port, tensor_of
from edgepet.strict import ObjectReader

Layout: TypeAlias = Literal["nchw", "nhwc", "tokens"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc", "tokens")
MOST_MAPS, MOST_SIDE = 16, 1 << 16
_MADE = "edgepet.map"  # begins the names of what is put behind a graph's own tensors
_END = (1 << 63) - 1  # of a slice: to the last


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphMap:
    """A map, and the tensor of the graph that it lies in.

    ``layout`` says how: (n, C, h, w) or (n, h, w, C), or (n, tokens, C), of which the last h * w are the patches.
    """

    map: Map
    tensor: str
    layout: Layout

    def as_json(self) -> dict[str, object]:
        """As a description has it."""
        each = self.map
        return {
            "name": each.name, "point": each.point, "channels": each.channels, "stride": each.stride,
            "height": each.height, "width": each.width, "tensor": self.tensor, "layout": self.layout,
        }  # fmt: skip


def read_maps(tables: Iterable[ObjectReader]) -> tuple[GraphMap, ...]:
    """The maps that a description lists.

    Raises:
        InputError: too many, a name that is no map's or there twice, or what makes no map.
    """
    found = dict[str, GraphMap]()
    for table in tables:
        name = table.text("name")
        if MAP_NAME.fullmatch(name) is None or name in found or len(found) == MOST_MAPS:
            what = f"needs at most {MOST_MAPS} maps, each with a name of its own such as map.0"
            raise InputError(table.where, what, got=repr(name[:80]))
        sides = {key: table.integer(key, least=1) for key in ("channels", "stride", "height", "width")}
        for key, side in sides.items():
            if side > MOST_SIDE:
                raise InputError(f"{table.where}.{key}", f"needs at most {MOST_SIDE}", got=side)
        made = Map(name=name, point=table.text("point"), **sides)
        layout = cast(Layout, table.text("layout", choices=LAYOUTS))
        found[name] = GraphMap(map=made, tensor=table.text("tensor"), layout=layout)
        table.end()
    return tuple(found.values())


def putting_out(file: OnnxFile, maps: Iterable[GraphMap], wanted: Collection[str]) -> OnnxFile:
    """``file``, which puts out features, with the outputs ``wanted``, names of maps and FEATURES, in that order.

    What they do not need is left out.

    Raises:
        InputError: a map that the graph has not, or a tensor of one.
    """
    there, nodes, tensors = {each.map.name: each for each in maps}, list[Node](), dict[str, bytes]()
    ports = dict[str, bytes]()
    for name in wanted:
        if name == FEATURES:
            ports[name] = file.outputs[FEATURES]
            continue
        if name not in there:
            fix = "make the graph again with this edgepet, from the backbone that the task was trained on"
            raise InputError(name, "is no map of the graph", got=", ".join(there) or "none", fix=fix)
        made, held = _arranged(there[name])
        nodes += made
        tensors |= held
        ports[name] = port(name, ("batch", *there[name].map.shape))
    grown = replace(file, nodes=(*file.nodes, *nodes), tensors={**file.tensors, **tensors})
    return grown.between(file.inputs, ports)


def _arranged(each: GraphMap) -> tuple[list[Node], dict[str, bytes]]:
    """What makes (n, C, h, w) of the tensor that a map lies in, and the tensors that this needs."""
    name, made = each.map.name, f"{_MADE}.{each.map.name}"
    if each.layout == "nchw":
        return [Node("Identity", (each.tensor,), (name,))], {}
    if each.layout == "nhwc":
        return [Node("Transpose", (each.tensor,), (name,)).with_attributes(perm=(0, 3, 1, 2))], {}
    numbers = {
        f"{made}.from": [-each.map.height * each.map.width],
        f"{made}.to": [_END],
        f"{made}.axis": [1],
        f"{made}.shape": [0, *each.map.shape],  # 0: as many images as there are
    }
    cut, turned = f"{made}.patches", f"{made}.turned"
    nodes = [
        Node("Slice", (each.tensor, f"{made}.from", f"{made}.to", f"{made}.axis"), (cut,)),
        Node("Transpose", (cut,), (turned,)).with_attributes(perm=(0, 2, 1)),
        Node("Reshape", (turned, f"{made}.shape"), (name,)),
    ]
    return nodes, {key: tensor_of(key, np.array(value, np.int64)) for key, value in numbers.items()}
