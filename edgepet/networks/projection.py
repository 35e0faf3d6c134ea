"""The projection of a CLIP image tower: what brings its tokens to where its text is. Needs the ``train`` extra.

timm keeps it where other networks have a classifier, a linear layer whose bias is zero; a backbone here has neither.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgepet.errors import InputError, first_line, option, require
from edgepet.networks.classifier import headed
from edgepet.networks.loading import parse
from edgepet.networks.sizes import quiet
from edgepet.networks.weights_file import read_weights
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from torch import Tensor


def projection_of(spec: str) -> NpArray:
    """The projection (C, d), float32, of the tower that ``spec``, a timm name or ``NAME@FILE``, is.

    Raises:
        InputError: its weights have none, or a classifier in its place.
        MissingError: torch or timm is not installed.
    """
    timm = require("timm", extra="train", purpose=spec)
    name, file = parse(spec)
    if not timm.is_model(name):
        raise InputError(spec, "has no projection that is known: it is no architecture of timm's", got="clip=true")
    with quiet():
        bare = headed(name, 0, {}, fused=False)
        layer = str(cast(Mapping[str, Any], bare.pretrained_cfg).get("classifier"))
        state: Mapping[str, Tensor]
        if file is None:
            try:
                state = timm.create_model(name, pretrained=True).state_dict()
            except Exception as error:  # a hub, an HTTP client and a file system: their errors share no base
                raise InputError(spec, "could not get its weights from timm's hub", got=first_line(error)) from error
        else:
            state = read_weights(file, bare.state_dict().keys())
            prepare = getattr(sys.modules[type(bare).__module__], "checkpoint_filter_fn", None)
            state = state if prepare is None else prepare(dict(state), bare)
    weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bool(bias.any())):
        got = "no such layer" if weight is None else f"a classifier of {len(weight)} classes"
        fix = f"give a CLIP image tower with its projection, or leave clip out of {option('head')}"
        raise InputError(spec, f"needs a projection, {layer} without a bias, for clip=true", got=got, fix=fix)
    return np.array(weight.detach().float().numpy(), np.float32)
