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
    ARC,
    HTA,
    IA3,
    RLRR,
    BiLoRA,
    BitFit,
    DoRA,
    FacTTK,
    FacTTT,
    GLoRA,
    HiRA,
    KAdaptation,
    KronA,
    LoKr,
    LoRA,
    LoRAMul,
    Method,
    NormTuning,
    RepAdapter,
    UniLoRA,
    VeRA,
)
from edgepet.methods.krona import two_factors
from edgepet.methods.method import SHARED
from edgepet.spec import NpArray, Site
from tests import splitmix
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


def every_part(site: Site) -> list[tuple[str, tuple[int, int]]]:
    """Row blocks of a fused layer as tensors are called after them, or the whole layer."""
    return [(f"{part}.", rows) for part, rows in site.blocks] or [("", (0, site.out_features))]


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


def test_rlrr_is_the_frozen_weight_and_a_rescaled_one_beside_it() -> None:
    """The official layer: (weight * columns * rows) + weight, one pair for queries, keys and values each."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = torched(values[site.name])
        parts = [f"{part}." for part, _ in site.blocks] or [""]
        each = [
            functional.linear(x, w) + functional.linear(x * own[f"{part}r"], w) * own[f"{part}l"].T
            for part, w in zip(parts, weight.chunk(len(parts)), strict=True)
        ]
        return torch.cat(each, dim=-1) + bias + own["f"]

    check(RLRR(), reference)


def test_rlrr_scales_and_shifts_norms_and_what_reads_an_image() -> None:
    stem = Site(name="stem", kind="conv", weight="stem.weight", bias="stem.bias", in_features=3, out_features=D, taps=4)
    norm = Site(name="n", kind="norm", weight="n.weight", bias="n.bias", in_features=D, out_features=D)
    base = dense((stem,)) | {"n.weight": np.full(D, 2.0), "n.bias": np.arange(D) / 7}
    values = drawn(RLRR(), (stem, norm), base)

    folded = fold_all(base, RLRR().lower(base, (stem, norm), values))

    for site in (stem, norm):
        gamma, beta = values[site.name]["gamma"], values[site.name]["beta"]
        weight = base[site.weight]
        assert np.abs(folded[site.weight] - gamma.reshape(-1, *[1] * (weight.ndim - 1)) * weight).max() <= ROUNDING
        assert np.abs(folded[str(site.bias)] - (gamma * base[str(site.bias)] + beta)).max() <= ROUNDING


def test_hira_multiplies_a_weight_element_by_element() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, y = torched(values[site.name]), functional.linear(x, weight, bias)

        def change(part: str, rows: tuple[int, int]) -> Tensor:
            a, b = own[f"{part}a"], own[f"{part}b"]
            # one product of low rank at a time: diag(b_k) W diag(a_k)
            terms = [functional.linear(x * a[k], weight[rows[0] : rows[1]]) * b[:, k] for k in range(len(a))]
            return torch.stack(terms).sum(0)

        return by_parts(site, y, change)

    check(HiRA(rank=3), reference)


def test_lora_mul_reads_what_a_prompt_was_added_to() -> None:
    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = torched(values[site.name])
        changed = weight * (1 + own["b"] @ own["a"])
        return functional.linear(x + own["c"], changed, bias * (1 + own["d"]))

    check(LoRAMul(rank=2), reference)


@pytest.mark.parametrize("method", [GLoRA(), GLoRA(mode="low-rank", rank=2)], ids=repr)
def test_glora_is_the_released_forward_pass(method: Any) -> None:
    """The bias and the prompt are of the frozen layer, whatever becomes of its weight."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own = torched(values[site.name])
        if "a" in own:
            changed = weight + weight * own["a"][:, None]
        else:
            changed = weight + weight * (own["a.down"] @ own["a.up"]) + own["b.down"] @ own["b.up"]
        moved = bias + bias * own["d"] + own["e"]
        return functional.linear(x, changed, moved + (weight @ own["c"][:, None])[:, 0])

    check(method, reference)


PADDED = Site(name="conv", kind="conv", weight="conv.weight", bias=None, in_features=8, out_features=6, taps=9,
              mean="bn.running_mean")  # fmt: skip
POINTWISE = Site(
    name="pw", kind="conv", weight="pw.weight", bias=None, in_features=8, out_features=6, mean="n.running_mean"
)
ALONE = Site(name="fc", kind="linear", weight="fc.weight", bias=None, in_features=8, out_features=6)


@pytest.mark.parametrize("method", [LoRAMul(rank=1), GLoRA()], ids=repr)
def test_a_prompt_is_there_where_it_can_be_written_and_nothing_is_padded(method: Any) -> None:
    layers = (PADDED, POINTWISE, ALONE)
    start = {site.name: method.start((site,), {}, np.random.default_rng(0))[site.name] for site in layers}

    assert {name for name, tensors in start.items() if "c" in tensors} == {"pw"}
    assert {name for name, tensors in start.items() if "d" in tensors} == set()
    assert {name for name, tensors in start.items() if "e" in tensors} == (
        {"conv", "pw"} if method.name == "glora" else set()
    )


@pytest.mark.parametrize("method", [LoRAMul(rank=1), GLoRA()], ids=repr)
def test_a_bias_less_convolutions_prompt_is_taken_off_its_batch_norms_mean(method: Any) -> None:
    rng = np.random.default_rng(0)
    base = {"pw.weight": rng.standard_normal((6, 8, 1, 1)), "n.running_mean": rng.standard_normal(6)}
    values = drawn(method, (POINTWISE,), base)
    own = values["pw"]

    folded = fold_all(base, method.lower(base, (POINTWISE,), values))

    weight = base["pw.weight"].reshape(6, 8)
    read = weight if method.name == "glora" else weight * (1 + own["b"] @ own["a"])
    expected = base["n.running_mean"] - read @ own["c"] - own.get("e", 0)
    assert np.abs(folded["n.running_mean"] - expected).max() <= ROUNDING


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_hta_is_a_diagonal_between_two_reflections_and_a_low_rank_addition(rank: int) -> None:
    """Token by token: each Householder matrix takes v (v . x) off what it reads; none of them is ever made."""

    def reflect(x: Tensor, v: Tensor) -> Tensor:
        return x - (x * v).sum(-1, keepdim=True) * v

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, y = torched(values[site.name]), functional.linear(x, weight, bias)
        for part, (first, last) in every_part(site):
            left, d, right = (own[f"{part}{name}"] for name in "ldr")
            scaled = reflect(x, right)[..., : len(d)] * d
            scaled = functional.pad(scaled, (0, last - first - len(d)))  # D is rectangular on fc1 and fc2
            y[..., first:last] += reflect(scaled, left)
            if rank:
                y[..., first:last] += x @ own[f"{part}a"].T @ own[f"{part}b"].T
        return y

    check(HTA(rank=rank, on=("q", "k", "v", "proj", "fc1", "fc2")), reference)


def test_arc_is_its_official_adapter_in_front_of_attention_and_mlp() -> None:
    """The official forward pass: (x (P * c)) P^T + bias + x, with one P for all attentions and one for all MLPs."""

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, shared = torched(values[site.name]), torched(values[SHARED])
        down = shared[f"{site.name}.{D}.p"]
        adapted = torch.matmul(torch.matmul(x, down * own["c"][None]), down.t()) + own["b"] + x
        return functional.linear(adapted, weight, bias)

    check(ARC(rank=RANK), reference)


def test_layers_of_arc_share_a_projection_by_name_and_width() -> None:
    layers = sites_of("swin_tiny_patch4_window7_224")
    start = ARC(rank=4).start(ARC().sites(layers), {}, np.random.default_rng(0))
    widths = (96, 192, 384, 768)

    expected = {f"{kind}.{width}.p": (width, 4) for kind in ("qkv", "fc1") for width in widths}
    assert {name: array.shape for name, array in start[SHARED].items()} == expected


def drawn_matrix(seed: int, first: int, rows: int, columns: int, fan: int) -> Tensor:
    """Kaiming uniform, sqrt(6 / fan), of the pack's generator, row by row from output ``first`` on."""
    values = [splitmix.uniform(seed, first + i) for i in range(rows * columns)]
    return (6 / fan) ** 0.5 * torch.tensor(values, dtype=torch.float64).reshape(rows, columns)


def test_vera_scales_what_one_pair_of_random_matrices_puts_out() -> None:
    """Each layer has the first columns of one A and the first rows of one B, which begins behind 2^22 values."""
    rank = 3

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        own, y = torched(values[site.name]), functional.linear(x, weight, bias)
        a = drawn_matrix(5, 0, 4 * D, rank, site.in_features)[: site.in_features].T
        b = drawn_matrix(5, 2**22, 4 * D, rank, rank)
        for part, (first, last) in every_part(site):
            if part != "k.":
                inner = own[f"{part}d"] * functional.linear(x, a)
                y[..., first:last] += own[f"{part}b"] * functional.linear(inner, b[: last - first])
        return y

    check(VeRA(rank=rank, seed=5, on=("q", "v", "proj", "fc1", "fc2")), reference)


def test_uni_lora_multiplies_one_vector_by_a_matrix_of_orthonormal_columns() -> None:
    """theta_D = P theta_d with P written out, and theta_D cut into A and B, part by part."""
    d, rank = 50, 2
    total = 2 * 2 * rank * D + rank * (D + 4 * D)  # of q, v and fc1

    index = splitmix.balanced(9, total, d)
    p = torch.zeros(total, d, dtype=torch.float64)
    p[torch.arange(total), torch.tensor(index)] = 1
    p = p / p.sum(0).sqrt()
    assert (p.T @ p - torch.eye(d)).abs().max() < 1e-14

    def reference(values: Values, site: Site, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        factors, y = p @ torched(values[SHARED])["theta"], functional.linear(x, weight, bias)
        shapes = [(rank, D), (D, rank), (rank, D), (D, rank), (rank, D), (4 * D, rank)]
        cut = torch.split(factors, [rows * columns for rows, columns in shapes])
        a_q, b_q, a_v, b_v, a, b = (flat.reshape(shape) for flat, shape in zip(cut, shapes, strict=True))
        if site is FC1:
            return y + x @ a.T @ b.T
        y[..., :D] += x @ a_q.T @ b_q.T
        y[..., 2 * D :] += x @ a_v.T @ b_v.T
        return y

    check(UniLoRA(d=d, rank=rank, seed=9, on=("q", "v", "fc1")), reference)


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
    (RLRR(), "l", 0, 6**0.5),
    (RLRR(), "f", 0, 0),
    (HiRA(), "a", 0, 384**-0.5),
    (HiRA(), "b", 0, 0),
    (LoRAMul(), "b", 0, 0),
    (LoRAMul(), "c", 0, 0),
    (LoRAMul(), "d", 0, 0),
    (GLoRA(), "a", 0, 0),
    (GLoRA(mode="low-rank"), "down", 0, 0),
    (RepAdapter(), "down", 0, (6 / 392) ** 0.5),
    (RepAdapter(), "up", 0, 0),
    (BiLoRA(), "a", 0, 384**-0.5),
    (HTA(), "l", 0, (6 / 384) ** 0.5),
    (HTA(), "r", 0, (6 / 384) ** 0.5),
    (HTA(), "d", 0, 0),
    (HTA(), "a", 0, 384**-0.5),
    (HTA(), "b", 0, 0),
    (ARC(), "p", 0, (6 / 434) ** 0.5),
    (ARC(), "b", 0, 0),
    (VeRA(), "d", 0.1, 0),
    (VeRA(), "b", 0, 0),
    (UniLoRA(), "theta", 0, 0.02),
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


BOUNDS: list[tuple[Method, str, Callable[[int], float]]] = [  # by how many columns a layer has
    (RLRR(), "r", lambda columns: (6 / columns) ** 0.5),
    (LoRAMul(rank=10), "a", lambda columns: (6 / (10 + columns)) ** 0.5),
    (GLoRA(mode="low-rank", rank=4), "a.up", lambda columns: (6 / (4 + columns)) ** 0.5),
    (GLoRA(mode="low-rank", rank=4), "b.up", lambda columns: (6 / (4 + columns)) ** 0.5),
]


@pytest.mark.parametrize(("method", "name", "bound"), BOUNDS, ids=[f"{m.name} {n}" for m, n, *_ in BOUNDS])
def test_what_is_drawn_by_a_layers_width_has_its_bound(
    method: Method, name: str, bound: Callable[[int], float]
) -> None:
    sites = method.sites(sites_of(SMALL))
    start = method.start(sites, {}, np.random.default_rng(0))
    drawn_at = {384: list[NpArray](), 1536: list[NpArray]()}
    for site in sites:
        found = [array for key, array in start[site.name].items() if key.endswith(name)]
        drawn_at.setdefault(site.columns, []).extend(found)

    for columns in (384, 1536):
        values = np.concatenate([array.reshape(-1) for array in drawn_at[columns]]).astype(np.float64)
        limit = bound(columns)
        assert 0.99 * limit < np.abs(values).max() <= limit * (1 + 1e-6)
        # 5 standard errors of the second moment of evenly spread values
        assert abs((values**2).mean() - limit**2 / 3) < 5 * limit**2 * np.sqrt(4 / 45 / values.size)


def test_arc_starts_with_coefficients_in_front_of_the_mlp_alone() -> None:
    layers = sites_of(SMALL)
    start = ARC().start(ARC().sites(layers), {}, np.random.default_rng(0))
    attention, mlp = (
        np.concatenate([own["c"] for name, own in start.items() if name.endswith(end)]) for end in ("qkv", "fc1")
    )

    assert attention.tolist() == [0] * 12 * 50
    bound = (6 / 51) ** 0.5
    assert 0.98 * bound < np.abs(mlp).max() <= bound * (1 + 1e-6)


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
