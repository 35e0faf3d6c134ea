"""The verbs of a device's folder, and what it says where something in it is not as it should be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepet import Device, read_pack
from edgepet.canonical import canonical_json
from edgepet.deltas.probe import Probe
from edgepet.device.caches import derived
from edgepet.device.checking import check
from edgepet.device.generations import (
    Candidate,
    Generation,
    as_json,
    from_json,
    installing,
    rolling_back,
    serving,
    withholding,
)
from edgepet.device.graph_states import GraphState
from edgepet.device.runtime import TaskNetwork
from edgepet.device.store import Store
from edgepet.errors import CheckError, InputError
from edgepet.graphs.base import BaseGraph, graph_at
from edgepet.graphs.manifest import put_stamp
from edgepet.packs.pack import encode_pack, write_pack
from edgepet.spec import NpArray
from tests.flow import Tasks, has_openvino, refused
from tests.flow import edgepet as command

OTHERS = ("ring", "box", "wedge")
DIGITS = "0123456789abcdef"
TOLD = "do not serve it from here: the pack, the backbone or the runtime is not what it was made with"


def said(*arguments: object) -> Any:
    """The JSON of a command that ends well."""
    done = command(*arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture
def newer(tasks: Tasks, tmp_path: Path) -> Path:
    """The task of shapes again, later, with other labels."""
    write_pack(tmp_path / "newer.pet", replace(read_pack(tasks.shapes).delta, labels=OTHERS), sequence=2)
    return tmp_path / "newer.pet"


@pytest.fixture
def image(tasks: Tasks) -> Path:
    return tasks.data / "test" / "square" / "0.png"


# ------------------------------------------------------------------------------------------------------- the verbs


def test_a_store_is_made_filled_run_and_gone_back_in_by_verbs_alone(
    tasks: Tasks, newer: Path, image: Path, tmp_path: Path
) -> None:
    store = tmp_path / "device"

    made = said("device", "init", "--store", store, "--for", tasks.shapes, "--backbone", tasks.spec)
    first = said("device", "install", "--store", store, tasks.shapes, tasks.tints)
    said("device", "install", "--store", store, newer)
    listed = said("device", "list", "--store", store)
    ran = said("device", "run", "--store", store, "shapes", image)
    back = said("device", "rollback", "--store", store, "shapes")
    again = said("device", "run", "--store", store, "shapes", image, "--runtime", "onnxruntime")
    checked = said("device", "check", "--store", store)
    gone = said("device", "remove", "--store", store, "tints")

    assert (made["backbone"], made["tasks"]) == (read_pack(tasks.shapes).delta.backbone, [])
    assert made["bytes"] > 1_000_000
    assert [(each["task"], each["sequence"], each["refused"]) for each in first["installed"]] == [
        ("shapes", 0, {}), ("tints", 0, {}),
    ]  # fmt: skip
    assert (first["task"], first["bytes"]) == ("tints", tasks.tints.stat().st_size)
    assert [(t["task"], t["sequence"], t["state"], t["previous"]) for t in listed["tasks"]] == [
        ("shapes", 2, "active", 0), ("tints", 0, "active", None),
    ]  # fmt: skip
    assert ran["results"][0]["label"] in OTHERS
    assert (ran["sequence"], ran["fell_back"]) == (2, None)
    assert ran["open_ms"] > 0 < ran["latency_ms"]
    assert (back["sequence"], back["state"], back["reason"]) == (0, "rolled back", "rolled back: by command")
    assert again["results"][0]["label"] in ("circle", "square", "triangle")
    assert (checked["ok"], checked["problems"]) == (True, [])
    assert gone == {"task": "tints"}
    assert [task["task"] for task in said("device", "list", "--store", store)["tasks"]] == ["shapes"]


def test_a_folder_is_exported_and_another_device_made_of_it(
    store: Store, tasks: Tasks, newer: Path, image: Path, tmp_path: Path
) -> None:
    device = Device(store.root)
    for pack in (tasks.shapes, tasks.tints, newer):
        device.install(pack)

    out = said("device", "export", "--store", store.root, "shapes", "--to", tmp_path / "card")
    made = said("device", "init", "--store", tmp_path / "other", "--from", tmp_path / "card")

    assert out["tasks"] == made["tasks"] == ["shapes"]
    assert len(list((tmp_path / "card" / "packs").iterdir())) == 1
    assert Device(tmp_path / "other").run("shapes", [image]).sequence == 2
    assert check(Store(tmp_path / "other")) == ()
    assert refused(3, "device", "export", "--store", store.root, "--to", tmp_path / "card") == (
        f"{tmp_path / 'card'}: is there already\n  fix: name another folder\n"
    )


def test_what_cannot_be_done_says_what_can(store: Store, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"

    assert refused(3, "device", "list", "--store", nothing) == (
        f"{nothing}: is no store\n  fix: edgepet device init --store {nothing} --backbone B\n"
    )
    assert refused(3, "device", "run", "--store", store.root, "birds", "a.png") == (
        f"{store.root}: has no task 'birds'\n  fix: installed are: none\n"
    )
    assert refused(3, "device", "init", "--store", nothing) == f"{nothing}: needs --backbone, --for or --from\n"
    assert refused(3, "device", "init", "--store", nothing, "--backbone", "b", "--precision", "fp64") == (
        "--precision: is of fp32, int8, got 'fp64'\n"
    )
    assert refused(3, "device", "require-signature", "--store", store.root, tmp_path / "a.pem") == (
        "require-signature: needs public keys, whose names end in .pub, got 'a.pem'\n  fix: edgepet keygen\n"
    )
    assert not nothing.exists()


def test_a_store_with_a_quota_takes_what_fits(store: Store, tasks: Tasks, newer: Path) -> None:
    held = sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file())
    said("device", "init", "--store", store.root, "--quota", str(held + tasks.shapes.stat().st_size + 2000))

    said("device", "install", "--store", store.root, tasks.shapes)
    told = refused(3, "device", "install", "--store", store.root, newer)

    assert told.startswith(f"{store.root}: may take ")
    assert told.endswith("fix: remove a task, or give it a larger quota with edgepet device init --quota\n")
    assert Device(store.root).list()[0].sequence == 0


# --------------------------------------------------------------------------------------------- what is not as it was


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()  # it may have another name elsewhere
    path.write_bytes(bytes(data))


def pack_of(store: Store) -> Path:
    return store.pack_path(store.now().tasks["shapes"].active)


DAMAGE: dict[str, tuple[Callable[[Store], Path], Callable[[Path], None]]] = {
    "a corrupted pack": (pack_of, flip),
    "a missing pack": (pack_of, lambda path: path.unlink()),
    "another backbone's weights": (lambda store: next(store.root.glob("backbones/*/backbone.safetensors")), flip),
    "another graph": (lambda store: next(store.root.glob("backbones/*/graph-32.onnx")), flip),
    "another description": (lambda store: next(store.root.glob("backbones/*/graph-32.json")), flip),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_damaged_is_named_by_who_runs_it_and_by_check(
    case: str, store: Store, tasks: Tasks, image: Path
) -> None:
    find, damage = DAMAGE[case]
    device = Device(store.root)
    device.install(tasks.shapes)
    damage(path := find(store))

    with pytest.raises(InputError) as refusal:
        device.run("shapes", [image])
    checked = command("device", "check", "--store", store.root)

    assert str(refusal.value).startswith(f"{path}: is damaged or missing")
    assert refusal.value.fix is not None
    assert [problem.where for problem in check(store)] == [str(path)]
    assert checked.code == 4


def test_a_corrupted_pack_is_survived_by_the_one_before(store: Store, tasks: Tasks, newer: Path, image: Path) -> None:
    device = Device(store.root)
    device.install(tasks.shapes)
    device.install(newer)
    flip(pack_of(store))

    ran = device.run("shapes", [image])

    assert (ran.sequence, ran.fell_back) == (0, "is damaged or missing, got another sha256 than its name")
    assert device.list()[0].refused == {"onnxruntime fp32": ran.fell_back}
    assert device.install(newer).refused == {}  # brought again it is whole, and asked again
    assert device.run("shapes", [image]).sequence == 2


def test_a_link_out_of_the_store_is_refused(store: Store, tasks: Tasks, image: Path, tmp_path: Path) -> None:
    device = Device(store.root)
    device.install(tasks.shapes)
    path = pack_of(store)
    shutil.copy(path, tmp_path / "outside.pet")
    path.unlink()
    path.symlink_to(tmp_path / "outside.pet")

    with pytest.raises(InputError) as refusal:
        device.run("shapes", [image])

    assert str(refusal.value).startswith(f"{path}: must be a file or folder of the store itself, got a link\n")
    assert [problem.where for problem in check(store)] == [str(path)]


def test_a_damaged_generation_leaves_the_one_before(store: Store, tasks: Tasks, newer: Path) -> None:
    device = Device(store.root)
    device.install(tasks.shapes)
    device.install(newer)
    latest = max((store.root / "generations").iterdir())
    flip(latest)

    assert device.list()[0].sequence == 0
    assert [problem.where for problem in check(store)] == [str(latest)]
    device.install(newer)
    assert check(store) == ()


def test_generations_that_are_all_damaged_are_named(store: Store, tasks: Tasks) -> None:
    Device(store.root).install(tasks.shapes)
    for path in (store.root / "generations").iterdir():
        flip(path)

    told = refused(3, "device", "list", "--store", store.root)

    assert told.startswith(f"{store.root}: has no generation that is whole, got 0000000002-")


def test_a_store_from_before_generations_says_how_to_make_it_anew(store: Store, tmp_path: Path) -> None:
    (tmp_path / "old" / "tasks").mkdir(parents=True)

    told = refused(3, "device", "list", "--store", tmp_path / "old")

    assert told == (
        f"{tmp_path / 'old'}: was written before stores had generations\n"
        "  fix: edgepet device init into another folder,"
        f" then install {tmp_path / 'old' / 'tasks'}/*.pet there\n"
    )


def test_derived_data_of_another_processor_are_made_again_and_what_was_damaged_too(tmp_path: Path) -> None:
    made = list[str]()

    def of(cpu: str) -> Callable[[], bytes]:
        return lambda: made.append(cpu) or cpu.encode()  # type: ignore[func-returns-value]

    first = derived(tmp_path, "openvino", "graph", {"cpu": "one"}, of("one"))
    again = derived(tmp_path, "openvino", "graph", {"cpu": "one"}, of("one"))
    other = derived(tmp_path, "openvino", "graph", {"cpu": "two"}, of("two"))
    (kept,) = (tmp_path / "cache" / "derived").iterdir()  # the one processor's are gone
    flip(kept)
    mended = derived(tmp_path, "openvino", "graph", {"cpu": "two"}, of("two"))

    assert (first, again, other, mended) == ((b"one", False), (b"one", True), (b"two", False), (b"two", False))
    assert made == ["one", "two", "two"]
    assert [path.name for path in (tmp_path / "cache" / "derived").iterdir()] == [kept.name]


# --------------------------------------------------------------------------------------------------- self-tests


def spoil(monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """Let a runtime answer otherwise than it did."""
    real = TaskNetwork.__call__

    def call(self: TaskNetwork, images: NpArray) -> NpArray:
        return real(self, images) * (1.01 if self.runtime == runtime else 1.0)

    monkeypatch.setattr(TaskNetwork, "__call__", call)


@pytest.mark.skipif(not has_openvino, reason="needs a second runtime")
def test_a_pack_whose_probe_fails_on_one_runtime_is_not_active_there(
    store: Store, tasks: Tasks, newer: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(store.root)
    device.install(tasks.shapes)
    with monkeypatch.context() as patch:
        spoil(patch, "openvino")
        installed = device.install(newer)

    (line,) = device.list()
    assert list(installed.refused) == ["openvino fp32"]
    assert installed.refused["openvino fp32"].startswith("must answer its own probe within ")
    assert (line.sequence, line.state, line.refused) == (2, "partly", installed.refused)
    assert device.run("shapes", [image]).sequence == 2
    there = device.run("shapes", [image], runtime="openvino")
    assert (there.sequence, there.fell_back) == (0, installed.refused["openvino fp32"])


@pytest.mark.parametrize("previous", [True, False])
def test_a_pack_that_begins_to_fail_is_rolled_back_by_itself_and_list_says_why(
    previous: bool, store: Store, tasks: Tasks, newer: Path, image: Path, tmp_path: Path
) -> None:
    """On another machine the same pack answers otherwise: another folder stands for another process here."""
    device = Device(store.root)
    if previous:
        device.install(tasks.shapes, runtime="onnxruntime")
    delta = read_pack(newer).delta
    probe = delta.probes["fp32"]
    wrong = replace(delta, probes={"fp32": Probe(probe.seed, probe.logits + np.float32(1), probe.tolerance)})
    store.install(encode_pack(wrong, sequence=3), ask=lambda pack, precisions: {"onnxruntime fp32": ""})

    if not previous:
        with pytest.raises(CheckError, match="must answer its own probe") as refusal:
            device.run("shapes", [image])
        assert refusal.value.fix == TOLD
        with pytest.raises(CheckError, match="task 'shapes' on onnxruntime fp32: is not served there, got must answer"):
            device.run("shapes", [image])
        assert device.list()[0].state == "refused"
        return
    ran = device.run("shapes", [image])

    (line,) = device.list()
    assert (ran.sequence, line.sequence, line.previous, line.state) == (0, 0, 3, "rolled back")
    assert ran.fell_back is not None
    assert line.reason == f"rolled back: onnxruntime fp32: {ran.fell_back}"
    assert refused(4, "device", "rollback", "--store", store.root, "shapes") == (
        f"task 'shapes': must not go back to a pack that was refused, got {ran.fell_back}\n  fix: install another one\n"
    )


def test_a_runtime_that_raises_hands_over_to_the_pack_before(
    store: Store, tasks: Tasks, newer: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, real, left = Device(store.root), TaskNetwork.__call__, [1]
    device.install(tasks.shapes, runtime="onnxruntime")
    device.install(newer, runtime="onnxruntime")

    def call(self: TaskNetwork, images: NpArray) -> NpArray:
        if left.pop() if left else 0:
            raise InputError("test_vit", "cannot be run by ONNX Runtime", got="out of luck")
        return real(self, images)

    monkeypatch.setattr(TaskNetwork, "__call__", call)
    ran = device.run("shapes", [image])

    assert (ran.sequence, ran.fell_back) == (0, "cannot be run by ONNX Runtime, got out of luck")
    assert device.list()[0].reason == "rolled back: onnxruntime fp32: cannot be run by ONNX Runtime, got out of luck"


def test_a_machine_on_which_no_pack_runs_blames_none_of_them(
    store: Store, tasks: Tasks, newer: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(store.root)
    device.install(tasks.shapes, runtime="onnxruntime")
    device.install(newer, runtime="onnxruntime")
    before = store.now()

    def call(self: TaskNetwork, images: NpArray) -> NpArray:
        raise InputError("test_vit", "cannot be run by ONNX Runtime", got="out of memory")

    monkeypatch.setattr(TaskNetwork, "__call__", call)
    with pytest.raises(InputError, match="out of memory"):
        device.run("shapes", [image])

    assert store.now() == before


def test_an_image_that_cannot_be_read_is_no_packs_fault(
    store: Store, tasks: Tasks, newer: Path, tmp_path: Path
) -> None:
    device = Device(store.root)
    device.install(tasks.shapes)
    device.install(newer)
    (tmp_path / "no.png").write_bytes(b"no")

    with pytest.raises(InputError, match=r"no\.png"):
        device.run("shapes", [tmp_path / "no.png"])

    assert device.list()[0].state == "active"


# ------------------------------------------------------------------------------------------------------ the verdicts


def candidate(sequence: int = 0, **changes: Any) -> Candidate:
    digest = f"{sequence:064x}"
    made = Candidate(
        task="a", sha256=digest, size_bytes=10, sequence=sequence, signed_by=None, key="", backbone="vit",
        dense=f"{DIGITS}/graph-9.json", int8=f"{DIGITS}/graph-9-int8.json", codes=None, trunk=None,
    )  # fmt: skip
    return replace(made, **changes)


EMPTY = Generation(graphs={f"{DIGITS}/graph-9.json": GraphState(sha256="0" * 64)})


def test_a_task_that_was_removed_does_not_come_back_older(store: Store, tasks: Tasks, newer: Path) -> None:
    device = Device(store.root)
    device.install(newer)
    device.remove("shapes")

    told = refused(4, "device", "install", "--store", store.root, tasks.shapes)

    assert told == (
        "task 'shapes': must not be older than what was installed before, which had the sequence number 2, got 0\n"
        "  fix: install it with --older if that is meant\n"
    )
    assert device.install(tasks.shapes, older=True).sequence == 0
    assert device.install(tasks.shapes).sequence == 0


def test_another_signers_numbers_are_its_own() -> None:
    now = installing(EMPTY, candidate(7, signed_by="one", key="11"), {})

    assert installing(now, candidate(2, signed_by="two", key="22"), {}).tasks["a"].active.sequence == 2
    with pytest.raises(CheckError, match="sequence number 7, got 2"):
        installing(now, candidate(2, signed_by="one by another name", key="11"), {})


def test_who_signed_while_nobody_asked_is_held_to_it_when_keys_are_trusted() -> None:
    now = replace(installing(EMPTY, candidate(7), {}), requires_signature=True)

    with pytest.raises(CheckError, match="sequence number 7, got 2"):
        installing(now, candidate(2, signed_by="one", key="11"), {})
    now = installing(now, candidate(8, signed_by="one", key="11"), {})
    assert now.floors == {"a": {"": 7, "11": 8}}
    with pytest.raises(CheckError, match="must not go back to a pack that nobody trusted has signed"):
        rolling_back(now, "a", "s")


def test_the_pack_before_is_the_last_one_that_was_served() -> None:
    now = installing(EMPTY, candidate(1), {"x": ""})
    now = installing(now, candidate(2), {"x": ""})
    now = withholding(now, "a", candidate(2).sha256, "x", "no")

    state = now.tasks["a"]
    assert (state.active.sequence, state.previous and state.previous.sequence, state.state) == (1, 2, "rolled back")
    after = installing(now, candidate(3), {"x": ""}).tasks["a"]
    assert (after.active.sequence, after.previous and after.previous.sequence) == (3, 1)


def test_going_back_twice_is_going_forward() -> None:
    now = installing(installing(EMPTY, candidate(1), {}), candidate(2), {})

    once = rolling_back(now, "a", "s")
    twice = rolling_back(once, "a", "s")

    assert once.tasks["a"].active.sequence == 1
    assert twice.tasks["a"].active.sequence == 2


def test_where_neither_pack_is_served_nothing_is() -> None:
    now = installing(installing(EMPTY, candidate(1), {"x": "", "y": ""}), candidate(2), {"x": "bad", "y": ""})

    assert serving(now, "a", "x", "s").sequence == 1
    assert serving(now, "a", "y", "s").sequence == 2
    now = withholding(now, "a", candidate(1).sha256, "x", "worse")
    with pytest.raises(CheckError) as refusal:
        serving(now, "a", "x", "s")
    assert str(refusal.value) == "task 'a' on x: is not served there, got bad\n  fix: install another pack of it"


def test_a_generation_is_read_as_it_was_written() -> None:
    now = replace(
        installing(installing(EMPTY, candidate(1, signed_by="k"), {"x": ""}), candidate(2, signed_by="k"), {"x": "no"}),
        quota_bytes=5,
        requires_signature=True,
    )

    assert from_json(json.loads(json.dumps(as_json(now))), "s") == now
    int8 = {
        f"{DIGITS}/graph-9-int8.json": GraphState(sha256="0" * 64, codes="1" * 64, ranges="2" * 64, coming="3" * 64)
    }
    assert from_json(json.loads(json.dumps(as_json(replace(now, graphs=int8)))), "s").graphs == int8
    with pytest.raises(InputError, match="this edgepet reads stores of version 1"):
        from_json({**as_json(now), "edgepet-store": 2}, "s")
    with pytest.raises(InputError, match="knows no key 'more'"):
        from_json({**as_json(now), "more": 1}, "s")
    outside = {"../../x/graph-9.json": GraphState(sha256="0" * 64)}
    with pytest.raises(InputError, match="needs the name of a graph's description"):
        from_json(as_json(replace(now, graphs=outside)), "s")
    with pytest.raises(InputError, match="needs 64 hex digits"):
        from_json(as_json(replace(now, graphs={f"{DIGITS}/graph-9.json": GraphState(sha256="../x")})), "s")
    with pytest.raises(InputError, match="needs a task's name"):
        from_json(as_json(replace(now, tasks={"../x": now.tasks["a"]})), "s")


def test_a_graph_with_other_codes_is_no_graph_for_a_pack() -> None:
    now = replace(EMPTY, graphs={f"{DIGITS}/graph-9-int8.json": GraphState(sha256="0" * 64, codes="c" * 64)})

    with pytest.raises(InputError) as refusal:
        installing(now, candidate(codes="d" * 64), {})
    assert str(refusal.value) == (
        "task 'a': has ranges for the int8 codes dddddddddddd, got cccccccccccc in this store\n"
        "  fix: run edgepet calibrate with -o again"
    )
    with pytest.raises(InputError, match=rf"needs vit as {DIGITS}/graph-9\.json, which is not in this store"):
        installing(now, candidate(), {})
    with pytest.raises(InputError) as refusal:
        installing(now, candidate(codes="c" * 64, trunk="d" * 64), {})
    assert str(refusal.value) == (
        "task 'a': needs the int8 backbone's own ranges dddddddddddd for its trunk, got none in this store\n"
        "  fix: bring the int8 backbone of the host that calibrated it, or calibrate it again where this one is from"
    )


def test_a_store_that_requires_signatures_and_lost_its_keys_takes_nothing(
    store: Store, tasks: Tasks, graph: BaseGraph, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    assert command("keygen", "-o", tmp_path / "maker").code == 0
    assert said("device", "require-signature", "--store", store.root, tmp_path / "maker.pub") == {"keys": ["maker"]}
    shutil.rmtree(store.root / "trusted")

    told = refused(4, "device", "install", "--store", store.root, tasks.shapes)

    assert told == (
        f"shapes.pet: must be signed by a key in {store.root / 'trusted'}, got no key there\n"
        "  fix: edgepet device require-signature KEY.pub\n"
    )
    assert [problem.what for problem in check(store)] == ["signatures are required, and there is no key"]
    put_stamp(graph.folder / "backbone.safetensors", "0" * 64)  # a stamp of the cache's is none of the store's
    assert store.graphs()[0].stem == graph.stem


# --------------------------------------------------------------------------------------------- what a card may bring


def test_a_card_brings_no_keys_and_no_packs_into_a_store_that_is_there(
    store: Store, tasks: Tasks, newer: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    Device(store.root).install(newer)
    said("device", "init", "--store", tmp_path / "card", "--from", store.root)
    assert command("keygen", "-o", tmp_path / "stranger").code == 0
    said("device", "require-signature", "--store", tmp_path / "card", tmp_path / "stranger.pub")
    Device(store.root).remove("shapes")
    before = store.now()

    said("device", "init", "--store", store.root, "--from", tmp_path / "card")

    assert store.now() == before
    assert store.trusted_keys() == {}


def test_a_graph_whose_files_differ_from_those_that_are_used_is_refused(store: Store, tmp_path: Path) -> None:
    (graph,) = store.graphs()
    other = tmp_path / "other" / "backbones" / graph.folder.name
    shutil.copytree(graph.folder, other)
    data = bytearray((other / "backbone.safetensors").read_bytes())
    data[-1] ^= 1
    for name in ("backbone.safetensors", "graph-32.json"):
        (other / name).unlink()
    (other / "backbone.safetensors").write_bytes(data)
    told = json.loads((graph.folder / "graph-32.json").read_text())
    told["files"]["backbone.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    told["files"]["graph-48.onnx"] = told["files"].pop("graph-32.onnx")
    told["preprocess"]["image_size"] = [48, 48]
    (other / "graph-32.onnx").rename(other / "graph-48.onnx")
    told["files"].pop("graph-32.safetensors", None)
    (other / "graph-48.json").write_bytes(canonical_json(told))

    with pytest.raises(InputError) as refusal:
        store.add_graph(graph_at(other / "graph-48.json"))

    weights = store.root / "backbones" / graph.folder.name / "backbone.safetensors"
    assert str(refusal.value).startswith(f"{weights}: is another file than the graph's that comes, got ")
    assert check(store) == ()


def test_a_fingerprint_that_leads_elsewhere_is_none(store: Store) -> None:
    (graph,) = store.graphs()
    path = graph.folder / "graph-32.json"
    told = json.loads(path.read_text())
    path.unlink()
    path.write_bytes(canonical_json({**told, "fingerprint": "../../../evil"}))

    with pytest.raises(InputError, match=r"graph-32\.json\.fingerprint: needs sha256: and 64 hex digits, got"):
        graph_at(path)


def test_a_generation_of_a_later_version_is_neither_passed_over_nor_cleared(store: Store, tasks: Tasks) -> None:
    Device(store.root).install(tasks.shapes)
    text = canonical_json({**as_json(store.now()), "edgepet-store": 2, "number": 9})
    later = store.root / "generations" / f"{9:010d}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    later.write_bytes(text)

    for action in (lambda: store.now(), lambda: store.limit(10**9), lambda: store.install(tasks.tints)):
        with pytest.raises(InputError, match="this edgepet reads stores of version 1"):
            action()
    assert later.exists()


def test_a_store_that_lost_its_generations_is_not_taken_for_an_empty_one(store: Store, tasks: Tasks) -> None:
    Device(store.root).install(tasks.shapes)
    shutil.rmtree(store.root / "generations")

    told = refused(3, "device", "init", "--store", store.root, "--quota", "1GB")

    assert told.startswith(f"{store.root}: has no generation that is whole, got none at all beside its packs\n")
    assert command("device", "check", "--store", store.root).code == 4
    assert len(list((store.root / "packs").iterdir())) == 1


def test_a_place_that_is_no_store_is_said_to_be_none(store: Store, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"

    assert [problem.what for problem in check(Store(nowhere))] == ["is no store"]
    assert refused(3, "device", "init", "--store", store.root, "--from", nowhere) == (
        f"{nowhere}: is no store\n  fix: name one that edgepet device export or init made\n"
    )
    assert refused(3, "device", "rollback", "--store", nowhere, "a") == (
        f"{nowhere}: has no task 'a'\n  fix: installed are: none\n"
    )
    (tmp_path / "file").touch()
    assert refused(3, "device", "export", "--store", store.root, "--to", tmp_path / "file") == (
        f"{tmp_path / 'file'}: is there already\n  fix: name another folder\n"
    )
    assert not nowhere.exists()


def test_a_folder_that_is_a_link_is_not_cleared_through(store: Store, graph: BaseGraph, tmp_path: Path) -> None:
    (folder,) = (store.root / "backbones").iterdir()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "graph-99.onnx").write_bytes(b"another's")

    with pytest.raises(InputError, match="must be a file or folder of the store itself, got a link"):
        store.add_graph(graph)

    store.limit(10**9)
    assert (tmp_path / "elsewhere" / "graph-99.onnx").exists()
    assert [problem.where for problem in check(store)] == [str(folder)]
    with pytest.raises(InputError, match="got a link"):
        store.graphs()


def test_all_answers_are_of_one_pack(store: Store, tasks: Tasks, newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, real, calls = Device(store.root), TaskNetwork.__call__, list[int]()
    device.install(tasks.shapes, runtime="onnxruntime")
    device.install(newer, runtime="onnxruntime")

    def call(self: TaskNetwork, images: NpArray) -> NpArray:
        calls.append(1)
        if len(calls) == 3:
            raise InputError("test_vit", "cannot be run by ONNX Runtime", got="out of luck")
        return real(self, images)

    monkeypatch.setattr(TaskNetwork, "__call__", call)
    ran = device.run("shapes", [tasks.data / "test"])

    assert ran.sequence == 0
    assert {answer.label for answer in ran.results} <= {"circle", "square", "triangle"}
    assert len(ran.results) == len(list((tasks.data / "test").rglob("*.png")))


def test_a_pack_without_a_probe_has_to_answer_at_all(
    store: Store, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: TaskNetwork, images: NpArray) -> NpArray:
        raise CheckError(self.runtime, "must give finite answers", got="NaN or infinity")

    monkeypatch.setattr(TaskNetwork, "__call__", call)
    with pytest.raises(CheckError, match="must give finite answers, got NaN or infinity"):
        Device(store.root).install(encode_pack(replace(read_pack(tasks.shapes).delta, probes={})))
    assert store.tasks() == ()
