"""Networks that the tasks of a store run on, shared where they can be: in slots, merged, or on the int8 backbone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from edgepet.deltas.joined import reads_of
from edgepet.deltas.merge import changed_tensors
from edgepet.device.costs import keep_cost, kept_cost
from edgepet.device.fitting import fit, opened
from edgepet.device.map_heads import map_heads_of, open_heads
from edgepet.device.runner import PartRunner, Runner
from edgepet.device.runtime import SharedInt8, TaskNetwork, network_of, open_folded
from edgepet.device.runtimes import shared_runtime
from edgepet.device.store import Store
from edgepet.errors import InputError, option
from edgepet.files import folder_bytes
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.dense_slots import RIGHT, UnslottedError
from edgepet.measuring.machine import environment
from edgepet.packs.pack import Pack
from edgepet.reports.tables import format_bytes
from edgepet.spec import NpArray, Precision

Mode: TypeAlias = Literal["auto", "merged", "slots"]
MODES: tuple[Mode, ...] = ("auto", "merged", "slots")
# What slots cost of a run until it is seen here: that of ViT-S, with scales and shifts alone, and with products.
SCALES_COST, PRODUCTS_COST = 0.04, 0.10
SEEN = 3  # runs in slots, and merged, that show it


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What was done with a task's network: "merged" or "evicted", and what for."""

    task: str
    what: str
    why: str


@dataclass(slots=True, eq=False)
class _Own:
    """A task's own network, which may be closed and opened again: ``opener`` makes it, of ``size_bytes``."""

    task: str
    size_bytes: int
    opener: Callable[[], Runner]
    network: Runner | None = None
    used: int = 0  # when, as the pool counts
    lock: threading.RLock = field(default_factory=threading.RLock)


class Pool:
    """Opens packs so that they share networks; it is closed when none of them runs any more.

    In "auto" a task is in slots where they can hold it. Where ``memory_bytes`` has room for a network of its own, it is
    merged once slots have cost as much time as folding and opening takes: that is at most twice of what knowing the
    future would cost (Karlin et al. 1988, "Competitive snoopy caching", Algorithmica 3). Networks of merged tasks that
    together exceed ``memory_bytes`` are closed, the one that was used longest ago first, and opened again when asked.
    In int8 it is what tasks of a ConvNet may take on ONNX Runtime to run at full speed.
    """

    def __init__(
        self, store: Store, *, runtime: str, precision: str = "fp32", mode: str = "auto", threads: int | None = None,
        memory_bytes: int | None = None, device: str | None = None,
    ) -> None:  # fmt: skip
        """Open nothing yet; ``threads`` None is all cores, ``memory_bytes`` None no limit, and no merging in "auto".

        Raises:
            InputError: no such runtime, precision, mode or device.
        """
        if precision not in ("fp32", "int8"):
            raise InputError(option("precision"), "is fp32 or int8 for a pack", got=repr(precision))
        if mode not in MODES:
            raise InputError(option("mode"), f"is one of {', '.join(MODES)}", got=repr(mode))
        if precision == "int8" and mode == "merged":
            fix = "export the task, whose int8 is then its own"
            raise InputError(option("mode"), "is slots in int8: all tasks share the codes", got=mode, fix=fix)
        self.row = shared_runtime(runtime, purpose="a pack on a shared backbone", device=device)
        self.precision, self.mode = precision, mode
        self.events, self.holders = list[Event](), 0
        self._store, self.threads, self._memory = store, threads, memory_bytes
        self._networks, self._int8 = dict[object, PartRunner](), dict[object, SharedInt8]()
        self._graphs = dict[object, BaseGraph]()
        self._prices = dict[object, float]()  # seconds that the network of a form took to open
        self._own, self._lock, self._clock = list[_Own](), threading.RLock(), 0

    def open(self, pack: Pack) -> TaskNetwork:
        """A pack, ready to run; closing it leaves what it shares open.

        Raises:
            UnslottedError: in "slots", it has to be folded.
            InputError: its backbone is not in the store; else as ``open_task`` and ``SharedInt8``.
            MissingError: the runtime is not installed.
        """
        with self._lock:
            if self.precision == "int8":
                return self._on_codes(pack)
            graph = self.graph_of(pack)
            return network_of(self._runner(graph, pack), pack.delta, graph)

    def graph_of(self, pack: Pack) -> BaseGraph:
        """The graph of a pack, of which all tasks on it share one: each maps the weights' file."""
        with self._lock:
            graph = self._store.graph_of(pack)
            return self._graphs.setdefault((graph.folder, graph.stem), graph)

    def run(self, own: _Own, images: NpArray) -> NpArray:
        """The features of a task on its own network, which is opened where it is not open."""
        with own.lock:
            self._clock += 1
            own.used = self._clock
            network = own.network or self._admit(own, "it is asked")
            return network(images)

    def merge(self, own: _Own) -> float:
        """Give a task in slots its own network, where there is room for one at all; the seconds that it took."""
        began = time.perf_counter()
        with own.lock:
            if own.network is None and own.size_bytes <= (self._memory or 0):
                self._clock += 1
                own.used = self._clock
                self._admit(own, "slots have cost as much as folding")
        return time.perf_counter() - began

    def forget(self, own: _Own) -> None:
        """Close a task's own network, for good."""
        with own.lock, self._lock:
            if own.network is not None:
                own.network.close()
            own.network = None
            self._own = [each for each in self._own if each is not own]

    def hold(self) -> None:
        """Count one more who opens tasks on it."""
        with self._lock:
            self.holders += 1

    def release(self) -> None:
        """One less; the last one closes it."""
        with self._lock:
            self.holders -= 1
            if self.holders <= 0:
                self.close()

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            for own in self._own:
                if own.network is not None:
                    own.network.close()
            for network in self._networks.values():
                network.close()
            for shared in self._int8.values():
                shared.close()
            self._own, self._networks, self._int8, self._graphs = [], {}, {}, {}

    def _on_codes(self, pack: Pack) -> TaskNetwork:
        graph = self._store.int8_of(pack)
        key = graph.folder, graph.stem
        if key not in self._int8:
            place = self._store.deriving(graph.weights_bytes)
            self._int8[key] = SharedInt8(graph, runtime=self.row, threads=self.threads, store=place)
        taken = sum(shared.own_bytes for shared in self._int8.values())
        room = None if self._memory is None else max(0, self._memory - taken)
        return self._int8[key].bind(pack.delta, room_bytes=room)

    def _runner(self, graph: BaseGraph, pack: Pack) -> Runner:
        own, delta = self._known(graph, pack), pack.delta
        if self.mode == "merged":
            return self._alone(own)
        try:
            fitted = fit(graph, delta, "slots")
        except UnslottedError:
            if self.mode == "slots":
                raise
            return self._alone(own)
        heads = map_heads_of(delta)
        shapes = tuple((name, value.shape) for name, value in sorted(fitted.slots.items()))
        form = graph.folder, graph.stem, shapes, reads_of(heads)
        if form not in self._networks:
            began = time.perf_counter()
            self._networks[form] = opened(self.row, fitted.part, {}, self.threads)
            self._prices[form] = time.perf_counter() - began
        part = self._networks[form].bind(fitted.slots)
        bound: Runner = part
        if heads:
            bound = open_heads(self.row, heads, graph.maps, graph.width, part, threads=self.threads)
        if self._memory is None:
            return bound
        products = any(name.endswith(RIGHT) for name in fitted.slots)
        here = environment()
        of = {
            "runtime": self.row.place, "cpu": [here.cpu, *here.cpu_features], "threads": self.threads,
            "backbone": graph.fingerprint, "graph": graph.stem, "products": products,
        }  # fmt: skip
        return _Renting(self, own, bound, _Cost(self._store.root, of, products=products), self._prices[form])

    def _alone(self, own: _Own) -> Runner:
        self._clock += 1
        own.used = self._clock
        self._admit(own, "it is opened")
        return _Alone(self, own)

    def _known(self, graph: BaseGraph, pack: Pack) -> _Own:
        """A network of a pack's own, not open yet; what a runtime takes of it is about all of its weights.

        Where the store has room, its cache keeps the network of a task of classes: it is folded once.
        """
        delta, row = pack.delta, self.row
        keeps = row.open_kept if row.device == "cpu" and not map_heads_of(delta) else None

        def folded() -> dict[str, NpArray]:
            graph.require_fit(delta)
            return changed_tensors(graph.base, delta)

        def network() -> Runner:
            if keeps is None or not self._keeps(graph.weights_bytes):
                return open_folded(graph, delta, runtime=row, threads=self.threads)
            return keeps(graph, pack.sha256, folded, self._store.root, self.threads)

        size = graph.weights_bytes + sum(graph.base.tensors[name].nbytes for name in delta.targets)
        own = _Own(delta.task, size, network)
        self._own.append(own)
        return own

    def _keeps(self, size_bytes: int) -> bool:
        """Whether the store's quota has room for so much more."""
        quota = self._store.now().quota_bytes
        return quota is None or folder_bytes(self._store.root) + size_bytes <= quota

    def _admit(self, own: _Own, why: str) -> Runner:
        with self._lock:
            self._make_room(own)
            own.network = own.opener()
            self.events.append(Event(task=own.task, what="merged", why=why))
            return own.network

    def _make_room(self, coming: _Own) -> None:
        if self._memory is None:
            return
        if coming.size_bytes > self._memory:
            what = f"needs {format_bytes(coming.size_bytes)} for a network of its own"
            got, fix = option("memory_bytes", format_bytes(self._memory)), f"allow more, or {option('mode', 'slots')}"
            raise InputError(f"task {coming.task!r}", what, got=got, fix=fix)
        open_ones = sorted((each for each in self._own if each.network is not None), key=lambda each: each.used)
        taken = sum(each.size_bytes for each in open_ones)
        for each in open_ones:
            if taken + coming.size_bytes <= self._memory:
                break
            if each.lock.acquire(blocking=False):  # one that runs just now stays
                try:
                    if each.network is not None:
                        each.network.close()
                    each.network = None
                finally:
                    each.lock.release()
                taken -= each.size_bytes
                self.events.append(Event(task=each.task, what="evicted", why=f"for {coming.task!r}"))


class _Cost:
    """What slots cost of a run of one backbone here, a fraction: seen where a task has run both ways, once."""

    def __init__(self, root: Path, of: Mapping[str, object], *, products: bool) -> None:
        self._root, self._of, self._kept = root, of, kept_cost(root, of)
        self._usual = PRODUCTS_COST if products else SCALES_COST
        self._seen: dict[str, list[float]] = {"slots": [], "merged": []}
        self._shape: tuple[int, ...] = ()

    @property
    def part(self) -> float:
        """The part of a run in slots."""
        return self._usual if self._kept is None else self._kept

    def saw(self, form: str, shape: tuple[int, ...], seconds: float) -> None:
        """One run, of images of this shape: another one begins anew."""
        if self._kept is not None:
            return
        if shape != self._shape:
            self._seen, self._shape = {"slots": [], "merged": []}, shape
        self._seen[form] = [*self._seen[form], seconds][-SEEN - 1 :]
        slots, merged = self._seen["slots"], self._seen["merged"]
        if min(len(slots), len(merged)) > SEEN:  # the first one after opening is slower
            self._kept = keep_cost(self._root, self._of, slots_s=min(slots), merged_s=min(merged))


class _Alone:
    """A task on a network of its own, which the pool may close meanwhile."""

    executed: Precision = "fp32"

    def __init__(self, pool: Pool, own: _Own) -> None:
        self._pool, self._own, self.runtime = pool, own, pool.row.name

    @property
    def evidence(self) -> Mapping[str, object]:
        """The network's, of the last time that it was open."""
        return {} if self._own.network is None else self._own.network.evidence

    def __call__(self, images: NpArray) -> NpArray:
        return self._pool.run(self._own, images)

    def close(self) -> None:
        """Give the network back."""
        self._pool.forget(self._own)


class _Renting:
    """A task in slots until they have cost as much as a network of its own does, which then answers."""

    executed: Precision = "fp32"

    def __init__(self, pool: Pool, own: _Own, slots: Runner, cost: _Cost, price: float) -> None:
        # ``cost``: what of a run slots take; ``price``: seconds that a network takes to open.
        self._pool, self._own, self._slots, self._cost, self._price = pool, own, slots, cost, price
        self._spent, self.runtime = 0.0, pool.row.name

    @property
    def evidence(self) -> Mapping[str, object]:
        """That of the slots' network."""
        return self._slots.evidence

    def __call__(self, images: NpArray) -> NpArray:
        began = time.perf_counter()
        if self._own.network is not None:
            features = self._pool.run(self._own, images)
            self._cost.saw("merged", images.shape, time.perf_counter() - began)
            return features
        features = self._slots(images)
        seconds = time.perf_counter() - began
        self._cost.saw("slots", images.shape, seconds)
        self._spent += self._cost.part * seconds
        if self._spent >= self._price:
            self._price, self._spent = max(self._price, self._pool.merge(self._own)), 0.0
        return features

    def close(self) -> None:
        """Give the slots and the network back."""
        self._slots.close()
        self._pool.forget(self._own)
