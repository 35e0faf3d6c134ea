"""Image sizes: those that weights are for, those that were asked for, and images that are no squares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from edgepet import Device, ExportOptions, export, read_pack, train
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import open_graph
from edgepet.graphs.int8 import open_int8
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.methods import SSF
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.networks.sites import watch
from edgepet.networks.sizes import at_size
from edgepet.packs.pack import write_pack
from edgepet.proving.subject import Subject
from edgepet.spec import Preprocess
from edgepet.tuning.augmenting import flipped_and_cropped
from edgepet.tuning.recipes import Augmentations
from edgepet.verbs.calibrate import share
from tests.architectures import (
    Network,
    check_merged,
    check_onnx_runtime,
    check_openvino,
    check_steps,
    check_tensorrt_rtx,
)
from tests.flow import draw_shapes, edgepet, needs_openvino, needs_tensorrt_rtx
from tests.tiny import make_delta, random_images, random_pixels, seeded, tiny_vit


def weights_of(architecture: str, file: Path, **settings: Any) -> str:
    """Seeded weights of a timm network in ``file``; returns how a backbone is written."""
    module = seeded(timm.create_model(architecture, pretrained=False, num_classes=0, **settings), 7)
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}  # CoaT has twins in one memory
    safetensors.torch.save_file(saved, file)
    return f"{architecture}@{file}"


def answers(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.module(torch.from_numpy(random_images(1, 2, backbone.preprocess.image_size)))


def tables_of(backbone: Backbone) -> torch.Tensor:
    return torch.from_numpy(np.array(backbone.tensors["pos_embed"]))


# --------------------------------------------------------------------------------------------------- how one is written


@pytest.mark.parametrize(("text", "sides"), [("48", (48, 48)), ("48x48", (48, 48)), ("32x48", (32, 48))])
def test_an_image_size_is_a_number_or_height_and_width(text: str, sides: tuple[int, int], tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors")

    said = edgepet("methods", "--backbone", spec, "--img-size", text, "--json")
    assert said.code == 0, said.err
    backbone = load_backbone(spec, image_size=sides)

    lora = next(row for row in said.json["methods"] if row["name"] == "full")
    assert lora["trainable_params"] == sum(p.numel() for p in backbone.module.parameters())
    assert backbone.create_args["img_size"] == (48 if sides == (48, 48) else sides)


@pytest.mark.parametrize("text", ["wide", "48x", "x48", "48x48x3", "4.8", "48 x 48"])
def test_what_is_no_image_size_is_a_fault_of_usage(text: str) -> None:
    message = f"argument --img-size: needs a number of pixels, or HEIGHTxWIDTH, got {text!r}\n"
    assert edgepet("methods", "--img-size", text).err.endswith(message)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((32, 40), "`image_size`: {} cuts images into patches of 16 pixels, got 32x40\n  fix: use 32 or 32x48"),
        ((8, 40), "`image_size`: {} cuts images into patches of 16 pixels, got 8x40\n  fix: use 16x32 or 32x48"),
        ((32, 0), "`image_size`: must be at least 1, got 32x0"),
        ((32, 9000), "`image_size`: must be at most 8192, got 32x9000"),
        ((32,), "`image_size`: is the side of a square in pixels, or a height and a width, got (32,)"),
        (32.5, "`image_size`: is the side of a square in pixels, or a height and a width, got 32.5"),
        ((32, 3.5), "`image_size`: is the side of a square in pixels, or a height and a width, got (32, 3.5)"),
    ],
)
def test_a_wrong_image_size(size: Any, message: str, tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors")

    with pytest.raises(InputError) as error:
        load_backbone(spec, image_size=size)

    assert str(error.value) == message.format(spec)


# -------------------------------------------------------------------------------------------- what the weights are for


@pytest.mark.parametrize("architecture", ["test_vit", "test_coatnet"])  # a table of places, tables of distances
def test_weights_tuned_at_another_size_are_taken_as_they_are(architecture: str, tmp_path: Path) -> None:
    spec = weights_of(architecture, tmp_path / "w.safetensors", img_size=96)  # its own size is 160
    saved = safetensors.torch.load_file(tmp_path / "w.safetensors")

    backbone, asked, larger = (load_backbone(spec, image_size=size) for size in (None, 96, 128))

    assert (backbone.preprocess.image_size, asked.preprocess.image_size) == ((96, 96), (96, 96))
    for made in (backbone.tensors, asked.tensors, backbone.native, larger.native):
        assert all(np.array_equal(made[name], tensor.numpy()) for name, tensor in saved.items())
    assert backbone.fingerprint == larger.fingerprint
    assert larger.preprocess.image_size == (128, 128)
    assert any(larger.tensors[name].shape != tensor.shape for name, tensor in saved.items())


def test_a_table_goes_from_its_own_size_to_the_one_that_was_asked_for_in_one_step(tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors", img_size=96)
    saved = safetensors.torch.load_file(tmp_path / "w.safetensors")["pos_embed"]

    backbone = load_backbone(spec, image_size=(48, 80))

    expected = resample_abs_pos_embed(saved, new_size=[3, 5], old_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(tables_of(backbone), expected)


def test_weights_tuned_on_images_that_are_no_squares_are_taken_as_they_are(tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors", img_size=(32, 80))
    saved = safetensors.torch.load_file(tmp_path / "w.safetensors")["pos_embed"]

    assert torch.equal(tables_of(load_backbone(spec, image_size=(32, 80))), saved)
    with pytest.raises(InputError) as error:
        load_backbone(spec, image_size=64)
    assert str(error.value).startswith(f"{tmp_path}/w.safetensors: cannot be read as VisionTransformer, got ")
    assert str(error.value).endswith(
        "\n  fix: pass the architecture that the file is of,"
        " and `image_size=HEIGHTxWIDTH` where it was tuned at another image size"
    )


def test_a_square_table_of_as_many_places_as_a_strip_has_is_resampled_all_the_same(tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "w.safetensors")["pos_embed"]

    strip = load_backbone(spec, image_size=(80, 320))  # 5 x 20 places out of 10 x 10

    expected = resample_abs_pos_embed(saved, new_size=[5, 20], old_size=[10, 10], num_prefix_tokens=1)
    assert torch.equal(tables_of(strip), expected)
    assert not torch.equal(tables_of(strip), saved)


def test_a_pack_of_before_is_bound_to_tables_of_the_architectures_own_size(tmp_path: Path) -> None:
    spec = weights_of("test_vit", tmp_path / "w.safetensors", img_size=96)
    before = load_backbone(spec, image_size=96, checkpoint_size=False)
    delta = make_delta(
        backbone="test_vit", fingerprint=before.fingerprint, width=64, preprocess=Preprocess(image_size=(96, 96))
    )
    write_pack(tmp_path / "a.pet", delta)

    found = Subject(tmp_path / "a.pet", spec, None).backbone

    assert found.fingerprint == before.fingerprint != load_backbone(spec, image_size=96).fingerprint
    assert np.array_equal(found.tensors["pos_embed"], before.tensors["pos_embed"])


# ------------------------------------------------------------------------------------------ what takes a size otherwise

# What timm builds for a size without a patch_size of two numbers, without a table, or with tables of distances.
TAKE_A_SIZE = ["xcit_nano_12_p8_224", "efficientvit_m0"]
TAKE_A_SIZE_TOO = [
    "beit_base_patch16_224", "coat_tiny", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "hiera_tiny_224",
    "maxvit_rmlp_pico_rw_256", "sequencer2d_s", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "test_vit_relpos", "tnt_s_legacy_patch16_224",
    "twins_svt_small", "vit_tiny_r_s16_p8_224", "vitamin_small_224",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # torch's, of how timm resamples tables of distances
@pytest.mark.parametrize(
    "architecture", [*TAKE_A_SIZE, *(pytest.param(name, marks=pytest.mark.slow) for name in TAKE_A_SIZE_TOO)]
)
@pytest.mark.parametrize("square", [True, False], ids=["square", "wide"])
def test_a_network_that_timm_builds_for_a_size_answers_as_timm_builds_it(
    architecture: str, square: bool, tmp_path: Path
) -> None:
    unit = 224 if "patch14" in architecture else 64
    spec, sides = weights_of(architecture, tmp_path / "w.safetensors"), (unit * 2, unit * 2 if square else unit * 3)
    if architecture == "hiera_tiny_224":
        with pytest.raises(InputError, match="which timm resamples to no other size"):
            load_backbone(spec, image_size=sides)
        return
    backbone = load_backbone(spec, image_size=sides)

    timms = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=sides)
    filtered = timm.models._builder.load_state_dict(str(tmp_path / "w.safetensors"), weights_only=True)
    prepare = getattr(__import__(type(timms).__module__, fromlist=["x"]), "checkpoint_filter_fn", None)
    timms.load_state_dict(prepare(filtered, timms) if prepare else filtered, strict=True)
    with torch.no_grad():
        expected = timms.eval()(torch.from_numpy(random_images(1, 2, sides)))
    assert (answers(backbone) - expected).abs().max() <= 1e-5 * expected.abs().max()  # sums of other alignments


def test_a_network_whose_tables_timm_leaves_is_refused_and_no_file_is_blamed(tmp_path: Path) -> None:
    spec = weights_of("efficientformerv2_s0", tmp_path / "w.safetensors")

    with pytest.raises(InputError) as error:
        load_backbone(spec, image_size=(128, 192))

    assert str(error.value) == (
        "`image_size`: efficientformerv2_s0 has weights for images of 224 pixels, which timm resamples to no other"
        " size, got size mismatch for stages.2.blocks.4.token_mixer.attention_biases: copying a param with shape"
        " torch.Size([8, 49]) from checkpoint, the shape in current model is torch.Size([8, 24]).\n"
        "  fix: leave it out, or give weights that were tuned at 128x192 pixels"
    )


def test_weights_of_such_a_network_that_were_tuned_at_another_size_are_used_there(tmp_path: Path) -> None:
    spec = weights_of("efficientformerv2_s0", tmp_path / "w.safetensors", img_size=(128, 192))

    backbone = load_backbone(spec, image_size=(128, 192))

    saved = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert all(np.array_equal(backbone.tensors[name], tensor.numpy()) for name, tensor in saved.items())
    assert answers(backbone).shape == (2, 176)


class Bare(nn.Module):
    """A network of one size, whose tables timm does not resample; ``takes`` says which images it answers."""

    def __init__(self, takes: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.pretrained_cfg, self.takes = {"fixed_input_size": True}, takes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.takes(images):
            raise RuntimeError("no such images")
        return images.mean((2, 3))


def not_loaded(module: nn.Module) -> None:
    raise InputError("w.safetensors", "does not fit Bare", got="another table")


def test_a_network_that_answers_images_of_other_sizes_by_itself_is_left_as_it_is() -> None:
    native = Bare(lambda images: images.shape[-2:] == (32, 64))

    made = at_size(lambda arguments: Bare(bool), native, (48, 48), (32, 64), {"global_pool": "avg"}, not_loaded)

    assert made == (native, {"global_pool": "avg", "img_size": 48})


def test_a_network_that_cannot_be_built_for_a_size_is_refused_with_its_own_words() -> None:
    def build(arguments: Mapping[str, object]) -> nn.Module:
        raise AssertionError("Model only handles square inputs")

    with pytest.raises(InputError) as error:
        at_size(build, Bare(bool), (48, 48), (32, 64), {}, not_loaded)

    assert str(error.value) == (
        "`image_size`: Bare cannot be built for images of 32x64 pixels, got Model only handles square inputs\n"
        "  fix: use another image size"
    )


# ------------------------------------------------------------------------------------------------- what is not a square


def wide_swin() -> nn.Module:
    return SwinTransformer(
        img_size=(32, 64), patch_size=2, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 4), num_classes=0
    )


FORMATS = ("onnx", "openvino", "tensorrt")
WIDE = {"test_vit": (32, 64), "swin": (32, 64), "test_convnext": (32, 96)}


@pytest.fixture(scope="module", params=[*list(WIDE)[:2], pytest.param("test_convnext", marks=pytest.mark.slow)])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    name: str = request.param
    size, folder = WIDE[name], tmp_path_factory.mktemp(name)
    if name == "swin":
        preprocess = Preprocess(image_size=size)
        backbone = Backbone.from_module(seeded(wide_swin(), 7), name=name, preprocess=preprocess)
    else:
        backbone = tiny_vit(folder, seed=7, architecture=name, image_size=size)
    return Network(backbone, base_graph(backbone, root=folder), random_images(4, 3, size))


def test_a_wide_network_is_merged_and_answers_as_the_tuned_one(wide: Network) -> None:
    check_merged(SSF(), wide)
    check_onnx_runtime(SSF(), wide)


@needs_openvino
def test_a_wide_network_answers_in_openvino_as_the_tuned_one(wide: Network) -> None:
    check_openvino(SSF(), wide)


@pytest.mark.slow
@needs_tensorrt_rtx
def test_a_wide_network_is_built_by_tensorrt_rtx(wide: Network, tmp_path: Path) -> None:
    check_tensorrt_rtx(wide, tmp_path)


@pytest.mark.slow
def test_a_wide_network_is_tuned(wide: Network) -> None:
    check_steps(SSF(), wide)


def test_the_files_of_a_wide_graph_are_named_by_height_and_width(wide: Network) -> None:
    height, width = wide.images.shape[-2:]

    assert wide.graph.model_path.name == f"graph-{height}x{width}.onnx"
    assert wide.graph.preprocess.image_size == (height, width)


def test_patches_of_a_wide_image_form_a_wide_grid() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.cut(images).flatten(2).mT
            for block in self.blocks:
                tokens = block(tokens)
            return tokens.mean(1)

    for sides, grid in (((8, 24), (2, 6)), ((24, 8), (6, 2)), ((16, 16), (4, 4))):
        assert [block.grid for block in watch(Tokens().eval(), torch.zeros(2, 3, *sides)).blocks] == [grid, grid]


def test_a_wide_image_is_moved_by_up_to_an_eighth_of_each_side() -> None:
    pixels = random_pixels(3, 1, (8, 160))
    preprocess = Preprocess(image_size=(8, 160))
    torch.manual_seed(0)

    many = torch.from_numpy(np.repeat(pixels, 64, 0))
    moved = flipped_and_cropped(many, preprocess, Augmentations(crop=True)).numpy()

    plain, found = normalize(pixels, preprocess)[0], set()
    padded = np.pad(plain, ((0, 0), (1, 1), (20, 20)), mode="reflect")
    for image in moved:
        found |= {
            (y, x) for y in range(3) for x in range(41) if np.array_equal(image, padded[:, y : y + 8, x : x + 160])
        }
    assert {y for y, _ in found} == {0, 1, 2}
    assert len({x for _, x in found}) > 20


@pytest.mark.slow
@needs_openvino
@needs_tensorrt_rtx
def test_a_wide_task_goes_into_every_format_in_float_and_int8_and_onto_a_device(wide: Network, tmp_path: Path) -> None:
    data, pack, shared = tmp_path / "data", tmp_path / "t.pet", tmp_path / "t8.pet"
    draw_shapes(data, {"train": 16, "val": 4})
    train(data, wide.backbone, "ssf", pack, epochs=1, precision="fp32")

    for options in (ExportOptions(to=FORMATS), ExportOptions(to=FORMATS, precision="int8", calib=data)):
        rows = export([pack], tmp_path / "out", backbone=wide.backbone, options=options).artifacts
        assert [(row.format, row.precision) for row in rows] == [(name, options.precision) for name in FORMATS]
        assert all(row.verified for row in rows if row.format != "tensorrt")  # which needs a GPU
    share(pack, data, shared, backbone=wide.backbone)

    delta, store = read_pack(shared).delta, Store(tmp_path / "device")
    store.add_graph(open_graph(delta.fingerprint, delta.preprocess))
    store.add_int8(open_int8(delta.fingerprint, delta.preprocess))
    device = Device(store.root)
    device.install(shared)
    images = sorted((data / "val").rglob("*.png"))
    pixels = normalize(np.stack([load_pixels(path, delta.preprocess) for path in images]), delta.preprocess)
    expected = Subject(pack, wide.backbone, None).merged(pixels).argmax(1)
    for runtime in ("onnxruntime", "openvino"):
        for precision in ("fp32", "int8"):
            found = device.run("t", images, runtime=runtime, precision=precision).results
            assert [answer.label for answer in found] == [delta.labels[best] for best in expected], (runtime, precision)


def test_a_wide_task_is_trained_exported_and_merged(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "data", {"train": 4, "val": 2})
    spec, pack = weights_of("test_vit", tmp_path / "w.safetensors"), tmp_path / "t.pet"
    words = ["--img-size", "32x48", "--method", "ssf", "--epochs", 1, "--train-precision", "fp32"]

    for command in (
        ["train", tmp_path / "data", "--backbone", spec, *words, "-o", pack],
        ["export", pack, "--to", "onnx", "-o", tmp_path / "out"],
        ["merge", pack, "-o", tmp_path / "m.safetensors"],
    ):
        said = edgepet(*command, "--json")
        assert said.code == 0, said.err

    assert said.json["create_args"] == {"img_size": [32, 48], "dynamic_img_size": False}
    network = timm.create_model("test_vit", num_classes=3, **said.json["create_args"])
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"), strict=True)
    assert network.patch_embed.grid_size == (2, 3)
