"""What a PET method is: a frozen configuration that says where it goes, how it starts and how it lowers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from edgepet.deltas.branches import Branch, arrays_of
from edgepet.deltas.updates import Add, Push, Targeted, factors
from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned

Start: TypeAlias = Mapping[str, Mapping[str, NpArray]]
SHARED = "*"  # what tensors that belong to no one site are under
_BITS = {"f": 16, "b": 1, "i": 32}  # of one value in an fp16 pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Training defaults of a method: AdamW with a cosine after ``warmup`` (a fraction of all steps)."""

    lr: float
    head_lr: float = 2e-3
    weight_decay: float = 1e-4
    epochs: int = 8
    warmup: float = 0.1
    label_smoothing: float = 0.1


class Method(Protocol):
    """One method of the literature, or a baseline, as its own configuration (a frozen dataclass)."""

    name: ClassVar[str]
    paper: ClassVar[str]
    recipe: ClassVar[Recipe]
    starts_as_identity: ClassVar[bool]  # whether the model at step 0 computes what the backbone computes

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """The layers that this method acts on, in the backbone's order."""
        ...

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """The method's float32 tensors, by site and name; those that several sites share are under ``SHARED``."""
        ...

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """All trained tensors as updates of the backbone's tensors ``base``, which are of the library of ``tuned``.

        A method without ``forward`` is trained through its lowering: then only operators that NumPy and torch share.
        """
        ...


@runtime_checkable
class Branching(Protocol):
    """A method whose tensors cannot be folded, or not all of them."""

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """All trained tensors as branches, in the order in which they act; operators that NumPy and torch share."""
        ...


@runtime_checkable
class InUnits(Protocol):
    """A method some of whose tensors are learnt in other units than they act in, so that one rate suits all of them."""

    def units(self, sites: Sequence[Site], base: Tensors) -> Start:
        """By site and name what 1 of a learnt value is, powers of two in float32 of the tensor's shape; others are 1.

        Powers of two, so that what is learnt and what acts are the same number in every precision.
        """
        ...


class BranchesOnly:
    """The lowering of a method without any update."""

    __slots__ = ()

    def lower(self, base: Mapping[str, Array], sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """Nothing: the branches stay in the graph."""
        del base, sites, tuned
        return ()


@runtime_checkable
class ActivationPath(Protocol):
    """A method that computes its effect on activations, because that is faster than folding at every step.

    ``activation_kinds`` are the kinds of layers where that is so; at all others its updates are folded.
    """

    activation_kinds: ClassVar[tuple[str, ...]]

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        """The tuned layer's output for its input ``x`` and the frozen layer's output ``y``, both torch tensors.

        It has the shape of ``y``; neither is modified.
        """
        ...


def shift(site: Site, beta: Array) -> Targeted:
    """``beta`` (out,) added to what a layer puts out: in its bias, or taken off the mean of the batch norm behind it.

    The site must take a shift (``Site.takes_shift``).
    """
    if site.bias is not None:
        return Targeted(Target(site.bias), Add(beta))
    return Targeted(Target(str(site.mean)), Add(-beta))


def pushed(
    site: Site,
    c: Array,
    of: Literal["frozen", "updated"] = "frozen",
    *,
    rows: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> Targeted:
    """``scale`` W ``c``, what ``c`` (in,) at a layer's input adds to its output, where ``shift`` puts a constant.

    ``of`` says which W: the backbone's, or the one that all of its updates leave. ``rows`` of it alone are pushed into
    the same rows of the bias. The site must take a shift, and must not pad its input, with ``c`` in it, by zeros.
    """
    reads = Target(site.weight, rows)
    if site.bias is not None:
        return Targeted(Target(site.bias, rows), Push(c, reads, of, scale))
    return Targeted(Target(str(site.mean), rows), Push(c, reads, of, -scale))


def shift_units(sites: Sequence[Site], base: Tensors, *names: str) -> dict[str, dict[str, NpArray]]:
    """``InUnits.units`` of shifts called ``names``: in front of a batch norm, that norm's deviations, float32 (out,).

    A norm may divide by a thousandth of what others divide by, and a start or a rate that suits these drowns its layer.
    """
    return {site.name: dict.fromkeys(names, _deviation(site.mean, base)) for site in sites if site.mean is not None}


def _deviation(mean: str, base: Tensors) -> NpArray:
    """What the batch norm with this running mean divides by, as the nearest powers of two.

    Its epsilon is taken for 1e-5, torch's own: where it is larger a variance below it is learnt more slowly.
    """
    variance = np.maximum(base[f"{mean.removesuffix('mean')}var"], 0)
    return np.exp2(np.round(np.log2(variance + 1e-5) / 2)).astype(np.float32)


def count(method: Method, layers: Sequence[Site], base: Tensors) -> int:
    """Trainable values of ``method``, head left out."""
    start = method.start(method.sites(layers), base, np.random.default_rng(0))
    return sum(int(tensor.size) for tensors in start.values() for tensor in tensors.values())


def fp16_bytes(method: Method, layers: Sequence[Site], base: Tensors) -> int:
    """Bytes that ``method`` stores in an fp16 pack, head and manifest left out: bits are bits, shared tensors once."""
    sites = method.sites(layers)
    return fp16_size(
        a for _, a in stored_arrays(method, sites, base, method.start(sites, base, np.random.default_rng(0)))
    )


def stored_arrays(method: Method, sites: Sequence[Site], base: Tensors, tuned: Tuned) -> list[tuple[str, NpArray]]:
    """The arrays that a pack of ``method`` stores, each with what it is for: the target of an update, or a branch.

    One that several share is there for each of them.
    """
    updates = method.lower(base, sites, tuned)
    branches = method.branches(sites, tuned) if isinstance(method, Branching) else ()
    found = [(str(each.target), a) for each in updates for a in factors(each.update).values()]
    return found + [(f"{each.tap} {each.into}", a) for each in branches for a in arrays_of((each,))]


def fp16_size(arrays: Iterable[NpArray]) -> int:
    """Bytes of arrays in an fp16 pack, where one that is given twice is stored once."""
    return sum(math.ceil(a.size * _BITS[a.dtype.kind] / 8) for a in {id(a): a for a in arrays}.values())


def flatten(tuned: Tuned) -> dict[str, Array]:
    """``{"blocks.0.attn.qkv/gamma": ...}``: one level, as files and optimisers want it."""
    return {f"{site}/{name}": value for site, tensors in tuned.items() for name, value in tensors.items()}


def unflatten(flat: Mapping[str, Array], sites: Iterable[Site]) -> dict[str, dict[str, Array]]:
    """The inverse of ``flatten``, with an entry for every site."""
    nested: dict[str, dict[str, Array]] = {site.name: {} for site in sites}
    for key, value in flat.items():
        site, name = key.rsplit("/", 1)
        nested.setdefault(site, {})[name] = value
    return nested
