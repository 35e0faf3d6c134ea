"""The guide of labels: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.box_folders import picture
from tests.flow import edgepet, has_openvino
from tests.interpreters import python
from tests.label_folders import csv_folder
from tests.tiny import tiny_vit

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "labels.md"
BLOCK = re.compile(r"^```(text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEW = " --epochs 3 --batch-size 8 --lr 0.01 --img-size 64 --train-precision fp32 --device cpu"


@pytest.mark.slow
def test_the_guide_of_labels_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    csv_folder(tmp_path / "DATA", train=16, val=6, test=4, size=(48, 64))
    tiny_vit(tmp_path, 3)
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture(7, (50, 60))[0]).save("photos/field.jpg")
    formats = ["onnx", *(["openvino"] if has_openvino else []), *(["tensorrt"] if find_spec("tensorrt_rtx") else [])]
    instead = {
        "demo:efficientnet-lite0": "test_vit@test_vit-3.safetensors",
        "onnx,openvino,tensorrt": ",".join(formats),
    }
    ran, programs = list[str](), 0

    for kind, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind == "python":
            done = python(text + "print(answer.image == 'field.jpg')", cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, ""), text
            assert done.stdout.splitlines()[-1] == "True"
            programs += 1
            continue
        for line in (line for line in text.splitlines() if line.startswith("edgepet ")):
            for written, used in instead.items():
                line = line.replace(written, used)
            said = edgepet(*shlex.split(line + (FEW if line.startswith("edgepet train") else ""))[1:])
            assert said.code == 0, (line, said.err)
            ran.append(line.split()[1])

    assert programs == 1
    assert ran == ["train", "eval", "predict", *["device"] * 3, "export", "verify"]
