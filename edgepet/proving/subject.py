"""A pack, and the networks that it is compared with: tuned, merged and plain. Torch only when one is asked for."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.deltas.merge import merge, require_backbone
from edgepet.deltas.probe import condensed, told_of
from edgepet.device.answers import labels_of, meaning_of
from edgepet.device.model_heads import PlacesProbe, Probe
from edgepet.errors import InputError, require
from edgepet.files import made_cache
from edgepet.graphs.base import WEIGHTS, BaseGraph, graph_folder, open_graph
from edgepet.images.box_folders import open_boxes
from edgepet.images.boxes import BoxSet
from edgepet.images.folders import Split
from edgepet.images.labels import LabelSet, open_labels
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet
from edgepet.images.pixels import pixels_of
from edgepet.images.preprocess import normalize
from edgepet.images.sets import ImageSet, load_set, open_split
from edgepet.measuring.parity import Against, Inputs, Parity, coarser, compare
from edgepet.networks.backbone import AnyBackbone
from edgepet.packs.pack import Pack, read_pack
from edgepet.spec import FilePath, ImageSize, NpArray, Preprocess, StoredPrecision
from edgepet.tuning.work_folder import HELD_OUT, Work, read_work, work_folder

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone


def one_head(delta: Delta, place: int) -> Delta:
    """``delta`` with one of its heads that read maps alone; it was not asked for a probe so."""
    return replace(delta, heads=(delta.heads[place],), probes={})


PROBE_SEED, PROBE_IMAGES = 20221017, 4
_OPENED: dict[str, Callable[[Path, Split], MaskSet | BoxSet | LabelSet]] = {
    "mask": open_masks,
    "boxes": open_boxes,
    "labels": open_labels,
}


class Subject:
    """A pack and all that it can be compared with; torch is touched only when a comparison is asked for.

    ``data`` is a folder of labelled images to compare on, or None; ``answers`` as of ``read_pack``.
    With ``pictures`` noise is the nearest that pixels of 8 bits can be.

    Raises:
        PackError, InputError: as ``read_pack``.
    """

    def __init__(
        self, path: FilePath, backbone: AnyBackbone, data: FilePath | None, answers: Collection[str] = ("class",), *,
        pictures: bool = False,
    ) -> None:  # fmt: skip
        self.path, self._spec, self.data, self._pictures = Path(path), backbone, data, pictures
        self._place: int | None = None
        self.pack: Pack = read_pack(self.path, answers=answers)

    @property
    def delta(self) -> Delta:
        """What the pack holds, with one of its heads where it is ``of_head``."""
        return self.pack.delta if self._place is None else one_head(self.pack.delta, self._place)

    @property
    def heads(self) -> list[Subject]:
        """Itself with each of its heads alone; itself where it has one."""
        several = len(self.delta.heads) > 1
        return [self.of_head(place) for place in range(len(self.delta.heads))] if several else [self]

    def of_head(self, place: int) -> Subject:
        """The same with one of its heads alone; graph, backbone and images are those that are known already."""
        made = copy.copy(self)
        made._place = place
        for known in ("reference", "merged_reference", "probe"):
            made.__dict__.pop(known, None)
        return made

    @cached_property
    def graph(self) -> BaseGraph:
        """The graph that the pack runs on; raises as ``graph_of`` does."""
        return self.graph_of(self.delta)

    def graph_of(self, delta: Delta) -> BaseGraph:
        """The graph of a delta on the backbone of the pack, from the cache; traced where it is not there.

        Raises:
            BackboneError, InputError, MissingError: as ``backbone``, where it has to be traced.
            CheckError: ONNX Runtime answers otherwise than torch.
        """
        needs_maps = bool(delta.heads)
        with contextlib.suppress(InputError):
            graph = open_graph(delta.fingerprint, delta.preprocess, delta.structure)
            if graph.maps or not needs_maps:
                return graph
        from edgepet.exporters.trace import base_graph

        made_cache()
        return base_graph(self.backbone, delta.branches, needs_maps=needs_maps)

    @cached_property
    def backbone(self) -> Backbone:
        """The ``Backbone`` that the pack was trained on, in torch.

        Raises:
            BackboneError: the one that was given, or that goes by its name, is another.
            InputError: it cannot be built.
            MissingError: torch or timm is not installed.
        """
        delta, spec = self.delta, self._spec
        if spec is not None and not isinstance(spec, str):
            require_backbone(spec.base, delta)
            return spec
        cached = graph_folder(delta.fingerprint) / WEIGHTS
        if spec is None:
            known = delta.backbone.startswith(("demo:", "module:")) or not cached.is_file()  # else timm asks its hub
            spec = delta.backbone if known else f"{delta.backbone}@{cached}"
        backbone = _loaded(spec, delta.fingerprint, delta.preprocess.image_size, delta.preprocess.frames)
        require_backbone(backbone.base, delta)
        return backbone

    def check_backbone(self) -> None:
        """Refuse a backbone that was given and is not the pack's, before anything is written.

        Raises:
            BackboneError, InputError, MissingError: as ``backbone``.
        """
        if self._spec is not None:
            _ = self.backbone

    @cached_property
    def work(self) -> Work | None:
        """What training left beside the pack, if it is of this pack's backbone, method and head; else None.

        Raises:
            InputError: the folder is damaged.
        """
        folder = work_folder(self.path)
        if not folder.is_dir():
            return None
        work = read_work(folder)
        same = work.fingerprint == self.delta.fingerprint and work.method == self.delta.method
        return (
            work
            if same and np.array_equal(self.delta.head.weight, work.head.weight.astype(self.delta.head.weight.dtype))
            else None
        )

    @cached_property
    def images(self) -> tuple[NpArray, Inputs]:
        """What to compare on: ``data``, else the work folder's held-out images, else seeded noise.

        Float32 (n, 3, H, W), preprocessed, or clips (n, frames, 3, H, W).

        Raises:
            InputError: ``data`` has no val split, or images of it cannot be read.
        """
        preprocess = self.delta.preprocess
        if self.data is not None:
            return sample_images(Path(self.data), preprocess, self.delta.answers[0]), "data"
        if self.work is not None:
            return normalize(self.work.pixels, preprocess), "work"
        noise = synthetic_images(preprocess)
        return normalize(pixels_of(noise, preprocess), preprocess) if self._pictures else noise, "synthetic"

    @cached_property
    def reference(self) -> tuple[NpArray, Against]:
        """Logits (n, C) of the tuned network where training left it, else of the pack merged in torch.

        Raises:
            MissingError: torch is not installed.
        """
        images, _ = self.images
        if self.work is None or self.delta.heads:  # of a head that reads maps there is what was lowered alone
            return self.merged_reference, "merged"
        require("torch", extra="train", purpose="comparing with the network in torch")
        from edgepet.proving.in_torch import tuned_network
        from edgepet.tuning.model import logits_of

        return logits_of(tuned_network(self), images), "tuned"

    def judge(self, got: NpArray, *, precision: StoredPrecision = "fp32") -> Parity:
        """Logits ``got`` (n, C) of a network in ``precision``, by ``reference``.

        The tuned reference was not rounded for the pack either: the limit is then that of the coarser of both.
        """
        expected, against = self.reference
        stored = coarser(precision, self.pack.rounding) if against == "tuned" else precision
        thresholds = meaning_of(self.delta).thresholds
        return compare(expected, got, stored=stored, inputs=self.images[1], against=against, thresholds=thresholds)

    def merged(self, images: NpArray) -> NpArray:
        """Logits (n, C) of the pack as stored, merged and run by torch; of masks (n, C, h, w).

        Args:
            images: preprocessed float32 (n, 3, H, W), or clips (n, frames, 3, H, W).

        Raises:
            BackboneError, InputError: as ``backbone``.
            MissingError: torch is not installed.
        """
        require("torch", extra="train", purpose="comparing with the network in torch")
        from edgepet.tuning.dense import stored_answers

        return stored_answers(self.backbone, self.delta, images)

    @cached_property
    def dense_weights(self) -> dict[str, NpArray]:
        """The merged network's state dict under timm's names, classifier included.

        Raises:
            InputError: the pack has branches, which cannot be merged.
        """
        return self.backbone.named_weights(merge(self.backbone.base, self.delta), self.delta.head)

    @cached_property
    def merged_reference(self) -> NpArray:
        """Logits (n, C) of ``images``, of the pack as stored, merged and run by torch."""
        return self.merged(self.images[0])

    @cached_property
    def probe(self) -> Probe:
        """Seeded noise, and the merged network's float32 answers to it, as artefacts keep them."""
        return probe_of(PROBE_SEED, self.merged(self.probe_images), len(labels_of(self.delta)))

    @property
    def probe_images(self) -> NpArray:
        """The noise of ``probe``, as the model takes it."""
        blank = Probe(seed=PROBE_SEED, logits=np.zeros((PROBE_IMAGES, 1), np.float32))
        return blank.images(self.delta.preprocess, pictures=self._pictures)


def probe_of(seed: int, answers: NpArray, classes: int) -> Probe:
    """The probe of a model that answers ``answers`` to the images of ``seed``: (n, C), of masks (n, C, h, w), of boxes
    (n, m, 6) of so many ``classes``.
    """
    if answers.ndim < 4:
        return Probe(seed=seed, logits=told_of(answers, seed, classes).astype(np.float32))
    places = PlacesProbe(labels=answers.argmax(1).astype(np.uint8), largest=float(np.abs(answers).max()))
    return Probe(seed=seed, logits=condensed(answers, seed), places=places)


@lru_cache(maxsize=1)
def _loaded(spec: str, fingerprint: str, image_size: ImageSize, frames: int) -> Backbone:
    """A backbone, kept for the next task on it: fifty tasks must not load fifty backbones."""
    from edgepet.networks.loading import load_backbone

    backbone = load_backbone(spec, image_size=image_size, frames=frames)
    if backbone.fingerprint == fingerprint:
        return backbone
    # As packs of before ADR-0020 and ADR-0021 are bound to it: with branches, at the architecture's size, or both.
    branches = (False, True) if backbone.fused else (False,)
    sizes = (True, False) if "@" in spec else (True,)
    for keep_branches, checkpoint_size in itertools.islice(itertools.product(branches, sizes), 1, None):
        try:
            older = load_backbone(spec, image_size=image_size, frames=frames, keep_branches=keep_branches,
                                  checkpoint_size=checkpoint_size)  # fmt: skip
        except InputError:  # it never was so
            continue
        if older.fingerprint == fingerprint:
            return older
    return backbone


def sample_images(folder: Path, preprocess: Preprocess, answer: str = "class") -> NpArray:
    """Preprocessed images (n, 3, H, W) out of the val split of ``folder``, at most 32, spread over its classes.

    ``answer`` says of what it is a folder: of classes, or of images with a "mask", "boxes" or "labels".

    Raises:
        InputError: ``folder`` has no val split, or images of it cannot be read.
    """
    if answer == "class":
        val = open_split(folder, "val", clips=preprocess.frames > 1)
    else:
        val = _OPENED[answer](folder, "val").images
    return normalize(load_set(_sample(val), preprocess)[0], preprocess)


def synthetic_images(preprocess: Preprocess, count: int = 8) -> NpArray:
    """Seeded noise as preprocessed float32 images (count, 3, H, W): compared on where nothing better is there."""
    return np.random.default_rng(0).standard_normal((count, *preprocess.input_shape), dtype=np.float32)


def _sample(images: ImageSet, count: int = HELD_OUT) -> ImageSet:
    """``count`` images spread evenly over a set that comes class by class."""
    index = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))
    return images.at(index.tolist())
