"""``merge``, ``export`` and ``verify``: what they write answers as the tuned network did, or nothing is written."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from edgepet import read_pack, write_pack
from edgepet.deltas.delta import Score
from edgepet.device.artifact import MANIFEST, open_artifact, read_artifact, write_artifact
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.tensorrt import gpu_problem
from edgepet.exporters import trace
from edgepet.files import cache_folder
from edgepet.graphs.base import BaseGraph
from edgepet.methods import configure
from edgepet.networks.loading import load_backbone
from edgepet.proving import precision
from edgepet.proving.in_torch import tuned_network
from edgepet.proving.subject import Subject
from edgepet.spec import NpArray
from edgepet.tuning.model import TunedModel, extract, logits_of
from edgepet.verbs import merge as merging
from tests.flow import CLASSES, FORMATS, Artifacts, Tasks, edgepet, refused, train_arguments
from tests.tiny import perturb, tiny_vit

HELD_OUT = 12  # all images of val/: fewer than a work folder may hold


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below ``folder``, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def no_trace(*_: object, **__: object) -> None:
    message = "a second trace"
    raise RuntimeError(message)


def alone(pack: Path, folder: Path) -> Path:
    """A copy of ``pack`` without the work folder beside it, as a device or a colleague gets it."""
    return Path(shutil.copy(pack, folder))


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def merged_limit(tasks: Tasks) -> float:
    """1e-4 of the largest logit: what rounding in another runtime's fp32 may cost."""
    return 1e-4 * float(np.abs(Subject(tasks.shapes, tasks.spec, None).merged_reference).max())


# Export


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("task", ["shapes", "tints"])
def test_an_artefact_was_compared_with_the_tuned_network(
    artifacts: Artifacts, tasks: Tasks, task: str, format_name: str
) -> None:
    row = artifacts.row(task, format_name)
    subject = Subject(tasks.folder / f"{task}.pet", tasks.spec, None)
    tuned = logits_of(tuned_network(subject), subject.images[0])

    assert (row["verified"], row["reason"]) == (True, None)
    assert row["parity"] == {
        "max_abs": row["parity"]["max_abs"],
        "limit": pytest.approx(2e-2 * np.abs(tuned).max(), rel=1e-6),  # fp16's, as the pack is stored
        "top1_agreement": 1.0,
        "least_agreement": 0.99,
        "n": HELD_OUT,
        "inputs": "work",
        "against": "tuned",
        "near_ties": 0,
    }
    assert 0 < row["parity"]["max_abs"] <= row["parity"]["limit"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_artefact_answers_as_the_merged_network_and_not_as_the_backbone(
    artifacts: Artifacts, tasks: Tasks, format_name: str
) -> None:
    subject = Subject(tasks.shapes, tasks.spec, None)
    folder = artifacts.of("shapes", format_name)
    images = subject.images[0]
    plain = subject.delta.head(subject.backbone.module(torch.from_numpy(images)).numpy())
    runner = open_artifact(folder, read_artifact(folder))

    got = runner(images)
    runner.close()

    assert np.abs(got - plain).max() > 1e-2  # or an export that forgets the delta would pass
    assert np.abs(got - subject.merged_reference).max() <= merged_limit(tasks)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_manifest_comes_back_as_it_was_written(artifacts: Artifacts, tmp_path: Path, format_name: str) -> None:
    folder = artifacts.of("shapes", format_name)

    write_artifact(tmp_path, read_artifact(folder))

    assert (tmp_path / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_manifest_names_the_pack_the_backbone_and_every_file(
    artifacts: Artifacts, tasks: Tasks, format_name: str
) -> None:
    folder = artifacts.of("tints", format_name)
    artifact, pack = read_artifact(folder), read_pack(tasks.tints)

    assert (artifact.task, artifact.method, artifact.labels) == ("tints", "lora", CLASSES)
    assert (artifact.fingerprint, artifact.pack_sha256, artifact.codec) == (
        pack.delta.fingerprint, pack.sha256, "fp16",
    )  # fmt: skip
    assert artifact.preprocess == pack.delta.preprocess
    assert {name: digest for name, (digest, _) in artifact.files.items()} == {
        name: digest for name, digest in digests(folder).items() if name != MANIFEST
    }


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_same_pack_gives_the_same_bytes(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path, format_name: str
) -> None:
    said = edgepet("export", tasks.tints, tasks.shapes, "--to", format_name, "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    for task in ("shapes", "tints"):
        assert digests(tmp_path / f"{task}-{format_name}-fp32") == digests(artifacts.of(task, format_name))


def test_weights_in_a_file_of_their_own_answer_the_same(artifacts: Artifacts, tasks: Tasks, tmp_path: Path) -> None:
    said = edgepet("export", tasks.shapes, "--external-data", "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    folder = tmp_path / "shapes-onnx-fp32"
    images = Subject(tasks.shapes, None, None).images[0]
    single = artifacts.of("shapes", "onnx")
    with OnnxRuntime.of_model(folder / "model.onnx") as apart, OnnxRuntime.of_model(single / "model.onnx") as whole:
        assert apart(images).tobytes() == whole(images).tobytes()
    assert sorted(digests(folder)) == ["artifact.json", "model.onnx", "model.onnx.data"]
    assert edgepet("verify", folder).code == 0


def test_a_simplified_model_is_smaller_in_nodes_and_equal_in_answers(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path
) -> None:
    pytest.importorskip("onnxsim", reason="needs the package onnxsim")
    onnx = pytest.importorskip("onnx", reason="needs the package onnx")

    said = edgepet("export", tasks.shapes, "--simplify", "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    plain, simple = (
        onnx.load(str(folder / "model.onnx")) for folder in (artifacts.of("shapes", "onnx"), Path(row["path"]))
    )
    assert len(simple.graph.node) < len(plain.graph.node)
    assert row["verified"]
    assert row["parity"]["max_abs"] <= artifacts.row("shapes", "onnx")["parity"]["max_abs"] + merged_limit(tasks)


def test_the_second_task_is_folded_and_written_within_a_second_and_without_a_trace(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx.export", no_trace)

    said = edgepet("export", tasks.tints, "-o", tmp_path, "--json")

    assert said.code == 0, said.err
    assert said.json["artifacts"][0]["seconds"] <= 1.0  # measured 0.05 s: the rest is for a busy machine
    assert artifacts.row("tints", "onnx")["seconds"] <= 1.0


def test_a_trace_is_found_again_by_what_the_weights_are_and_not_by_their_file(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(tasks.spec.partition("@")[2])
    copy = shutil.copy(file, tmp_path / "renamed.safetensors")
    monkeypatch.setattr("torch.onnx.export", no_trace)

    again = trace.base_graph(load_backbone(f"test_vit@{copy}", image_size=32))

    assert again.folder == cache_folder() / "backbones" / read_pack(tasks.shapes).delta.fingerprint[7:23]


def test_a_damaged_trace_is_made_again(artifacts: Artifacts, tasks: Tasks, tmp_path: Path) -> None:
    backbone = load_backbone(tasks.spec, image_size=32)
    made = trace.base_graph(backbone, root=tmp_path)
    whole = digests(made.folder)
    flip_byte(made.model_path, 100)

    assert digests(trace.base_graph(backbone, root=tmp_path).folder) == whole


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_that_is_shipped_names_this_machine(
    artifacts: Artifacts, graph: BaseGraph, tasks: Tasks, format_name: str
) -> None:
    here = [str(Path.home()), str(Path.cwd()), str(tasks.folder), "site-packages", "pkg.torch"]
    shipped = [*artifacts.of("shapes", format_name).iterdir(), *graph.folder.iterdir(), tasks.shapes, tasks.tints]

    assert len(shipped) >= 8
    for path in shipped:
        data = path.read_bytes()
        assert [text for text in here if text.encode() in data] == [], path


# A comparison that fails


@pytest.fixture
def older(tmp_path: Path, artifacts: Artifacts) -> Path:
    """An earlier artefact in every place that an export of ``shapes`` would take."""
    return Path(shutil.copytree(artifacts.folder, tmp_path / "out"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_that_forgets_the_delta_fails_and_leaves_the_older_one(
    artifacts: Artifacts, tasks: Tasks, older: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    monkeypatch.setattr(precision, "task_tensors", lambda base, delta: dict(base.tensors))
    before = digests(older)

    message = refused(4, "export", tasks.shapes, "--to", format_name, "-o", older)

    where = f"{older / f'shapes-{format_name}-fp32'}: must answer as the merged network does"
    assert message.startswith(f"{where}, within {merged_limit(tasks):.1e} on logits, got ")
    assert message.endswith(
        " on 12 images (work)\n  fix: nothing was kept; report this with the pack if the backbone is an ordinary one\n"
    )
    assert digests(older) == before


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_failed_export_leaves_no_folder(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    monkeypatch.setattr(precision, "task_tensors", lambda base, delta: dict(base.tensors))

    refused(4, "export", tasks.shapes, "--to", format_name, "-o", tmp_path / "out")

    assert list((tmp_path / "out").iterdir()) == []


def test_a_runtime_that_computes_something_else_is_a_failed_export(
    artifacts: Artifacts, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[[OnnxRuntime, NpArray], NpArray] = OnnxRuntime.__call__
    monkeypatch.setattr(OnnxRuntime, "__call__", lambda self, images: honest(self, images) + np.float32(1))

    message = refused(4, "export", tasks.shapes, "-o", tmp_path)

    assert message == (
        f"{tmp_path}/shapes-onnx-fp32: must answer as the merged network does, within {merged_limit(tasks):.1e} on "
        "logits, got 1.0e+00 and 100.0% on 12 images (work)\n"
        "  fix: nothing was kept; report this with the pack if the backbone is an ordinary one\n"
    )


# Verify


@pytest.fixture
def spoiled(artifacts: Artifacts, tmp_path: Path) -> Callable[[str], Path]:
    """Copies an artefact of ``shapes`` to be spoiled."""

    def copy(format_name: str) -> Path:
        return Path(shutil.copytree(artifacts.of("shapes", format_name), tmp_path / format_name))

    return copy


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_whole_artefact_is_verified(artifacts: Artifacts, format_name: str) -> None:
    said = edgepet("verify", artifacts.of("shapes", format_name), "--json")

    assert said.code == 0
    files, probe = said.json["checks"]
    assert (said.json["ok"], said.json["reason"]) == (True, None)
    assert files == {"name": "files", "ok": True, "value": 0.0, "limit": 0.0}
    assert (probe["name"], probe["ok"], probe["value"] <= probe["limit"]) == ("probe", True, True)


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_artefact_is_compared_with_its_pack_on_other_images(
    artifacts: Artifacts, tasks: Tasks, format_name: str
) -> None:
    said = edgepet(
        "verify", artifacts.of("shapes", format_name), "--data", tasks.data, "--pack", tasks.shapes, "--json"
    )

    assert said.code == 0, said.err
    assert [(check["name"], check["ok"]) for check in said.json["checks"]] == [
        ("files", True), ("probe", True), ("data", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("format_name", "file"),
    [("onnx", "model.onnx"), pytest.param("openvino", "model.bin", marks=FORMATS[1].marks),
     pytest.param("openvino", "model.xml", marks=FORMATS[1].marks)],
)  # fmt: skip
def test_one_flipped_bit_is_found(spoiled: Callable[[str], Path], format_name: str, file: str) -> None:
    folder = spoiled(format_name)
    flip_byte(folder / file, (folder / file).stat().st_size // 2)

    said = edgepet("verify", folder, "--json")

    assert said.code == 4
    assert said.json == {
        "ok": False,
        "checks": [{"name": "files", "ok": False, "value": 1.0, "limit": 0.0}],
        "reason": f"damaged: {file}",
    }


def test_a_missing_file_is_found(spoiled: Callable[[str], Path]) -> None:
    folder = spoiled("onnx")
    (folder / "model.onnx").unlink()

    assert edgepet("verify", folder, "--json").json["reason"] == "damaged: model.onnx"


@pytest.mark.parametrize("format_name", FORMATS)
def test_answers_other_than_the_recorded_ones_are_found(spoiled: Callable[[str], Path], format_name: str) -> None:
    folder = spoiled(format_name)
    manifest = json.loads((folder / MANIFEST).read_text())
    logits = np.frombuffer(base64.b64decode(manifest["probe"]["logits"]), "<f4").copy()
    logits[0] += 1
    manifest["probe"]["logits"] = base64.b64encode(logits.tobytes()).decode()
    (folder / MANIFEST).write_text(json.dumps(manifest))

    said = edgepet("verify", folder, "--json")

    assert said.code == 4
    assert [(check["name"], check["ok"]) for check in said.json["checks"]] == [("files", True), ("probe", False)]
    assert said.json["checks"][1]["value"] == pytest.approx(1.0, abs=1e-4)  # the fp32 rounding of a logit


def test_another_tasks_model_in_the_folder_is_found(artifacts: Artifacts, spoiled: Callable[[str], Path]) -> None:
    folder = spoiled("onnx")
    shutil.copy(artifacts.of("tints", "onnx") / "model.onnx", folder)

    assert edgepet("verify", folder).code == 4


# Merge


def test_merged_weights_load_strictly_into_plain_timm(tasks: Tasks, tmp_path: Path) -> None:
    file = tmp_path / "shapes.safetensors"

    said = edgepet("merge", tasks.shapes, "--backbone", tasks.spec, "-o", file, "--json")

    assert said.code == 0, said.err
    report = said.json
    network = timm.create_model("test_vit", num_classes=3, **report["create_args"]).eval()
    network.load_state_dict(safetensors.torch.load_file(file), strict=True)
    subject = Subject(tasks.shapes, tasks.spec, None)
    images, _ = subject.images
    tuned = logits_of(tuned_network(subject), images)
    got = logits_of(network, images)
    assert np.abs(got - tuned).max() <= 2e-2 * np.abs(tuned).max()  # the pack stores fp16
    assert np.abs(got - subject.merged_reference).max() <= merged_limit(tasks)
    assert report == {
        "path": str(file),
        "bytes": file.stat().st_size,
        "create_args": {"img_size": 32, "dynamic_img_size": False},
        "loads_into": 'timm.create_model("test_vit", num_classes=3, img_size=32, dynamic_img_size=False)',
        "max_abs_diff": pytest.approx(np.abs(got.astype(np.float64) - tuned).max(), rel=1e-3),
        "limit": pytest.approx(2e-2 * np.abs(tuned).max(), rel=1e-6),
        "n": HELD_OUT,
        "inputs": "work",
        "against": "tuned",
    }


def test_a_pack_in_fp32_is_merged_within_a_hundredth_of_that(tasks: Tasks, tmp_path: Path) -> None:
    exact = tmp_path / "shapes.pet"
    said = edgepet(*train_arguments(tasks.spec, tasks.data, "ssf", exact), "--codec", "fp32", "--json")
    assert said.code == 0, said.err

    report = edgepet("merge", exact, "--backbone", tasks.spec, "-o", tmp_path / "m.safetensors", "--json").json

    assert report["against"] == "tuned"
    assert report["max_abs_diff"] <= report["limit"]
    assert report["limit"] < 1e-3  # 1e-4 of logits around 1


@pytest.mark.parametrize(
    ("work", "data", "expected"),
    [
        (True, False, (HELD_OUT, "work", "tuned")),
        (True, True, (HELD_OUT, "data", "tuned")),
        (False, True, (HELD_OUT, "data", "merged")),
        (False, False, (8, "synthetic", "merged")),
    ],
)
@pytest.mark.parametrize("verb", ["merge", "export"])
def test_what_was_compared_depends_on_what_is_there(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path, verb: str, work: bool, data: bool, expected: tuple[object, ...]
) -> None:
    pack = tasks.tints if work else alone(tasks.tints, tmp_path)
    target = tmp_path / ("m.safetensors" if verb == "merge" else "out")
    chosen: list[object] = ["--data", tasks.data] if data else []

    said = edgepet(verb, pack, *chosen, "-o", target, "--json")

    assert said.code == 0, said.err
    parity: Any = said.json if verb == "merge" else said.json["artifacts"][0]["parity"]
    assert (parity["n"], parity["inputs"], parity["against"]) == expected


def test_a_work_folder_of_another_training_is_not_compared_with(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path
) -> None:
    pack = alone(tasks.tints, tmp_path)
    shutil.copytree(tasks.folder / "shapes.work", tmp_path / "tints.work")

    report = edgepet("merge", pack, "-o", tmp_path / "m.safetensors", "--json").json

    assert (report["inputs"], report["against"]) == ("synthetic", "merged")


def test_a_failed_merge_leaves_the_older_file(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "m.safetensors"
    older.write_text("whole")

    def forgetful(subject: Subject) -> Any:
        network = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
        network.load_state_dict(
            {key: torch.from_numpy(np.array(value)) for key, value in subject.backbone.tensors.items()}, strict=False
        )
        return network

    monkeypatch.setattr(merging, "plain_network", forgetful)

    message = refused(4, "merge", tasks.shapes, "-o", older)

    assert message.startswith(f"{older}: must answer as the tuned network does, within ")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert older.read_text() == "whole"


# What no device here can run


@pytest.mark.skipif(gpu_problem() is None, reason="a GPU answers here: the engine is run")
def test_an_engine_that_nothing_here_can_run_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")
    backbone = tiny_vit(tmp_path, seed=3)
    model = perturb(TunedModel(backbone, configure("ssf"), 3), seed=4)
    delta = extract(model, backbone, task="engine", labels=CLASSES, val=Score(top1=0.5, n=2))
    write_pack(tmp_path / "engine.pet", delta)

    said = edgepet(
        "export", tmp_path / "engine.pet", "--backbone", backbone.spec, "--to", "tensorrt", "-o", tmp_path, "--json"
    )

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    folder = Path(row["path"])
    reason = f"not run: {gpu_problem()} here: the engine's bytes and container were read, execution was not run"
    assert (row["engine"], row["verified"], row["reason"], row["parity"]) == ("tensorrt-rtx", False, reason, None)
    assert json.loads((folder / "model.engine.json").read_text())["sms"] == [86, 89, 120]
    artifact = read_artifact(folder)
    assert (artifact.verified, artifact.reason, artifact.parity) == (False, reason, None)
    told = edgepet("export", tmp_path / "engine.pet", "--to", "tensorrt", "-o", tmp_path / "again")
    assert "not verified" in told.out
    assert reason in told.out
    verified = edgepet("verify", folder, "--json")
    assert verified.json["checks"] == [{"name": "files", "ok": True, "value": 0.0, "limit": 0.0}]
    assert verified.json["reason"].startswith("not run: needs an NVIDIA GPU with compute capability 8.6, 8.9 or 12.0")


def test_a_pack_that_was_changed_after_training_is_not_compared_with_its_work_folder(
    tasks: Tasks, artifacts: Artifacts, tmp_path: Path
) -> None:
    delta = read_pack(tasks.shapes).delta
    head = replace(delta.head, bias=delta.head.bias + np.float16(1), weight=-delta.head.weight)
    write_pack(tmp_path / "shapes.pet", replace(delta, head=head))
    shutil.copytree(tasks.folder / "shapes.work", tmp_path / "shapes.work")

    assert Subject(tmp_path / "shapes.pet", None, None).work is None
