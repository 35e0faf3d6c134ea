"""Tasks of a store, kept open: pictures to answers, one task or several of them on the same picture."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.deltas.heads import Meaning
from edgepet.device.answers import labels_of, meanings_of
from edgepet.device.fitting import Fitted, fit, fit_lightly, own_slots
from edgepet.device.generations import serving
from edgepet.device.map_heads import map_heads_of
from edgepet.device.mixed import Mixed, mix
from edgepet.device.pool import Event, Pool
from edgepet.device.runtime import TaskNetwork
from edgepet.device.served import AnyAnswer, Served, answering, place_of
from edgepet.device.store import Store
from edgepet.device.together import Shared, Together
from edgepet.errors import EdgepetError, InputError
from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.parts import part_of
from edgepet.images.inputs import Input, Picture, pictures_of
from edgepet.images.preprocess import normalize
from edgepet.packs.pack import Pack
from edgepet.spec import NpArray, Preprocess, StoredPrecision

IMAGES_OF_A_CALL = 16  # of one batch at most, whatever is asked at once


class OpenTask:
    """One task of a store, ready to run; threads may share it. A context manager.

    ``switch_ms`` is what it took to make it ready on a network that was open already, or to open its own.
    """

    def __init__(self, store: Store, task: str, pool: Pool) -> None:
        """Open its active pack, or the one before where that fails. Raises as ``Device.open`` does."""
        began = time.perf_counter()
        pool.hold()
        try:
            self._served, self._pool, self._lock = served_by(store, task, pool), pool, threading.RLock()
        except BaseException:
            pool.release()
            raise
        self._open, self.task, self.switch_ms = True, task, 1e3 * (time.perf_counter() - began)

    @property
    def labels(self) -> tuple[str, ...]:
        """Its classes, in the order of its logits; value n of a mask is class n.

        Raises:
            InputError: it has several heads, whose labels ``meanings`` has.
        """
        return labels_of(self._served.pack.delta)

    @property
    def meanings(self) -> tuple[Meaning, ...]:
        """What each of its heads answers."""
        return meanings_of(self._served.pack.delta)

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared for it."""
        return self._served.pack.delta.preprocess

    @property
    def sequence(self) -> int:
        """That of the pack that answers."""
        return self._served.installed.sequence

    @property
    def fell_back(self) -> str | None:
        """Why the pack that answers is not the one that is active, or None."""
        return self._served.fell_back

    @property
    def events(self) -> tuple[Event, ...]:
        """What was merged and evicted for it and those that it shares networks with."""
        return tuple(self._pool.events)

    def predict(self, images: Picture | Iterable[Picture], *, top: int = 1) -> tuple[AnyAnswer, ...]:
        """An answer to each of ``images``: files, folders, patterns, PIL images, and uint8 arrays (H, W, 3), RGB.

        Raises:
            CheckError: an answer is not finite, and no pack before it gives one.
            InputError: an image cannot be read.
        """
        with self._lock:
            return self._served.answers(pictures_of(images, clips=self.preprocess.frames > 1), top)

    def __call__(self, images: NpArray) -> NpArray:
        """Logits, float32 (n, C), of preprocessed float32 images (n, 3, H, W), or clips; of masks (n, C, h, w).

        Raises as ``predict``.
        """
        return self._served.network(images)

    def close(self) -> None:
        """Give it back; what it shares goes with the last task that does."""
        with self._lock:
            if self._open:
                self._open = False
                self._served.close()
                self._pool.release()

    def __enter__(self) -> OpenTask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OpenTasks:
    """Several tasks of a store that look at the same pictures: what they share is computed once. A context manager.

    ``shared`` are the stretches of backbones that are, ``switch_ms`` what it took to open everything.
    """

    def __init__(self, store: Store, tasks: Sequence[str], pool: Pool) -> None:
        """Open the active packs of ``tasks``; where one fails, the pack before by itself. Raises as ``Device.open``."""
        began = time.perf_counter()
        pool.hold()
        self._pool, self._lock, self._open = pool, threading.RLock(), True
        self._together, self._served, self._store = list[Together](), dict[str, Served](), store
        self._mixed: dict[str, Mixed] | None = None
        self._unmixed = dict[str, str]()
        try:
            placed = self._placed(store, tasks)
            for task in tasks:
                self._served[task] = served_by(store, task, pool, placed.get(task))
        except BaseException:
            self.close()
            raise
        self.switch_ms = 1e3 * (time.perf_counter() - began)

    @property
    def shared(self) -> tuple[Shared, ...]:
        """The stretches of backbones that are computed once for several of the tasks."""
        return tuple(each for together in self._together for each in together.shared)

    @property
    def sequence(self) -> int:
        """That of the pack that answers, of the last task."""
        return next(reversed(self._served.values())).installed.sequence

    @property
    def events(self) -> tuple[Event, ...]:
        """What was merged and evicted."""
        return tuple(self._pool.events)

    @property
    def fell_back(self) -> dict[str, str]:
        """Why a pack that answers is not the one that is active, by task."""
        return {task: served.fell_back for task, served in self._served.items() if served.fell_back is not None}

    def predict(self, images: Picture | Iterable[Picture], *, top: int = 1) -> tuple[Mapping[str, AnyAnswer], ...]:
        """What every task says of each of ``images``, by the task's name; else as ``OpenTask.predict``."""
        clips = {served.pack.delta.preprocess.frames > 1 for served in self._served.values()}
        if len(clips) != 1:
            raise InputError("tasks", "look at images and at clips", fix="ask for them one after the other")
        with self._lock:
            return tuple(self._all(image, top) for image in pictures_of(images, clips=clips.pop()))

    @property
    def unmixed(self) -> dict[str, str]:
        """Tasks that ``predict_each`` cannot ask in one call with others, and why not."""
        with self._lock:
            self._mixing()
            return dict(self._unmixed)

    def predict_each(self, images: Iterable[Picture], tasks: Sequence[str], *, top: int = 1) -> tuple[AnyAnswer, ...]:
        """What of each of ``images`` its own task says, the one at the same place in ``tasks``.

        Images of tasks on one backbone go through it in one call, at most ``IMAGES_OF_A_CALL``; those of a task in
        ``unmixed`` by themselves.

        Raises:
            CheckError: an answer is not finite, and no pack before it gives one.
            InputError: an image cannot be read or is several, or a task that is not open here.
        """
        given = list(images)
        if len(given) != len(tasks):
            raise InputError("tasks", f"needs one for each of {len(given)} images", got=len(tasks))
        with self._lock:
            unknown = [task for task in tasks if task not in self._served]
            if unknown:
                got, fix = repr(unknown[0]), f"open it with the others: {', '.join(self._served)}"
                raise InputError("tasks", "names a task that is not open here", got=got, fix=fix)
            asked = [
                (self._picture(image, task, number), task)
                for number, (image, task) in enumerate(zip(given, tasks, strict=True))
            ]
            return self._each(asked, top)

    def logits(self, images: NpArray) -> dict[str, NpArray]:
        """Logits, float32 (n, C), of every task for preprocessed float32 images (n, 3, H, W) that all of them take.

        Raises:
            CheckError: an answer of a task that shares nothing is not finite.
            InputError: another dtype or shape.
        """
        with self._lock:
            found = {name: each for together in self._together for name, each in together(images).items()}
            alone = {name: served.network(images) for name, served in self._served.items() if name not in found}
            return {name: (found | alone)[name] for name in self._served}

    def close(self) -> None:
        """Give them back; what they share with others goes with the last task that does."""
        with self._lock:
            for served in self._served.values():
                served.close()
            for together in self._together:
                together.close()
            for mixed in set((self._mixed or {}).values()):
                mixed.close()
            self._served, self._together, self._mixed = {}, [], None
            if self._open:
                self._open = False
                self._pool.release()

    def __enter__(self) -> OpenTasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all(self, image: Input, top: int) -> dict[str, AnyAnswer]:
        prepared, logits = list[tuple[Preprocess, NpArray]](), dict[str, NpArray]()
        for together in self._together:
            preprocess = self._served[together.tasks[0]].pack.delta.preprocess
            images = next((made for given, made in prepared if given == preprocess), None)
            if images is None:
                images = normalize(image.pixels(preprocess)[None], preprocess)
                prepared.append((preprocess, images))
            logits |= together(images)
        answers = dict[str, AnyAnswer]()
        for task, served in self._served.items():
            found = logits.get(task)
            whole = found is not None and served.fell_back is None and np.isfinite(found).all()
            answers[task] = (
                served.said(image.name, found[0], top) if whole and found is not None else served.answer(image, top)
            )
        return answers

    def _picture(self, image: Picture, task: str, number: int) -> Input:
        found = pictures_of(image, clips=self._served[task].pack.delta.preprocess.frames > 1)
        if len(found) > 1:
            raise InputError(f"image {number}", "must be one image, for one task", got=f"{len(found)} images")
        return found[0]

    def _each(self, asked: Sequence[tuple[Input, str]], top: int) -> tuple[AnyAnswer, ...]:
        networks, answers = self._mixing(), dict[int, AnyAnswer]()
        together = dict[int, tuple[Mixed, list[int]]]()
        for place, (_, task) in enumerate(asked):
            if task in networks and self._served[task].fell_back is None:
                together.setdefault(id(networks[task]), (networks[task], []))[1].append(place)
        for network, places in together.values():
            for start in range(0, len(places), IMAGES_OF_A_CALL):
                some = places[start : start + IMAGES_OF_A_CALL]
                tasks = [asked[place][1] for place in some]
                for place, logits in zip(some, network(self._prepared([asked[p] for p in some]), tasks), strict=True):
                    if np.isfinite(logits).all():
                        image, task = asked[place]
                        answers[place] = self._served[task].said(image.name, logits, top)
        return tuple(
            answers[place] if place in answers else self._served[task].answer(image, top)
            for place, (image, task) in enumerate(asked)
        )

    def _prepared(self, asked: Sequence[tuple[Input, str]]) -> NpArray:
        """Images as their tasks take them, (n, 3, H, W)."""
        made = list[NpArray]()
        for image, task in asked:
            preprocess = self._served[task].pack.delta.preprocess
            made.append(normalize(image.pixels(preprocess)[None], preprocess))
        return np.concatenate(made)

    def _mixing(self) -> dict[str, Mixed]:
        """The network that takes a batch of several tasks, by task; made when it is first asked for."""
        if self._mixed is None:
            self._mixed, groups = {}, dict[object, tuple[BaseGraph | Int8Graph, dict[str, Delta]]]()
            for task, served in self._served.items():
                if map_heads_of(served.pack.delta):
                    self._unmixed[task] = "its head reads maps"
                    continue
                graph = self._graph(served.pack)
                groups.setdefault((graph.folder, graph.stem), (graph, {}))[1][task] = served.pack.delta
            for graph, deltas in groups.values():
                found = mix(graph, deltas, runtime=self._pool.row, threads=self._pool.threads)
                self._unmixed |= found.unmixed
                if found.network is not None:
                    self._mixed |= dict.fromkeys(found.network.tasks, found.network)
        return self._mixed

    def _graph(self, pack: Pack) -> BaseGraph | Int8Graph:
        return self._store.int8_of(pack) if self._pool.precision == "int8" else self._pool.graph_of(pack)

    def _placed(self, store: Store, tasks: Sequence[str]) -> dict[str, tuple[str, TaskNetwork]]:
        """The networks of active packs that share something, with the sha256 of their pack."""
        place, now = place_of(self._pool.row, self._pool.precision), store.now()
        groups = dict[object, tuple[BaseGraph | Int8Graph, dict[str, tuple[Pack, Fitted]]]]()
        for task in tasks:
            installed = serving(now, task, place, str(store.root))
            with contextlib.suppress(EdgepetError):  # said when it is opened by itself
                pack = store.pack_of(task, installed)
                if map_heads_of(pack.delta):
                    continue  # what puts out maps is no trunk of features
                graph = self._graph(pack)
                key = graph.folder, graph.stem, pack.delta.preprocess
                groups.setdefault(key, (graph, {}))[1][task] = pack, self._fitted(graph, pack)
        placed, row = dict[str, tuple[str, TaskNetwork]](), self._pool.row
        for graph, members in groups.values():
            if len(members) > 1:
                fitted = {task: each for task, (_, each) in members.items()}
                own = own_slots(graph, row.name) if isinstance(graph, Int8Graph) else {}
                together = Together(part_of(graph, row.name), own, fitted, runtime=row, threads=self._pool.threads)
                self._together.append(together)
                placed |= {task: (pack.sha256, together.of(task)) for task, (pack, _) in members.items()}
        return placed

    def _fitted(self, graph: BaseGraph | Int8Graph, pack: Pack) -> Fitted:
        if isinstance(graph, Int8Graph) or self._pool.mode == "auto":
            return fit_lightly(graph, pack.delta, self._pool.row.name)
        return fit(graph, pack.delta, "merged" if self._pool.mode == "merged" else "slots")


def served_by(store: Store, task: str, pool: Pool, placed: tuple[str, TaskNetwork] | None = None) -> Served:
    """A task on the networks of ``pool``; its active pack on ``placed``, where that is of this sha256."""

    def opener(pack: Pack, asked: bool) -> TaskNetwork:
        here = placed is not None and placed[0] == pack.sha256
        network = placed[1] if placed is not None and here else pool.open(pack)
        precision: StoredPrecision = "int8" if pool.precision == "int8" else "fp32"
        return answering(store, pack, network, pool.row, precision, asked=asked)

    return Served(store, task, pool.row, pool.precision, opener)
