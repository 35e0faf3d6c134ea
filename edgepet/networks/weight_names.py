"""How others call timm's tensors: prefixes of wrappers, and transformers' ViT with query, key and value apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TypeVar

from edgepet.errors import InputError

T = TypeVar("T")

# Parts that wrappers put anywhere into a name: torch.compile, FSDP, activation checkpointing.
_INSIDE = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|teacher|momentum|target)(?=[._])")
_WRAPPERS = re.compile(r"(?:module|model|net|network|backbone)\.")
_ENOUGH = 0.9  # of the network's names below one prefix; fewer are those of other code, which timm may know to convert
_MOST_NAMED = 6  # prefixes in a message


def unwrapped(state: Mapping[str, T], names: Set[str], where: str) -> dict[str, T]:
    """``state`` under the network's own ``names``: without what DataParallel, torch.compile or Lightning put before.

    Where one prefix has the network, what lies beside it is no part of the network and is left out. Of an average (EMA,
    a teacher) and what it averages, the average is taken.

    Raises:
        InputError: several prefixes have the network, and none or several are averages.
    """
    plain = {_INSIDE.sub("", name): value for name, value in state.items()}
    counts = Counter(prefix for name in plain for prefix in prefixes(name, names))
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    if "" in best or most < _ENOUGH * len(names):
        return _without_wrappers(plain) if counts[""] == 0 else _without_decoder(plain, names)
    if len(best) > 1:
        best = [prefix for prefix in best if _AVERAGED.search(prefix)] or best
    if len(best) > 1:
        fix = 'save the one you mean by itself: torch.save(model.state_dict(), "weights.pth")'
        got = ", ".join(f"{prefix}*" for prefix in sorted(best)[:_MOST_NAMED])
        raise InputError(where, "holds several networks of these names", got=got, fix=fix)
    return {name.removeprefix(best[0]): value for name, value in plain.items() if name.startswith(best[0])}


def _without_decoder(state: dict[str, T], names: Set[str]) -> dict[str, T]:
    """A masked autoencoder's encoder, where all of it is there: MAE keeps its decoder beside it."""
    decoder = any(name.startswith("decoder") for name in state.keys() - names)
    if not decoder or names - state.keys():
        return state
    return {name: value for name, value in state.items() if not name.startswith(("decoder", "mask_token"))}


def prefixes(name: str, names: Collection[str]) -> Iterable[str]:
    """What may stand before one of ``names`` in ``name``, dot included."""
    ends = [0, *(at.end() for at in re.finditer(r"\.", name))]
    return [name[:end] for end in ends if name[end:] in names]


def _without_wrappers(state: dict[str, T]) -> dict[str, T]:
    """Names of another code, which timm may know to convert: only what all of them begin with is taken off."""
    while state:
        first = next(iter(state))
        match = _WRAPPERS.match(first)
        if match is None or not all(name.startswith(match[0]) for name in state):
            break
        state = {name[match.end() :]: value for name, value in state.items()}
    return state


# ---------------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of timm's network, or one of three equal blocks of its rows: query 0, key 1, value 2."""

    name: str
    part: int | None = None


@dataclass(frozen=True, slots=True)
class _Spelling:
    """One of transformers' ways to name a ViT: ``leaves`` has the modules of a block, timm's -> theirs."""

    block: str
    leaves: Mapping[str, tuple[str, ...]]


_APART = {  # the attention's layers, of releases 4 and 5
    4: ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
    5: ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
}
_ATTENTION = {n: {"attn.qkv": given[:3], "attn.proj": given[3:]} for n, given in _APART.items()}
_NORMS = {"norm1": ("layernorm_before",), "norm2": ("layernorm_after",)}
_MLP = {"mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)}
_OLD_MLP = {"mlp.fc1": ("intermediate.dense",), "mlp.fc2": ("output.dense",)}
_DINO = {**_MLP, "norm1": ("norm1",), "norm2": ("norm2",), "ls1": ("layer_scale1",), "ls2": ("layer_scale2",)}
_SPELLINGS = (  # ViT and DeiT, then DINOv2; read off models of transformers 4.57 and 5.24
    _Spelling("encoder.layer.", {**_ATTENTION[4], **_NORMS, **_OLD_MLP}),
    _Spelling("layers.", {**_ATTENTION[5], **_NORMS, **_MLP}),
    _Spelling("encoder.layer.", {**_ATTENTION[4], **_DINO}),
    _Spelling("encoder.layer.", {**_ATTENTION[5], **_DINO}),
)
_MODULES = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
}
_UNUSED = re.compile(r"(?:.+\.)?(?:embeddings\.mask_token|pooler\.dense\..+|(?:cls_|distillation_)?classifier\..+)")
_ROOT = re.compile(r"((?:[^.]+\.)*?)(?:encoder\.layer|layers)\.\d+\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def transformers_names(theirs: Collection[str], ours: Collection[str], head: str = "head") -> dict[str, Part]:
    """What transformers' ViT, DeiT or DINOv2 calls the tensors ``ours`` of a timm network: its names -> timm's.

    The release, and what stands before, are those that most of the names ``theirs`` agree with. Nothing where none
    does, or where the network has tensors that these have not. Its ``classifier`` is timm's ``head``.
    """
    given = set(theirs)
    roots = sorted({match[1] for name in given if (match := _ROOT.match(name))})
    options = [_spelled(spelling, root, ours, head) for root in roots for spelling in _SPELLINGS]
    best = max(options, key=lambda option: len(option.keys() & given), default={})
    return best if best.keys() & given else {}


def _spelled(spelling: _Spelling, root: str, ours: Iterable[str], head: str) -> dict[str, Part]:
    above = root.rstrip(".").rpartition(".")
    found = {f"{above[0]}{above[1]}classifier.{kind}": Part(f"{head}.{kind}") for kind in ("weight", "bias")}
    for name in ours:
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(module)
        if name in _TOKENS:
            found[root + _TOKENS[name]] = Part(name)
        elif module in _MODULES:
            found[f"{root}{_MODULES[module]}.{kind}"] = Part(name)
        elif block and block[2] in spelling.leaves:
            leaves = spelling.leaves[block[2]]
            kind = "lambda1" if kind == "gamma" else kind
            for number, leaf in enumerate(leaves):
                part = Part(name, number if len(leaves) > 1 else None)
                found[f"{root}{spelling.block}{block[1]}.{leaf}.{kind}"] = part
        else:
            return {}
    return found


def of_transformers(state: Mapping[str, T], ours: Collection[str]) -> dict[str, tuple[T, ...]] | None:
    """``state`` of transformers' ViT under timm's names: parts in order, one or three; None where it is none of these.

    What timm has no place for and no need of (a pooler, a mask token, a classifier) is left out. Other names stay.
    """
    spelled = transformers_names(state, ours)
    if 2 * len(spelled.keys() & state.keys()) < len(spelled) or not spelled:
        return None
    found: dict[str, tuple[T, ...]] = {name: (value,) for name, value in state.items()
                                       if name not in spelled and not _UNUSED.fullmatch(name)}  # fmt: skip
    for theirs, part in spelled.items():  # in the order of query, key and value
        if theirs in state and part.name in ours:
            found[part.name] = (*found.get(part.name, ()), state[theirs])
    return found
