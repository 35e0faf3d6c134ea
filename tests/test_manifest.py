"""A manifest cannot lead out of its folder, and files are what it lists: whole messages, through the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from edgepet import Device, EdgepetError, read_pack
from edgepet.device.checking import check
from edgepet.device.store import Store
from edgepet.errors import InputError
from edgepet.graphs.base import BaseGraph, graph_at, open_graph
from edgepet.graphs.int8 import int8_at
from edgepet.graphs.manifest import put_stamp, require_whole
from edgepet.graphs.tensor_files import read_tensors, safetensors_places
from tests.flow import RUNTIMES, refused

GOLDEN = Path(__file__).parent / "golden" / "tasks"
BACKBONE = Path("backbones") / "e3e1911551ef691e"
DIGEST = "0" * 64
Change: TypeAlias = Callable[[Any], None]


def rename(name: str) -> Change:
    """One more file of this name, which is none of the folder's own."""

    def change(manifest: Any) -> None:
        manifest["files"][name] = {"sha256": DIGEST, "bytes": 7}

    return change


def without(name: str) -> Change:
    return lambda manifest: manifest["files"].pop(name)


def emptied(manifest: Any) -> None:
    manifest["files"] = {}


def digest(text: str) -> Change:
    return lambda manifest: next(iter(manifest["files"].values())).update(sha256=text)


def size(value: object) -> Change:
    return lambda manifest: next(iter(manifest["files"].values())).update(bytes=value)


def many(manifest: Any) -> None:
    manifest["files"] |= {f"{i}.bin": {"sha256": DIGEST, "bytes": 1} for i in range(70)}


MEND = "edgepet device init --store STORE --for TASK.pet on a host, or --from a folder that has it whole"
OUTSIDE = ["../secret", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "", "x" * 256, "new\nline", "nul\0"]

# What is changed in the manifest, and what is said of it; WHERE is the place that the message begins with.
EVERYWHERE: dict[str, tuple[Change, str]] = {
    **{
        f"names {name[:12]!r}": (rename(name), f"WHERE.files: names files of its own folder, got {name[:80]!r}")
        for name in OUTSIDE
    },
    "no files": (emptied, "WHERE.files: needs between 1 and 64 files, got 0"),
    "digest too short": (digest("abc"), "FIRST.sha256: needs a sha256 of 64 digits, got 'abc'"),
    "digest in capitals": (digest("A" * 64), f"FIRST.sha256: needs a sha256 of 64 digits, got {'A' * 64!r}"),
    "negative size": (size(-1), "FIRST.bytes: needs an integer of at least 0, got -1"),
    "size that is none": (size(True), "FIRST.bytes: needs an integer of at least 0, got True"),
}
GRAPH_KNOWS = "knows backbone.safetensors, graph-16.onnx, graph-16.safetensors"
GRAPH = {
    **EVERYWHERE,
    "one file more": (rename("more.bin"), f"WHERE.files: {GRAPH_KNOWS}, got 'more.bin'"),
    "without the weights": (without("backbone.safetensors"), "WHERE.files: must list backbone.safetensors"),
    "without the graph": (without("graph-16.onnx"), "WHERE.files: must list graph-16.onnx"),
}
INT8 = {
    **EVERYWHERE,
    "without the codes": (without("backbone-int8.safetensors"), "WHERE.files: must list backbone-int8.safetensors"),
    "without a runtime's graph": (
        without("graph-16-int8-openvino.onnx"), "WHERE.files: must list graph-16-int8-openvino.onnx",
    ),
    "another weight": (
        lambda manifest: manifest["layers"][0].update(weight="nosuch"),
        "WHERE: stem: speaks of a tensor that is not there, got nosuch.codes",
    ),
    "another bias": (
        lambda manifest: manifest["layers"][0].update(bias="nosuch"),
        "WHERE: stem: speaks of a tensor that is not there, got nosuch",
    ),
    "another vector": (
        lambda manifest: manifest["vectors"].append("nosuch"),
        "WHERE: vectors: speaks of a tensor that is not there, got nosuch",
    ),
}  # fmt: skip
ARTIFACT = {**EVERYWHERE, "too many files": (many, "WHERE.files: needs between 1 and 64 files, got 71")}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The golden store, to be spoiled: files that are linked to nothing."""
    shutil.copytree(GOLDEN / "device", tmp_path / "device")
    return tmp_path / "device"


def spoil(path: Path, change: Change) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def said(message: str, where: str, first: str) -> str:
    """A message of the tables, with the places that it is about."""
    return message.replace("WHERE", where).replace("FIRST", f"{where}.files.{first}")


@pytest.mark.parametrize("case", GRAPH)
def test_a_graphs_description_is_refused(case: str, store: Path) -> None:
    change, message = GRAPH[case]
    spoil(store / BACKBONE / "graph-16.json", change)

    with pytest.raises(InputError) as refusal:
        graph_at(store / BACKBONE / "graph-16.json")

    assert str(refusal.value) == said(message, "graph-16.json", "backbone.safetensors")


@pytest.mark.parametrize("case", INT8)
def test_an_int8_graphs_description_is_refused(case: str, store: Path) -> None:
    change, message = INT8[case]
    spoil(store / BACKBONE / "graph-16-int8.json", change)

    with pytest.raises(InputError) as refusal:
        int8_at(store / BACKBONE / "graph-16-int8.json")

    assert str(refusal.value) == said(message, "graph-16-int8.json", "backbone-int8.safetensors")


@pytest.mark.parametrize("case", ARTIFACT)
def test_an_artefacts_manifest_is_refused(case: str, tmp_path: Path) -> None:
    change, message = ARTIFACT[case]
    folder = tmp_path / "exported"
    shutil.copytree(GOLDEN / "artifacts" / "shapes-onnx-fp32", folder)
    spoil(folder / "artifact.json", change)

    told = refused(3, "verify", folder)

    assert told == said(message, str(folder / "artifact.json"), "model.onnx") + "\n"


@pytest.mark.parametrize("name", ["graph-16.json", "graph-16-int8.json"])
def test_a_key_that_appears_twice_is_refused(name: str, store: Path) -> None:
    path = store / BACKBONE / name
    path.write_text(path.read_text().replace('"files":{', '"files":{},"files":{', 1))
    with pytest.raises(InputError) as refusal:
        (int8_at if "int8" in name else graph_at)(path)

    assert (
        str(refusal.value) == f"{path}: is not readable JSON, got a key appears twice\n  fix: delete it and run again"
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_store_reads_no_description_but_the_one_that_was_brought(precision: str, store: Path) -> None:
    path = store / BACKBONE / ("graph-16-int8.json" if precision == "int8" else "graph-16.json")
    path.write_text(path.read_text() + " ")

    told = refused(3, "storage", "--store", store, "--precision", precision)

    assert told == f"{path}: is damaged or missing\n  fix: {MEND}\n"


def test_nothing_is_copied_out_of_a_store(store: Path, tmp_path: Path) -> None:
    (store / "secret").write_bytes(b"outside")
    spoil(store / BACKBONE / "graph-16.json", rename("../../secret"))
    pack = read_pack(GOLDEN / "shapes.pet").delta

    with pytest.raises(InputError, match="names files of its own folder"):
        Store(tmp_path / "other").add_graph(open_graph(pack.fingerprint, pack.preprocess, root=store))

    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------- the file of weights


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """The file with its header changed, its length with it."""

    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return changed


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 16]) + data[-99:]


WHOLE = "is no whole safetensors file"
AGAIN = "\n  fix: delete it and make it again, or copy it"
WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[:-1], f"PATH: {WHOLE}, got 4312 bytes of tensors in a file of 4311{AGAIN}"),
    "longer": (lambda data: data + b"x", f"PATH: {WHOLE}, got 4312 bytes of tensors in a file of 4313{AGAIN}"),
    "empty": (lambda data: b"", f"PATH: {WHOLE}, got a header of 0 bytes in a file of 0{AGAIN}"),
    "a header as long as the disk": (
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        f"PATH: {WHOLE}, got a header of {1 << 60} bytes in a file of 4312{AGAIN}",
    ),
    "a header that is no JSON": (
        lambda data: data[:8] + b"!" + data[9:],
        f"PATH: {WHOLE}, got Expecting value: line 1 column 1 (char 0){AGAIN}",
    ),
    "another number format": (
        header(lambda table: table["fc1.weight"].update(dtype="BF16")),
        "PATH.fc1.weight: has a number format that is not one of F64, F32, F16, I64, I32, I8, U8, BOOL, got BF16",
    ),
    "a shape for fewer bytes": (
        header(lambda table: table["fc1.weight"].update(shape=[16, 7])),
        "PATH.fc1.weight: needs the bytes of F32 [16, 7], got offsets OFFSETS",
    ),
    "tensors that overlap": (
        header(lambda table: table["fc1.bias"].update(data_offsets=table["fc2.bias"]["data_offsets"], shape=[12])),
        f"PATH: {WHOLE}, got tensors that overlap or leave gaps{AGAIN}",
    ),
    "an offset that is none": (
        header(lambda table: table["fc1.bias"].update(data_offsets=[-4, 60])),
        "PATH.fc1.bias.data_offsets[0]: needs an integer of at least 0, got -4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_damaged_file_of_tensors_is_refused(case: str, store: Path) -> None:
    change, message = WEIGHTS[case]
    path = store / BACKBONE / "backbone.safetensors"
    whole = path.read_bytes()
    offsets = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["fc1.weight"]["data_offsets"]
    path.write_bytes(change(whole))

    with pytest.raises(InputError) as refusal:
        safetensors_places(path)

    assert str(refusal.value) == message.replace("PATH", str(path)).replace("OFFSETS", str(offsets))
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", ["flipped", *WEIGHTS])
def test_a_store_whose_weights_are_others_answers_nothing(case: str, runtime: str, store: Path, tmp_path: Path) -> None:
    """Also where the size is the same: the digest of the largest file is compared when the file has changed."""
    path = store / BACKBONE / "backbone.safetensors"
    device, image = Device(store), tmp_path / "grey.png"
    Image.new("RGB", (20, 20), (120, 130, 140)).save(image)
    device.run("shapes", [image], runtime=runtime)  # whole; a stamp is there now
    change = flipped if case == "flipped" else WEIGHTS[case][0]
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(EdgepetError) as refusal:
        device.run("shapes", [image], runtime=runtime)

    assert str(refusal.value) == f"{path}: is damaged or missing\n  fix: {MEND}"


def test_read_tensors_equal_those_of_safetensors_itself(store: Path) -> None:
    path = store / BACKBONE / "backbone.safetensors"
    theirs = safetensors.numpy.load(path.read_bytes())

    ours = read_tensors(path)

    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


# ------------------------------------------------------------------------------------------------------- stamps


def test_a_file_is_read_again_only_where_its_stamp_differs(tmp_path: Path) -> None:
    folder = tmp_path / "backbones" / "0123"
    folder.mkdir(parents=True)
    path = folder / "large.bin"
    path.write_bytes(b"weights")
    files = {"large.bin": ("9" * 64, 7)}  # another digest than the file's: who reads it refuses it
    with pytest.raises(InputError, match="is damaged or missing"):
        require_whole(folder, files, stamped=("large.bin",), fix="x")

    put_stamp(path, "9" * 64)
    require_whole(folder, files, stamped=("large.bin",), fix="x")  # not read

    with pytest.raises(InputError, match="is damaged or missing"):
        require_whole(folder, files, fix="x")  # everything, on request
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="is damaged or missing"):
        require_whole(folder, files, stamped=("large.bin",), fix="x")


def test_a_damaged_stamp_is_no_stamp(tmp_path: Path) -> None:
    folder = tmp_path / "backbones" / "0123"
    folder.mkdir(parents=True)
    (folder / "large.bin").write_bytes(b"weights")
    put_stamp(folder / "large.bin", "9" * 64)
    (stamp,) = (tmp_path / "cache" / "stamps").iterdir()
    stamp.write_text("{")

    with pytest.raises(InputError, match="is damaged or missing"):
        require_whole(folder, {"large.bin": ("9" * 64, 7)}, stamped=("large.bin",), fix="x")


@pytest.fixture
def golden(tmp_path: Path) -> BaseGraph:
    """The golden store's graph, to be brought elsewhere."""
    source = Path(shutil.copytree(GOLDEN / "device", tmp_path / "source"))
    return graph_at(source / BACKBONE / "graph-16.json")


def test_what_is_damaged_in_a_store_is_mended_by_bringing_it_again(golden: BaseGraph, store: Path) -> None:
    path = store / BACKBONE / "backbone.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    (store / BACKBONE / "graph-16.onnx").unlink()
    damaged = [problem.where for problem in check(Store(store))]

    Store(store).add_graph(golden)

    assert damaged == [str(path), str(store / BACKBONE / "graph-16.onnx")]
    assert check(Store(store)) == ()


def test_a_damaged_file_is_not_brought_beside_others(golden: BaseGraph, store: Path) -> None:
    model = store / BACKBONE / "graph-16.onnx"
    model.unlink()
    golden.model_path.write_bytes(flipped(golden.model_path.read_bytes()))

    with pytest.raises(InputError) as refusal:
        Store(store).add_graph(golden)

    assert str(refusal.value) == (
        f"{golden.model_path}: is damaged or missing\n  fix: delete {golden.folder} and make it again"
    )
    assert not model.exists()


def test_two_packs_that_were_swapped_are_refused(store: Path) -> None:
    shapes, tints = sorted((store / "packs").iterdir())
    shapes.rename(store / "aside")
    tints.rename(shapes)
    (store / "aside").rename(tints)

    with pytest.raises(InputError) as refusal:
        Device(store).run("shapes", [])

    assert str(refusal.value) == (
        f"{shapes}: is damaged or missing, got another sha256 than its name\n"
        "  fix: install 'shapes' again, or edgepet device rollback"
    )
