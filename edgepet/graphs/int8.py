"""One int8 backbone for every task: its codes lie in one file, and a task is vectors, ranges and a head beside them.

    <folder>/backbone-int8.safetensors        codes, steps and divisors, and all tensors that have no codes; once
    <folder>/graph-112-int8.onnx              structure for ONNX Runtime; what differs between tasks is an input, a slot
    <folder>/graph-112-int8-openvino.onnx     the same for OpenVINO, whose int8 kernels want constant scales
    <folder>/graph-112-int8.json              the layers, the slots, where a trunk may end, and the files' digests
    <folder>/graph-112-4f1c09ab37de-int8*     the same for tasks with branches of one structure, whose digits these are

A scale and shift of outputs leaves codes alone: W ~ diag(s) C gives diag(g) W ~ diag(g s) C. So a task made of
out-scales and additions to vectors (SSF, BitFit, norm tuning) is its slots; IA3 is in all layers whose outputs it
scales, but it scales what the second layer of an MLP reads. Any other delta is folded into what
the codes stand for and coded again by the same recipe; the codes that changed are that task's own memory. Branches are
computed in float beside the layers, and their tensors are slots. Reading needs
neither torch nor ``onnx``. The files are made by ``edgepet.calibration.slot_graphs``; their format is
docs/spec/graph-v1.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np

from edgepet.deltas.branches import structure_digest
from edgepet.deltas.codes import LEAST_SCALE, LOW, CodedWeight, Range
from edgepet.deltas.delta import Delta
from edgepet.errors import InputError
from edgepet.files import sha256_file
from edgepet.graphs.base import bytes_beside, graph_folder, graph_stem, read_description, require_fingerprint
from edgepet.graphs.manifest import Listed
from edgepet.graphs.maps import GraphMap, read_maps
from edgepet.graphs.tensor_files import mapped_tensors
from edgepet.spec import NpArray, Preprocess, spelled_size
from edgepet.strict import ObjectReader

FORMAT, VERSION = "edgepet-int8", 4  # of what has codes in every map; a host makes what is older again
IN_FRONT = 3  # of what has codes in front of its layers alone, which networks of one convolution keep
OLDEST = 2  # that is still read: its codes are the same ones, and nothing in it is shared but them
CODES = "backbone-int8.safetensors"
INT8 = "-int8"  # ends the names of its graphs
CODE, STEP, DIVISOR, SUM = ".codes", ".step", ".divisor", ".sum"  # ends of names in that file
_DIGITS = re.compile(r"-[0-9a-f]{12}$")  # of a structure of branches, at the end of a stem
OTHER_RANGES = "bring the int8 backbone of the host that calibrated it, or calibrate it again where this one is from"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotForm:
    """How the graph of a runtime takes a task's slots; ``suffix`` ends the name of its file.

    With ``unit_codes`` every code stands for itself, and scales lie before and behind the products: for int8 kernels
    that want constant scales. Else the products take the scales themselves.
    """

    suffix: str
    unit_codes: bool


Codes: TypeAlias = Literal["signed", "unsigned", "shifted"]
CODES_OF_MAPS: tuple[Codes, ...] = ("signed", "unsigned", "shifted")

SLOT_FORMS = {  # by runtime
    "onnxruntime": SlotForm(suffix="", unit_codes=False),
    "openvino": SlotForm(suffix="-openvino", unit_codes=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Layer:
    """A layer with codes. ``reads`` is the tensor whose range it needs; all other names are of backbone tensors.

    ``norm`` are weight and bias of the layer norm in front, ``batch_norm`` weight, bias, mean and variance of the one
    behind, which has ``epsilon``. ``padded``: it sees zeros around what it reads. ``divided``: what it reads is divided
    by its divisor by a node of its own, for a branch reads what the layer norm puts out as well.
    """

    name: str
    kind: Literal["linear", "conv"]
    reads: str
    weight: str
    bias: str | None = None
    norm: tuple[str, str] | None = None
    batch_norm: tuple[str, str, str, str] | None = None
    epsilon: float = 0.0
    padded: bool = False
    divided: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedMap:
    """A tensor that has codes, whatever reads it. Zero is the middle one of those that are ``signed``; of ``unsigned``
    ones it is the first one, and there is nothing below. ``shifted`` begin wherever a task says.
    """

    name: str
    codes: Codes

    def fits(self, of: Range) -> bool:
        """Whether its codes can be of this range."""
        return self.codes == "shifted" or of.shift == (0.0 if self.codes == "signed" else -LOW * of.scale)

    def moved(self, of: Range) -> float:
        """The constant that is taken off it before it is rounded."""
        return of.shift if self.codes == "shifted" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place of the graph where the tensor ``at`` alone carries everything: a trunk that tasks share may end there.

    ``reads`` is how many of the graph's ``reads`` lie before it. ``tensors`` are those of the backbone that are read
    first between the cut before it and this one.
    """

    at: str
    reads: int
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Graph:
    """The int8 backbone at one image size, opened from ``folder``; its tensors are mapped, not read.

    ``codes_sha256`` is of the file of codes: what a task's ranges are bound to. ``vectors`` are backbone tensors that
    every task brings: norms, biases and the like. ``width`` are its pooled features, ``files`` are name -> (hex
    sha256, size in bytes). ``cuts`` are in the graph's order. ``ranges`` are the backbone's own of all its ``reads``,
    which hold before a task's cut; None where no images were there to measure them on. ``maps`` are those that heads
    may read. ``coded_maps`` are the tensors that have codes, in the order in which they are made; none of a backbone
    with codes in front of its layers alone. ``structure`` are the digits of its branches: with branches there are cuts
    before the first one alone, and ``ranges`` are those of the backbone without them, whose ``reads`` begin alike up to
    the last cut.
    """

    folder: Path
    backbone: str
    fingerprint: str
    preprocess: Preprocess
    width: int
    layers: tuple[Int8Layer, ...]
    vectors: tuple[str, ...]
    cuts: tuple[Cut, ...]
    ranges: tuple[Range, ...] | None
    codes_sha256: str
    files: Listed
    maps: tuple[GraphMap, ...] = ()
    coded_maps: tuple[CodedMap, ...] = ()
    structure: str = ""

    @property
    def stem(self) -> str:
        """What the names of this image size's files begin with."""
        return int8_stem(self.preprocess, self.structure)

    @property
    def reads(self) -> tuple[str, ...]:
        """The tensors that have a range, in the order in which packs store them."""
        return tuple(each.name for each in self.coded_maps) or reads_of(self.layers)

    @property
    def own_ranges(self) -> dict[str, Range]:
        """The backbone's own ranges by tensor, as far as a trunk may reach; none where it has none."""
        before = len(self.reads) if not self.structure else max((cut.reads for cut in self.cuts), default=0)
        return dict(zip(self.reads[:before], (self.ranges or ())[:before], strict=self.ranges is not None))

    @property
    def ranges_sha256(self) -> str | None:
        """What a pack without ranges for its trunk is bound to: the digest of the backbone's own, None without them."""
        return None if self.ranges is None else ranges_digest(self.ranges)

    def trunk(self, delta: Delta) -> Cut | None:
        """Where the trunk of ``delta`` ends: the last cut before which it changes no tensor, None where there is none.

        Two tasks whose packs say a trunk compute the same numbers before the earlier one of their cuts, bit for bit.
        """
        changed, found = set(delta.targets), None
        for cut in self.cuts:
            if not changed.isdisjoint(cut.tensors):
                break
            found = cut
        return found

    def trunk_reads(self, delta: Delta) -> int:
        """How many of ``reads``, the first ones, lie before the end of the trunk of ``delta``."""
        cut = self.trunk(delta)
        return 0 if cut is None else cut.reads

    def model_path(self, runtime: str) -> Path:
        """The graph for ``runtime``, one of ``SLOT_FORMS``."""
        return self.folder / model_name(self.stem, runtime)

    @property
    def weights_bytes(self) -> int:
        """Bytes on disk of the codes, once for all tasks and image sizes."""
        return self.files[CODES][1]

    @property
    def graph_bytes(self) -> int:
        """Bytes on disk that this image size adds to the codes."""
        return bytes_beside(CODES, self.files, self.folder / f"{self.stem}.json")

    @property
    def codes_path(self) -> Path:
        """The file of codes."""
        return self.folder / CODES

    @cached_property
    def tensors(self) -> dict[str, NpArray]:
        """Everything in the files of tensors, as read-only views."""
        names = [name for name in self.files if name.endswith(".safetensors")]
        return mapped_tensors(self.folder, sorted(names))  # a table of this size comes last and hides a native one

    def coded(self, layer: Int8Layer) -> CodedWeight:
        """The codes of a layer, (out, ...): those of a linear one lie turned in the file."""
        weight, codes = layer.weight, self.tensors[layer.weight + CODE]
        return CodedWeight(
            codes=codes.T if layer.kind == "linear" else codes,
            scales=self.tensors[weight + STEP],
            divisors=self.tensors.get(weight + DIVISOR),
        )


def int8_stem(preprocess: Preprocess, structure: str = "") -> str:
    """``graph-112-int8``: what the names of the files of this image size and these branches begin with."""
    return f"{graph_stem(preprocess, structure)}{INT8}"


def model_name(stem: str, runtime: str) -> str:
    """``graph-112-int8-openvino.onnx``: the file of a runtime's graph."""
    return f"{stem}{SLOT_FORMS[runtime].suffix}.onnx"


def open_int8(fingerprint: str, preprocess: Preprocess, structure: str = "", *, root: Path | None = None) -> Int8Graph:
    """Open the int8 backbone, or what it is with branches of a structure, checking its files; see
    ``manifest.require_whole``.

    Args:
        preprocess: only its image size and frames count.

    Raises:
        InputError: it was never made, or by another version, or a file of it is damaged.
    """
    folder = graph_folder(fingerprint, root)
    path = folder / f"{int8_stem(preprocess, structure)}.json"
    if not path.is_file():
        fix = "run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet` where torch is installed"
        wanted = f"{spelled_size(preprocess.image_size)} pixels" + (f" with branches {structure}" if structure else "")
        raise InputError(str(folder), f"holds no int8 backbone at {wanted}", fix=fix)
    graph = int8_at(path)
    if graph.fingerprint != fingerprint:
        raise _another(path)
    return graph


def int8_at(path: Path) -> Int8Graph:
    """Open the int8 backbone that the description ``path`` is of, checking its files; see ``manifest.require_whole``.

    Raises:
        InputError: it cannot be read, was made by another version, or a file of it is damaged.
    """
    needs = (CODES, *(model_name(path.stem, runtime) for runtime in SLOT_FORMS))
    may = (f"{_DIGITS.sub('', path.stem.removesuffix(INT8))}.safetensors",)  # branches differ in no position table
    described = read_description(path, FORMAT, VERSION, oldest=OLDEST, large=CODES, needs=needs, may=may)
    table = described.table
    layers, has_trunks = tuple(map(_layer, table.nested_list("layers"))), described.version > OLDEST
    structure = structure_digest(table.sequence("branches")) if table.has("branches") else ""
    coded_maps = tuple(map(_coded_map, table.nested_list("coded"))) if described.version == VERSION else ()
    reads = len(coded_maps or reads_of(layers))
    cuts = tuple(map(_cut, table.nested_list("cuts"))) if has_trunks else ()
    graph = Int8Graph(
        folder=path.parent,
        backbone=table.text("backbone"),
        fingerprint=table.text("fingerprint"),
        preprocess=described.preprocess,
        width=table.integer("width", least=1),
        layers=layers,
        vectors=table.texts("vectors"),
        cuts=cuts,
        ranges=_ranges(table, None if structure else reads) if has_trunks else None,
        codes_sha256=described.files[CODES][0],
        files=described.files,
        maps=read_maps(table.nested_list("maps")) if table.has("maps") else (),
        coded_maps=coded_maps,
        structure=structure,
    )
    table.end()
    require_fingerprint(graph.fingerprint, path.name)
    _require_names(graph, path)
    _require_order(graph, path)
    if graph.stem != path.stem:
        raise _another(path)
    return graph


def _another(path: Path) -> InputError:
    return InputError(str(path), "describes another graph than its name says", fix=f"delete {path} and run again")


def _require_names(graph: Int8Graph, path: Path) -> None:
    """Refuse a description that speaks of tensors which the files do not hold."""
    for layer in graph.layers:
        wanted = [layer.weight + CODE, layer.weight + STEP, layer.weight + SUM]
        wanted += [layer.weight + DIVISOR] if layer.divided else []
        wanted += [name for name in (layer.bias, *(layer.norm or ()), *(layer.batch_norm or ())) if name is not None]
        missing = [name for name in wanted if name not in graph.tensors]
        if missing:
            raise InputError(f"{path.name}: {layer.name}", "speaks of a tensor that is not there", got=missing[0])
    named = {each.name for each in graph.coded_maps}
    lost = [layer.reads for layer in graph.layers if named and layer.reads not in named]
    if lost:
        raise InputError(f"{path.name}: coded", "needs what every layer reads", got=f"none of {lost[0]}")
    missing = [name for name in graph.vectors if name not in graph.tensors]
    if missing:
        raise InputError(f"{path.name}: vectors", "speaks of a tensor that is not there", got=missing[0])


def _require_order(graph: Int8Graph, path: Path) -> None:
    """Refuse cuts that are not in order."""
    counts = [cut.reads for cut in graph.cuts]
    if counts != sorted(counts) or not all(0 < count <= len(graph.reads) for count in counts):
        what = f"needs cuts in order, behind 1 to {len(graph.reads)} of what layers read"
        raise InputError(f"{path.name}: cuts", what, got=f"{counts!r:.80}")
    if graph.ranges is not None and len(graph.ranges) < max(counts, default=0):
        raise InputError(
            f"{path.name}: ranges", f"needs those before its last cut, {counts[-1]}", got=len(graph.ranges)
        )


def _coded_map(table: ObjectReader) -> CodedMap:
    made = CodedMap(name=table.text("name"), codes=cast(Codes, table.text("codes", choices=CODES_OF_MAPS)))
    table.end()
    return made


def _cut(table: ObjectReader) -> Cut:
    cut = Cut(at=table.text("at"), reads=table.integer("reads"), tensors=table.texts("tensors"))
    table.end()
    return cut


def _ranges(table: ObjectReader, reads: int | None) -> tuple[Range, ...] | None:
    """``reads`` None: those of a backbone without the branches of this one, however many these are."""
    table.raw("measured")  # on which images: nobody acts on it
    if table.absent("ranges"):
        return None
    numbers = table.numbers("ranges", count=2 * (len(table.sequence("ranges")) // 2 if reads is None else reads))
    low = [scale for scale in numbers[::2] if scale < LEAST_SCALE]
    if low:
        raise table.refusal("ranges", "needs scales above 0", got=low[0])
    return tuple(Range(scale=scale, shift=shift) for scale, shift in zip(numbers[::2], numbers[1::2], strict=True))


def reads_of(layers: Sequence[Int8Layer]) -> tuple[str, ...]:
    """The tensors that ``layers`` read, in order of first use."""
    return tuple(dict.fromkeys(layer.reads for layer in layers))


def ranges_digest(ranges: Sequence[Range]) -> str:
    """Hex sha256 of each scale and shift in order, as little-endian binary32."""
    return hashlib.sha256(np.array([(each.scale, each.shift) for each in ranges], "<f4").tobytes()).hexdigest()


def _layer(table: ObjectReader) -> Int8Layer:
    norm, batch_norm = table.texts("norm"), table.texts("batch_norm")
    for names, key, count in ((norm, "norm", 2), (batch_norm, "batch_norm", 4)):
        if len(names) not in (0, count):
            raise InputError(f"{table.where}.{key}", f"needs {count} names or none", got=len(names))
    layer = Int8Layer(
        name=table.text("name"),
        kind="linear" if table.text("kind", choices=["linear", "conv"]) == "linear" else "conv",
        reads=table.text("reads"),
        weight=table.text("weight"),
        bias=None if table.absent("bias") else table.text("bias"),
        norm=(norm[0], norm[1]) if norm else None,
        batch_norm=(batch_norm[0], batch_norm[1], batch_norm[2], batch_norm[3]) if batch_norm else None,
        epsilon=table.number("epsilon"),
        padded=table.boolean("padded"),
        divided=table.boolean("divided") if table.has("divided") else False,
    )
    table.end()
    return layer


def require_codes(graph: Int8Graph) -> None:
    """Refuse a file of codes that is not the one that was made: opening reads it only where it changed.

    Raises:
        InputError: its digest is another.
    """
    found = sha256_file(graph.codes_path)
    if found != graph.codes_sha256:
        what = f"must have sha256 {graph.codes_sha256[:12]}"
        raise InputError(str(graph.codes_path), what, got=found[:12], fix="delete it and make the int8 backbone again")
