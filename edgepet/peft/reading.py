"""PEFT adapters as updates of a backbone's tensors.

What PEFT computes is in its ``tuners``: ``lora``, ``lokr``, ``ia3``, ``vera``, ``hira`` and ``glora``; each function
here names its formula. Whatever is not known to fold is refused by the tensor that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from edgepet.deltas.delta import Head
from edgepet.deltas.expressions import Factor, Product, Scaled
from edgepet.deltas.updates import (
    Kronecker,
    LowRank,
    Modulate,
    Replace,
    Scale,
    Targeted,
    check,
    fold,
    in_precision_of,
    shape_read_by,
)
from edgepet.errors import InputError, option
from edgepet.methods.dora import rescaled
from edgepet.methods.method import pushed, shift
from edgepet.peft.adapter import CONFIG, Adapter, compiled
from edgepet.spec import NpArray, Site, Target, Tensors

_METHODS = {"LORA": "lora", "LOKR": "lokr", "IA3": "ia3", "VERA": "vera", "HIRA": "hira", "GLORA": "glora"}
_FORMS = {  # of GLoRA's paths: what PEFT takes each for where its configuration says nothing, and what it may be
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("constant", "vector", "none"),
}
_SETTINGS = (
    *("r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "d_initial", *_FORMS),
    "target_modules",
)
_ENDINGS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l|vera_lambda_[bd]|hira_[AB]|glora_[A-E]\.(?:X[du]?|zeros))"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """What an adapter does to a backbone: ``method`` and ``settings`` are provenance."""

    updates: tuple[Targeted, ...]
    head: Head
    method: str
    settings: Mapping[str, object]


def lower(adapter: Adapter, base: Tensors, layers: Sequence[Site], classifiers: Sequence[str]) -> Lowered:
    """What ``adapter`` does to the tensors ``base``, and the task's head, as updates of float32 factors.

    Neither is modified.

    Args:
        layers: of the backbone, as ``Backbone.layers``.
        classifiers: the layers behind it, two where a network was distilled; PEFT has them in ``modules_to_save``.

    Raises:
        InputError: a tensor belongs to nothing that folds, or does not fit, or there is no classifier, or several that
            differ.
    """
    modules, saved = by_module(adapter)
    for name in classifiers:
        if name in modules:
            what, fix = "is adapted, but its own weights are not in the folder", f'tune with modules_to_save=["{name}"]'
            raise InputError(f"{adapter.where}: {name}", what, fix=fix)
    head = _head(adapter, saved, classifiers)
    updates = _replaced(adapter, saved, base)
    moved = dict(base) | {targeted.target.tensor: fold(targeted, base[targeted.target.tensor]) for targeted in updates}
    sites = {site.name: site for site in layers if site.kind in ("linear", "conv")}
    for name, given in _with_shared(adapter, modules, sites).items():
        updates += _adapted(adapter, name, sites.get(name), given, moved)
    shapes = {name: tensor.shape for name, tensor in base.items()}
    for targeted in updates:
        shape, read = shapes[targeted.target.tensor], shape_read_by(targeted, shapes)
        check(targeted, shape, where=adapter.where, fix="pass the backbone it was tuned on", weight=read)
    if not updates:
        raise InputError(adapter.where, "holds no adapter")
    method = "dora" if adapter.config.get("use_dora") else _METHODS[adapter.config["peft_type"]]
    settings = {key: adapter.config[key] for key in _SETTINGS if adapter.config.get(key)}
    return Lowered(updates=tuple(updates), head=head, method=method, settings=settings)


def _adapted(
    adapter: Adapter, name: str, site: Site | None, given: dict[str, NpArray], base: Tensors
) -> list[Targeted]:
    """The updates of one module; all that is ``given`` must be used."""
    where = f"{adapter.where}: {name}"
    if site is None:
        fix = f"pass the {option('backbone')} that it was tuned on, by timm's name"
        raise InputError(where, "is no linear layer or convolution of the backbone", fix=fix)
    has = ", ".join(sorted(given))
    try:
        updates = _LOWERING[adapter.config["peft_type"]](adapter, site, given, base)
    except KeyError as error:
        raise InputError(where, f"needs the tensor {error}", got=has) from error
    if given:
        what = "has tensors that its configuration does not speak of"
        raise InputError(where, what, got=", ".join(sorted(given)))
    return updates


def by_module(adapter: Adapter) -> tuple[dict[str, dict[str, NpArray]], dict[str, NpArray]]:
    """The tensors of each adapted module, and those that take the place of the network's own."""
    modules: dict[str, dict[str, NpArray]] = {}
    saved: dict[str, NpArray] = {}
    for name, tensor in adapter.tensors.items():
        match = _ENDINGS.fullmatch(name)
        if match is not None:
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        elif ".original_module." not in name and not name.endswith("num_batches_tracked"):
            # bias="all" saves a classifier's bias three times, of which the plain name is loaded
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            saved[plain] = adapter.tensors.get(plain, tensor)
    return modules, saved


def _with_shared(
    adapter: Adapter, modules: Mapping[str, dict[str, NpArray]], sites: Mapping[str, Site]
) -> dict[str, dict[str, NpArray]]:
    """``modules`` with the first columns of A and the first rows of B that each has: equal ones are one array."""
    cuts: dict[tuple[str, int], NpArray] = {}
    known = {name: sites[name] for name in modules if name in sites and adapter.shared}
    for site in known.values():
        columns, rows = site.in_features, site.out_features
        if ("vera_A", columns) not in cuts:
            cuts["vera_A", columns] = _float32(adapter.shared["vera_A"][:, :columns])
        if ("vera_B", rows) not in cuts:
            cuts["vera_B", rows] = _float32(adapter.shared["vera_B"][:rows])
    shares = {
        name: {"vera_A": cuts["vera_A", site.in_features], "vera_B": cuts["vera_B", site.out_features]}
        for name, site in known.items()
    }
    return {name: given | shares.get(name, {}) for name, given in modules.items()}


def _head(adapter: Adapter, saved: dict[str, NpArray], classifiers: Sequence[str]) -> Head:
    heads = []
    for name in classifiers:
        weight = saved.pop(f"{name}.weight", None)
        if weight is None:
            got = ", ".join(sorted({key.rpartition(".")[0] for key in saved} - {name})[:3]) or None
            fix = f'tune with modules_to_save=["{name}"]: a pack needs the classifier'
            raise InputError(adapter.where, f"holds no weights of the classifier {name!r}", got=got, fix=fix)
        bias = saved.pop(f"{name}.bias", np.zeros(len(weight), np.float32))
        heads.append(Head(weight=_float32(weight.reshape(len(weight), -1)), bias=_float32(bias)))
    if not heads:
        raise InputError(adapter.where, "is for a network whose classifier timm does not name")
    if any(not np.array_equal(heads[0].weight, h.weight) or not np.array_equal(heads[0].bias, h.bias) for h in heads):
        raise InputError(adapter.where, f"has classifiers that differ, {' and '.join(classifiers)}: a pack has one")
    return heads[0]


def _replaced(adapter: Adapter, saved: Mapping[str, NpArray], base: Tensors) -> list[Targeted]:
    """modules_to_save beside the classifier, and trained biases: they come first, adapters see them."""
    updates = []
    for name, tensor in saved.items():
        if name not in base:
            what = "is no tensor of the backbone and nothing that PEFT saves of an adapter that is known here"
            fix = f"pass the {option('backbone')} that it was tuned on"
            raise InputError(f"{adapter.where}: {name}", what, fix=fix)
        targeted = Targeted(Target(name), Replace(_float32(tensor)))
        check(targeted, base[name].shape, where=adapter.where, fix="pass the backbone it was tuned on")
        if not np.array_equal(base[name], tensor):
            updates.append(targeted)
    return updates


def _lora(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """W + s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA; DoRA keeps a length for each row of that."""
    where = f"{adapter.where}: {site.name}"
    if not site.dense:
        raise InputError(where, f"is a convolution of {site.groups} groups, whose LoRA PEFT computes across them",
                         fix="leave it out of target_modules: it cannot be folded")  # fmt: skip
    a, b = given.pop("lora_A.weight"), given.pop("lora_B.weight")
    rank = adapter.rank(site.name)
    if rank != len(a):
        raise InputError(where, f"needs the rank that its configuration says, {rank}", got=len(a))
    alpha = adapter.pattern("alpha_pattern", site.name, adapter.number("lora_alpha", 8))
    scale = float(alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank))
    update = LowRank(left=_float32(b.reshape(len(b), -1)), right=_float32(a.reshape(len(a), -1)), scale=scale)
    low_rank = Targeted(Target(site.weight), update)
    updates = [low_rank]
    if adapter.config.get("use_dora"):
        name = "lora_magnitude_vector"
        lengths = given.pop(name) if name in given else given.pop(f"{name}.weight")
        check(low_rank, base[site.weight].shape, where=adapter.where, fix="pass the backbone it was tuned on")
        scaled = rescaled(low_rank, base[site.weight].astype(np.float64), lengths.reshape(-1))
        updates.append(Targeted(scaled.target, in_precision_of(scaled.update, update.left)))
    if adapter.config.get("lora_bias"):
        bias = given.pop("lora_B.bias")
        if not site.takes_shift:
            raise InputError(where, "has no bias that could take lora_bias", fix="tune with lora_bias=False")
        updates.append(shift(site, _float32(scale * bias)))
    return updates


def _lokr(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """W + alpha / r * w1 (x) w2, each whole or a product; Tucker's w2[p, r] = sum_ij t[i, j] a[i, p] b[j, r]."""
    del base
    rank = adapter.rank(site.name)
    alpha = adapter.pattern("alpha_pattern", site.name, adapter.number("alpha", 8))
    left = _whole_or_product(given, "lokr_w1")
    if "lokr_t2" in given:
        core, a, b = (_float32(given.pop(f"lokr_{part}")) for part in ("t2", "w2_a", "w2_b"))
        right: Factor = Product(a.T[None], np.einsum("ij...,jr->ir...", core, b).reshape(1, len(core), -1))
    else:
        right = _whole_or_product(given, "lokr_w2")
    return [Targeted(Target(site.weight), Kronecker(left, right, float(alpha / rank)))]


def _whole_or_product(given: dict[str, NpArray], name: str) -> Factor:
    if name in given:
        whole = _float32(given.pop(name))
        return whole.reshape(1, len(whole), -1)
    return Product(*(_float32(given.pop(f"{name}_{part}"))[None] for part in "ab"))


def _ia3(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """What a layer of feedforward_modules reads is scaled, and what every other one puts out, its bias with it."""
    del base
    where, scale = f"{adapter.where}: {site.name}", _float32(given.pop("ia3_l").reshape(-1))
    inner = adapter.config.get("feedforward_modules") or ()
    place = f"{adapter.where}/{CONFIG}: feedforward_modules"
    named = compiled(inner, place).fullmatch(site.name) if isinstance(inner, str) else site.name.endswith(tuple(inner))
    if named:
        if site.groups > 1:
            what = f"is a convolution of {site.groups} groups, whose inputs cannot be scaled in its weight"
            raise InputError(where, what, fix="leave it out of feedforward_modules")
        return [Targeted(Target(site.weight), Scale(scale, "in"))]
    if not site.scalable:
        raise InputError(where, "has a bias that is put together on the way", fix="leave it out of target_modules")
    tensors = (site.weight, site.bias) if site.bias else (site.weight,)
    return [Targeted(Target(tensor), Scale(scale)) for tensor in tensors]


def _vera(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """W + diag(b) B diag(d) A, of whose A and B the layer has its share."""
    del adapter, base
    b, d = _float32(given.pop("vera_lambda_b")), _float32(given.pop("vera_lambda_d"))
    low_rank = LowRank(left=Scaled(b, given.pop("vera_B")), right=Scaled(d, given.pop("vera_A")))
    return [Targeted(Target(site.weight), low_rank)]


def _hira(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """W + W * (B A); the rank is what the tensors have: PEFT 0.21.2 reads ``rank_pattern`` and does not look at it."""
    del base
    if not site.dense:
        what = f"is a convolution of {site.groups} groups, which PEFT's HiRA does not adapt"
        raise InputError(f"{adapter.where}: {site.name}", what, fix="leave it out of target_modules")
    a, b = _float32(given.pop("hira_A")), _float32(given.pop("hira_B"))
    return [Targeted(Target(site.weight), Modulate(left=b.reshape(len(b), -1), right=a.reshape(len(a), -1)))]


def _glora(adapter: Adapter, site: Site, given: dict[str, NpArray], base: Tensors) -> list[Targeted]:
    """W + W * A + B and b + b * D + E + W C, of the backbone's W and the trained b; A, D before what is added."""
    del base
    if site.kind != "linear":
        what = "is a convolution, which PEFT's GLoRA does not adapt"
        raise InputError(f"{adapter.where}: {site.name}", what, fix="leave it out of target_modules")
    a, b = (_path(adapter, site, given, f"glora_{letter}", "config_A_B") for letter in "AB")
    weight, updates = Target(site.weight), list[Targeted]()
    if isinstance(a, tuple):
        updates.append(Targeted(weight, Modulate(*a)))
    elif a is not None:
        updates.append(Targeted(weight, Scale(1 + a)))
    if b is not None:
        low_rank = LowRank(*b) if isinstance(b, tuple) else LowRank(b[:, None], _alike(site.in_features))
        updates.append(Targeted(weight, low_rank))
    c = _path(adapter, site, given, "glora_C", "config_C")
    d, e = (_path(adapter, site, given, f"glora_{letter}", "config_D_E") for letter in "DE")
    if isinstance(d, np.ndarray) and site.bias is not None:
        updates.append(Targeted(Target(site.bias), Scale(1 + d)))
    if isinstance(e, np.ndarray):
        updates.append(shift(site, e))
    if isinstance(c, tuple):
        c = _float32((c[0].astype(np.float64) @ c[1]).reshape(-1))
    return updates if c is None else [*updates, pushed(site, c)]


@cache
def _alike(columns: int) -> NpArray:
    """Ones (1, columns), one array for all layers: a pack stores it once."""
    ones = np.ones((1, columns), np.float32)
    ones.setflags(write=False)
    return ones


def _path(
    adapter: Adapter, site: Site, given: dict[str, NpArray], name: str, key: str
) -> tuple[NpArray, NpArray] | NpArray | None:
    """One of GLoRA's five: left (., r) and right (r, .), a vector, or None; only A and B of a layer without a bias."""
    where, forms = f"{adapter.where}: {site.name}", _FORMS[key]
    form = adapter.config.get(key, forms[0])
    if form not in forms:
        raise adapter.refusal(key, f"is one of {', '.join(forms)}")
    if form == "none" or (site.bias is None and key != "config_A_B"):
        if given.pop(f"{name}.zeros", np.zeros(1)).any():  # PEFT would add what it reads there
            raise InputError(where, f"needs zeros in '{name}.zeros', of which its configuration has none")
        return None
    if form == "lora":
        left, right = _float32(given.pop(f"{name}.Xd")), _float32(given.pop(f"{name}.Xu"))
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != len(right):
            raise InputError(where, f"needs a product of {name}'s Xd and Xu", got=f"{left.shape} and {right.shape}")
        return left, right
    vector = _float32(given.pop(f"{name}.X").reshape(-1))
    return np.full(site.out_features, vector[0]) if form == "constant" and len(vector) == 1 else vector


_LOWERING: dict[str, Callable[[Adapter, Site, dict[str, NpArray], Tensors], list[Targeted]]] = {
    "LORA": _lora,
    "LOKR": _lokr,
    "IA3": _ia3,
    "VERA": _vera,
    "HIRA": _hira,
    "GLORA": _glora,
}


def _float32(array: NpArray) -> NpArray:
    return np.ascontiguousarray(array, np.float32)
