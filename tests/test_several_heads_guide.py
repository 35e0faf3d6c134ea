"""The guide of several heads: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.box_folders import picture
from tests.guides import WIDER, walked
from tests.scene_folders import scene_folder

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "several-heads.md"
FEW = " --epochs 3 --batch-size 8 --lr 0.01 --img-size 64 --train-precision fp32 --device cpu"

pytest.importorskip("faster_coco_eval", reason="the package faster-coco-eval is not installed")


@pytest.mark.slow
def test_the_guide_of_several_heads_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scene_folder(tmp_path / "DATA", size=(48, 64), train=36)

    ran, printed = walked(
        GUIDE,
        picture(7, (50, 60))[0],
        few=FEW,
        instead=WIDER,
        program=lambda text: text + "print(answer.heads['mask'].mask.shape == (50, 60))",
    )

    assert printed.splitlines()[-1] == "True"
    assert ran == ["train", "eval", "pretrain", "train", "predict", *["device"] * 3, *["export"] * 2, "verify", "pack"]
