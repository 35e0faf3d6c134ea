"""Every PET method keeps its word: the start it declares, one formula on activations and weights, the paper's counts.

To add a method: its row in ``EXAMPLES`` of ``methods.py`` beside this, and its counts in ``COUNTS`` if the literature
gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgepet.deltas.delta import Score
from edgepet.deltas.updates import Grouped, Targeted, fold
from edgepet.errors import InputError
from edgepet.methods import (
    ARC,
    HTA,
    IA3,
    METHODS,
    RLRR,
    SSF,
    Adapter,
    BitFit,
    Consolidator,
    DoRA,
    FacTTK,
    FacTTT,
    Full,
    GLoRA,
    HiRA,
    KAdaptation,
    KronA,
    LinearProbe,
    LoRA,
    LoRAMul,
    Method,
    NormTuning,
    RepAdapter,
    UniLoRA,
    VeRA,
    configure,
)
from edgepet.methods.method import count, fp16_bytes, unflatten
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import NpArray, Site, Target
from edgepet.tuning.model import TunedModel, extract
from tests.methods import (
    EXAMPLES,
    check_examples,
    check_merged,
    check_pack,
    check_start,
    check_steps,
    furthest,
    logits,
    stored,
    trained,
)
from tests.tiny import make_delta, ones, perturb, random_images, same_bits, sites_of

each_method = pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES)


def test_every_method_has_an_example() -> None:
    check_examples()


# --------------------------------------------------------------------------------------------------------- the start


@each_method
def test_the_start_is_the_identity_exactly_where_the_method_says_so(method: Method, backbone: Backbone) -> None:
    check_start(method, backbone)


def test_a_new_head_answers_zero(backbone: Backbone) -> None:
    assert logits(TunedModel(backbone, SSF(), 3), random_images(2, 2)).tolist() == np.zeros((2, 3)).tolist()


def starts(method: Method, architecture: str = "vit_small_patch14_dinov2") -> dict[str, NpArray]:
    """Start values of all sites by the name that the method gives them, one after another."""
    rng = np.random.default_rng(0)
    found: dict[str, list[NpArray]] = {}
    for tensors in method.start(method.sites(sites_of(architecture)), {}, rng).values():
        for name, array in tensors.items():
            assert array.dtype == np.float32
            found.setdefault(name.rsplit(".", 1)[-1], []).append(array.reshape(-1))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


@pytest.mark.parametrize(("name", "mean"), [("gamma", 1.0), ("beta", 0.0)])
def test_ssf_starts_as_its_paper_says(name: str, mean: float) -> None:
    values = starts(SSF())[name].astype(np.float64)

    # 5 standard errors of a sample this large: 51,456 values
    assert abs(values.mean() - mean) < 5 * 0.02 / np.sqrt(values.size)
    assert abs(values.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * values.size)


def test_lora_starts_with_a_linear_layers_weight_and_zero() -> None:
    values = starts(LoRA(rank=8))
    bound = 1 / np.sqrt(384)

    assert not values["b"].any()
    assert 0.999 * bound < np.abs(values["a"]).max() <= np.float32(bound)
    # 5 standard errors of the second moment of 73,728 uniform values: their variance is bound^4 * 4/45
    assert abs((values["a"].astype(np.float64) ** 2).mean() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / 73_728)


def test_consolidator_starts_within_a_thousandth() -> None:
    for values in starts(Consolidator(groups=(384,))).values():
        assert 0.99e-3 < np.abs(values).max() <= np.float32(1e-3)
        # 41,472 values or more: 5 standard errors
        assert abs(values.astype(np.float64).std() - 1e-3 / np.sqrt(3)) < 5e-6


@each_method
def test_the_seed_decides_the_start(method: Method, backbone: Backbone) -> None:
    first, again, other = (TunedModel(backbone, method, 3, seed=seed).arrays() for seed in (1, 1, 2))

    assert same_bits(first, again)
    undrawn = ("linear-probe", "full", "bitfit", "norm-tuning", "ia3", "vera")
    drawn = method.name not in undrawn and method != GLoRA()
    assert same_bits(first, other) is not drawn


# ------------------------------------------------------------------------------------- one formula on both of its paths


@pytest.mark.parametrize("network", ["backbone", "scaled_backbone"])
@each_method
def test_the_merged_network_answers_as_the_tuned_one(
    method: Method, network: str, request: pytest.FixtureRequest
) -> None:
    check_merged(method, request.getfixturevalue(network))


@each_method
def test_what_was_learnt_survives_the_pack(method: Method, backbone: Backbone) -> None:
    check_pack(method, backbone)


# ------------------------------------------------------------------------------------------------------------ counts

FOUR = ("qkv", "attn.proj", "fc1", "fc2")
COUNTS: list[tuple[Method, int, int]] = [  # formulas of the papers, head left out
    (SSF(), 102_912, 205_824),
    (LoRA(rank=1), 18_432, 36_864),
    (LoRA(rank=4), 73_728, 147_456),
    (LoRA(rank=8), 147_456, 294_912),
    (LoRA(rank=16), 294_912, 589_824),
    (LoRA(rank=8, on=FOUR), 589_824, 1_179_648),
    (Consolidator(groups=(384,)), 96_768, 304_128),
    (Consolidator(groups=(192,)), 152_064, 525_312),
    (Consolidator(groups=(96,)), 262_656, 967_680),
    (LinearProbe(), 0, 0),
    (BitFit(), 51_456, 102_912),
    (NormTuning(), 19_200, 38_400),
    (FacTTT(rank=4), 5_376, 8_448),
    (FacTTT(rank=8), 15_360, 21_504),
    (FacTTT(rank=16), 49_152, 61_440),
    (FacTTK(rank=8), 7_808, 13_952),
    (FacTTK(rank=16), 18_688, 30_976),
    (FacTTK(rank=32), 61_952, 86_528),
    (KAdaptation(terms=32), 27_136, 50_176),
    (KronA(), 19_968, 38_400),
    (IA3(), 27_648, 55_296),  # 6 d a block: keys, values and four of the MLP's inside
    (RLRR(), 144_384, 288_768),
    (HiRA(), 589_824, 1_179_648),
    (LoRAMul(rank=1), 147_456, 294_912),
    (LoRAMul(), 811_008, 1_622_016),
    (GLoRA(), 156_672, 313_344),  # 12 (3 * 9 + 7) d: A, D and E for what 4 layers put out, C for what they read
    (GLoRA(mode="low-rank"), 12 * (8 * 16 + 25) * 384, 12 * (8 * 16 + 25) * 768),
    (HTA(), 92_160, 184_320),  # 5 d for each of 48 parts
    (HTA(rank=0), 55_296, 110_592),
    (ARC(), 48_816, 96_432),
    (ARC(rank=16), 21_888, 43_392),
    (VeRA(), 15_360, 24_576),  # 24 (d + 256): A and B are drawn
    (UniLoRA(), 2_000, 2_000),
    (UniLoRA(d=8_000), 8_000, 8_000),
    (DoRA(rank=8), 147_456 + 9_216, 294_912 + 18_432),  # LoRA's, and a length for each row of q and v
]


@pytest.mark.parametrize(("method", "small", "large"), COUNTS, ids=[repr(row[0]) for row in COUNTS])
def test_a_method_trains_and_stores_as_many_values_as_its_paper_says(method: Method, small: int, large: int) -> None:
    for architecture, values in (("vit_small_patch14_dinov2", small), ("vit_base_patch16_224", large)):
        layers = sites_of(architecture)

        assert count(method, layers, ones(layers)) == values
        assert stored(method, layers) == values


def test_bytes_are_those_of_the_packs_planes(backbone: Backbone) -> None:
    for method in (*EXAMPLES.values(), Adapter(rank=4)):
        model = TunedModel(backbone, method, 3, seed=1)
        delta = extract(model, backbone, task="t", labels=("a", "b", "c"), val=Score(top1=1.0, n=3))
        planes = {n: p for n, p in read_pack(encode_pack(delta)).planes.items() if not n.startswith("head.")}
        whole = sum(plane.stored.coding.stored_bytes(plane.stored.values) for plane in planes.values())

        assert fp16_bytes(method, backbone.layers, backbone.tensors) == whole, method
        assert sum(plane.tensor.nbytes for plane in planes.values()) <= whole, method


def test_repadapter_stores_what_it_adds_to_a_layers_input() -> None:
    for architecture, trained_values, values in (
        ("vit_small_patch14_dinov2", 120_000, 119_808),
        ("vit_base_patch16_224", 239_808, 239_616),
    ):
        layers, method = sites_of(architecture), RepAdapter(rank=8, groups=2)

        assert count(method, layers, {}) == trained_values
        # Both factors, and the one vector B a + b for two of rank and width: 8 fewer on each of 24 layers.
        assert stored(method, layers) == values == trained_values - 24 * 8


def test_nested_branches_of_a_consolidator_are_stored_once() -> None:
    layers, nested = sites_of("vit_small_patch14_dinov2"), Consolidator(groups=(96, 192, 384))

    assert count(nested, layers, {}) == 262_656 + 152_064 + 96_768
    assert stored(nested, layers) == 262_656  # the blocks of 96 groups and one bias, as the paper says


def test_full_trains_and_stores_every_parameter(backbone: Backbone) -> None:
    model = TunedModel(backbone, Full(), 3)
    delta = make_delta(Full().lower(backbone.tensors, model.sites, unflatten(model.arrays(), model.sites)))

    parameters = dict(backbone.module.named_parameters())
    values = sum(parameter.numel() for parameter in parameters.values())
    assert delta.stored_values == count(Full(), model.sites, backbone.tensors) == values
    assert set(delta.targets) == set(parameters)


# ---------------------------------------------------------------------------------------------------------- training


def own_state(model: TunedModel) -> dict[str, NpArray]:
    return {n: t.detach().numpy().copy() for n, t in model.state_dict().items() if not n.startswith("backbone.")}


@each_method
def test_three_steps_move_the_method_and_leave_every_bit_of_the_backbone(method: Method, backbone: Backbone) -> None:
    check_steps(method, backbone)


@each_method
def test_one_seed_gives_the_same_bits_twice(method: Method, backbone: Backbone) -> None:
    (first, losses), (second, again) = trained(backbone, method), trained(backbone, method)

    assert losses == again
    assert same_bits(own_state(first), own_state(second))


# ------------------------------------------------------------------------------------------------------ consolidator


def linear_site(width: int, out: int) -> Site:
    return Site(name="fc", kind="linear", weight="fc.weight", bias="fc.bias", in_features=width, out_features=out)


def tensors_of(method: Consolidator, site: Site, seed: int) -> dict[str, NpArray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(a.shape) for n, a in method.start([site], {}, rng)[site.name].items()}


def channel_shuffle(x: torch.Tensor, g: int) -> torch.Tensor:
    """The official module: x_s[j g + i] = x[i (C / g) + j], i < g, j < C / g; x is (B, C, N)."""
    out, channels = torch.empty_like(x), x.shape[1]
    for i in range(g):
        for j in range(channels // g):
            out[:, j * g + i] = x[:, i * (channels // g) + j]
    return out


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("width", "out", "groups"), [(12, 24, (6,)), (24, 12, (2, 4, 12)), (12, 12, (3, 4)), (8, 16, (1, 8))]
)
def test_consolidator_is_grouped_convolutions_beside_a_linear_layer(
    width: int, out: int, groups: tuple[int, ...], shuffle: bool
) -> None:
    method, site = Consolidator(groups=groups, shuffle=shuffle), linear_site(width, out)
    values = tensors_of(method, site, seed=1)
    rng = np.random.default_rng(2)
    weight, bias = rng.standard_normal((out, width)), rng.standard_normal(out)
    x = torch.from_numpy(rng.standard_normal((2, 5, width)))
    expected = functional.linear(x, torch.from_numpy(weight), torch.from_numpy(bias))
    frozen = expected.clone()
    for g in groups:
        read = channel_shuffle(x.transpose(1, 2), g) if shuffle else x.transpose(1, 2)
        kernel = torch.from_numpy(values[f"{g}.weight"]).reshape(out, width // g, 1)
        branch = functional.conv1d(read, kernel, torch.from_numpy(values[f"{g}.bias"]), groups=g)
        expected = expected + branch.transpose(1, 2)

    tuned = {name: torch.from_numpy(value) for name, value in values.items()}
    on_activations = method.forward(site, x, frozen, tuned, training=False)
    folded = {"fc.weight": weight, "fc.bias": bias}
    for targeted in method.lower({}, [site], {"fc": values}):
        folded[targeted.target.tensor] = fold(targeted, folded[targeted.target.tensor])

    # float64, sums of some dozens of products
    assert furthest(on_activations.numpy(), expected.numpy()) < 1e-12
    assert furthest(x.numpy() @ folded["fc.weight"].T + folded["fc.bias"], expected.numpy()) < 1e-12


def test_a_shuffled_branch_is_merged_by_a_permutation_of_columns() -> None:
    width, out, g = 12, 8, 4
    method, site = Consolidator(groups=(g,), shuffle=True), linear_site(width, out)
    values = tensors_of(method, site, seed=3)
    dense = fold(Targeted(Target("w"), Grouped(values[f"{g}.weight"])), np.zeros((out, width)))

    merged = fold(method.lower({}, [site], {"fc": values})[0], np.zeros((out, width)))

    for i in range(g):  # the official merge: merged[:, i (in / g) + j] = T[:, j g + i]
        for j in range(width // g):
            assert merged[:, i * (width // g) + j].tolist() == dense[:, j * g + i].tolist()


@pytest.mark.parametrize("order", ["C", "F"])
def test_nested_branches_are_summed_however_they_lie_in_memory(order: Any) -> None:
    method, site = Consolidator(groups=(2, 4)), linear_site(8, 8)
    values = {n: np.asarray(a, order=order) for n, a in tensors_of(method, site, seed=4).items()}
    before = {name: array.copy() for name, array in values.items()}

    weight, _ = method.lower({}, [site], {"fc": values})

    expected = sum(fold(Targeted(Target("w"), Grouped(values[f"{g}.weight"])), np.zeros((8, 8))) for g in (2, 4))
    assert fold(weight, np.zeros((8, 8))).tolist() == expected.tolist()
    assert all(np.array_equal(values[name], before[name]) for name in before)


def test_drop_path_drops_whole_samples_scales_the_others_and_only_in_training() -> None:
    method, site = Consolidator(groups=(4,), drop_path=0.25), linear_site(8, 8)
    values = {n: torch.from_numpy(a) for n, a in tensors_of(method, site, seed=5).items()}
    x, y = (torch.from_numpy(np.random.default_rng(6).standard_normal((400, 3, 8))) for _ in range(2))
    branches = method.forward(site, x, y, values, training=False) - y
    torch.manual_seed(0)

    got = method.forward(site, x, y, values, training=True) - y

    dropped = (got == 0).all(dim=(1, 2))
    scaled = ((got - branches / 0.75).abs() < 1e-12).all(dim=(1, 2))  # float64: one product and two sums
    assert bool((dropped ^ scaled).all())
    assert abs(int(dropped.sum()) - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)  # 5 sigma of a binomial
    again = method.forward(site, x, y, values, training=False) - y
    assert torch.equal(again, branches)


def test_a_model_drops_paths_only_while_it_trains(backbone: Backbone) -> None:
    model = perturb(TunedModel(backbone, Consolidator(groups=(16,), drop_path=0.5), 3), seed=3)
    images = random_images(4, 2)
    still, again = logits(model, images), logits(model, images)

    model.train()

    assert still.tobytes() == again.tobytes()
    assert furthest(logits(model, images), still) > 1e-3
    assert not any(module.training for module in model.backbone.modules())


def test_dora_leaves_a_row_of_zeros_as_it_is() -> None:
    site = Site(name="fc", kind="linear", weight="fc.weight", bias=None, in_features=3, out_features=2)
    weight = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], np.float32)
    start = DoRA(rank=1).start((site,), {"fc.weight": weight}, np.random.default_rng(0))
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in start["fc"].items()}

    low_rank, scale = DoRA(rank=1).lower({"fc.weight": torch.from_numpy(weight)}, (site,), {"fc": tensors})

    folded = fold(scale, fold(low_rank, torch.from_numpy(weight)))
    folded.sum().backward()
    assert np.array_equal(folded.detach().numpy(), weight)
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors.values() if tensor.grad is not None)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "resnest14d", "mixer_s32_224"])
def test_every_method_counts_itself_on_a_network_without_its_places(name: str) -> None:
    layers = sites_of(name)

    for method in map(configure, METHODS):
        counted = count(method, layers, ones(layers)), fp16_bytes(method, layers, ones(layers))
        assert (counted[0] > 0) >= (counted[1] > 0), method.name
    none = configure("vpt-shallow")
    assert (count(none, layers, {}), fp16_bytes(none, layers, {})) == (0, 0)


# --------------------------------------------------------------------------------------------------------- configure


def test_settings_are_read_as_people_type_them() -> None:
    assert configure("lora") == LoRA()
    typed_in = {"rank": "4", "alpha": "2.5", "on": "proj,fc1"}
    assert configure("lora", typed_in) == LoRA(rank=4, alpha=2.5, on=("proj", "fc1"))
    assert configure("consolidator", {"groups": "96,192", "shuffle": "true", "drop_path": "0"}) == Consolidator(
        groups=(96, 192), shuffle=True, drop_path=0.0
    )


BAD_SETTINGS: list[tuple[str, Mapping[str, str], str]] = [
    ("prune", {}, f"`method`: is one of {', '.join(METHODS)}, got 'prune'"),
    ("ssf", {"rank": "4"}, "`settings` rank: ssf has the settings blocks, on, got 'rank'"),
    (
        "lora",
        {"rang": "4"},
        "`settings` rang: lora has the settings alpha, alphas, blocks, on, rank, ranks, rslora, got 'rang'",
    ),
    ("lora", {"ranks": "4"}, "`settings` ranks: needs NAME:whole number with commas between, got '4'"),
    ("lora", {"ranks": "fc1:x"}, "`settings` ranks: needs NAME:whole number with commas between, got 'fc1:x'"),
    ("lora", {"ranks": "fc1:0"}, "lora: needs a rank of at least 1, got 0"),
    (
        "lora",
        {"name": "x"},
        "`settings` name: lora has the settings alpha, alphas, blocks, on, rank, ranks, rslora, got 'name'",
    ),
    ("lora", {"rank": "four"}, "`settings` rank: needs a whole number, got 'four'"),
    ("lora", {"rank": "4.0"}, "`settings` rank: needs a whole number, got '4.0'"),
    ("lora", {"alpha": "x"}, "`settings` alpha: needs a number, got 'x'"),
    ("lora", {"alpha": "nan"}, "`settings` alpha: needs a number, got 'nan'"),
    ("lora", {"alpha": "-inf"}, "`settings` alpha: needs a number, got '-inf'"),
    ("lora", {"rank": "0"}, "lora: needs a rank of at least 1, got 0"),
    ("mam", {"length": "0"}, "mam: needs a length of at least 1, got 0"),
    ("mam", {"rank": "0"}, "mam: needs a rank of at least 1, got 0"),
    ("hira", {"rank": "0"}, "hira: needs a rank of at least 1, got 0"),
    ("lora-mul", {"rank": "0"}, "lora-mul: needs a rank of at least 1, got 0"),
    ("glora", {"rank": "0"}, "glora: needs a rank of at least 1, got 0"),
    ("glora", {"mode": "matrix"}, "glora: needs a mode of vector, low-rank, got 'matrix'"),
    ("hta", {"rank": "-1"}, "hta: needs a rank of at least 0, got -1"),
    ("arc", {"rank": "0"}, "arc: needs a rank of at least 1, got 0"),
    ("vera", {"rank": "0"}, "vera: needs a rank of at least 1, got 0"),
    ("vera", {"seed": "-1"}, "vera: needs a seed from 0 to below 2^53, got -1"),
    ("vera", {"seed": str(2**53)}, "vera: needs a seed from 0 to below 2^53, got 9007199254740992"),
    ("uni-lora", {"d": "0"}, "uni-lora: needs a d and a rank of at least 1, got (0, 4)"),
    ("uni-lora", {"rank": "0"}, "uni-lora: needs a d and a rank of at least 1, got (2000, 0)"),
    ("uni-lora", {"seed": "-1"}, "uni-lora: needs a seed from 0 to below 2^53, got -1"),
    ("consolidator", {"shuffle": "yes"}, "`settings` shuffle: needs true or false, got 'yes'"),
    ("consolidator", {"groups": "8,x"}, "`settings` groups: needs whole numbers with commas between, got '8,x'"),
    ("consolidator", {"groups": "8,8"}, "consolidator: needs groups that differ and are at least 1, got (8, 8)"),
    ("consolidator", {"groups": "0"}, "consolidator: needs groups that differ and are at least 1, got (0,)"),
    ("consolidator", {"drop_path": "1"}, "consolidator: needs a drop_path in [0, 1), got 1.0"),
    ("consolidator", {"drop_path": "nan"}, "`settings` drop_path: needs a number, got 'nan'"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD_SETTINGS, ids=[row[2] for row in BAD_SETTINGS])
def test_a_setting_that_is_none_is_refused(name: str, settings: Mapping[str, str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        configure(name, settings)

    assert str(refused.value) == message
