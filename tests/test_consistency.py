"""PACE: noise on what a method changes of each layer, and a loss that wants the same logits under any of it.

References are written from Ni et al. 2024, arXiv:2409.17137, and from its authors' train.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

import edgepet as package
from edgepet.deltas.merge import fold_all
from edgepet.deltas.updates import fold
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.images.preprocess import normalize
from edgepet.methods import (
    METHODS,
    SSF,
    BitFit,
    Branching,
    Consolidator,
    DoRA,
    Full,
    LinearProbe,
    LoRA,
    Method,
    NormTuning,
    RepAdapter,
    VPTDeep,
)
from edgepet.methods.method import unflatten
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import read_pack
from edgepet.reports.progress import Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.checkpoint import checkpoint_file
from edgepet.tuning.consistency import Pace, pace_of, require_differences, table_bytes
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.fit import Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error
from edgepet.tuning.noise import HEAD, Noise, falling, layers_of
from edgepet.tuning.options import TrainOptions
from edgepet.tuning.processes import ALONE, Processes
from edgepet.tuning.recipes import Consistency, consistency
from tests.fits import StopError, images, keeper, stepping
from tests.flow import Tasks, edgepet, refused, train_arguments
from tests.methods import EXAMPLES
from tests.tiny import perturb, random_images, same_bits, seeded

# Of 12 images: steps of 5, 5 and 2, each in one part: what an image keeps is not measured by further passes.
PLAN = Plan(epochs=3, lr=1e-2, head_lr=1e-2, batch_size=5, seed=5, accumulate=1)
FORMS = {"full": "full,sigma=1.5,weight=0.7", "cheap": "cheap,sigma=2,weight=0.3"}
DROPS = Consolidator(groups=(16,), drop_path=0.5)  # draws random numbers of its own at every step


# ---------------------------------------------------------------------------------------------------------- the text


def test_the_text_names_a_form_and_its_numbers() -> None:
    assert consistency("full") == Consistency(form="full", sigma=1.2, weight=1.0)  # the authors' runs on VTAB-1k
    assert consistency("full,weight=3") == Consistency(form="full", sigma=1.2, weight=3.0)
    assert consistency(" cheap, sigma=2, weight=0.5 ") == Consistency(form="cheap", sigma=2.0, weight=0.5)
    assert str(consistency("full,weight=3")) == "full,sigma=1.2,weight=3.0"
    assert consistency(None) is None
    for plain in ("full,sigma=0", "full,sigma=0,weight=0", "cheap,sigma=0,weight=1"):
        assert consistency(plain) is None


NO_FORM = {
    "pace": "`consistency`: knows full and cheap, got 'pace'",
    "full sigma": "`consistency`: needs NAME or NAME,KEY=VALUE,..., got 'full sigma'",
    "full,1.2": "`consistency`: needs settings as KEY=NUMBER, with / between several, got '1.2'",
    "full,lambda=1": "`consistency`: knows the settings sigma, weight, got 'lambda'",
    "full,sigma=-1": "`consistency`: needs a sigma of at least 0 and finite, got -1",
    "full,weight=nan": "`consistency`: needs a weight of at least 0 and finite, got nan",
    "full,sigma=inf": "`consistency`: needs a sigma of at least 0 and finite, got inf",
    "full,sigma=true": "`consistency`: needs a sigma of at least 0 and finite, got True",
    "full,sigma=1/2": "`consistency`: needs a sigma of at least 0 and finite, got (1, 2)",
    "cheap": "`consistency`: cheap needs a sigma and a weight of its own, got no sigma\n"
    "  fix: begin with a larger sigma and a smaller weight than those of full, 1.2 and 1",
    "cheap,sigma=2": "`consistency`: cheap needs a sigma and a weight of its own, got no weight\n"
    "  fix: begin with a larger sigma and a smaller weight than those of full, 1.2 and 1",
}


@pytest.mark.parametrize(("text", "message"), NO_FORM.items(), ids=NO_FORM)
def test_a_text_that_asks_for_nothing_that_there_is_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        TrainOptions(consistency=text).check()
    assert str(refusal.value) == message


def test_the_cheap_form_takes_no_augmentation() -> None:
    with pytest.raises(InputError) as refusal:
        TrainOptions(consistency=FORMS["cheap"], augment=("flip", "crop")).check()

    assert str(refusal.value) == (
        "`consistency`: cheap compares an image with itself an epoch ago, so it must look the same,"
        " got `augment=flip,crop`\n"
        "  fix: train without `augment`, or with full, both passes of which see one image"
    )
    TrainOptions(consistency=FORMS["full"], augment=("flip", "crop")).check()
    TrainOptions(consistency="cheap,sigma=0,weight=1", augment=("flip",)).check()


def test_methods_that_change_no_layer_are_refused() -> None:
    with pytest.raises(InputError) as refusal:
        require_differences("full", VPTDeep())
    assert str(refusal.value) == (
        "`consistency`: disturbs what a method changes of each layer, for methods that fold,"
        " got vpt-deep, whose branches stay beside the layers\n"
        "  fix: train without it, or choose a method that folds, as `method=ssf`"
    )
    with pytest.raises(InputError) as refusal:
        require_differences("full", LinearProbe())
    assert str(refusal.value) == (
        "`consistency`: disturbs what a method changes of each layer, for methods that fold,"
        " got linear-probe, which changes none\n"
        "  fix: train it without"
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_it_or_is_refused_before_anything_is_read(name: str) -> None:
    kind = METHODS[name]
    try:
        require_differences("cheap,sigma=2,weight=1", kind())
        taken = True
    except InputError:
        taken = False

    assert taken is not (issubclass(kind, Branching) or name == "linear-probe")
    require_differences(None, kind())
    require_differences("full,sigma=0", kind())


# -------------------------------------------------------------------------------------------------------- how it falls


def theirs(sigma: float, blocks: int, *, start: int) -> list[float]:
    """sigma by block, the head as the last one: as the authors' train.py has it (``start`` 1: ViT-B, 0: Swin-B)."""
    number = blocks + 1
    return [0.0] * start + np.linspace(0, sigma, number - start + 1)[-1:0:-1].tolist()


def test_noise_falls_over_the_blocks_of_a_vit_as_its_authors_have_it(backbone: Backbone) -> None:
    layers = backbone.layers
    expected = theirs(1.2, 6, start=1)

    lora = falling(1.2, layers, LoRA().sites(layers))
    every = falling(1.2, layers, SSF().sites(layers))

    assert lora == pytest.approx(
        {f"blocks.{i}.attn.qkv.weight": expected[i] for i in range(1, 6)} | {HEAD: expected[6]}
    )
    assert lora["blocks.1.attn.qkv.weight"] == 1.2
    for name, sigma in every.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 6
        assert sigma == pytest.approx(expected[block]), name
    assert {name for name in every if not name.startswith("blocks.")} == {"norm.weight", HEAD}
    assert not any(name.startswith(("patch_embed.", "blocks.0.")) for name in every)


def test_full_fine_tuning_is_disturbed_in_the_same_layers(backbone: Backbone) -> None:
    layers = backbone.layers

    assert falling(1.2, layers, Full().sites(layers)) == falling(1.2, layers, SSF().sites(layers))


def test_noise_is_everywhere_where_blocks_work_on_maps(maps: Backbone) -> None:
    sigmas, expected = falling(0.9, maps.layers, SSF().sites(maps.layers)), theirs(0.9, 2, start=0)

    assert expected == pytest.approx([0.9, 0.6, 0.3])
    depth = {"stem.weight": 0, "stages.0.conv1.weight": 0, "stages.1.norm2.weight": 1, "last.weight": 2, HEAD: 2}
    assert {name: sigmas[name] for name in depth} == pytest.approx({name: expected[at] for name, at in depth.items()})


def test_steps_are_those_of_the_blocks_that_are_tuned(backbone: Backbone) -> None:
    sites = [site for site in LoRA().sites(backbone.layers) if int(site.name.split(".")[1]) >= 3]

    sigmas = falling(1.2, backbone.layers, sites)

    assert sigmas == pytest.approx({f"blocks.{3 + i}.attn.qkv.weight": 1.2 - 0.3 * i for i in range(3)} | {HEAD: 0.3})


def test_without_blocks_every_layer_is_a_step() -> None:
    module = seeded(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 6)), 1)
    network = Backbone.from_module(module, name="plain", preprocess=Preprocess(image_size=(4, 4)))

    sigmas = falling(0.9, network.layers, BitFit().sites(network.layers))

    assert sigmas == pytest.approx({"1.weight": 0.9, "3.weight": 0.6, HEAD: 0.3})


# ------------------------------------------------------------------------------------------- what the noise acts upon


class Told(nn.Module):
    """A part of a network that keeps what each of its layers read and put out."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.seen = dict[str, tuple[Tensor, Tensor]]()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def call(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(name)(x)
        self.seen[name] = (x, y)
        return y


class OnTokens(Told):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.call("fc2", functional.gelu(self.call("fc1", self.call("norm", x))))


class OnMaps(Told):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in ("conv1", "norm1", "conv2", "norm2"):
            y = self.call(name, y)
        return x + torch.tanh(y)


class Tokens(Told):
    """Patches, three blocks on tokens (n, 16, 16), and a norm."""

    def __init__(self) -> None:
        parts = [OnTokens(norm=nn.LayerNorm(16), fc1=nn.Linear(16, 32), fc2=nn.Linear(32, 16)) for _ in range(3)]
        super().__init__(stem=nn.Conv2d(3, 16, 8, stride=8), blocks=nn.ModuleList(parts), norm=nn.LayerNorm(16))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.call("stem", pictures).flatten(2).transpose(1, 2)
        for block in self.get_submodule("blocks"):
            x = block(x)
        return self.call("norm", x).mean(1)


class Maps(Told):
    """Two blocks on maps (n, 16, 4, 4) of convolutions that have no bias, and a linear layer."""

    def __init__(self) -> None:
        parts = [
            OnMaps(conv1=nn.Conv2d(16, 16, 3, padding=1, bias=False), norm1=nn.BatchNorm2d(16),
                   conv2=nn.Conv2d(16, 16, 1, bias=False), norm2=nn.BatchNorm2d(16))
            for _ in range(2)
        ]  # fmt: skip
        stem, last = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 16)
        super().__init__(stem=stem, stages=nn.ModuleList(parts), last=last)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.call("stem", pictures)
        for stage in self.get_submodule("stages"):
            x = stage(x)
        return self.call("last", x.mean((2, 3)))


def network(module: Told, name: str) -> Backbone:
    return Backbone.from_module(seeded(module, 3), name=name, preprocess=Preprocess(image_size=(32, 32)))


@pytest.fixture(scope="module")
def tokens() -> Backbone:
    return network(Tokens(), "tokens")


@pytest.fixture(scope="module")
def maps() -> Backbone:
    return network(Maps(), "maps")


def told(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> what it read and put out, in the order that they ran."""
    parts = {name: part for name, part in module.named_modules() if isinstance(part, Told)}
    return {f"{at}.{name}".lstrip("."): pair for at, part in parts.items() for name, pair in part.seen.items()}


class Layers:
    """The layers of a network as it was and as ``model`` tunes it, by torch's own modules, in float64."""

    def __init__(self, model: TunedModel, backbone: Backbone) -> None:
        self.module = model.backbone
        self.frozen = {name: tensor.astype(np.float64) for name, tensor in backbone.tensors.items()}
        values = {name: value.astype(np.float64) for name, value in model.arrays().items()}
        tuned = unflatten(values, model.sites)
        self.merged = fold_all(self.frozen, model.method.lower(self.frozen, model.sites, tuned))

    def of(self, tensors: Any, name: str, x: Tensor) -> Tensor:
        """What the layer puts out for ``x`` with ``tensors``; a batch norm keeps the mean that it was trained with."""
        layer = self.module.get_submodule(name)
        own = {key: torch.from_numpy(np.array(tensors[f"{name}.{key}"])) for key, _ in layer.named_parameters()}
        result: Tensor = torch.func.functional_call(layer, own, (x,))
        return result

    def shift(self, name: str) -> Tensor:
        """What the mean of a batch norm is moved by, turned round: what is added to the layer before it."""
        key = f"{name}.running_mean"
        return torch.from_numpy(np.array(self.frozen[key] - self.merged[key]))[:, None, None]


def factor(y0: Tensor, y: Tensor, h: Tensor, axis: int, *, rounding: float = 1e-9) -> tuple[Tensor, Tensor]:
    """z (n, out) in h = y0 + z * (y - y0), and where there is one; that it is one for all positions is asserted."""
    d, moved = ((each - y0).movedim(axis, 1)[:, :, None].flatten(2) for each in (y, h))
    there = d.square().sum(2) > 1e-18
    z = torch.where(there, (d * moved).sum(2) / d.square().sum(2).clamp_min(1e-18), 1.0)
    assert float((moved - z[:, :, None] * d).abs().max()) <= rounding * float(1 + moved.abs().max())
    return z, there


def standard(z: Tensor, sigma: float) -> Tensor:
    return ((z - 1) / sigma).flatten()


def check_normal(values: Sequence[Tensor], *, rounding: float = 0.0) -> None:
    """Values of a standard normal distribution, and no two layers' alike."""
    every = torch.cat(list(values))
    assert len(every) > 500
    assert abs(float(every.mean())) < rounding + 5 / len(every) ** 0.5
    assert abs(float(every.std()) - 1) < rounding + 5 / (2 * len(every)) ** 0.5
    assert len(every.unique()) == len(every)


def disturbed(model: TunedModel, sigma: float, pictures: Tensor) -> Tensor:
    """Logits of ``model``, in float64 and eval mode, under noise of this deviation."""
    model.double()
    noise = Noise(falling(sigma, model.layers, model.sites), len(pictures), torch.arange(len(pictures)), (1,), "cpu")
    with torch.no_grad():
        logits: Tensor = model(pictures.double(), noise)
    return logits


ON_TOKENS = {
    "ssf": SSF(),
    "lora": LoRA(rank=2, on=("fc1", "fc2")),
    "consolidator": Consolidator(groups=(8, 16)),
    "dora": DoRA(rank=2, on=("fc1",)),
    "bitfit": BitFit(),
    "norm-tuning": NormTuning(),
    "repadapter": RepAdapter(rank=4, on=("fc1", "fc2")),
    "full": Full(),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ON_TOKENS.values(), ids=ON_TOKENS)
def test_noise_multiplies_what_each_layer_on_tokens_is_tuned_by(method: Method, tokens: Backbone) -> None:
    model = perturb(TunedModel(tokens, method, 5, seed=1), seed=2)
    layers, pictures = Layers(model, tokens), torch.from_numpy(random_images(4, 24))
    sigmas = falling(1.5, model.layers, model.sites)

    found = list[Tensor]()
    try:
        logits = disturbed(model, 1.5, pictures)
        for name, (x, h) in told(model.backbone).items():
            y0, y = layers.of(layers.frozen, name, x), layers.of(layers.merged, name, x)
            sigma = sigmas.get(f"{name}.weight")
            if sigma is None:
                assert float((h - y).abs().max()) <= 1e-12
                continue
            z, there = factor(y0, y, h, -1)
            assert bool(there.any())
            found.append(standard(z[there], sigma))
        plain = model.classify(told(model.backbone)["norm"][1].mean(1))
        found.append(standard(logits / plain, sigmas[HEAD]))
    finally:
        model.float()

    tuned = {layers_of(model.layers)[site.weight] for site in model.sites if site.weight in layers_of(model.layers)}
    quiet = {name for name in tuned if name.startswith(("stem", "blocks.0"))}
    assert sigmas.keys() == tuned - quiet | {HEAD}
    assert len(found) == len(sigmas)
    check_normal(found)


ON_MAPS = {
    "ssf": SSF(),
    "consolidator": Consolidator(groups=(8,)),
    "repadapter": RepAdapter(rank=4, on=("conv2",)),
    "lora": LoRA(rank=2, on=("conv1", "conv2", "last")),
    "full": Full(),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ON_MAPS.values(), ids=ON_MAPS)
def test_noise_multiplies_the_shift_behind_a_convolution_as_it_does_its_weight(method: Method, maps: Backbone) -> None:
    model = perturb(TunedModel(maps, method, 5, seed=1), seed=2)
    layers, pictures = Layers(model, maps), torch.from_numpy(random_images(4, 24))
    sigmas, found, shifts = falling(1.5, model.layers, model.sites), list[Tensor](), list[bool]()

    def expected(name: str, x: Tensor, h: Tensor, moved: Tensor | float = 0.0) -> Tensor | float:
        """z of the layer; ``moved`` is what it is moved by within ``h``, beside its weight."""
        y0, y = layers.of(layers.frozen, name, x), layers.of(layers.merged, name, x) + moved
        sigma = sigmas.get(f"{name}.weight")
        if sigma is None:
            assert float((h - y).abs().max()) <= 1e-12
            return 1.0
        z, there = factor(y0, y, h, 1)
        found.append(standard(z[there], sigma))
        return z[:, :, None, None]

    try:
        disturbed(model, 1.5, pictures)
        seen = told(model.backbone)
        for name, (x, h) in seen.items():
            if ".norm" in name:
                continue  # with the convolution before it
            if ".conv" not in name:
                expected(name, x, h)
                continue
            norm = name.replace("conv", "norm")
            beta, at_once = layers.shift(norm), isinstance(method, SSF)  # its hook puts the shift into ``h``
            z = expected(name, x, h, beta if at_once else 0.0)
            into = h if at_once else h + z * beta
            expected(norm, into, seen[norm][1])
            shifts.append(bool((beta != 0).any()))
    finally:
        model.float()

    assert any(shifts) is not isinstance(method, LoRA | Full)
    assert len(found) == len(sigmas) - 1  # all but the head
    check_normal(found)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("method", [SSF(), DoRA(rank=2, on=("fc1", "fc2"))], ids=lambda method: method.name)
def test_on_a_rounded_backbone_the_frozen_layer_is_the_rounded_one(
    method: Method, precision: str, tokens: Backbone
) -> None:
    quant = FakeQuant(base_graph(tokens), precision)
    model = perturb(TunedModel(tokens, method, 5, seed=1, fake_quant=quant), seed=2)
    pictures, sigmas = torch.from_numpy(random_images(4, 24)), falling(1.5, model.layers, model.sites)
    found = list[Tensor]()

    with torch.no_grad():
        model(pictures)  # its ranges
        frozen = {**{name: torch.from_numpy(value) for name, value in tokens.tensors.items()}, **quant.weights}
        merged = dict(frozen)
        for targeted in method.lower(model.backbone.state_dict(), model.sites, model.tuned()):
            merged[targeted.target.tensor] = fold(targeted, merged[targeted.target.tensor])
        if method.name == "dora":  # SSF scales rows, and their codes stay
            merged |= {name: quant.recoded(name, merged[name]) for name in quant.weights if "fc" in name}
        model(pictures, Noise(sigmas, 24, torch.arange(24), (1,), "cpu"))
        with quant.reading(model.backbone):  # a layer that is called now rounds what it reads
            for name, (x, h) in told(model.backbone).items():
                if not name.startswith(("blocks.1.fc", "blocks.2.fc")):
                    continue
                layer = model.backbone.get_submodule(name)
                y0, y = (
                    torch.func.functional_call(layer, {key: state[f"{name}.{key}"] for key in ("weight", "bias")}, (x,))
                    for state in (frozen, merged)
                )
                z, there = factor(y0, y, h, -1, rounding=1e-4)  # float32, and small differences
                found.append(standard(z[there], sigmas[f"{name}.weight"]))

    check_normal(found, rounding=0.02)


# ------------------------------------------------------------------------------------------------------- what is drawn


def drawn(images: int, part: Sequence[int], *, seed: int = 1, rows: int = 1, shape: tuple[int, ...] = (3,)) -> NpArray:
    """z of two layers that run one after another."""
    noise = Noise({"a": 0.5, "b": 0.25}, images, torch.tensor(part), (seed, 2), "cpu")
    zeros = torch.zeros(len(part) * rows, *shape)
    return np.stack([noise.between(name, zeros, zeros + 1, -1).numpy() for name in ("a", "b")])


def test_an_image_has_the_same_noise_in_any_part_of_its_step() -> None:
    whole = drawn(5, range(5))

    parts = np.concatenate([drawn(5, [0, 3]), drawn(5, [1]), drawn(5, [2, 4])], axis=1)

    assert np.array_equal(parts[:, [0, 2, 3, 1, 4]], whole)
    assert not np.array_equal(drawn(5, range(5), seed=2), whole)


def test_windows_of_an_image_have_one_noise() -> None:
    whole, windows = drawn(4, range(4)), drawn(4, [1, 2], rows=3)

    assert np.array_equal(windows, whole[:, [1, 1, 1, 2, 2, 2]])


def test_tokens_have_one_noise_and_channels_their_own() -> None:
    z = drawn(4, range(4), shape=(7, 3))

    assert np.array_equal(z, np.broadcast_to(z[:, :, :1], z.shape))
    assert len(np.unique(z)) == 2 * 4 * 3


def test_a_layer_that_works_on_no_image_has_one_noise_for_all_of_them() -> None:
    noises = [Noise({"a": 0.5}, 5, torch.tensor(part), (1,), "cpu") for part in ([0, 1, 2], [3, 4])]
    zeros = torch.zeros(1, 9, 4)

    first, second = (noise.between("a", zeros, zeros + 1, -1) for noise in noises)

    assert torch.equal(first, second)
    assert len(first.unique()) == 4


def test_a_shift_has_the_noise_of_its_layers_last_run_or_noise_of_its_own() -> None:
    noise, x = Noise({"a": 0.5}, 2, torch.arange(2), (1,), "cpu"), torch.zeros(2, 3, 4, 4)
    ones = torch.ones(3, 1, 1)

    alone = noise.shift("a", x, ones)
    runs = [noise.between("a", x, x + 1, 1) for _ in range(2)]
    behind = noise.shift("a", x, ones)

    assert alone.shape == (2, 3, 1, 1)
    assert torch.equal(behind.expand(x.shape), runs[1])
    assert len(torch.cat([alone.flatten(), behind.flatten(), noise.shift("a", x, ones).flatten()]).unique()) == 18


def test_layers_without_noise_draw_nothing() -> None:
    noise, x = Noise({"a": 0.5}, 2, torch.arange(2), (1, 2), "cpu"), torch.zeros(2, 3)
    tuned = x + 1

    assert noise.between("b", x, tuned, -1) is tuned
    assert noise.shift("b", x, tuned) is tuned
    assert np.array_equal(noise.between("a", x, tuned, -1), drawn(2, range(2))[0])


# ---------------------------------------------------------------------------------------------------------- the loss


def runs(
    backbone: Backbone, method: Method, plan: Plan, *, processes: Processes = ALONE
) -> tuple[list[NpArray], list[Step], TunedModel]:
    """A fit of twelve images; what the model put out at each call while training, and each step's loss."""
    model, put_out, steps = TunedModel(backbone, method, 3, seed=1), list[NpArray](), list[Step]()

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        put_out.append(output.detach().numpy().copy())

    model.register_forward_hook(after)
    fit(model, images(1, 12), images(2, 6), backbone.preprocess, plan, steps.append, processes=processes)
    return put_out, [step for step in steps if step.val_top1 is None], model


def orders(plan: Plan, n: int) -> list[list[NpArray]]:
    """The images of each step of each epoch."""
    generator = torch.Generator().manual_seed(plan.seed)
    return [
        [part.numpy() for part in torch.split(torch.randperm(n, generator=generator), plan.batch_size)]
        for _ in range(plan.epochs)
    ]


def cross_entropy(logits: NpArray, labels: NpArray, smoothing: float) -> float:
    """Mean over images, with labels smoothed (Szegedy et al. 2016)."""
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    targets = np.eye(wide.shape[1])[labels] * (1 - smoothing) + smoothing / wide.shape[1]
    return float(-(targets * log_p).sum(1).mean())


def apart(first: NpArray, second: NpArray) -> float:
    """Mean over images of the sum over logits of squared differences."""
    return float(((first.astype(np.float64) - second.astype(np.float64)) ** 2).sum(1).mean())


def test_the_loss_of_the_full_form_is_the_papers(backbone: Backbone) -> None:
    put_out, steps, _ = runs(backbone, SSF(), replace(PLAN, consistency=FORMS["full"]))
    labels, index = images(1, 12).labels, [part for epoch in orders(PLAN, 12) for part in epoch]

    assert len(put_out) == 2 * len(steps) == 2 * len(index)
    for step, second, first, part in zip(steps, put_out[::2], put_out[1::2], index, strict=True):
        expected = cross_entropy(first, labels[part], PLAN.label_smoothing) + 0.7 * apart(first, second)
        assert step.loss == pytest.approx(expected, rel=1e-5)
    assert all(apart(*pair) > 1e-4 for pair in list(zip(put_out[::2], put_out[1::2], strict=True))[1:])


def test_the_cheap_form_compares_each_image_with_its_own_logits_of_the_epoch_before(backbone: Backbone) -> None:
    put_out, steps, _ = runs(backbone, SSF(), replace(PLAN, consistency=FORMS["cheap"]))
    labels, before, calls = images(1, 12).labels, dict[int, NpArray](), iter(zip(steps, put_out, strict=True))

    for epoch in orders(PLAN, 12):
        now = dict[int, NpArray]()
        for part in epoch:
            step, logits = next(calls)
            now |= dict(zip(part.tolist(), logits, strict=True))
            expected = cross_entropy(logits, labels[part], PLAN.label_smoothing)
            if before:  # the first epoch has none
                distance = apart(logits, np.stack([before[image] for image in part.tolist()]))
                assert distance > 1e-4
                expected += 0.3 * distance
            assert step.loss == pytest.approx(expected, rel=1e-5)
        before = now
    assert next(calls, None) is None


def test_noise_alone_has_no_second_term_and_no_second_pass(backbone: Backbone) -> None:
    alone = {}
    for form in FORMS:
        put_out, steps, model = runs(backbone, SSF(), replace(PLAN, consistency=f"{form},sigma=1.5,weight=0"))
        labels, index = images(1, 12).labels, [part for epoch in orders(PLAN, 12) for part in epoch]
        for step, logits, part in zip(steps, put_out, index, strict=True):
            assert step.loss == pytest.approx(cross_entropy(logits, labels[part], PLAN.label_smoothing), rel=1e-5)
        alone[form] = model.arrays()
    assert same_bits(alone["full"], alone["cheap"])
    assert not same_bits(alone["full"], runs(backbone, SSF(), PLAN)[2].arrays())


def pace(backbone: Backbone, method: Method, text: str) -> tuple[Pace, list[Tensor]]:
    """What a training has, with a head away from zero; and every output of the model, with its graph."""
    model = perturb(TunedModel(backbone, method, 3, seed=1), seed=3).train()
    put_out = list[Tensor]()
    model.register_forward_hook(lambda module, inputs, output: put_out.append(output))
    made = pace_of(text, model, 12, 5, "cpu")
    assert made is not None
    return made, put_out


def test_gradients_of_the_full_form_are_of_both_passes_and_of_the_cheap_form_of_one(backbone: Backbone) -> None:
    batch, index, part = torch.from_numpy(random_images(6, 4)), torch.tensor([7, 1, 3, 9]), torch.arange(4)

    full, (put_out) = pace(backbone, SSF(), FORMS["full"])
    logits, term = full.answers(batch, index, part, (1, 0))
    second, first = put_out
    assert logits is first
    parameters = list(full.model.tensors.parameters())
    expected = torch.autograd.grad(0.7 * (first - second).pow(2).sum(), parameters, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(term, parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted)

    cheap, (put_out) = pace(backbone, SSF(), FORMS["cheap"])
    cheap.answers(batch, index, part, (1, 0))
    cheap.remember(index, ALONE)
    logits, term = cheap.answers(batch, index, part, (2, 0))
    earlier, now = put_out
    parameters = list(cheap.model.tensors.parameters())
    expected = torch.autograd.grad(0.3 * (now - earlier.detach()).pow(2).sum(), parameters, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(term, parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_both_passes_drop_the_same_paths_and_draw_as_one_does(backbone: Backbone) -> None:
    batch, index, part = torch.from_numpy(random_images(6, 4)), torch.arange(4), torch.arange(4)
    made, put_out = pace(backbone, DROPS, "full,sigma=1e-6")
    torch.manual_seed(9)
    made.model(batch)
    (plain,), after = [each.detach() for each in put_out], torch.get_rng_state()

    torch.manual_seed(9)
    made.answers(batch, index, part, (1, 0))

    _, second, first = (each.detach() for each in put_out)
    assert float((first - plain).abs().max()) < 1e-3  # noise of one in a million, and the same paths
    assert float((second - plain).abs().max()) < 1e-3
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), after)
    made.model(batch)
    assert float((put_out[-1].detach() - plain).abs().max()) > 1e-3  # other paths move more


# -------------------------------------------------------------------------------------------------- the table of logits


def filled(made: Pace, put_out: list[Tensor], index: Sequence[int], *, epoch: int, parts: int = 1) -> None:
    """One step on the images ``index``."""
    batch, places = torch.from_numpy(random_images(epoch, 12)), torch.arange(len(index))
    for part in torch.tensor_split(places, parts):
        made.answers(batch[torch.tensor(index)][part], torch.tensor(index), part, (epoch, 0))


def test_the_table_has_a_row_for_each_image_and_none_for_those_not_seen(backbone: Backbone) -> None:
    made, put_out = pace(backbone, SSF(), FORMS["cheap"])
    assert made.logits is not None

    filled(made, put_out, [7, 1, 3], epoch=1, parts=2)
    assert bool(made.logits.isnan().all())  # until the step has ended
    made.remember(torch.tensor([7, 1, 3]), ALONE)

    assert made.logits.shape == (12, 3)
    assert torch.equal(made.logits[[7, 1, 3]], torch.cat(put_out).detach())
    assert sorted(torch.nonzero(~made.logits.isnan().any(1)).flatten().tolist()) == [1, 3, 7]


def test_an_image_that_a_step_has_twice_is_compared_with_the_epoch_before_both_times(backbone: Backbone) -> None:
    made, put_out = pace(backbone, SSF(), FORMS["cheap"])

    filled(made, put_out, [2, 5, 2], epoch=1)
    made.remember(torch.tensor([2, 5, 2]), ALONE)

    assert made.logits is not None
    assert torch.equal(made.logits[[2, 5]], put_out[0][[2, 1]].detach())  # the last ones stay


def test_processes_share_one_table(backbone: Backbone) -> None:
    index = torch.tensor([7, 1, 3, 9, 4])
    whole, _ = pace(backbone, SSF(), FORMS["cheap"])
    batch = torch.from_numpy(random_images(6, 5))
    whole.answers(batch, index, torch.arange(5), (1, 0))
    whole.remember(index, ALONE)
    rows = list[Tensor]()
    shares = [torch.arange(5)[rank::2] for rank in range(2)]
    for share in shares:  # what each process would give to the sum
        made, _ = pace(backbone, SSF(), FORMS["cheap"])
        made.answers(batch[share], index, share, (1, 0))
        made.remember(index, Processes(0, 2, object(), sum_of=lambda tensor: rows.append(tensor) or tensor))

    made, _ = pace(backbone, SSF(), FORMS["cheap"])
    made.answers(batch[shares[0]], index, shares[0], (1, 0))
    made.remember(index, Processes(0, 2, object(), sum_of=lambda tensor: tensor + rows[1]))

    assert whole.logits is not None
    assert made.logits is not None
    torch.testing.assert_close(made.logits, whole.logits, equal_nan=True)  # products of other sizes round otherwise
    assert not bool(made.logits[index].isnan().any())


def test_the_parts_of_a_step_have_the_loss_of_the_whole_step(backbone: Backbone) -> None:
    for text in FORMS.values():
        plan = replace(PLAN, consistency=text)
        whole, parts = (runs(backbone, SSF(), replace(plan, accumulate=n))[1] for n in (1, 3))
        assert whole[0].loss == pytest.approx(parts[0].loss, rel=1e-6)
        assert whole[1].loss == pytest.approx(parts[1].loss, rel=1e-4)  # AdamW's first steps are as large as lr


# -------------------------------------------------------------------------------------------------------- a training


def tensors_of(
    backbone: Backbone, method: Method, plan: Plan, folder: Path | None = None, after: int | None = None
) -> dict[str, NpArray]:
    model = TunedModel(backbone, method, 3, seed=1)
    stepping(model, backbone, plan, keeper(folder) if folder else None, after=after)
    return model.arrays() | {"head": model.linear.weight.detach().numpy().copy()}


@pytest.mark.parametrize("text", ["full,sigma=0", "full,sigma=0,weight=0", "cheap,sigma=0,weight=1"])
@pytest.mark.parametrize("method", [SSF(), DROPS], ids=lambda method: method.name)
def test_without_noise_it_is_plain_training_to_the_bit(method: Method, text: str, backbone: Backbone) -> None:
    plan = replace(PLAN, augment=("flip", "crop", "mixup"))

    assert same_bits(tensors_of(backbone, method, replace(plan, consistency=text)), tensors_of(backbone, method, plan))


def test_the_pack_of_a_training_without_noise_is_the_plain_one(tasks: Tasks, tmp_path: Path) -> None:
    packs = [tmp_path / folder / "shapes.pet" for folder in ("plain", "zero")]
    for pack, more in zip(packs, ((), ("--consistency", "full,sigma=0")), strict=True):
        pack.parent.mkdir()
        said = edgepet(*train_arguments(tasks.spec, tasks.data, "ssf", pack), *more)
        assert said.code == 0, said.err

    assert packs[0].read_bytes() == packs[1].read_bytes()


STOPPED = {
    "full": (replace(PLAN, consistency=FORMS["full"], augment=("flip", "crop", "mixup")), DROPS),
    "full, in parts": (replace(PLAN, consistency=FORMS["full"], accumulate=2, autocast=True), SSF()),
    "cheap": (replace(PLAN, consistency=FORMS["cheap"]), DROPS),
    "cheap, drawn images": (replace(PLAN, consistency=FORMS["cheap"], balance="sampling"), SSF()),
    "noise alone": (replace(PLAN, consistency="full,weight=0"), SSF()),
}


@pytest.mark.parametrize(
    ("plan", "method"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if "parts" in name else ()) for name, case in STOPPED.items()],
)
def test_a_fit_that_was_stopped_ends_with_the_same_bits(
    plan: Plan, method: Method, backbone: Backbone, tmp_path: Path
) -> None:
    expected = tensors_of(backbone, method, plan)
    for after in (1, 2, 2):  # then 1, 3 and 5 steps are kept: within an epoch, at its end, within the next one
        with pytest.raises(StopError):
            tensors_of(backbone, method, plan, tmp_path, after)

    assert same_bits(tensors_of(backbone, method, plan, tmp_path), expected)
    assert not same_bits(tensors_of(backbone, method, replace(plan, consistency=None)), expected)


@pytest.mark.slow
def test_a_fit_on_a_rounded_backbone_goes_on_as_well(backbone: Backbone, tmp_path: Path) -> None:
    def run(plan: Plan, folder: Path | None = None, after: int | None = None) -> dict[str, NpArray]:
        model = TunedModel(backbone, SSF(), 3, seed=1, fake_quant=FakeQuant(base_graph(backbone), "int4"))
        stepping(model, backbone, plan, keeper(folder) if folder else None, after=after)
        return model.arrays() | {"least": model.fake_quant.least.numpy().copy()}  # type: ignore[union-attr]

    for name, text in FORMS.items():
        plan = replace(PLAN, epochs=2, consistency=text)
        (tmp_path / name).mkdir()
        with pytest.raises(StopError):
            run(plan, tmp_path / name, 4)
        assert same_bits(run(plan, tmp_path / name), run(plan))


@pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES)
def test_every_method_that_folds_trains_under_noise_and_is_lowered_exactly(method: Method, backbone: Backbone) -> None:
    if method.name == "linear-probe":
        return
    plan = replace(PLAN, epochs=1, consistency="full")
    model = TunedModel(backbone, method, 3, seed=1)
    before = model.arrays()

    fit(model, images(1, 6), images(2, 6), backbone.preprocess, plan, lambda step: None)

    error, largest = algebra_error(model, backbone, random_images(4, 3))
    assert error <= 1e-9 * largest
    assert not same_bits(model.arrays(), before)


def test_a_checkpoint_keeps_the_table_and_one_without_it_is_not_whole(backbone: Backbone, tmp_path: Path) -> None:
    plan = replace(PLAN, consistency=FORMS["cheap"])
    with pytest.raises(StopError):
        tensors_of(backbone, SSF(), plan, tmp_path, after=4)
    saved = keeper(tmp_path).load()
    assert saved is not None
    table = saved.tensors["consistency/logits"]
    assert (table.dtype, table.shape, bool(np.isfinite(table).all())) == (np.float32, (12, 3), True)

    for broken, got in (
        ({}, "'consistency/logits'"),
        ({"consistency/logits": table[1:]}, "consistency/logits is (11, 3)"),
    ):
        rest = {name: tensor for name, tensor in saved.tensors.items() if name != "consistency/logits"}
        keeper(tmp_path).save(replace(saved, tensors=rest | broken))
        with pytest.raises(InputError) as refusal:
            tensors_of(backbone, SSF(), plan, tmp_path)
        path = tmp_path / "flowers.checkpoint"
        assert str(refusal.value) == f"{path}: is no whole checkpoint, got {got}\n  fix: delete it to begin again"

    assert table_bytes(FORMS["cheap"], 12, 3) == table.nbytes
    assert table_bytes(FORMS["full"], 12, 3) == table_bytes(None, 12, 3) == 0


def test_the_probe_beside_it_is_the_one_of_plain_training(backbone: Backbone) -> None:
    probes = [
        fit(TunedModel(backbone, SSF(), 3, seed=1), images(1, 12), images(2, 6), backbone.preprocess, plan,
            lambda step: None).probe
        for plan in (PLAN, replace(PLAN, consistency=FORMS["full"]))
    ]  # fmt: skip
    assert probes[0] == probes[1]


def test_the_second_term_draws_answers_of_one_image_together(backbone: Backbone) -> None:
    pixels = normalize(images(1, 12).pixels, backbone.preprocess)

    def distance(weight: float) -> float:
        """Between answers under noise, when a training with such a weight has ended."""
        epochs, model = iter(range(100)), TunedModel(backbone, LoRA(rank=2), 3, seed=1)
        plan = replace(PLAN, epochs=8, consistency=f"full,sigma=1.5,weight={weight}")
        stepping(model, backbone, plan, None, after=None, judge=lambda *given: (next(epochs) / 100, 1.0))
        sigmas = falling(1.5, model.layers, model.sites)
        with torch.no_grad():
            first, second = (
                model(torch.from_numpy(pixels), Noise(sigmas, 12, torch.arange(12), (turn,), "cpu")).numpy()
                for turn in range(2)
            )
        return apart(first, second)

    assert distance(1) < 0.3 * distance(0)


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_trains_with_it_and_the_pack_says_so(tasks: Tasks, tmp_path: Path) -> None:
    for form, text in {"full": "full", "cheap": FORMS["cheap"]}.items():
        pack = tmp_path / f"{form}.pet"
        said = edgepet(*train_arguments(tasks.spec, tasks.data, "lora", pack), "--consistency", text, "--json")

        assert said.code == 0, said.err
        whole = {"full": "full,sigma=1.2,weight=1.0", "cheap": "cheap,sigma=2.0,weight=0.3"}
        assert read_pack(pack).delta.training["consistency"] == whole[form]
        assert not checkpoint_file(pack).exists()
    assert "consistency" not in read_pack(tasks.shapes).delta.training


def test_the_command_line_refuses_what_cannot_be_disturbed(tasks: Tasks, tmp_path: Path) -> None:
    words = train_arguments(tasks.spec, tasks.data, "adaptformer", tmp_path / "a.pet")

    assert refused(3, *words, "--consistency", "full") == (
        "--consistency: disturbs what a method changes of each layer, for methods that fold,"
        " got adaptformer, whose branches stay beside the layers\n"
        "  fix: train without it, or choose a method that folds, as --method ssf\n"
    )
    words = train_arguments(tasks.spec, tasks.data, "ssf", tmp_path / "a.pet")
    assert refused(3, *words, "--consistency", FORMS["cheap"], "--augment", "flip") == (
        "--consistency: cheap compares an image with itself an epoch ago, so it must look the same,"
        " got --augment flip\n"
        "  fix: train without --augment, or with full, both passes of which see one image\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_pack_is_not_resumed_with_another_consistency(tasks: Tasks, tmp_path: Path) -> None:
    def say(step: Step) -> None:
        if step.step > 1:
            raise StopError

    given: dict[str, Any] = {"image_size": 32, "epochs": 1, "precision": "fp32", "batch_size": 8, "checkpoint_s": 0}
    with pytest.raises(StopError):
        package.train(tasks.data, tasks.spec, "ssf", tmp_path / "a.pet", say=say, consistency="full", **given)

    with pytest.raises(InputError) as refusal:
        package.train(
            tasks.data, tasks.spec, "ssf", tmp_path / "a.pet", resume=True, consistency="full,sigma=2", **given
        )
    assert str(refusal.value) == (
        f"{tmp_path / 'a.checkpoint'}: belongs to a training with other settings,"
        " got consistency full,sigma=1.2,weight=1.0, now full,sigma=2.0,weight=1.0\n"
        "  fix: resume with the options that it began with, or delete it to begin again"
    )


# ------------------------------------------------------------------------------------------ in processes of their own


def started(arguments: Sequence[object], *launcher: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", *launcher, "edgepet", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(arguments: Sequence[object], *launcher: str) -> None:
    process = started(arguments, *launcher)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def arguments(tasks: Tasks, pack: Path, form: str, method: str, *more: object) -> list[object]:
    pack.parent.mkdir()
    given = [*train_arguments(tasks.spec, tasks.data, method, pack), "--epochs", 6, "--batch-size", 5, "--resume"]
    return [*given, "--consistency", FORMS[form], "--checkpoint-every", 0, *more]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_training_that_is_killed_ends_with_the_same_pack(form: str, tasks: Tasks, tmp_path: Path) -> None:
    whole, killed = (tmp_path / name / "flowers.pet" for name in ("whole", "killed"))
    finished(arguments(tasks, whole, form, "consolidator"))

    words = arguments(tasks, killed, form, "consolidator")
    for seconds in (0.05, 0.3):
        process = started(words)
        before = checkpoint_file(killed).stat().st_mtime_ns if checkpoint_file(killed).exists() else 0
        while process.poll() is None and not (
            checkpoint_file(killed).exists() and checkpoint_file(killed).stat().st_mtime_ns > before
        ):
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert checkpoint_file(killed).exists()  # else nothing is resumed
    finished(words)

    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_end_with_the_tensors_of_one(form: str, tasks: Tasks, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the package accelerate")
    one, two = (tmp_path / name / "flowers.pet" for name in ("one", "two"))

    finished(arguments(tasks, one, form, "ssf"))
    finished(arguments(tasks, two, form, "ssf"), "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")

    left, right = (safetensors.numpy.load_file(pack.with_suffix(".work") / "method.safetensors") for pack in (one, two))
    assert left.keys() == right.keys()
    # sums in another order, and AdamW's steps of lr where a gradient is rounding alone
    assert np.median([np.median(np.abs(left[name] - right[name])) for name in left]) < 1e-5
    assert max(float(np.abs(left[name] - right[name]).max()) for name in left) < 0.05
