"""A PEFT adapter folder as it is on disk: ``adapter_config.json`` and ``adapter_model.safetensors``.

Whatever is not known to fold is refused by the key of the configuration that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
from safetensors import SafetensorError

from edgepet.canonical import parse_json
from edgepet.errors import InputError
from edgepet.files import read_file
from edgepet.spec import NpArray, Tensors
from edgepet.strict import ObjectReader

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TUNER = "base_model."  # PeftModel's tuner, which has what all modules share: VeRA's A and B
PREFIX = f"{TUNER}model."  # of every other tensor: the tuner's .model is the network

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
    "VERA": (*_EVERY, "vera_dropout", "d_initial", "save_projection", "projection_prng_key", "bias", "init_weights"),
    "HIRA": (*_EVERY, "hira_dropout", "init_weights"),
    "GLORA": (*_EVERY, "bias", "config_A_B", "config_C", "config_D_E", "init_weights"),
}  # fmt: skip
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")  # they leave the base weights alone
_SHARED = ("vera_A", "vera_B")
_ELSEWHERE = {"UNILORA": "shuffles its values with NumPy's generator, whose order a pack does not repeat"}
_PATTERNS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "feedforward_modules"),
    *("rank_pattern", "alpha_pattern"),
)
MOST_PATTERN, MOST_REPEATS = 100_000, 4  # characters; * + and {m,n} of one pattern
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPEATS = re.compile(r"(?<!\\)[*+{]")


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

    ``shared`` are those of all modules together, without ``TUNER``. ``where`` is the place that messages name,
    ``config`` what ``adapter_config.json`` holds.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Tensors
    shared: Tensors = field(default_factory=dict)

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


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder and refuse what is not known to fold.

    Raises:
        InputError: a file is missing or damaged, or the configuration asks for something else than LoRA, DoRA, LoKr,
            IA3, VeRA, HiRA or GLoRA on unchanged base weights.
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
    tensors = _read_tensors(folder / WEIGHTS)
    shared = {name: tensors.pop(name) for name in _SHARED if name in tensors}
    adapter = Adapter(where=str(folder), config=config, tensors=tensors, shared=shared)
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
        if not name.startswith(PREFIX) and name.removeprefix(TUNER) not in _SHARED:
            raise InputError(where, f"needs a name that begins with {PREFIX}")
        array = np.frombuffer(facts["data"], _DTYPES[facts["dtype"]])
        if facts["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        array = (array.astype(np.float32) if facts["dtype"] == "F16" else array).reshape(facts["shape"])
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(where, "needs finite values")
        tensors[name.removeprefix(PREFIX if name.startswith(PREFIX) else TUNER)] = array
    return tensors


def _check_config(adapter: Adapter) -> None:
    config = adapter.config
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        fix = "merge it in PEFT with merge_and_unload(): NAME@FILE takes the state dict as a backbone"
        raise adapter.refusal("peft_type", _ELSEWHERE.get(str(kind), f"is one of {', '.join(_KNOWN)}"), fix)
    for key, value in config.items():
        if key not in _KNOWN[kind] and value:
            raise adapter.refusal(key, "must be off: it does not fold, or is not known here", f"tune without {key}")
    if kind == "LORA" and config.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        fix = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...); add the classifier again"
        raise adapter.refusal("init_lora_weights", "changes the base weights, which the folder does not hold", fix)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise adapter.refusal(key, "needs an object")
    _check_shared(adapter)
    inner = config.get("feedforward_modules") or []
    if not isinstance(inner, str) and not (isinstance(inner, list) and all(isinstance(name, str) for name in inner)):
        raise adapter.refusal("feedforward_modules", "needs names or a pattern")
    for key in _PATTERNS:  # PEFT matches them too, when its answers are compared
        given = config.get(key) or ()
        for pattern in (given,) if isinstance(given, str) else given if isinstance(given, list | dict) else ():
            compiled(str(pattern), f"{adapter.where}/{CONFIG}: {key}")


def _check_shared(adapter: Adapter) -> None:
    """VeRA's A and B are there, and nothing of the kind where the configuration is another's."""
    wanted, got = (_SHARED if adapter.config["peft_type"] == "VERA" else ()), tuple(adapter.shared)
    if wanted and not adapter.config.get("save_projection", True):
        what = "must be true: else A and B come from torch's generator, whose numbers are not promised"
        raise adapter.refusal("save_projection", what, "tune with save_projection=True, as PEFT does by itself")
    if got != wanted:
        what = f"needs {' and '.join(wanted)} beside its modules" if wanted else "is not VeRA, and has no place for it"
        raise InputError(f"{adapter.where}/{WEIGHTS}", what, got=", ".join(got) or "none")
    for name, matrix in adapter.shared.items():
        if matrix.ndim != 2:
            raise InputError(f"{adapter.where}/{WEIGHTS}: {name}", "needs a matrix", got=matrix.shape)
