"""What packs and exported models say of images: files, folders, patterns; several tasks at once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet import predict, read_pack, write_pack
from edgepet.images.inputs import inputs_of
from edgepet.images.preprocess import load_pixels, normalize
from edgepet.proving.sources import open_source
from tests.flow import Artifacts, Tasks, edgepet, refused
from tests.interpreters import verb


def test_every_task_says_what_it_would_say_alone(tasks: Tasks, artifacts: Artifacts) -> None:
    folder = tasks.data / "test"
    report = predict([tasks.shapes, tasks.tints, artifacts.of("shapes", "onnx")], [str(folder)], top=2)

    images = sorted(folder.rglob("*.png"))
    assert [each.image for each in report.results] == [str(path) for path in images]
    assert list(report.runtimes.items()) == [
        ("shapes.pet", "onnxruntime"), ("tints", "onnxruntime"), ("shapes-onnx-fp32", "onnxruntime"),
    ]  # fmt: skip
    source = open_source(tasks.tints)
    delta = read_pack(tasks.tints).delta
    network = source.open(None, "fp32", None, None).network
    for each, path in zip(report.results, images, strict=True):
        pixels = load_pixels(path, delta.preprocess)
        logits = network(normalize(pixels[None], delta.preprocess))[0]
        said = each.tasks["tints"]
        assert said.label == delta.labels[int(logits.argmax())]
        assert said.score == pytest.approx(float(np.exp(logits).max() / np.exp(logits).sum()), abs=1e-6)
        assert [guess.label for guess in said.top][:1] == [said.label]
        assert said.top[0].score >= said.top[1].score
        assert each.tasks["shapes.pet"].label == each.tasks["shapes-onnx-fp32"].label
    network.close()


def test_it_runs_on_a_device(tasks: Tasks) -> None:
    document = verb("predict", tasks.shapes, tasks.data / "test" / "square" / "0.png")

    (result,) = document["results"]
    assert result["tasks"]["shapes"]["label"] in ("circle", "square", "triangle")
    assert 0 < result["tasks"]["shapes"]["score"] <= 1


def test_the_screen_has_a_line_for_each_image(tasks: Tasks) -> None:
    said = edgepet("predict", tasks.shapes, tasks.tints, tasks.data / "test" / "circle", "--top", 3)

    assert said.code == 0, said.err
    assert "  image" in said.out
    assert "shapes" in said.out
    assert said.out.count("circle/0.png") == 1
    assert "images, on onnxruntime" in said.out


def test_what_is_named_is_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/x.png", "b/deep/y.JPG", "b/.hidden.png", "b/notes.txt", "b/__MACOSX/z.png", "a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG") if not name.endswith("txt") else (tmp_path / name).touch()
    (tmp_path / "b[1].png").touch()

    found = inputs_of([f"{tmp_path}/*.png", str(tmp_path / "b"), str(tmp_path / "a.png"), str(tmp_path / "b[1].png")])

    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "b[1].png", "b/x.png", "b/deep/y.JPG"]
    assert inputs_of([tmp_path / "b"], clips=True) == (tmp_path / "b", tmp_path / "b" / "deep")


def test_what_cannot_be_said_is_refused(tasks: Tasks, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image = tasks.data / "test" / "square" / "0.png"

    assert refused(3, "predict", tasks.shapes) == (
        "predict: needs a model, TASK.pet or an exported folder, and images, got no image\n"
    )
    assert refused(3, "predict", image) == (
        "predict: needs a model, TASK.pet or an exported folder, and images, got no model\n"
    )
    assert refused(3, "predict", tasks.shapes, tmp_path / "empty") == (
        f"{tmp_path / 'empty'}: holds no image\n  fix: name other files\n"
    )
    assert refused(3, "predict", tasks.shapes, f"{tmp_path}/*.png") == (
        f"{tmp_path}/*.png: matches no image\n  fix: name other files\n"
    )
    assert refused(3, "predict", tasks.shapes, tmp_path / "no.png") == (
        f"{tmp_path / 'no.png'}: is not a readable image, got No such file or directory\n"
        "  fix: replace the file or remove it\n"
    )
    assert refused(3, "predict", tasks.shapes, tasks.shapes, image) == (
        f"models: must be different ones, got {tasks.shapes}\n"
    )
    assert refused(3, "predict", tasks.shapes, image, "--top", "0") == "--top: must be at least 1, got 0\n"
    assert json.loads(edgepet("predict", tasks.shapes, image, "--top", "9", "--json").out)["results"]


def test_packs_of_one_backbone_share_what_none_of_them_changes(tasks: Tasks, tmp_path: Path) -> None:
    probe = tmp_path / "probe.pet"
    write_pack(probe, replace(read_pack(tasks.shapes).delta, task="probe", updates=(), probes={}))
    images = [str(path) for path in sorted((tasks.data / "test").glob("*/*.png"))[:2]]

    report = predict([tasks.shapes, tasks.tints, probe], images)
    alone = [predict([pack], images) for pack in (tasks.shapes, tasks.tints, probe)]

    assert [(each.after, each.tasks) for each in report.shared] == [("patch_embed.proj", ("tints", "probe"))]
    assert dict(report.runtimes) == dict.fromkeys(("shapes", "tints", "probe"), "onnxruntime")
    for name, single in zip(("shapes", "tints", "probe"), alone, strict=True):
        for together, by_itself in zip(report.results, single.results, strict=True):
            said, expected = together.tasks[name], by_itself.tasks[name]
            assert said.label == expected.label
            assert said.score == pytest.approx(expected.score, abs=1e-5)


def test_lines_of_stdin_are_answered_as_they_come(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [str(path) for path in sorted((tasks.data / "test").glob("*/*.png"))[:2]]
    lines = [images[0], json.dumps({"image": images[1]}), str(tmp_path / "missing.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))

    done = edgepet("predict", tasks.shapes, tasks.tints, "-", "--top", 2, "--json")

    said = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 3
    assert [each["image"] for each in said] == [*images, lines[2]]
    assert [list(result["tasks"]) for each in said for result in each["results"]] == [["shapes", "tints"]] * 2
    assert said[2]["error"].startswith(f"{tmp_path / 'missing.png'}: ")
    whole = predict([tasks.shapes, tasks.tints], images, top=2)
    for each, result in zip(said, whole.results, strict=False):
        told = each["results"][0]["tasks"]["tints"]
        assert told["top"][0]["score"] == pytest.approx(result.tasks["tints"].top[0].score, abs=1e-6)
