"""What all benchmarks share: their arguments, their one writer of results, and the pages that tell of them.

``--quick`` goes the same way through the code with as little as it takes; what it writes says nothing, and goes into a
folder of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepet.files import write_file
from edgepet.measuring.machine import environment
from edgepet.reports.as_json import to_json
from edgepet.reports.tables import format_percent

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGE_SIZES = {"vit-small": 112, "efficientnet-lite0": 224}
SMALLER = {"vit-small": 112, "efficientnet-lite0": 128}  # where every method is tried
OF_WHOEVER = ("--dir", "--results", "--ray")  # folders and addresses that a result does not tell


# ---------------------------------------------------------------------------------------------- arguments and results


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of a run: ``folder`` holds its jobs, ``results`` takes what it writes, ``ray`` is who trains;
    here so many ``processes`` do at the same time.
    """

    command: str
    quick: bool
    folder: Path
    results: Path
    ray: str | None = None
    processes: int = 1


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="as little of everything as goes the whole way")
    add("--dir", type=Path, default=Path("bench"), help="where images and packs are kept (%(default)s)")
    add(
        "--ray",
        metavar="ADDRESS",
        help="train on the nodes of a Ray cluster, auto for this machine's (on this machine)",
    )
    add("--results", type=Path, help="where results go (benchmarks/results, or a temporary folder when quick)")
    return parser


def asked(options: argparse.Namespace) -> Asked:
    """What ``options`` ask for, and the command as results tell it."""
    quick: bool = options.quick
    results: Path = options.results or (Path(tempfile.mkdtemp(prefix="edgepet-bench-")) if quick else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    return Asked(
        command=command(sys.argv), quick=quick, folder=options.dir, results=results, ray=options.ray,
        processes=getattr(options, "processes", 1),
    )  # fmt: skip


def command(argv: Sequence[str]) -> str:
    """The command that was run, without the folders of whoever ran it: ``--dir DIR --pack digits-ssf.pet``."""
    told, before = list[str](), ""
    for part in argv[1:]:
        name, equals, value = part.partition("=")
        if before in OF_WHOEVER:
            told.append(before[2:].upper())
        elif equals and name in OF_WHOEVER:
            told += [name, name[2:].upper()]
        else:
            told.append(f"{name}={Path(value).name}" if equals else Path(part).name)
        before = part
    return shlex.join(["python", f"benchmarks/{Path(argv[0]).name}", *told])


def write_result(run: Asked, name: str, facts: Mapping[str, object]) -> Path:
    """Write ``NAME.json``: the facts, the command that found them, the machine and the versions that they hold for."""
    result = {"command": run.command, **facts, "environment": environment()}
    path = run.results / f"{name}.json"
    write_file(path, json.dumps(to_json(result), indent=1, allow_nan=False).encode() + b"\n")
    print(f"{path} is written", flush=True)
    return path


def alone(script: str, *given: object, quick: bool = False) -> Any:
    """What a benchmark writes as JSON to its screen, in a process of its own."""
    line = [sys.executable, script, *(["--quick"] if quick else []), *map(str, given)]
    return json.loads(subprocess.check_output(line))


def earlier(run: Asked, name: str) -> dict[str, Any]:
    """The result that a run adds to; empty where there is none."""
    path = run.results / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def source(result: Mapping[str, Any]) -> str:
    """What a result still lacks; the command that found it, where and when, and what GPU trained rows of it."""
    here = result["environment"]
    versions = ", ".join(
        f"{name} {here['versions'][name]}" for name in ("torch", "onnxruntime", "openvino") if name in here["versions"]
    )
    rows = result.get("rows", ())
    on = [row["gpu"] for row in rows if "gpu" in row]  # by rows.py
    trained = f"; {len(on)} of {len(rows)} trainings on {' and '.join(sorted(set(on)))}" if on else ""
    machine = f"{here['cpu']} ({here['cores']} cores), {versions}, {here['date']}"
    return f"{missing(result)}`{result['command']}` on {machine}{trained}."


def missing(result: Mapping[str, Any]) -> str:
    """How many rows of a table that grows are still to be made, and a space; nothing where none is."""
    left = result["trainings"] - len(result["rows"]) if "trainings" in result else 0
    return f"Still to be made: {left} of {result['trainings']} trainings. " if left else ""


def spread(found: Sequence[float]) -> str:
    """Parts of 1 of several seeds: their mean, and the lowest and highest where there are several."""
    if not found:
        return ""
    mean = format_percent(sum(found) / len(found))
    return mean if len(found) == 1 else f"{mean} ({format_percent(min(found))} to {format_percent(max(found))})"


# -------------------------------------------------------------------------------------------------------------- pages


@dataclass(frozen=True, slots=True)
class Marks:
    """The two lines of a page between which its tables are."""

    begin: str
    end: str

    def put(self, page: Path, made: str, into: Path | None = None) -> None:
        """Put ``made`` between the marks of ``page``; ``into``, a folder, gets the page in its place."""
        text = page.read_text()
        before, after = text.split(self.begin)[0], text.split(self.end)[1]
        target = page if into is None else into / page.name
        write_file(target, f"{before}{self.begin}\n\n{made}\n{self.end}{after}".encode())


TABLES = Marks("<!-- results: made by benchmarks/report.py -->", "<!-- end of results -->")
SWEEP = Marks("<!-- sweep: made by benchmarks/timm_sweep.py -->", "<!-- end of sweep -->")
