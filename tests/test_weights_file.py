"""Weights as tools leave them: read as what they are, or refused with the place and a cure, and never executed."""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import io
import os
import pathlib
import pickle
import re
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from edgepet.deltas.delta import Head
from edgepet.errors import InputError
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.networks.merged import merged_logits
from edgepet.networks.weight_names import unwrapped
from edgepet.networks.weights_file import read_state
from edgepet.spec import Preprocess
from tests.tiny import make_delta, random_images, seeded
from tests.transformers_names import NEW_NAMES, OLD_NAMES, respelled

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(backbone: Backbone) -> State:
    """The weights of ``backbone`` under timm's names, with a classifier of 1,000 classes behind them."""
    head = {"head.weight": torch.ones(1000, 64), "head.bias": torch.zeros(1000)}
    return {name: torch.from_numpy(np.array(value)) for name, value in backbone.native.items()} | head


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights that must not be taken."""
    return {name: tensor + 1 for name, tensor in state.items()}


class Tool:
    """A class of a package that is not installed where the file is read."""


@contextlib.contextmanager
def installed(name: str, base: type = Tool) -> Iterator[Any]:
    """A class of this full name, which pickle finds as long as the block runs."""
    module, _, kind = name.rpartition(".")
    made = type(kind, (base,), {"__module__": module})
    packages = {".".join(module.split(".")[: n + 1]): types.ModuleType(module) for n in range(module.count(".") + 1)}
    setattr(packages[module], kind, made)
    sys.modules.update(packages)
    try:
        yield made
    finally:
        for package in packages:
            del sys.modules[package]


def lightning(state: State) -> dict[str, Any]:
    """A Lightning module with ``self.model`` and a loss that has a buffer, as ``save_checkpoint`` writes it."""
    return {
        "epoch": 3, "pytorch-lightning_version": "2.5.0", "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {},
        "state_dict": under("model.", state) | {"criterion.weight": torch.ones(3), "val_acc.tp": torch.zeros(1)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
    }  # fmt: skip


def train_script(state: State) -> dict[str, Any]:
    """What ``CheckpointSaver`` of timm's train.py writes."""
    return {
        "epoch": 3, "arch": "test_vit", "state_dict": other(state), "optimizer": {"state": {0: torch.ones(2)}},
        "version": 2, "args": argparse.Namespace(lr=0.1, output=pathlib.Path("out")), "amp_scaler": {"scale": 2.0},
        "state_dict_ema": state, "metric": np.float64(75.5),
    }  # fmt: skip


# How weights of one network come, and the name of the file.
FILES: dict[str, tuple[str, Callable[[State], Any]]] = {
    "a state dict": ("w.pth", lambda s: s),
    "timm's train.py": ("model_best.pth.tar", train_script),
    "train.py without EMA": ("last.pth.tar", lambda s: {"state_dict": s, "state_dict_ema": None, "epoch": 1}),
    "transformers' suffix": ("pytorch_model.bin", lambda s: s),
    "no suffix": ("weights", lambda s: s),
    "another suffix": ("w.safetensors", lambda s: s),
    "parameters": ("w.pt", lambda s: {name: nn.Parameter(tensor) for name, tensor in s.items()}),
    "DataParallel": ("w.pth", lambda s: {"model": under("module.", s)}),
    "torch.compile": ("w.pth", lambda s: under("_orig_mod.", s)),
    "both": ("w.pth", lambda s: under("module._orig_mod.", s)),
    "compiled inside": ("w.ckpt", lambda s: {"state_dict": under("net._orig_mod.", s)}),
    "FSDP": ("w.pth", lambda s: {n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): t for n, t in s.items()}),
    "Lightning": ("epoch=3-step=9.ckpt", lightning),
    "TimmWrapper": ("model.bin", lambda s: under("timm_model.", s)),
    "transformers 4": ("pytorch_model.bin", lambda s: respelled(s, OLD_NAMES)),
    "transformers 5": ("pytorch_model.bin", lambda s: respelled(s, NEW_NAMES)),
    "the tutorial's names": ("w.pt", lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}}),
    "an entry of another name": ("w.pt", lambda s: {"weights of mine": s, "epoch": 3}),
    "torchvision's EMA": (
        "w.pth", lambda s: {"model": other(s), "model_ema": {"n_averaged": torch.tensor(9)} | under("module.", s)}
    ),
    "an EMA with a shadow": ("w.pth", lambda s: {"model": other(s), "ema": {"decay": 0.9, "shadow": s}}),
    "an EMA beside it": ("w.ckpt", lambda s: {"state_dict": under("model.", other(s)) | under("ema_model.module.", s)}),
    "MAE with its decoder": (
        "checkpoint-799.pth",
        lambda s: {"model": s | {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(2)}},
    ),
    "I-JEPA": (
        "ep300.pth.tar",
        lambda s: {
            "encoder": under("module.", s),
            "predictor": {"module.mask_token": torch.ones(1)},
            "target_encoder": under("module.", other(s)),
        },
    ),
    "DINO": (
        "checkpoint.pth",
        lambda s: {
            "student": under("module.backbone.", other(s)),
            "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.ones(2, 2)},
        },
    ),
    "a larger head": ("w.pth", lambda s: s | {"head.weight": torch.ones(21843, 64)}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "made"), FILES.values(), ids=FILES)
def test_a_file_is_read_as_what_it_is(
    name: str, made: Callable[[State], Any], state: State, backbone: Backbone, tmp_path: Path
) -> None:
    torch.save(made(state), tmp_path / name)

    read = load_backbone(f"test_vit@{tmp_path / name}", image_size=32)

    assert read.fingerprint == backbone.fingerprint


def test_names_of_other_code_are_left_for_timm_to_convert() -> None:
    """Meta's SAM: most names fit below a prefix, but timm renames the others only where it sees the prefix."""
    names = {f"blocks.{n}.{leaf}" for n in range(4) for leaf in ("norm1.weight", "attn.qkv.weight", "mlp.fc1.weight")}
    official = {f"image_encoder.{name.replace('fc1', 'lin1')}": 0 for name in names}

    assert unwrapped(official, names, "w.pth") == official
    assert unwrapped({f"module.model.{name}": 0 for name in official}, names, "w.pth") == official
    assert unwrapped({f"image_encoder.{name}": 0 for name in names} | {"loss": 1}, names, "") == dict.fromkeys(names, 0)


def test_the_old_format_and_a_packed_archive_are_read(state: State, backbone: Backbone, tmp_path: Path) -> None:
    old, plain, packed = tmp_path / "old.pth", tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"model": state, "args": argparse.Namespace()}, old, _use_new_zipfile_serialization=False)
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as taken:
        for entry in given.namelist():
            taken.writestr(entry, given.read(entry))
    safetensors.torch.save_file(under("module.", state), tmp_path / "named.pth")

    for file in (old, packed, tmp_path / "named.pth"):
        assert load_backbone(f"test_vit@{file}", image_size=32).fingerprint == backbone.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    halved = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save(halved, tmp_path / "w.pth")

    native = load_backbone(f"test_vit@{tmp_path / 'w.pth'}", image_size=32).native

    assert all(np.array_equal(native[name], halved[name].float().numpy()) for name in native)
    assert {value.dtype for value in native.values()} == {np.dtype(np.float32)}


def test_half_precision_takes_counters_with_it(tmp_path: Path) -> None:
    module = seeded(timm.create_model("test_resnet", num_classes=0), 3)
    torch.save({name: tensor.half() for name, tensor in module.state_dict().items()}, tmp_path / "w.pth")

    native = load_backbone(f"test_resnet@{tmp_path / 'w.pth'}", image_size=32).native

    assert native["bn1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("pytorch_lightning.utilities.parsing.AttributeDict", dict),
        ("omegaconf.dictconfig.DictConfig", Tool),
        ("mmengine.logging.history_buffer.HistoryBuffer", Tool),
    ],
)
def test_what_tools_leave_beside_weights_is_forgotten(
    name: str, base: type, state: State, backbone: Backbone, tmp_path: Path
) -> None:
    with installed(name, base) as kind:
        beside = kind()
        if base is dict:
            beside["lr"] = 0.1
        else:
            beside.values = np.arange(3.0)
        counted = collections.defaultdict(int, epochs=3)
        given = {"config": beside, "kind": dict, "counted": counted, "best": np.float64(0.5)}
        torch.save({"state_dict": state, "hyper_parameters": given}, tmp_path / "w.ckpt")

    assert load_backbone(f"test_vit@{tmp_path / 'w.ckpt'}", image_size=32).fingerprint == backbone.fingerprint


def test_a_vit_that_was_tuned_with_average_pooling(tmp_path: Path) -> None:
    tuned: Any = seeded(timm.create_model("test_vit", num_classes=3, global_pool="avg"), 5).eval()
    torch.save({"model": tuned.state_dict()}, tmp_path / "mae.pth")

    backbone = load_backbone(f"test_vit@{tmp_path / 'mae.pth'}")

    assert backbone.create_args == {"global_pool": "avg", "img_size": 160, "dynamic_img_size": False}
    assert "fc_norm.weight" in backbone.native
    head = Head(weight=tuned.head.weight.detach().numpy(), bias=tuned.head.bias.detach().numpy())
    images = random_images(4, 2, 160)
    got = merged_logits(
        backbone, make_delta(head=head, preprocess=backbone.preprocess, fingerprint=backbone.fingerprint), images
    )
    with torch.no_grad():
        expected = tuned(torch.from_numpy(images)).numpy()
    assert np.abs(expected - got).max() <= 1e-5 * np.abs(expected).max()  # float32 through six blocks


# Refusals

ALONE = '\n  fix: where it was made, write the tensors alone: torch.save(model.state_dict(), "weights.pth")'
AGAIN = "\n  fix: download or copy it again, whole"
OTHER = "\n  fix: pass the architecture that the file is of"


def saved(value: object, **how: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held, **how)
    return held.getvalue()


def scripted() -> bytes:
    held = io.BytesIO()
    jit: Any = torch.jit  # has no types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        jit.save(jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), held)
    return held.getvalue()


def archive(**files: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return held.getvalue()


class Calls:
    """Unpickling this would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class Whole(nn.Linear):
    """A network that was saved as the object that it is."""


REFUSED: dict[str, tuple[Callable[[State], bytes], str]] = {
    "empty": (lambda s: b"", f"FILE: is empty{AGAIN}"),
    "cut": (lambda s: saved(s)[:-2000], f"FILE: is cut short or damaged, got File is not a zip file{AGAIN}"),
    "an old file, cut": (
        lambda s: saved(s, _use_new_zipfile_serialization=False)[:-2000],
        f"FILE: is cut short, got unexpected EOF, expected N more bytes. The file might be corrupted.{AGAIN}",
    ),
    "safetensors, cut": (
        lambda s: safetensors.torch.save(s)[:-2000],
        "FILE: is no whole safetensors file, got Error while deserializing header: incomplete metadata, file not fully"
        f" covered{AGAIN}",
    ),
    "a pointer": (
        lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "FILE: is a Git LFS pointer, not the file\n  fix: git lfs pull",
    ),
    "a page": (
        lambda s: b"<!DOCTYPE html><html></html>",
        "FILE: is a web page, not weights\n  fix: download the file itself",
    ),
    "an index": (
        lambda s: b'{"weight_map": {}}',
        "FILE: is JSON, not weights\n  fix: pass the file that holds the tensors; join one that lies in several parts",
    ),
    "gzip": (
        lambda s: gzip.compress(saved(s)),
        "FILE: is compressed with gzip\n  fix: unpack it, and pass the file inside",
    ),
    "NumPy": (
        lambda s: archive(**{"embedding/kernel.npy": b""}),
        "FILE: holds NumPy arrays, whose names are not those of torch\n"
        '  fix: load it with timm\'s load_pretrained, then torch.save(model.state_dict(), "weights.pth")',
    ),
    "another archive": (
        lambda s: archive(**{"w.pth": b""}),
        "FILE: is an archive of other files, got w.pth\n  fix: unpack it, and pass the file inside",
    ),
    "another file": (
        lambda s: b"GIF89a" + bytes(60),
        "FILE: is no weights file that is known here, got b'GIF89a\\x00\\x00' first\n"
        "  fix: pass what torch.save or safetensors wrote",
    ),
    "TorchScript": (
        lambda s: scripted(),
        "FILE: is a TorchScript program, which is not opened\n"
        '  fix: write its tensors alone: torch.save(torch.jit.load("w.pth").state_dict(), "weights.pth")',
    ),
    "a whole network": (
        lambda s: saved(Whole(2, 2)),
        f"FILE: needs classes to be read, and is not executed, got tests.test_weights_file.Whole{ALONE}",
    ),
    "a whole network in an old file": (
        lambda s: saved({"model": Whole(2, 2)}, _use_new_zipfile_serialization=False),
        f"FILE: cannot be read as weights alone, got tests.test_weights_file.Whole{ALONE}",
    ),
    "a plain pickle": (
        lambda s: pickle.dumps({"w": np.ones(2)}, protocol=4),
        f"FILE: cannot be read as weights alone, got Unsupported operand 149{ALONE}",
    ),
    "a list": (lambda s: saved(list(s.values())), f"FILE: must hold tensors by name, got a list{ALONE}"),
    "a tensor": (lambda s: saved(torch.ones(2)), f"FILE: must hold tensors by name, got one tensor{ALONE}"),
    "nothing": (lambda s: saved({}), f"FILE: holds no tensors by name, got nothing{ALONE}"),
    "an optimiser": (
        lambda s: saved({"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 2}),
        f"FILE: holds no tensors by name, got optimizer, epoch{ALONE}",
    ),
    "several entries": (
        lambda s: saved({"student a": s, "student b": s}),
        f"FILE: holds several sets of tensors, got student a, student b{ALONE}",
    ),
    "several networks": (
        lambda s: saved({"state_dict": under("encoder_q.", s) | under("encoder_k.", s)}),
        "FILE: holds several networks of these names, got encoder_k.*, encoder_q.*\n"
        '  fix: save the one you mean by itself: torch.save(model.state_dict(), "weights.pth")',
    ),
    "another network": (
        lambda s: saved(timm.create_model("test_resnet", num_classes=0).state_dict()),
        "FILE: does not hold exactly the tensors of VisionTransformer, got 78 missing (cls_token, pos_embed,"
        f" patch_embed.proj.weight, ...), 90 unknown (conv1.0.weight, conv1.1.weight, conv1.1.bias, ...){OTHER}",
    ),
    "a wider network": (
        lambda s: saved(s | {"norm.weight": torch.ones(65)}),
        "FILE: does not fit VisionTransformer, got size mismatch for norm.weight: copying a param with shape"
        f" torch.Size([65]) from checkpoint, the shape in current model is torch.Size([64]).{OTHER}",
    ),
    "codes": (
        lambda s: saved(s | {"norm.weight": torch.ones(64, dtype=torch.int8)}),
        "FILE: norm.weight: needs floating-point numbers, got int8\n  fix: pass the weights before they were quantised",
    ),
    "sparse": (
        lambda s: saved(s | {"norm.weight": torch.ones(64).to_sparse()}),
        "FILE: norm.weight: needs a plain tensor, got a sparse tensor\n  fix: save the weights in fp32 or fp16",
    ),
    "not finite": (
        lambda s: saved(s | {"norm.weight": torch.tensor([1.0] * 60 + [torch.nan, 1.0, -torch.inf, 1.0])}),
        "FILE: norm.weight: must be finite, got nan at [60], 2 of 64 values\n"
        "  fix: the weights are damaged, or of a training that diverged: get them again",
    ),
}


def refusal(file: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_backbone(f"test_vit@{file}", image_size=32)
    return re.sub(r"expected \d+", "expected N", str(refused.value).replace(str(file), "FILE"))


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_taken(
    made: Callable[[State], bytes], message: str, state: State, tmp_path: Path
) -> None:
    (tmp_path / "w.pth").write_bytes(made(state))
    assert refusal(tmp_path / "w.pth") == message


@pytest.mark.parametrize("old", [False, True])
def test_nothing_of_a_file_is_executed(old: bool, state: State, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = saved({"state_dict": state, "extra": Calls(trap)}, _use_new_zipfile_serialization=not old)
    (tmp_path / "w.ckpt").write_bytes(content)

    with contextlib.suppress(InputError):
        load_backbone(f"test_vit@{tmp_path / 'w.ckpt'}", image_size=32)

    assert not trap.exists()
    pickle.loads(pickle.dumps(Calls(trap)))
    assert trap.exists()  # or a trap that never closes would pass


def test_what_runs_programs_is_refused_by_name(state: State, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("true",)

    (tmp_path / "w.pth").write_bytes(saved({"state_dict": state, "extra": Runs()}))
    assert refusal(tmp_path / "w.pth") == (
        f"FILE: needs classes to be read, and is not executed, got {os.name}.system{ALONE}"
    )


def test_a_folder_is_told_which_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "FILE: is a folder\n  fix: pass the file that holds the tensors"
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path) == "FILE: is a folder\n  fix: pass the file: FILE/model.safetensors"


def test_an_own_network_must_be_finite_too() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    module.load_state_dict({"1.bias": torch.full((4,), torch.inf)}, strict=False)
    with pytest.raises(InputError) as refused:
        Backbone.from_module(module, name="own", preprocess=Preprocess(image_size=(8, 8)))
    assert str(refused.value).startswith("own: 1.bias: must be finite, got inf at [0], 4 of 4 values\n")


def test_the_cut_of_a_clipped_layer_may_be_infinite() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    module.register_buffer("most", torch.tensor(torch.inf))
    assert Backbone.from_module(module, name="own", preprocess=Preprocess(image_size=(8, 8))).width == 4


@pytest.mark.parametrize("kind", ["torch", "old", "safetensors"])
def test_cut_and_changed_bytes_are_refused_or_change_values(kind: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2).half()}
    content = (
        safetensors.torch.save(tensors)
        if kind == "safetensors"
        else saved({"model": tensors, "args": argparse.Namespace()}, _use_new_zipfile_serialization=kind == "torch")
    )
    rng = np.random.default_rng(7)
    refused = 0
    for number in range(150):
        changed = bytearray(content[: rng.integers(len(content))] if number % 3 == 0 else content)
        for place in rng.integers(min(len(changed), 700), size=3) if len(changed) else ():
            changed[place] = rng.integers(256)
        (tmp_path / "w.pth").write_bytes(changed)
        try:
            read_state(tmp_path / "w.pth")
        except InputError:
            refused += 1
    assert refused > 50  # any other error would have ended the test
