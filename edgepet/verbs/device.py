"""What ``device`` does with a store besides what ``edgepet.Device`` does: making one, and making it trust keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepet.device.checking import Problem
from edgepet.device.serving import Device, Installation, TaskLine
from edgepet.device.store import Store
from edgepet.errors import InputError, option
from edgepet.files import folder_bytes, read_file
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.packs.pack import EVERY, read_pack
from edgepet.packs.signatures import PUBLIC
from edgepet.spec import FilePath, ImageSize

PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class InitReport:
    """A store as it is after backbones were brought: ``bytes`` are all of its files."""

    store: str
    backbone: str
    graphs: tuple[str, ...]
    tasks: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallReport:
    """What was installed; the fields beside ``installed`` are the last pack's."""

    task: str
    sequence: int
    bytes: int
    seconds: float
    installed: tuple[Installation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListReport:
    """Every task of a store, the number of the generation, and what the store asks for."""

    generation: int
    tasks: tuple[TaskLine, ...]
    bytes: int
    quota_bytes: int | None
    requires_signature: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Whether everything in a store is as it should be, and what is not."""

    ok: bool
    problems: tuple[Problem, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveReport:
    """The task that is not there any more."""

    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A folder that another device can be made of."""

    path: str
    tasks: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustReport:
    """The names of the keys whose packs the store takes."""

    keys: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------- what is done


def init(
    store: FilePath,
    *,
    backbone: str | None = None,
    packs: Sequence[FilePath] = (),
    source: FilePath | None = None,
    image_size: ImageSize | None = None,
    precisions: Sequence[str] = ("fp32",),
    quota_bytes: int | None = None,
) -> InitReport:
    """Bring backbones and their graphs into a store, which is made where it is not there.

    Args:
        backbone: as everywhere; needs torch where its graph is not in the cache.
        packs: bring the graphs that these need; they are not installed.
        source: bring everything from another store: its graphs, keys and active packs, each of which answers its own
            probe here first. Into a store that is there already it brings graphs alone, which mends them.
        image_size: of ``backbone``; None is its own.
        precisions: "fp32", "int8": of the graphs of ``backbone`` and of packs with ranges.
        quota_bytes: the most that the store may take; None leaves it as it is.

    Raises:
        InputError: nothing to bring, or it cannot be made, read or written.
        CheckError: a graph or a pack answers otherwise than it should.
        MissingError: torch is needed and not installed.
    """
    unknown = [each for each in precisions if each not in PRECISIONS]
    if unknown or not precisions:
        raise InputError(option("precisions"), f"is of {', '.join(PRECISIONS)}", got=repr(",".join(unknown)))
    target, graphs = Store(Path(store)), list[BaseGraph | Int8Graph]()
    if source is not None:
        bring(Store(Path(source)), target)
    elif backbone is None and not packs and quota_bytes is None:
        told = f"needs {option('backbone')}, {option('packs')} or {option('source')}"
        raise InputError(str(store), told)
    for pack in map(Path, packs):
        graphs += _graphs_for(pack, backbone, precisions)
    if backbone is not None and not packs:
        graphs += _graphs_of(backbone, image_size, precisions)
    for graph in graphs:
        target.add_graph(graph)
    if quota_bytes is not None:
        target.limit(quota_bytes)
    held = target.graphs()
    return InitReport(
        store=str(store),
        backbone=", ".join(sorted({graph.backbone for graph in held})),
        graphs=tuple(f"{graph.folder.name}/{graph.stem}" for graph in held),
        tasks=target.tasks(),
        bytes=folder_bytes(target.root),
    )


def export(store: FilePath, to: FilePath, tasks: Sequence[str] = ()) -> ExportReport:
    """The least folder that another device can be made of: these tasks, or all, the graphs that they need, and keys.

    Raises:
        InputError: no such task, ``to`` is there already, or it cannot be written.
    """
    source, target = Store(Path(store)), Store(Path(to))
    if target.root.exists() and (not target.root.is_dir() or any(target.root.iterdir())):
        raise InputError(str(to), "is there already", fix="name another folder")
    bring(source, target, tasks or source.tasks())
    return ExportReport(path=str(to), tasks=target.tasks(), bytes=folder_bytes(target.root))


def bring(source: Store, target: Store, tasks: Sequence[str] | None = None) -> None:
    """Bring keys, graphs and active packs of ``source`` into ``target``; into a store that is there, graphs alone.

    Args:
        tasks: these alone, with the graphs that they need, and nothing is asked of them: they answer where the folder
            goes. None is everything, each pack asked for its own probe.

    Raises:
        InputError: ``source`` is no store, has no such task, or something is damaged or cannot be written.
        CheckError: a pack answers otherwise than it says, or nobody trusted has signed it.
    """
    now, is_new = source.now(), not target.now().number and not target.trusted.is_dir()
    if not now.number:
        raise InputError(str(source.root), "is no store", fix="name one that edgepet device export or init made")
    wanted = sorted(now.tasks) if tasks is None else tasks
    packs = {task: source.pack_of(task, now.of(task, str(source.root)).active) for task in wanted if is_new}
    graphs: dict[str, BaseGraph | Int8Graph] = {}
    for pack in packs.values():
        for precision in source.precisions(pack):
            graph = source.int8_of(pack) if precision == "int8" else source.graph_of(pack)
            graphs[f"{graph.folder}/{graph.stem}"] = graph
    if tasks is None:
        graphs |= {f"{graph.folder}/{graph.stem}": graph for graph in source.graphs()}
    if is_new and (keys := source.trusted_keys()):
        target.trust(keys)
    for graph in graphs.values():
        target.add_graph(graph)
    for task in packs:
        place = source.pack_path(now.tasks[task].active)
        if tasks is None:
            Device(target.root).install(place)
        else:
            target.install(place)


def require_signature(store: FilePath, keys: Sequence[FilePath]) -> TrustReport:
    """Take only packs from now on that one of these keys has signed, or one that was trusted before.

    Args:
        keys: public keys, NAME.pub, or folders of them.

    Raises:
        InputError: no key is among them, or one is none.
        MissingError: cryptography is not installed.
    """
    files = [
        each for given in map(Path, keys) for each in (sorted(given.glob(f"*{PUBLIC}")) if given.is_dir() else [given])
    ]
    wrong = [each for each in files if each.suffix != PUBLIC]
    if wrong or not files:
        got = repr(wrong[0].name) if wrong else "no such file"
        raise InputError(
            "require-signature", f"needs public keys, whose names end in {PUBLIC}", got=got, fix="edgepet keygen"
        )
    twice = [each.name for each in files if sum(each.stem == other.stem for other in files) > 1]
    if twice:
        raise InputError("require-signature", "needs keys of different names", got=f"{twice[0]} twice")
    held = Store(Path(store))
    held.trust({each.stem: read_file(each) for each in files})
    return TrustReport(keys=tuple(sorted(held.trusted_keys())))


def _graphs_for(pack: Path, backbone: str | None, precisions: Sequence[str]) -> list[BaseGraph | Int8Graph]:
    from edgepet.proving.sources import graph_of, int8_graph_of

    delta = read_pack(pack, answers=EVERY).delta
    found: list[BaseGraph | Int8Graph] = []
    if "fp32" in precisions or delta.int8 is None:
        found.append(graph_of(pack, delta, backbone))
    if "int8" in precisions and delta.int8 is not None:
        found.append(int8_graph_of(pack, delta, backbone))
    return found


def _graphs_of(backbone: str, image_size: ImageSize | None, precisions: Sequence[str]) -> list[BaseGraph | Int8Graph]:
    from edgepet.calibration.slot_graphs import int8_graph
    from edgepet.exporters.trace import base_graph
    from edgepet.networks.loading import load_backbone

    graph = base_graph(load_backbone(backbone, image_size=image_size))
    return [int8_graph(graph) if precision == "int8" else graph for precision in precisions]
