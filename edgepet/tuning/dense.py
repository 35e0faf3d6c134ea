"""A method attached to a backbone under heads that read maps, and what they lower to. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from edgepet.deltas.delta import NO_CLASSIFIER, Delta, JudgedHead, Score
from edgepet.deltas.detection import Detect
from edgepet.deltas.heads import FEATURES, Answer, MapHead
from edgepet.deltas.joined import answer_shapes, apart, as_rows
from edgepet.deltas.layers import Shape
from edgepet.deltas.merge import fold_all, task_tensors
from edgepet.device.map_heads import map_heads_of
from edgepet.images.batches import batched, in_batches
from edgepet.methods import Method
from edgepet.methods.method import unflatten
from edgepet.networks.backbone import Backbone
from edgepet.networks.box_forms import BoxForm
from edgepet.networks.graft import grafted, in_torch
from edgepet.networks.head_forms import Beside, HeadForm, MapForm, MaskForm
from edgepet.networks.head_settings import Form, FormName, features_map
from edgepet.networks.heads import HeadNetwork
from edgepet.networks.label_forms import LabelForm
from edgepet.networks.maps import taking
from edgepet.networks.merged import merged_logits
from edgepet.networks.score_forms import ScoreForm
from edgepet.spec import NpArray
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.model import TunedModel, lowered
from edgepet.tuning.noise import Noise

FORMS: Mapping[FormName, type[MapForm]] = {
    "linear": HeadForm,
    "mlp": HeadForm,
    "fcos": BoxForm,
    "pooled": LabelForm,
    "score": ScoreForm,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """What of a batch is judged by its masks: ``logits`` (n, C, h, w), those of what branches find on the way, which
    have strides of their own, and what the head finds beside.
    """

    logits: Tensor
    interim: tuple[Tensor, ...]
    beside: Beside


class DenseModel(TunedModel):
    """A frozen backbone, a method's tensors at its sites, and heads that read its maps, one for each answer.

    Everything but the heads is as of ``TunedModel``. ``form`` is the first of ``forms``; called, the model puts out
    what it does. What heads read are flat rows (n, values) where it is kept as features are, one map behind another in
    the order of ``reads``.
    """

    def __init__(
        self, backbone: Backbone, method: Method, form: Form, classes: int, *, further: Sequence[tuple[Form, int]] = (),
        seed: int = 0, fake_quant: FakeQuant | None = None,
    ) -> None:  # fmt: skip
        # ``further``: heads beside the first, and the number of classes of each.
        self._asked, self._seed, self._taken = ((form, classes), *further), seed, dict[str, Tensor]()
        self._maps = (*backbone.maps, features_map(backbone.width))  # found before anything is attached
        super().__init__(backbone, method, classes, seed=seed, fake_quant=fake_quant)

    def begin_head(self, backbone: Backbone, classes: int) -> None:
        """As of ``TunedModel``; a product for each branch whose slots are judged, which no pack has, starts at zero."""
        made = [FORMS[form.name](form, self._maps, count, seed=self._seed) for form, count in self._asked]
        self.form, self.further = made[0], nn.ModuleList(made[1:])
        levels = {level.name: level for each in made for level in each.levels}
        self.reads: dict[str, Shape] = {name: level.shape for name, level in sorted(levels.items())}
        self._levels = tuple(level for name, level in levels.items() if name != FEATURES)
        with torch.no_grad():
            told = [branch for branch in self.branches(self.tuned()) if branch.kind == "semantic-prompt"]
        self._told = [branch.into for branch in told]
        classes = next((each.classes for each in made if each.answer == "mask"), classes)
        self.tellers = nn.ModuleList([nn.Conv2d(len(branch.tensors["slots"]), classes, 1) for branch in told])
        self.reset_head()

    @property
    def forms(self) -> tuple[MapForm, ...]:
        """Its heads."""
        return (self.form, *(cast(MapForm, each) for each in self.further))

    def form_of(self, answer: Answer) -> MapForm:
        """The head that answers ``answer``, of which there is one."""
        return next(each for each in self.forms if each.answer == answer)

    def head_parameters(self) -> list[nn.Parameter]:
        """As of ``TunedModel``."""
        return [*self.form.parameters(), *self.further.parameters(), *self.tellers.parameters()]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """As of ``TunedModel``: the maps that heads read are kept."""
        with taking(self.backbone, self._levels) as taken:
            yield
        self._taken = dict(taken)

    def reset_head(self) -> None:
        """As of ``TunedModel``."""
        for form in self.forms:
            form.reset()
        for parameter in self.tellers.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """What the first form puts out, of preprocessed images (n, 3, H, W)."""
        return self.classify_maps(self.maps(images, noise))

    def maps(self, images: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        """What the heads read, by name, of the tuned network: maps (n, C, h, w), and pooled features (n, d).

        In training what branches find on the way is kept, for ``judged``.
        """
        self.interim = {} if self.training else None
        features = self.features(images, noise)
        taken, self._taken = self._taken, {}
        return taken | ({FEATURES: features} if FEATURES in self.reads else {})

    def classify_maps(self, maps: Mapping[str, Tensor]) -> Tensor:
        """What the first form puts out, of maps by name: for masks logits (n, C, h, w)."""
        return cast(Tensor, self.form(maps))

    def judged(self, maps: Mapping[str, Tensor]) -> Judged:
        """All that is judged by the masks of a training's images whose maps ``maps`` gave last."""
        logits, beside = cast(MaskForm, self.form_of("mask")).told(maps)
        found, self.interim = self.interim or {}, None
        interim = [
            teller(m) for point, teller in zip(self._told, self.tellers, strict=True) for m in found.get(point, ())
        ]
        return Judged(logits=logits, interim=tuple(interim), beside=beside)

    def rows(self, maps: Mapping[str, Tensor]) -> Tensor:
        """What heads read as flat rows (n, values)."""
        return torch.cat([maps[name].flatten(1) for name in self.reads], dim=1)

    def from_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """What ``rows`` made flat."""
        shapes = {name: (shape[0],) if name == FEATURES else shape for name, shape in self.reads.items()}
        parts = torch.split(rows, [int(np.prod(shape)) for shape in shapes.values()], dim=1)
        return {
            name: torch.unflatten(part, 1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    @property
    def row_values(self) -> int:
        """Numbers of what heads read of one image."""
        return sum(int(np.prod(shape)) for shape in self.reads.values())


def extract_dense(
    model: DenseModel,
    backbone: Backbone,
    *,
    task: str,
    labels: tuple[str, ...],
    further: Sequence[tuple[str, ...]] = (),
    training: Mapping[str, object] | None = None,
) -> Delta:
    """Lower what ``model`` learnt to a delta in float32, its heads judged on no image yet; ``model`` is not modified.

    Args:
        labels: of the first head; further: of those behind it.

    Raises:
        InputError: ``task``, ``labels`` or branches are none that a ``Delta`` can have.
    """
    judged = tuple(
        JudgedHead(head=form.lower(form.answer, told).astype(np.float32), value=0.0, n=0)
        for form, told in zip(model.forms, (labels, *further), strict=True)
    )
    none = Score(top1=0.0, n=0)
    return lowered(model, backbone, task=task, training=training, head=NO_CLASSIFIER, labels=(), val=none, heads=judged)


def dense_algebra_error(model: DenseModel, backbone: Backbone, images: NpArray) -> tuple[float, float]:
    """As ``model.algebra_error``, with the heads lowered too: their layers are computed by their NumPy definitions.

    Of several heads it is that of the one which is furthest apart for its size.

    Args:
        images: preprocessed, (n, 3, H, W).
    """
    double = {
        name: tensor.astype(np.float64) if tensor.dtype.kind == "f" else tensor
        for name, tensor in backbone.tensors.items()
    }
    tuned = unflatten({name: value.astype(np.float64) for name, value in model.arrays().items()}, model.sites)
    merged = fold_all(double, model.method.lower(double, model.sites, tuned))
    was_training = model.training
    with model.unrounded():
        model.eval().double()
        try:
            batch = torch.from_numpy(images).double()
            with torch.no_grad():
                maps = model.maps(batch)
                expected = [form(maps).numpy() for form in model.forms]
                state = {name: torch.from_numpy(tensor) for name, tensor in merged.items()}
                with (
                    grafted(model.backbone, in_torch(model.branches(tuned))),
                    taking(model.backbone, backbone.maps) as taken,
                ):
                    features = torch.func.functional_call(model.backbone, state, (batch,), tie_weights=False)
            given = {name: x.numpy() for name, x in {**taken, FEATURES: features}.items()}
            got = [form.answered(_lowered(form), given) for form in model.forms]
        finally:
            model.float().train(was_training)
    errors = [(float(np.abs(e - g).max()), float(np.abs(e).max())) for e, g in zip(expected, got, strict=True)]
    return max(errors, key=lambda error: error[0] / (error[1] or 1.0))


def _lowered(form: MapForm) -> MapHead:
    return form.lower(form.answer, tuple(map(str, range(form.classes))))


def stored_answers(backbone: Backbone, delta: Delta, images: NpArray) -> NpArray:
    """What the heads of ``delta`` answer, in ``as_rows``, as it is stored and run by torch in float32.

    Args:
        images: preprocessed float32 (n, 3, H, W), or clips (n, frames, 3, H, W).

    Returns:
        Logits (n, C), of masks (n, C, h, w), or boxes (n, boxes, 6).

    Raises:
        BackboneError, InputError: as ``task_tensors`` and ``map_heads_of``.
    """
    if not map_heads_of(delta):
        return merged_logits(backbone, delta, images)
    return batched(MergedHead(backbone, delta), images)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """What a head says of images: its ``answer`` (n, …), and of boxes what they are chosen from, ``Detect.said``."""

    answer: NpArray
    places: tuple[NpArray, ...] = ()

    @property
    def numbers(self) -> tuple[NpArray, ...]:
        """What moves little where the network does: logits, and of boxes, whose order jumps, what all places say."""
        return self.places or (self.answer,)


def stored_said(backbone: Backbone, delta: Delta, images: NpArray) -> tuple[Said, ...]:
    """What each head of ``delta`` says, the classifier or those that read maps; else as ``stored_answers``."""
    if not map_heads_of(delta):
        return (Said(answer=merged_logits(backbone, delta, images)),)
    network = MergedHead(backbone, delta)
    heads = zip(*(network.said(batch) for batch in in_batches(images)), strict=True)
    return tuple(
        Said(
            answer=np.concatenate([each.answer for each in said]),
            places=tuple(map(np.concatenate, zip(*(each.places for each in said), strict=True))),
        )
        for said in heads
    )


class MergedHead:
    """A pack as stored, run by torch in float32: its delta folded into the backbone, its branches and heads beside it.

    Raises:
        BackboneError, InputError: as ``task_tensors``, or maps that a head cannot read.
    """

    def __init__(self, backbone: Backbone, delta: Delta) -> None:
        self._backbone, self._maps = backbone, backbone.maps
        heads = [each.head for each in delta.heads]
        self.shapes = answer_shapes(heads, self._maps, backbone.width)
        tensors = task_tensors(backbone.base, delta)
        self._branches = in_torch([branch.with_tensors(tensors) for branch in delta.branches])
        self._state = {name: torch.from_numpy(np.array(tensors[name])) for name in backbone.tensors}
        self._heads = [HeadNetwork(head.astype(np.float32)) for head in heads]

    def __call__(self, images: NpArray) -> NpArray:
        """What the heads give, in ``as_rows``, of preprocessed float32 images (n, 3, H, W)."""
        maps = self._read(images)
        with torch.no_grad():
            return as_rows([head(maps).numpy() for head in self._heads])

    def each(self, images: NpArray) -> tuple[NpArray, ...]:
        """What each head gives."""
        return apart(self(images), self.shapes)

    def said(self, images: NpArray) -> tuple[Said, ...]:
        """What each head says."""
        maps = self._read(images)
        with torch.no_grad():
            return tuple(_said(head, head.read_last(maps)) for head in self._heads)

    def _read(self, images: NpArray) -> dict[str, Tensor]:
        """What heads read, by name."""
        module, inputs = self._backbone.module, (torch.from_numpy(images),)
        with torch.no_grad(), grafted(module, self._branches), taking(module, self._maps) as taken:
            features = torch.func.functional_call(module, self._state, inputs, tie_weights=False)
        return {**taken, FEATURES: features}


def _said(network: HeadNetwork, read: tuple[Tensor, ...]) -> Said:
    layer = network.head.steps[-1].layer
    places = layer.said(*(x.numpy() for x in read)) if isinstance(layer, Detect) else ()
    return Said(answer=network.last(read).numpy(), places=places)
