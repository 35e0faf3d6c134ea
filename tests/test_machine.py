"""A number holds for a machine: what is said about it, and how a missing runtime is brought."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from edgepet.device.runtimes import ENGINES
from edgepet.measuring import machine
from edgepet.measuring.machine import RuntimeStatus, environment, runtimes

X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6430
flags\t\t: fpu sse2 amx_int8 avx2 avx512f avx512_vnni amx_bf16 fma
processor\t: 1
model name\t: Intel(R) Xeon(R) Gold 6430
flags\t\t: fpu sse2
"""
PI = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes asimdhp asimddp
CPU implementer\t: 0x41

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no /proc and no /sys but what a test puts there."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpu")
    return tmp_path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder that packages are found in."""
    names = {engine.module for engine in ENGINES}
    held = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in str(f)])
    importlib.invalidate_caches()
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(held)
    importlib.invalidate_caches()


def install(site: Path, package: str, version: str, *, source: str | None) -> None:
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if source is not None:
        folder = site / package.replace("-", "_")
        folder.mkdir()
        (folder / "__init__.py").write_text(source)


def status(name: str) -> RuntimeStatus:
    return next(status for status in runtimes(ENGINES) if status.name == name)


def test_an_x86_server_is_named_with_the_instructions_that_kernels_are_chosen_by(bare: Path) -> None:
    (bare / "cpuinfo").write_text(X86)

    here = environment()

    assert (here.cpu, here.cpu_features) == (
        "Intel(R) Xeon(R) Gold 6430",
        ("amx_bf16", "amx_int8", "avx2", "avx512_vnni", "avx512f", "fma"),
    )


def test_an_arm_board_without_a_model_name_goes_by_its_board(bare: Path) -> None:
    (bare / "cpuinfo").write_text(PI)

    here = environment()

    assert (here.cpu, here.cpu_features) == ("Raspberry Pi 5 Model B Rev 1.0", ("asimd", "asimddp", "asimdhp"))


def test_a_machine_that_tells_nothing_leaves_things_out(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.getloadavg")
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    here = environment()

    assert (here.machine, here.cpu, here.cores, here.cpu_features) == ("riscv64", "riscv64", 6, ())
    assert (here.load_1m, here.governor) == (None, None)


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 7}, raising=False)

    assert environment().cores == 3


@pytest.mark.parametrize(
    ("governors", "said"),
    [
        (["performance", "performance"], "performance"),
        (["schedutil", "performance"], "performance, schedutil"),  # little and big cores
        ([], None),
    ],
)
def test_the_governor_is_that_of_all_cores(bare: Path, governors: list[str], said: str | None) -> None:
    for core, governor in enumerate(governors):
        path = bare / "cpu" / f"cpu{core}" / "cpufreq" / "scaling_governor"
        path.parent.mkdir(parents=True)
        path.write_text(f"{governor}\n")

    assert environment().governor == said


def test_versions_are_those_of_installed_packages_and_the_host_is_not_named() -> None:
    here = environment()

    assert here.versions["numpy"] == metadata.version("numpy")
    assert set(here.versions) <= set(machine.PACKAGES)
    assert here.python == platform.python_version()
    assert here.system == f"{platform.system()} {platform.release()}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", here.date)
    assert platform.node() not in (here.machine, here.cpu, here.system)


def test_every_missing_runtime_comes_with_the_line_that_installs_it(site: Path) -> None:
    missing = [(status.name, status.version, status.available, status.fix) for status in runtimes(ENGINES)]

    assert missing == [
        ("onnxruntime", None, False, "pip install edgepet"),
        ("openvino", None, False, "pip install 'edgepet[openvino]'"),
        ("tensorrt", None, False, "pip install 'edgepet[tensorrt]'"),
        ("tensorrt-rtx", None, False, "pip install 'edgepet[tensorrt-rtx]'"),
        ("torch", None, False, "pip install 'edgepet[train]'"),
    ]


def test_a_runtime_that_imports_is_available(site: Path) -> None:
    install(site, "tensorrt-rtx", "1.7.1", source="")

    assert status("tensorrt-rtx") == RuntimeStatus(name="tensorrt-rtx", version="1.7.1", available=True, fix=None)


def test_a_runtime_under_another_package_name_tells_its_own_version(site: Path) -> None:
    (site / "onnxruntime.py").write_text("__version__ = '1.32.0'")  # as onnxruntime-gpu installs it

    assert status("onnxruntime") == RuntimeStatus(name="onnxruntime", version="1.32.0", available=True, fix=None)


def test_torch_is_found_and_not_imported(site: Path) -> None:
    install(site, "torch", "2.15.0", source="raise RuntimeError('imported')")

    assert status("torch") == RuntimeStatus(name="torch", version="2.15.0", available=True, fix=None)


TENSORRT_FIX = (
    "the package is a Python face only, and NVIDIA's libraries are missing: "
    "install them as NVIDIA's TensorRT installation guide says"
)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from tensorrt_bindings import *", "No module named 'tensorrt_bindings'"),
        ("raise OSError('libnvinfer.so.11: cannot open\\nsecond line')", "libnvinfer.so.11: cannot open"),
        ("raise RuntimeError", "RuntimeError"),
        (None, "No module named 'tensorrt'"),
    ],
)
def test_a_tensorrt_that_is_only_a_python_face_says_what_is_missing(
    site: Path, source: str | None, problem: str
) -> None:
    install(site, "tensorrt", "11.4.0", source=source)

    assert status("tensorrt") == RuntimeStatus(
        name="tensorrt",
        version="11.4.0",
        available=False,
        fix=f"installed, but cannot be imported ({problem}): {TENSORRT_FIX}",
    )


def test_a_folder_of_exported_artefacts_is_no_runtime(site: Path) -> None:
    (site / "openvino").mkdir()

    assert status("openvino").fix == "pip install 'edgepet[openvino]'"


def test_a_package_whose_module_is_an_empty_folder_is_broken(site: Path) -> None:
    install(site, "openvino", "2026.4.1", source=None)
    (site / "openvino").mkdir()

    assert status("openvino").fix == (
        "installed, but cannot be imported (no module named 'openvino'): "
        "install it again with pip install --force-reinstall openvino"
    )


def test_asking_what_is_here_does_not_import_what_devices_do_without() -> None:
    code = (
        "import sys, edgepet.measuring.machine as m; m.environment();"
        "from edgepet.device.runtimes import ENGINES; m.runtimes(ENGINES);"
        "print({'torch', 'onnx'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TENSOR = """\
import re, torch, edgepet.networks.backbone
tensor = torch.empty(2**24)
for block in re.split("^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read(), flags=re.MULTILINE):
    low, high = (int(end, 16) for end in block.partition(" ")[0].split("-")) if block else (0, 0)
    if low <= tensor.data_ptr() < high:
        print(re.search("VmFlags:(.*)", block)[1])
"""


@pytest.mark.parametrize(("said", "huge"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_lie_in_huge_pages_unless_the_environment_says_otherwise(
    said: dict[str, str], huge: bool
) -> None:
    if not HUGE_PAGES.is_file() or "[madvise]" not in HUGE_PAGES.read_text():
        pytest.skip("this system gives no huge pages to who asks for them")
    kept = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    flags = subprocess.run(
        [sys.executable, "-c", TENSOR], env=kept | said, capture_output=True, text=True, check=True
    ).stdout
    assert ("hg" in flags.split()) == huge, flags
