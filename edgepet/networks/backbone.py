"""A network without its classifier, its weights and its preprocessing. Needs the ``train`` extra."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgepet.canonical import backbone_fingerprint
from edgepet.deltas.delta import Head
from edgepet.errors import InputError, first_line, require
from edgepet.networks.classifier import Classifier, find_linear, headed, spelled
from edgepet.networks.forms import over_frames
from edgepet.networks.sizes import REFUSALS
from edgepet.networks.weights_file import require_finite
from edgepet.spec import Base, NpArray, Preprocess, Site, Tensors

if TYPE_CHECKING:
    from torch import nn

    from edgepet.deltas.heads import Map
    from edgepet.networks.sites import Seen

# As people name one: a written form, or in Python an ``edgepet.Backbone``; None where a pack's own can be found again
AnyBackbone: TypeAlias = "str | Backbone | None"

OWN = "module:"  # what the label of a user's own network starts with


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A network without its classifier, at one image size, in eval mode.

    ``native`` holds the state dict at the architecture's own image size: that is what a fingerprint covers and what a
    device stores. ``module`` puts out pooled features (n, ``width``); its position table may be resampled.
    ``create_args`` are what ``timm.create_model`` needs besides the name and ``num_classes``; ``classifiers`` are the
    layers that timm then adds, two where a network was distilled. Where timm's network has branches that only its
    training needs, ``fused`` says that they are summed: ``native`` and ``module`` are of timm's inference form.

    ``width``, ``layers`` and ``unread`` run the network once, when the first of them is asked for; ``maps`` does too.

    Raises:
        InputError: one of these is asked for, and the network does not take two images of this size, puts out no
            features (n, d), or writes into its own tensors.
    """

    spec: str
    name: str
    native: Tensors
    module: nn.Module
    preprocess: Preprocess
    create_args: dict[str, object]
    classifiers: tuple[str, ...]
    description: str
    licence: str
    fused: bool = False

    @classmethod
    def from_module(
        cls, module: nn.Module, *, name: str, preprocess: Preprocess, description: str = "", licence: str = ""
    ) -> Backbone:
        """A network of your own that takes images (n, 3, H, W) and puts out features (n, d).

        Where ``preprocess`` has frames it is given those of clips as images, and their features are averaged.

        Args:
            module: copied, so that nothing of yours is touched; its tensors must all be in its state dict.
            name: letters, digits, '.', '_' and '-'; packs say ``module:NAME``, and later verbs need this object again.
            preprocess: how an image becomes the input at training and export; "exif" where it says no ``orientation``.

        Raises:
            InputError: ``module`` does not take such images, does not put out one row of features for each, or writes
                into its own tensors.
            MissingError: torch is not installed.
        """
        require("torch", extra="train", purpose=name)
        require_finite(module, name)
        own = over_frames(copy.deepcopy(module).eval().requires_grad_(False), preprocess.frames)
        backbone = cls(
            spec=f"{OWN}{name}",
            name=name,
            native={key: tensor.detach().numpy() for key, tensor in own.state_dict().items()},
            module=own,
            preprocess=replace(preprocess, orientation=preprocess.orientation or "exif"),
            create_args={},
            classifiers=(),
            description=description or f"{type(module).__name__}, a module of its user's own",
            licence=licence or "see the weights' publisher",
        )
        _ = backbone.width
        return backbone

    @property
    def label(self) -> str:
        """``spec`` without a local path: what packs and artefacts may carry."""
        return self.spec.partition("@")[0]

    @cached_property
    def fingerprint(self) -> str:
        """``sha256:`` and the digest of ``native``: what a delta is bound to."""
        return backbone_fingerprint(self.native)

    @cached_property
    def tensors(self) -> dict[str, NpArray]:
        """The state dict of ``module``: parameters and buffers, by name, as views of their memory."""
        return {name: tensor.detach().numpy() for name, tensor in self.module.state_dict().items()}

    @property
    def base(self) -> Base:
        """The tensors as merging needs them: those of ``module``, under the fingerprint of ``native``."""
        return Base(name=self.label, fingerprint=self.fingerprint, tensors=self.tensors)

    @property
    def width(self) -> int:
        """Features behind the pooling, per image."""
        return int(self._seen.output.shape[1])

    @cached_property
    def layers(self) -> tuple[Site, ...]:
        """Every layer, block and bare parameter that a method can act on, in the order in which they run."""
        from edgepet.networks.sites import parameters

        return (*self._seen.sites, *self._seen.blocks, *parameters(self.module, self.unread))

    @property
    def unread(self) -> frozenset[str]:
        """Names of tensors that the network does not compute with: no method tunes them, and no graph needs them."""
        return self._seen.unread

    @cached_property
    def maps(self) -> tuple[Map, ...]:
        """The maps that it puts out at this image size, finest first, for heads that read them.

        Raises:
            InputError: it puts out none that can be read, or takes clips.
        """
        from edgepet.networks.maps import find_maps

        return find_maps(self.module, self.preprocess.input_shape, self.label)

    @cached_property
    def _seen(self) -> Seen:
        import torch

        from edgepet.networks.sites import watch

        height, width = self.preprocess.image_size
        try:
            seen = watch(self.module, torch.zeros(2, *self.preprocess.input_shape))
        except REFUSALS as error:
            what = f"cannot take images of {height} x {width} pixels"
            raise InputError(self.label, what, got=first_line(error), fix="use another image size") from error
        shape = tuple(getattr(seen.output, "shape", ()))
        if len(shape) != 2 or shape[0] != 2:
            got = shape or type(seen.output).__name__
            raise InputError(self.label, "must put out features (n, d) for images (n, 3, H, W)", got=got)
        for name, operator in seen.written.items():  # the fingerprint is of other values, and tracing it crashes torch
            fix = "do it once, before the network is handed over"
            raise InputError(self.label, "must not write into its own tensors", got=f"{operator} on {name}", fix=fix)
        return seen

    def with_head(self, head: Head) -> nn.Module:
        """A network that knows nothing of edgepet: timm's own, or a linear layer behind a copy of yours.

        It puts out logits (n, C) once ``named_weights`` are loaded; of ``head`` (C, d) only the shape counts. timm's
        network is in its inference form where it is ``fused``; it too has a linear layer behind it where its own
        classifier computes something else.
        """
        import torch

        classes, width = head.weight.shape
        if self._classifier is not None:
            made = headed(self.name, classes, self.head_args, fused=self.fused)
            return over_frames(made, self.preprocess.frames)  # the mean of logits is the logits of the mean
        body = copy.deepcopy(self.module)
        return torch.nn.Sequential(OrderedDict(backbone=body, head=torch.nn.Linear(width, classes))).eval()

    @cached_property
    def _classifier(self) -> Classifier | None:
        """What timm puts behind the network, where it can compute what a linear layer does."""
        if self.spec.startswith(OWN):
            return None
        return find_linear(self.name, self.module, self.create_args, width=self.width, fused=self.fused)

    @property
    def classifier_layers(self) -> tuple[str, ...]:
        """The layers of ``with_head``'s network that put out logits, where it is timm's."""
        return self.classifiers if self._classifier is None else self._classifier.layers

    @property
    def classifier_norms(self) -> tuple[str, ...]:
        """Batch norms in front of these layers."""
        return () if self._classifier is None else self._classifier.norms

    @property
    def head_args(self) -> dict[str, object]:
        """``create_args`` of the network with a classifier, which makes an MLP there a linear layer."""
        return self.create_args if self._classifier is None else dict(self._classifier.arguments)

    def spelled_with_head(self, classes: int) -> str:
        """Python that makes ``with_head``'s network, for people to read."""
        bare = self._classifier is None
        made = spelled(self.name, 0 if bare else classes, self.head_args, fused=self.fused)
        body = "yours" if self.spec.startswith(OWN) else made
        return f"Sequential(OrderedDict(backbone={body}, head=Linear({self.width}, {classes})))" if bare else made

    def named_weights(self, merged: Tensors, head: Head) -> dict[str, NpArray]:
        """Dense weights under the names of ``with_head``'s network, as ``load_state_dict`` takes them strictly.

        Those of ``merged`` are its very arrays; the classifier's are float32. A batch norm in front of timm's
        classifier is made to change nothing.
        """
        if self._classifier is not None:
            return {**merged, **self._classifier.tensors(head)}
        values = {"head.weight": head.weight, "head.bias": head.bias}
        own = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
        return {f"backbone.{name}": tensor for name, tensor in merged.items()} | own

    @property
    def native_bytes(self) -> int:
        """Bytes of the tensors of ``native``."""
        return sum(int(tensor.nbytes) for tensor in self.native.values())
