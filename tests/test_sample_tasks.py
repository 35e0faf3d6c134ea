"""Where sample tasks come from: files of packages, and what is made of their contents."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepet.errors import InputError, MissingError
from edgepet.samples.packages import DebianFile, PackageFile
from edgepet.samples.pools import Pools, Task
from edgepet.samples.tasks import TASKS, build_task

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# Debian packages


@pytest.fixture
def system_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages lie where apt-get installs them, whatever the shell says."""
    monkeypatch.delenv("DPKG_ROOT", raising=False)


@pytest.mark.usefixtures("system_root")
def test_a_debian_file_is_read_where_the_package_put_it(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(b"seven")
    digest = digest_of(b"seven")

    assert DebianFile("some-data", "1-1", str(path), digest).read(purpose="demo:x") == b"seven"
    with pytest.raises(InputError) as refused:
        DebianFile("some-data", "1-1", str(path), "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs {path} of some-data 1-1, sha256:{'0' * 16}, got sha256:{digest}\n"
        "  fix: apt-get install some-data=1-1"
    )


@pytest.mark.usefixtures("system_root")
def test_a_missing_debian_package_is_named_with_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as refused:
        DebianFile("some-data", "1-1", str(tmp_path / "absent"), "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs the Debian package 'some-data', got no {tmp_path}/absent\n  fix: apt-get install some-data"
    )


def test_debian_packages_may_be_unpacked_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``dpkg -x`` does it, which needs no rights; dpkg itself calls the folder by the same name."""
    monkeypatch.setenv("DPKG_ROOT", str(tmp_path))
    (tmp_path / "usr/share").mkdir(parents=True)
    (tmp_path / "usr/share/labels.gz").write_bytes(b"seven")
    file = DebianFile("some-data", "1-1", "/usr/share/labels.gz", digest_of(b"seven"))

    assert file.read(purpose="demo:x") == b"seven"
    with pytest.raises(MissingError) as refused:
        replace(file, path="/usr/share/images.gz").read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs the Debian package 'some-data', got no {tmp_path}/usr/share/images.gz\n"
        "  fix: apt-get install some-data"
    )


# Packages of PyPI


def test_a_package_of_another_extra_is_named_with_it() -> None:
    with pytest.raises(MissingError) as refused:
        replace(TASKS["elpv"].files[0], package="edgepet-no-such-package").read(purpose="demo:elpv")

    assert str(refused.value) == (
        "demo:elpv: needs the package 'edgepet-no-such-package', "
        "got No package metadata was found for edgepet-no-such-package\n  fix: pip install 'edgepet[bench]'"
    )


@pytest.mark.usefixtures("system_root")
def test_a_task_names_each_release_that_it_was_made_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"[]")
    debian = [DebianFile(name, "1-1", str(path), digest_of(b"[]")) for name in ("first", "second", "first")]

    def collect(contents: Sequence[bytes]) -> Pools:
        assert list(contents) == [b"[]"] * 3
        return {"train": [], "val": [], "test": []}

    task = Task(classes=("a",), licence="none", files=tuple(debian), seed=1, collect=collect)
    monkeypatch.setitem(TASKS, "tiny", task)

    assert build_task("tiny", tmp_path / "t").source == "deb first=1-1, second=1-1"


# What is made of the contents


def test_garments_are_read_from_the_files_of_their_publisher() -> None:
    def files(labels: list[int]) -> list[bytes]:
        images = np.arange(len(labels) * 28 * 28, dtype=np.uint8)
        return [gzip.compress(bytes(8) + bytes(labels)), gzip.compress(bytes(16) + images.tobytes())]

    pools = TASKS["fashion"].collect([*files([9, 0]), *files([1])])

    assert [(key, label) for key, label, _ in pools["train"]] == [("train00000", "ankleboot"), ("train00001", "tshirt")]
    assert [(key, label) for key, label, _ in pools["test"]] == [("t10k00000", "trouser")]
    picture = pools["train"][1][2]()
    assert (picture.mode, picture.size) == ("RGB", (28, 28))
    assert picture.getpixel((0, 0)) == (28 * 28 % 256,) * 3


def test_solar_cells_that_the_experts_were_not_sure_of_are_left_out() -> None:
    lines = b"images/a.png  1.0  mono\nimages/b.png  0.0  poly\nimages/c.png  0.3333  mono\n"

    pools = TASKS["elpv"].collect([lines])

    assert {(key, label) for key, label, _ in pools["train"]} == {("a", "mono_defect"), ("b", "poly_ok")}
    assert pools["test"] == []


# The real ones

BUILT = {
    "fashion": ((800, 200, 2000), "867361c9279edadd3e8219ea714518fd65d0ff97731f263348dbc91e3e59d1ca"),
    "elpv": ((802, 198, 1023), "144ec7de5b12821686f2728a249a683b5d0e7a49bcf4cf0cb7e5b238e8dbb692"),
}
# What no two splits may share, as the names of the pictures have it.
GROUP = {
    "fashion": r"(.*)",
    "elpv": r"(.*)",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_tasks_of_the_benchmarks_are_the_published_ones_and_splits_share_no_group(name: str, tmp_path: Path) -> None:
    try:
        summary = build_task(name, tmp_path / name)
    except MissingError as error:
        pytest.skip(str(error))

    assert (tuple(summary.counts.values()), summary.pixel_sha256) == BUILT[name]
    groups = {
        split: {re.fullmatch(GROUP[name], path.stem)[1] for path in (tmp_path / name / split).rglob("*.png")}
        for split in summary.counts
    }
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(groups.values(), 2))
    for split in summary.counts:
        folders = {path.name: len(list(path.iterdir())) for path in (tmp_path / name / split).iterdir()}
        assert sorted(folders) == sorted(summary.classes)
        assert min(folders.values()) > 0


def test_each_extra_brings_the_releases_that_tasks_ask_of_it() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    files = [file for task in TASKS.values() for file in task.files if isinstance(file, PackageFile)]

    assert [file.requirement for file in files if file.requirement not in extras[file.extra]] == []
