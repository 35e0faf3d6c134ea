"""What earlier versions wrote is read and written with equal bytes; what scripts rely on only grows.

The files lie in ``tests/golden``; ``make.py`` there says how they were made.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edgepet import Device, read_pack, verify
from edgepet.calibration.slot_graphs import int8_graph
from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import fold_all, merge
from edgepet.deltas.updates import Targeted, attributes, factors, generated
from edgepet.device.artifact import read_artifact, write_artifact
from edgepet.device.runtime import SharedInt8, open_task
from edgepet.device.store import Store
from edgepet.exporters.onnx import build_model, serialize
from edgepet.files import read_file
from edgepet.graphs.base import open_graph
from edgepet.graphs.int8 import open_int8
from edgepet.images.preprocess import normalize
from edgepet.methods import SSF
from edgepet.packs.container import UNSIGNED, with_signature
from edgepet.packs.pack import encode_pack
from edgepet.packs.signatures import signer
from edgepet.spec import NpArray
from edgepet.tuning.checkpoint import Keeper, identity_of
from edgepet.tuning.work_folder import read_work, write_work
from tests.flow import RUNTIMES, Artifacts, Tasks, edgepet, has_openvino
from tests.golden.make import (
    CLASSES,
    FIRST_KINDS,
    FURTHER_KINDS,
    closing_base,
    closing_updates,
    decoded,
    draw,
    every_branch,
    every_update,
    train,
)

GOLDEN = Path(__file__).parent / "golden"
TASKS = GOLDEN / "tasks"
OLD = sorted((GOLDEN / "packs" / "before").glob("*.pet"))  # from before version 1 was final
PACKS = sorted(set(GOLDEN.rglob("*.pet")) - set(OLD))
ARTIFACTS = sorted(path for path in (TASKS / "artifacts").iterdir() if has_openvino or "openvino" not in path.name)


def named(path: Path) -> str:
    return str(path.relative_to(GOLDEN))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", PACKS, ids=named)
def test_a_pack_is_read_and_written_with_equal_bytes(path: Path) -> None:
    pack = read_pack(path)

    again = encode_pack(pack.delta, kept=pack.planes, sequence=pack.sequence)
    assert with_signature(again, pack.signature or UNSIGNED) == path.read_bytes()


@pytest.mark.parametrize("path", sorted((GOLDEN / "packs").glob("*.pet")), ids=named)
def test_every_plane_is_read_as_the_same_bits_for_ever(path: Path) -> None:
    assert decoded(path) == json.loads((GOLDEN / "packs" / "decoded.json").read_text())[path.name]


def test_the_golden_packs_have_every_codec() -> None:
    formats = {plane.stored.coding.format for path in PACKS for plane in read_pack(path).planes.values()}
    packed = {
        plane.stored.coding.format for path in PACKS for plane in read_pack(path).planes.values() if plane.stored.packed
    }

    assert formats == {"fp32", "fp16", "int8", "int4", "int2", "int32", "bits"}
    assert {"fp32", "fp16", "int8", "int4", "int2"} <= packed


def test_the_golden_signature_is_the_published_keys(tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = Ed25519PublicKey.from_public_bytes(
        bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")  # RFC 8032, 7.1, test 1
    )
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "rfc8032.pub").write_bytes(pem)

    assert signer((GOLDEN / "packs" / "signed.pet").read_bytes(), tmp_path, "signed.pet") == "rfc8032"


def told(targeted: Targeted) -> str:
    """Everything about an update but the values of its arrays."""
    update = targeted.update
    shapes = {name: array.shape for name, array in factors(update).items()}
    reads = getattr(update, "reads", None)
    return f"{targeted.target} {update.kind} {attributes(update)} {generated(update)} {shapes} {reads}"


def test_what_closed_the_vocabulary_folds_as_it_did() -> None:
    """The values of a pack, folded in float64, and the ones that were folded when the vocabulary was closed."""
    expected = safetensors.numpy.load_file(GOLDEN / "packs" / "closing-folded.safetensors")

    folded = fold_all(closing_base(), read_pack(GOLDEN / "packs" / "closing-fp32.pet").delta.updates)

    assert folded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.abs(folded[name] - tensor).max() <= 1e-14  # sums of a few products of at most one half
        assert np.abs(closing_base()[name] - tensor).max() > 1e-3 or name.endswith(("stem.weight", "conv.weight"))


def test_the_packs_hold_every_update_and_branch_as_it_was() -> None:
    """Else equal bytes might come from reading nothing and writing nothing."""
    branches = [
        branch
        for name in ("branches", "further-branches")
        for branch in read_pack(GOLDEN / "packs" / f"{name}.pet").delta.branches
    ]

    for name, made in (("updates-fp32", every_update()), ("closing-fp32", closing_updates())):
        updates = read_pack(GOLDEN / "packs" / f"{name}.pet").delta.updates
        assert sorted(map(told, updates)) == sorted(map(told, made))
    for read, made in zip(branches, every_branch((*FIRST_KINDS, *FURTHER_KINDS)), strict=True):
        assert (read.kind, read.tap, read.into, dict(read.settings)) == (
            made.kind, made.tap, made.into, dict(made.settings),
        )  # fmt: skip
        assert all(np.array_equal(read.tensors[name], made.tensors[name]) for name in made.tensors)


@pytest.mark.parametrize("name", ["shapes", "tints"])
def test_a_work_folder_is_read_and_written_with_equal_bytes(name: str, tmp_path: Path) -> None:
    work = read_work(TASKS / f"{name}.work")
    pack = read_pack(TASKS / f"{name}.pet").delta
    told = Delta(
        task=name, backbone=pack.backbone, fingerprint=work.fingerprint, updates=(), head=work.head,
        labels=CLASSES, preprocess=pack.preprocess, method=work.method, settings=work.settings,
        val=Score(top1=0.0, n=0),
    )  # fmt: skip

    write_work(tmp_path / f"{name}.work", told, work.tensors, work.pixels, work.labels)

    for file in (TASKS / f"{name}.work").iterdir():
        assert (tmp_path / f"{name}.work" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_checkpoint_is_read_and_written_with_equal_bytes(tmp_path: Path) -> None:
    identity = identity_of(TASKS / "cut.checkpoint")
    saved = Keeper(path=TASKS / "cut.checkpoint", identity=identity).load()
    assert saved is not None

    Keeper(path=tmp_path / "cut.checkpoint", identity=identity).save(saved)

    assert (tmp_path / "cut.checkpoint").read_bytes() == (TASKS / "cut.checkpoint").read_bytes()


def test_a_training_that_was_cut_goes_on(tmp_path: Path) -> None:
    draw(tmp_path / "data", {"train": 16, "val": 8})
    shutil.copy(TASKS / "cut.checkpoint", tmp_path)
    steps: list[Any] = []

    report = train(tmp_path / "data", tmp_path / "cut.pet", SSF(), epochs=3, resume=True, say=steps.append)

    assert (steps[0].epoch, report.epochs) == (2, 3)
    assert not (tmp_path / "cut.checkpoint").exists()


@pytest.mark.parametrize("folder", ARTIFACTS, ids=named)
def test_an_artefact_answers_as_it_did_and_its_manifest_is_written_with_equal_bytes(
    folder: Path, tmp_path: Path
) -> None:
    write_artifact(tmp_path, read_artifact(folder))

    assert (tmp_path / "artifact.json").read_bytes() == (folder / "artifact.json").read_bytes()
    assert [(check.name, check.ok) for check in verify(folder).checks] == [("files", True), ("probe", True)]


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A copy of the golden store: opening one leaves stamps in its cache."""
    return Path(shutil.copytree(TASKS / "device", tmp_path / "device"))


def test_merged_weights_are_equal_to_the_last_bit(device: Path) -> None:
    pack = read_pack(TASKS / "shapes.pet").delta
    graph = open_graph(pack.fingerprint, pack.preprocess, root=device)
    dense = safetensors.numpy.load(read_file(TASKS / "shapes.safetensors"))

    merged = merge(graph.base, pack)

    assert {f"backbone.{name}" for name in merged} == dense.keys() - {"head.weight", "head.bias"}
    assert all(np.array_equal(dense[f"backbone.{name}"], value) for name, value in merged.items())


def test_an_exported_model_is_written_with_equal_bytes(device: Path) -> None:
    """No network is traced for it, so no version of torch is in it; onnx writes what it was given."""
    pack = read_pack(TASKS / "shapes.pet").delta
    pack = replace(pack, preprocess=replace(pack.preprocess, orientation=None))  # packs did not say it then
    graph = open_graph(pack.fingerprint, pack.preprocess, root=device)

    made = serialize(build_model(graph, merge(graph.base, pack), pack))

    assert made == (TASKS / "artifacts" / "shapes-onnx-fp32" / "model.onnx").read_bytes()


def test_the_int8_backbone_is_made_with_equal_bytes(tmp_path: Path) -> None:
    (stored,) = (TASKS / "device" / "backbones").iterdir()
    folder = tmp_path / "backbones" / stored.name
    shutil.copytree(stored, folder, ignore=shutil.ignore_patterns("*int8*"))
    pack = read_pack(TASKS / "shapes.pet").delta

    made = int8_graph(open_graph(pack.fingerprint, pack.preprocess, root=tmp_path), root=tmp_path)

    assert made.files.keys() == {"backbone-int8.safetensors", "graph-16-int8.onnx", "graph-16-int8-openvino.onnx"}
    for name in made.files:  # the graphs of version 4, which has codes in every map, over the codes of before
        golden = stored if name == made.codes_path.name else TASKS / "maps"
        assert (folder / name).read_bytes() == (golden / name).read_bytes(), name


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["shapes", "tints"])
def test_a_store_runs_its_tasks_in_fp32_and_int8(name: str, runtime: str, device: Path) -> None:
    delta = Store(device).pack(name).delta
    graph = open_graph(delta.fingerprint, delta.preprocess, root=device)
    int8 = open_int8(delta.fingerprint, delta.preprocess, root=device)
    images = normalize(read_work(TASKS / f"{name}.work").pixels, delta.preprocess)

    with open_task(graph, delta, runtime=runtime) as network:
        floats: NpArray = network(images)
    shared = SharedInt8(int8, runtime=runtime)
    codes = shared.bind(delta)(images)
    shared.close()

    assert Device(device).tasks() == ("shapes", "tints")
    assert np.isfinite(floats).all()
    assert np.abs(codes - floats).max() < 0.2 * np.abs(floats).max()  # int8 is not exact, and zeros would be further


# ------------------------------------------------------------------------------------------------------- command line


def keys(value: Any, at: str = "") -> set[str]:
    """Paths of all keys of a JSON document; ``[]`` stands for every entry of an array."""
    if isinstance(value, dict):
        return {path for key, entry in value.items() for path in {f"{at}{key}", *keys(entry, f"{at}{key}.")}}
    if isinstance(value, list):
        return {path for entry in value for path in keys(entry, f"{at.removesuffix('.')}[].")}
    return set()


def flags(verb: str) -> list[str]:
    """Options of a verb as its usage lists them, with their choices."""
    usage = edgepet(verb, "--help").out.partition("\n\n")[0]
    return sorted(set(re.findall(r"(?<![a-z])-{1,2}[a-z][a-z-]*(?: \{[a-z0-9,]+\})?", usage)))


@pytest.fixture(scope="module")
def spoken(tasks: Tasks, artifacts: Artifacts, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The keys of what every verb puts out, by verb."""
    folder = tmp_path_factory.mktemp("spoken")
    onnx = artifacts.of("shapes", "onnx")
    small = ["--backbone", tasks.spec, "--img-size", 32, "--epochs", 1, "--train-precision", "fp32"]
    calib = ["--calib", folder / "data"]
    draw(folder / "data", {"train": 16, "val": 8})
    words: dict[str, list[object]] = {
        "doctor": [],
        "methods": ["--backbone", tasks.spec],
        "train": [tasks.data, "--method", "ssf", *small, "-o", folder / "t.pet"],
        "pretrain": [tasks.data, "--method", "ssf", *small, "-o", folder / "t.work"],
        "eval": [tasks.shapes, tasks.data],
        "merge": [tasks.shapes, "-o", folder / "merged.safetensors"],
        "export": [tasks.shapes, "--precision", "int8", *calib, "-o", folder / "exported"],
        "calibrate": [tasks.shapes, *calib],
        "calibrate -o": [tasks.shapes, *calib, "-o", folder / "shared.pet"],
        "verify": [onnx],
        "bench": [tasks.shapes, "--rounds", 2],
        "storage": [tasks.shapes],
        "inspect": [tasks.shapes],
        "pack": [tasks.shapes, "--codec", "int8", "--data", tasks.data, "-o", folder / "coded.pet"],
        "import-peft": [adapter, "--backbone", tasks.spec, "--img-size", 32, "-o", folder / "back.pet"],
        "export-peft": [tasks.tints, "-o", folder / "adapter"],
    }
    found = {}
    for verb, given in words.items():
        said = edgepet(verb.split()[0], *given, "--json", "--quiet")
        assert said.code == 0, said.err
        found[verb] = sorted(path for path in keys(said.json) if not re.search(r"\.(versions|files|per_class)\.", path))
    return found


def test_no_verb_has_lost_a_key(spoken: Any) -> None:
    known = json.loads((GOLDEN / "json_keys.json").read_text())

    assert {verb: sorted(set(paths) - set(spoken[verb])) for verb, paths in known.items()} == {v: [] for v in known}


def test_no_verb_has_lost_an_option() -> None:
    known = json.loads((GOLDEN / "options.json").read_text())

    assert {verb: sorted(set(told) - set(flags(verb))) for verb, told in known.items()} == {verb: [] for verb in known}
