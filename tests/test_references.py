"""Every method against an independent reading of its paper or of its official code: forward passes, written slowly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.expressions import Binary
from edgepet.deltas.merge import fold_all
from edgepet.deltas.updates import fold
from edgepet.methods import (
    IA3,
    BiLoRA,
    BitFit,
    DoRA,
    FacTTK,
    FacTTT,
    KAdaptation,
    KronA,
    LoKr,
    LoRA,
    Method,
    NormTuning,
    RepAdapter,
)
from edgepet.methods.krona import two_factors
from edgepet.methods.method import SHARED
from edgepet.spec import NpArray, Site
from tests.tiny import ones, sites_of

D, RANK = 12, 5
Values = dict[str, dict[str, NpArray]]
ROUNDING = 1e-12  # float64, sums of some hundreds of products of about one


def layer(name: str, out: int, width: int) -> Site:
    thirds = tuple((part, (i * out // 3, (i + 1) * out // 3)) for i, part in enumerate("qkv"))
    return Site(name=name, kind="linear", weight=f"{name}.weight", bias=f"{name}.bias", in_features=width,
                out_features=out, blocks=thirds if name == "qkv" else ())  # fmt: skip


QKV, PROJ, FC1, FC2 = layer("qkv", 3 * D, D), layer("proj", D, D), layer("fc1", 4 * D, D), layer("fc2", D, 4 * D)
BLOCK = (QKV, PROJ, FC1, FC2)


def drawn(method: Method, sites: tuple[Site, ...], base: Mapping[str, NpArray]) -> Values:
    """Tensors of the start's shapes, none of them near its start."""
    rng = np.random.default_rng(1)
    start = method.start(sites, base, rng)
    return {site: {n: rng.standard_normal(a.shape) for n, a in tensors.items()} for site, tensors in start.items()}


def dense(sites: tuple[Site, ...]) -> dict[str, NpArray]:
    rng = np.random.default_rng(2)
    weights = {site.weight: rng.standard_normal((site.out_features, site.columns)) for site in sites}
    return weights | {str(site.bias): rng.standard_normal(site.out_features) for site in sites}


def check(method: Method, reference: Callable[[Values, Site, Tensor, Tensor, Tensor], Tensor]) -> None:
    """The layer with all updates folded in against ``reference(values, site, x, weight, bias)``."""
    base = dense(BLOCK)
    sites = method.sites(BLOCK)
    values = drawn(method, sites, base)
    folded = fold_all(base, method.lower(base, sites, values))
    for site in sites:
        x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 3, site.in_features)))
        weight, bias = torch.from_numpy(base[site.weight]), torch.from_numpy(base[str(site.bias)])
        got = x.numpy() @ folded[site.weight].T + folded[str(site.bias)]
        expected = reference(values, site, x, weight, bias).numpy()
        assert np.abs(got - expected).max() <= ROUNDING * max(1.0, np.abs(expected).max())
        assert np.abs(got - (x.numpy() @ base[site.weight].T + base[str(site.bias)])).max() > 1e-3


def torched(values: Mapping[str, NpArray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------- FacT


def fact_forward(site: Site, x: Tensor, y: Tensor, u: Any, v: Any, cores: Any, scale: float) -> Tensor:
    """The official forward passes: factors applied to tokens, MLPs by reshaping the channels to four groups."""
    lead = x.shape[:-1]
    if site is QKV:
        parts = [v(core(u(x))) for core in cores]
        return y + scale * torch.cat(parts, dim=-1)
    if site is PROJ:
        return y + scale * v(cores[0](u(x)))
    if site is FC1:
        inner = cores[0](u(x)).reshape(*lead, 4, RANK)
        return y + scale * v(inner).reshape(*lead, 4 * D)
    return y + scale * v(cores[0](u(x.reshape(*lead, 4, D)).reshape(*lead, 4 * RANK)))


def test_fact_tensor_train_is_its_official_forward_pass() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shared, own = torched(values[SHARED]), torched(values[site.name])
        core = [own[f"core.{i}"] for i in range(len(own))]
        # S1 of fc1 is (4 r, r): its outputs are four groups. S2 of fc2 is (r, 4 r): its inputs are.
        wide = [torch.cat(core, dim=0)] if site is FC1 else [torch.cat(core, dim=1)] if site is FC2 else core
        cores = [lambda h, s=s: functional.linear(h, s) for s in wide]
        u, v = (lambda h: functional.linear(h, shared[f"{D}.u"])), (lambda h: functional.linear(h, shared[f"{D}.v"]))
        return fact_forward(site, x, functional.linear(x, weight, bias), u, v, cores, 0.7)

    check(FacTTT(rank=RANK, scale=0.7), reference)


def test_fact_tucker_is_its_official_forward_pass() -> None:
    """CP = C @ P, then x @ slice, where an MLP's slices are CP[:, :, four].reshape(r, 4 r), the second's turned."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shared, own = torched(values[SHARED]), torched(values[site.name])
        cube = shared[f"{D}.cube"]
        if site in (FC1, FC2):
            slices = (cube @ own["weights"]).reshape(RANK, RANK * 4)
            cores = [lambda h: h @ slices] if site is FC1 else [lambda h: h @ slices.T]
        else:
            each = [(cube @ own[f"weights.{i}"])[:, :, 0] for i in range(len(own))]
            cores = [lambda h, s=s: h @ s for s in each]
        u, v = (lambda h: functional.linear(h, shared[f"{D}.u"])), (lambda h: functional.linear(h, shared[f"{D}.v"]))
        return fact_forward(site, x, functional.linear(x, weight, bias), u, v, cores, 1.5)

    check(FacTTK(rank=RANK, scale=1.5), reference)


# ------------------------------------------------------------------------------------------------- products of others


def by_parts(site: Site, y: Tensor, change: Callable[[str, tuple[int, int]], Tensor]) -> Tensor:
    """``y`` with ``change(part, rows)`` added to the rows of queries and values."""
    out = y.clone()
    for part, (first, last) in site.blocks:
        if part in "qv":
            out[..., first:last] += change(f"{part}.", (first, last))
    return out


def test_kadaptation_is_its_sum_of_kronecker_products() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shared, own = torched(values[SHARED]), torched(values[site.name])

        def change(part: str, rows: tuple[int, int]) -> Tensor:
            total = torch.zeros(D, D, dtype=torch.float64)
            for i in range(4):
                rule = shared[f"{part}l"][i] @ shared[f"{part}r"][i]
                total = total + torch.kron(rule, own[f"{part}u"][i] @ own[f"{part}v"][i])
            return functional.linear(x, 0.3 * total, own["bias"])

        return by_parts(site, functional.linear(x, weight, bias), change)

    check(KAdaptation(terms=4, scale=0.3), reference)


@pytest.mark.parametrize("method", [KronA(scale=0.5), LoKr(rank=8, alpha=4.0), LoKr(rank=1, alpha=0.5)], ids=repr)
def test_a_kronecker_adapter_is_two_small_products_on_folded_tokens(method: Any) -> None:
    """(A (x) B) x: x is folded to (q, c), and A X B^T is folded back. The product itself is never made."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = torched(values[site.name])

        def change(part: str, rows: tuple[int, int]) -> Tensor:
            left = own[f"{part}a"][0]
            right = own[f"{part}c"][0] @ own[f"{part}d"][0] if f"{part}c" in own else own[f"{part}b"][0]
            folded = x.reshape(*x.shape[:-1], left.shape[1], right.shape[1])
            return 0.5 * (left @ folded @ right.T).reshape(*x.shape[:-1], D)

        return by_parts(site, functional.linear(x, weight, bias), change)

    check(method, reference)


@pytest.mark.parametrize(
    ("side", "factor", "cut"),
    [(768, -1, (24, 32)), (384, -1, (16, 24)), (12, -1, (3, 4)), (7, -1, (1, 7)), (768, 8, (8, 96)), (768, 96, (8, 96)),
     (36, 8, (6, 6)), (20, 8, (4, 5)), (12, 5, (3, 4))],
)  # fmt: skip
def test_sides_are_cut_as_lycoris_and_peft_cut_them(side: int, factor: int, cut: tuple[int, int]) -> None:
    assert two_factors(side, factor) == cut


def test_dora_is_a_direction_and_a_length() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, rows_of = torched(values[site.name]), dict(site.blocks)
        moved = weight.clone()
        for part in "qv":
            first, last = rows_of[part]
            direction = weight[first:last] + 3.0 / 2 * own[f"{part}.b"] @ own[f"{part}.a"]
            moved[first:last] = own[f"{part}.m"][:, None] * functional.normalize(direction, dim=1)
        return functional.linear(x, moved, bias)

    check(DoRA(rank=2, alpha=3.0), reference)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_takes_ranks_and_alphas_by_the_layer(rslora: bool) -> None:
    method = LoRA(rank=2, alpha=3.0, on=("q", "v", "fc1", "proj"), ranks={"fc1": 4}, alphas={"fc1": 5.0}, rslora=rslora)

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, y = torched(values[site.name]), functional.linear(x, weight, bias)
        rank, alpha = (4, 5.0) if site is FC1 else (2, 3.0)
        scale = alpha / np.sqrt(rank) if rslora else alpha / rank
        if site.blocks:
            return by_parts(site, y, lambda part, rows: scale * (x @ own[f"{part}a"].T @ own[f"{part}b"].T))
        return y + scale * (x @ own["a"].T @ own["b"].T)

    check(method, reference)


def test_ia3_rescales_keys_values_and_the_inside_of_the_mlp() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = torched(values[site.name])
        if site is FC2:
            return functional.linear(x * own["inner"], weight, bias)
        y = functional.linear(x, weight, bias)
        q, k, v = y.split(D, dim=-1)
        return torch.cat([q, k * own["k.s"], v * own["v.s"]], dim=-1)

    check(IA3(), reference)


def test_repadapter_is_two_convolutions_in_front_of_a_layer() -> None:
    """The official module: a 1 x 1 convolution to the rank and one in groups back, on (B, C, N)."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, channels = torched(values[site.name]), x.transpose(1, 2)
        down = functional.conv1d(channels, own["down"][:, :, None], own["down.bias"])
        up = functional.conv1d(down, own["up"].reshape(D, 2, 1), own["up.bias"], groups=2)
        return functional.linear((channels + 0.5 * up).transpose(1, 2), weight, bias)

    check(RepAdapter(rank=4, groups=2, scale=0.5), reference)


def test_bitfit_and_norm_tuning_add_to_vectors() -> None:
    norm = Site(name="n", kind="norm", weight="n.weight", bias="n.bias", in_features=D, out_features=D)
    rng = np.random.default_rng(0)
    base = {"n.weight": rng.standard_normal(D), "n.bias": rng.standard_normal(D)}
    for method, changed in ((BitFit(), {"n.bias": "d"}), (NormTuning(), {"n.weight": "weight", "n.bias": "bias"})):
        values = drawn(method, (norm,), base)
        lowered = {t.target.tensor: fold(t, base[t.target.tensor]) for t in method.lower(base, (norm,), values)}
        assert lowered.keys() == changed.keys()
        for tensor, name in changed.items():
            assert lowered[tensor].tolist() == (base[tensor] + values["n"][name]).tolist()


# ------------------------------------------------------------------------------------------------------------ 1 bit


def lloyd_codewords() -> tuple[float, float]:
    """Medians of the lower and the upper half of a normal distribution, from samples."""
    values = np.sort(np.random.default_rng(0).standard_normal(2_000_001))
    return float(np.median(values[:1_000_000])), float(np.median(values[1_000_001:]))


def test_one_bit_factors_are_the_nearer_codeword_of_a_standardised_value() -> None:
    low, high = lloyd_codewords()
    method, base = BiLoRA(rank=2, scale=0.5), dense(BLOCK)
    values = drawn(method, (QKV,), base)

    update = method.lower(base, (QKV,), values)[0].update

    latent = values["qkv"]["q.a"]
    standard = (latent - latent.mean()) / latent.std(ddof=1)
    nearest = np.where(np.abs(standard - low) < np.abs(standard - high), low, high) * latent.std(ddof=1) + latent.mean()
    right: Any = update.right  # type: ignore[union-attr]
    assert isinstance(right, Binary)
    assert right.bits.dtype == bool
    assert np.abs(right.value(latent) - nearest).max() < 5e-3  # medians of a million samples


def test_gradients_pass_straight_through_the_bits() -> None:
    method, base = BiLoRA(rank=2), dense(BLOCK)
    values = {name: {n: torch.from_numpy(a).requires_grad_() for n, a in each.items()}
              for name, each in drawn(method, (QKV,), base).items()}  # fmt: skip
    lowered: Any = [targeted.update for targeted in method.lower({}, (QKV,), values)]

    torch.autograd.backward([update.left.sum() + 2 * update.right.sum() for update in lowered])

    assert torch.equal(values["qkv"]["q.b"].grad, torch.ones(D, 2, dtype=torch.float64))
    assert torch.equal(values["qkv"]["v.a"].grad, torch.full((2, D), 2.0, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------- the starts

SMALL = "vit_small_patch14_dinov2"
# Method, tensor, and its values at the start: all one number, or evenly spread up to a bound.
STARTS: list[tuple[Method, str, float, float]] = [
    (BitFit(), "d", 0, 0),
    (NormTuning(), "weight", 0, 0),
    (NormTuning(), "bias", 0, 0),
    (IA3(), "s", 1, 0),
    (IA3(), "inner", 1, 0),
    (FacTTT(rank=16), "u", 0, 384**-0.5),
    (FacTTT(rank=16), "v", 0, 0),
    (FacTTK(rank=32), "u", 0, 384**-0.5),
    (FacTTK(rank=32), "v", 0, 0),
    (FacTTK(rank=32), "cube", 0, 3**0.5 / 32),  # Xavier: sqrt(6 / (32 * 32 + 32 * 32))
    (FacTTK(rank=32), "weights", 0, (6 / (32 + 12 * 12)) ** 0.5),
    (KAdaptation(), "l", 0, 0.01),
    (KAdaptation(), "r", 0, 0.01),
    (KAdaptation(), "u", 0, (6 / 13) ** 0.5),
    (KAdaptation(), "v", 0, 0),
    (KAdaptation(), "bias", 0, 0),
    (KronA(), "a", 0, 0),
    (KronA(), "b", 0, 24**-0.5),
    (LoKr(), "a", 0, 0),
    (LoKr(), "c", 0, 8**-0.5),
    (LoKr(), "d", 0, 24**-0.5),
    (DoRA(), "a", 0, 384**-0.5),
    (DoRA(), "b", 0, 0),
    (DoRA(), "m", 384**0.5, 0),  # rows of ones
    (RepAdapter(), "down", 0, (6 / 392) ** 0.5),
    (RepAdapter(), "up", 0, 0),
    (BiLoRA(), "a", 0, 384**-0.5),
]


def called(key: str) -> str:
    """``u`` of "v.u" and of "384.u", ``weights`` of "weights.0"."""
    return [part for part in key.split(".") if not part.isdigit()][-1]


def started(method: Method, name: str) -> NpArray:
    layers = sites_of(SMALL)
    start = method.start(method.sites(layers), ones(layers), np.random.default_rng(0))
    named = [array for tensors in start.values() for key, array in tensors.items() if name == called(key)]
    assert all(array.dtype == np.float32 for array in named)
    return np.concatenate([array.reshape(-1) for array in named]).astype(np.float64)


@pytest.mark.parametrize(("method", "name", "middle", "bound"), STARTS, ids=[f"{m.name} {n}" for m, n, *_ in STARTS])
def test_a_method_starts_as_its_paper_or_code_says(method: Method, name: str, middle: float, bound: float) -> None:
    values = started(method, name)

    if bound == 0:
        assert set(values.tolist()) == {float(np.float32(middle))}
        return
    assert 0.98 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
    # 5 standard errors of the second moment of evenly spread values: their variance is bound^4 * 4 / 45
    assert abs((values**2).mean() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / values.size)


def test_fact_cores_start_as_linear_layers_of_their_inputs() -> None:
    layers = sites_of(SMALL)
    start = FacTTT(rank=16).start(FacTTT(rank=16).sites(layers), {}, np.random.default_rng(0))
    for name, bound in (
        ("blocks.0.attn.qkv", 16**-0.5),
        ("blocks.5.mlp.fc1", 16**-0.5),
        ("blocks.5.mlp.fc2", 64**-0.5),
    ):
        values = np.concatenate([core.reshape(-1) for core in start[name].values()])
        assert 0.98 * bound < np.abs(values).max() <= bound


def test_one_bit_up_projections_start_within_two_deviations() -> None:
    values = started(BiLoRA(), "b")

    assert np.abs(values).max() <= np.float32(2e-3)
    assert 0.87e-3 < values.std() < 0.89e-3  # of a normal distribution of 1e-3, cut: 0.88e-3


def test_the_two_layers_of_an_mlp_share_no_core() -> None:
    start = FacTTT(rank=4).start(BLOCK, {}, np.random.default_rng(0))
    cores = [core for site in BLOCK for core in start[site.name].values()]

    assert len(cores) == 12
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(cores, 2))
