"""A device's folder: one backbone with its graphs, and as many packs as it likes.

<root>/backbones/<digits of the fingerprint>/    as ``edgepet.graphs.base`` lays it out
<root>/tasks/<task>.pet                          the packs, each installed by a rename
<root>/trusted/<name>.pub                        keys; where this folder is, only what one of them signed is installed
<root>/cache/                                    derived data of runtimes, deletable at any time
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepet.deltas.merge import task_tensors
from edgepet.errors import CheckError, EdgepetError, InputError
from edgepet.files import folder_bytes, made_folder, new_folder, read_file, write_file
from edgepet.graphs.base import BaseGraph, graph_folder, graph_stem, open_graph
from edgepet.graphs.int8 import Int8Graph, int8_stem, open_int8
from edgepet.graphs.manifest import Listed, put_stamp, require_whole
from edgepet.graphs.slots import task_slots
from edgepet.packs.pack import Pack, read_pack
from edgepet.packs.signatures import signer
from edgepet.spec import StoredPrecision


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

    def install(
        self, source: Path | bytes, *, older: bool = False, ask: Callable[[Pack], None] = lambda pack: None
    ) -> Pack:
        """Check a pack against the backbone that is here, then put it in its task's place in one step.

        Args:
            source: the pack's file, or its bytes.
            older: take a pack with a smaller sequence number than the installed one, of the same signer.
            ask: what else has to be content with it before it is put there.

        Raises:
            CheckError: keys are trusted here and none of them has signed it, or it is older.
            MissingError: it is signed, keys are trusted here, and cryptography is not installed.
            PackError: it is no pack.
            InputError: its backbone, image size or branches are not here, an update does not fit or makes what is not
                finite, its ranges are for other int8 codes, or a file cannot be read or written.
        """
        data = source if isinstance(source, bytes) else read_file(source)
        signed_by = self._signer(data, "pack" if isinstance(source, bytes) else source.name)
        pack = read_pack(data)
        if not older:
            self._require_newer(pack, signed_by)
        if "int8" in self.precisions(pack):
            task_slots(self.int8_of(pack), pack.delta)  # refuses what is not finite
        if "fp32" in self.precisions(pack):
            graph = self.graph_of(pack)
            graph.require_fit(pack.delta)
            task_tensors(graph.base, pack.delta)  # refuses what is not finite
        ask(pack)
        path = self._path(pack.delta.task)
        made_folder(path.parent, "packs are kept there")
        write_file(path, data)
        return pack

    def _signer(self, data: bytes, where: str) -> str | None:
        """Whose key signed it, before anything of it is read; None where nobody's is asked for."""
        trusted = self.root / "trusted"
        if not trusted.is_dir():
            return None
        name = signer(data, trusted, where)
        if name is None:
            raise CheckError(
                where, f"must be signed by a key in {trusted}", got="no signature", fix="edgepet pack --sign"
            )
        return name

    def _require_newer(self, pack: Pack, signed_by: str | None) -> None:
        path = self._path(pack.delta.task)
        try:
            data = read_file(path)
            installed, signed_before = read_pack(data).sequence, self._signer(data, path.name)
        except EdgepetError:  # nothing is there, or what is there is damaged or trusted no more
            return
        if pack.sequence < installed and signed_before == signed_by:
            what = f"must not be older than the installed one, which has the sequence number {installed}"
            fix = "install it with older=True if that is meant"
            raise CheckError(f"task {pack.delta.task!r}", what, got=pack.sequence, fix=fix)

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

    def precisions(self, pack: Pack) -> tuple[StoredPrecision, ...]:
        """In which a pack runs here: on the dense backbone, and on the int8 one where it has ranges for it.

        Where neither is here it is the dense one, so that asking for it says what is missing.
        """
        delta, folder = pack.delta, graph_folder(pack.delta.fingerprint, self.root)
        int8 = delta.int8 is not None and (folder / f"{int8_stem(delta.preprocess)}.json").is_file()
        dense = (folder / f"{graph_stem(delta.preprocess, delta.structure)}.json").is_file() or not int8
        return (*(("fp32",) if dense else ()), *(("int8",) if int8 else ()))

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
