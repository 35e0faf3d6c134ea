"""The PET methods. To add one: its file, and its line in ``METHODS``."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edgepet.errors import InputError
from edgepet.methods.adapter import Adapter, Houlsby
from edgepet.methods.adaptformer import AdaptFormer
from edgepet.methods.baselines import Full, LinearProbe
from edgepet.methods.bi_lora import BiLoRA
from edgepet.methods.bitfit import BitFit
from edgepet.methods.consolidator import Consolidator
from edgepet.methods.conv_adapter import ConvAdapter
from edgepet.methods.convpass import Convpass
from edgepet.methods.dora import DoRA
from edgepet.methods.fact import FacTTK, FacTTT
from edgepet.methods.ia3 import IA3
from edgepet.methods.kadaptation import KAdaptation
from edgepet.methods.krona import KronA, LoKr
from edgepet.methods.lora import LoRA
from edgepet.methods.method import ActivationPath, Branching, Method, Recipe
from edgepet.methods.norm_tuning import NormTuning
from edgepet.methods.parallel_adapter import ParallelAdapter
from edgepet.methods.prefix import MAM, Prefix
from edgepet.methods.pro_tuning import ProTuning
from edgepet.methods.repadapter import RepAdapter
from edgepet.methods.ssf import SSF
from edgepet.methods.st_adapter import STAdapter
from edgepet.methods.vpt import VPTDeep, VPTShallow

__all__ = [
    "IA3",
    "MAM",
    "METHODS",
    "SSF",
    "ActivationPath",
    "AdaptFormer",
    "Adapter",
    "BiLoRA",
    "BitFit",
    "Branching",
    "Consolidator",
    "ConvAdapter",
    "Convpass",
    "DoRA",
    "FacTTK",
    "FacTTT",
    "Full",
    "Houlsby",
    "KAdaptation",
    "KronA",
    "LinearProbe",
    "LoKr",
    "LoRA",
    "Method",
    "NormTuning",
    "ParallelAdapter",
    "Prefix",
    "ProTuning",
    "Recipe",
    "RepAdapter",
    "STAdapter",
    "VPTDeep",
    "VPTShallow",
    "configure",
]

METHODS: dict[str, type[Method]] = {
    "linear-probe": LinearProbe,
    "full": Full,
    "bitfit": BitFit,
    "norm-tuning": NormTuning,
    "ssf": SSF,
    "ia3": IA3,
    "lora": LoRA,
    "dora": DoRA,
    "consolidator": Consolidator,
    "fact-tt": FacTTT,
    "fact-tk": FacTTK,
    "kadaptation": KAdaptation,
    "krona": KronA,
    "lokr": LoKr,
    "repadapter": RepAdapter,
    "bi-lora": BiLoRA,
    "adapter": Adapter,
    "houlsby": Houlsby,
    "adaptformer": AdaptFormer,
    "parallel-adapter": ParallelAdapter,
    "prefix": Prefix,
    "mam": MAM,
    "vpt-shallow": VPTShallow,
    "vpt-deep": VPTDeep,
    "convpass": Convpass,
    "conv-adapter": ConvAdapter,
    "pro-tuning": ProTuning,
    "st-adapter": STAdapter,
}


def configure(name: str, settings: Mapping[str, str] = types.MappingProxyType({})) -> Method:
    """The method called ``name`` with settings as people type them: ``rank=4``, ``on=q,k,v``, ``shuffle=true``.

    Raises:
        InputError: no such method or setting, or a value of another type.
    """
    kind: Any = METHODS.get(name)
    if kind is None:
        raise InputError("--method", f"is one of {', '.join(METHODS)}", got=repr(name))
    known = {field.name for field in fields(kind)}
    types_of = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            has = f"has the settings {', '.join(sorted(known))}" if known else "has no settings"
            raise InputError(f"--set {key}", f"{name} {has}", got=repr(key))
        try:
            values[key] = _parse(text, types_of[key])
        except ValueError as error:
            raise InputError(f"--set {key}", f"needs {_spelled(types_of[key])}", got=repr(text)) from error
    method: Method = kind(**values)
    return method


def _parse(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(part, typing.get_args(kind)[0]) for part in text.split(",") if text)
    if typing.get_origin(kind) is Mapping:
        pairs = [part.rpartition(":") for part in text.split(",") if text]
        if not all(name for name, _, _ in pairs):
            raise ValueError(text)
        return {name: _parse(value, typing.get_args(kind)[1]) for name, _, value in pairs}
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return kind(text)


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"{_spelled(typing.get_args(kind)[0]).removeprefix('a ')}s with commas between"
    if typing.get_origin(kind) is Mapping:
        return f"NAME:{_spelled(typing.get_args(kind)[1]).removeprefix('a ')} with commas between"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[kind]
