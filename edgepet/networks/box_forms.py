"""The detector as it is trained, and the layers that it lowers to.

FCOS (Tian et al. 2019, arXiv:1904.01355) with little to carry: a product of each map to one width, summed from coarse
to fine, two towers that all levels share, each of depthwise 3 x 3 convolutions, products and ReLU, without group norm,
which does not fold. Of a plain transformer's maps, whose stride is one, the products are summed first: the finer level
is their sum resized, the coarser one its maxima, as in ViTDet (Li et al. 2022, arXiv:2203.16527). Needs ``train``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepet.deltas.detection import BESIDE, SIDES, Detect
from edgepet.deltas.heads import Answer, Map, MapHead, Step
from edgepet.deltas.layers import Activation, Add, Depthwise, Norm, Point, Pool, Resize
from edgepet.networks.head_forms import EPS, MapForm
from edgepet.networks.head_settings import Form
from edgepet.networks.lowering import array_of, behind
from edgepet.networks.scores import TEMPERATURE, Language, Scores
from edgepet.spec import NpArray

RARE = 0.01  # the score that every class has everywhere before anything is learnt: objects are rare
TOWERS = ("class", "box")


class BoxForm(MapForm):
    """A detector while it is trained; maps (n, C, h, w) by name give (n, classes + 5, places) of all levels.

    The channels are the logits of classes, four distances before ``reaches``, and how central a place is; places are
    those of the finest level first, row by row. All tensors start as ``seed`` draws them: a class's score as RARE,
    distances as one stride.
    """

    answer: ClassVar[Answer] = "boxes"

    def __init__(self, form: Form, maps: Sequence[Map], classes: int, *, seed: int = 0) -> None:
        super().__init__(form, maps, classes, seed=seed)
        self.sizes, self.stride = form.levels(self.levels)
        width = form.width
        self.laterals = nn.ModuleList([nn.Conv2d(level.channels, width, 1, bias=False) for level in self.levels])
        sums = 1 if self.plain else len(self.levels)
        self.shifts = nn.Parameter(torch.zeros(sums, width))
        for tower in TOWERS:
            layers = [
                layer
                for _ in range(form.depth)
                for layer in (
                    nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1), nn.ReLU(),
                )
            ]  # fmt: skip
            self.add_module(tower, nn.Sequential(*layers))
        self.language = nn.ModuleList(
            [Language(level.channels, form.table, form.language) for level in self.levels if form.language]
        )
        scored = form.scores or (form.language and form.aux)
        last = self.levels[-1:]
        self.scores = Scores(last, form.table, layers=form.context, inner=form.inner) if scored else None
        self.scored = nn.Conv2d(classes, width, 1, bias=False) if form.scores else None
        self.what, self.where = nn.Conv2d(width, classes, 1), nn.Conv2d(width, BESIDE, 1)
        self.scales = nn.Parameter(torch.ones(len(self.sizes)))
        self.reset()

    @property
    def plain(self) -> bool:
        """Whether all maps that it reads have one stride, as a plain transformer's."""
        return self.form.is_plain(self.levels)

    @property
    def detect(self) -> Detect:
        """Its last layer: what its scales are now, and no copy of them."""
        return Detect(array_of(self.scales), self.stride)

    def reset(self) -> None:
        """Begin again; what maps are standardised by stays."""
        rng = np.random.default_rng(self._seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith(("language.", "scores.")):
                    continue
                if parameter.ndim == 4:
                    gain = 2.0 if name.startswith(TOWERS) else 1.0
                    spread = 0.01 if name.startswith(("what", "where")) else (gain / parameter[0].numel()) ** 0.5
                    parameter.copy_(torch.from_numpy(rng.normal(0, spread, tuple(parameter.shape))))
                else:
                    nn.init.zeros_(parameter)
            nn.init.ones_(self.scales)
            nn.init.constant_(cast(Tensor, self.what.bias), -math.log(1 / RARE - 1))
            cast(Tensor, self.where.bias)[:SIDES].fill_(1)
        for module in (*self.language, *([] if self.scores is None else [self.scores])):
            cast(Language | Scores, module).begin(rng)

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """What is at all places of all levels, of maps by name."""
        return self.told(given)[0]

    def told(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is at all places, and the score maps (n, classes, h, w) that are judged while it is trained."""
        seen = [self.standardized(number, given[level.name]) for number, level in enumerate(self.levels)]
        scores = None if self.scores is None else self.scores(seen[-1:]) / TEMPERATURE
        found = list[Tensor]()
        for level in self._pyramid(seen, scores):
            towers = [cast(Tensor, self.get_submodule(tower)(level)) for tower in TOWERS]
            both = [last(x) for last, x in zip((self.what, self.where), towers, strict=True)]
            found.append(torch.cat(both, dim=1).flatten(2))
        return torch.cat(found, dim=2), scores if self.form.aux else None

    def _pyramid(self, seen: Sequence[Tensor], scores: Tensor | None) -> list[Tensor]:
        if self.form.language:
            seen = [language(x) for language, x in zip(self.language, seen, strict=True)]
        sides = [cast(Tensor, lateral(x)) for lateral, x in zip(self.laterals, seen, strict=True)]
        if self.scored is not None:
            sides[-1] = sides[-1] + self.scored(scores)
        if self.plain:
            middle = sum(sides[1:], start=sides[0]) + self.shifts[0][:, None, None]
            return [functional.interpolate(middle, scale_factor=2, mode="bilinear"), middle,
                    functional.max_pool2d(middle, 2)]  # fmt: skip
        levels = list[Tensor]()
        for number in reversed(range(len(sides))):
            x = sides[number] + self.shifts[number][:, None, None]
            levels.append(x if not levels else x + functional.interpolate(levels[-1], scale_factor=2))
        return levels[::-1]

    def found(self, given: NpArray) -> NpArray:
        """The boxes (n, boxes, 6) of what it puts out, (n, classes + 5, places)."""
        shapes = [(channels, *size) for size in self.sizes for channels in (self.classes, BESIDE)]
        detect = self.detect
        return detect.best(given[:, : self.classes], given[:, self.classes :], *detect.grid(*shapes))

    def answered(self, head: MapHead, given: Mapping[str, NpArray]) -> NpArray:
        """As of ``MapForm``: what ``head`` knows of all places, before the best are chosen."""
        read = head.read_last(given)
        both = [np.concatenate([x.reshape(*x.shape[:2], -1) for x in read[side::2]], axis=2) for side in (0, 1)]
        return np.concatenate(both, axis=1)

    # ------------------------------------------------------------------------------------------------------- lowering

    def lower(self, name: str, labels: tuple[str, ...]) -> MapHead:
        """As of ``MapForm``. What levels share is one array, which a pack stores once."""
        steps, levels = self._lowered_pyramid()
        shared, reads = {name: _kernel(parameter) for name, parameter in self.named_parameters()}, list[str]()
        for number, level in enumerate(levels):
            for tower, last in zip(TOWERS, ("what", "where"), strict=True):
                steps += _lowered_tower(shared, tower, self.form.depth, level, number)
                read = steps[-1].gives if self.form.depth else level
                product = Point(shared[f"{last}.weight"], shared[f"{last}.bias"])
                reads.append(f"{last}_{number}")
                steps.append(Step(layer=product, reads=(read,), gives=reads[-1]))
        steps.append(Step(layer=self.detect, reads=tuple(reads), gives="found"))
        return MapHead(name=name, answer=self.answer, labels=labels, steps=tuple(steps))

    def _lowered_pyramid(self) -> tuple[list[Step], list[str]]:
        """From maps to the levels that the towers read, and the names of these."""
        steps, sides = list[Step](), list[str]()
        products, shifts = self._products()
        for number, (level, product) in enumerate(zip(self.levels, products, strict=True)):
            read = level.name
            if self.form.norm:
                read = f"norm_{number}"
                steps.append(Step(layer=Norm(eps=EPS), reads=(level.name,), gives=read))
            sides.append(f"side_{number}")
            steps += self._side(number, product, shifts[number], read, sides[-1])
        if self.plain:
            middle = sides[0]
            if len(sides) > 1:
                middle = "level_1"
                steps.append(Step(layer=Add(), reads=tuple(sides), gives=middle))
            steps.append(Step(layer=Resize(2), reads=(middle,), gives="level_0"))
            steps.append(Step(layer=Pool(2), reads=(middle,), gives="level_2"))
            return steps, ["level_0", middle, "level_2"]
        levels = sides[-1:]
        for number in reversed(range(len(sides) - 1)):
            steps.append(Step(layer=Resize(2, "nearest"), reads=(levels[0],), gives=f"up_{number}"))
            steps.append(Step(layer=Add(), reads=(sides[number], f"up_{number}"), gives=f"level_{number}"))
            levels.insert(0, f"level_{number}")
        return steps, levels

    def _side(self, number: int, product: NpArray, shift: NpArray | None, read: str, gives: str) -> list[Step]:
        """One map's product, with what text tells of it, and of the last map its score maps' product."""
        scored = self.scored is not None and self.scores is not None and number == len(self.levels) - 1
        made = f"{gives}_seen" if scored else gives
        steps = [Step(layer=Point(product, shift), reads=(read,), gives=made)]
        if self.form.language:
            language = cast(Language, self.language[number])
            steps = language.steps(product, shift, self.statistics(number), read, made)
        if self.scored is None or self.scores is None or not scored:
            return steps
        steps += self.scores.lower([self.statistics(number)], scale=1 / TEMPERATURE, gives="scores", reads=[read])
        steps.append(behind(steps, Point(_kernel(self.scored.weight)), "scored"))
        return [*steps, Step(layer=Add(), reads=(made, "scored"), gives=gives)]

    def _products(self) -> tuple[list[NpArray], list[NpArray | None]]:
        """Each map's product, (width, C), standardisation within, and the constant behind it."""
        products, shifts = list[NpArray](), list[NpArray]()
        for number, lateral in enumerate(self.laterals):
            product = _kernel(cast(nn.Conv2d, lateral).weight) / array_of(self.get_buffer(f"std{number}"))
            products.append(product)
            shifts.append(-product @ array_of(self.get_buffer(f"mean{number}")))
        own = array_of(self.shifts)
        if not self.plain:
            return products, [shift + each for shift, each in zip(shifts, own, strict=True)]
        return products, [*[None] * (len(shifts) - 1), np.sum(shifts, axis=0) + own[0]]


def _kernel(parameter: Tensor) -> NpArray:
    """A tensor as layers hold it: depthwise kernels (C, k, k), products (out, in)."""
    array = array_of(parameter)
    if array.ndim != 4:
        return array
    return array[:, :, 0, 0] if array.shape[2:] == (1, 1) else array[:, 0]


def _lowered_tower(shared: Mapping[str, NpArray], tower: str, depth: int, level: str, number: int) -> list[Step]:
    steps, read = list[Step](), level
    for place in range(depth):
        grid, product = f"{tower}.{3 * place}", f"{tower}.{3 * place + 1}"
        given = f"{tower}_{number}_{place}"
        steps.append(
            Step(
                layer=Depthwise(shared[f"{grid}.weight"], shared[f"{grid}.bias"]), reads=(read,), gives=f"{given}_grid"
            )
        )
        steps.append(behind(steps, Point(shared[f"{product}.weight"], shared[f"{product}.bias"]), f"{given}_mix"))
        steps.append(behind(steps, Activation("relu"), given))
        read = given
    return steps
