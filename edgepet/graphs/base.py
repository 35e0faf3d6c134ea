"""A backbone as a runtime takes it: one file of weights, and beside it a graph for every image size.

    <folder>/backbone.safetensors        the tensors at the native image size, once
    <folder>/graph-112.onnx              structure only; every parameter an initializer that points into these files
    <folder>/graph-112.safetensors       what differs at this size: resampled position tables (may be absent)
    <folder>/graph-112.json              what the graph was made from and the digests of its files
    <folder>/graph-112-4f1c09ab37de.*    the same for tasks with branches of one structure, whose digits these are; the
                                         branches' tensors lie among what differs, and each task brings its own

The graph takes images (batch, 3, H, W), or clips (batch, frames, 3, H, W), and puts out pooled features (batch, width);
a classifier is a product behind it. Where the backbone has maps its description says which, and ``maps`` puts them out.
Reading needs neither torch nor the ``onnx`` package. Making one is ``edgepet.exporters.trace``. The format is
docs/spec/graph-v1.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgepet.canonical import canonical_json
from edgepet.deltas.branches import structure_digest
from edgepet.deltas.delta import FINGERPRINT, Delta
from edgepet.deltas.merge import require_backbone
from edgepet.errors import InputError
from edgepet.files import cache_folder, write_file
from edgepet.graphs.manifest import Listed, listed_files, listing, put_stamp, read_manifest, require_whole
from edgepet.graphs.maps import GraphMap, read_maps
from edgepet.graphs.tensor_files import Place, _views, safetensors_places
from edgepet.spec import Base, Preprocess, read_preprocess, spelled_size
from edgepet.strict import ObjectReader

FORMAT, VERSION = "edgepet-graph", 1
WEIGHTS = "backbone.safetensors"
INPUT, FEATURES, LOGITS = "images", "features", "logits"


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseGraph:
    """One backbone at one image size, opened from ``folder``; its tensors are mapped, not read.

    ``backbone`` is what its user called it, ``architecture`` timm's name, ``width`` its pooled features.
    ``create_args`` are what ``timm.create_model`` needs besides. ``files`` are name -> (hex sha256, size in bytes).
    ``structure`` are the digits of its branches, empty where there are none; ``maps`` those that heads may read.
    """

    folder: Path
    backbone: str
    architecture: str
    fingerprint: str
    preprocess: Preprocess
    width: int
    create_args: Mapping[str, object]
    licence: str
    files: Listed
    structure: str = ""
    maps: tuple[GraphMap, ...] = ()

    @property
    def stem(self) -> str:
        """What the names of this image size's files begin with."""
        return graph_stem(self.preprocess, self.structure)

    @property
    def model_path(self) -> Path:
        """The graph's structure, an ONNX file without weights."""
        return self.folder / f"{self.stem}.onnx"

    @property
    def weights_bytes(self) -> int:
        """Bytes on disk of the backbone's tensors, once for all image sizes."""
        return self.files[WEIGHTS][1]

    @property
    def graph_bytes(self) -> int:
        """Bytes on disk that this image size adds to the backbone's."""
        return bytes_beside(WEIGHTS, self.files, self.folder / f"{self.stem}.json")

    def require_fit(self, delta: Delta) -> None:
        """Refuse a delta that this graph cannot run.

        Raises:
            BackboneError: it was trained on another backbone.
            InputError: it was trained at another image size, needs other branches, or a head is for other features or
                maps.
        """
        require_backbone(self.base, delta)
        if self.preprocess.input_shape != delta.preprocess.input_shape:
            here, there = (_size(p) for p in (self.preprocess, delta.preprocess))
            raise InputError(f"task {delta.task!r}", f"was trained at {there}", got=f"a graph of {here}")
        require_structure(self.structure, delta)
        require_heads(delta, self.width, self.maps)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor by name; a table of this image size hides the native one."""
        tables = f"{self.stem}.safetensors"
        found = safetensors_places(self.folder / WEIGHTS)
        return found | safetensors_places(self.folder / tables) if tables in self.files else found

    @cached_property
    def base(self) -> Base:
        """The tensors that the graph computes with, as read-only views of the files."""
        tensors = _views(self.folder, self.places)
        return Base(name=self.backbone, fingerprint=self.fingerprint, tensors=tensors)


def require_structure(structure: str, delta: Delta) -> None:
    """Refuse a delta that needs other branches than those of a graph with this ``structure``.

    Raises:
        InputError: it does.
    """
    if structure != delta.structure:
        here, there = (f"branches {s}" if s else "no branches" for s in (structure, delta.structure))
        raise InputError(f"task {delta.task!r}", f"needs a graph with {there}", got=here)


def require_heads(delta: Delta, width: int, maps: Sequence[GraphMap]) -> None:
    """Refuse a delta with a head that cannot read what a backbone puts out: ``width`` features, and ``maps``.

    Raises:
        InputError: it has one.
    """
    if delta.labels and delta.head.weight.shape[1] != width:
        what = f"needs a head for {width} features"
        raise InputError(f"task {delta.task!r}", what, got=tuple(delta.head.weight.shape))
    for each in delta.heads:
        if not maps and set(each.head.inputs) - {FEATURES}:
            what, fix = (
                "needs a graph that lists maps",
                "bring it again from a host: edgepet device init --for TASK.pet",
            )
            raise InputError(f"task {delta.task!r}", what, got="one of before there were any", fix=fix)
        try:
            each.head.shapes([every.map for every in maps], width=width)
        except InputError as error:
            raise InputError(f"task {delta.task!r}: {error.where}", error.what, got=error.got, fix=error.fix) from error


def bytes_beside(shared: str, files: Listed, description: Path) -> int:
    """Bytes on disk of a graph's ``files`` and its description, without the file that all image sizes share."""
    return description.stat().st_size + sum(size for name, (_, size) in files.items() if name != shared)


def graph_stem(preprocess: Preprocess, structure: str = "") -> str:
    """``graph-112``, or ``graph-112x224`` where height and width differ, then frames and the digits of branches."""
    stem = f"graph-{spelled_size(preprocess.image_size)}"
    stem += f"-frames{preprocess.frames}" if preprocess.frames > 1 else ""
    return f"{stem}-{structure}" if structure else stem


def _size(preprocess: Preprocess) -> str:
    pixels = f"{'x'.join(map(str, preprocess.image_size))} pixels"
    return pixels if preprocess.frames == 1 else f"{preprocess.frames} frames of {pixels}"


def graph_folder(fingerprint: str, root: Path | None = None) -> Path:
    """Where the cache, or a store at ``root``, keeps the backbone with this fingerprint."""
    return (root or cache_folder()) / "backbones" / fingerprint.removeprefix("sha256:")[:16]


def open_graph(fingerprint: str, preprocess: Preprocess, structure: str = "", *, root: Path | None = None) -> BaseGraph:
    """Open the graph of a backbone, an input size and a structure, checking its files; see ``manifest.require_whole``.

    Args:
        preprocess: only its image size and frames count.

    Raises:
        InputError: it was never made, or by another version, or a file of it is damaged.
    """
    folder = graph_folder(fingerprint, root)
    path = folder / f"{graph_stem(preprocess, structure)}.json"
    if not path.is_file():
        wanted = _size(preprocess) + (f" with branches {structure}" if structure else "")
        raise InputError(
            str(folder), f"holds no graph of {wanted}", fix="run `edgepet export` once where torch is installed"
        )
    graph = graph_at(path)
    if graph.fingerprint != fingerprint:
        raise _another(path)
    return graph


def graph_at(path: Path) -> BaseGraph:
    """Open the graph that the description ``path`` is of, checking its files; see ``manifest.require_whole``.

    Raises:
        InputError: it cannot be read, was made by another version, or a file of it is damaged.
    """
    needs, may = (WEIGHTS, f"{path.stem}.onnx"), (f"{path.stem}.safetensors",)
    described = read_description(path, FORMAT, VERSION, large=WEIGHTS, needs=needs, may=may)
    table = described.table
    graph = BaseGraph(
        folder=path.parent,
        backbone=table.text("backbone"),
        architecture=table.text("architecture"),
        fingerprint=table.text("fingerprint"),
        preprocess=described.preprocess,
        width=table.integer("width", least=1),
        create_args=_settings(table.nested("create_args")),
        licence=table.text("licence"),
        files=described.files,
        structure=structure_digest(table.sequence("branches")),
        maps=read_maps(table.nested_list("maps")) if table.has("maps") else (),
    )
    table.end()
    require_fingerprint(graph.fingerprint, path.name)
    if graph.stem != path.stem:
        raise _another(path)
    return graph


def require_fingerprint(text: str, where: str) -> None:
    """Refuse what is no fingerprint: the name of a folder is made of it.

    Raises:
        InputError: it is none.
    """
    if FINGERPRINT.fullmatch(text) is None:
        raise InputError(f"{where}.fingerprint", "needs sha256: and 64 hex digits", got=repr(text[:80]))


def _another(path: Path) -> InputError:
    return InputError(
        str(path), "describes another graph than its name says", fix=f"delete {path.parent} and run again"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """A graph's description, half read: ``table`` has what is its own still to be taken."""

    table: ObjectReader
    version: int
    preprocess: Preprocess
    files: Listed


def is_older(path: Path, kind: str, version: int) -> bool:
    """Whether a description was written for an earlier version than ``version``.

    Raises:
        InputError: it cannot be read, or is of another kind.
    """
    return _parsed(path, kind).integer("version") < version


def read_description(
    path: Path, kind: str, version: int, *, oldest: int | None = None, large: str, needs: Collection[str],
    may: Collection[str],
) -> Described:  # fmt: skip
    """Read a description and check the files that it names; the ``large`` one is read only where it changed.

    Args:
        oldest: version that is read; None is ``version`` alone.
        needs, may: names of files that it must list, ``large`` among them, and of those that it may.

    Raises:
        InputError: it cannot be read, is of another kind or version, lists other files, or one is missing or damaged.
    """
    table = _parsed(path, kind)
    found = table.integer("version")
    if not (version if oldest is None else oldest) <= found <= version:
        read = f"version {version}" if oldest is None else f"versions {oldest} to {version}"
        raise InputError(str(path), f"this edgepet reads graphs of {read}", fix="delete it and run again")
    preprocess = read_preprocess(table.nested("preprocess"))
    files = listed_files(table, needs=needs, may=may)
    table.raw("versions")
    require_whole(path.parent, files, stamped=(large,), fix=f"delete {path.parent} and run again")
    return Described(table, found, preprocess, files)


def write_graph_json(
    folder: Path,
    stem: str,
    facts: Mapping[str, object],
    files: list[str],
    *,
    kind: str = FORMAT,
    version: int = VERSION,
) -> None:
    """Seal a graph: its facts and the digests of its ``files`` in ``folder``, written last.

    Raises:
        InputError: it cannot be written.
    """
    found = listing(folder, files)
    for name, (digest, _) in found.items():
        put_stamp(folder / name, digest)
    entries = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in found.items()}
    described = {"format": kind, "version": version, **facts, "files": entries}
    write_file(folder / f"{stem}.json", canonical_json(described))


def _parsed(path: Path, kind: str) -> ObjectReader:
    table = read_manifest(path, where=path.name, fix="delete it and run again")
    table.text("format", choices=[kind])
    return table


def _settings(table: ObjectReader) -> dict[str, object]:
    return {key: table.raw(key) for key in table.names()}
