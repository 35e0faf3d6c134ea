"""PEFT adapter folders, ``adapter_config.json`` and ``adapter_model.safetensors``, as updates of a backbone's tensors.

What PEFT computes is in its ``tuners/lora``, ``tuners/lokr`` and ``tuners/ia3``; each function here names its formula.
Whatever is not known to fold is refused by the key of the configuration or the tensor that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
from safetensors import SafetensorError

from edgepet.canonical import parse_json
from edgepet.deltas.delta import Head
from edgepet.deltas.expressions import Factor, Product
from edgepet.deltas.updates import Kronecker, LowRank, Replace, Scale, Targeted, check, fold, in_precision_of
from edgepet.errors import InputError, option
from edgepet.files import read_file
from edgepet.methods.dora import rescaled
from edgepet.methods.method import shift
from edgepet.spec import NpArray, Site, Target, Tensors
from edgepet.strict import ObjectReader

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor: PeftModel.base_model is the tuner, its .model the network

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
_EVERY = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "r",
)  # fmt: skip
_KNOWN: dict[str, tuple[str, ...]] = {  # keys by type; any other key must be empty or false
    "LORA": (
        *_EVERY, "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
        "eva_config", "loftq_config", "megatron_core", "qalora_group_size",
    ),
    "LOKR": (
        *_EVERY, "alpha", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d",
        "decompose_both", "decompose_factor", "init_weights",
    ),
    "IA3": (*_EVERY, "feedforward_modules", "init_ia3_weights"),
}  # fmt: skip
_METHODS = {"LORA": "lora", "LOKR": "lokr", "IA3": "ia3"}
_SETTINGS = ("r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # they leave the base weights alone
_PATTERNS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "feedforward_modules"),
    *("rank_pattern", "alpha_pattern"),
)
MOST_PATTERN, MOST_REPEATS = 100_000, 4  # characters; * + and {m,n} of one pattern
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_ENDINGS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_magnitude_vector(?:\.weight)?"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l)"
)


def compiled(pattern: str, where: str, whole: str | None = None) -> re.Pattern[str]:
    r"""``pattern`` of a configuration, or the expression ``whole`` that PEFT makes of it, ready to match.

    It comes from outside, and Python's matcher tries every way to read a name: a repetition of a group, or many
    repetitions, would take for ever. Names, ``|``, ``.*``, ``\d+`` and the like are all that adapters need.

    Raises:
        InputError: it is no pattern, or one that could take long.
    """
    repeats = len(_REPEATS.findall(pattern))
    if len(pattern) > MOST_PATTERN or _REPEATED_GROUP.search(pattern) or repeats > MOST_REPEATS:
        what = f"must be a plain pattern: no repeated group, at most {MOST_REPEATS} repetitions"
        raise InputError(where, what, got=repr(pattern[:80]), fix="name the layers one by one, with | between")
    try:
        return re.compile(pattern if whole is None else whole)
    except re.error as error:
        raise InputError(where, f"is no pattern: {error}", got=repr(pattern[:80])) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A PEFT folder; ``tensors`` are under PEFT's names without ``PREFIX``, floating-point ones in float32 or wider.

    ``where`` is the place that messages name, ``config`` what ``adapter_config.json`` holds.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Tensors

    def number(self, key: str, otherwise: float) -> float:
        """A number of the configuration, ``otherwise`` where it has none.

        Raises:
            InputError: it is no finite number.
        """
        table = ObjectReader(self.config, f"{self.where}/{CONFIG}", error=InputError)
        return table.number(key) if table.has(key) else otherwise

    def rank(self, module: str) -> int:
        """The rank of a module's adapter, 8 where the configuration says nothing.

        Raises:
            InputError: it is no whole number of at least 1.
        """
        rank = self.pattern("rank_pattern", module, self.number("r", 8))
        if rank < 1 or rank % 1:
            raise InputError(f"{self.where}: {module}", "needs a whole rank of at least 1", got=rank)
        return int(rank)

    def pattern(self, key: str, module: str, otherwise: float) -> float:
        """The value for ``module`` as PEFT finds it (``get_pattern_key`` in ``utils/other.py``): the first match.

        Raises:
            InputError: a pattern is no regular expression, or the value no finite number.
        """
        for pattern, value in (self.config.get(key) or {}).items():
            if compiled(pattern, f"{self.where}/{CONFIG}: {key}", rf"(.*\.)?({pattern})$").match(module):
                return Adapter(where=self.where, config={key: value}, tensors={}).number(key, otherwise)
        return otherwise

    def refusal(self, key: str, what: str, fix: str | None = None) -> InputError:
        """An error that names a key of the configuration and its value."""
        text = repr(self.config.get(key))
        return InputError(
            f"{self.where}/{CONFIG}: {key}", what, got=text if len(text) <= 80 else f"{text[:77]}...", fix=fix
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """What an adapter does to a backbone: ``method`` and ``settings`` are provenance."""

    updates: tuple[Targeted, ...]
    head: Head
    method: str
    settings: Mapping[str, object]


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder and refuse what is not known to fold.

    Raises:
        InputError: a file is missing or damaged, or the configuration asks for something else than LoRA, DoRA, LoKr or
            IA3 on unchanged base weights.
    """
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        fix = f"pass one adapter: {folder / inside[0]}" if inside else "pass what PeftModel.save_pretrained wrote"
        raise InputError(str(folder), f"holds no {CONFIG}", fix=fix)
    if not (folder / WEIGHTS).is_file():
        fix = "save it with safetensors: model.save_pretrained(DIR, safe_serialization=True)"
        pickled = (folder / PICKLE).is_file()
        what = (
            f"holds its weights only as a pickle, {PICKLE}, which is not opened" if pickled else f"holds no {WEIGHTS}"
        )
        raise InputError(str(folder), what, fix=fix)
    try:
        config = parse_json(read_file(folder / CONFIG))
    except (ValueError, RecursionError) as error:
        raise InputError(str(folder / CONFIG), "is no readable JSON", got=error) from error
    if not isinstance(config, dict):
        raise InputError(str(folder / CONFIG), "needs an object", got=type(config).__name__)
    adapter = Adapter(where=str(folder), config=config, tensors=_read_tensors(folder / WEIGHTS))
    _check_config(adapter)
    return adapter


def _read_tensors(path: Path) -> dict[str, NpArray]:
    tensors: dict[str, NpArray] = {}
    try:
        stored = cast(Any, safetensors).deserialize(read_file(path))
    except SafetensorError as error:
        raise InputError(str(path), "is no whole safetensors file", got=error, fix="copy it again, whole") from error
    for name, facts in stored:
        where = f"{path}: {name}"
        if facts["dtype"] not in _DTYPES:
            raise InputError(where, f"needs one of {', '.join(_DTYPES)}", got=facts["dtype"])
        if not name.startswith(PREFIX):
            raise InputError(where, f"needs a name that begins with {PREFIX}")
        array = np.frombuffer(facts["data"], _DTYPES[facts["dtype"]])
        if facts["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        array = (array.astype(np.float32) if facts["dtype"] == "F16" else array).reshape(facts["shape"])
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(where, "needs finite values")
        tensors[name.removeprefix(PREFIX)] = array
    return tensors


def _check_config(adapter: Adapter) -> None:
    config = adapter.config
    kind = config.get("peft_type")
    if kind not in _KNOWN:
        fix = "merge it in PEFT with merge_and_unload(): NAME@FILE takes the state dict as a backbone"
        raise adapter.refusal("peft_type", f"is one of {', '.join(_KNOWN)}", fix)
    for key, value in config.items():
        if key not in _KNOWN[kind] and value:
            raise adapter.refusal(key, "must be off: it does not fold, or is not known here", f"tune without {key}")
    if kind == "LORA" and config.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        fix = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...); add the classifier again"
        raise adapter.refusal("init_lora_weights", "changes the base weights, which the folder does not hold", fix)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise adapter.refusal(key, "needs an object")
    inner = config.get("feedforward_modules") or []
    if not isinstance(inner, str) and not (isinstance(inner, list) and all(isinstance(name, str) for name in inner)):
        raise adapter.refusal("feedforward_modules", "needs names or a pattern")
    for key in _PATTERNS:  # PEFT matches them too, when its answers are compared
        given = config.get(key) or ()
        for pattern in (given,) if isinstance(given, str) else given if isinstance(given, list | dict) else ():
            compiled(str(pattern), f"{adapter.where}/{CONFIG}: {key}")


# -------------------------------------------------------------------------------------------------------- lowering


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
    for name, given in modules.items():
        updates += _adapted(adapter, name, sites.get(name), given, moved)
    for targeted in updates:
        check(
            targeted, base[targeted.target.tensor].shape, where=adapter.where, fix="pass the backbone it was tuned on"
        )
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


_LOWERING: dict[str, Callable[[Adapter, Site, dict[str, NpArray], Tensors], list[Targeted]]] = {
    "LORA": _lora,
    "LOKR": _lokr,
    "IA3": _ia3,
}


def _float32(array: NpArray) -> NpArray:
    return np.ascontiguousarray(array, np.float32)
