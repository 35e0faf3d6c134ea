"""The guide of masks: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.guides import FORMATS, WIDER, walked
from tests.interpreters import DEVICE, block
from tests.mask_folders import index_folder, scene

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "masks.md"
FEW = " --epochs 2 --batch-size 8 --img-size 64 --train-precision fp32 --device cpu"


@pytest.mark.slow
def test_the_guide_of_masks_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index_folder(tmp_path / "DATA", train=40, val=6, test=4, size=(40, 48))
    two = {"onnx,openvino ": f"{','.join(FORMATS[:2])} "}

    ran, printed = walked(
        GUIDE, scene(7, (50, 60))[0], few=FEW, instead={**two, **WIDER},
        program=lambda text: block(DEVICE) + text + "    print(answer.mask.shape, len(answer.classes) > 0)",
    )  # fmt: skip

    assert printed == "(50, 60) True\n"
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
