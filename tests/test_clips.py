"""Clips through an image backbone: frames are read, averaged over, trained on, exported; ST-Adapter mixes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from edgepet.deltas.delta import Score
from edgepet.deltas.merge import task_tensors
from edgepet.device.runtime import open_task
from edgepet.device.serving import Device
from edgepet.device.store import Store
from edgepet.errors import InputError, PackError
from edgepet.exporters.onnx import build_model, serialize
from edgepet.exporters.tensorrt import build_engines
from edgepet.exporters.trace import base_graph
from edgepet.images.preprocess import load_clip, load_pixels
from edgepet.images.sets import open_split
from edgepet.methods import SSF, Method, STAdapter
from edgepet.methods.method import count
from edgepet.networks.backbone import Backbone
from edgepet.networks.loading import load_backbone
from edgepet.packs.pack import encode_pack, read_pack
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.augmenting import flipped_and_cropped
from edgepet.tuning.model import TunedModel, algebra_error, extract, logits_of
from edgepet.tuning.recipes import Augmentations
from tests.flow import edgepet, has_openvino, needs_tensorrt_rtx, refused
from tests.methods import stored_branches
from tests.tiny import perturb, sites_of, tiny_vit

FRAMES = 4
CLASSES = ("down", "left", "right", "up")  # where a square goes: one frame alone does not tell
STEP = {"down": (0, 5), "left": (-5, 0), "right": (5, 0), "up": (0, -5)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/ of six frames each: a bright square that moves over noise."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(6)
    for split, n in (("train", 24), ("val", 8), ("test", 8)):
        for name in CLASSES:
            for number in range(n):
                clip = folder / split / name / f"clip{number:02}"
                clip.mkdir(parents=True)
                x, y = rng.integers(8, 24, 2)
                for frame in range(6):
                    image = Image.fromarray(rng.integers(0, 90, (32, 32, 3), dtype=np.uint8))
                    dx, dy = (side * (frame - 2) for side in STEP[name])
                    ImageDraw.Draw(image).rectangle((x + dx - 3, y + dy - 3, x + dx + 3, y + dy + 3), fill="white")
                    image.save(clip / f"{frame:02}.png")
    return folder


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_vit(tmp_path_factory.mktemp("still"), seed=7)


@pytest.fixture(scope="module")
def backbone(still: Backbone) -> Backbone:
    """The network of ``still``, taking clips."""
    return load_backbone(still.spec, image_size=32, frames=FRAMES)


def random_clips(n: int) -> NpArray:
    return np.random.default_rng(4).standard_normal((n, FRAMES, 3, 32, 32), dtype=np.float32)


def tuned_on(backbone: Backbone, method: Method) -> TunedModel:
    return perturb(TunedModel(backbone, method, 4, seed=1), seed=3, by=0.1)


# ----------------------------------------------------------------------------------------------------------- the data


def test_frames_are_taken_from_the_middle_of_equal_parts(clips: Path) -> None:
    folder, preprocess = clips / "train" / "up" / "clip00", Preprocess(image_size=(32, 32), frames=FRAMES)

    pixels = load_clip(folder, preprocess)

    chosen = [load_pixels(folder / f"{number:02}.png", preprocess) for number in (0, 2, 3, 5)]
    assert np.array_equal(pixels, np.stack(chosen))
    longer = load_clip(folder, Preprocess(image_size=(32, 32), frames=12))
    assert np.array_equal(longer[::2], longer[1::2])  # a short clip repeats its frames


def test_a_set_of_clips_is_split_as_images_are(clips: Path) -> None:
    held = open_split(clips / "train", "val", clips=True, val_fraction=0.25)
    rest = open_split(clips / "train", "train", clips=True, val_fraction=0.25)

    assert (held.classes, len(held), len(rest)) == (CLASSES, 4 * 6, 4 * 18)
    assert all(path.is_dir() for path in held.paths)
    assert not set(held.paths) & set(rest.paths)


def test_images_where_clips_should_be_are_refused(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        load_clip(tmp_path / "empty", Preprocess(image_size=(32, 32), frames=2))
    with pytest.raises(InputError, match="is not a readable folder of frames"):
        load_clip(tmp_path / "none", Preprocess(image_size=(32, 32), frames=2))
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    with pytest.raises(InputError) as told:
        open_split(tmp_path / "images", "train", clips=True)
    assert str(told.value) == (
        f"{tmp_path / 'images' / 'a'}: holds no folder of frames\n"
        "  fix: put every clip's frames into a folder of its own, or leave out `frames`"
    )


def test_frames_of_a_clip_are_flipped_and_cropped_together() -> None:
    still = np.random.default_rng(1).integers(0, 255, (16, 1, 32, 32, 3), dtype=np.uint8)
    clips = torch.from_numpy(np.repeat(still, FRAMES, axis=1))
    preprocess = Preprocess(image_size=(32, 32), frames=FRAMES)
    torch.manual_seed(0)

    images = flipped_and_cropped(clips, preprocess, Augmentations(flip=True, crop=True))

    assert images.shape == (16, FRAMES, 3, 32, 32)
    assert torch.equal(images, images[:, :1].expand_as(images))
    assert not torch.equal(images, flipped_and_cropped(clips, preprocess, Augmentations()))


# -------------------------------------------------------------------------------------------------------- the network


def test_features_of_a_clip_are_the_mean_over_its_frames(still: Backbone, backbone: Backbone) -> None:
    images = torch.from_numpy(random_clips(2))

    with torch.no_grad():
        one_by_one = torch.stack([still.module(clip).mean(0) for clip in images])
        assert torch.allclose(backbone.module(images), one_by_one, atol=1e-6)
    assert backbone.fingerprint == still.fingerprint
    assert [site for site in backbone.layers if site.kind != "block"] == [s for s in still.layers if s.kind != "block"]


def block_by_hand(x: Tensor, block: torch.nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """ST-Adapter as its paper has it, with torch's convolution of three axes, in front of a frozen block.

    ``x`` is (clips * frames, 1 + H * W, d).
    """
    hidden = functional.linear(x[:, 1:], tensors["down.weight"], tensors["down.bias"])
    n, tokens, width = hidden.shape
    side = int(tokens**0.5)
    volume = hidden.reshape(n // FRAMES, FRAMES, side, side, width).permute(0, 4, 1, 2, 3)
    kernel = tensors["conv.weight"].reshape(width, 1, 3, 1, 1)
    volume = functional.conv3d(volume, kernel, tensors["conv.bias"], padding=(1, 0, 0), groups=width)
    hidden = volume.permute(0, 2, 3, 4, 1).reshape(n, tokens, width)
    patches = x[:, 1:] + functional.linear(hidden, tensors["up.weight"], tensors["up.bias"])
    with torch.no_grad():
        return block(torch.cat([x[:, :1], patches], dim=1))


def test_st_adapter_is_a_convolution_over_frames_on_the_patches(backbone: Backbone) -> None:
    model = tuned_on(backbone, STAdapter(rank=8)).double()
    images = torch.from_numpy(random_clips(2)).double()

    with torch.no_grad():
        got = model.features(images)
        network, tuned = backbone.module, model.tuned()
        x = network._pos_embed(network.patch_embed(images.flatten(0, 1)))
        for number, block in enumerate(network.blocks):
            x = block_by_hand(x, block, tuned[f"blocks.{number}"])
        expected = network.forward_head(network.norm(x)).unflatten(0, (2, FRAMES)).mean(1)
    model.float()

    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_the_order_of_frames_counts_with_st_adapter_and_not_without(backbone: Backbone) -> None:
    images = random_clips(2)
    for method, mixes in ((STAdapter(rank=8), True), (SSF(), False)):
        model = tuned_on(backbone, method)
        there, back = logits_of(model, images), logits_of(model, images[:, ::-1].copy())
        assert bool(np.abs(there - back).max() > 1e-3 * np.abs(there).max()) is mixes


def test_it_starts_as_the_identity_with_a_convolution_of_zeros(backbone: Backbone) -> None:
    method = STAdapter()
    (first, *_), images = method.sites(backbone.layers), random_clips(2)
    start = method.start([first], {}, np.random.default_rng(0))[first.name]

    assert not start["conv.weight"].any()
    assert not any(start[name].any() for name in start if name.endswith("bias"))
    assert np.abs(start["down.weight"]).max() <= first.in_features**-0.5
    assert abs(start["down.weight"].std() - (first.in_features * 3) ** -0.5) < 1e-3
    with torch.no_grad():
        features = TunedModel(backbone, method, 2).features(torch.from_numpy(images))
        assert torch.allclose(features, backbone.module(torch.from_numpy(images)), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "values"), [("vit_small_patch14_dinov2", 3_566_592), ("vit_base_patch16_224", 7_110_144)]
)
def test_it_trains_as_many_values_as_its_paper_says(architecture: str, values: int) -> None:
    layers = sites_of(architecture)
    assert count(STAdapter(), layers, {}) == stored_branches(STAdapter(), layers) == values


# ------------------------------------------------------------------------------------------------ packs and runtimes


@pytest.mark.parametrize(
    "method", [STAdapter(rank=8), pytest.param(SSF(), marks=pytest.mark.slow)], ids=["st-adapter", "ssf"]
)
def test_every_runtime_answers_as_the_tuned_network(backbone: Backbone, method: Method, tmp_path: Path) -> None:
    model, images = tuned_on(backbone, method), random_clips(3)
    delta = extract(model, backbone, task="moves", labels=CLASSES, val=Score(top1=1.0, n=1))
    error, largest = algebra_error(model, backbone, images)
    assert error <= 1e-9 * largest

    graph, read = base_graph(backbone, delta.branches, root=tmp_path), read_pack(encode_pack(delta, codec="fp32")).delta
    assert graph.stem.startswith(f"graph-32-frames{FRAMES}")
    assert (read.preprocess.frames, read.structure) == (FRAMES, delta.structure)
    expected = logits_of(model, images)
    for runtime in ("onnxruntime", "openvino") if has_openvino else ("onnxruntime",):
        with open_task(graph, read, runtime=runtime) as network:
            assert np.abs(network(images) - expected).max() <= 1e-4 * np.abs(expected).max()
            with pytest.raises(InputError, match="takes float32 images"):
                network(images[:, 0])


@needs_tensorrt_rtx
@pytest.mark.slow
def test_tensorrt_rtx_builds_it(backbone: Backbone, tmp_path: Path) -> None:
    delta = extract(tuned_on(backbone, STAdapter(rank=8)), backbone, task="moves", labels=CLASSES,
                    val=Score(top1=1.0, n=1))  # fmt: skip
    graph = base_graph(backbone, delta.branches, root=tmp_path)

    made = build_engines(serialize(build_model(graph, task_tensors(graph.base, delta), delta)), tmp_path)

    assert made.engine == "tensorrt-rtx"


def test_frames_are_no_part_of_an_images_pack_and_at_least_two() -> None:
    assert "frames" not in Preprocess(image_size=(32, 32)).as_json()
    with pytest.raises(InputError, match="must be at least 1"):
        load_backbone("test_vit", frames=0)
    from edgepet.spec import read_preprocess
    from edgepet.strict import ObjectReader

    written = Preprocess(image_size=(32, 32), frames=2).as_json()
    assert read_preprocess(ObjectReader(written, "here")).frames == 2
    with pytest.raises(PackError, match="needs an integer of at least 2"):
        read_preprocess(ObjectReader(written | {"frames": 1}, "here"))


# ----------------------------------------------------------------------------------------------------- the whole flow


@pytest.fixture(scope="module")
def moves(clips: Path, still: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack = tmp_path_factory.mktemp("moves") / "moves.pet"
    said = edgepet(
        "train", clips, "--backbone", still.spec, "--img-size", 32, "--frames", FRAMES, "--method", "st-adapter",
        "--set", "rank=32", "--epochs", 30, "--lr", 0.01, "--batch-size", 16, "--train-precision", "fp32", "-o", pack,
        "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.json["val"]["n"] == 32
    return pack


@pytest.mark.slow
def test_it_learns_what_no_single_frame_shows(moves: Path, clips: Path, still: Backbone, tmp_path: Path) -> None:
    probe = tmp_path / "probe.pet"
    said = edgepet(
        "train", clips, "--backbone", still.spec, "--img-size", 32, "--frames", FRAMES, "--method", "linear-probe",
        "--train-precision", "fp32", "-o", probe,
    )  # fmt: skip
    assert said.code == 0, said.err

    tuned, frozen = (edgepet("eval", pack, clips, "--json").json for pack in (moves, probe))

    assert tuned["n"] == frozen["n"] == 32
    assert tuned["top1"] >= frozen["top1"] + 0.2  # the frozen network averages frames: it sees a square somewhere


def test_it_is_exported_and_verified_against_the_tuned_network(moves: Path, clips: Path, tmp_path: Path) -> None:
    formats = "onnx,openvino" if has_openvino else "onnx"

    said = edgepet("export", moves, "--to", formats, "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    for artifact in said.json["artifacts"]:
        assert (artifact["verified"], artifact["parity"]["against"], artifact["parity"]["inputs"]) == (
            True, "tuned", "work",
        )  # fmt: skip
        assert edgepet("verify", artifact["path"]).code == 0
        top1 = edgepet("eval", artifact["path"], clips, "--json").json["top1"]
        assert top1 == pytest.approx(edgepet("eval", moves, clips, "--json").json["top1"], abs=1 / 32)


def test_a_clip_is_classified_on_the_device(moves: Path, clips: Path, tmp_path: Path) -> None:
    from edgepet.proving.subject import Subject

    store, device = Store(tmp_path / "device"), Device(tmp_path / "device")
    store.add_graph(Subject(moves, None, None).graph)
    device.install(moves)

    for runtime in ("onnxruntime", "openvino") if has_openvino else ("onnxruntime",):
        run = device.run("moves", [clips / "test" / "up" / "clip00"], runtime=runtime)
        assert run.results[0].label in CLASSES
    assert edgepet("bench", moves, "--rounds", 2, "--runtime", "onnxruntime").code == 0
    assert edgepet("storage", "--store", tmp_path / "device", "--json").json["tasks"][0]["method"] == "st-adapter"


def test_it_refuses_images(still: Backbone, tasks_data: Path, tmp_path: Path) -> None:
    said = refused(
        3, "train", tasks_data, "--backbone", still.spec, "--method", "st-adapter", "-o", tmp_path / "t.pet"
    )  # fmt: skip

    assert said == (
        "--method st-adapter: needs clips of at least 2 frames, got images\n"
        "  fix: train on a folder of clips with --frames 8\n"
    )


@pytest.fixture
def tasks_data(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 40), (80 * number, 0, 0)).save(folder / f"{number}.png")
    return tmp_path / "images"
