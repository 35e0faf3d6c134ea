"""Attach a method to a backbone, and extract what was learnt as a delta. Needs the ``train`` extra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from edgepet.deltas.branches import ATTENTION, Branch
from edgepet.deltas.delta import Delta, Head, JudgedHead, Score
from edgepet.deltas.merge import fold_all, fold_each
from edgepet.deltas.updates import apart, keeps_codes
from edgepet.errors import CheckError
from edgepet.images.batches import in_batches
from edgepet.measuring.parity import ALGEBRA
from edgepet.methods import ActivationPath, Branching, Method
from edgepet.methods.method import InUnits, flatten, unflatten
from edgepet.methods.settings import stored
from edgepet.networks.backbone import Backbone
from edgepet.networks.graft import Interim, grafted, in_torch
from edgepet.spec import NpArray, Site, Tuned
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.front import Front
from edgepet.tuning.noise import HEAD, Disturbed, Noise, layers_of

LEAST_SCALE = 0.3  # of the root mean square of all features' deviations
_MEAN = ".running_mean"


class TunedModel(nn.Module):
    """A frozen backbone, a method's tensors at its sites, and a head; puts out logits (n, C).

    The backbone's own submodules run unchanged, LayerScale and all. A site is tuned by a hook on its module where the
    method has an activation path for it; at all others the updates are folded into the weights at every step. The
    head sees features standardised by fixed statistics, which ``head`` folds away; it starts at zero, the method's
    tensors as ``seed`` draws them.

    With ``fake_quant`` the backbone's layers compute with their codes, and the updates, which are lowered from the
    float weights as those of a pack are, act on what the codes stand for. Without ``in_units`` what is learnt is what
    acts, whatever the method says: so trainings went before there were units.
    """

    def __init__(
        self, backbone: Backbone, method: Method, classes: int, *, seed: int = 0, fake_quant: FakeQuant | None = None,
        in_units: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fake_quant: FakeQuant | None = fake_quant
        self.front: Front | None = None
        self.interim: Interim | None = None  # what branches find on the way, where it is asked for
        self.method, self.sites = method, method.sites(backbone.layers)
        on_activations = method.activation_kinds if isinstance(method, ActivationPath) else ()
        self._hooked = tuple(site for site in self.sites if site.exposed and site.kind in on_activations)
        self._folding = tuple(site for site in self.sites if site not in self._hooked)
        self.backbone, self.layers = backbone.module, backbone.layers
        self._layer_of = layers_of(backbone.layers)
        rng = np.random.default_rng(seed)
        starts = flatten(method.start(self.sites, backbone.tensors, rng))
        has_units = in_units and isinstance(method, InUnits)
        units = flatten(cast(InUnits, method).units(self.sites, backbone.tensors)) if has_units else {}
        self._names = list(starts)
        self.tensors = nn.ParameterList([nn.Parameter(torch.empty(start.shape)) for start in starts.values()])
        for number, name in enumerate(self._names):
            unit = torch.from_numpy(np.array(units[name])) if name in units else None
            self.register_buffer(f"unit{number}", unit, persistent=False)
        self.take(starts)
        self.begin_head(backbone, classes)

    def begin_head(self, backbone: Backbone, classes: int) -> None:
        """Make the head, and what it sees features by."""
        self.linear = nn.Linear(backbone.width, classes)
        self.reset_head()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(backbone.width))
        self.register_buffer("std", torch.ones(backbone.width))

    def head_parameters(self) -> list[nn.Parameter]:
        """What of the head is trained."""
        return list(self.linear.parameters())

    def watching(self) -> contextlib.AbstractContextManager[object]:
        """What goes on beside the network while it computes ``features``: nothing, for a classifier."""
        return contextlib.nullcontext()

    def reset_head(self) -> None:
        """Let the head answer zero, as it does before it is trained; its statistics stay."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardize(self, features: Tensor) -> None:
        """Fix the statistics by which the head sees features to those of ``features`` (n, d).

        A feature that hardly varies is divided by a floor: as soon as a layer before it is tuned it moves, by little of
        what others vary by, but by thousands of its own deviations, and one that is dead would drown all others.
        """
        deviations = features.std(0)
        least = LEAST_SCALE * float(deviations.square().mean().sqrt())
        self.mean.copy_(features.mean(0))
        self.std.copy_(deviations.clamp_min(least or 1.0))  # where all are dead, there is no measure

    def forward(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """Logits (n, C) of preprocessed images (n, 3, H, W), or clips (n, frames, 3, H, W).

        Of the layers that ``noise`` names, and of the head, it disturbs what they are tuned by.
        """
        logits = self.classify(self.features(images, noise))
        return logits if noise is None else noise.between(HEAD, torch.zeros_like(logits), logits, -1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, C) of pooled features (n, d)."""
        return cast(Tensor, self.linear((features - self.mean) / self.std))

    @contextlib.contextmanager
    def beginning(self, front: Front | None) -> Iterator[None]:
        """While the block runs, ``forward`` and ``features`` take rows of ``front``, where there is one, for images."""
        self.front = front
        try:
            yield
        finally:
            self.front = None

    def features(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """Pooled features (n, d) of the tuned network, of images as ``forward`` takes them."""
        tuned = self.tuned()
        folded, frozen = self._folded(tuned)
        hooks = [
            self.backbone.get_submodule(site.name).register_forward_hook(self._hook(site, tuned[site.name], noise))
            for site in self._hooked
        ]
        for name in [name for name in folded if name.endswith(_MEAN)]:
            norm = self.backbone.get_submodule(name.removesuffix(_MEAN))
            mean = folded.pop(name) - norm.get_buffer(_MEAN[1:])
            hooks.append(norm.register_forward_pre_hook(_shifted(mean, self._layer_of.get(name, ""), noise)))
        pairs = {name: (folded[name], value) for name, value in frozen.items() if name in folded}
        disturbed = contextlib.nullcontext() if noise is None else Disturbed(noise, pairs, self._layer_of)
        try:
            # The hooks that round come last, so that branches read what was there before.
            reading, beginning = self._reading(), self._begun(images)
            grown = grafted(self.backbone, self.branches(tuned), self.interim)
            with grown, reading, beginning as given, disturbed, self.watching():
                return cast(Tensor, torch.func.functional_call(self.backbone, folded, (given,)))
        finally:
            for hook in hooks:
                hook.remove()

    def branches(self, tuned: Tuned) -> tuple[Branch, ...]:
        """What the method leaves in the graph, made of ``tuned``."""
        return self.method.branches(self.sites, tuned) if isinstance(self.method, Branching) else ()

    @property
    def extends_attention(self) -> bool:
        """Whether branches go into torch's attention operator, which must then be the fused one."""
        with torch.no_grad():
            return any(branch.kind in ATTENTION for branch in self.branches(self.tuned()))

    def _hook(self, site: Site, tuned: Mapping[str, Tensor], noise: Noise | None) -> Callable[..., Tensor]:
        method = cast(ActivationPath, self.method)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            y = cast(Tensor, method.forward(site, inputs[0], output, tuned, training=self.training))
            return y if noise is None else noise.between(site.weight, output, y, site.channel_axis)

        return after

    def _folded(self, tuned: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that are rounded, and those that the method changes at the sites without a hook.

        Also what the changed ones were without the method.
        """
        frozen = self.backbone.state_dict(keep_vars=True) if self._folding else {}
        coded = {} if self.fake_quant is None else self.fake_quant.weights
        first, last = apart(self.method.lower(frozen, self._folding, tuned))
        frozen = {**frozen, **coded}  # what is pushed is of what the codes stand for
        state = fold_each(first, frozen, coded)
        if self.fake_quant is not None:
            moved = {t.target.tensor for t in first if not keeps_codes(t)} & coded.keys()
            state |= {name: self.fake_quant.recoded(name, state[name]) for name in moved}
        names = {targeted.target.tensor for targeted in (*first, *last)}
        return fold_each(last, frozen, state), {name: frozen[name] for name in names}

    def _begun(self, images: Tensor) -> contextlib.AbstractContextManager[Tensor]:
        return contextlib.nullcontext(images) if self.front is None else self.front.begun(self.backbone, images)

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.fake_quant is None else self.fake_quant.reading(self.backbone)

    @property
    def backbone_precision(self) -> str:
        """What the backbone is tuned in: fp32, or that of ``fake_quant``."""
        return "fp32" if self.fake_quant is None else self.fake_quant.precision

    @contextlib.contextmanager
    def unrounded(self) -> Iterator[None]:
        """While the block runs the backbone computes with its own weights."""
        kept, self.fake_quant = self.fake_quant, None
        try:
            yield
        finally:
            self.fake_quant = kept

    def train(self, mode: bool = True) -> TunedModel:
        """Frozen modules stay in eval mode, batch norm included."""
        super().train(mode)
        self.backbone.eval()
        return self

    def tuned(self) -> dict[str, dict[str, Tensor]]:
        """The method's tensors as they act, by site and name: parameters, times their units where they have some."""
        acting = {name: p if unit is None else p * unit for name, p, unit in self._learnt()}
        return unflatten(acting, self.sites)

    def arrays(self) -> dict[str, NpArray]:
        """The method's tensors as they act, ``site/name`` -> float32 array, copied."""
        with torch.no_grad():
            acting = {name: p if unit is None else p * unit for name, p, unit in self._learnt()}
            return {name: tensor.float().numpy().copy() for name, tensor in acting.items()}

    @property
    def in_units(self) -> bool:
        """Whether what is learnt and what acts are not the same numbers."""
        return any(unit is not None for _, _, unit in self._learnt())

    def _learnt(self) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """Names, parameters, and what 1 of each is (``InUnits``); None where it is 1."""
        for number, (name, parameter) in enumerate(zip(self._names, self.tensors, strict=True)):
            yield name, cast(nn.Parameter, parameter), cast("Tensor | None", getattr(self, f"unit{number}"))

    def head(self) -> Head:
        """The head on raw features, float32 (C, d) and (C,): the standardisation is folded into it, in float64."""
        weight, bias = self.linear.weight.detach().double(), self.linear.bias.detach().double()
        weight = weight / self.std.double()
        bias = bias - weight @ self.mean.double()
        return Head(weight=weight.float().numpy(), bias=bias.float().numpy())

    def unlike(self, arrays: Mapping[str, NpArray]) -> list[str]:
        """Names of the method's tensors that are not in ``arrays``, or have another shape there, and of others."""
        mine = dict(zip(self._names, self.tensors, strict=True))
        other = [name for name, own in mine.items() if name not in arrays or arrays[name].shape != tuple(own.shape)]
        return other + [name for name in arrays if name not in mine]

    def take(self, arrays: Mapping[str, NpArray]) -> None:
        """Copy in the method's trained values, named and shaped as ``arrays`` gives them; the head stays."""
        with torch.no_grad():
            for name, parameter, unit in self._learnt():
                value = torch.from_numpy(np.array(arrays[name]))
                parameter.copy_(value if unit is None else value / unit)

    def load(self, arrays: Mapping[str, NpArray], head: Head) -> None:
        """Copy in trained values as ``take`` does, with a head (C, d) on raw features."""
        self.take(arrays)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(np.array(head.weight)))
            self.linear.bias.copy_(torch.from_numpy(np.array(head.bias)))
            self.mean.zero_()
            self.std.fill_(1)


def _shifted(mean: Tensor, layer: str, noise: Noise | None) -> Callable[..., tuple[Tensor, ...]]:
    """A larger mean, as a smaller input: torch has no gradient of a batch norm by its statistics.

    It is what ``layer``, which the batch norm reads, is moved by.
    """

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        moved = mean.reshape(-1, *[1] * (inputs[0].ndim - 2)).to(inputs[0].dtype)
        return (inputs[0] - (moved if noise is None else noise.shift(layer, inputs[0], moved)),)

    return before


def extract(
    model: TunedModel,
    backbone: Backbone,
    *,
    task: str,
    labels: tuple[str, ...],
    val: Score,
    training: Mapping[str, object] | None = None,
) -> Delta:
    """Lower what ``model`` learnt to a delta in float32; ``model``, which lies on the CPU, is not modified.

    Raises:
        InputError: ``task``, ``labels`` or branches are none that a ``Delta`` can have.
    """
    return lowered(model, backbone, task=task, training=training, head=model.head(), labels=labels, val=val)


def lowered(
    model: TunedModel,
    backbone: Backbone,
    *,
    task: str,
    training: Mapping[str, object] | None,
    head: Head,
    labels: tuple[str, ...],
    val: Score,
    heads: tuple[JudgedHead, ...] = (),
) -> Delta:
    """As ``extract``, with these heads."""
    tuned = unflatten(model.arrays(), model.sites)
    return Delta(
        task=task,
        backbone=backbone.label,
        fingerprint=backbone.fingerprint,
        updates=model.method.lower(backbone.tensors, model.sites, tuned),
        branches=model.branches(tuned),
        head=head,
        labels=labels,
        preprocess=backbone.preprocess,
        method=model.method.name,
        settings=stored(model.method),
        training=dict(training or {}),
        val=val,
        licences=(backbone.licence,),
        heads=heads,
    )


def require_algebra(method: str, max_abs: float, largest: float, compared: str, fault_of: str) -> tuple[float, float]:
    """Refuse a lowering that changes logits, the ``largest`` of them, by ``max_abs``.

    Returns:
        The difference, and what it may be.

    Raises:
        CheckError: it is more.
    """
    limit = ALGEBRA * largest
    if not max_abs <= limit:
        what, fix = f"{compared} must agree within {limit:.1e} in float64", f"this is a fault of {fault_of}: report it"
        raise CheckError(method, what, got=f"{max_abs:.1e}", fix=fix)
    return max_abs, limit


def algebra_error(model: TunedModel, backbone: Backbone, images: NpArray) -> tuple[float, float]:
    """Largest difference of logits between the tuned and the merged network, both in float64, and the largest logit.

    Nothing is rounded here, neither for storage nor as the backbone was while tuning: this judges the lowering and
    ``fold``. ``model`` comes back in float32 and in the mode that it was in.

    Args:
        images: preprocessed, (n, 3, H, W), or clips (n, frames, 3, H, W).
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
                expected = model(batch)
                state = {name: torch.from_numpy(tensor) for name, tensor in merged.items()}
                with grafted(model.backbone, in_torch(model.branches(tuned))):
                    got = model.classify(torch.func.functional_call(model.backbone, state, (batch,), tie_weights=False))
        finally:
            model.float().train(was_training)
    return float((expected - got).abs().max()), float(expected.abs().max())


def logits_of(network: nn.Module, images: NpArray) -> NpArray:
    """Logits (n, C) of preprocessed float32 images (n, 3, H, W) or clips, some at a time, in the network's own mode."""
    with torch.no_grad():
        logits: NpArray = torch.cat([network(torch.from_numpy(batch)) for batch in in_batches(images)]).numpy()
    return logits
