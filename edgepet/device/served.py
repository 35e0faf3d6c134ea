"""A task at one place, open: its active pack, which has answered its own probe here, or the one before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from edgepet.device.answers import (
    Answer,
    BoxesAnswer,
    LabelsAnswer,
    MaskAnswer,
    SeveralAnswers,
    all_answered,
    classified,
    meanings_of,
)
from edgepet.device.generations import Installed, serving
from edgepet.device.map_heads import map_heads_of
from edgepet.device.runtime import SharedInt8, TaskNetwork, open_task, require_probe
from edgepet.device.runtimes import Runtime, shared_runtime
from edgepet.device.store import Store
from edgepet.errors import CheckError, EdgepetError, InputError, MissingError, option
from edgepet.graphs.slots import task_ranges
from edgepet.images.inputs import Input
from edgepet.images.preprocess import normalize
from edgepet.packs.pack import Pack
from edgepet.spec import NpArray, StoredPrecision

_MOST_SAID = 200  # characters of why a pack is not served, in the store
_asked = set[tuple[str, str, str]]()  # store, pack and place that this process has asked for the pack's probe
AnyAnswer: TypeAlias = "Answer | MaskAnswer | BoxesAnswer | LabelsAnswer | SeveralAnswers"
Opener = Callable[[Pack, bool], TaskNetwork]  # the second: ask it for its probe, whatever was asked before


class Served:
    """A task at one place, open: its active pack, or the one before where that fails. A context manager."""

    def __init__(self, store: Store, task: str, runtime: str | Runtime, precision: str, opener: Opener) -> None:
        shared_runtime(runtime, purpose="a pack on a shared backbone")
        if precision not in ("fp32", "int8"):
            raise InputError(option("precision"), "is fp32 or int8 for a pack", got=repr(precision))
        self._store, self._task, self._place, self._opener = store, task, place_of(runtime, precision), opener
        self.fell_back: str | None = None
        now = store.now()
        self.installed = serving(now, task, self._place, str(store.root))
        if self.installed is not now.tasks[task].active:
            self.fell_back = now.tasks[task].active.refused[self._place]
        try:
            self.pack, self.network = self._opened(self.installed, asked=False)
        except MissingError:
            raise
        except EdgepetError as error:
            self._fall_back(error)

    def answers(self, images: Sequence[Input], top: int = 1) -> tuple[AnyAnswer, ...]:
        """Of all of them by one pack: from the beginning, where it is replaced on the way."""
        found = list[AnyAnswer]()
        for image in images:
            before = self.installed
            found.append(self.answer(image, top))
            if self.installed is not before:
                return self.answers(images, top)
        return tuple(found)

    def answer(self, image: Input, top: int = 1) -> AnyAnswer:
        """Of an image; the pack before gives it where it is the network that fails, not the image."""
        preprocess = self.pack.delta.preprocess
        pixels = image.pixels(preprocess)
        try:
            return self._answer(image, pixels, top)
        except EdgepetError as error:
            self.network.close()
            self._fall_back(error)
        if self.pack.delta.preprocess != preprocess:
            pixels = image.pixels(self.pack.delta.preprocess)
        return self._answer(image, pixels, top)

    def said(self, image: str, logits: NpArray, top: int = 1) -> Answer:
        """Its answer in words, of one image's logits (C,)."""
        return classified(image, self._task, self.pack.delta.labels, logits, top)

    def _answer(self, image: Input, pixels: NpArray, top: int) -> AnyAnswer:
        delta = self.pack.delta
        given = [each[0] for each in self.network.each(normalize(pixels[None], delta.preprocess))]
        if not map_heads_of(delta):
            return self.said(image.name, given[0], top)
        size = image.upright_size(delta.preprocess)
        return all_answered(image.name, delta.task, meanings_of(delta), given, delta.preprocess, size)

    def close(self) -> None:
        """Give the network back."""
        self.network.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _opened(self, installed: Installed, *, asked: bool) -> tuple[Pack, TaskNetwork]:
        pack = self._store.pack_of(self._task, installed)
        return pack, self._opener(pack, asked)

    def _fall_back(self, error: EdgepetError) -> None:
        """Open another pack of the task in place of the one that failed; where none can, the fault is not the pack's.

        A pack whose answers are wrong is served here no more in either case.
        """
        failed, now = self.installed, self._store.now()
        state = now.tasks.get(self._task)
        for other in () if state is None else (state.active, state.previous):
            if other is None or other.sha256 == failed.sha256 or self._place in other.refused:
                continue
            if now.requires_signature and other.signed_by is None:
                continue
            with contextlib.suppress(EdgepetError):
                self.pack, self.network = self._opened(other, asked=True)
                self.installed, self.fell_back = other, said(error)
                self._remember(failed, error)
                return
        if isinstance(error, CheckError):
            self._remember(failed, error)
        raise error

    def _remember(self, failed: Installed, error: EdgepetError) -> None:
        with contextlib.suppress(EdgepetError):  # a store that cannot be written: each process finds out again
            self._store.refuse(self._task, failed.sha256, self._place, said(error))


def place_of(runtime: str | Runtime, precision: str) -> str:
    """Where a pack is served or not, as stores write it: ``openvino int8``, or ``openvino gpu int8``."""
    return f"{runtime if isinstance(runtime, str) else runtime.place} {precision}"


def open_pack(
    store: Store, pack: Pack, *, runtime: str, threads: int | None = None, precision: str = "fp32",
    asked: bool = False,
) -> TaskNetwork:  # fmt: skip
    """A pack on the backbone of ``store`` in "fp32" or "int8", which has answered its own probe in this process.

    Args:
        asked: ask it again.

    Raises:
        CheckError: it answers otherwise than the pack says.
        InputError: another precision, or a backbone that is not in ``store``; else as ``open_task`` and ``SharedInt8``.
        MissingError: the runtime is not installed.
    """
    if precision == "int8":
        graph = store.int8_of(pack)
        task_ranges(graph, pack.delta)
        place = store.deriving(graph.weights_bytes)
        network = SharedInt8(graph, runtime=runtime, threads=threads, store=place).bind(pack.delta, alone=True)
    elif precision == "fp32":
        network = open_task(store.graph_of(pack), pack.delta, runtime=runtime, threads=threads)
    else:
        raise InputError(option("precision"), "is fp32 or int8 for a pack", got=repr(precision))
    return answering(store, pack, network, runtime, "int8" if precision == "int8" else "fp32", asked=asked)


def answering(
    store: Store,
    pack: Pack,
    network: TaskNetwork,
    runtime: str | Runtime,
    precision: StoredPrecision,
    *,
    asked: bool = False,
) -> TaskNetwork:
    """``network``, once it has answered the pack's probe; it is closed where it has not."""
    key = str(store.root.absolute()), pack.sha256, place_of(runtime, precision)
    try:
        if asked or key not in _asked:
            require_probe(network, pack.delta, precision)
            if precision not in pack.delta.probes:  # then that it answers at all
                network(np.zeros((1, *pack.delta.preprocess.input_shape), np.float32))
            _asked.add(key)
    except BaseException:
        network.close()
        raise
    return network


def said(error: EdgepetError) -> str:
    """Why, in a line that a store keeps."""
    got = "" if error.got is None else f", got {error.got}"
    return f"{error.what}{got}"[:_MOST_SAID]
