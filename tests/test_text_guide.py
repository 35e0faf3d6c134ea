"""The guide of text: every command and the program in it, in their order, on a tiny network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from edgepet.packs.pack import EVERY, read_pack
from edgepet.packs.text_file import read_text
from tests.box_folders import CATEGORIES, coco_folder
from tests.flow import edgepet, has_words
from tests.interpreters import python
from tests.mask_folders import NAMES, index_folder, scene
from tests.scene_folders import MASKED, scene_folder
from tests.tiny import tiny_vit
from tests.words import table_file

GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "text.md"
BLOCK = re.compile(r"^```(text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEW = " --epochs 1 --batch-size 8 --img-size 64 --train-precision fp32 --device cpu"
# A tower that says of every text its length, in two numbers.
TOWER = """
import torch
class Tower:
    def encode_text(self, tokens):
        return tokens
def create_model(name, pretrained):
    return Tower()
def get_tokenizer(name):
    return lambda texts: torch.tensor([[len(text), 1] for text in texts])
"""


@pytest.mark.slow
def test_the_guide_of_text_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index_folder(tmp_path / "DATA", train=16, val=4, test=4, size=(40, 48))
    coco_folder(tmp_path / "THINGS", train=8, val=4, size=(48, 64))
    scene_folder(tmp_path / "SCENES", size=(48, 64))
    tiny_vit(tmp_path, 3)
    (tmp_path / "photos").mkdir()
    (tmp_path / "open_clip.py").write_text(TOWER)
    Image.fromarray(scene(7, (50, 60))[0]).save("photos/field.jpg")
    table_file(Path("others.safetensors"), ("sand", "ice"), 50)
    table_file(Path("things.safetensors"), CATEGORIES)
    table_file(Path("masked.safetensors"), MASKED)
    table_file(Path("scenes.safetensors"), tuple(dict.fromkeys((*CATEGORIES, *MASKED))))
    ran = list[str]()

    for kind, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind == "python":
            done = python(text, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert read_text(Path("clip.safetensors")).classes == NAMES
            continue
        for line in text.splitlines():
            if line.startswith("edgepet text ") and not has_words:
                table_file(Path("words.safetensors"), NAMES, 50)
                continue
            line = line.replace("demo:efficientnet-lite0", "test_vit@test_vit-3.safetensors")
            said = edgepet(*shlex.split(line + (FEW if line.split()[1] in ("train", "pretrain") else ""))[1:])
            assert said.code == 0, (line, said.err)
            ran.append(line.split()[1])

    assert ran[-8:] == ["train", "eval", "pack", "predict", "pretrain", *["train"] * 3]
    assert read_pack("other.pet", answers=EVERY).delta.heads[0].head.labels == ("sand", "ice")
    assert (tmp_path / "masks/field.png").is_file()
