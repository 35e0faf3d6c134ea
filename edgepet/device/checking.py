"""Everything that a store holds, read: what is damaged, and what would mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgepet.device.generation_files import BRING, damaged_files, generation_files, read_generation
from edgepet.device.generations import Installed
from edgepet.device.store import Store
from edgepet.errors import EdgepetError
from edgepet.graphs.manifest import is_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something in a store that is not as it should be: where, what, and what would mend it."""

    where: str
    what: str
    fix: str


def check(store: Store) -> tuple[Problem, ...]:
    """What is wrong with ``store``; nothing is changed."""
    return tuple(_problems(store))


def _problems(store: Store) -> Iterator[Problem]:
    for path in generation_files(store.root):
        try:
            read_generation(path)
        except EdgepetError as error:
            yield Problem(where=str(path), what=f"is damaged: {error.what}", fix="any change writes a new one")
    try:
        now = store.now()
    except EdgepetError as error:
        yield Problem(where=error.where, what=error.what, fix=error.fix or "")
        return
    for name, graph in sorted(now.graphs.items()):
        for path in damaged_files(store.root, name, graph):
            yield Problem(where=str(path), what="is damaged or missing", fix=BRING)
    for task, state in sorted(now.tasks.items()):
        yield from _of_pack(store, task, state.active, active=True)
        if state.previous is not None:
            yield from _of_pack(store, task, state.previous, active=False)
    keys = store.trusted_keys()
    for task, state in sorted(now.tasks.items()) if store.trusted.is_dir() else ():
        if state.active.signed_by not in keys:
            what = f"task {task!r} is not signed by a key that is trusted now"
            fix = f"edgepet device remove {task}, or trust its key again"
            yield Problem(where=str(store.pack_path(state.active)), what=what, fix=fix)
    if now.requires_signature and not keys:
        what = "signatures are required, and there is no key"
        yield Problem(where=str(store.trusted), what=what, fix="edgepet device require-signature KEY.pub")


def _of_pack(store: Store, task: str, pack: Installed, *, active: bool) -> Iterator[Problem]:
    path = store.pack_path(pack)
    if path.is_symlink() or not is_whole(path, pack.sha256, pack.size_bytes):
        fix = f"install {task!r} again" + (", or edgepet device rollback" if active else "")
        yield Problem(where=str(path), what=f"is damaged or missing: {task!r}", fix=fix)
