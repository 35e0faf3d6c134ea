"""Conv-Adapter: a grouped convolution and a 1 x 1 beside or behind the convolutions of a ConvNet.

Chen et al. 2022, "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv:2208.07463,
section 3.2 and figure 3: a * point(act(conv(x))), the convolution in C / reduction groups of ``reduction`` channels,
and four schemes of what it reads and where it is added. In a Swin it reads what the first norm of a block puts out, as
a map, through a 7 x 7 convolution, and is added behind attention, as the official code has it
(``models/backbones/swin_transformer.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, NamedTuple

import numpy as np

from edgepet.deltas.branches import Branch
from edgepet.errors import InputError
from edgepet.methods.method import BranchesOnly, Recipe, Start
from edgepet.methods.starts import uniform
from edgepet.spec import Block, NpArray, Site, Tensors, Tuned

SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")
# The k x k convolution of a block, and behind which of the block's modules it counts as done, by what the block holds.
_HOSTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("conv_dw", "norm", "mlp"), "conv_dw", "conv_dw"),  # ConvNeXt
    (("conv2", "act2", "conv3"), "conv2", "act2"),  # a ResNet's bottleneck: behind batch norm and ReLU
    (("conv1", "conv2", "bn2"), "conv2", "bn2"),  # a ResNet's basic block
    (("conv_pw", "conv_dw", "bn2", "conv_pwl"), "conv_dw", "bn2"),  # an inverted residual; bn2 has its activation
    (("conv_dw", "bn1", "conv_pw"), "conv_dw", "bn1"),
    (("conv_exp", "bn1", "conv_pwl"), "conv_exp", "bn1"),
    (("conv", "bn1"), "conv", "bn1"),
)
_WINDOWED, _WINDOWED_SIDE = ("norm1", "attn", "drop_path1", "norm2", "mlp"), 7  # a Swin's block, and its kernel


class _Place(NamedTuple):
    tap: str
    into: str
    reads: int
    gives: int
    side: int
    stride: int
    padding: int
    dilation: int
    last: bool = False  # channels come last


@dataclass(frozen=True, slots=True)
class ConvAdapter(BranchesOnly):
    """One adapter for every block's k x k convolution or residual, and beside a ConvNeXt's downsampling in parallel.

    Beside the attention of a block on maps (H, W, C), as a Swin has it, it goes in "conv-parallel" alone.

    ``reduction`` is the paper's gamma: input channels of a group, the largest divisor of the channels not above it. The
    trained factor a of every output channel is folded into the 1 x 1. Statistics of batch norms stay as they are.

    Raises:
        InputError: ``reduction`` is below 1, or ``scheme`` is none of ``SCHEMES``.
    """

    reduction: int = 8
    scheme: str = "conv-parallel"

    name: ClassVar[str] = "conv-adapter"
    paper: ClassVar[str] = "Chen et al. 2022, arXiv:2208.07463"
    recipe: ClassVar[Recipe] = Recipe(lr=5e-4)
    starts_as_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise InputError(self.name, "needs a reduction of at least 1", got=self.reduction)
        if self.scheme not in SCHEMES:
            raise InputError(self.name, f"knows the schemes {', '.join(SCHEMES)}", got=repr(self.scheme))

    def sites(self, layers: Sequence[Site]) -> tuple[Site, ...]:
        """Blocks on maps (C, H, W) with a k x k convolution that is known, and those convolutions, their hosts.

        "conv-parallel" also takes a ConvNeXt's downsampling convolutions, and blocks of attention on maps (H, W, C). A
        host has no tensors of its own.
        """
        blocks = [site for site in layers if isinstance(site, Block) and site.on_maps and _host(site)]
        found = {block.name: _convolution(block, layers) for block in blocks if self._reaches(block)}
        hosts = {block: conv.name for block, conv in found.items() if conv is not None}
        # A parallel adapter copies its host's convolution, so that the convolutions themselves are the sites.
        return tuple(
            site
            for site in layers
            if (site.kind == "block" and site.name in hosts)
            or (site.kind == "conv" and site.name in hosts.values())
            or (self.scheme == "conv-parallel" and (_downsamples(site) or _windowed(site, layers)))
        )

    def start(self, sites: Sequence[Site], base: Tensors, rng: np.random.Generator) -> Start:
        """``conv`` and ``point`` as convolutions start, ``factor`` one, for each block and downsampling convolution.

        ``conv.weight`` (in / g, g, k, k) and ``conv.bias`` (in / g,), with g channels in a group and k the side of the
        host's kernel; ``point.weight`` (out, in / g, 1, 1), ``point.bias`` (out,) and ``factor`` (out,).

        Raises:
            InputError: a block holds no convolution that is known; ``sites`` has none such.
        """
        del base
        return {name: self._start(place, rng) for name, place in self._places(sites).items()}

    def _start(self, place: _Place, rng: np.random.Generator) -> dict[str, NpArray]:
        group = next(n for n in range(min(self.reduction, place.reads), 0, -1) if place.reads % n == 0)
        inner, bound = place.reads // group, (group * place.side**2) ** -0.5
        return {
            "conv.weight": uniform(rng, bound, inner, group, place.side, place.side),  # as a convolution starts
            "conv.bias": uniform(rng, bound, inner),
            "point.weight": uniform(rng, inner**-0.5, place.gives, inner, 1, 1),
            "point.bias": uniform(rng, inner**-0.5, place.gives),
            "factor": np.ones(place.gives, np.float32),
        }

    def branches(self, sites: Sequence[Site], tuned: Tuned) -> tuple[Branch, ...]:
        """A "conv-pair" branch for each block and downsampling convolution; GELU in a ConvNeXt, else ReLU.

        "conv-parallel" reads what goes into the host and adds behind it, or behind its batch norm and activation where
        they follow; in a Swin it reads what attention does and adds behind that, a "conv-pair-last". "conv-sequential"
        reads and adds there. "residual-parallel" reads what goes into the block and adds to what it puts out;
        "residual-sequential" reads that and adds to it. ``factor`` is folded into ``point``.

        Raises:
            InputError: as ``start``.
        """
        blocks = [site for site in sites if isinstance(site, Block)]
        gelu = any(site.has("conv_dw", "norm", "mlp") or not site.on_maps for site in blocks)
        made = []
        for name, place in self._places(sites).items():
            own, factor = tuned[name], tuned[name]["factor"]
            made.append(
                Branch(
                    kind="conv-pair-last" if place.last else "conv-pair",
                    tap=place.tap,
                    into=place.into,
                    settings={
                        "stride": place.stride,
                        "padding": place.padding,
                        "dilation": place.dilation,
                        "activation": "gelu" if gelu else "relu",
                    },
                    tensors={
                        "conv.weight": own["conv.weight"],
                        "conv.bias": own["conv.bias"],
                        "point.weight": factor.reshape(-1, 1, 1, 1) * own["point.weight"],
                        "point.bias": factor * own["point.bias"],
                    },
                )
            )
        return tuple(made)

    def _places(self, sites: Sequence[Site]) -> dict[str, _Place]:
        """What every adapter reads, where it is added and its shapes, by the site that it belongs to."""
        places: dict[str, _Place] = {}
        for site in sites:
            if isinstance(site, Block) and not site.on_maps:
                channels, side = site.points["norm1:out"][-1], _WINDOWED_SIDE
                tap, into = (_inside(site, point) for point in ("norm1:out", "drop_path1:out"))
                places[site.name] = _Place(tap, into, channels, channels, side, 1, side // 2, 1, last=True)
            elif isinstance(site, Block) and (conv := _convolution(site, sites)):
                places[site.name] = self._place(site, conv)
            elif self.scheme == "conv-parallel" and _downsamples(site):
                reads = site.in_features * site.groups
                points = f"{site.name}:in", f"{site.name}:out"
                places[site.name] = _Place(*points, reads, site.out_features, isqrt(site.taps), site.stride, 0, 1)
        return places

    def _ends(self, block: Block) -> tuple[str, str]:
        """The block's points that an adapter reads and adds to."""
        _, host, behind = _host_of(block)
        return {
            "conv-parallel": (f"{host}:in", f"{behind}:out"),
            "conv-sequential": (f"{behind}:out", f"{behind}:out"),
            "residual-parallel": (":in", ":out"),
            "residual-sequential": (":out", ":out"),
        }[self.scheme]

    def _reaches(self, block: Block) -> bool:
        """Whether maps flow through both ends: a block may put out several tensors."""
        return all(len(block.points.get(point, ())) == 3 for point in self._ends(block))

    def _place(self, block: Block, conv: Site) -> _Place:
        side, dilation = isqrt(conv.taps), conv.dilation
        tap, into = self._ends(block)
        reads, gives = block.points[tap], block.points[into]
        stride, padding = -(-reads[1] // gives[1]), dilation * (side // 2)
        return _Place(_inside(block, tap), _inside(block, into), reads[0], gives[0], side, stride, padding, dilation)


def _convolution(block: Block, layers: Sequence[Site]) -> Site | None:
    """The block's host, or the one convolution in it; split attention holds several, a standardised one is no layer."""
    host = f"{block.name}.{_host_of(block)[1]}"
    found = [site for site in layers if site.kind == "conv" and f"{site.name}.".startswith(f"{host}.")]
    return found[0] if len(found) == 1 else None


def _inside(block: Block, point: str) -> str:
    return f"{block.name}{point}" if point.startswith(":") else f"{block.name}.{point}"


def _windowed(site: Site, layers: Sequence[Site]) -> bool:
    """Whether it is a block of attention on maps (H, W, C) whose first norm is in front of the attention."""
    if not isinstance(site, Block) or site.on_maps or not site.has(*_WINDOWED):
        return False
    shapes = {site.points.get(point, ()) for point in ("norm1:out", "drop_path1:out", ":out")}
    inner = [
        each.name.removeprefix(f"{site.name}.")
        for each in layers
        if each.operates and each.name.startswith(f"{site.name}.")
    ]
    ordered = (
        "norm1" in inner and next(name for name in inner if name == "norm1" or name.startswith("attn.")) == "norm1"
    )
    return len(shapes) == 1 and len(shapes.pop()) == 3 and ordered


def _downsamples(site: Site) -> bool:
    return site.kind == "conv" and site.stride > 1 and site.taps == site.stride**2 and ".downsample." in site.name


def _host(block: Block) -> tuple[tuple[str, ...], str, str] | None:
    return next((host for host in _HOSTS if block.has(*host[0])), None)


def _host_of(block: Block) -> tuple[tuple[str, ...], str, str]:
    host = _host(block)
    if host is None:
        raise InputError(block.name, "has no convolution that conv-adapter knows")
    return host
