"""PEFT adapter folders, both ways, against PEFT itself; every adapter is moved away from its start."""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from edgepet.deltas.delta import Score
from edgepet.deltas.updates import Add, LowRank, Modulate, Push, Replace, Scale, Targeted
from edgepet.errors import CheckError, InputError, MissingError
from edgepet.methods import (
    IA3,
    SSF,
    AdaptFormer,
    DoRA,
    FacTTT,
    GLoRA,
    HiRA,
    KronA,
    LinearProbe,
    LoKr,
    LoRA,
    LoRAMul,
    Method,
    UniLoRA,
    VeRA,
)
from edgepet.methods.depth import in_blocks
from edgepet.networks.backbone import Backbone
from edgepet.networks.merged import merged_logits
from edgepet.packs.pack import read_pack, write_pack
from edgepet.peft.adapter import CONFIG, PREFIX, WEIGHTS
from edgepet.spec import NpArray, Preprocess, Target
from edgepet.tuning.model import TunedModel, extract
from edgepet.verbs import peft as peft_verbs
from edgepet.verbs.peft import export_peft, import_peft
from tests.flow import edgepet
from tests.tiny import perturb, random_images, tiny_vit
from tests.transformers_names import NEW_NAMES, respelled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers says of other packages while it is imported
    peft = pytest.importorskip("peft", reason="needs the package peft")

CLASSES, LIMIT = 3, 1e-5  # the limit is of the largest logit: float32 through six blocks stays near 1e-6
IMAGES = random_images(4, 3)

# of biases that are saved and loaded all the same, of groups that cannot be merged, and of PiSSA beside adapters
pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:.*(groups > 1|PiSSA):UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers for it
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, Backbone]:
    folder = tmp_path_factory.mktemp("networks")
    others = {
        name: tiny_vit(folder, seed=7, architecture=name)
        for name in ("test_resnet", "test_convnext", "test_vit_relpos")
    }
    return {"test_vit": backbone, **others}


def timm_model(backbone: Backbone, classes: int = CLASSES) -> Any:
    """What a user of PEFT starts from: timm's own network with the pretrained weights and a new classifier."""
    model = timm.create_model(backbone.name, num_classes=classes, **backbone.create_args)
    weights = {name: torch.from_numpy(tensor.copy()) for name, tensor in backbone.tensors.items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def tuned(backbone: Backbone, config: Any, folder: Path) -> NpArray:
    """Write an adapter folder as a user does after tuning, and return the logits of the tuned model."""
    model = moved(peft.get_peft_model(timm_model(backbone), config))
    model.save_pretrained(str(folder))
    return logits(model)


def moved(model: Any) -> Any:
    """``model`` itself, all that it trains away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> NpArray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IMAGES)).numpy()


def loaded(backbone: Backbone, folder: Path) -> NpArray:
    """Logits of a folder as PEFT loads it on timm's network."""
    return logits(peft.PeftModel.from_pretrained(timm_model(backbone), str(folder)))


def merged(pack: Path, backbone: Backbone) -> NpArray:
    return merged_logits(backbone, read_pack(pack).delta, IMAGES)


def apart(left: NpArray, right: NpArray) -> float:
    """The largest difference over the largest logit."""
    return float(np.abs(left - right).max() / np.abs(left).max())


@pytest.fixture(scope="module")
def plain(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA folder, to be copied."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    tuned(backbone, lora(target_modules=["qkv"]), folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A plain LoRA folder, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def reconfigured(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def with_tensors(folder: Path, tensors: Mapping[str, Any]) -> Path:
    safetensors.torch.save_file(dict(tensors), folder / WEIGHTS)
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"modules_to_save": ["head"], **settings})


def ia3(**settings: Any) -> Any:
    return peft.IA3Config(**{"modules_to_save": ["head"], **settings})


def lokr(**settings: Any) -> Any:
    return peft.LoKrConfig(**{"r": 2, "modules_to_save": ["head"], **settings})


def vera(**settings: Any) -> Any:
    return peft.VeraConfig(**{"r": 6, "modules_to_save": ["head"], **settings})


def hira(**settings: Any) -> Any:
    return peft.HiraConfig(**{"r": 3, "modules_to_save": ["head"], **settings})


def glora(a_b: str, c: str, d_e: str, **settings: Any) -> Any:
    """Of these forms of A and B, of C, and of D and E."""
    paths = {"config_A_B": a_b, "config_C": c, "config_D_E": d_e}
    return peft.GloraConfig(**{"r": 3, "modules_to_save": ["head"], **paths, **settings})


CONVS: dict[str, Any] = {"target_modules": r"layer\d\.0\.conv[12]", "modules_to_save": ["fc"]}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"blocks\.[01]\.attn\.qkv": 3, "fc1": 2},
    "alpha_pattern": {"^blocks.3.attn.qkv": 5.5, "fc1": 3},
}
# What edgepet must read: the network, the configuration, and the method that the pack names.
ADAPTERS: dict[str, tuple[str, Any, str]] = {
    "lora": ("test_vit", lora(target_modules=["qkv"], lora_dropout=0.3), "lora"),
    "lora, patterns": ("test_vit", lora(r=4, target_modules=["qkv", "fc1", "proj"], **PATTERNS), "lora"),
    "lora, rank-stabilised": ("test_vit", lora(target_modules=["qkv", "fc1"], use_rslora=True, **PATTERNS), "lora"),
    "lora, its layers' biases": ("test_vit", lora(target_modules=["qkv"], bias="lora_only"), "lora"),
    "lora, all biases": ("test_vit", lora(target_modules=["qkv"], bias="all", lora_bias=True), "lora"),
    "lora, a layer beside it": ("test_vit", lora(target_modules=["fc2"], modules_to_save=["head", "norm"]), "lora"),
    "lora on convolutions": ("test_resnet", lora(r=3, lora_alpha=2, **CONVS), "lora"),
    "lora, batch norms": ("test_resnet", lora(**CONVS | {"modules_to_save": ["fc", "bn1"]}), "lora"),
    "lora, a head with a norm": ("test_convnext", lora(target_modules=["fc1", "fc2"]), "lora"),
    "dora": ("test_vit", lora(target_modules=["qkv", "fc2"], use_dora=True), "dora"),
    "dora on convolutions": ("test_resnet", lora(use_dora=True, **CONVS), "dora"),
    "ia3": ("test_vit", ia3(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]), "ia3"),
    "ia3 on convolutions": ("test_resnet", ia3(feedforward_modules=r".*conv2", **CONVS), "ia3"),
    "lokr": ("test_vit", lokr(target_modules=["qkv", "fc1"]), "lokr"),
    "lokr, both factors cut": (
        "test_vit", lokr(target_modules=["qkv", "fc1"], decompose_both=True, alpha=3, **PATTERNS), "lokr"
    ),
    "lokr, a factor": ("test_vit", lokr(target_modules=["qkv", "fc1"], decompose_factor=4), "lokr"),
    "lokr, whole": ("test_vit", lokr(r=64, target_modules=["qkv"]), "lokr"),
    "lokr on convolutions": ("test_resnet", lokr(**CONVS), "lokr"),
    "lokr on convolutions, whole": ("test_resnet", lokr(**CONVS | {"r": 60}), "lokr"),
    "lokr, a Tucker core": ("test_resnet", lokr(use_effective_conv2d=True, decompose_both=True, **CONVS), "lokr"),
    "vera": ("test_vit", vera(target_modules=["qkv", "fc1", "fc2"]), "vera"),
    "vera, all biases": ("test_vit", vera(target_modules=["qkv"], bias="all", d_initial=0.3), "vera"),
    "vera, its layers' biases": ("test_vit", vera(target_modules=["qkv", "fc1"], bias="vera_only"), "vera"),
    "hira": ("test_vit", hira(target_modules=["qkv", "fc1"], hira_dropout=0.2), "hira"),
    "hira, PEFT's own rank, and patterns that it does not look at": (
        "test_vit", hira(r=32, target_modules=["qkv", "fc2"], rank_pattern={"fc2": 5}), "hira"
    ),
    "hira, a layer beside it": (
        "test_vit", hira(target_modules=["fc2"], init_weights="gaussian", modules_to_save=["head", "norm"]), "hira"
    ),
    "hira on convolutions": ("test_resnet", hira(**CONVS), "hira"),
    "hira on convolutions of one tap": (
        "test_resnet", hira(**CONVS | {"target_modules": r"layer3\.0\.(conv[13]|downsample\.1)"}), "hira"
    ),
    "glora": ("test_vit", glora("lora", "lora", "constant", target_modules=["qkv", "fc1"]), "glora"),
    "glora, vectors": ("test_vit", glora("vector", "vector", "vector", target_modules=["qkv", "fc2"]), "glora"),
    "glora, numbers": ("test_vit", glora("constant", "none", "constant", target_modules=["fc1", "fc2"]), "glora"),
    "glora, weights alone": ("test_vit", glora("lora", "none", "none", target_modules=["qkv"]), "glora"),
    "glora, biases alone": ("test_vit", glora("none", "lora", "vector", target_modules=["qkv"]), "glora"),
    "glora, all biases": ("test_vit", glora("lora", "vector", "vector", target_modules=["qkv"], bias="all"), "glora"),
    "glora, its layers' biases": (
        "test_vit", glora("vector", "lora", "constant", target_modules=["qkv", "fc1"], bias="glora_only"), "glora"
    ),
    "glora, layers without biases": (
        "test_vit_relpos", glora("lora", "lora", "vector", target_modules=[r"attn.qkv", "attn.proj"]), "glora"
    ),
    "lokr on groups": ("test_convnext", lokr(target_modules=["conv_dw"], modules_to_save=["head.fc"]), "lokr"),
}  # fmt: skip


@pytest.mark.parametrize(("network", "config", "method"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_becomes_a_pack_and_comes_back(
    network: str, config: Any, method: str, networks: dict[str, Backbone], tmp_path: Path
) -> None:
    backbone, pack = networks[network], tmp_path / "flowers.pet"
    expected = tuned(backbone, config, tmp_path / "adapter")

    report = import_peft(tmp_path / "adapter", pack, backbone=backbone)

    assert (report.path, report.method, report.classes) == (pack, method, CLASSES)
    assert apart(expected, merged(pack, backbone)) <= LIMIT
    assert report.max_abs_diff <= report.limit
    moved = merged_logits(backbone, replace(read_pack(pack).delta, updates=()), IMAGES)
    assert apart(expected, moved) > 1e-3  # or an adapter that does nothing would pass

    export_peft(pack, tmp_path / "back", backbone=backbone)

    assert apart(expected, loaded(backbone, tmp_path / "back")) <= LIMIT
    assert {path.name for path in (tmp_path / "back").iterdir()} == {CONFIG, WEIGHTS}


def packed(backbone: Backbone, method: Method, path: Path, codec: Any = "fp16") -> Path:
    """A pack as ``train`` writes it."""
    model = perturb(TunedModel(backbone, method, CLASSES, seed=1), seed=3)
    delta = extract(model, backbone, task="flowers", labels=("a", "b", "c"), val=Score(top1=0.5, n=8))
    write_pack(path, delta, codec=codec)
    return path


# What edgepet tunes: the network, the method, and the type that PEFT calls it by.
TRAINED: dict[str, tuple[str, Method, str]] = {
    "lora on q and v": ("test_vit", LoRA(), "LORA"),
    "lora on layers, ranks and alphas of their own": (
        "test_vit",
        LoRA(rank=2, on=("qkv", "fc1"), ranks={"fc1": 5}, alphas={"blocks.2.attn.qkv": 3.0}, rslora=True),
        "LORA",
    ),
    "lora on convolutions": ("test_resnet", LoRA(rank=2, on=("conv1", "conv2")), "LORA"),
    "low rank with a core": ("test_vit", FacTTT(rank=4), "LORA"),
    "dora on q and v": ("test_vit", DoRA(rank=2, alpha=5.0), "LORA"),
    "dora on layers": ("test_vit", DoRA(rank=2, on=("attn.proj", "fc1")), "LORA"),
    "ia3": ("test_vit", IA3(), "IA3"),
    "ia3 on convolutions": ("test_resnet", IA3(), "IA3"),
    "lokr on layers": ("test_vit", LoKr(rank=2, on=("attn.proj", "fc1")), "LOKR"),
    "lokr on q and v, which PEFT cannot cut": ("test_vit", LoKr(), "LOKR"),
    "vera on q and v": ("test_vit", VeRA(rank=5), "VERA"),
    "vera on blocks and layers": ("test_vit", VeRA(rank=3, on=("q", "k", "v", "fc1", "fc2")), "VERA"),
    "vera on convolutions": ("test_resnet", VeRA(rank=3, on=("conv1", "conv2")), "LORA"),
    "uni-lora on q and v": ("test_vit", UniLoRA(d=40), "LORA"),
    "hira on q and v": ("test_vit", HiRA(rank=3), "HIRA"),
    "hira on convolutions": ("test_resnet", HiRA(rank=2, on=("conv1", "conv2")), "HIRA"),
    "glora, vectors": ("test_vit", GLoRA(), "GLORA"),
    "glora of low rank": ("test_vit", GLoRA(mode="low-rank", rank=2), "GLORA"),
    "a product and a prompt": ("test_vit", LoRAMul(rank=2), "GLORA"),
    "krona on layers": ("test_vit", KronA(scale=0.5, on=("attn.proj", "fc1")), "LOKR"),
}


@pytest.mark.parametrize(("network", "method", "kind"), TRAINED.values(), ids=TRAINED)
def test_a_trained_pack_is_an_adapter(
    network: str, method: Method, kind: str, networks: dict[str, Backbone], tmp_path: Path
) -> None:
    backbone = networks[network]
    pack = packed(backbone, method, tmp_path / "flowers.pet")

    report = export_peft(pack, tmp_path / "adapter", backbone=backbone)

    assert report.max_abs_diff <= report.limit
    assert apart(merged(pack, backbone), loaded(backbone, tmp_path / "adapter")) <= LIMIT
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["peft_type"] == kind


NUMBERED: dict[str, tuple[str, Method, str, dict[str, object]]] = {  # and what PEFT is told of them
    "hira on two": (
        "test_vit", HiRA(rank=2, on=("q", "fc1")), "1-2",
        {"target_modules": ["attn.qkv", "mlp.fc1"], "layers_to_transform": [1, 2], "layers_pattern": ["blocks"]},
    ),
    "glora, for which PEFT has no word": (
        "test_vit", GLoRA(), "1", {"target_modules": "|".join(
            rf"blocks\.1\.{layer}" for layer in (r"attn\.qkv", r"attn\.proj", r"mlp\.fc1", r"mlp\.fc2"))}
    ),
    "lora on the last blocks": (
        "test_vit", LoRA(rank=2), "3-5",
        {"target_modules": ["attn.qkv"], "layers_to_transform": [3, 4, 5], "layers_pattern": ["blocks"]},
    ),
    "dora on one": (
        "test_vit", DoRA(rank=2, on=("attn.proj", "fc1")), "2",
        {"target_modules": ["attn.proj", "mlp.fc1"], "layers_to_transform": [2], "layers_pattern": ["blocks"]},
    ),
    "lokr on a part of a stage": (
        "test_convnext", LoKr(rank=2), "4-5",
        {"target_modules": ["mlp.fc1", "mlp.fc2"], "layers_to_transform": [1, 2],
         "layers_pattern": [r"stages\.2\.blocks"]},
    ),
    "on all blocks": (
        "test_vit", LoRA(rank=2), "0-5", {"target_modules": "|".join(rf"blocks\.{i}\.attn\.qkv" for i in range(6))}
    ),
    "from one stage into the next": (
        "test_convnext", LoRA(rank=2), "6-7",
        {"target_modules": r"stages\.2\.blocks\.3\.mlp\.fc1|stages\.2\.blocks\.3\.mlp\.fc2|stages\.3\.downsample\.1"
                           r"|stages\.3\.blocks\.0\.mlp\.fc1|stages\.3\.blocks\.0\.mlp\.fc2"},
    ),
    "ia3, for which PEFT has no word": (
        "test_vit", IA3(on=("v",), inner=()), "5", {"target_modules": r"blocks\.5\.attn\.qkv"}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("network", "method", "blocks", "told"), NUMBERED.values(), ids=NUMBERED)
def test_blocks_are_chosen_by_their_numbers(
    network: str, method: Method, blocks: str, told: dict[str, object], networks: dict[str, Backbone], tmp_path: Path
) -> None:
    backbone = networks[network]
    pack = packed(backbone, in_blocks(method, blocks), tmp_path / "flowers.pet")

    export_peft(pack, tmp_path / "adapter", backbone=backbone)

    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    keys = ("target_modules", "layers_to_transform", "layers_pattern")
    assert {key: config[key] for key in keys if key in config} == told
    assert apart(merged(pack, backbone), loaded(backbone, tmp_path / "adapter")) <= LIMIT


def test_a_peft_that_finds_no_blocks_at_the_root_gets_a_pattern(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packed(backbone, in_blocks(LoRA(rank=2), "4"), tmp_path / "flowers.pet")
    tuners = peft.tuners.tuners_utils
    finds = tuners.check_target_module_exists

    def older(config: Any, key: str) -> Any:
        return not config.layers_to_transform and finds(config, key)

    monkeypatch.setattr(tuners, "check_target_module_exists", older)

    export_peft(pack, tmp_path / "adapter", backbone=backbone)

    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["target_modules"], config.get("layers_to_transform")) == (r"blocks\.4\.attn\.qkv", None)


def test_blocks_of_a_fused_weight_are_rows_of_one_adapter(backbone: Backbone, tmp_path: Path) -> None:
    pack = packed(backbone, LoRA(rank=3, alpha=6.0), tmp_path / "flowers.pet")

    export_peft(pack, tmp_path / "adapter", backbone=backbone)

    config, up = json.loads((tmp_path / "adapter" / CONFIG).read_text()), tensors_of(tmp_path / "adapter")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 12.0, {}, {})
    b = up["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b[64:128].count_nonzero() == 0
    assert b[:64, 3:].count_nonzero() == b[128:, :3].count_nonzero() == 0


def test_layers_of_vera_share_two_matrices_in_the_folder_and_in_the_pack(backbone: Backbone, tmp_path: Path) -> None:
    pack = packed(backbone, VeRA(rank=5), tmp_path / "flowers.pet")
    export_peft(pack, tmp_path / "adapter", backbone=backbone)
    import_peft(tmp_path / "adapter", tmp_path / "again.pet", backbone=backbone)

    tensors = tensors_of(tmp_path / "adapter")
    a, b = (tensors[f"base_model.vera_{name}"].numpy() for name in "AB")
    assert (a.shape, b.shape) == ((10, 64), (192, 10))  # of q and of v, one below and one beside the other
    assert np.array_equal(a[:5], a[5:])
    assert np.array_equal(b[:64, :5], b[128:, 5:])
    assert not b[64:128].any()
    vectors = {name.rpartition(".")[2] for name in tensors if ".blocks." in name}
    assert vectors == {"vera_lambda_b", "vera_lambda_d"}
    assert read_pack(tmp_path / "again.pet").delta.stored_values == a.size + b.size + 6 * (192 + 10)


def test_blocks_that_are_multiplied_are_rows_of_one_adapter_of_one_rank(backbone: Backbone, tmp_path: Path) -> None:
    pack = packed(backbone, HiRA(rank=3, on=("q", "v", "fc1")), tmp_path / "flowers.pet")

    export_peft(pack, tmp_path / "adapter", backbone=backbone)

    config, tensors = json.loads((tmp_path / "adapter" / CONFIG).read_text()), tensors_of(tmp_path / "adapter")
    assert (config["r"], config["rank_pattern"]) == (6, {})  # PEFT 0.21.2 would not look at a pattern
    a, b = (tensors[f"{PREFIX}blocks.0.attn.qkv.hira_{letter}"] for letter in "AB")
    assert (a.shape, b.shape) == ((6, 64), (192, 6))
    assert b[64:128].count_nonzero() == 0
    assert b[:64, 3:].count_nonzero() == b[128:, :3].count_nonzero() == 0
    a, b = (tensors[f"{PREFIX}blocks.0.mlp.fc1.hira_{letter}"] for letter in "AB")
    assert (a.shape, b.shape) == ((6, 64), (192, 6))
    assert a[3:].count_nonzero() == b[:, 3:].count_nonzero() == 0


def test_a_vector_of_glora_is_added_to_all_columns_by_ones_that_are_stored_once(
    backbone: Backbone, tmp_path: Path
) -> None:
    tuned(backbone, glora("vector", "vector", "constant", target_modules=["qkv", "fc1"]), tmp_path / "adapter")

    import_peft(tmp_path / "adapter", tmp_path / "flowers.pet", backbone=backbone)

    delta = read_pack(tmp_path / "flowers.pet").delta
    own = 4 * 192 + 64  # A, B, D, E and C
    assert delta.stored_values == 2 * 6 * own + 64
    kinds = [[t.update.kind for t in delta.updates if str(t.target) == f"{QKV}.{end}"] for end in ("weight", "bias")]
    assert kinds == [["scale", "low-rank"], ["scale", "add", "push"]]


GENERALISED: dict[str, tuple[GLoRA, tuple[object, ...], dict[str, tuple[int, ...]]]] = {  # PEFT's r and A_B, of fc1
    "vectors": (GLoRA(), (1, "vector"), {"A.X": (192, 1), "B.X": (192, 1)}),
    "low rank": (
        GLoRA(mode="low-rank", rank=2), (2, "lora"),
        {"A.Xd": (192, 2), "A.Xu": (2, 96), "B.Xd": (192, 2), "B.Xu": (2, 96)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "told", "shapes"), GENERALISED.values(), ids=GENERALISED)
def test_all_of_glora_is_in_the_folder(
    method: GLoRA, told: tuple[object, ...], shapes: dict[str, tuple[int, ...]], networks: dict[str, Backbone],
    tmp_path: Path,
) -> None:  # fmt: skip
    backbone = networks["test_vit_relpos"]
    pack = packed(backbone, method, tmp_path / "flowers.pet", "fp32")

    export_peft(pack, tmp_path / "adapter", backbone=backbone)

    config, tensors = json.loads((tmp_path / "adapter" / CONFIG).read_text()), tensors_of(tmp_path / "adapter")
    keys = ("r", "config_A_B", "config_C", "config_D_E", "bias", "modules_to_save")
    assert tuple(config[key] for key in keys) == (*told, "vector", "vector", "none", ["head"])
    fc1, qkv = f"{PREFIX}blocks.0.mlp.fc1.glora_", f"{PREFIX}blocks.0.attn.qkv.glora_"
    found = {name.removeprefix(fc1): tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(fc1)}
    assert found == shapes | {"C.X": (96, 1), "D.X": (192,), "E.X": (192,)}
    assert all(tensors[f"{fc1}{letter}.X"].count_nonzero() > 60 for letter in "CDE")
    empty = {name: (tuple(tensor.shape), tensor.any().item()) for name, tensor in tensors.items() if "zeros" in name}
    blocks = range(9)  # whose qkv have no bias
    assert empty == {
        f"{qkv}{letter}.zeros".replace("blocks.0", f"blocks.{block}"): (shape, False)
        for block in blocks for letter, shape in {"C": (96, 1), "D": (288,), "E": (288,)}.items()
    }  # fmt: skip
    updates = read_pack(pack).delta.updates
    (pushed,) = [t.update.c for t in updates if t.target.tensor == "blocks.0.mlp.fc1.bias" and t.update.kind == "push"]
    assert np.array_equal(tensors[f"{fc1}C.X"].numpy()[:, 0], pushed)


# Adapters of other networks than timm's own


def as_wrapped(backbone: Backbone) -> Any:
    """transformers' TimmWrapperForImageClassification with the weights of ``backbone``."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=backbone.name, num_labels=CLASSES, model_args=backbone.create_args)
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(timm_model(backbone).state_dict())
    return model.eval()


def as_own(backbone: Backbone) -> Any:
    """transformers' own ViT with the weights of ``backbone``."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=192, image_size=32, patch_size=16,
        layer_norm_eps=1e-6, num_labels=CLASSES,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    told = model.load_state_dict(respelled(timm_model(backbone).state_dict(), NEW_NAMES), strict=False)
    assert told.missing_keys == []
    return model.eval()


def in_module(backbone: Backbone) -> Any:
    """A module of a user's own around timm's network."""

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.ModuleDict({"body": timm_model(backbone)})

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return types.SimpleNamespace(logits=self.net["body"](pixel_values))

    return Classifier()


OWN: dict[str, Any] = {"modules_to_save": ["classifier"]}
OTHERS: dict[str, tuple[Any, Any]] = {  # the network, and the configuration
    "TimmWrapper": (as_wrapped, lora(target_modules=["qkv", "fc1"], bias="all")),
    "TimmWrapper, dora": (as_wrapped, lora(target_modules=r"timm_model\.blocks\.[0-3]\.attn\.qkv", use_dora=True)),
    "a module around it": (in_module, lora(target_modules=["qkv"])),
    "ViT, lora on query and value": (as_own, lora(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=5, **OWN)),
    "ViT, dora with biases": (
        as_own, lora(target_modules=["k_proj", "o_proj", "fc2"], use_dora=True, bias="lora_only", **OWN)
    ),
    "ViT, a bias of its own and a norm": (
        as_own, lora(target_modules=["v_proj"], lora_bias=True, modules_to_save=["classifier", "layernorm_after"])
    ),
    "ViT, ia3": (as_own, ia3(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], **OWN)),
    "ViT, vera": (as_own, vera(target_modules=["q_proj", "v_proj", "fc1"], **OWN)),
    "ViT, hira": (as_own, hira(target_modules=["q_proj", "v_proj", "fc2"], **OWN)),
    "ViT, glora": (as_own, glora("lora", "vector", "vector", target_modules=["q_proj", "v_proj", "fc1"], **OWN)),
    "TimmWrapper, glora": (as_wrapped, glora("vector", "lora", "constant", target_modules=["qkv"])),
    "ViT, lokr": (as_own, lokr(target_modules=["q_proj", "fc1"], **OWN)),
}  # fmt: skip


@pytest.mark.parametrize(("made", "config"), OTHERS.values(), ids=OTHERS)
def test_an_adapter_of_another_network_is_moved_to_timms(
    made: Any, config: Any, backbone: Backbone, tmp_path: Path
) -> None:
    model = moved(peft.get_peft_model(made(backbone), config))
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model.eval()(pixel_values=torch.from_numpy(IMAGES)).logits.numpy()

    report = import_peft(tmp_path / "adapter", tmp_path / "flowers.pet", backbone=backbone)

    assert report.max_abs_diff <= report.limit
    assert apart(expected, merged(tmp_path / "flowers.pet", backbone)) <= LIMIT
    assert {targeted.target.tensor for targeted in read_pack(tmp_path / "flowers.pet").delta.updates} <= {
        *backbone.tensors
    }


def test_an_adapter_of_an_older_transformers(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    new, expected = {"attention.q_proj": "attention.attention.query", "vit.layers": "vit.encoder.layer"}, None
    model = moved(peft.get_peft_model(as_own(backbone), lora(target_modules=["q_proj"], **OWN)))
    model.save_pretrained(str(folder))
    with torch.no_grad():
        expected = model.eval()(pixel_values=torch.from_numpy(IMAGES)).logits.numpy()
    older = tensors_of(folder)
    for name, theirs in new.items():
        older = {key.replace(name, theirs): tensor for key, tensor in older.items()}
    with_tensors(reconfigured(folder, target_modules=["query"]), older)

    import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)

    updates = read_pack(tmp_path / "flowers.pet").delta.updates
    assert [str(t.target) for t in updates] == [f"blocks.{n}.attn.qkv.weight[0:64]" for n in range(6)]
    assert apart(expected, merged(tmp_path / "flowers.pet", backbone)) <= LIMIT


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION", "IMAGE_CLASSIFICATION"])
def test_a_task_type_of_language_models_changes_nothing(
    task: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    expected = loaded(backbone, folder)

    import_peft(reconfigured(folder, task_type=task), tmp_path / "flowers.pet", backbone=backbone)

    assert apart(expected, merged(tmp_path / "flowers.pet", backbone)) <= LIMIT


def test_an_adapter_in_bfloat16_is_read(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    expected = loaded(backbone, with_tensors(folder, halved))

    import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)

    assert apart(expected, merged(tmp_path / "flowers.pet", backbone)) <= LIMIT


def test_rounding_for_storage_is_reported_and_is_no_fault(folder: Path, backbone: Backbone, tmp_path: Path) -> None:

    exact = import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)
    rounded = import_peft(folder, tmp_path / "small.pet", backbone=backbone, codec="fp16")

    assert exact.max_abs_diff < exact.limit < rounded.max_abs_diff < rounded.limit
    assert rounded.bytes < 0.7 * exact.bytes


def test_a_pack_says_where_it_comes_from(folder: Path, backbone: Backbone, tmp_path: Path) -> None:

    import_peft(folder, tmp_path / "flowers.pet", backbone=backbone, labels=["oak", "elm", "ash"])

    delta = read_pack(tmp_path / "flowers.pet").delta
    assert (delta.task, delta.labels, delta.val.n) == ("flowers", ("oak", "elm", "ash"), 0)
    assert delta.settings == {"r": 8, "lora_alpha": 8, "target_modules": ["qkv"]}
    assert delta.training == {"imported_from": f"peft {peft.__version__}"}


def test_the_command_line_takes_names_or_a_file_of_names(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    told, expected_of_file = "oak\r\nelm, tall\r\nдуб\r\n", ("oak", "elm, tall", "дуб")
    (tmp_path / "names.txt").write_bytes(told.replace("\r", "").encode())
    (tmp_path / "marked.txt").write_bytes(told.encode("utf-8-sig"))  # as Windows writes it
    (tmp_path / "unicode.txt").write_bytes(told.encode("utf-16"))  # and as it did
    long = tuple(letter * 100 for letter in "abc")  # longer together than a file's name may be
    for labels, expected in (
        ("oak,elm,ash", ("oak", "elm", "ash")),
        (",".join(long), long),
        *((tmp_path / name, expected_of_file) for name in ("names.txt", "marked.txt", "unicode.txt")),
    ):
        said = edgepet(
            "import-peft", folder, "--backbone", backbone.spec, "--img-size", 32, "--labels", labels,
            "-o", tmp_path / "flowers.pet", "--json",
        )  # fmt: skip
        assert said.code == 0, said.err
        assert read_pack(tmp_path / "flowers.pet").delta.labels == expected
    shown = edgepet("inspect", tmp_path / "flowers.pet").out
    assert "not scored; signed by: nobody" in shown


# Refusals


def refusal(folder: Path, backbone: Backbone) -> str:
    """The message without the folder's place; nothing must have been written."""
    with pytest.raises(InputError) as refused:
        import_peft(folder, folder.parent / "flowers.pet", backbone=backbone)
    assert not (folder.parent / "flowers.pet").exists()
    return str(refused.value).replace(str(folder), "DIR")


CONFIGURED = {
    "another type": ({"peft_type": "LOHA"}, ": peft_type: is one of LORA, LOKR, IA3, VERA, HIRA, GLORA, got 'LOHA'"),
    "no type": ({"peft_type": None}, ": peft_type: is one of LORA, LOKR, IA3, VERA, HIRA, GLORA, got None"),
    "a type that is none": ({"peft_type": [1]}, ": peft_type: is one of LORA, LOKR, IA3, VERA, HIRA, GLORA, got [1]"),
    "NumPy's order": (
        {"peft_type": "UNILORA"},
        ": peft_type: shuffles its values with NumPy's generator, whose order a pack does not repeat, got 'UNILORA'\n"
        "  fix: merge it in PEFT with merge_and_unload()",
    ),
    "transposed": (
        {"fan_in_fan_out": True},
        ": fan_in_fan_out: must be off: it does not fold, or is not known here, got True",
    ),
    "parameters": ({"target_parameters": ["x"]}, ": target_parameters: must be off: it does not fold"),
    "tokens": ({"trainable_token_indices": [1]}, ": trainable_token_indices: must be off: it does not fold"),
    "replication": ({"layer_replication": [[0, 2]]}, ": layer_replication: must be off: it does not fold"),
    "a later PEFT": (
        {"use_nosuch": {"x": 1}},
        ": use_nosuch: must be off: it does not fold, or is not known here, got {'x': 1}",
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        ": init_lora_weights: changes the base weights, which the folder does not hold, got 'pissa_niter_4'",
    ),
    "OLoRA": ({"init_lora_weights": "olora"}, ": init_lora_weights: changes the base weights"),
    "CorDA": ({"init_lora_weights": "corda"}, ": init_lora_weights: changes the base weights"),
    "LoftQ": ({"init_lora_weights": "loftq"}, ": init_lora_weights: changes the base weights"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, ": init_lora_weights: changes the base weights"),
    "a rank that is no number": ({"r": "8"}, ".r: needs a finite number, got '8'"),
    "a pattern that is none": (
        {"rank_pattern": {"(": 3}},
        ": rank_pattern: is no pattern: missing ), unterminated subpattern",
    ),
    "patterns that are none": ({"alpha_pattern": [1]}, ": alpha_pattern: needs an object, got [1]"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGURED.values(), ids=CONFIGURED)
def test_a_configuration_that_does_not_fold(
    changes: dict[str, object], message: str, folder: Path, backbone: Backbone
) -> None:
    assert refusal(reconfigured(folder, **changes), backbone).startswith(f"DIR/{CONFIG}{message}")


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
def test_projections_of_vera_that_are_not_in_the_folder(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    tuned(backbone, vera(target_modules=["qkv"], save_projection=False), folder)
    assert refusal(folder, backbone) == (
        f"DIR/{CONFIG}: save_projection: must be true: else A and B come from torch's generator, whose numbers are not"
        " promised, got False\n  fix: tune with save_projection=True, as PEFT does by itself"
    )
    reconfigured(folder, save_projection=True)
    assert refusal(folder, backbone) == f"DIR/{WEIGHTS}: needs vera_A and vera_B beside its modules, got none"
    tensors = tensors_of(folder)
    one = {"base_model.vera_A": torch.ones(6, 64)}
    assert refusal(with_tensors(folder, tensors | one), backbone) == (
        f"DIR/{WEIGHTS}: needs vera_A and vera_B beside its modules, got vera_A"
    )
    both = one | {"base_model.vera_B": torch.ones(6)}
    assert refusal(with_tensors(folder, tensors | both), backbone) == f"DIR/{WEIGHTS}: vera_B: needs a matrix, got (6,)"
    both = one | {"base_model.vera_B": torch.ones(190, 6)}
    what = "attn.qkv.weight: LowRank needs c (p,) and a base of p rows, got (192,) and (190, 6)\n"
    assert what in refusal(with_tensors(folder, tensors | both), backbone)


def test_projections_of_vera_beside_another_adapter(folder: Path, backbone: Backbone) -> None:
    shared = {"base_model.vera_A": torch.ones(6, 64), "base_model.vera_B": torch.ones(192, 6)}
    assert refusal(with_tensors(folder, tensors_of(folder) | shared), backbone) == (
        f"DIR/{WEIGHTS}: is not VeRA, and has no place for it, got vera_A, vera_B"
    )


def test_a_refused_key_is_named_with_its_value_and_a_way_out(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    folder = reconfigured(folder, use_qalora=True)
    assert refusal(folder, backbone) == (
        f"DIR/{CONFIG}: use_qalora: must be off: it does not fold, or is not known here, got True\n"
        "  fix: tune without use_qalora"
    )
    assert refusal(reconfigured(folder, use_qalora=False, init_lora_weights="pissa"), backbone).endswith(
        "fix: convert it with save_pretrained(path_initial_model_for_weight_conversion=...); add the classifier again"
    )


def test_pissa_that_was_converted_is_plain_lora(backbone: Backbone, tmp_path: Path) -> None:
    start, folder = tmp_path / "start", tmp_path / "adapter"
    model = peft.get_peft_model(timm_model(backbone), lora(r=4, target_modules=["qkv"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(start))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
    head = {f"{PREFIX}head.{name}": tensor for name, tensor in model.base_model.model.head.state_dict().items()}
    plain = {
        f"{PREFIX}head.{name}": head[f"{PREFIX}head.modules_to_save.default.{name}"] for name in ("weight", "bias")
    }
    with_tensors(folder, tensors_of(folder) | plain)  # PEFT leaves them out when it converts

    import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)

    assert apart(logits(model), merged(tmp_path / "flowers.pet", backbone)) <= LIMIT


PATHS = {
    "a form that A has not": (
        {"config_A_B": "matrix"}, {},
        f"DIR/{CONFIG}: config_A_B: is one of lora, vector, constant, none, got 'matrix'",
    ),
    "a form that C has not": (
        {"config_C": "constant"}, {}, f"DIR/{CONFIG}: config_C: is one of lora, vector, none, got 'constant'"
    ),
    "a form that D has not": (
        {"config_D_E": "lora"}, {}, f"DIR/{CONFIG}: config_D_E: is one of constant, vector, none, got 'lora'"
    ),
    "a form of other tensors": (
        {"config_A_B": "vector"}, {},
        "DIR: blocks.0.attn.qkv: needs the tensor 'glora_A.X', got glora_A.Xd, glora_A.Xu, glora_B.Xd, glora_B.Xu,"
        " glora_C.zeros, glora_D.X, glora_E.X",
    ),
    "something where there should be nothing": (
        {}, {"glora_C.zeros": torch.ones(64, 1)},
        "DIR: blocks.0.attn.qkv: needs zeros in 'glora_C.zeros', of which its configuration has none",
    ),
    "factors that do not meet": (
        {}, {"glora_B.Xu": torch.ones(2, 64)},
        "DIR: blocks.0.attn.qkv: needs a product of glora_B's Xd and Xu, got (192, 3) and (2, 64)",
    ),
    "another height": (
        {}, {"glora_A.Xd": torch.ones(191, 3)},
        "DIR: blocks.0.attn.qkv.weight: Modulate needs left (192, 3), got (191, 3)\n"
        "  fix: pass the backbone it was tuned on",
    ),
    "another rank than PEFT makes": (
        {"r": 4}, {},
        "DIR: cannot be loaded by PEFT on test_vit, got RuntimeError: Error(s) in loading state_dict for"
        " PeftModel:",
    ),
    "trained in groups": (
        {"target_parameters": ["x"]}, {},
        f"DIR/{CONFIG}: target_parameters: must be off: it does not fold, or is not known here, got ['x']\n"
        "  fix: tune without target_parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "tensors", "message"), PATHS.values(), ids=PATHS)
def test_a_glora_that_does_not_fold(
    changes: dict[str, object], tensors: dict[str, Any], message: str, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    tuned(backbone, glora("lora", "none", "constant", target_modules=["blocks.0.attn.qkv"]), folder)
    spoilt = {f"{PREFIX}blocks.0.attn.qkv.{name}": tensor for name, tensor in tensors.items()}
    with_tensors(reconfigured(folder, **changes), {**tensors_of(folder), **spoilt})

    assert refusal(folder, backbone) == message


def test_a_glora_of_a_convolution(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    tuned(backbone, glora("vector", "none", "none", target_modules=["qkv"]), folder)
    tensors = {f"{PREFIX}patch_embed.proj.glora_{letter}.X": torch.ones(64, 1) for letter in "AB"}

    assert refusal(with_tensors(folder, {**tensors_of(folder), **tensors}), backbone) == (
        "DIR: patch_embed.proj: is a convolution, which PEFT's GLoRA does not adapt\n"
        "  fix: leave it out of target_modules"
    )


def test_a_hira_of_half_a_product_or_of_groups(networks: dict[str, Backbone], tmp_path: Path) -> None:
    folder, backbone = tmp_path / "adapter", networks["test_convnext"]
    tuned(backbone, hira(target_modules=["fc1"]), folder)
    grouped = "stages.0.blocks.0.conv_dw"
    tensors = {
        f"{PREFIX}{grouped}.hira_A": torch.ones(3, 1, 7, 7),
        f"{PREFIX}{grouped}.hira_B": torch.ones(24, 3, 1, 1),
    }
    whole = tensors_of(folder)

    assert refusal(with_tensors(folder, {**whole, **tensors}), backbone) == (
        f"DIR: {grouped}: is a convolution of 24 groups, which PEFT's HiRA does not adapt\n"
        "  fix: leave it out of target_modules"
    )
    half = {name: tensor for name, tensor in whole.items() if not name.endswith("stages.0.blocks.0.mlp.fc1.hira_B")}
    assert refusal(with_tensors(folder, half), backbone) == (
        "DIR: stages.0.blocks.0.mlp.fc1: needs the tensor 'hira_B', got hira_A"
    )


def test_a_folder_without_its_files(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert refusal(folder, backbone) == (
        "DIR: holds its weights only as a pickle, adapter_model.bin, which is not opened\n"
        "  fix: save it with safetensors: model.save_pretrained(DIR, safe_serialization=True)"
    )
    (folder / "adapter_model.bin").unlink()
    assert refusal(folder, backbone).startswith(f"DIR: holds no {WEIGHTS}\n")
    shutil.copytree(folder, folder / "second")
    (folder / CONFIG).unlink()
    assert refusal(folder, backbone) == f"DIR: holds no {CONFIG}\n  fix: pass one adapter: DIR/second"
    (folder / CONFIG).write_text("{")
    (folder / WEIGHTS).write_bytes(b"short")
    assert refusal(folder, backbone).startswith(f"DIR/{CONFIG}: is no readable JSON, got ")
    (folder / CONFIG).write_text("[]")
    assert refusal(folder, backbone) == f"DIR/{CONFIG}: needs an object, got list"
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    assert refusal(folder, backbone).startswith(f"DIR/{WEIGHTS}: is no whole safetensors file, got ")


PLAIN = "must be a plain pattern: no repeated group, at most 4 repetitions"
SLOW = {  # patterns that Python's matcher would try for longer than anybody waits
    "nested": "((((.+)+)+)+)+!",
    "a repeated choice": "(a|a)*!",
    "many": ".*" * 30 + "!",
    "counted": "(x{1,9}){9}",
    "long": "qkv|" * 30_000,
}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules"])
@pytest.mark.parametrize("pattern", SLOW.values(), ids=SLOW)
def test_a_pattern_that_could_take_for_ever_is_refused(
    pattern: str, key: str, folder: Path, backbone: Backbone
) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[key] = pattern if key == "target_modules" else {pattern: 1}
    (folder / CONFIG).write_text(json.dumps(config))

    began = time.perf_counter()
    told = refusal(folder, backbone)

    assert told == (
        f"DIR/{CONFIG}: {key}: {PLAIN}, got {pattern[:80]!r}\n  fix: name the layers one by one, with | between"
    )
    assert time.perf_counter() - began < 20


def test_the_slowest_pattern_that_is_taken_ends_on_the_longest_name(folder: Path, backbone: Backbone) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"alpha_pattern": {".*.*.*.*!": 1}}
    (folder / CONFIG).write_text(json.dumps(config))
    name = f"{PREFIX}{'a.' * 2000}lora_A.weight"
    with_tensors(folder, {**tensors_of(folder), name: torch.ones(8, 64)})

    began = time.perf_counter()
    told = refusal(folder, backbone)

    assert "is no linear layer or convolution of the backbone" in told
    assert time.perf_counter() - began < 20


QKV = "blocks.0.attn.qkv"
A, B = f"{PREFIX}{QKV}.lora_A.weight", f"{PREFIX}{QKV}.lora_B.weight"
HELD = {
    "no classifier": (
        {f"{PREFIX}head.weight": None},
        "DIR: holds no weights of the classifier 'head'\n  fix: tune with modules_to_save",
    ),
    "half an adapter": ({B: None}, f"DIR: {QKV}: needs the tensor 'lora_B.weight', got lora_A.weight"),
    "a length without DoRA": (
        {f"{PREFIX}{QKV}.lora_magnitude_vector": torch.ones(192)},
        f"DIR: {QKV}: has tensors that its configuration does not speak of, got lora_magnitude_vector",
    ),
    "a whole layer left out": ({A: None, B: None}, "DIR: lacks tensors that its configuration speaks of, got "),
    "another rank": (
        {A: torch.ones(3, 64), B: torch.ones(192, 3)},
        f"DIR: {QKV}: needs the rank that its configuration says, 8, got 3",
    ),
    "another width": ({A: torch.ones(8, 63)}, f"DIR: {QKV}.weight: LowRank needs right (8, 64), got (8, 63)"),
    "not finite": ({A: torch.full((8, 64), torch.nan)}, f"DIR/{WEIGHTS}: {A}: needs finite values"),
    "another kind of number": (
        {A: torch.ones(8, 64, dtype=torch.int8)},
        f"DIR/{WEIGHTS}: {A}: needs one of F64, F32, F16, BF16, I64, got I8",
    ),
    "another root": ({"model.x": torch.ones(1)}, f"DIR/{WEIGHTS}: model.x: needs a name that begins with {PREFIX}"),
    "a layer of another network": (
        {f"{PREFIX}x.lora_A.weight": torch.ones(8, 64)},
        "DIR: x: is no linear layer or convolution of the backbone\n",
    ),
    "an adapted norm": (
        {f"{PREFIX}norm.lora_A.weight": torch.ones(8, 64)},
        "DIR: norm: is no linear layer or convolution of the backbone\n",
    ),
    "an unknown tensor": ({f"{PREFIX}{QKV}.lora_E": torch.ones(8)}, f"DIR: {QKV}.lora_E: is no tensor of the backbone"),
    "a layer of another shape": (
        {f"{PREFIX}norm.weight": torch.ones(8)},
        "DIR: norm.weight: Replace needs value (64,), got (8,)",
    ),
    "an adapted classifier": (
        {f"{PREFIX}head.lora_A.weight": torch.ones(8, 64)},
        "DIR: head: is adapted, but its own weights are not in the folder\n",
    ),
}


@pytest.mark.parametrize(("changes", "message"), HELD.values(), ids=HELD)
def test_tensors_that_do_not_fold(
    changes: dict[str, Any], message: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in {**tensors_of(folder), **changes}.items() if tensor is not None}

    assert refusal(with_tensors(folder, tensors), backbone).startswith(message)


def renamed(folder: Path, change: Any) -> Path:
    """The adapter under names that ``change`` makes of timm's; a tensor of no name is left out."""
    named = ((change(key.removeprefix(PREFIX)), tensor) for key, tensor in tensors_of(folder).items())
    return with_tensors(folder, {f"{PREFIX}{name}": tensor for name, tensor in named if name})


PASS = "pass the `backbone` that it was tuned on; or tune timm's model, or transformers' TimmWrapper"
STRANGE = {
    "a wrapper's adapter without its classifier": (
        lambda name: f"timm_model.{name}" if "qkv" in name else None,
        "DIR: holds no weights of the classifier 'timm_model.head'\n"
        '  fix: tune with modules_to_save=["timm_model.head"]: a pack needs the classifier',
    ),
    "a classifier of the wrapper's own": (
        lambda name: f"backbone.{name}" if "qkv" in name else name.replace("head", "classifier"),
        "DIR: holds no weights of the classifier 'backbone.head', got classifier\n"
        '  fix: tune with modules_to_save=["backbone.head"]: a pack needs the classifier',
    ),
    "another network of transformers": (
        lambda name: name.replace("blocks.", "swin.encoder.layers.0.blocks.").replace("qkv", "self.query"),
        "DIR: swin.encoder.layers.0.blocks.0.attn.self.query: is no layer of the backbone by timm's names, by"
        f" transformers' of a ViT or DINOv2, or below one prefix\n  fix: {PASS}",
    ),
    "a deeper ViT": (
        lambda name: (
            name.replace("blocks.5.attn.qkv", "vit.layers.9.attention.q_proj")
            .replace("blocks.", "vit.layers.")
            .replace("attn.qkv", "attention.q_proj")
            .replace("head", "classifier")
        ),
        "DIR: vit.layers.9.attention.q_proj: is no linear layer or convolution of the backbone\n"
        "  fix: pass the `backbone` that it was tuned on, by timm's name",
    ),
}


@pytest.mark.parametrize(("change", "message"), STRANGE.values(), ids=STRANGE)
def test_names_that_are_not_timms(change: Any, message: str, folder: Path, backbone: Backbone) -> None:
    assert refusal(renamed(folder, change), backbone) == message


def test_a_classifier_of_other_features(folder: Path, backbone: Backbone) -> None:
    doubled = tensors_of(folder) | {f"{PREFIX}head.weight": torch.ones(3, 128)}
    assert refusal(with_tensors(folder, doubled), backbone) == (
        "DIR: head: must be a classifier of the backbone's 64 features, got one of 128\n"
        "  fix: tune timm's model, or pass the backbone that it was tuned on"
    )


GROUPED = {
    "lora": (lora(r=48, target_modules=["conv_dw"]), "whose LoRA PEFT computes across them"),
    "ia3": (ia3(target_modules=["conv_dw"], feedforward_modules=["conv_dw"]), "whose inputs cannot be scaled"),
}


@pytest.mark.parametrize(("config", "message"), GROUPED.values(), ids=GROUPED)
def test_a_convolution_of_groups(config: Any, message: str, networks: dict[str, Backbone], tmp_path: Path) -> None:
    config.target_modules = ["stages.0.blocks.0.conv_dw"]
    tuned(networks["test_convnext"], config, tmp_path / "adapter")

    said = refusal(tmp_path / "adapter", networks["test_convnext"])

    assert said.startswith("DIR: stages.0.blocks.0.conv_dw: is a convolution of 24 groups, ")
    assert message in said


def test_a_wrong_lowering_is_a_failed_command(
    folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def doubled(*given: Any) -> Any:
        lowered = lower(*given)
        first = lowered.updates[0]
        update = replace(first.update, scale=2.0)
        return replace(lowered, updates=(Targeted(first.target, update), *lowered.updates[1:]))

    lower = peft_verbs.lower
    monkeypatch.setattr(peft_verbs, "lower", doubled)

    with pytest.raises(CheckError, match=r"PEFT's network and the merged pack must agree within .* on logits, got "):
        import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)
    assert not (tmp_path / "flowers.pet").exists()


def test_peft_is_needed_and_named(
    folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packed(backbone, LoRA(), tmp_path / "p.pet")
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(
        MissingError, match=r"import-peft: needs the package 'peft'.*\n  fix: pip install 'edgepet\[peft\]'"
    ):
        import_peft(folder, tmp_path / "flowers.pet", backbone=backbone)
    assert edgepet("export-peft", pack, "-o", tmp_path / "out").code == 5


def test_places_that_are_not_free(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    pack = packed(backbone, LoRA(), tmp_path / "p.pet")
    (folder / "notes.txt").touch()

    with pytest.raises(InputError, match=r"needs a file name ending in .pet, got 'flowers'"):
        import_peft(folder, tmp_path / "flowers", backbone=backbone)
    with pytest.raises(InputError, match=r"nosuch: is no folder\n  fix: mkdir -p "):
        import_peft(folder, tmp_path / "nosuch" / "flowers.pet", backbone=backbone)
    with pytest.raises(
        InputError, match=r"holds files that would be lost, got README.md, notes.txt\n  fix: name another place"
    ):
        export_peft(pack, folder, backbone=backbone)
    assert (folder / "notes.txt").exists()


def test_a_module_of_ones_own(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    own = Backbone.from_module(backbone.module, name="mine", preprocess=Preprocess(image_size=(32, 32)))

    assert refusal(folder, own) == "module:mine: is a module of its user's own\n  fix: PEFT folders need a timm model"


ROW = np.ones(64, np.float32)
UNFIT = {
    "ssf": (SSF(), "patch_embed.proj.bias: Add is nothing that PEFT's LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA does"),
    "a linear probe": (
        LinearProbe(),
        "needs updates of one of PEFT's methods: LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA, got no updates of layers'"
        " weights",
    ),
    "branches": (AdaptFormer(), "adaptformer has 6 branches, which stay in the graph and cannot be folded"),
}


@pytest.mark.parametrize(("method", "message"), UNFIT.values(), ids=UNFIT)
def test_a_pack_that_peft_has_no_adapter_for(method: Method, message: str, backbone: Backbone, tmp_path: Path) -> None:
    pack = packed(backbone, method, tmp_path / "flowers.pet")

    with pytest.raises(InputError) as refused:
        export_peft(pack, tmp_path / "adapter", backbone=backbone)

    assert message in str(refused.value)
    assert not (tmp_path / "adapter").exists()


LOW = LowRank(np.ones((64, 1), np.float32), np.ones((1, 64), np.float32))
TIMES = Modulate(np.ones((64, 1), np.float32), np.ones((1, 64), np.float32))
PROJ, FC2 = "blocks.0.attn.proj", "blocks.0.mlp.fc2"
MIXED = {
    "an addition behind lengths": (
        [(f"{PROJ}.weight", LOW), (f"{PROJ}.weight", Scale(2 * ROW)), (f"{PROJ}.weight", LOW)],
        "LowRank comes where PEFT's LoRA and DoRA have no place for it",
    ),
    "a scale on both sides of an addition": (
        [(f"{PROJ}.weight", Scale(2 * ROW)), (f"{PROJ}.weight", LOW), (f"{PROJ}.weight", Scale(2 * ROW))],
        "Scale comes where PEFT's GLoRA has no place for it",
    ),
    "a scale of inputs in front of an addition": (
        [(f"{PROJ}.weight", Scale(ROW, "in")), (f"{PROJ}.weight", LOW)],
        "Scale comes where PEFT's GLoRA has no place for it",
    ),
    "two products": (
        [(f"{PROJ}.weight", TIMES), (f"{PROJ}.weight[0:9]", Modulate(ROW[:9, None], ROW[None]))],
        f"{PROJ}.weight[0:9]: Modulate comes where PEFT's HiRA has no place for it",
    ),
    "a product and a dense weight": (
        [(f"{PROJ}.weight", TIMES), (f"{PROJ}.weight", Add(np.ones((64, 64), np.float32)))],
        "needs updates of one of PEFT's methods: LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA, got add, modulate",
    ),
    "a product and a bare parameter": (
        [(f"{PROJ}.weight", TIMES), ("cls_token", Add(np.ones((1, 1, 64), np.float32)))],
        "cls_token: Add is nothing that PEFT's LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA does",
    ),
    "a product of a kernel and its bias": (
        [
            ("patch_embed.proj.weight", Modulate(ROW[:, None], np.ones((1, 768), np.float32))),
            ("patch_embed.proj.bias", Add(ROW)),
        ],
        "patch_embed.proj.weight: Modulate is of a convolution, and PEFT's GLoRA adapts linear layers alone",
    ),
    "a scale of inputs behind an addition": (
        [(f"{PROJ}.weight", LOW), (f"{PROJ}.weight", Scale(ROW, "in"))],
        "Scale comes where PEFT's LoRA and DoRA have no place for it",
    ),
    "a scale that leaves the bias": ([(f"{PROJ}.weight", Scale(2 * ROW))], "Scale scales a weight and not its bias"),
    "both sides": (
        [(f"{PROJ}.weight", Scale(ROW, "in")), (f"{PROJ}.weight", Scale(ROW))],
        "Scale scales inputs in a way that PEFT's IA3 does not",
    ),
    "a part of each row": ([(f"{PROJ}.weight[0:64, 0:8]", Scale(ROW))], "Scale scales a part of each row"),
    "a bare parameter": (
        [(f"{PROJ}.weight", LOW), ("cls_token", Add(np.ones((1, 1, 64), np.float32)))],
        "Add is nothing that PEFT's",
    ),
    "an unknown tensor": ([(f"{PROJ}.weight", LOW), ("nosuch", Scale(ROW))], "Scale is of no tensor of the backbone"),
    "a dense weight": (
        [(f"{PROJ}.weight", Add(np.ones((64, 64), np.float32)))],
        "needs updates of one of PEFT's methods: LoRA, DoRA, LoKr, IA3, VeRA, HiRA or GLoRA, got add",
    ),
}


@pytest.mark.parametrize(("updates", "message"), MIXED.values(), ids=MIXED)
def test_updates_that_no_adapter_of_pefts_does(
    updates: list[tuple[str, Any]], message: str, backbone: Backbone, tmp_path: Path
) -> None:
    delta = read_pack(packed(backbone, LinearProbe(), tmp_path / "flowers.pet", "fp32")).delta
    targeted = tuple(Targeted(Target.parse(name, where="test"), update) for name, update in updates)
    write_pack(tmp_path / "flowers.pet", replace(delta, updates=targeted), codec="fp32")

    with pytest.raises(InputError) as refused:
        export_peft(tmp_path / "flowers.pet", tmp_path / "adapter", backbone=backbone)

    assert str(refused.value).startswith("flowers.pet: ")
    assert message in str(refused.value)
    assert str(refused.value).endswith("\n  fix: edgepet merge writes dense weights of any pack")


def test_a_bias_beside_a_low_rank_addition_is_kept(backbone: Backbone, tmp_path: Path) -> None:
    delta = read_pack(packed(backbone, LinearProbe(), tmp_path / "flowers.pet", "fp32")).delta
    updates = ((f"{PROJ}.weight", LOW), (f"{PROJ}.bias", Add(ROW)), (f"{FC2}.bias", Add(ROW)))
    targeted = tuple(Targeted(Target(name), update) for name, update in updates)
    write_pack(tmp_path / "flowers.pet", replace(delta, updates=targeted), codec="fp32")

    export_peft(tmp_path / "flowers.pet", tmp_path / "adapter", backbone=backbone)

    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["bias"] == "all"
    assert apart(merged(tmp_path / "flowers.pet", backbone), loaded(backbone, tmp_path / "adapter")) <= LIMIT


def test_additions_of_different_scales_and_a_layer_of_lengths_alone(backbone: Backbone, tmp_path: Path) -> None:
    delta = read_pack(packed(backbone, LinearProbe(), tmp_path / "flowers.pet", "fp32")).delta
    halved = replace(LOW, left=LOW.left[:32], scale=0.5)
    updates = ((f"{PROJ}.weight", LOW), (f"{PROJ}.weight[0:32]", halved), (f"{FC2}.weight", Scale(1.5 * ROW)))
    targeted = tuple(Targeted(Target.parse(name, where="test"), update) for name, update in updates)
    write_pack(tmp_path / "flowers.pet", replace(delta, updates=targeted), codec="fp32")

    export_peft(tmp_path / "flowers.pet", tmp_path / "adapter", backbone=backbone)

    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["use_dora"] is True
    assert apart(merged(tmp_path / "flowers.pet", backbone), loaded(backbone, tmp_path / "adapter")) <= LIMIT


BIASES: dict[str, tuple[list[Any], bool]] = {  # what happens to a bias, and whether GLoRA has a word for all of it
    "in GLoRA's order": ([Scale(2 * ROW), Add(ROW), Push(ROW, Target(f"{PROJ}.weight"))], True),
    "of two numbers": ([Add(ROW), Scale(2 * ROW), Push(ROW[:2], Target(f"{PROJ}.weight"), scale=3.0)], True),
    "a scale of what was pushed": ([Push(ROW, Target(f"{PROJ}.weight")), Scale(2 * ROW)], False),
    "of what updates leave": ([Push(ROW, Target(f"{PROJ}.weight"), "updated"), Scale(2 * ROW)], False),
    "of another layer": ([Push(ROW, Target("blocks.1.attn.proj.weight"))], False),
    "into some": ([Replace(ROW), Push(ROW, Target("blocks.0.attn.qkv.weight", (0, 64)))], False),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kept"), BIASES.values(), ids=BIASES)
def test_what_happens_to_a_bias_is_gloras(changes: list[Any], kept: bool, backbone: Backbone, tmp_path: Path) -> None:
    delta = read_pack(packed(backbone, LinearProbe(), tmp_path / "flowers.pet", "fp32")).delta
    half = Modulate(ROW[:32, None], np.linspace(-0.3, 0.3, 64, dtype=np.float32)[None], scale=0.5)
    weights = [(f"{PROJ}.weight[0:32]", half), (f"{FC2}.weight", Scale(1.5 * ROW)), (f"{PROJ}.weight", LOW)]
    updates = [*weights, *((f"{PROJ}.bias", change) for change in changes), ("norm.bias", Add(ROW))]
    targeted = tuple(Targeted(Target.parse(name, where="test"), update) for name, update in updates)
    write_pack(tmp_path / "flowers.pet", replace(delta, updates=targeted), codec="fp32")

    export_peft(tmp_path / "flowers.pet", tmp_path / "adapter", backbone=backbone)

    config, tensors = json.loads((tmp_path / "adapter" / CONFIG).read_text()), tensors_of(tmp_path / "adapter")
    assert (config["peft_type"], config["config_A_B"], config["bias"]) == ("GLORA", "lora", "all")
    assert bool(tensors[f"{PREFIX}{PROJ}.glora_C.X"].any()) is kept
    assert apart(merged(tmp_path / "flowers.pet", backbone), loaded(backbone, tmp_path / "adapter")) <= LIMIT
