"""What a PET method is: a frozen configuration that says where it goes, how it starts and how it lowers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from edgepet.spec import Array, NpArray, Site, Target, Tensors, Tuned
from edgepet.updates import Add, Targeted


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

    def start(self, site: Site, base: Tensors, rng: np.random.Generator) -> Mapping[str, NpArray]:
        """The method's float32 tensors for one site, by name."""
        ...

    def lower(self, base: Tensors, sites: Sequence[Site], tuned: Tuned) -> tuple[Targeted, ...]:
        """All trained tensors as updates of the backbone's tensors.

        A method without ``forward`` is trained through its lowering: then only operators that NumPy and torch share.
        """
        ...


@runtime_checkable
class ActivationPath(Protocol):
    """A method that computes its effect on activations, because that is faster than folding at every step.

    ``activation_kinds`` are the kinds of layers where that is so; at all others its updates are folded.
    """

    activation_kinds: ClassVar[tuple[str, ...]]

    def forward(self, site: Site, x: Array, y: Array, tuned: Mapping[str, Array], *, training: bool) -> Array:
        """The tuned layer's output for its input ``x`` and the frozen layer's output ``y``, both torch tensors."""
        ...


def shift(site: Site, beta: Array) -> Targeted:
    """``beta`` (out,) added to what a layer puts out: in its bias, or taken off the mean of the batch norm behind it.

    The site must take a shift (``Site.takes_shift``).
    """
    if site.bias is not None:
        return Targeted(Target(site.bias), Add(beta))
    return Targeted(Target(str(site.mean)), Add(-beta))


def count(method: Method, layers: Sequence[Site], base: Tensors) -> int:
    """Trainable values of ``method``, head left out."""
    rng = np.random.default_rng(0)
    return sum(int(t.size) for site in method.sites(layers) for t in method.start(site, base, rng).values())


def flatten(tuned: Tuned) -> dict[str, Array]:
    """``{"blocks.0.attn.qkv/gamma": ...}``: one level, as files and optimisers want it."""
    return {f"{site}/{name}": value for site, tensors in tuned.items() for name, value in tensors.items()}


def unflatten(flat: Mapping[str, Array], sites: Iterable[Site]) -> dict[str, dict[str, Array]]:
    """The inverse of ``flatten``, with an entry for every site."""
    nested: dict[str, dict[str, Array]] = {site.name: {} for site in sites}
    for key, value in flat.items():
        site, name = key.rsplit("/", 1)
        nested[site][name] = value
    return nested
