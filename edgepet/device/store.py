"""A device's folder: one backbone with its graphs, and as many packs as it likes.

<root>/backbones/<digits of the fingerprint>/    as ``edgepet.graphs.base`` lays it out
<root>/tasks/<task>.pet                          the packs, each installed by a rename
<root>/cache/                                    derived data of runtimes, deletable at any time
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from edgepet.deltas.merge import task_tensors
from edgepet.errors import InputError
from edgepet.files import folder_bytes, made_folder, new_folder, read_file, write_file
from edgepet.graphs.base import BaseGraph, graph_folder, open_graph
from edgepet.graphs.int8 import Int8Graph, int8_stem, open_int8
from edgepet.graphs.manifest import Listed, put_stamp, require_whole
from edgepet.graphs.slots import task_slots
from edgepet.packs.pack import Pack, read_pack


@dataclass(frozen=True, slots=True)
class Store:
    """The folder at ``root``; what is not there yet is made when something is put into it."""

    root: Path

    def add_graph(self, graph: BaseGraph) -> None:
        """Bring a backbone and one graph of it, from the cache say; what is there already stays.

        Raises:
            InputError: a file of it cannot be read or is damaged, or the store not written.
        """
        self._add(graph.folder, graph.fingerprint, graph.files, f"{graph.stem}.json")

    def add_int8(self, graph: Int8Graph) -> None:
        """Bring an int8 backbone: with it a device needs no other. Raises as ``add_graph`` does."""
        self._add(graph.folder, graph.fingerprint, graph.files, f"{graph.stem}.json")

    def _add(self, source: Path, fingerprint: str, files: Listed, description: str) -> None:
        """Bring ``files`` that are not there yet, each checked when it is here; the description comes last."""
        target = graph_folder(fingerprint, self.root)
        again = f"delete {source} and make it again"
        if not target.exists():
            with new_folder(target) as scratch:
                for name in (*files, description):
                    _bring(source / name, scratch / name)
                require_whole(scratch, files, fix=again)
            for name, (digest, _) in files.items():
                put_stamp(target / name, digest)
        else:
            missing = {name: told for name, told in files.items() if not (target / name).exists()}
            require_whole(source, missing, fix=again)
            for name in missing:
                write_file(target / name, read_file(source / name))
            require_whole(target, files, stamped=files, fix=f"delete {target} and bring it again")
            if not (target / description).exists():
                write_file(target / description, read_file(source / description))

    def install(self, source: Path | bytes) -> Pack:
        """Check a pack against the backbone that is here, then put it in its task's place in one step.

        Args:
            source: the pack's file, or its bytes.

        Raises:
            PackError: it is no pack.
            InputError: its backbone, image size or branches are not here, an update does not fit or makes what is not
                finite, its ranges are for other int8 codes, or a file cannot be read or written.
        """
        data = source if isinstance(source, bytes) else read_file(source)
        pack = read_pack(data)
        if pack.delta.int8 is not None and self._has_int8(pack):
            task_slots(self.int8_of(pack), pack.delta)  # refuses what is not finite
        else:
            graph = self.graph_of(pack)
            graph.require_fit(pack.delta)
            task_tensors(graph.base, pack.delta)  # refuses what is not finite
        path = self._path(pack.delta.task)
        made_folder(path.parent, "packs are kept there")
        write_file(path, data)
        return pack

    def tasks(self) -> tuple[str, ...]:
        """Names of the installed tasks, sorted."""
        return tuple(sorted(path.stem for path in (self.root / "tasks").glob("*.pet")))

    def pack(self, task: str) -> Pack:
        """The installed pack of ``task``.

        Raises:
            InputError: it is not installed, or another task is in its place.
            PackError: its file is damaged.
        """
        if task not in self.tasks():
            raise InputError(
                str(self.root), f"has no task {task!r}", fix=f"installed are: {', '.join(self.tasks()) or 'none'}"
            )
        pack = read_pack(self._path(task))
        if pack.delta.task != task:
            fix = "install the packs again"
            raise InputError(str(self._path(task)), f"must hold the task {task!r}", got=repr(pack.delta.task), fix=fix)
        return pack

    def graph_of(self, pack: Pack) -> BaseGraph:
        """The graph that ``pack`` runs on.

        Raises:
            InputError: it is not here, or damaged.
        """
        return open_graph(pack.delta.fingerprint, pack.delta.preprocess, pack.delta.structure, root=self.root)

    def int8_of(self, pack: Pack) -> Int8Graph:
        """The int8 backbone that ``pack`` runs on.

        Raises:
            InputError: it is not here, or damaged.
        """
        return open_int8(pack.delta.fingerprint, pack.delta.preprocess, root=self.root)

    def _has_int8(self, pack: Pack) -> bool:
        folder = graph_folder(pack.delta.fingerprint, self.root)
        return (folder / f"{int8_stem(pack.delta.preprocess)}.json").is_file()

    @property
    def cache_bytes(self) -> int:
        """Bytes on disk of derived data, which could be deleted."""
        return folder_bytes(self.root / "cache")

    def _path(self, task: str) -> Path:
        return self.root / "tasks" / f"{task}.pet"


def _bring(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy: files in a store are never written in place."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    write_file(target, read_file(source))
