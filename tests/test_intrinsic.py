"""``sites``: how few numbers suffice to tune each part of a network, and what that says of where methods go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepet.deltas.updates import Add, Targeted
from edgepet.errors import InputError
from edgepet.images.held import ALONE
from edgepet.methods import METHODS
from edgepet.methods.depth import in_blocks
from edgepet.methods.method import fp16_size
from edgepet.networks.backbone import Backbone
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning import intrinsic
from edgepet.tuning.fit import LabelledPixels
from edgepet.tuning.intrinsic import Group, Measured, Reached, most_seconds, prepare
from edgepet.tuning.placing import Choice, Place, choose, places, ranked, size_of
from edgepet.tuning.remembered import Place as Remembering
from edgepet.tuning.subspaces import InSubspace, Submodule, projection, submodules
from tests.tiny import tiny_vit

# ------------------------------------------------------------------------------------------------------- the subspace


@pytest.mark.parametrize(("total", "dimension"), [(10, 3), (1000, 16), (64, 64)])
def test_a_projection_has_orthonormal_columns_that_all_weights_share_evenly(total: int, dimension: int) -> None:
    places_of, signs = projection(total, dimension, 5)
    dense = np.zeros((total, dimension))
    dense[np.arange(total), places_of.numpy()] = signs.numpy()

    np.testing.assert_allclose(dense.T @ dense, np.eye(dimension), atol=1e-6)  # float32 roots
    counts = np.bincount(places_of.numpy(), minlength=dimension)
    assert counts.max() - counts.min() <= 1
    assert {-1.0, 1.0} == set(np.sign(signs.numpy()))


@pytest.mark.parametrize("dimension", [4, 9, 10, 40])
def test_lis_toy_problem_has_the_dimension_that_it_is_made_of(dimension: int) -> None:
    """Li et al. 2018, section 2: 1000 numbers in ten groups, each of which must add up to its own sum: ten suffice."""
    places_of, signs = projection(1000, dimension, 0)
    sums = np.zeros((10, dimension))
    np.add.at(sums, (np.arange(1000) // 100, places_of.numpy()), signs.numpy().astype(np.float64))

    solved = np.linalg.lstsq(sums, np.arange(1.0, 11.0), rcond=None)[0]

    assert bool(np.abs(sums @ solved - np.arange(1.0, 11.0)).max() < 1e-9) is (dimension >= 10)


def test_what_is_moved_is_the_projection_of_z_cut_to_weights_and_biases_row_blocks_and_kernels(
    backbone: Backbone,
) -> None:
    method = in_blocks(InSubspace(("q", "mlp.fc2"), dimension=7, seed=3), "1")
    sites = method.sites(backbone.layers)
    z = torch.randn(7, generator=torch.Generator().manual_seed(1))

    moved = method.lower({n: torch.from_numpy(t) for n, t in backbone.tensors.items()}, sites, {"*": {"z": z}})

    assert [str(each.target) for each in moved] == [
        "blocks.1.attn.qkv.weight[0:64]", "blocks.1.attn.qkv.bias[0:64]",
        "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias",
    ]  # fmt: skip
    flat = torch.cat([added(each).reshape(-1) for each in moved])
    places_of, signs = projection(len(flat), 7, 3)
    assert torch.equal(flat, z[places_of] * signs)
    assert math.isclose(float(flat.norm()), float(z.norm()), rel_tol=1e-5)


def added(each: Targeted) -> Tensor:
    assert isinstance(each.update, Add)
    tensor: Tensor = each.update.d
    return tensor


def test_submodules_are_every_kind_of_layer_in_groups_of_three_blocks(backbone: Backbone, tmp_path: Path) -> None:
    found = submodules(backbone.layers, backbone.tensors)
    convnet = tiny_vit(tmp_path, 7, architecture="test_resnet")

    sizes = {"q": 4160, "k": 4160, "v": 4160, "attn.proj": 4160, "mlp.fc1": 12480, "mlp.fc2": 12352}
    assert {each.name: each.parameters for each in found} == {
        f"{kind} in {blocks}": 3 * size for blocks in ("0-2", "3-5") for kind, size in sizes.items()
    }
    assert {each.blocks for each in submodules(convnet.layers, convnet.tensors)} == {"0-2", "3"}


# ------------------------------------------------------------------------------------- dimensions whose answer is known


class Colours(nn.Module):
    """The mean colour of an image; what block 0 makes of it reaches nobody, block 1 all but hides red and blue."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)])
        hides = [[0.02, 1.0, -0.02], [-0.02, 1.0, 0.02], [0.0, 1.0, 0.0]]
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                shown = torch.tensor(hides) if name == "blocks.1.0.weight" else torch.eye(3)
                tensor.copy_(shown.reshape(tensor.shape) if tensor.ndim > 1 else torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).mean((2, 3))
        y: Tensor = self.blocks[1](x + 0 * self.blocks[0](x))
        return y


def coloured(seed: int, n: int) -> LabelledPixels:
    """Half the images redder, half bluer; green is noise, and far louder."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 2
    red = 128 + 20 * (2 * labels - 1) + rng.normal(0, 4, n)
    colours = np.stack([red, rng.uniform(0, 255, n), 256 - red], 1).clip(0, 255)
    return LabelledPixels(np.broadcast_to(colours[:, None, None], (n, 4, 4, 3)).astype(np.uint8), labels)


def remembering(folder: Path) -> Remembering:
    return Remembering(
        folder=folder / "t.features", budget_bytes=10**9, identity={}, turn=ALONE, tell=lambda line, more: None,
        stage=lambda name: None,
    )  # fmt: skip


def test_a_part_that_nobody_reads_has_no_dimension_and_one_that_hides_the_answer_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "DIMENSIONS", (1, 2, 4, 8))
    monkeypatch.setattr(intrinsic, "STEP", 1.0)  # twelve weights cannot learn their images by heart
    network = Backbone.from_module(Colours(), name="colours", preprocess=Preprocess(image_size=(4, 4)))
    ground = prepare(network, coloured(1, 160), coloured(2, 120), classes=2, seed=0)

    dead, live = (
        Measured(submodule=part, tried=Group(ground, part, remembering(tmp_path)).measured(part))
        for part in (Submodule(on="0", blocks=blocks, parameters=12) for blocks in ("0", "1"))
    )

    assert (dead.gain, dead.dimension, len(dead.tried)) == (0.0, None, 1)
    whole, *subspaces = live.tried
    assert live.gain == whole.gain > 0.1
    assert whole.top1 > 0.9 > ground.top1
    assert [each.dimension for each in subspaces] == [1, 2, 4, 8]
    assert subspaces[0].gain < 0.5 * live.gain < subspaces[-1].gain
    assert live.dimension is not None


def test_equal_seeds_measure_the_same_and_what_lies_before_makes_no_difference(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Submodule(on="v", blocks="3-5", parameters=12480)
    ground = prepare(backbone, pictures(1, 16), pictures(2, 8), classes=3, seed=0)

    first, second = (Group(ground, part, remembering(tmp_path)).reached(part, 16) for _ in range(2))
    monkeypatch.setattr(intrinsic, "remember", lambda *given: None)
    whole = Group(ground, part, remembering(tmp_path)).reached(part, 16)

    assert first == second
    assert math.isclose(first.gain, whole.gain, abs_tol=1e-4)  # of 8 images a step, in another order of sums


def pictures(seed: int, n: int) -> LabelledPixels:
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 3
    pixels = rng.integers(0, 90, (n, 32, 32, 3)) + 60 * np.eye(3, dtype=np.int64)[labels][:, None, None]
    return LabelledPixels(pixels.astype(np.uint8), labels)


@pytest.mark.parametrize("blocks", ["0-2", "3-5"])
def test_a_fit_that_moves_nothing_gains_nothing(
    blocks: str, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Submodule(on="v", blocks=blocks, parameters=12480)
    ground = prepare(backbone, pictures(1, 24), pictures(2, 12), classes=3, seed=0)
    monkeypatch.setattr(intrinsic, "STEP", 0.0)

    reached = Group(ground, part, remembering(tmp_path)).reached(part, 0)

    assert abs(reached.gain) < 1e-5  # float32: features of 8 images, and of all at once
    assert reached.top1 == ground.top1


@pytest.mark.parametrize(
    ("gains", "tried", "dimension"),
    [
        ({0: 1.0, 16: 0.1, 128: 0.4, 1024: 0.7, 8192: 1.0}, 5, 4096),  # 0.1 for each doubling: 0.9 after eight
        ({0: 1.0, 16: 0.95}, 2, 16),
        ({0: 1.0, 16: -3.0, 128: 0.9}, 3, 128),
        ({0: 1.0, 16: 0.1, 128: 0.1, 1024: 0.1, 8192: 0.89}, 5, 50_000),  # none that was tried: all of them
        ({0: 0.04}, 1, None),  # within its standard error
        ({0: -1.0}, 1, None),
    ],
    ids=["between", "the first", "exactly", "all", "noise", "harm"],
)
def test_the_dimension_is_where_nine_tenths_are_reached(
    gains: dict[int, float], tried: int, dimension: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = object.__new__(Group)
    monkeypatch.setattr(Group, "reached", lambda self, part, size: fitted(size, gains[size]))
    part = Submodule(on="q", blocks="0", parameters=50_000)

    measured = Measured(submodule=part, tried=group.measured(part))

    assert len(measured.tried) == tried
    assert measured.dimension == dimension


def fitted(dimension: int, gain: float, error: float = 0.05) -> Reached:
    return Reached(dimension=dimension, gain=gain, error=error, top1=0.5)


def test_a_fit_whose_loss_is_no_number_is_refused(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Submodule(on="v", blocks="3-5", parameters=12480)
    ground = prepare(backbone, pictures(1, 8), pictures(2, 4), classes=3, seed=0)
    monkeypatch.setattr(intrinsic, "STEP", math.nan)

    with pytest.raises(InputError) as refusal:
        Group(ground, part, remembering(tmp_path)).reached(part, 0)

    assert str(refusal.value) == "v in 3-5, all dimensions: the loss stopped being finite"


def test_the_estimate_grows_with_images_and_shrinks_with_depth(backbone: Backbone) -> None:
    ground = prepare(backbone, pictures(1, 40), pictures(2, 40), classes=3, seed=0)
    parts = submodules(backbone.layers, backbone.tensors)

    seconds = [most_seconds(ground, chosen) for chosen in (parts[:6], parts[6:], parts)]

    assert all(0 < each < 600 for each in seconds)


# ------------------------------------------------------------------------------------------------------ the choice


def told(on: str, blocks: str, gain: float, dimension: int = 16, error: float = 0.01) -> Measured:
    part = Submodule(on=on, blocks=blocks, parameters=1000)
    return Measured(submodule=part, tried=(fitted(0, gain, error), fitted(dimension, gain, error)))


class Arrays(dict[str, NpArray]):
    """One array for each name: what has a name twice is shared."""

    def of(self, **sizes: int) -> tuple[NpArray, ...]:
        return tuple(self.setdefault(name, np.zeros(size, np.float32)) for name, size in sizes.items())


def test_the_choice_is_that_of_trying_everything() -> None:
    rng = np.random.default_rng(7)
    kinds, groups = ["q", "v", "fc1", "fc2"], ["0-2", "3-5", "6-8"]
    for _ in range(30):
        named = Arrays()
        measured = [told(k, g, float(rng.normal(0.1, 0.2)), int(rng.integers(10, 400))) for g in groups for k in kinds]
        there = [
            Place(on=(k,), blocks=g, values=int(rng.integers(50, 300)),
                  arrays=named.of(**{f"{k}{g}": int(rng.integers(50, 300)), f"shared {k}": 40}))
            for g in groups for k in kinds
        ]  # fmt: skip
        budget = int(rng.integers(100, 4000))

        got = choose(ranked(measured, there), budget, lambda on, blocks: stored(there, on, blocks))  # noqa: B023

        assert (got is None) is ((best := tried_out(measured, there, budget)) == 0)
        if got is not None:
            assert math.isclose(got.gain, best)
            assert got.fp16_bytes == stored(there, got.on, got.blocks) <= budget


def stored(there: Sequence[Place], on: Sequence[str], blocks: str) -> int:
    first, last = blocks.split("-")
    chosen = [p for p in there if p.on[0] in on and int(first) <= int(p.blocks[0]) <= int(last)]
    return 2 * sum({id(a): a.size for p in chosen for a in p.arrays}.values())


def tried_out(measured: Sequence[Measured], there: Sequence[Place], budget: int) -> float:
    """The most that any choice within ``budget`` gains: by counting bits, from the definition."""
    worth = {}
    for each, place in zip(measured, there, strict=True):
        whole = each.tried[0]
        part = min(1.0, place.values / each.tried[1].dimension)
        worth[each.submodule.on, each.submodule.blocks] = whole.gain * part if whole.gain > whole.error else 0.0
    kinds = sorted({kind for kind, _ in worth})
    most = 0.0
    for first, last in itertools.product(range(3), range(3)):
        inside = ["0-2", "3-5", "6-8"][first : last + 1]
        for bits in range(1, 1 << len(kinds)):
            on = [kind for i, kind in enumerate(kinds) if bits >> i & 1]
            if inside and stored(there, on, f"{inside[0][0]}-{inside[-1][-1]}") <= budget:
                most = max(most, sum(worth[kind, blocks] for kind in on for blocks in inside))
    return most


def test_noise_and_harm_are_not_paid_for_and_of_equals_the_smaller_is_taken() -> None:
    measured = [
        told("q", "0-2", 0.3),
        told("v", "0-2", 0.05, error=0.06),
        told("q", "3-5", -0.2),
        told("v", "3-5", 2e-6, error=0),
    ]
    there = [
        Place(on=(m.submodule.on,), blocks=m.submodule.blocks, values=99, arrays=Arrays().of(own=99)) for m in measured
    ]

    best = ranked(measured, there)[0]

    assert best == Choice(on=("q",), blocks="0-2", gain=0.3, fp16_bytes=198)
    assert ranked(measured[1:], there[1:]) == ()


def test_what_the_places_did_not_count_may_not_break_the_budget() -> None:
    measured = [told("q", "0-2", 0.3), told("q", "3-5", 0.2)]
    there = [Place(on=("q",), blocks=m.submodule.blocks, values=99, arrays=Arrays().of(**{m.submodule.name: 50}))
             for m in measured]  # fmt: skip
    between: Mapping[str, int] = {"0-5": 260, "0-2": 100, "3-5": 100}

    got = [choose(ranked(measured, there), budget, lambda on, blocks: between[blocks]) for budget in (260, 259, 99)]

    assert [each and (each.blocks, each.fp16_bytes) for each in got] == [("0-5", 260), ("0-2", 100), None]


ON_TOKENS = [name for name in METHODS if name not in ("conv-adapter", "st-adapter", "linear-probe")]


@pytest.mark.parametrize("name", ON_TOKENS)
def test_every_method_can_take_an_answer_of_the_size_that_was_said(name: str, backbone: Backbone) -> None:
    parts = submodules(backbone.layers, backbone.tensors)
    settings = {"kadaptation": {"terms": "8"}, "uni-lora": {"d": "500"}}.get(name, {})
    there, exact = places(backbone, name, settings, parts), size_of(backbone, name, settings)
    measured = [told(part.on, part.blocks, 0.1 + 0.01 * place) for place, part in enumerate(parts)]
    found = ranked(measured, there)

    assert found
    for each in found[:: max(1, len(found) // 12)]:
        size = exact(each.on, each.blocks)
        assert size == each.fp16_bytes or (not each.on and size < each.fp16_bytes)
    cheapest = choose(found, min(fp16_size(place.arrays) for place in there), exact)
    assert cheapest is not None


def test_a_method_without_any_layer_or_block_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError) as refusal:
        places(backbone, "linear-probe", {}, submodules(backbone.layers, backbone.tensors))

    assert str(refusal.value) == "`method`: tunes nothing in the blocks of test_vit, got 'linear-probe'"
