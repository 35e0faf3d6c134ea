"""Everything that a store holds, read: what is damaged, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgepet.device.generation_files import BRING, damaged_files, generation_files, read_generation, require_own
from edgepet.device.generations import Installed
from edgepet.device.graph_states import GraphState
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
    root = store.root
    try:
        files = generation_files(root)
        for path in files:
            if damage := _said(lambda path=path: read_generation(path)):  # type: ignore[misc]
                yield Problem(where=str(path), what=f"is damaged: {damage}", fix="any change writes a new one")
        now = store.now()
    except EdgepetError as error:
        yield Problem(where=error.where, what=error.what, fix=error.fix or "")
        return
    if not now.number:
        yield Problem(where=str(root), what="is no store", fix=f"edgepet device init --backbone B --store {root}")
        return
    for name, graph in sorted(now.graphs.items()):
        yield from _of_graph(store, name, graph)
    try:
        keys: set[str] | None = set(store.trusted_keys()) if store.trusted.is_dir() else None
    except EdgepetError as error:
        keys = None
        yield Problem(where=error.where, what=error.what, fix="make it readable, or remove it")
    for task, state in sorted(now.tasks.items()):
        for pack in (state.active, state.previous):
            if pack is not None:
                yield from _of_pack(store, task, pack, keys, active=pack is state.active)
    if now.requires_signature and not keys:
        what = "signatures are required, and there is no key"
        yield Problem(where=str(store.trusted), what=what, fix="edgepet device require-signature KEY.pub")


def _of_graph(store: Store, name: str, graph: GraphState) -> Iterator[Problem]:
    try:
        require_own(store.root, store.root / "backbones" / name)
        wrong = damaged_files(store.root, name, graph)
    except EdgepetError as error:
        yield Problem(where=error.where, what=error.what, fix=BRING)
        return
    for path in wrong:
        yield Problem(where=str(path), what="is damaged or missing", fix=BRING)


def _of_pack(store: Store, task: str, pack: Installed, keys: set[str] | None, *, active: bool) -> Iterator[Problem]:
    path = store.pack_path(pack)
    try:
        require_own(store.root, path)
        is_right = is_whole(path, pack.sha256, pack.size_bytes)
    except EdgepetError as error:
        fix = "make it readable, or install the pack again"
        yield Problem(where=error.where, what=f"{error.what}: {task!r}", fix=fix)
        return
    if not is_right:
        fix = f"install {task!r} again" + (", or edgepet device rollback" if active else "")
        yield Problem(where=str(path), what=f"is damaged or missing: {task!r}", fix=fix)
    if keys is not None and pack.signed_by not in keys:
        before = "" if active else "the pack before of "
        what = f"{before}task {task!r} is not signed by a key that is trusted now"
        yield Problem(where=str(path), what=what, fix=f"edgepet device remove {task}, or trust its key again")


def _said(read: Callable[[], object]) -> str | None:
    """Why ``read`` refused, or nothing."""
    try:
        read()
    except EdgepetError as error:
        return error.what
    return None
