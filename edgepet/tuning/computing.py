"""How a tuned model computes in a fit: where, in which precision, and what it makes of a whole set of images.

Needs the ``train`` extra.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgepet.errors import InputError, option
from edgepet.images.preprocess import normalize
from edgepet.networks.forms import explicit_attention
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.model import TunedModel

if TYPE_CHECKING:
    from edgepet.tuning.fit import Plan

AT_ONCE = 64  # images that go through the network where nothing is learnt, and fewer large ones
MOST_PIXELS = 16 * 512 * 512  # of them: a small network takes 1 GB for what lies between two layers
MANY_TOKENS = 512  # from here on a matrix of all pairs of tokens is too large to keep for the backward pass


@contextlib.contextmanager
def computing(model: TunedModel, plan: Plan, *, learning: bool = False) -> Iterator[None]:
    """While the block runs ``model`` lies where ``plan`` says and computes as its fit does.

    If it is not ``learning`` it is in eval mode, in the precision of ``plan`` and without gradients.
    """
    model.to(plan.device)
    with _explicit_attention(model, plan), contextlib.ExitStack() as stack:
        if not learning:
            model.eval()
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast(plan))
        yield


@contextlib.contextmanager
def _explicit_attention(model: TunedModel, plan: Plan) -> Iterator[None]:
    """Attention as two products and a softmax while training in bf16 on a CPU: torch's fused form has a slow backward
    there, a third of a step at 65 tokens. Long sequences keep it, for its memory.
    """
    tokens = getattr(getattr(model.backbone, "patch_embed", None), "num_patches", MANY_TOKENS)
    slow = plan.autocast and plan.device == "cpu" and tokens < MANY_TOKENS and not model.extends_attention
    with explicit_attention(model.backbone) if slow else contextlib.nullcontext():
        yield


def autocast(plan: Plan) -> torch.autocast:
    """Under it the network computes in the precision of ``plan``."""
    return torch.autocast(plan.device.partition(":")[0], dtype=torch.bfloat16, enabled=plan.autocast)


def inputs_of(model: TunedModel, pixels: NpArray, preprocess: Preprocess) -> Tensor:
    """One batch of pixels, or of kept rows where ``model`` begins at a block, as it takes them."""
    return torch.from_numpy(normalize(pixels, preprocess)) if model.front is None else model.front.rows(pixels)


def features_of(
    model: TunedModel, pixels: NpArray, preprocess: Preprocess, plan: Plan, *, follow: bool = False
) -> Tensor:
    """Of all images, as float32 (n, d); with ``follow`` the ranges of a backbone that is rounded take them in."""
    model.eval()
    if model.fake_quant is not None:
        model.fake_quant.train(follow)
    step = at_once(preprocess)
    with torch.no_grad(), autocast(plan):
        parts = (inputs_of(model, pixels[at : at + step], preprocess) for at in range(0, len(pixels), step))
        return torch.cat([model.features(part.to(plan.device)).float() for part in parts])


def at_once(preprocess: Preprocess) -> int:
    """How many images, or clips, go through the network together where nothing is learnt."""
    return max(1, min(AT_ONCE, MOST_PIXELS // math.prod(preprocess.image_size)) // preprocess.frames)


def device_of(name: str | None) -> str:
    """torch's name of what trains.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    here = torch.cuda.is_available()
    if name is not None and name.startswith("cuda") and not here:
        fix = "leave it out to train on the CPU"
        raise InputError(option("device"), "needs a GPU that torch can use", got="none", fix=fix)
    return name or ("cuda" if here else "cpu")
