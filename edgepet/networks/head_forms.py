"""The heads for masks as they are trained, and what each lowers to: fewer layers that compute the same.

``linear`` is a product of one map, or of several. ``mlp`` is the decoder of SegFormer (Xie et al. 2021,
arXiv:2105.15203, section 3.2): a product of each map to one width, all resized to the finest, fused by another product,
batch norm, ReLU, classes. Products of products, statistics and batch norms are multiplied out when a head is lowered; a
product and bilinear resizing commute, so that maps are resized behind it, where they are narrow. ``separation`` is in
its own module. Needs ``train``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.heads import Answer, Map, MapHead, Step
from edgepet.deltas.layers import Activation, Add, Depthwise, Layer, Norm, Point, Resize
from edgepet.networks.head_settings import Form
from edgepet.networks.lowering import array_of, behind
from edgepet.networks.scores import TEMPERATURE, Language, Scores
from edgepet.networks.separation import Separated, Separation
from edgepet.spec import NpArray

LEAST_SCALE = 0.3  # of the root mean square of all channels' deviations
EPS = 1e-6  # of a layer norm, as ConvNeXt's and ViT's have it


class MapForm(nn.Module):
    """A head while it is trained: which maps it reads, and fixed statistics by which it sees each of their channels.

    ``answer`` is what the head answers, and the name that it is given.
    """

    answer: ClassVar[Answer]

    def __init__(self, form: Form, maps: Sequence[Map], classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.form, self.levels, self.classes, self._seed = form, form.of(maps), classes, seed
        for number, level in enumerate(self.levels):
            self.register_buffer(f"mean{number}", torch.zeros(level.channels))
            self.register_buffer(f"std{number}", torch.ones(level.channels))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the maps that it reads."""
        return tuple(level.name for level in self.levels)

    def reset(self) -> None:
        """Begin again; what maps are standardised by stays."""
        raise NotImplementedError

    def lower(self, name: str, labels: tuple[str, ...]) -> MapHead:
        """What it computes in eval mode as layers with float64 tensors; the form is not modified."""
        raise NotImplementedError

    def answered(self, head: MapHead, given: Mapping[str, NpArray]) -> NpArray:
        """What ``head``, which it was lowered to, gives for maps (n, C, h, w) by name, as the form itself gives it."""
        return head(given)

    def seen(self, level: int, x: Tensor) -> Tensor:
        """A map as it is before it is standardised, (n, C, h, w)."""
        if not self.form.norm:
            return x
        return functional.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=EPS).movedim(-1, 1)

    def standardized(self, level: int, x: Tensor) -> Tensor:
        """A map as the head's first layer reads it."""
        mean, std = (self.get_buffer(f"{kind}{level}")[:, None, None] for kind in ("mean", "std"))
        return (self.seen(level, x) - mean) / std

    def statistics(self, level: int) -> tuple[NpArray, NpArray]:
        """Mean and deviation (C,) by which a map is standardised, float64."""
        return array_of(self.get_buffer(f"mean{level}")), array_of(self.get_buffer(f"std{level}"))

    def standardize(self, means: Sequence[NpArray], deviations: Sequence[NpArray]) -> None:
        """Fix the statistics (C,) of each map that it reads, of what ``seen`` gives.

        A channel that hardly varies is divided by a floor, as features are (``tuning.model``).
        """
        for number, (mean, deviation) in enumerate(zip(means, deviations, strict=True)):
            least = LEAST_SCALE * float(np.sqrt(np.square(deviation).mean()))
            self.get_buffer(f"mean{number}").copy_(torch.from_numpy(np.asarray(mean)))
            self.get_buffer(f"std{number}").copy_(torch.from_numpy(np.maximum(deviation, least or 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Beside:
    """What is judged beside the logits of a mask while its head is trained: a ``separation``, and ``scores``.

    ``scores`` (n, classes, h, w) are cosines of places and text over their temperature.
    """

    separation: Separated | None = None
    scores: Tensor | None = None


class MaskForm(MapForm):
    """A head for masks while it is trained; maps (n, C, h, w) by name give logits (n, classes, h, w)."""

    answer: ClassVar[Answer] = "mask"

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Logits of maps by name."""
        return self.told(given)[0]

    def told(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Beside]:
        """Logits of maps by name, and what is judged beside them."""
        raise NotImplementedError


class HeadForm(MaskForm):
    """A head for masks while it is trained; maps (n, C, h, w) by name give logits (n, classes, h, w) of the finest.

    All tensors start as ``seed`` draws them, but those of the last product, which are zero: so is every logit.
    """

    def __init__(self, form: Form, maps: Sequence[Map], classes: int, *, seed: int = 0) -> None:
        super().__init__(form, maps, classes, seed=seed)
        width = form.width if form.name == "mlp" else classes
        self.laterals = nn.ModuleList([nn.Linear(level.channels, width, bias=False) for level in self.levels])
        if form.name == "mlp":
            self.fuse = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in self.levels])
            self.fused = nn.BatchNorm2d(width)
            if form.depthwise:
                self.grid = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
                self.gridded = nn.BatchNorm2d(width)
                self.mix = nn.Conv2d(width, width, 1, bias=False)
                self.mixed = nn.BatchNorm2d(width)
            self.last = nn.Conv2d(width, classes, 1)
            self.separation = Separation(width, classes) if form.separation else None
        else:
            self.shift = nn.Parameter(torch.zeros(classes))
        self.language = nn.ModuleList(
            [Language(level.channels, form.table, form.language) for level in self.levels if form.language]
        )
        self.aligned = Scores(self.levels[-1:], form.table) if form.language and form.aux else None
        self.reset()

    def reset(self) -> None:
        """Begin again; what maps are standardised by stays."""
        rng = np.random.default_rng(self._seed)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim > 1 and not name.startswith(("language.", "aligned.")):
                    fan = parameter[0].numel() * (len(self.levels) if name.startswith("fuse.") else 1)
                    drawn = rng.normal(0, (1 if "lateral" in name else 2) ** 0.5 / fan**0.5, tuple(parameter.shape))
                    parameter.copy_(torch.from_numpy(drawn))
            if self.form.name == "linear":
                for lateral in self.laterals:
                    nn.init.zeros_(cast(nn.Linear, lateral).weight)
                nn.init.zeros_(self.shift)
            else:
                nn.init.zeros_(self.last.weight)
                nn.init.zeros_(cast(nn.Parameter, self.last.bias))
                if self.separation is not None:
                    self.separation.begin()
        for module in (*self.language, *([] if self.aligned is None else [self.aligned])):
            cast(Language | Scores, module).begin(rng)

    def told(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Beside]:
        """As of ``MaskForm``: a separation, and with ``language`` how the last map is like the text."""
        seen = [self.standardized(number, given[level.name]) for number, level in enumerate(self.levels)]
        scores = None if self.aligned is None else self.aligned(seen[-1:]) / TEMPERATURE
        total = self._level(0, seen[0])
        for number in range(1, len(seen)):
            total = total + self._level(number, seen[number])
        if self.form.name == "linear":
            return total + self.shift[:, None, None], Beside(scores=scores)
        hidden = functional.relu(self.fused(total))
        if self.form.depthwise:
            hidden = functional.relu(self.gridded(self.grid(hidden)))
            hidden = functional.relu(self.mixed(self.mix(hidden)))
        if self.separation is None:
            return cast(Tensor, self.last(hidden)), Beside(scores=scores)
        separated: Separated = self.separation(hidden)
        return self.last(separated.maps) + separated.logits, Beside(separation=separated, scores=scores)

    def _level(self, number: int, x: Tensor) -> Tensor:
        if self.form.language:
            x = self.language[number](x)
        y = functional.conv2d(x, cast(Tensor, self.laterals[number].weight)[:, :, None, None])
        if self.form.name == "mlp":
            y = functional.conv2d(y, cast(Tensor, self.fuse[number].weight)[:, :, None, None])
            if self.separation is not None and number == 0:
                y = self.separation.rough(y)
        factor = self.levels[0].height // self.levels[number].height
        return y if factor == 1 else functional.interpolate(y, scale_factor=factor, mode="bilinear")

    # ------------------------------------------------------------------------------------------------------- lowering

    def lower(self, name: str, labels: tuple[str, ...]) -> MapHead:
        """As of ``MapForm``."""
        return MapHead(name=name, answer="mask", labels=labels, steps=tuple(self.lowered()))

    def lowered(self) -> list[Step]:
        """Its layers, from maps to "logits"."""
        products, biases = self._products()
        if self.form.name == "linear":
            return self._summed(products, biases, array_of(self.shift), last="logits")
        scale, shift = _folded(self.fused)
        products, biases = [scale[:, None] * each for each in products], [scale * each for each in biases]
        rough = None if self.separation is None else self.separation.lowered_rough()
        steps = self._summed(products, biases, shift, last="fused", rough=rough)
        steps.append(Step(layer=Activation("relu"), reads=("fused",), gives="hidden"))
        if self.form.depthwise:
            scale, shift = _folded(self.gridded)
            steps.append(
                behind(steps, Depthwise(scale[:, None, None] * array_of(self.grid.weight)[:, 0], shift), "grid")
            )
            steps.append(behind(steps, Activation("relu"), "gridded"))
            scale, shift = _folded(self.mixed)
            steps.append(behind(steps, Point(scale[:, None] * array_of(self.mix.weight)[:, :, 0, 0], shift), "mix"))
            steps.append(behind(steps, Activation("relu"), "mixed"))
        last = Point(array_of(self.last.weight)[:, :, 0, 0], array_of(cast(Tensor, self.last.bias)))
        if self.separation is None or rough is None:
            steps.append(behind(steps, last, "logits"))
        else:
            steps += self.separation.lower(steps[-1].gives, last, rough)
        return steps

    def _products(self) -> tuple[list[NpArray], list[NpArray]]:
        """Each map's product, (width, C), standardisation and fusion within, and its constant, (width,)."""
        products, biases = [], []
        for number, lateral in enumerate(self.laterals):
            product = array_of(cast(Tensor, lateral.weight)) / array_of(self.get_buffer(f"std{number}"))
            if self.form.name == "mlp":
                product = array_of(cast(Tensor, self.fuse[number].weight)) @ product
            products.append(product)
            biases.append(-product @ array_of(self.get_buffer(f"mean{number}")))
        return products, biases

    def _summed(
        self, products: Sequence[NpArray], biases: Sequence[NpArray], shift: NpArray, *, last: str,
        rough: Layer | None = None,
    ) -> list[Step]:  # fmt: skip
        """From maps to the sum of their products at the finest stride, and ``shift``.

        All constants are added where places are fewest, but for that of the finest map where its product goes through
        ``rough``: zeros around it are none of its constants.
        """
        own = {} if rough is None else {0: biases[0]}
        own[len(products) - 1] = shift + np.sum(biases[len(own) :], axis=0)
        steps, parts, count = list[Step](), list[str](), len(products)
        for number, (level, product) in enumerate(zip(self.levels, products, strict=True)):
            read, made = level.name, last if count == 1 else f"level_{number}"
            if self.form.norm:
                steps.append(Step(layer=Norm(eps=EPS), reads=(read,), gives=f"norm_{number}"))
                read = f"norm_{number}"
            steps += self._product(number, product, own.get(number), read, made)
            if rough is not None and number == 0:
                steps.append(behind(steps, rough, "local"))
                made = "local"
            factor = self.levels[0].height // level.height
            if factor > 1:
                steps.append(Step(layer=Resize(factor), reads=(made,), gives=f"up_{number}"))
                made = f"up_{number}"
            parts.append(made)
        return steps if count == 1 else [*steps, Step(layer=Add(), reads=tuple(parts), gives=last)]

    def _product(self, number: int, product: NpArray, constant: NpArray | None, read: str, gives: str) -> list[Step]:
        """One map's product, what of it is told by text within."""
        if not self.form.language:
            return [Step(layer=Point(product, constant), reads=(read,), gives=gives)]
        return cast(Language, self.language[number]).steps(product, constant, self.statistics(number), read, gives)


def _folded(norm: nn.BatchNorm2d) -> tuple[NpArray, NpArray]:
    """Factor and shift (C,) of a batch norm in eval mode."""
    mean, variance = (array_of(cast(Tensor, each)) for each in (norm.running_mean, norm.running_var))
    scale = array_of(norm.weight) / np.sqrt(variance + norm.eps)
    return scale, array_of(norm.bias) - scale * mean
