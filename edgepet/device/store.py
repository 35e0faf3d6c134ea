"""A device's folder: backbones with their graphs, and as many packs as it likes, all of it one generation.

<root>/generations/<number>-<digits>.json      what the store is; the newest whole one counts, the one before is kept
<root>/packs/<sha256>.pet                      the packs that these two name
<root>/backbones/<digits of the fingerprint>/  as ``edgepet.graphs.base`` lays it out
<root>/trusted/<name>.pub                      keys; where this folder is, only what one of them signed is installed
<root>/cache/                                  derived data, deletable at any time
<root>/lock                                    held by who changes it

Files are written once, for reading only, under names that their contents decide, and named by a generation afterwards:
whatever stops a change, what was there before is whole. Readers take no lock. docs/spec/store-v1.md has the rules.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from edgepet.bringing import bring_file
from edgepet.deltas.merge import task_tensors
from edgepet.device.caches import clear_cache
from edgepet.device.generation_files import (
    BRING,
    adds_to,
    clear,
    damaged_files,
    is_own,
    listed,
    mending,
    newest,
    require_own,
    require_same,
    write_generation,
)
from edgepet.device.generations import (
    Generation,
    Installed,
    candidate_of,
    installing,
    precisions_of,
    removing,
    rolling_back,
    withholding,
)
from edgepet.device.graph_states import state_of
from edgepet.errors import CheckError, InputError, option
from edgepet.files import folder_bytes, made_folder, read_file, sha256_file, write_file
from edgepet.graphs.base import BaseGraph, graph_at, graph_folder
from edgepet.graphs.int8 import Int8Graph, int8_at
from edgepet.graphs.manifest import put_stamp
from edgepet.graphs.slots import task_slots
from edgepet.locks import held_alone
from edgepet.packs.pack import EVERY, Pack, read_pack
from edgepet.packs.signatures import PUBLIC, Signer, public_key, signed_with
from edgepet.spec import StoredPrecision

WAIT_S = 60.0  # for another process that changes the store
_AGAIN = 3  # times that a reader looks again, when what it read was replaced meanwhile

Ask: TypeAlias = Callable[[Pack, Sequence[StoredPrecision]], Mapping[str, str]]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Store:
    """The folder at ``root``; what is not there yet is made when something is put into it."""

    root: Path

    # ------------------------------------------------------------------------------------------------------- reading

    def now(self) -> Generation:
        """What the store is: its newest whole generation, an empty one where there is none. Raises as ``newest``."""
        return newest(self.root)

    def tasks(self) -> tuple[str, ...]:
        """Names of the installed tasks, sorted."""
        return tuple(sorted(self.now().tasks))

    def pack(self, task: str) -> Pack:
        """The active pack of ``task``.

        Raises:
            InputError: it is not installed, or its file is damaged or missing.
        """
        return self._following(lambda now: self.pack_of(task, now.of(task, str(self.root)).active))

    def pack_of(self, task: str, installed: Installed) -> Pack:
        """The pack that a generation names.

        Raises:
            InputError: its file is damaged or missing.
        """
        path, fix = self.pack_path(installed), f"install {task!r} again, or edgepet device rollback"
        require_own(self.root, path)
        try:
            data = read_file(path)
        except InputError as error:
            raise InputError(str(path), "is damaged or missing", got=error.got, fix=fix) from error
        if hashlib.sha256(data).hexdigest() != installed.sha256:
            raise InputError(str(path), "is damaged or missing", got="another sha256 than its name", fix=fix)
        pack = read_pack(data, answers=EVERY)
        if pack.delta.task != task:
            raise InputError(str(path), f"must hold the task {task!r}", got=repr(pack.delta.task), fix=fix)
        return pack

    def pack_path(self, installed: Installed) -> Path:
        """Where the pack that a generation names lies."""
        return self.root / "packs" / f"{installed.sha256}.pet"

    def trusted_keys(self) -> dict[str, bytes]:
        """The public keys whose packs are installed, PEM by name.

        Raises:
            InputError: one cannot be read.
        """
        found = sorted(self.trusted.glob(f"*{PUBLIC}")) if self.trusted.is_dir() else []
        return {path.stem: read_file(path) for path in found}

    def graph_of(self, pack: Pack) -> BaseGraph:
        """The graph that ``pack`` runs on.

        Raises:
            InputError: it is not here, or damaged.
        """
        with mending():
            return graph_at(self._description(candidate_of(pack, None).dense, pack))

    def int8_of(self, pack: Pack) -> Int8Graph:
        """The int8 backbone that ``pack`` runs on.

        Raises:
            InputError: it is not here, or damaged.
        """
        with mending():
            return int8_at(self._description(candidate_of(pack, None).int8, pack))

    def graphs(self) -> tuple[BaseGraph | Int8Graph, ...]:
        """Every graph that is here.

        Raises:
            InputError: one of them is damaged.
        """
        graphs = sorted(self.now().graphs.items())
        return tuple((graph_at if graph.codes is None else int8_at)(self.bound(name)) for name, graph in graphs)

    def precisions(self, pack: Pack) -> tuple[StoredPrecision, ...]:
        """In which a pack runs here: on the dense backbone, and on the int8 one where it has ranges for it.

        Raises:
            InputError: neither is here, or the codes that are here are others.
        """
        return precisions_of(self.now(), candidate_of(pack, None))

    def deriving(self, size_bytes: int) -> Path | None:
        """Where a runtime may keep what it derives of a graph of this size; None where the quota has no room for it."""
        quota = self.now().quota_bytes
        fits = quota is None or folder_bytes(self.root) - self.cache_bytes + 2 * size_bytes <= quota
        return self.root if fits else None

    @property
    def cache_bytes(self) -> int:
        """Bytes on disk of derived data, which could be deleted."""
        return folder_bytes(self.root / "cache")

    # ------------------------------------------------------------------------------------------------------- changing

    def add_graph(self, graph: BaseGraph | Int8Graph) -> None:
        """Bring a backbone and one graph of it, from the cache say; what is there already and whole stays.

        An int8 backbone that has no ranges of its own yet takes those that come, and a graph without maps takes maps.

        Raises:
            InputError: a file of it cannot be read or is damaged, the store not written, or its quota too small.
        """
        description = graph.folder / f"{graph.stem}.json"
        digest, name = sha256_file(description), f"{graph_folder(graph.fingerprint, self.root).name}/{graph.stem}.json"
        again = f"delete {graph.folder} and make it again"
        with self._changing() as now:
            kept, fresh = now.graphs.get(name), state_of(graph, digest)
            other = kept if kept is not None and kept.sha256 != digest else None
            if other and not damaged_files(self.root, name, other) and not adds_to(self.root, name, other, graph):
                return
            target = graph_folder(graph.fingerprint, self.root)
            coming = sum(size for each, (_, size) in graph.files.items() if not (target / each).exists())
            self._make_room(now, coming)
            made_folder(target, "the backbone is kept there")
            require_own(self.root, target)
            require_same(self.root, now, name, graph.files)
            for each, (sha256, size) in graph.files.items():
                if not is_own(target / each, sha256, size):
                    bring_file(graph.folder / each, target / each, sha256, again)
                    put_stamp(target / each, sha256)
            if not is_own(target / description.name, digest, description.stat().st_size):
                if other is not None:  # whatever stops this, one of the two is there and is named
                    now = now.next(graphs={**now.graphs, name: replace(other, coming=digest)})
                    write_generation(self.root, now)
                bring_file(description, target / description.name, digest, again)
            if kept != fresh:
                write_generation(self.root, now.next(graphs={**now.graphs, name: fresh}))

    add_int8 = add_graph

    def install(
        self, source: Path | bytes, *, older: bool = False, ask: Ask = lambda pack, precisions: {}
    ) -> tuple[Pack, Installed]:
        """Decide whether a pack may be installed, ask it, write it, and make it its task's active one in one step.

        Args:
            source: the pack's file, or its bytes.
            older: take a pack with a smaller sequence number than was ever installed, of the same signer.
            ask: gives for each place where it was asked why it is not served there, or nothing.

        Raises:
            CheckError: keys are trusted here and none of them has signed it, or it is older; whatever ``ask`` raises.
            MissingError: it is signed, keys are trusted here, and cryptography is not installed.
            PackError: it is no pack.
            InputError: its backbone, image size or branches are not here, an update does not fit or makes what is not
                finite, its ranges are for another int8 backbone, the quota is too small, or a file cannot be read or
                written.
        """
        data = source if isinstance(source, bytes) else read_file(source)
        where = "pack" if isinstance(source, bytes) else source.name
        signed = self._signer(data, where)
        pack = read_pack(data, where=where, answers=EVERY)
        candidate, task = candidate_of(pack, signed), pack.delta.task
        installing(self._required(self.now()), candidate, {}, older=older)
        precisions = self.precisions(pack)
        answers = ask(pack, precisions)
        if not answers:
            self._require_fit(pack, precisions)  # who was asked has folded it
        with self._changing() as now:
            then = installing(self._required(now), candidate, answers, older=older)
            path = self.pack_path(then.tasks[task].active)
            require_own(self.root, path.parent)
            is_there = is_own(path, pack.sha256, len(data))
            if not is_there:
                self._make_room(now, len(data))
                made_folder(path.parent, "packs are kept there")
                write_file(path, data, read_only=True)
            if not is_there or replace(then, number=now.number) != now:
                write_generation(self.root, then)
        return pack, then.tasks[task].active

    def rollback(self, task: str) -> Installed:
        """Make the pack before ``task``'s active one again.

        Raises:
            InputError: it is not installed, has no pack before, or the store cannot be written.
            CheckError: the pack before was refused everywhere, or nobody trusted has signed it.
        """
        self.now().of(task, str(self.root))  # before anything is made
        with self._changing() as now:
            then = rolling_back(self._required(now), task, str(self.root))
            self.pack_of(task, then.tasks[task].active)  # refuses one that is damaged
            write_generation(self.root, replace(then, requires_signature=now.requires_signature))
        return then.tasks[task].active

    def refuse(self, task: str, sha256: str, place: str, why: str) -> None:
        """Serve that pack at ``place`` no more; see ``generations.withholding``.

        Raises:
            InputError: the store cannot be written.
        """
        with self._changing() as now:
            then = withholding(now, task, sha256, place, why)
            if then != now:
                write_generation(self.root, then)

    def remove(self, task: str) -> None:
        """Take a task out; its files go with it, when the next change has been made at the latest.

        Raises:
            InputError: it is not installed, or the store cannot be written.
        """
        self.now().of(task, str(self.root))
        with self._changing() as now:
            write_generation(self.root, removing(now, task, str(self.root)))

    def limit(self, quota_bytes: int | None) -> None:
        """Let the folder take at most so many bytes; None is any.

        Raises:
            InputError: it takes more already, or cannot be written.
        """
        if quota_bytes is not None and (not isinstance(quota_bytes, int) or quota_bytes < 0):
            raise InputError(option("quota_bytes"), "must be a whole number of bytes", got=quota_bytes)
        with self._changing() as now:
            then = replace(now, quota_bytes=quota_bytes)
            self._make_room(then, 0)
            if then != now:
                write_generation(self.root, then.next())

    def trust(self, keys: Mapping[str, bytes]) -> None:
        """Trust these public keys, PEM by name, and install from now on only what a trusted key has signed.

        Raises:
            InputError: one is no Ed25519 public key, or the store cannot be written.
            MissingError: cryptography is not installed.
        """
        for name, data in keys.items():
            public_key(data, name)
        there = self.trusted_keys()
        other = [name for name, data in keys.items() if there.get(name, data) != data]
        if other:
            what, fix = f"is another key than the {other[0]!r} that is trusted here", "give it a name of its own"
            raise InputError(f"{other[0]}{PUBLIC}", what, fix=fix)
        with self._changing() as now:
            made_folder(self.trusted, "keys are kept there")
            for name, data in keys.items():
                write_file(self.trusted / f"{name}{PUBLIC}", data)
            if not now.requires_signature:
                write_generation(self.root, now.next(requires_signature=True))

    # --------------------------------------------------------------------------------------------------------- inside

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Generation]:
        """The generation that is to be changed, while nobody else changes it; what others left half done is cleared."""
        made_folder(self.root, "a device's tasks are kept there")
        with held_alone(self.root / "lock", "is being changed by another process", wait_s=WAIT_S):
            now = self.now()
            clear(self.root)
            yield now

    def _following(self, read: Callable[[Generation], _T]) -> _T:
        """What ``read`` finds; where a file is gone because a newer generation took its place, looked for there."""
        for _ in range(_AGAIN):
            now = self.now()
            try:
                return read(now)
            except InputError:
                if self.now().number == now.number:
                    raise
        return read(self.now())

    def bound(self, name: str, wanted: str | None = None) -> Path:
        """The description of a graph, once its digest was compared with the generation's."""
        path, now = self.root / "backbones" / name, self.now()
        if name not in now.graphs:
            raise InputError(str(self.root), f"holds no {wanted or name}", fix=BRING)
        if not path.is_file() or sha256_file(path) not in now.graphs[name].digests:
            raise InputError(str(path), "is damaged or missing", fix=BRING)
        for each in (path, *(path.parent / file for file in listed(path))):
            require_own(self.root, each)
        return path

    def _description(self, name: str, pack: Pack) -> Path:
        return self.bound(name, f"{name} of {pack.delta.backbone}")

    @property
    def trusted(self) -> Path:
        """Where the keys lie."""
        return self.root / "trusted"

    def _required(self, now: Generation) -> Generation:
        """``now``, with signatures required where keys lie, whoever put them there."""
        return replace(now, requires_signature=True) if self.trusted.is_dir() else now

    def _signer(self, data: bytes, where: str) -> Signer | None:
        """Whose key signed it, before anything of it is read; None where nobody's is asked for.

        Raises:
            CheckError: keys are trusted here and none of them has signed it.
        """
        if not (self.now().requires_signature or self.trusted.is_dir()):
            return None
        if not self.trusted_keys():
            fix = "edgepet device require-signature KEY.pub"
            raise CheckError(where, f"must be signed by a key in {self.trusted}", got="no key there", fix=fix)
        found = signed_with(data, self.trusted, where)
        if found is None:
            what = f"must be signed by a key in {self.trusted}"
            raise CheckError(where, what, got="no signature", fix="edgepet pack --sign")
        return found

    def _require_fit(self, pack: Pack, precisions: Sequence[StoredPrecision]) -> None:
        """Refuse what does not fit, or folds to what is not finite."""
        if "int8" in precisions:
            task_slots(self.int8_of(pack), pack.delta)
        if "fp32" in precisions:
            graph = self.graph_of(pack)
            graph.require_fit(pack.delta)
            task_tensors(graph.base, pack.delta)

    def _make_room(self, now: Generation, coming_bytes: int) -> None:
        """Refuse what would go beyond the quota; derived data go first, active and previous packs never."""
        if now.quota_bytes is None:
            return
        held = folder_bytes(self.root)
        if held + coming_bytes > now.quota_bytes:
            held -= clear_cache(self.root)
        if held + coming_bytes > now.quota_bytes:
            got = f"{held:,} bytes held and {coming_bytes:,} to come"
            fix = "remove a task, or give it a larger quota with edgepet device init --quota"
            raise InputError(str(self.root), f"may take {now.quota_bytes:,} bytes", got=got, fix=fix)
