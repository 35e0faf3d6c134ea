"""A timm architecture, its weights and its preprocessing. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from edgepet.canonical import backbone_fingerprint
from edgepet.delta import Head
from edgepet.errors import InputError, require
from edgepet.samples import WEIGHTS, sample_weights
from edgepet.spec import Base, NpArray, Preprocess, Site, Tensors

if TYPE_CHECKING:
    from torch import nn

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """A network without its classifier, at one image size, in eval mode.

    ``native`` holds the state dict at the architecture's own image size: that is what a fingerprint covers and what a
    device stores. ``module`` puts out pooled features (n, ``width``); its position table may be resampled.
    ``create_args`` are what ``timm.create_model`` needs besides the name and ``num_classes``.
    """

    spec: str
    name: str
    native: Tensors
    module: nn.Module
    preprocess: Preprocess
    create_args: dict[str, object]
    classifier: str
    description: str
    licence: str

    @property
    def label(self) -> str:
        """``spec`` without a local path: what packs and artefacts may carry."""
        return self.spec.partition("@")[0]

    @cached_property
    def fingerprint(self) -> str:
        return backbone_fingerprint(self.native)

    @cached_property
    def tensors(self) -> dict[str, NpArray]:
        """The state dict of ``module``: parameters and buffers, by name."""
        return {name: tensor.detach().numpy() for name, tensor in self.module.state_dict().items()}

    @property
    def base(self) -> Base:
        return Base(name=self.label, fingerprint=self.fingerprint, tensors=self.tensors)

    @property
    def width(self) -> int:
        """Features behind the pooling, per image."""
        return int(cast(Any, self.module).num_features)

    @cached_property
    def layers(self) -> tuple[Site, ...]:
        """Every layer and bare parameter that a method can act on, in the order of the network."""
        return (*_layers(self.module), *_parameters(self.module))

    @property
    def native_bytes(self) -> int:
        return sum(int(tensor.nbytes) for tensor in self.native.values())


def load_backbone(spec: str, *, image_size: int | None = None) -> Backbone:
    """Build a backbone from its written form: a timm name, ``NAME@FILE`` or ``demo:NAME``.

    Args:
        spec: a plain timm name takes the weights from timm's own hub, which needs the network.
        image_size: side in pixels; None is the architecture's own. Position embeddings are resampled as timm does.

    Raises:
        InputError: no such architecture or file, weights that do not fit it, or a size it cannot take.
        MissingError: torch, timm or a demo package is not installed.
    """
    require("torch", extra="train", purpose=spec)
    timm = require("timm", extra="train", purpose=spec)
    if image_size is not None and image_size < 1:
        raise InputError("--img-size", "must be at least 1", got=image_size)
    name, file = _parse(spec)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        raise InputError(
            spec, "is no timm architecture", got=repr(name), fix=f"for example {', '.join(close)}" if close else None
        )
    with _quiet():
        native = _native_module(timm, name, file, spec)
    config = native.pretrained_cfg
    own = timm.data.resolve_data_config({}, model=native)
    size = image_size or int(own["input_size"][-1])
    state = native.state_dict()
    module, create_args = native, dict[str, object]()
    if config.get("fixed_input_size"):
        create_args = {"img_size": size}
        if size != own["input_size"][-1]:
            _check_size(native, size, spec)
            module = timm.create_model(name, pretrained=False, num_classes=0, **create_args)
            _load(module, dict(state), spec)
    module.eval().requires_grad_(False)
    sample = WEIGHTS.get(spec.removeprefix("demo:")) if spec.startswith("demo:") else None
    return Backbone(
        spec=spec,
        name=name,
        native={key: tensor.detach().numpy() for key, tensor in state.items()},
        module=module,
        preprocess=_preprocess(own, size, spec),
        create_args=create_args,
        classifier=config["classifier"],
        description=sample.description if sample else f"timm {name}",
        licence=sample.licence if sample else str(config.get("license") or "see the weights' publisher"),
    )


def named_weights(backbone: Backbone, merged: Tensors, head: Head) -> dict[str, NpArray]:
    """Dense weights under timm's names, classifier included, as ``load_state_dict`` takes them strictly."""
    return {
        **merged,
        f"{backbone.classifier}.weight": np.ascontiguousarray(head.weight, np.float32),
        f"{backbone.classifier}.bias": np.ascontiguousarray(head.bias, np.float32),
    }


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


def _native_module(timm: Any, name: str, file: Path | None, spec: str) -> Any:
    if file is None:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # a hub, an HTTP client and a file system: their errors share no base
            raise InputError(
                spec,
                "could not get its weights from timm's hub",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=f"connect to the network, or pass --backbone {name}@FILE with weights you have",
            ) from error
    module = timm.create_model(name, pretrained=False, num_classes=0)
    _load(module, _read_weights(timm, file), str(file))
    return module


def _read_weights(timm: Any, file: Path) -> dict[str, Any]:
    import pickle

    from safetensors import SafetensorError

    try:
        state: dict[str, Any] = timm.models.load_state_dict(str(file), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(str(file), "is not a readable weights file", got=str(error).splitlines()[0]) from error
    return state


def _load(module: Any, state: dict[str, Any], where: str) -> None:
    """Load ``state`` the way timm prepares it for ``module``, and accept nothing missing and nothing left over."""
    prepare = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if prepare is not None:
        state = prepare(state, module)
    classifier = module.pretrained_cfg["classifier"]
    names = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    heads = {f"{part}.{kind}" for part in names for kind in ("weight", "bias")}
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


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def _check_size(module: Any, size: int, spec: str) -> None:
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if patch is not None and (size % patch[0] or size % patch[1] or size < max(patch)):
        low = max(size // patch[0], 1) * patch[0]
        raise InputError(
            "--img-size",
            f"{spec} cuts images into patches of {patch[0]} pixels",
            got=size,
            fix=f"use {low} or {low + patch[0]}",
        )


def _preprocess(config: dict[str, Any], size: int, spec: str) -> Preprocess:
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


def _layers(module: nn.Module) -> Iterator[Site]:
    from torch import nn

    for name, layer in module.named_modules():
        shape = getattr(getattr(layer, "weight", None), "shape", None)
        if shape is None:
            continue
        bias = f"{name}.bias" if getattr(layer, "bias", None) is not None else None
        kind: Literal["linear", "conv", "norm"]
        if isinstance(layer, nn.Linear):
            kind, axis = "linear", -1
        elif isinstance(layer, nn.Conv2d):
            kind, axis = "conv", 1
        elif isinstance(layer, nn.LayerNorm):
            # timm's LayerNorm2d is a LayerNorm whose channels are axis 1
            kind, axis = "norm", 1 if type(layer).__name__.endswith("2d") else -1
        else:
            continue
        thirds = shape[0] // 3
        fused = kind == "linear" and name.endswith("attn.qkv")
        blocks = tuple((part, (i * thirds, (i + 1) * thirds)) for i, part in enumerate("qkv")) if fused else ()
        yield Site(
            name=name,
            kind=kind,
            weight=f"{name}.weight",
            bias=bias,
            in_features=int(shape[1]) if len(shape) > 1 else int(shape[0]),
            out_features=int(shape[0]),
            channel_axis=cast(Literal[-1, 1], axis),
            blocks=blocks,
        )


def _parameters(module: nn.Module) -> Iterator[Site]:
    for name, parameter in module.named_parameters():
        rows = int(parameter.shape[0]) if parameter.ndim else 1
        yield Site(
            name=name, kind="tensor", weight=name, bias=None, in_features=parameter.numel() // rows, out_features=rows
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
