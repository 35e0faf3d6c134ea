"""``export --input uint8``: models that take pictures, and resize them as Pillow does."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from edgepet.device.artifact import MANIFEST, open_artifact, read_artifact
from edgepet.device.onnxruntime import open_model
from edgepet.device.pixels import FromPixels
from edgepet.errors import InputError
from edgepet.exporters.pixels import taking_pixels
from edgepet.images.pixels import pixels_of, uncropped
from edgepet.images.preprocess import load_pixels, normalize, to_pixels
from edgepet.spec import NpArray, Preprocess
from tests.flow import FORMATS, Tasks, draw_shapes, edgepet, needs_openvino, needs_tensorrt_rtx, refused

SIZES = ((300, 401), (401, 300), (56, 56), (40, 33), (61, 90))
TALL = (1000, 61)  # which Pillow 13 makes lower before it makes it narrower


def preprocess(**changes: Any) -> Preprocess:
    plain: dict[str, Any] = {
        "image_size": (56, 56), "interpolation": "bicubic", "crop_fraction": 0.875, "crop": "center",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "frames": 1, "orientation": "exif",
    }  # fmt: skip
    return Preprocess(**(plain | changes))


def echo(axes: int = 4) -> Any:
    """A model that puts out what it takes."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *[None] * (axes - 1)])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["logits"])], "echo", [images], [logits])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def noise(*shape: int) -> NpArray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


def in_openvino(model: Any, images: NpArray) -> NpArray:
    from edgepet.device.openvino import core

    compiled = core().compile_model(
        core().read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    answer: NpArray = compiled({"images": images})[0]
    return answer


PREPROCESSES = {
    "centre": preprocess(),
    "bilinear": preprocess(interpolation="bilinear", crop_fraction=0.95),
    "wide": preprocess(image_size=(40, 72), crop_fraction=0.9),
    "squash": preprocess(crop="squash", crop_fraction=1.0),
}


# ---------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("name", PREPROCESSES)
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_resizing_inside_is_at_most_one_level_off_pillows(name: str, runtime: str) -> None:
    how = PREPROCESSES[name]
    model = taking_pixels(echo(), how, resize=True, where="a test")

    for size in (*SIZES, TALL):
        picture = noise(*size)
        answer = (
            open_model(model).run(None, {"images": picture[None]})
            if runtime == "onnxruntime"
            else [in_openvino(model, picture[None])]
        )[0]
        levels = np.abs(pixels_of(answer, how)[0].astype(int) - to_pixels(Image.fromarray(picture), how))
        assert levels.shape == (*how.image_size, 3)
        assert levels.max() <= (2 if size == TALL else 1)
        assert size == TALL or (levels > 0).mean() <= 0.02  # most where sums lie between two levels


def test_pictures_of_the_models_size_are_normalised_to_the_bit() -> None:
    how = preprocess()
    model = taking_pixels(echo(), how, where="a test")
    pictures = noise(2, 56, 56)

    (answer,) = open_model(model).run(None, {"images": pictures})

    assert answer.tobytes() == normalize(pictures, how).tobytes()
    (takes,) = model.graph.input
    assert takes.type.tensor_type.elem_type == TensorProto.UINT8
    assert [side.dim_param or side.dim_value for side in takes.type.tensor_type.shape.dim] == ["batch", 56, 56, 3]
    assert {each.key: each.value for each in model.metadata_props} == {"edgepet.input": "uint8"}


def test_clips_keep_their_axis_of_frames_and_are_not_resized() -> None:
    how = preprocess(frames=3)
    clips = noise(2, 3, 56, 56)

    (answer,) = open_model(taking_pixels(echo(5), how, where="a test")).run(None, {"images": clips})

    assert answer.tobytes() == normalize(clips, how).tobytes()
    with pytest.raises(InputError) as told:
        taking_pixels(echo(5), how, resize=True, where="clips")
    assert str(told.value) == "clips: looks at clips, which `resize` is not for\n  fix: leave out `resize`"


@pytest.mark.parametrize("name", PREPROCESSES)
def test_pixels_come_back_from_what_they_were_made(name: str) -> None:
    how = PREPROCESSES[name]
    pixels = noise(2, *how.image_size)

    assert np.array_equal(pixels_of(normalize(pixels, how), how), pixels)
    for whole, part in zip(uncropped(pixels, how), pixels, strict=True):
        assert np.array_equal(to_pixels(Image.fromarray(whole), how), part)


# ----------------------------------------------------------------------------------------------------- what is exported


def exported(tasks: Tasks, folder: Path, *words: object) -> Any:
    said = edgepet("export", tasks.shapes, "--backbone", tasks.spec, "-o", folder, "--input", "uint8", *words, "--json")
    assert said.code == 0, said.err
    return said.json["artifacts"]


@pytest.mark.parametrize("resize", [False, True], ids=["own size", "any size"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_a_model_that_takes_pictures_answers_as_the_pack(
    tasks: Tasks, tmp_path: Path, format_name: str, resize: bool
) -> None:
    (row,) = exported(tasks, tmp_path, "--to", format_name, *(["--resize"] if resize else []))
    folder = Path(row["path"])
    artifact = read_artifact(folder)
    path = sorted((tasks.data / "test").glob("*/*.png"))[0]

    assert folder.name == f"shapes-{format_name}-fp32-uint8" + ("-resize" if resize else "")
    assert (row["verified"], artifact.takes) == (True, "uint8, any size" if resize else "uint8")
    pixels = load_pixels(path, artifact.preprocess)
    plain = edgepet("predict", tasks.shapes, path, "--json").json["results"][0]["tasks"]["shapes"]
    runner = open_artifact(folder, artifact, threads=1)
    assert isinstance(runner, FromPixels)
    raw = np.asarray(Image.open(path).convert("RGB")) if resize else pixels
    ours = runner.runner(raw[None])[0].astype(np.float64)
    score = float(np.exp(ours).max() / np.exp(ours).sum())
    assert artifact.labels[int(ours.argmax())] == plain["label"]
    assert score == pytest.approx(plain["score"], abs=2e-3 if resize else 1e-5)
    said = edgepet("predict", folder, path, "--json").json["results"][0]["tasks"]["shapes"]
    assert said["score"] == pytest.approx(plain["score"], abs=1e-5)
    runner.close()


@pytest.mark.parametrize("words", [(), ("--resize",)], ids=["own size", "any size"])
def test_verify_goes_through_all_of_it(tasks: Tasks, tmp_path: Path, words: tuple[str, ...]) -> None:
    (row,) = exported(tasks, tmp_path, *words)

    said = edgepet(
        "verify", row["path"], "--data", tasks.data, "--pack", tasks.shapes, "--backbone", tasks.spec, "--json"
    )

    assert said.code == 0, said.err
    names = ["files", "probe", *(["resizing"] if words else []), "data"]
    assert [(check["name"], check["ok"]) for check in said.json["checks"]] == [(name, True) for name in names]


def test_a_model_that_resizes_otherwise_is_found_out(tasks: Tasks, tmp_path: Path) -> None:
    (row,) = exported(tasks, tmp_path, "--resize")
    path = Path(row["path"]) / "model.onnx"
    model = onnx.load(str(path))
    half = [node for node in model.graph.node if node.op_type == "Max" and node.name.startswith("edgepet.pixels.")]
    half[0].op_type = "Min"  # filters no wider than a pixel: no antialiasing
    path.write_bytes(model.SerializeToString())
    told = json.loads((Path(row["path"]) / MANIFEST).read_text())

    data = path.read_bytes()
    told["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (Path(row["path"]) / MANIFEST).write_text(json.dumps(told))

    said = edgepet("verify", row["path"], "--json")

    assert said.code == 4
    assert [check["name"] for check in said.json["checks"] if not check["ok"]] == ["resizing"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_take_pictures_too(tasks: Tasks, tmp_path: Path, precision: str) -> None:
    draw_shapes(tmp_path / "more", {"train": 16, "val": 8, "test": 8})

    (row,) = exported(
        tasks, tmp_path / "out", "--precision", precision, "--calib", tmp_path / "more", "--resize"
    )  # fmt: skip

    assert (row["verified"], row["precision"]) == (True, precision)
    assert edgepet("verify", row["path"], "--json").json["ok"]


def test_a_pack_without_its_images_is_compared_on_noise_that_pictures_can_be(tasks: Tasks, tmp_path: Path) -> None:
    shutil.copy(tasks.shapes, tmp_path / "shapes.pet")

    said = edgepet(
        "export",
        tmp_path / "shapes.pet",
        "--backbone",
        tasks.spec,
        "-o",
        tmp_path / "out",
        "--input",
        "uint8",
        "--json",
    )

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    assert (row["verified"], row["parity"]["inputs"], row["parity"]["top1_agreement"]) == (True, "synthetic", 1.0)


@needs_tensorrt_rtx
def test_an_engine_takes_pictures_of_its_size(tasks: Tasks, tmp_path: Path) -> None:
    (row,) = exported(tasks, tmp_path, "--to", "tensorrt", "--sm", "86")

    sidecar = json.loads((Path(row["path"]) / "model.engine.json").read_text())
    assert sidecar["input"] == {"dtype": "uint8", "name": "images", "shape": [-1, 32, 32, 3]}
    assert refused(3, "export", tasks.shapes, "--to", "tensorrt", "--input", "uint8", "--resize", "-o", tmp_path) == (
        "--resize: is not for --to tensorrt, whose engines are built for one size of images\n"
        "  fix: leave out --resize, or tensorrt\n"
    )


def test_resizing_floats_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    assert refused(3, "export", tasks.shapes, "--resize", "-o", tmp_path) == (
        "--resize: is for --input uint8, got --input float32\n"
    )
