"""Examples of every method that folds, and what each of them must keep.

To add a method: its row in ``EXAMPLES``.
"""

from __future__ import annotations

import numpy as np
import torch

from edgepet.deltas.delta import Score
from edgepet.deltas.merge import merge
from edgepet.methods import (
    ARC,
    HTA,
    IA3,
    METHODS,
    RLRR,
    SSF,
    BiLoRA,
    BitFit,
    Branching,
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
    LoKr,
    LoRA,
    LoRAMul,
    Method,
    NormTuning,
    RepAdapter,
    UniLoRA,
    VeRA,
)
from edgepet.methods.settings import restored
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import NpArray, Site
from edgepet.tuning.fit import Plan, fit
from edgepet.tuning.model import TunedModel, algebra_error, extract
from tests.fits import images as labelled
from tests.tiny import make_delta, ones, perturb, random_images, same_bits

EXAMPLES: dict[str, Method] = {
    "linear-probe": LinearProbe(),
    "full": Full(),
    "ssf": SSF(),
    "lora": LoRA(rank=4, on=("q", "k", "v")),
    "lora on q and v": LoRA(rank=2, alpha=3.0, on=("q", "v")),
    "lora on whole layers": LoRA(rank=4, on=("attn.proj", "fc1", "fc2")),
    "lora on all linears": LoRA(rank=3, on=("qkv", "attn.proj", "fc1", "fc2")),
    "lora on a convolution": LoRA(rank=2, on=("patch_embed.proj", "proj")),
    "lora, ranks and alphas of its own": LoRA(
        rank=2, on=("qkv", "fc1"), ranks={"fc1": 5}, alphas={"qkv": 3.0}, rslora=True
    ),
    "bitfit": BitFit(),
    "norm-tuning": NormTuning(),
    "ia3": IA3(),
    "dora": DoRA(rank=2),
    "dora on whole layers": DoRA(rank=2, alpha=6.0, on=("attn.proj", "fc1")),
    "rlrr": RLRR(),
    "hira": HiRA(rank=3),
    "hira on whole layers": HiRA(rank=2, on=("attn.proj", "fc1", "proj")),
    "lora-mul": LoRAMul(rank=2),
    "glora": GLoRA(),
    "glora, low rank": GLoRA(mode="low-rank", rank=2),
    "hta": HTA(),
    "hta on whole layers": HTA(rank=2, on=("fc1", "fc2", "patch_embed.proj", "proj")),
    "hta without factors": HTA(rank=0),
    "fact-tt": FacTTT(rank=4),
    "fact-tk": FacTTK(rank=6, scale=2.0),
    "kadaptation": KAdaptation(terms=8),
    "krona": KronA(),
    "krona on whole layers": KronA(scale=0.5, on=("qkv", "fc1", "fc2")),
    "lokr": LoKr(rank=2, on=("qkv", "attn.proj", "fc1", "fc2")),
    "lokr, whole": LoKr(rank=8, factor=4),
    "repadapter": RepAdapter(scale=0.5),
    "repadapter, four groups": RepAdapter(rank=4, groups=4, on=("attn.proj", "fc2")),
    "arc": ARC(rank=6),
    "arc, elsewhere": ARC(rank=3, on=("attn.proj", "fc2")),
    "bi-lora": BiLoRA(rank=4),
    "vera": VeRA(rank=8),
    "vera on whole layers": VeRA(rank=5, d_initial=0.5, seed=7, on=("attn.proj", "fc1", "patch_embed.proj", "proj")),
    "uni-lora": UniLoRA(d=50, rank=2),
    "uni-lora on whole layers": UniLoRA(d=7, rank=3, seed=1, on=("fc1", "fc2", "patch_embed.proj", "proj")),
    "consolidator": Consolidator(groups=(16,)),
    "consolidator, nested": Consolidator(groups=(8, 16, 32)),
    "consolidator, not nested": Consolidator(groups=(8, 64, 4)),
    "consolidator, shuffled": Consolidator(groups=(8, 16, 32), shuffle=True),
    "consolidator, one value a group": Consolidator(groups=(64,), shuffle=True),
}
PLAN = Plan(epochs=1, lr=1e-2, head_lr=1e-2, batch_size=4, augment=("flip", "crop"), seed=5)


def logits(model: torch.nn.Module, images: NpArray) -> NpArray:
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def base_logits(model: TunedModel, images: NpArray) -> NpArray:
    with torch.no_grad():
        return model.classify(model.backbone(torch.from_numpy(images))).numpy()


def furthest(left: NpArray, right: NpArray) -> float:
    return float(np.abs(left - right).max())


def trained(backbone: Backbone, method: Method) -> tuple[TunedModel, list[float]]:
    model = TunedModel(backbone, method, 3, seed=1)
    losses: list[float] = []
    fit(model, labelled(1, 12), labelled(2, 6), backbone.preprocess, PLAN, lambda step: losses.append(step.loss))
    return model, losses


def stored(method: Method, layers: tuple[Site, ...]) -> int:
    """Values that a pack of ``method`` on ``layers`` holds, its head left out."""
    sites, weights = method.sites(layers), ones(layers)
    start = method.start(sites, weights, np.random.default_rng(0))
    return make_delta(method.lower(weights, sites, start)).stored_values


def stored_branches(method: Method, layers: tuple[Site, ...]) -> int:
    """``stored`` of a method that stays in the graph, all of it."""
    sites = method.sites(layers)
    start = method.start(sites, {}, np.random.default_rng(0))
    assert isinstance(method, Branching)
    assert method.lower({}, sites, start) == ()
    return make_delta(branches=method.branches(sites, start)).stored_values


# ------------------------------------------------------------------------------------------------- what all must keep


def check_examples() -> None:
    """Every method that folds has an example."""
    folded = {name for name, kind in METHODS.items() if not issubclass(kind, Branching)}
    assert {method.name for method in EXAMPLES.values()} == folded
    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}


def check_start(method: Method, backbone: Backbone) -> None:
    """The start is the identity exactly where the method says so."""
    model = TunedModel(backbone, method, 3, seed=1)
    images = random_images(2, 4)
    starts = model.arrays()
    perturb(model, seed=1, by=0.0)  # a head away from zero
    assert same_bits(model.arrays(), starts)

    distance = furthest(logits(model, images), base_logits(model, images))

    # DoRA divides each row by its length and multiplies by it again: two roundings of float32
    rounding = 1e-5 * np.abs(base_logits(model, images)).max() if method.name == "dora" else 0
    assert bool(distance <= rounding) is method.starts_as_identity


def check_merged(method: Method, backbone: Backbone) -> None:
    """The merged network answers as the tuned one."""
    model = perturb(TunedModel(backbone, method, 5, seed=1), seed=3)
    images = random_images(4, 3)
    before = {name: array.copy() for name, array in backbone.tensors.items()}

    error, largest = algebra_error(model, backbone, images)

    # float64 through 6 or 8 blocks: rounding alone stays near 1e-14 of the largest logit
    assert error <= 1e-9 * largest
    moved = furthest(logits(model, images), base_logits(model, images))
    assert moved > 1e-3 or method.name == "linear-probe"  # or a merge that does nothing would pass
    assert same_bits(backbone.tensors, before)
    assert next(model.backbone.parameters()).dtype == torch.float32


def check_pack(method: Method, backbone: Backbone) -> None:
    """What was learnt survives the pack."""
    model = perturb(TunedModel(backbone, method, 3, seed=1), seed=3)
    images = random_images(4, 3)
    score, labels = Score(top1=1.0, n=3), ("a", "b", "c")
    delta = extract(model, backbone, task="flowers", labels=labels, val=score)

    read = read_pack(encode_pack(delta, codec="fp32")).delta
    state = {name: torch.from_numpy(tensor) for name, tensor in merge(backbone.base, read).items()}
    with torch.no_grad():
        features = torch.func.functional_call(model.backbone, state, (torch.from_numpy(images),)).numpy()

    expected = logits(model, images)
    assert furthest(read.head(features), expected) <= 1e-4 * np.abs(expected).max()  # the house's limit for fp32
    assert read.method == method.name
    assert restored(method.name, read.settings) == method


def check_steps(method: Method, backbone: Backbone) -> None:
    """Three steps move the method and leave every bit of the backbone."""
    before = {name: tensor.numpy().copy() for name, tensor in backbone.module.state_dict().items()}
    start = TunedModel(backbone, method, 3, seed=1).arrays()

    model, losses = trained(backbone, method)

    assert len(losses) == 4  # three steps, and the epoch's end says its accuracy
    after = {name: tensor.numpy() for name, tensor in backbone.module.state_dict().items()}
    assert same_bits(after, before)
    assert same_bits(backbone.tensors, before)
    still = [name for name, array in model.arrays().items() if np.array_equal(array, start[name])]
    assert still == []
    assert not model.training
