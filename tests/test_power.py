"""A store on a disk that fails, fills, loses power or lacks what others have: a whole generation is there."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgepet import Device, EdgepetError, read_pack
from edgepet.device.checking import check
from edgepet.device.generations import Generation, as_json
from edgepet.device.store import Store
from edgepet.graphs.base import graph_at
from edgepet.graphs.int8 import int8_at
from edgepet.packs.pack import encode_pack
from tests.disk import Call, Cut, Killed, PoorDisk, RecordingDisk, broken, full, lay_down, using
from tests.golden.make import CLASSES

GOLDEN = Path(__file__).parent / "golden" / "tasks" / "device"
BACKBONE = "e3e1911551ef691e"
SOME = 37  # every so-many-th outcome of a power cut, in the fast suite
Change: type = Callable[[Store], object]


def packs() -> list[bytes]:
    """The golden shapes, and others of that task that differ in their labels."""
    delta = Store(GOLDEN).pack("shapes").delta
    return [
        encode_pack(replace(delta, labels=tuple(f"{name}{k}" for name in CLASSES)), sequence=k) for k in range(1, 5)
    ]


PACKS = packs()


@dataclass(frozen=True)
class Operation:
    """What is done to a store that ``before`` has prepared."""

    before: tuple[Change, ...]
    change: Change


def copied(source: Path) -> Callable[[Store], object]:
    """Bring the golden graph from a folder of our own: by second names."""
    return lambda store: store.add_graph(graph_at(source / "backbones" / BACKBONE / "graph-16.json"))


def install(number: int) -> Change:
    return lambda store: store.install(PACKS[number])


def bring(store: Store) -> object:
    """The golden graphs, from files beside the store that only we may write."""
    source = store.root.parent / "source"
    if not source.exists():
        shutil.copytree(GOLDEN, source)
    return store.add_graph(int8_at(source / "backbones" / BACKBONE / "graph-16-int8.json"))


def limited(store: Store) -> object:
    """Room for the packs, and not for much besides."""
    return store.limit(70_000)


def evict(store: Store) -> object:
    """A pack for which derived data have to go."""
    (store.root / "cache" / "derived").mkdir(parents=True, exist_ok=True)
    (store.root / "cache" / "derived" / f"{'a' * 16}-{'b' * 16}-{'c' * 64}.bin").write_bytes(bytes(60_000))
    return store.install(PACKS[1])


OPERATIONS: Mapping[str, Operation] = {
    "bring a backbone": Operation((), bring),
    "the first pack": Operation((bring,), install(0)),
    "a third pack": Operation((bring, install(0), install(1)), install(2)),
    "roll back": Operation((bring, install(0), install(1)), lambda store: store.rollback("shapes")),
    "remove": Operation((bring, install(0), install(1)), lambda store: store.remove("shapes")),
    "evict": Operation((bring, install(0), limited), evict),
    "refuse": Operation((bring, install(0), install(1)), lambda store: store.refuse("shapes", sha(1), "x fp32", "no")),
}


def sha(number: int) -> str:
    return read_pack(PACKS[number]).sha256


def prepared(name: str, folder: Path) -> Store:
    store = Store(folder / "device")
    for step in OPERATIONS[name].before:
        step(store)
    return store


def meaning(generation: Generation) -> dict[str, Any]:
    """A generation without its number: who tries again makes the next one."""
    return {key: value for key, value in as_json(generation).items() if key != "number"}


def require_whole(store: Store, *allowed: Generation) -> None:
    """One of these generations counts, and everything that it names is whole."""
    now = store.now()
    assert meaning(now) in [meaning(each) for each in allowed]
    assert [problem.what for problem in check(store)] == ([] if now.number else ["is no store"])
    for task, state in now.tasks.items():
        for pack in (state.active, state.previous):
            assert pack is None or store.pack_of(task, pack).sha256 == pack.sha256


def files_of(store: Store) -> set[str]:
    """Names of all files but those of caches, with the numbers of generations left out."""
    found = set()
    for path in store.root.rglob("*"):
        if path.is_file() and "cache" not in path.parts:
            name = path.relative_to(store.root).as_posix()
            found.add("generation" if name.startswith("generations/") else name)
    return found


@dataclass(frozen=True)
class Clean:
    """An operation that went well: generations before and after it, its calls, and the files that it leaves."""

    before: Generation
    after: Generation
    calls: tuple[Call, ...]
    start: Path
    files: set[str]


def went_well(name: str, folder: Path) -> Clean:
    store = prepared(name, folder / "clean")
    before, start = store.now(), folder / "start"
    if store.root.exists():
        shutil.copytree(store.root, start)
    with using(RecordingDisk()) as recorded:
        OPERATIONS[name].change(store)
    return Clean(before, store.now(), tuple(recorded.calls), start, files_of(store))


def again(name: str, store: Store, clean: Clean) -> None:
    """A second try succeeds, and one change more leaves no file that nobody names."""
    if meaning(store.now()) != meaning(clean.after):
        OPERATIONS[name].change(store)
    assert meaning(store.now()) == meaning(clean.after)
    store.limit(10**9)
    store.limit(None)
    left = {each for each in files_of(store) if each.startswith("packs/") or each.endswith(".part")}
    assert left == {f"packs/{digest}.pet" for digest in clean.after.packs}


def every_fault(name: str, fault: Callable[[], BaseException], tmp_path: Path, step: int) -> None:
    clean = went_well(name, tmp_path)
    for at in range(0, len(clean.calls), step):
        store = prepared(name, tmp_path / str(at))
        with using(RecordingDisk(at=at, fault=fault)), contextlib.suppress(EdgepetError, Killed):
            OPERATIONS[name].change(store)

        require_whole(store, clean.before, clean.after)
        again(name, store, clean)


FAULTS = pytest.mark.parametrize("fault", [full, broken, Killed], ids=["full", "broken", "killed"])


@FAULTS
@pytest.mark.parametrize("name", OPERATIONS)
def test_when_a_call_fails_the_old_or_the_new_generation_is_whole(
    name: str, fault: Callable[[], BaseException], tmp_path: Path
) -> None:
    every_fault(name, fault, tmp_path, step=6)


@pytest.mark.slow
@FAULTS
@pytest.mark.parametrize("name", OPERATIONS)
def test_whichever_call_fails_the_old_or_the_new_generation_is_whole(
    name: str, fault: Callable[[], BaseException], tmp_path: Path
) -> None:
    every_fault(name, fault, tmp_path, step=1)


def cuts(clean: Clean, root: Path, calls: list[Call]) -> list[tuple[int, dict[Path, bytes]]]:
    """What the disk may hold when the power goes after each number of calls."""
    found: list[tuple[int, dict[Path, bytes]]] = []
    cut = Cut.of(root)
    for count in range(len(calls) + 1):
        trees = list({tuple(sorted(tree.items())): tree for tree in cut.outcomes()}.values())
        found += [(count, tree) for tree in trees]
        if count < len(calls):
            cut.do(calls[count])
    return found


def replayed(name: str, folder: Path) -> tuple[Clean, Path]:
    """An operation as it was recorded, and the folder that its paths are of, as it was before."""
    clean = went_well(name, folder)
    root = folder / "clean" / "device"
    shutil.rmtree(root)
    if clean.start.exists():
        shutil.copytree(clean.start, root)
    return clean, root


def is_whole_after(clean: Clean, tree: dict[Path, bytes], done: bool, root: Path, place: Path) -> bool:
    """Whether the invariants hold on the disk ``tree``; of an operation that had ended, that it is done."""
    lay_down(tree, root, place)
    try:
        require_whole(Store(place), *([clean.after] if done else [clean.before, clean.after]))
    except (AssertionError, EdgepetError):
        return False
    return True


def every_outcome(name: str, folder: Path, step: int) -> None:
    clean, root = replayed(name, folder)
    outcomes = cuts(clean, root, list(clean.calls))
    for number, (count, tree) in enumerate(outcomes):
        if number % step and number != len(outcomes) - 1:
            continue
        place = folder / "cut" / str(number) / "device"
        assert is_whole_after(clean, tree, count == len(clean.calls), root, place), (name, count, sorted(tree))
        again(name, Store(place), clean)
        shutil.rmtree(place.parent)


@pytest.mark.parametrize("name", OPERATIONS)
def test_whenever_the_power_goes_the_old_or_the_new_generation_is_whole(name: str, tmp_path: Path) -> None:
    every_outcome(name, tmp_path, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_whenever_the_power_goes_in_whatever_order_the_generation_is_whole(name: str, tmp_path: Path) -> None:
    every_outcome(name, tmp_path, 1)


def no_sync_is_idle(name: str, folder: Path) -> None:
    """Without any one of them there is an outcome of a power cut that the other tests would find."""
    clean, root = replayed(name, folder)
    syncs = {(call.name, call.path, call.file) for call in clean.calls if call.name.startswith("sync")}
    assert syncs
    for number, left_out in enumerate(sorted(syncs, key=str)):
        calls = [call for call in clean.calls if (call.name, call.path, call.file) != left_out]
        place = folder / "cut" / str(number)
        assert not all(
            is_whole_after(clean, tree, count == len(calls), root, place / str(n) / "device")
            for n, (count, tree) in enumerate(cuts(clean, root, calls))
        ), (name, left_out)


@pytest.mark.parametrize("name", ["the first pack", "a third pack"])
def test_no_sync_can_be_left_out(name: str, tmp_path: Path) -> None:
    no_sync_is_idle(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_sync_of_any_change_can_be_left_out(name: str, tmp_path: Path) -> None:
    no_sync_is_idle(name, tmp_path)


def test_a_memory_card_without_second_names_and_permissions_holds_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "device")
    with using(PoorDisk()):
        bring(store)
        for number in range(3):
            install(number)(store)
        store.rollback("shapes")

    assert check(store) == ()
    assert store.pack("shapes").sequence == 2
    names = [path.name for path in store.root.rglob("*") if path.is_file()]
    assert len({name.lower() for name in names}) == len(names)  # two that differ in case alone would be one there


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    """A real exFAT, in a file, where this machine lets us mount one."""
    if not all(map(shutil.which, ("mkfs.exfat", "mount.exfat-fuse", "losetup", "umount"))):
        pytest.skip("needs the Debian packages exfatprogs and exfat-fuse")
    image, place = tmp_path / "card.img", tmp_path / "card"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    ask = partial(subprocess.run, capture_output=True, text=True, check=False)
    ask(["mkfs.exfat", str(image)])
    device = ask(["losetup", "-f", "--show", str(image)]).stdout.strip()
    try:
        if not device or ask(["mount.exfat-fuse", device, str(place)]).returncode:
            pytest.skip("needs a machine that mounts")
        yield place
        ask(["umount", str(place)])
    finally:
        ask(["losetup", "-d", device or "none"])


@pytest.mark.slow
def test_a_real_memory_card_holds_a_store(exfat: Path, tmp_path: Path) -> None:
    store = Store(exfat / "Device")
    store.add_graph(graph_at(GOLDEN / "backbones" / BACKBONE / "graph-16.json"))
    for number in range(3):
        install(number)(store)
    store.rollback("shapes")

    assert check(store) == ()
    assert Store(exfat / "device").pack("shapes").sequence == 2  # there case is no matter
    with using(RecordingDisk(at=1, fault=full)), pytest.raises(EdgepetError):
        install(3)(store)
    assert check(store) == ()


def test_a_disk_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    store = prepared("roll back", tmp_path)

    with using(RecordingDisk(at=0, fault=Killed)):
        assert Device(store.root).tasks() == ("shapes",)
        assert store.pack("shapes").sequence == 2
        assert check(store) == ()


def test_what_the_store_maps_is_not_what_others_may_write(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "source")
    weights = tmp_path / "source" / "backbones" / BACKBONE / "backbone.safetensors"
    weights.chmod(0o666)
    Store(tmp_path / "device").add_graph(graph_at(weights.parent / "graph-16.json"))

    brought = tmp_path / "device" / "backbones" / BACKBONE
    assert not (brought / "backbone.safetensors").samefile(weights)
    assert (brought / "graph-16.onnx").samefile(weights.parent / "graph-16.onnx")
    assert {path.stat().st_mode & 0o222 for path in brought.iterdir()} == {0}


WRITER = """
    import sys
    from pathlib import Path
    from edgepet.device.store import Store
    store, data = Store(Path(sys.argv[1])), [Path(each).read_bytes() for each in sys.argv[2:]]
    for number in range(30):
        store.install(data[number % len(data)], older=True)
"""
READER = """
    import sys, time
    from pathlib import Path
    from edgepet.device.store import Store
    store, seen, until = Store(Path(sys.argv[1])), set(), time.monotonic() + 2
    while time.monotonic() < until:
        seen.add(store.pack("shapes").sequence)
    print(sorted(seen))
"""


def test_two_who_write_and_three_who_read_do_not_see_each_other(tmp_path: Path) -> None:
    store = prepared("a third pack", tmp_path)
    files = []
    for number, data in enumerate(PACKS):
        files.append(tmp_path / f"{number}.pet")
        files[-1].write_bytes(data)

    def start(code: str, *given: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), str(store.root), *map(str, given)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    readers = [start(READER) for _ in range(3)]
    writers = [start(WRITER, *files[:2]), start(WRITER, *files[2:])]
    said = [each.communicate(timeout=120) for each in (*writers, *readers)]

    assert [(each.returncode, errors) for each, (_, errors) in zip((*writers, *readers), said, strict=True)] == [
        (0, "")
    ] * 5
    assert check(store) == ()
    assert store.now().number == 3 + 60
    assert len(files_of(store) & {f"packs/{sha(number)}.pet" for number in range(4)}) <= 3


@pytest.mark.slow
def test_ten_thousand_changes_with_faults_among_them_leave_a_whole_store(tmp_path: Path) -> None:
    chosen, store = random.Random(17), prepared("the first pack", tmp_path)
    changes: list[Change] = [
        *(lambda s, data=data: s.install(data, older=True) for data in PACKS),
        lambda s: s.rollback("shapes"),
        lambda s: s.remove("shapes"),
        lambda s: s.refuse("shapes", sha(chosen.randrange(4)), f"r{chosen.randrange(2)} fp32", "no"),
    ]
    for number in range(10_000):
        before, change = store.now(), chosen.choice(changes)
        fault, at = chosen.choice([full, broken, Killed]), chosen.choice([None, None, None, chosen.randrange(14)])
        with using(RecordingDisk(at=at, fault=fault)), contextlib.suppress(EdgepetError, Killed):
            change(store)
        now = store.now()
        assert now.number in (before.number, before.number + 1), number
        assert {path.stem for path in (store.root / "packs").glob("*.pet")} >= now.packs
        if number % 50 == 0:
            assert check(store) == ()
    store.limit(10**9)
    assert len(list(store.root.rglob("*"))) < 30
