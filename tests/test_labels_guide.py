"""The guide of labels: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.box_folders import picture
from tests.guides import WIDER, walked
from tests.label_folders import csv_folder

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "labels.md"
FEW = " --epochs 3 --batch-size 8 --lr 0.01 --img-size 64 --train-precision fp32 --device cpu"


@pytest.mark.slow
def test_the_guide_of_labels_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    csv_folder(tmp_path / "DATA", train=36, val=6, test=4, size=(48, 64))

    ran, printed = walked(
        GUIDE, picture(7, (50, 60))[0], few=FEW, instead=WIDER,
        program=lambda text: text + "print(answer.image == 'field.jpg')",
    )  # fmt: skip

    assert printed.splitlines()[-1] == "True"
    assert ran == ["train", "eval", "predict", *["device"] * 3, *["export"] * 2, "verify", "pack"]
