"""The guide of boxes: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.box_folders import coco_folder, picture
from tests.guides import WIDER, walked

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "boxes.md"
FEW = " --epochs 8 --batch-size 8 --lr 0.01 --img-size 64 --train-precision fp32 --device cpu"

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")


@pytest.mark.slow
def test_the_guide_of_boxes_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coco_folder(tmp_path / "DATA", train=36, val=6, test=4, size=(48, 64))

    ran, printed = walked(
        GUIDE, picture(7, (50, 60))[0], few=FEW, instead=WIDER,
        program=lambda text: text + "print(len(answer.boxes) > 0)",
    )  # fmt: skip

    assert printed.splitlines()[-1] == "True"
    assert ran == [
        "train", "eval", "predict", *["device"] * 3, *["export"] * 2, "verify", "pack", "calibrate", "device",
    ]  # fmt: skip
    assert Path("seen/field.png").is_file()
