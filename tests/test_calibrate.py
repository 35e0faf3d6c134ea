"""``calibrate`` and ``export --precision int8``: on the command line, on real files, within a budget or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgepet.calibration import search
from edgepet.calibration.budget import Drop, LayerDrop
from edgepet.calibration.qdq import Int8Recipe
from edgepet.graphs.base import graph_folder
from edgepet.graphs.int8 import CODES, open_int8
from edgepet.packs.pack import read_pack, write_pack
from edgepet.proving import precision
from tests.flow import CLASSES, FORMATS, bytes_below, edgepet, has_openvino, refused, train_arguments

RECIPE = {"smooth", "estimator", "bias_correction", "bits", "keep"}
LAYERS = {
    "patch_embed.proj",
    *(f"blocks.{i}.{name}" for i in range(6) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
}


@dataclass(frozen=True)
class Trained:
    """One SSF task on ``data``: 16 images of each class to train on, 4 of each in val/ and in test/."""

    data: Path
    pack: Path
    spec: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, backbone: Any) -> Trained:
    folder = tmp_path_factory.mktemp("calibrate")
    rng = np.random.default_rng(6)
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        for name, colour in zip(CLASSES, ("red", "green", "blue"), strict=True):
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                ImageDraw.Draw(image).ellipse((6, 6, 26, 26), fill=colour)
                image.save(folder / "data" / split / name / f"{number}.png")
    made = Trained(folder / "data", folder / "round.pet", backbone.spec)
    said = edgepet(*train_arguments(made.spec, made.data, "ssf", made.pack), "--json")
    assert said.code == 0, said.err
    return made


@pytest.fixture(scope="module")
def report(trained: Trained) -> Mapping[str, Any]:
    """The JSON of ``calibrate``."""
    said = edgepet("calibrate", trained.pack, "--calib", trained.data, "--json")
    assert said.code == 0, said.err
    told: Mapping[str, Any] = said.json
    return told


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The task in int8 in every format that is installed: the rows of the export's JSON, by format."""
    formats = "onnx,openvino" if has_openvino else "onnx"
    folder = tmp_path_factory.mktemp("int8")
    said = export(trained, folder, "--to", formats, "--json")
    assert said.code == 0, said.err
    return {row["format"]: row for row in said.json["artifacts"]}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, report: Mapping[str, Any]) -> None:
    """Where a test is not about the search two recipes are tried in place of nine, and layers cost as in ``report``."""
    layers = [LayerDrop(**layer) for layer in report["layers"]]
    monkeypatch.setattr(search, "SMOOTH", ())
    monkeypatch.setattr(search, "ESTIMATORS", ("min-max",))
    monkeypatch.setattr(search.Calibration, "sensitivity", lambda self, recipe: layers)


def export(trained: Trained, folder: Path, *more: object) -> Any:
    return edgepet("export", trained.pack, "--precision", "int8", "--calib", trained.data, "-o", folder, *more)


def files_of(data: Path) -> dict[str, str]:
    """sha256 of what is in train/, by its path."""
    paths = sorted((data / "train").glob("*/*"))
    return {p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def loss(points: float) -> Drop:
    return Drop(points=points, low=points - 2, high=points + 2, kl=0.5, n=60)


# ---------------------------------------------------------------------------------------------------------- calibrate


def test_calibrate_says_what_every_layer_costs_and_what_would_be_chosen(
    trained: Trained, report: Mapping[str, Any]
) -> None:
    told = report
    assert set(told) == {"layers", "recipe", "ranges", "tried", "drop", "held_out", "calibration", "warning"}
    assert {layer["name"] for layer in told["layers"]} == LAYERS
    assert len(told["layers"]) == 25
    assert all(set(layer) == {"name", "drop", "kl"} for layer in told["layers"])
    kls = [layer["kl"] for layer in told["layers"]]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] > 0
    assert set(told["recipe"]) == RECIPE
    assert told["recipe"] == told["tried"][0]["recipe"]
    tried = [t["kl"] for t in told["tried"]]
    assert tried == sorted(tried)
    assert [t["recipe"]["smooth"] for t in told["tried"]].count(None) >= 1
    assert {t["recipe"]["estimator"] for t in told["tried"]} == {"min-max", "percentile", "mse", "entropy"}
    assert len(told["ranges"]) == 25
    assert all(of["scale"] > 0 for of in told["ranges"].values())
    assert set(told["drop"]) == {"points", "low", "high", "kl", "n"}
    assert told["drop"]["n"] == 60  # all of train and val
    assert told["drop"]["low"] <= told["drop"]["points"] <= told["drop"]["high"]
    assert told["held_out"] == told["calibration"]["held_out"] == 12
    assert told["calibration"]["files"] == files_of(trained.data)
    assert told["warning"] == "48 calibration images are few: 128 or more are advised"


@pytest.mark.usefixtures("brief")
def test_calibrate_tells_people_the_recipe_and_the_worst_layer_first(
    trained: Trained, report: Mapping[str, Any]
) -> None:
    told = edgepet("calibrate", trained.pack, "--calib", trained.data).out

    lines = [line.strip() for line in told.splitlines() if line.strip()]
    assert lines[0] == "sensitivity on 12 held-out images, the worst first"
    rows = [(layer["name"], f"{layer['drop']:+.2f}", f"{layer['kl']:.2g}") for layer in report["layers"]]
    assert [tuple(line.split()) for line in lines if line.split()[0] in LAYERS] == rows
    recipe, cost, warning = lines[-3:]
    assert recipe in [
        f"recipe: SmoothQuant 0.5, min-max ranges, {corrected}, of 2 tried on the held-out images"
        for corrected in ("bias correction", "no bias correction")
    ]
    assert re.fullmatch(
        r"all layers in int8: loses \d\.\d\d points of top-1 \(-\d\.\d\d to \d\.\d\d, n = 60\), divergence \S+", cost
    )
    assert warning == "48 calibration images are few: 128 or more are advised"


# -------------------------------------------------------------------------------------------------------- export int8


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_manifest_says_what_int8_was_made_from_and_what_it_costs(
    trained: Trained, exported: Mapping[str, Any], format_name: str
) -> None:
    row = exported[format_name]

    manifest = json.loads((Path(row["path"]) / "artifact.json").read_text())

    evidence = manifest["evidence"]
    assert manifest["precision"] == "int8"
    assert evidence["calibration"] == row["calibration"]
    assert evidence["calibration"]["files"] == files_of(trained.data)
    lines = "".join(f"{name} {digest}\n" for name, digest in files_of(trained.data).items())
    assert evidence["calibration"]["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert set(evidence["int8"]) == {"recipe", "tried", "drop"}
    assert set(evidence["int8"]["recipe"]) == RECIPE
    assert evidence["int8"]["drop"] == row["drop"]
    assert evidence["stored"]["int8"]["bytes"] > 8 * evidence["stored"]["float32"]["bytes"]
    assert (row["verified"], row["path"].endswith(f"round-{format_name}-int8")) == (True, True)


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_int8_artefact_verifies_and_runs_on_codes(
    trained: Trained, exported: Mapping[str, Any], format_name: str
) -> None:
    folder = exported[format_name]["path"]

    plain = edgepet("verify", folder, "--json")
    on_data = edgepet("verify", folder, "--data", trained.data, "--pack", trained.pack, "--json")
    evaluated = edgepet("eval", folder, trained.data, "--json")

    assert (plain.code, [check["name"] for check in plain.json["checks"]]) == (0, ["files", "probe"])
    assert (on_data.code, on_data.json["checks"][-1]["name"]) == (0, "data top-1")
    assert (evaluated.json["precision"], evaluated.json["n"]) == ("int8", 12)  # what ran, by the runtime's own word


def test_an_int8_artefact_with_a_changed_byte_does_not_verify(exported: Mapping[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "round-onnx-int8"
    shutil.copytree(exported["onnx"]["path"], folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)

    said = edgepet("verify", folder, "--json")

    assert (said.code, said.json["ok"], said.json["reason"]) == (4, False, "damaged: model.onnx")


def test_the_same_input_gives_the_same_model(trained: Trained, exported: Mapping[str, Any], tmp_path: Path) -> None:
    said = export(trained, tmp_path)

    assert said.code == 0, said.err
    first, again = Path(exported["onnx"]["path"]), tmp_path / "round-onnx-int8"
    assert (again / "model.onnx").read_bytes() == (first / "model.onnx").read_bytes()
    assert "round int8: loses" in said.out
    assert "onnx ran 24 of 38 products on int8 codes" in said.out  # not the head, nor attention's twelve
    assert "48 calibration images are few: 128 or more are advised" in said.out


# --------------------------------------------------------------------------------------------------------- the budget


@pytest.mark.usefixtures("brief")
def test_layers_that_cost_too_much_return_to_float_and_are_named(
    trained: Trained, report: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge is told what to say: of networks this small and classes this plain nothing is lost."""
    calibration = search.Calibration
    kept_when_judged: list[int] = []

    def judge(self: Any, int8: Any) -> Drop:
        kept_when_judged.append(25 - len(int8.layers))
        return loss(10.0 if kept_when_judged[-1] < 3 else 2.0)

    monkeypatch.setattr(calibration, "judge", judge)

    said = export(trained, tmp_path, "--max-drop", 5, "--json")

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    assert kept_when_judged == [0, 1, 2, 4, 3]
    assert row["drop"]["points"] == 2.0
    worst = report["layers"][:3]
    assert [(node["name"], node["reason"]) for node in row["kept_fp32"]] == [
        (layer["name"], f"int8 of it costs most: divergence {layer['kl']:.2g} alone") for layer in worst
    ]
    assert row["int8"]["recipe"]["keep"] == [layer["name"] for layer in worst]
    linear = sum(node["name"] != "patch_embed.proj" for node in row["kept_fp32"])
    assert row["executed"]["layers"] == {"float": 14 + linear, "int8": 24 - linear}  # a convolution was float before


@pytest.mark.usefixtures("brief")
def test_a_budget_that_cannot_be_held_ends_with_4_and_leaves_nothing(
    trained: Trained, report: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.Calibration, "judge", lambda self, int8: loss(10.0))
    arguments = ["export", trained.pack, "--precision", "int8", "--calib", trained.data, "-o", tmp_path / "out"]

    message = refused(4, *arguments, "--max-drop", 5)

    dozen = [f"  {r['name']}: {r['drop']:+.2f} points, divergence {r['kl']:.2g}\n" for r in report["layers"][:12]]
    assert message == (
        "task 'round': must lose at most 5 points in int8, with half of its layers in float, "
        "got 10.00 (8.00 to 12.00) on 60 images; alone in int8, the worst first:\n"
        f"{''.join(dozen)}"
        "  and 13 more: edgepet calibrate lists all\n"
        "  fix: a wider --max-drop, more calibration images, or fp16\n"
    )
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("brief")
def test_weights_of_two_bits_lose_what_the_judge_sees(
    trained: Trained, report: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is told here: codes of -1, 0 and 1 spoil the network itself."""
    monkeypatch.setattr(search, "TRANSFORMER", Int8Recipe(bits=2))

    told = edgepet("calibrate", trained.pack, "--calib", trained.data, "--json").json

    assert [t["recipe"]["bits"] for t in told["tried"]] == [2, 2]
    assert told["drop"]["kl"] > 100 * report["drop"]["kl"]


# --------------------------------------------------------------------------------------------------------------- auto


@pytest.mark.usefixtures("brief")
def test_auto_writes_one_artefact_of_each_format_and_says_what_was_measured(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "AUTO_ROUNDS", 3)
    formats = ["onnx", "openvino"] if has_openvino else ["onnx"]

    said = edgepet("export", trained.pack, "--precision", "auto", "--calib", trained.data, "--to", ",".join(formats),
                   "-o", tmp_path, "--json")  # fmt: skip

    assert said.code == 0, said.err
    rows = said.json["artifacts"]
    assert [row["format"] for row in rows] == formats
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(row["path"]).name for row in rows)
    for row in rows:
        others = {"fp32", "fp16", "int8"} - {row["precision"]}
        first, *rest = row["why"].split(" (p50 of 3 rounds, ")[0].split(", ")
        name, _, number = first.partition(": ")
        measured = {name: float(number.removesuffix(" ms")), **{p: float(ms) for p, ms in map(str.split, rest)}}
        assert set(measured) == {row["precision"], *others}
        least = min(measured.values())  # of equally fast ones it is the smallest; 0.01 ms is the last digit
        assert measured[row["precision"]] <= precision.AUTO_TIE * least + 0.01
        assert ("and loses " in row["why"]) == (row["precision"] == "int8")


@pytest.mark.usefixtures("brief")
def test_auto_leaves_int8_out_where_the_budget_does_not_hold(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "AUTO_ROUNDS", 3)
    monkeypatch.setattr(search.Calibration, "judge", lambda self, int8: loss(10.0))

    said = edgepet("export", trained.pack, "--precision", "auto", "--calib", trained.data, "--max-drop", 5,
                   "-o", tmp_path, "--json")  # fmt: skip

    assert said.code == 0, said.err
    (row,) = said.json["artifacts"]
    assert row["precision"] in ("fp32", "fp16")
    assert row["why"].split("; ")[1:] == [
        "int8 is out: must lose at most 5 points in int8, with half of its layers in float, "
        "got 10.00 (8.00 to 12.00) on 60 images"
    ]
    assert [path.name for path in tmp_path.iterdir()] == [f"round-onnx-{row['precision']}"]


# ---------------------------------------------------------------------------------------------------- what is refused


NO_IMAGES = (
    "--precision {}: needs calibration images: they are given, never invented\n"
    "  fix: pass --calib DIR with labelled images of the task, its training folder say\n"
)


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_int8_without_images_is_refused(trained: Trained, tmp_path: Path, precision: str) -> None:
    assert refused(3, "export", trained.pack, "--precision", precision, "-o", tmp_path) == NO_IMAGES.format(precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["export", "calibrate"])
def test_a_budget_finer_than_the_images_is_refused(trained: Trained, tmp_path: Path, verb: str) -> None:
    more = ["--precision", "int8", "-o", tmp_path] if verb == "export" else []

    assert refused(3, verb, trained.pack, "--calib", trained.data, "--max-drop", 1.5, *more) == (
        "--max-drop: must be at least 1.7 points: 60 images show no less, got 1.5\n"
        "  fix: give more images, or a wider budget\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_budget_is_for_int8_only(trained: Trained, tmp_path: Path, precision: str) -> None:
    assert refused(3, "export", trained.pack, "--precision", precision, "--max-drop", 3, "-o", tmp_path) == (
        f"--max-drop: is for --precision int8 and auto, got --precision {precision}\n"
    )


def test_test_images_are_refused_for_calibration(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(trained.data / part)
    leak = trained.data / "train" / "circle" / "3.png"
    (tmp_path / "held" / "test" / "circle").mkdir(parents=True)
    (tmp_path / "held" / "test" / "circle" / "x.png").write_bytes(leak.read_bytes())

    message = refused(
        3, "calibrate", trained.pack, "--calib", tmp_path / "data", "--data", tmp_path / "held"
    )  # fmt: skip

    assert message == (
        f"{tmp_path}/data: must not overlap the evaluation split {tmp_path}/held/test, "
        "got 1 of its images: train/circle/3.png is circle/x.png\n"
        "  fix: calibrate on train/, so that test/ can still judge\n"
    )


# -------------------------------------------------------------------------------------- the int8 backbone, by the verb


def test_calibrate_writes_a_pack_for_the_backbone_that_tasks_share(trained: Trained, tmp_path: Path) -> None:
    said = edgepet("calibrate", trained.pack, "--calib", trained.data, "-o", tmp_path / "shared.pet", "--json")

    assert said.code == 0, said.err
    told, plain = said.json, read_pack(trained.pack)
    pack = read_pack(tmp_path / "shared.pet")
    assert pack.delta.int8 is not None
    assert (pack.delta.int8.codes, len(pack.delta.int8.ranges)) == (told["codes_sha256"], 25)
    codes = graph_folder(plain.delta.fingerprint) / CODES
    assert hashlib.sha256(codes.read_bytes()).hexdigest() == told["codes_sha256"]
    assert told["codes_bytes"] == codes.stat().st_size
    assert told["pack_bytes"] == (tmp_path / "shared.pet").stat().st_size < trained.pack.stat().st_size + 1500
    assert (told["own_codes_bytes"], told["own_memory_bytes"] > 0) == (0, True)  # SSF
    assert (told["own_ranges"], told["trunk_ranges"], told["trunk"]) == (25, 0, None)
    assert [run["runtime"] for run in told["runs"]] == (
        ["onnxruntime", "openvino"] if has_openvino else ["onnxruntime"]
    )
    assert [run["layers"]["int8"] for run in told["runs"]] == ([24, 25] if has_openvino else [24])
    assert all(run["parity"]["max_abs"] <= run["parity"]["limit"] for run in told["runs"])
    assert told["recipe"]["smooth"] is None  # the codes have divisors of their own

    evaluated = edgepet("eval", tmp_path / "shared.pet", trained.data, "--precision", "int8", "--json")
    counted = edgepet("storage", tmp_path / "shared.pet", "--precision", "int8", "--json")
    assert (evaluated.json["precision"], evaluated.json["n"]) == ("int8", 12)
    assert counted.json["backbone_bytes"] == told["codes_bytes"]
    assert counted.json["tasks"][0]["own_memory_bytes"] == told["own_memory_bytes"]
    assert refused(3, "eval", trained.pack, trained.data, "--precision", "int8") == (
        "task 'round': has no activation ranges for the int8 backbone\n"
        "  fix: run `edgepet calibrate TASK.pet --calib DIR -o OUT.pet`\n"
    )


@pytest.mark.usefixtures("brief")
def test_a_pack_that_changes_later_blocks_says_whose_its_ranges_are(trained: Trained, tmp_path: Path) -> None:
    delta = read_pack(trained.pack).delta
    later = [each for each in delta.updates if each.target.tensor.startswith(("blocks.4.", "blocks.5.", "norm."))]
    write_pack(tmp_path / "later.pet", replace(delta, updates=tuple(later), probes={}))

    said = edgepet("calibrate", tmp_path / "later.pet", "--calib", trained.data, "-o", tmp_path / "shared.pet")

    assert said.code == 0, said.err
    graph, pack = open_int8(delta.fingerprint, delta.preprocess), read_pack(tmp_path / "shared.pet").delta
    cut = graph.trunk(pack)
    assert cut is not None
    assert f"  ranges of its own: 8; 17 are the backbone's, up to {cut.at}\n" in said.out
    assert pack.int8 is not None
    assert (len(pack.int8.ranges), pack.int8.trunk) == (8, graph.ranges_sha256)
    told = edgepet("inspect", tmp_path / "shared.pet")
    assert f"  behind a trunk with the backbone's own {(graph.ranges_sha256 or '')[:12]}…\n" in told.out


@pytest.mark.usefixtures("brief")
def test_a_pack_on_the_shared_backbone_that_loses_too_much_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.Calibration, "judged", lambda self, network: loss(10.0))

    message = refused(
        4, "calibrate", trained.pack, "--calib", trained.data, "--max-drop", 5, "-o", tmp_path / "shared.pet"
    )

    assert message == (
        f"{tmp_path}/shared.pet: must lose at most 5 points on onnxruntime, got 10.00 on 60 images\n"
        "  fix: train with --backbone-precision int8, or export a model of its own\n"
    )
    assert bytes_below(tmp_path) == 0
