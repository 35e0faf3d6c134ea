"""The self-test that a pack takes along: asked once where it is made, and again wherever it is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from edgepet.calibration.budget import Answers, answers
from edgepet.deltas.delta import Delta
from edgepet.deltas.joined import told_apart
from edgepet.deltas.probe import Probe, probe_images, told_of
from edgepet.device.answers import labels_of, meanings_of
from edgepet.device.map_heads import map_heads_of
from edgepet.device.runtime import SharedInt8
from edgepet.graphs.head_graph import answer_names
from edgepet.graphs.int8 import Int8Graph
from edgepet.networks.backbone import Backbone
from edgepet.proving.precision import Expressed
from edgepet.spec import NpArray

SEEDS = range(20221017, 20221017 + 8)  # of the images: the first for fp32, any for int8
EXACT = 1e-4  # of the largest logit, in fp32: as measuring.parity.STORED has it
APART, LEAST = 4.0, 0.01  # times what int8 runtimes differed by; of the largest logit


def probed(backbone: Backbone, delta: Delta) -> Delta:
    """``delta`` with what its network answers in torch, folded as it is stored and run in float32.

    What it was asked in int8 before is dropped: those answers are of other numbers.
    """
    from edgepet.tuning.dense import stored_answers

    images, largest, told = probe_images(SEEDS[0], delta.preprocess), 1e-3, list[NpArray]()
    for each in [replace(delta, heads=(head,), probes={}) for head in delta.heads] or [delta]:
        logits = stored_answers(backbone, each, images)
        told.append(told_of(logits, SEEDS[0], len(labels_of(each))))
        if logits.ndim == 3:  # boxes: their corners are pixels, and are no measure of what is told of them
            logits = np.maximum(told[-1], 1.0)
        largest = max(largest, float(np.abs(logits).max()))
    return replace(delta, probes={"fp32": Probe(SEEDS[0], np.concatenate(told, axis=1), EXACT * largest)})


def probed_int8(expressed: Expressed, graph: Int8Graph, runtimes: Iterable[str]) -> Delta:
    """The task with what the Q/DQ graph of its codes answers as well, for each of ``runtimes`` to answer on the device.

    Codes are rounded apart where a number lies between two of them, and a network may amplify that. So of eight seeds
    the one is taken on whose images all of them agree best, and four times what they differ by is allowed.

    Raises:
        InputError: the file of codes is not what it was.
    """
    delta = expressed.delta
    names, classes = answer_names(map_heads_of(delta)), [len(meaning.labels) for meaning in meanings_of(delta)]
    with contextlib.ExitStack() as opened:
        networks: list[Callable[[NpArray], Answers]] = [partial(answers, expressed.model, outputs=names)]
        for runtime in runtimes:
            shared = SharedInt8(graph, runtime=runtime)
            opened.callback(shared.close)
            networks.append(shared.bind(delta).each)
        tried = []
        for seed in SEEDS:
            images = probe_images(seed, delta.preprocess)
            given = [network(images) for network in networks]
            first, *others = (told_apart(each, seed, classes) for each in given)
            # Corners of boxes are pixels, and are no measure of what is told of them.
            measured = [np.abs(told_of(each, seed, 1) if each.ndim == 3 else each).max() for each in given[0]]
            largest = float(max(measured))
            apart = max((float(np.abs(logits - first).max()) for logits in others), default=0.0)
            tried.append((apart / largest, seed, first, apart, largest))
    _, seed, logits, apart, largest = min(tried, key=lambda each: each[:2])
    tolerance = max(APART * apart, LEAST * largest)
    return replace(delta, probes={**delta.probes, "int8": Probe(seed, logits, tolerance)})
