"""The guide of masks: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.flow import edgepet, has_openvino
from tests.interpreters import DEVICE, block, python
from tests.mask_folders import index_folder, scene
from tests.tiny import tiny_vit

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "masks.md"
BLOCK = re.compile(r"^```(text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEW = " --epochs 2 --batch-size 8 --img-size 64 --train-precision fp32 --device cpu"
# A network that saw 40 images of noise loses more than the guide's budgets to codes.
WIDER = {"--max-drop 1": "--max-drop 40", "--max-drop 0.3": "--max-drop 40"}


@pytest.mark.slow
def test_the_guide_of_masks_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index_folder(tmp_path / "DATA", train=40, val=6, test=4, size=(40, 48))
    tiny_vit(tmp_path, 3)
    (tmp_path / "photos").mkdir()
    Image.fromarray(scene(7, (50, 60))[0]).save("photos/field.jpg")
    formats = ["onnx", *(["openvino"] if has_openvino else []), *(["tensorrt"] if find_spec("tensorrt_rtx") else [])]
    instead = {"demo:efficientnet-lite0": "test_vit@test_vit-3.safetensors", **WIDER}
    instead |= {"onnx,openvino,tensorrt": ",".join(formats), "onnx,openvino ": f"{','.join(formats[:2])} "}
    ran, programs = list[str](), 0

    for kind, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind == "python":
            done = python(block(DEVICE) + text + "    print(answer.mask.shape, len(answer.classes) > 0)", cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, ""), text
            assert done.stdout == "(50, 60) True\n"
            programs += 1
            continue
        for line in (line for line in text.splitlines() if line.startswith("edgepet ")):
            for written, used in instead.items():
                line = line.replace(written, used)
            said = edgepet(*shlex.split(line + (FEW if line.startswith("edgepet train") else ""))[1:])
            assert said.code == 0, (line, said.err)
            ran.append(line.split()[1])

    assert programs == 1
    assert ran == [
        "train",
        "eval",
        "predict",
        *["device"] * 3,
        "export",
        "export",
        "verify",
        "pack",
        "calibrate",
        "device",
    ]
    with Image.open("masks/field.png") as mask, Image.open("seen/field.png") as seen:
        assert mask.size == seen.size == (60, 50)
        assert np.asarray(mask).max() <= 2
