"""Other forms of a network: without the branches of its training, over the frames of clips, with attention spelled out.

MobileOne, RepVGG, FastViT, RepViT and their like have branches that only their training needs, and timm sums them into
one kernel (``timm.utils.reparameterize_model``). edgepet does so in float64 when a backbone is loaded, and tunes what
is deployed. A network of which only batch norms would be folded stays as it is: methods tune these, and runtimes fold
them. Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from edgepet.errors import CheckError

if TYPE_CHECKING:
    from torch import nn

_FORMS = ("fuse", "reparameterize", "switch_to_deploy")  # what timm calls the step of a module
EXACT = 1e-7  # of the largest feature, in float64: rounding, which sixty layers with random weights make 1e-10


def inference_form(module: nn.Module) -> nn.Module:
    """timm's inference form of ``module``, computed in float64 and rounded to float32 once; ``module`` stays as it is.

    It has the tensors of ``module`` where timm has no such form.
    """
    return _in_float64(module).float()


def _in_float64(module: nn.Module) -> nn.Module:
    from timm.utils import reparameterize_model

    with _float64():
        return cast("nn.Module", reparameterize_model(copy.deepcopy(module).eval().double(), inplace=True))


def inference_form_for(state: Collection[str], module: nn.Module) -> nn.Module | None:
    """The inference form of ``module``, where weights named ``state`` are of that form and not of ``module``."""
    if not _may_fuse(module) or _names(module) <= set(state):
        return None
    fused = inference_form(module)
    return fused if _names(fused) <= set(state) else None


def without_branches(module: nn.Module, where: str) -> nn.Module | None:
    """The inference form of ``module``, compared with it, where it holds branches that only training needs.

    Raises:
        CheckError: the two forms put out other features, in float64.
    """
    if not _may_fuse(module):
        return None
    exact = _in_float64(module)
    if _names(exact) == _names(module):
        return None
    deployed = any(hasattr(part, "switch_to_deploy") for part in module.modules())  # a RepGhost's branch is a norm
    if not deployed and _kernels(exact) == _kernels(module):
        return None
    _require_same(module, exact, where)
    return exact.float()


def _require_same(module: nn.Module, exact: nn.Module, where: str) -> None:
    import torch

    double = [copy.deepcopy(module).eval().double(), exact]
    size = cast(Mapping[str, tuple[int, ...]], module.pretrained_cfg)["input_size"]
    images = torch.randn(1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = (form(images) for form in double)
    worst, limit = float((got - expected).abs().max()), EXACT * float(expected.abs().max())
    if not worst <= limit:
        what = f"its branches, summed into one kernel, must answer as they do, within {limit:.1e}"
        raise CheckError(where, what, got=f"{worst:.1e}")


def _may_fuse(module: nn.Module) -> bool:
    return any(hasattr(part, name) for part in module.modules() for name in _FORMS)


def _names(module: nn.Module) -> set[str]:
    return set(module.state_dict())


def _kernels(module: nn.Module) -> int:
    return sum(tensor.ndim > 1 for tensor in module.state_dict().values())


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """While the block runs torch makes layers and numbers in float64: timm's forms make theirs in the default."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def over_frames(module: nn.Module, frames: int) -> nn.Module:
    """``module`` taking clips: their frames go through it as images, and the mean of what it puts out comes back."""
    if frames > 1:
        module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].flatten(0, 1), *inputs[1:]))
        module.register_forward_hook(lambda _module, _inputs, output: output.unflatten(0, (-1, frames)).mean(1))
    return module


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
