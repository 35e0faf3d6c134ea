"""A pack's updates as the tensors and the configuration of a PEFT adapter: the way back from ``reading``.

PEFT adapts whole layers: row blocks of a fused weight become rows of one adapter that is zero, or one, elsewhere.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import safetensors.numpy

from edgepet.canonical import canonical_json
from edgepet.deltas.expressions import Product, value
from edgepet.deltas.merge import fold_all
from edgepet.deltas.updates import Kronecker, LowRank, Push, Scale, Targeted, fold, in_precision_of
from edgepet.errors import InputError
from edgepet.files import write_file
from edgepet.methods.krona import two_factors
from edgepet.peft import hadamard
from edgepet.peft.adapter import CONFIG, PREFIX, TUNER, WEIGHTS, Adapter
from edgepet.peft.layers import DOUBLE, FORMATS, MERGE, Layer, by_layer, factors_of, refused
from edgepet.peft.targets import exactly, targets
from edgepet.peft.vera import projected
from edgepet.spec import NpArray, Site, Target, Tensors

Number = TypeVar("Number", int, float)
_BIASES = {"LORA": "lora_only", "VERA": "vera_only", "GLORA": "glora_only"}  # for those of the adapted layers
_UNNUMBERED = ("IA3", "GLORA")  # their configurations have no layers_to_transform


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write what ``PeftModel.from_pretrained`` reads into a folder that is there; floats become float32.

    Raises:
        InputError: it cannot be written.
    """
    tensors = {f"{PREFIX}{name}": _stored(tensor) for name, tensor in adapter.tensors.items()}
    shared = {f"{TUNER}{name}": _stored(tensor) for name, tensor in adapter.shared.items()}
    write_file(folder / WEIGHTS, safetensors.numpy.save(tensors | shared, metadata={"format": "pt"}))
    write_file(folder / CONFIG, canonical_json(adapter.config))


def _stored(tensor: NpArray) -> NpArray:
    return np.asarray(tensor, np.float32 if tensor.dtype.kind == "f" else tensor.dtype, order="C")


def unlower(
    updates: Iterable[Targeted],
    base: Tensors,
    layers: Sequence[Site],
    head: Tensors,
    *,
    where: str,
    numbered: bool = True,
) -> Adapter:
    """An adapter that does to the tensors ``base`` what ``updates`` do; nothing is modified.

    Args:
        layers: of the backbone, as ``Backbone.layers``.
        head: the classifier's tensors under the network's names.
        numbered: some blocks of all are chosen by their numbers, where PEFT's configuration has a word for it.

    Raises:
        InputError: PEFT has no adapter that does this.
    """
    updates = [Targeted(t.target, in_precision_of(t.update, DOUBLE)) for t in updates]
    found = by_layer(updates, layers)
    kinds = {targeted.update.kind for layer in found for targeted in layer.weight}
    shared: Tensors = {}
    if found and hadamard.generalised(found, kinds):
        biases = [targeted for layer in found for targeted in layer.bias]
        config, tensors = hadamard.glora(found, base, where, _changed(biases, updates, base, where))
    elif kinds == {"modulate"}:
        config, tensors = hadamard.hira(found, base, where)
    elif kinds == {"scale"}:
        config, tensors = _ia3(found, base, where)
    elif kinds == {"kronecker"}:
        config, tensors = _lokr(found, base)
    elif kinds == {"low-rank"} and (vera := projected([(layer.site, layer.weight) for layer in found])) is not None:
        config, tensors, shared = vera
    elif kinds in ({"low-rank"}, {"low-rank", "scale"}):
        config, tensors = _lora(found, base, where, dora="scale" in kinds)
    else:
        got = ", ".join(sorted(kinds)) or "no updates of layers' weights"
        raise InputError(where, f"needs updates of one of PEFT's methods: {FORMATS}", got=got, fix=MERGE)
    adapted = {id(targeted) for layer in found for targeted in layer.weight}
    if config["peft_type"] == "GLORA":
        adapted |= {id(targeted) for layer in found for targeted in layer.bias}
    elif config["peft_type"] == "IA3":
        adapted |= {id(targeted) for layer in found for targeted in layer.scales}
    rest = [targeted for targeted in updates if id(targeted) not in adapted]
    changed = _changed(rest, updates, base, where)
    saved, modules = _saved(rest, changed, found, base, where, biases=config["peft_type"] in _BIASES)
    alone = [name for name in saved if _module(name) not in modules]
    if alone:
        config["bias"] = _BIASES[str(config["peft_type"])] if all(".base_layer." in name for name in alone) else "all"
    every = {
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        **targets(
            [layer.site.name for layer in found], layers, numbered=numbered and config["peft_type"] not in _UNNUMBERED
        ),
        "modules_to_save": sorted({*map(_module, head), *modules}),
    }
    return Adapter(where=where, config={**every, **config}, tensors={**tensors, **saved, **head}, shared=shared)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _changed(rest: Sequence[Targeted], updates: Sequence[Targeted], base: Tensors, where: str) -> dict[str, NpArray]:
    """The tensors that ``rest`` changes, with all of it folded in; what a push reads is folded as well."""
    for targeted in rest:
        if targeted.target.tensor not in base:
            raise refused(where, targeted, "is of no tensor of the backbone")
        if isinstance(targeted.update, Push) and targeted.update.reads.tensor not in base:
            raise refused(where, targeted, "reads no tensor of the backbone")
    names = {targeted.target.tensor for targeted in rest}
    names |= {targeted.update.reads.tensor for targeted in rest if isinstance(targeted.update, Push)}
    needed = [targeted for targeted in updates if targeted.target.tensor in names]
    return fold_all({name: base[name] * 1.0 for name in names}, needed)


def _saved(
    rest: Sequence[Targeted], changed: Tensors, found: Sequence[Layer], base: Tensors, where: str, *, biases: bool
) -> tuple[dict[str, NpArray], set[str]]:
    """Tensors that take the place of the network's own, and the modules of which PEFT keeps all tensors.

    With ``biases`` a bias is kept by itself: of PEFT's configurations those of ``_BIASES`` have a word for that.
    """
    adapted = [layer.site.name for layer in found]
    tensors: dict[str, NpArray] = {}
    modules = set[str]()
    for targeted in rest:
        name, module = targeted.target.tensor, _module(targeted.target.tensor)
        if biases and name == f"{module}.bias":
            tensors[f"{module}.base_layer.bias" if module in adapted else name] = changed[name]
            continue
        kept = {_module(other) for other in base if _module(other).endswith(module)}  # as PEFT matches names
        if not module or any(f"{layer}.".startswith(f"{each}.") for layer in adapted for each in kept):
            raise refused(where, targeted, f"is nothing that PEFT's {FORMATS} does")
        modules |= kept
        tensors |= {other: changed.get(other, base[other]) for other in base if _module(other) in kept}
    return tensors, modules


def _patterns(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The most frequent value, and patterns for the layers that have another one."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(name)}": given for name, given in values.items() if given != usual}


# ------------------------------------------------------------------------------------------------- LoRA and DoRA


def _lora(
    found: Sequence[Layer], base: Tensors, where: str, *, dora: bool
) -> tuple[dict[str, object], dict[str, NpArray]]:
    """All low-rank additions of a layer as one, and for DoRA the lengths of the rows that its scales leave."""
    tensors: dict[str, NpArray] = {}
    ranks, alphas = dict[str, int](), dict[str, float]()
    for layer in found:
        site, name = layer.site, layer.site.name
        if not site.dense:
            raise refused(where, layer.weight[0], f"is of {site.groups} groups, which PEFT's LoRA does not keep apart")
        left, right, scale, rows = _joined(layer, where)
        ranks[name], alphas[name] = len(right), scale * len(right)
        tensors[f"{name}.lora_A.weight"] = right.reshape(layer.shape(len(right), base))
        tensors[f"{name}.lora_B.weight"] = left.reshape(*left.shape, *layer.ones(base))
        if dora:
            moved = fold(Targeted(Target(site.weight), LowRank(left, right, scale=scale)), base[site.weight] * 1.0)
            lengths = rows * np.linalg.norm(moved.reshape(len(moved), -1).astype(np.float64), axis=1)
            axes = layer.ones(base)
            tensors[f"{name}.lora_magnitude_vector"] = lengths.reshape((1, -1, *axes) if axes else -1)
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    config = {
        "peft_type": "LORA", "r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern, "lora_dropout": 0.0, "bias": "none", "use_dora": dora, "use_rslora": False,
        "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    return config, tensors


def _joined(layer: Layer, where: str) -> tuple[NpArray, NpArray, float, NpArray]:
    """left (out, r), right (r, in) and scale of all additions in float64, and the scale of every row behind them."""
    out, columns = layer.site.out_features, layer.site.columns
    lefts, rights, scales, rows = [np.zeros((out, 0))], [np.zeros((0, columns))], list[float](), np.ones(out)
    for targeted in layer.weight:
        update, (first, last) = targeted.update, targeted.target.rows or (0, out)
        if isinstance(update, Scale) and update.axis == "out" and targeted.target.cols is None:
            rows[first:last] *= update.s
        elif isinstance(update, LowRank) and (rows[first:last] == 1).all():
            left, right = layer.whole(targeted.target, factors_of(update))
            lefts.append(left)
            rights.append(right)
            scales.append(float(update.scale))
        else:
            raise refused(where, targeted, "comes where PEFT's LoRA and DoRA have no place for it")
    same = len(set(scales)) == 1
    if not same:
        lefts = [lefts[0], *(left * scale for left, scale in zip(lefts[1:], scales, strict=True))]
    if not scales:  # only lengths: an addition of nothing
        lefts, rights = [np.zeros((out, 1))], [np.zeros((1, columns))]
    return np.hstack(lefts), np.vstack(rights), scales[0] if same else 1.0, rows


# ---------------------------------------------------------------------------------------------------------- LoKr


def _lokr(found: Sequence[Layer], base: Tensors) -> tuple[dict[str, object], dict[str, NpArray]]:
    """Each layer's Kronecker product; where PEFT's one factor does not give the cuts, all sums of them as they are."""
    factor = _factor(found)
    tensors: dict[str, NpArray] = {}
    ranks, alphas = dict[str, int](), dict[str, float]()
    for layer in found:
        name, out, width = layer.site.name, layer.site.out_features, layer.site.in_features
        update = cast(Kronecker, layer.weight[0].update)
        if factor is None:
            left, right, scale = np.ones((1, 1)), _sum(layer), 1.0
        else:
            left, right, scale = value(update.left, DOUBLE)[0], update.right, float(update.scale)
        most = max(out // left.shape[0], width // left.shape[1]) / 2
        tensors[f"{name}.lokr_w1"] = left
        if isinstance(right, Product) and right.left.shape[-1] < most:
            rank = right.left.shape[-1]
            tensors[f"{name}.lokr_w2_a"], tensors[f"{name}.lokr_w2_b"] = right.left[0], right.right[0]
        else:
            rank = math.ceil(most)  # from here on PEFT does not cut the right factor
            shape = (out // left.shape[0], width // left.shape[1], *base[layer.site.weight].shape[2:])
            tensors[f"{name}.lokr_w2"] = value(right, DOUBLE).reshape(shape)
        ranks[name], alphas[name] = rank, scale * rank
    rank, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    config = {
        "peft_type": "LOKR", "r": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern,
        "decompose_both": False, "decompose_factor": 1 if factor is None else factor, "use_effective_conv2d": False,
        "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True,
    }  # fmt: skip
    return config, tensors


def _factor(found: Sequence[Layer]) -> int | None:
    """The ``decompose_factor`` with which PEFT cuts every layer as its one Kronecker product does, if there is one."""
    cuts = list[tuple[int, int]]()
    for layer in found:
        update = cast(Kronecker, layer.weight[0].update)
        target = layer.weight[0].target
        if len(layer.weight) > 1 or target.rows or target.cols or update.left.shape[0] > 1:
            return None
        cuts += zip((layer.site.out_features, layer.site.in_features), update.left.shape[1:], strict=True)
    fitting = (
        f for f in (-1, *sorted({small for _, small in cuts})) if all(_cut(side, f) == small for side, small in cuts)
    )
    return next(fitting, None)


def _cut(side: int, factor: int) -> int:
    """The left factor's share of ``side`` in PEFT (``tuners/lokr/layer.py``, ``factorization``)."""
    return factor if factor > 0 and side % factor == 0 else two_factors(side, factor)[0]


def _sum(layer: Layer) -> NpArray:
    whole: NpArray = np.zeros((layer.site.out_features, layer.site.columns))
    for targeted in layer.weight:
        whole = fold(targeted, whole)
    return whole


# ----------------------------------------------------------------------------------------------------------- IA3


def _ia3(found: Sequence[Layer], base: Tensors, where: str) -> tuple[dict[str, object], dict[str, NpArray]]:
    """One vector for what a layer puts out, with its bias, or for what it reads."""
    inner = [layer for layer in found if any(_reads(targeted) for targeted in layer.weight)]
    tensors: dict[str, NpArray] = {}
    for layer in found:
        site, axes = layer.site, layer.ones(base)
        if layer in inner:
            targeted = layer.weight[0]
            given = cast(Scale, targeted.update)
            fits = targeted.target == Target(site.weight) and len(given.s) == site.in_features
            if len(layer.weight) > 1 or layer.scales or not fits or site.groups > 1:
                raise refused(where, targeted, "scales inputs in a way that PEFT's IA3 does not")
            tensors[f"{site.name}.ia3_l"] = given.s.reshape(1, -1, *axes)
            continue
        scale = _rows(layer.weight, site, where)
        if site.bias is not None and not np.array_equal(scale, _rows(layer.scales, site, where)):
            raise refused(where, layer.weight[0], "scales a weight and not its bias, which PEFT's IA3 does together")
        tensors[f"{site.name}.ia3_l"] = scale.reshape((1, -1, *axes) if axes else (-1, 1))
    config: dict[str, object] = {
        "peft_type": "IA3", "feedforward_modules": exactly(layer.site.name for layer in inner) or [],
        "fan_in_fan_out": False, "init_ia3_weights": True,
    }  # fmt: skip
    return config, tensors


def _reads(targeted: Targeted) -> bool:
    return isinstance(targeted.update, Scale) and targeted.update.axis == "in"


def _rows(scales: Sequence[Targeted], site: Site, where: str) -> NpArray:
    """The scale of each row, 1 where there is none."""
    rows = np.ones(site.out_features)
    for targeted in scales:
        if targeted.target.cols is not None:
            raise refused(where, targeted, "scales a part of each row, which PEFT's IA3 does not")
        first, last = targeted.target.rows or (0, site.out_features)
        given = cast(Scale, targeted.update)
        rows[first:last] *= given.s
    return rows
