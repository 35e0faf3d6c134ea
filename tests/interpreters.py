"""Interpreters of their own, in which packages are missing that are installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DEVICE = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx_ir")


def block(names: tuple[str, ...]) -> str:
    """Code after which importing any of ``names`` fails as if it were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r})); "


def python(code: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with warnings as errors, in the suite's own cache."""
    measured = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=measured, cwd=cwd, check=False, timeout=120)


def verb(*arguments: object) -> Any:
    """The JSON of a verb in a process without a device's forbidden packages."""
    code = block(DEVICE) + "from edgepet.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, *arguments, "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)
