"""A timm architecture, its weights and its preprocessing. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import copy
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
from edgepet.networks.sizes import (
    REFUSALS,
    Sides,
    at_size,
    first_line,
    native_module,
    own_sides,
    quiet,
    require_patches,
    sides_of,
)
from edgepet.samples.weights import WEIGHTS, sample_weights
from edgepet.spec import Base, ImageSize, NpArray, Preprocess, Site, Tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepet.networks.sites import Seen

# As people name one: a written form, or in Python an ``edgepet.Backbone``; None where a pack's own can be found again
AnyBackbone: TypeAlias = "str | Backbone | None"
_Config: TypeAlias = Mapping[str, Any]  # timm's own, of a network

OWN = "module:"  # what the label of a user's own network starts with
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A network without its classifier, at one image size, in eval mode.

    ``native`` holds the state dict at the architecture's own image size: that is what a fingerprint covers and what a
    device stores. ``module`` puts out pooled features (n, ``width``); its position table may be resampled.
    ``create_args`` are what ``timm.create_model`` needs besides the name and ``num_classes``; ``classifiers`` are the
    layers that timm then adds, two where a network was distilled.

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
        own = _over_frames(copy.deepcopy(module).eval().requires_grad_(False), preprocess.frames)
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
        """A network that knows nothing of edgepet: timm's own, or a copy of yours with a linear layer behind it.

        It puts out logits (n, C) once ``named_weights`` are loaded; of ``head`` (C, d) only the shape counts.

        Raises:
            MissingError: timm is not installed.
        """
        import torch

        timm = require("timm", extra="train", purpose="merge")
        classes, width = head.weight.shape
        if not self.spec.startswith(OWN):
            made = cast("nn.Module", timm.create_model(self.name, num_classes=classes, **self.create_args)).eval()
            return _over_frames(made, self.preprocess.frames)  # the mean of logits is the logits of the mean
        body = copy.deepcopy(self.module)
        return torch.nn.Sequential(OrderedDict(backbone=body, head=torch.nn.Linear(width, classes))).eval()

    def spelled_with_head(self, classes: int) -> str:
        """Python that makes ``with_head``'s network, for people to read."""
        if self.spec.startswith(OWN):
            return f"Sequential(OrderedDict(backbone=yours, head=Linear({self.width}, {classes})))"
        arguments = "".join(f", {key}={value!r}" for key, value in self.create_args.items())
        return f'timm.create_model("{self.name}", num_classes={classes}{arguments})'

    def named_weights(self, merged: Tensors, head: Head) -> dict[str, NpArray]:
        """Dense weights under the names of ``with_head``'s network, as ``load_state_dict`` takes them strictly.

        Those of ``merged`` are its very arrays; the classifier's are float32.

        Raises:
            MissingError: timm is not installed.
        """
        own = self.spec.startswith(OWN)
        weights = {f"backbone.{name}" if own else name: tensor for name, tensor in merged.items()}
        import torch

        with torch.device("meta"):
            like = self.with_head(head).state_dict()
        for layer in ("head",) if own else self.classifiers:
            for kind, value in (("weight", head.weight), ("bias", head.bias)):
                shape = tuple(like[f"{layer}.{kind}"].shape)  # a classifier may be a convolution of one tap
                weights[f"{layer}.{kind}"] = np.ascontiguousarray(value, np.float32).reshape(shape)
        return weights

    @property
    def native_bytes(self) -> int:
        """Bytes of the tensors of ``native``."""
        return sum(int(tensor.nbytes) for tensor in self.native.values())


def load_backbone(
    spec: str, *, image_size: ImageSize | None = None, frames: int = 1, checkpoint_size: bool = True
) -> Backbone:
    """Build a backbone from its written form: a timm name, ``NAME@FILE`` or ``demo:NAME``.

    Args:
        spec: a plain timm name takes the weights from timm's own hub, which needs the network.
        image_size: the side of a square in pixels, or height and width; None is the one that the weights are for.
            Position tables are resampled as timm does.
        frames: above 1, take clips (n, frames, 3, H, W): features are the mean over a clip's frames.
        checkpoint_size: false reads a file's tables at the architecture's own size, whatever size they are for: what
            packs of before ADR-0021 are bound to.

    Raises:
        InputError: no such architecture or file, weights that cannot be had or do not fit it, a size it cannot take, or
            a crop or an interpolation that ``Preprocess`` does not know.
        MissingError: torch, timm or a demo package is not installed.
    """
    require("torch", extra="train", purpose=spec)
    timm = require("timm", extra="train", purpose=spec)
    asked = sides_of(image_size)
    if frames < 1:
        raise InputError(option("frames"), "must be at least 1", got=frames)
    if spec.startswith(OWN):
        fix = "in Python pass backbone=Backbone.from_module(...)"
        raise InputError(spec, "is a module of its user's own and cannot be built from its name", fix=fix)
    name, file = _parse(spec)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        known = f"for example {', '.join(close)}" if close else None
        raise InputError(spec, "is no timm architecture", got=repr(name), fix=known)
    with quiet():
        native, held = _native_module(timm, name, file, spec, asked, checkpoint_size)
    config = cast(_Config, native.pretrained_cfg)
    own = timm.data.resolve_data_config({}, model=native)
    size = asked or held
    state = native.state_dict()
    if size != held:
        require_patches(native, size, spec)
    with quiet():
        module, create_args = at_size(timm, name, native, held, size, lambda made: _load(made, dict(state), spec))
    module.eval().requires_grad_(False)
    sample = WEIGHTS.get(spec.removeprefix("demo:")) if spec.startswith("demo:") else None
    return Backbone(
        spec=spec,
        name=name,
        native={key: tensor.detach().numpy() for key, tensor in state.items()},
        module=_over_frames(module, frames),
        preprocess=replace(_preprocess(own, size, spec), frames=frames),
        create_args=create_args,
        classifiers=_classifiers(config),
        description=sample.description if sample else f"timm {name}",
        licence=sample.licence if sample else str(config.get("license") or "see the weights' publisher"),
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
    timm: ModuleType, name: str, file: Path | None, spec: str, asked: Sides | None, checkpoint_size: bool
) -> tuple[nn.Module, Sides]:
    """The network with its weights as they are, and the image size that they are for."""
    if file is None:
        try:
            published: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # a hub, an HTTP client and a file system: their errors share no base
            raise InputError(
                spec,
                "could not get its weights from timm's hub",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=f"connect to the network, or pass {option('backbone', f'{name}@FILE')} with weights you have",
            ) from error
        return published, own_sides(timm, published)
    state = _read_weights(timm, file)
    module, held = native_module(timm, name, state if checkpoint_size else {}, asked)
    _load(module, state, str(file))
    return module, held


def _read_weights(timm: ModuleType, file: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError

    try:
        state: dict[str, Tensor] = timm.models.load_state_dict(str(file), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(str(file), "is not a readable weights file", got=str(error).splitlines()[0]) from error
    return state


def _load(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load ``state`` the way timm prepares it for ``module``, and accept nothing missing and nothing left over."""
    prepare = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if prepare is not None:
        try:
            state = prepare(state, module)
        except REFUSALS as error:  # a table of another image size that is no square, for one
            fix = f"where it was tuned at another image size, give that with {option('image_size', 'HEIGHTxWIDTH')}"
            raise InputError(where, f"does not fit {type(module).__name__}", got=first_line(error), fix=fix) from error
    heads = {
        f"{part}.{kind}" for part in _classifiers(cast(_Config, module.pretrained_cfg)) for kind in ("weight", "bias")
    }
    state = {key: value for key, value in state.items() if key not in heads}
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(where, f"does not fit {type(module).__name__}", got=first) from error
    if result.missing_keys or result.unexpected_keys:
        missing, unknown = result.missing_keys, result.unexpected_keys
        got = f"{len(missing)} missing ({_few(missing)}), {len(unknown)} unknown ({_few(unknown)})"
        raise InputError(where, f"does not hold exactly the tensors of {type(module).__name__}", got=got)


def _over_frames(module: nn.Module, frames: int) -> nn.Module:
    """``module`` taking clips: their frames go through it as images, and the mean of what it puts out comes back."""
    if frames > 1:
        module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].flatten(0, 1), *inputs[1:]))
        module.register_forward_hook(lambda _module, _inputs, output: output.unflatten(0, (-1, frames)).mean(1))
    return module


def _classifiers(config: _Config) -> tuple[str, ...]:
    named = config.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _preprocess(config: _Config, size: Sides, spec: str) -> Preprocess:
    if config["crop_mode"] not in ("center", "squash"):
        raise InputError(spec, "needs a crop mode that is center or squash", got=config["crop_mode"])
    kind = config["interpolation"]
    if kind not in ("bicubic", "bilinear"):
        raise InputError(spec, "needs an interpolation that is bicubic or bilinear", got=repr(kind))
    return replace(
        Preprocess(image_size=size),
        interpolation=cast(Literal["bicubic", "bilinear"], kind),
        crop_fraction=float(config["crop_pct"]),
        crop=config["crop_mode"],
        mean=cast(tuple[float, float, float], tuple(map(float, config["mean"]))),
        std=cast(tuple[float, float, float], tuple(map(float, config["std"]))),
    )


@contextlib.contextmanager
def explicit_attention(module: nn.Module) -> Iterator[None]:
    """While the block runs timm's attention is two products and a softmax, not torch's fused operator."""
    fused = [part for part in module.modules() if getattr(part, "fused_attn", False) is True]
    try:
        for part in fused:
            setattr(part, "fused_attn", False)  # noqa: B010  timm's own switch, which nn.Module does not declare
        yield
    finally:
        for part in fused:
            setattr(part, "fused_attn", True)  # noqa: B010
