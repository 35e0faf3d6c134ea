"""What this machine is and which runtimes answer on it: a number without these holds nowhere."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

CPUINFO, MEMINFO, CGROUP = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")
# Of either version of control groups: the limit, and the file and the name that say what of it is taken for good.
CGROUP_MEMORY = (
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)
CPUS = Path("/sys/devices/system/cpu")
PACKAGES = ("edgepet", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch", "timm", "nncf")

# The instructions that int8, fp16 and bf16 kernels are chosen by, as Linux spells them on x86 and on Arm.
X86 = frozenset({"f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"})
AMX = frozenset({"amx_bf16", "amx_int8", "amx_fp16"})
ARM = frozenset({"neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a measured number holds for.

    ``cores`` are those that this process may use; ``cpu_features`` are what int8, fp16 and bf16 kernels are chosen by;
    ``versions`` are those of the installed ``PACKAGES``; ``load_1m`` is the one-minute load average when this was made;
    ``governor`` is Linux's CPU frequency policy; ``date`` is the ISO day in UTC. No host name, no user name.
    """

    machine: str
    cpu: str
    cores: int
    cpu_features: tuple[str, ...]
    system: str
    python: str
    versions: Mapping[str, str]
    load_1m: float | None
    governor: str | None
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeStatus:
    """Whether a runtime can be imported here; if not, ``fix`` is the command or the sentence that helps."""

    name: str
    version: str | None
    available: bool
    fix: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A package that a runtime comes in; ``name`` is PyPI's. ``extra`` of edgepet brings it, None is edgepet itself.

    ``broken`` is what to do when it is installed and cannot be imported; None is to install it again. ``imported``
    says whether asking for its state may import it.
    """

    name: str
    module: str
    extra: str | None = None
    broken: str | None = None
    imported: bool = True

    @property
    def install(self) -> str:
        """The command that installs it."""
        return "pip install edgepet" if self.extra is None else f"pip install 'edgepet[{self.extra}]'"

    @property
    def repair(self) -> str:
        """What to do when it is installed and cannot be imported."""
        return self.broken or f"install it again with pip install --force-reinstall {self.name}"


TORCH = Engine(name="torch", module="torch", extra="train", imported=False)  # seconds, and devices do without it


def environment() -> Environment:
    """What this machine is now; what it does not tell is None or empty."""
    info = _read(CPUINFO) or ""
    load = getattr(os, "getloadavg", None)  # not on Windows
    return Environment(
        machine=platform.machine(),
        cpu=_cpu(info),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=_features(info),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name)) is not None},
        load_1m=None if load is None else round(load()[0], 2),
        governor=_governor(),
        date=datetime.now(UTC).date().isoformat(),
    )


def resident_bytes() -> int | None:
    """Proportional set size of this process, None where the system does not say."""
    found = re.search(r"^Pss:\s+(\d+) kB", _read(Path("/proc/self/smaps_rollup")) or "", re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def free_memory_bytes() -> int:
    """Bytes that processes can have now without swapping, of the machine or of this container, whichever are less.

    Where neither tells, 4 GB.
    """
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read(MEMINFO) or "")
    told = [int(available[1]) * 1024] if available else []
    for name, statistics, anonymous in CGROUP_MEMORY:  # what is not anonymous can be dropped
        limit = re.fullmatch(r"(\d+)\s*", _read(CGROUP / name) or "")
        used = re.search(rf"^{anonymous} (\d+)$", _read(CGROUP / statistics) or "", re.MULTILINE)
        told += [max(0, int(limit[1]) - int(used[1]))] if limit and used else []
    return min(told, default=4 * 10**9)


def runtimes(engines: Iterable[Engine]) -> tuple[RuntimeStatus, ...]:
    """The state of every one of ``engines``, in their order. Imports those that are found and may be imported."""
    return tuple(_status(engine) for engine in engines)


def _status(engine: Engine) -> RuntimeStatus:
    name, version, spec = engine.name, _version(engine.name), find_spec(engine.module)
    # Without an origin it is a folder that happens to have the name, as ``export -o .`` leaves one.
    found = spec is not None and spec.origin is not None
    if not found and version is None:
        return RuntimeStatus(name=name, version=None, available=False, fix=engine.install)
    if found and not engine.imported:
        return RuntimeStatus(name=name, version=version, available=True, fix=None)
    try:
        module = importlib.import_module(engine.module)
        if module.__file__ is None:
            problem = f"no module named {engine.module!r}"
        else:  # conda's and NVIDIA's own builds come under other package names
            version = version or getattr(module, "__version__", None)
            return RuntimeStatus(name=name, version=version, available=True, fix=None)
    # Native packages fail in many ways: a shared library, its version, NumPy's ABI.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        problem = next(iter(str(error).splitlines()), type(error).__name__)
    fix = f"installed, but cannot be imported ({problem}): {engine.repair}"
    return RuntimeStatus(name=name, version=version, available=False, fix=fix)


def _version(package: str) -> str | None:
    from importlib import metadata  # a fortieth of a second, which listing tasks does not need

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu(info: str) -> str:
    """The CPU's name; Arm kernels give a board's or no name at all."""
    for key in ("model name", "Model", "Hardware"):
        match = re.search(rf"^{key}\s*:\s*(\S.*)$", info, re.MULTILINE)
        if match is not None:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _features(info: str) -> tuple[str, ...]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.MULTILINE)
    return () if match is None else tuple(sorted((X86 | AMX | ARM) & set(match[1].split())))


def _governor() -> str | None:
    """The governor of all cores, or their different ones, as big and little cores may have."""
    paths = CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")
    names = {text.strip() for path in paths if (text := _read(path)) is not None}
    return ", ".join(sorted(names)) or None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
