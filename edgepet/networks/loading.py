"""A backbone from its written form: timm's architecture, weights from its hub or a file, and its preprocessing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from edgepet.errors import InputError, first_line, option, require
from edgepet.networks.backbone import OWN, Backbone
from edgepet.networks.classifier import headed, without_classifier
from edgepet.networks.forms import inference_form_for, over_frames, without_branches
from edgepet.networks.sizes import (
    Sides,
    at_size,
    native_module,
    own_sides,
    quiet,
    require_patches,
    sides_of,
)
from edgepet.networks.weights_file import pooling_of, read_weights, require_finite, require_numbers
from edgepet.samples.weights import WEIGHTS, sample_weights
from edgepet.spec import ImageSize, Preprocess

if TYPE_CHECKING:
    from torch import Tensor, nn

_Config: TypeAlias = Mapping[str, Any]  # timm's own, of a network

SUMMED = "whose branches for training are summed into one kernel each (timm's reparameterize_model)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Native:
    """A network with its weights as they are, and the image size that they are for.

    ``arguments`` are what ``create_model`` needs for it beside its name and size; ``fused`` says that it is timm's
    inference form.
    """

    module: nn.Module
    held: Sides
    arguments: Mapping[str, object]
    fused: bool


def load_backbone(
    spec: str,
    *,
    image_size: ImageSize | None = None,
    frames: int = 1,
    checkpoint_size: bool = True,
    keep_branches: bool = False,
) -> Backbone:
    """Build a backbone from its written form: a timm name, ``NAME@FILE`` or ``demo:NAME``.

    Args:
        spec: a plain timm name takes the weights from timm's own hub, which needs the network.
        image_size: the side of a square in pixels, or height and width; None is the one that the weights are for.
            Position tables are resampled as timm does.
        frames: above 1, take clips (n, frames, 3, H, W): features are the mean over a clip's frames.
        checkpoint_size: false reads a file's tables at the architecture's own size, whatever size they are for: what
            packs of before ADR-0021 are bound to.
        keep_branches: leave those that only training needs, as MobileOne's, where weights have them: what packs of
            before ADR-0020 are bound to.

    Raises:
        CheckError: the network answers otherwise when its branches are summed.
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
    name, file = parse(spec)
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:3]
        known = f"for example {', '.join(close)}" if close else None
        raise InputError(spec, "is no timm architecture", got=repr(name), fix=known)
    with quiet():
        native = _published(timm, name, spec) if file is None else _of_file(name, file, asked, checkpoint_size)
        require_finite(native.module, str(file or spec))
        if not native.fused and not keep_branches and (summed := without_branches(native.module, spec)) is not None:
            native = replace(native, module=summed, fused=True)
            require_finite(summed, str(file or spec))
    return _at(asked or native.held, native, spec=spec, name=name, frames=frames)


def _at(size: Sides, native: _Native, *, spec: str, name: str, frames: int) -> Backbone:
    """The backbone of ``native`` at an image size."""
    timm = require("timm", extra="train", purpose=spec)
    if size != native.held:
        require_patches(native.module, size, spec)
    state = native.module.state_dict()
    build = partial(headed, name, 0, fused=native.fused)
    with quiet():
        module, create_args = at_size(
            build, native.module, native.held, size, native.arguments,
            lambda made: _load(made, dict(state), spec, fused=native.fused),
        )  # fmt: skip
        own = timm.data.resolve_data_config({}, model=native.module)
    module.eval().requires_grad_(False)
    config = cast(_Config, native.module.pretrained_cfg)
    sample = WEIGHTS.get(spec.removeprefix("demo:")) if spec.startswith("demo:") else None
    return Backbone(
        spec=spec,
        name=name,
        native={key: tensor.detach().numpy() for key, tensor in state.items()},
        module=over_frames(module, frames),
        preprocess=replace(_preprocess(own, size, spec), frames=frames),
        create_args=create_args,
        classifiers=_classifiers(config),
        description=sample.description if sample else f"timm {name}{', ' + SUMMED if native.fused else ''}",
        licence=sample.licence if sample else str(config.get("license") or "see the weights' publisher"),
        fused=native.fused,
    )


def parse(spec: str) -> tuple[str, Path | None]:
    """Architecture and file of weights, None where they are timm's own, of a backbone's written form.

    Raises:
        InputError: no such file, or no such sample weights.
        MissingError: a demo package is not installed.
    """
    if spec.startswith("demo:"):
        file = sample_weights(spec.removeprefix("demo:"))
        return WEIGHTS[spec.removeprefix("demo:")].architecture, file
    name, at, path = spec.partition("@")
    if not at:
        return name, None
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError(str(file), "is no file")
    return name, file


def _published(timm: ModuleType, name: str, spec: str) -> _Native:
    """The network with the weights of timm's hub."""
    try:
        module: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # a hub, an HTTP client and a file system: their errors share no base
        raise InputError(
            spec,
            "could not get its weights from timm's hub",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix=f"connect to the network, or pass {option('backbone', f'{name}@FILE')} with weights you have",
        ) from error
    return _Native(module=module, held=own_sides(module), arguments={}, fused=False)


def _of_file(name: str, file: Path, asked: Sides | None, checkpoint_size: bool) -> _Native:
    """The network with the weights of a file."""
    build = partial(headed, name, 0, fused=False)
    bare = build({})
    names = bare.state_dict().keys()
    state = read_weights(file, names)
    if (form := inference_form_for(state, bare)) is not None:
        _load(form, state, str(file), fused=True)
        return _Native(module=form, held=own_sides(form), arguments={}, fused=True)
    arguments = pooling_of(state, names)
    own = build(arguments) if arguments else bare
    module, held = native_module(own, build, state if checkpoint_size else {}, asked, arguments)
    _load(module, state, str(file))
    return _Native(module=module, held=held, arguments=arguments, fused=False)


def _load(module: nn.Module, state: dict[str, Tensor], where: str, *, fused: bool = False) -> None:
    """Load ``state`` the way timm prepares it for ``module``, and accept nothing missing and nothing left over."""
    prepare = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if prepare is not None and not fused:  # it would take an inference form for the weights of the authors
        try:
            state = prepare(state, module)
        except (KeyError, IndexError, AttributeError, AssertionError, ArithmeticError, TypeError, ValueError,
                RuntimeError) as error:  # fmt: skip  # a table of another image size that is no square, for one
            size = option("image_size", "HEIGHTxWIDTH")
            fix = f"pass the architecture that the file is of, and {size} where it was tuned at another image size"
            got = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(where, f"cannot be read as {type(module).__name__}", got=got, fix=fix) from error
    fix = "pass the architecture that the file is of"
    state = without_classifier(state, module, _classifiers(cast(_Config, module.pretrained_cfg)), fused=fused)
    require_numbers(state, module.state_dict(), where)
    try:
        result = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(where, f"does not fit {type(module).__name__}", got=first, fix=fix) from error
    if result.missing_keys or result.unexpected_keys:
        missing, unknown = result.missing_keys, result.unexpected_keys
        got = f"{len(missing)} missing ({_few(missing)}), {len(unknown)} unknown ({_few(unknown)})"
        raise InputError(where, f"does not hold exactly the tensors of {type(module).__name__}", got=got, fix=fix)


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
    return Preprocess(
        image_size=size,
        orientation="exif",
        interpolation=cast(Literal["bicubic", "bilinear"], kind),
        crop_fraction=float(config["crop_pct"]),
        crop=config["crop_mode"],
        mean=cast(tuple[float, float, float], tuple(map(float, config["mean"]))),
        std=cast(tuple[float, float, float], tuple(map(float, config["std"]))),
    )
