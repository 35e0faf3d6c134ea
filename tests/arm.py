"""A 64-bit ARM machine that is emulated: Debian's Python for it, the wheels that this test runs with, and qemu.

Nothing of the host changes: packages are unpacked into a folder, and qemu's user mode runs one program of them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QEMU = "qemu-user-static"
DEBIAN = ("python3.11", "libstdc++6", "libgomp1")
WHEELS = ("numpy", "onnxruntime", "openvino", "safetensors", "Pillow", "rich")
GLIBC = ("manylinux2014", "manylinux_2_27", "manylinux_2_28", "manylinux_2_31", "manylinux_2_35")
# A Raspberry Pi 4: libraries read this file, not the processor, and choose instructions by it.
CORTEX_A72 = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


@dataclass(frozen=True)
class Arm:
    """The emulated machine, in a folder."""

    folder: Path

    def python(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run its Python with this checkout's edgepet."""
        line = [
            self.folder / "usr" / "bin" / "qemu-aarch64-static", "-cpu", "cortex-a72", "-L", self.folder / "root",
            "-E", f"PYTHONPATH={self.folder / 'wheels'}:{ROOT}", "-E", "PYTHONDONTWRITEBYTECODE=1",
            "-E", f"EDGEPET_CACHE={self.folder / 'cache'}", self.folder / "root" / "usr" / "bin" / "python3.11",
        ]  # fmt: skip
        return subprocess.run([*map(str, line), *map(str, arguments)], capture_output=True, text=True, check=False)


def made(folder: Path) -> Arm:
    """Unpack everything into ``folder``; a machine without Debian's or Python's packages skips the test."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs Debian's apt-get and dpkg-deb")
    state = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root",
        "Dir::State": state / "state", "Dir::State::status": state / "status", "Dir::Cache": state / "cache",
        "Debug::NoLocking": "1",
    }  # fmt: skip
    private = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in settings.items())]
    _asked(["apt-get", "download", QEMU], folder)
    _asked([*private, "update"], folder)
    _asked([*private, "install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN], folder)
    for package in (state / "cache" / "archives").glob("*.deb"):
        _asked(["dpkg-deb", "--extract", package, folder / "root"], folder)
    _asked(["dpkg-deb", "--extract", *folder.glob(f"{QEMU}_*.deb"), folder], folder)
    wheels = [f"{name}=={version(name)}" for name in WHEELS]
    platforms = [f"--platform={name}_aarch64" for name in GLIBC]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version=3.11"]
    _asked([*pip, *platforms, "--dest", folder / "downloads", *wheels], folder)
    for wheel in (folder / "downloads").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheels")
    (folder / "root" / "proc").mkdir(exist_ok=True)
    (folder / "root" / "proc" / "cpuinfo").write_text("".join(CORTEX_A72.format(number=number) for number in range(2)))
    return Arm(folder)


def _asked(line: list[object], folder: Path) -> None:
    done = subprocess.run([str(part) for part in line], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        pytest.skip(f"{Path(str(line[0])).name} does not give what the machine is made of: {last[:120]}")
