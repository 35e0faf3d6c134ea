"""A timm architecture, its weights and its preprocessing. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from edgepet.canonical import backbone_fingerprint
from edgepet.deltas.delta import Head
from edgepet.errors import InputError, option, require
from edgepet.networks.classifier import Classifier, find_linear, headed, spelled, without_classifier
from edgepet.networks.forms import inference_form_for, over_frames, without_branches
from edgepet.samples.weights import WEIGHTS, sample_weights
from edgepet.spec import Base, NpArray, Preprocess, Site, Tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepet.networks.sites import Seen

# As people name one: a written form, or in Python an ``edgepet.Backbone``; None where a pack's own can be found again
AnyBackbone: TypeAlias = "str | Backbone | None"
_Config: TypeAlias = Mapping[str, Any]  # timm's own, of a network

OWN = "module:"  # what the label of a user's own network starts with
SUMMED = "whose branches for training are summed into one kernel each (timm's reparameterize_model)"
MOST_SIDE = 8192  # pixels: beyond it a table of positions alone fills the memory
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A network without its classifier, at one image size, in eval mode.

    ``native`` holds the state dict at the architecture's own image size: that is what a fingerprint covers and what a
    device stores. ``module`` puts out pooled features (n, ``width``); its position table may be resampled.
    ``create_args`` are what ``timm.create_model`` needs besides the name and ``num_classes``; ``classifiers`` are the
    layers that timm then adds, two where a network was distilled. Where timm's network has branches that only its
    training needs, ``fused`` says that they are summed: ``native`` and ``module`` are of timm's inference form.

    ``width``, ``layers`` and ``unread`` run the network once, when the first of them is asked for.

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
            preprocess: how an image becomes the input; its ``image_size`` is the one of training and export.

        Raises:
            InputError: ``module`` does not take such images, does not put out one row of features for each, or writes
                into its own tensors.
            MissingError: torch is not installed.
        """
        require("torch", extra="train", purpose=name)
        own = over_frames(copy.deepcopy(module).eval().requires_grad_(False), preprocess.frames)
        backbone = cls(
            spec=f"{OWN}{name}",
            name=name,
            native={key: tensor.detach().numpy() for key, tensor in own.state_dict().items()},
            module=own,
            preprocess=preprocess,
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
    def _seen(self) -> Seen:
        import torch

        from edgepet.networks.sites import watch

        height, width = self.preprocess.image_size
        try:
            seen = watch(self.module, torch.zeros(2, *self.preprocess.input_shape))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # whatever a network says of a size
            what = f"cannot take images of {height} x {width} pixels"
            raise InputError(self.label, what, got=_first_line(error), fix="use another image size") from error
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


def load_backbone(
    spec: str, *, image_size: int | None = None, frames: int = 1, keep_branches: bool = False
) -> Backbone:
    """Build a backbone from its written form: a timm name, ``NAME@FILE`` or ``demo:NAME``.

    Args:
        spec: a plain timm name takes the weights from timm's own hub, which needs the network.
        image_size: side in pixels; None is the architecture's own. Position embeddings are resampled as timm does.
        frames: above 1, take clips (n, frames, 3, H, W): features are the mean over a clip's frames.
        keep_branches: leave those that only training needs, as MobileOne's, where weights have them, for older packs.

    Raises:
        CheckError: the network answers otherwise when its branches are summed.
        InputError: no such architecture or file, weights that cannot be had or do not fit it, a size it cannot take, or
            a crop or an interpolation that ``Preprocess`` does not know.
        MissingError: torch, timm or a demo package is not installed.
    """
    require("torch", extra="train", purpose=spec)
    timm = require("timm", extra="train", purpose=spec)
    if image_size is not None and not 1 <= image_size <= MOST_SIDE:
        what = "must be at least 1" if image_size < 1 else f"must be at most {MOST_SIDE}"
        raise InputError(option("image_size"), what, got=image_size)
    if frames < 1:
        raise InputError(option("frames"), "must be at least 1", got=frames)
    if spec.startswith(OWN):
        fix = "in Python pass backbone=Backbone.from_module(...)"
        raise InputError(spec, "is a module of its user's own and cannot be built from its name", fix=fix)
    name, file = _parse(spec)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        told = f"for example {', '.join(close)}" if close else None
        raise InputError(spec, "is no timm architecture", got=repr(name), fix=told)
    with _quiet():
        native, fused = _native_module(timm, name, file, spec, keep_branches=keep_branches)
    config = cast(_Config, native.pretrained_cfg)
    own = timm.data.resolve_data_config({}, model=native)
    size = image_size or int(own["input_size"][-1])
    state = native.state_dict()
    module, create_args = native, dict[str, object]()
    dynamic = bool(getattr(native, "dynamic_img_size", False))  # would resample its table in every forward pass
    if config.get("fixed_input_size") or dynamic:
        create_args = {"img_size": size, **({"dynamic_img_size": False} if dynamic else {})}
        if dynamic or size != own["input_size"][-1]:
            _check_size(native, size, spec)
            module = headed(name, 0, create_args, fused=fused)
            _load(module, dict(state), spec, fused=fused)
    module.eval().requires_grad_(False)
    sample = WEIGHTS.get(spec.removeprefix("demo:")) if spec.startswith("demo:") else None
    return Backbone(
        spec=spec,
        name=name,
        native={key: tensor.detach().numpy() for key, tensor in state.items()},
        module=over_frames(module, frames),
        preprocess=replace(_preprocess(own, size, spec), frames=frames),
        create_args=create_args,
        classifiers=_classifiers(config),
        description=sample.description if sample else f"timm {name}{', ' + SUMMED if fused else ''}",
        licence=sample.licence if sample else str(config.get("license") or "see the weights' publisher"),
        fused=fused,
    )


def _parse(spec: str) -> tuple[str, Path | None]:
    if spec.startswith("demo:"):
        file = sample_weights(spec.removeprefix("demo:"))
        return WEIGHTS[spec.removeprefix("demo:")].architecture, file
    name, at, path = spec.partition("@")
    if not at:
        return name, None
    file = Path(path).expanduser()
    if file.suffix not in WEIGHT_SUFFIXES:
        raise InputError(spec, f"needs a weights file ending in {', '.join(WEIGHT_SUFFIXES)}", got=repr(file.name))
    if not file.is_file():
        raise InputError(str(file), "is no file")
    return name, file


def _native_module(
    timm: ModuleType, name: str, file: Path | None, spec: str, *, keep_branches: bool
) -> tuple[nn.Module, bool]:
    """timm's network with its weights, and whether it is its inference form."""
    if file is None:
        try:
            module = cast("nn.Module", timm.create_model(name, pretrained=True, num_classes=0))
        except Exception as error:  # a hub, an HTTP client and a file system: their errors share no base
            raise InputError(
                spec,
                "could not get its weights from timm's hub",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=f"connect to the network, or pass {option('backbone', f'{name}@FILE')} with weights you have",
            ) from error
    else:
        module = timm.create_model(name, pretrained=False, num_classes=0)
        state = _read_weights(timm, file)
        if (fused := inference_form_for(state, module)) is not None:
            _load(fused, state, str(file), fused=True)
            return fused, True
        _load(module, state, str(file))
    summed = None if keep_branches else without_branches(module, spec)
    return summed or module, summed is not None


def _read_weights(timm: ModuleType, file: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError

    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(str(file), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(str(file), "is not a readable weights file", got=str(error).splitlines()[0]) from error
    return state


def _load(module: nn.Module, state: dict[str, Tensor], where: str, *, fused: bool = False) -> None:
    """Load ``state`` the way timm prepares it for ``module``, and accept nothing missing and nothing left over."""
    prepare = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if prepare is not None and not fused:  # it would take an inference form for the weights of the authors
        state = prepare(state, module)
    state = without_classifier(state, module, _classifiers(cast(_Config, module.pretrained_cfg)), fused=fused)
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(where, f"does not fit {type(module).__name__}", got=first) from error
    if result.missing_keys or result.unexpected_keys:
        missing, unknown = result.missing_keys, result.unexpected_keys
        got = f"{len(missing)} missing ({_few(missing)}), {len(unknown)} unknown ({_few(unknown)})"
        raise InputError(where, f"does not hold exactly the tensors of {type(module).__name__}", got=got)


def _classifiers(config: _Config) -> tuple[str, ...]:
    named = config.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _check_size(module: nn.Module, size: int, spec: str) -> None:
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if patch is not None and (size % patch[0] or size % patch[1] or size < max(patch)):
        low = max(size // patch[0], 1) * patch[0]
        raise InputError(
            option("image_size"),
            f"{spec} cuts images into patches of {patch[0]} pixels",
            got=size,
            fix=f"use {low} or {low + patch[0]}",
        )


def _preprocess(config: _Config, size: int, spec: str) -> Preprocess:
    if config["crop_mode"] not in ("center", "squash"):
        raise InputError(spec, "needs a crop mode that is center or squash", got=config["crop_mode"])
    kind = config["interpolation"]
    if kind not in ("bicubic", "bilinear"):
        raise InputError(spec, "needs an interpolation that is bicubic or bilinear", got=repr(kind))
    return replace(
        Preprocess(image_size=(size, size)),
        interpolation=cast(Literal["bicubic", "bilinear"], kind),
        crop_fraction=float(config["crop_pct"]),
        crop=config["crop_mode"],
        mean=cast(tuple[float, float, float], tuple(map(float, config["mean"]))),
        std=cast(tuple[float, float, float], tuple(map(float, config["std"]))),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """timm logs what it loads; edgepet says it in its own words."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
