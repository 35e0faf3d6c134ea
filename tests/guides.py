"""A guide's commands and its program, run in their order in the folder that a test is in, on a tiny network."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from edgepet.spec import NpArray
from tests.flow import edgepet, has_openvino
from tests.interpreters import python
from tests.tiny import tiny_vit

BLOCK = re.compile(r"^```(text|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A network that saw 40 images of noise loses more than a guide's budgets to codes.
WIDER = {"--max-drop 1 ": "--max-drop 40 ", "--max-drop 0.3 ": "--max-drop 40 "}
FORMATS = ("onnx", *(["openvino"] if has_openvino else []), *(["tensorrt"] if find_spec("tensorrt_rtx") else []))


def walked(
    guide: Path, photo: NpArray, *, few: str, program: Callable[[str], str], instead: Mapping[str, str] | None = None
) -> tuple[list[str], str]:
    """The verbs that ran, and what the guide's one program printed; all of them must end well.

    Args:
        photo: what photos/field.jpg is, (height, width, 3).
        few: what trainings are asked for besides.
        program: makes of the program's text what is run.
        instead: what stands in a command, and what is run, besides the backbone and the formats.
    """
    tiny_vit(Path(), 3)
    Path("photos").mkdir()
    Image.fromarray(photo).save("photos/field.jpg")
    used = {"demo:efficientnet-lite0": "test_vit@test_vit-3.safetensors", "onnx,openvino,tensorrt": ",".join(FORMATS)}
    ran, printed = list[str](), list[str]()
    for kind, text in BLOCK.findall(guide.read_text(encoding="utf-8")):
        if kind == "python":
            done = python(program(text), cwd=Path().absolute())
            assert (done.returncode, done.stderr) == (0, ""), text
            printed.append(done.stdout)
            continue
        for line in (line for line in text.splitlines() if line.startswith("edgepet ")):
            for written, meant in {**used, **(instead or {})}.items():
                line = line.replace(written, meant)
            trains = line.startswith(("edgepet train", "edgepet pretrain"))
            said = edgepet(*shlex.split(line + (few if trains else ""))[1:])
            assert said.code == 0, (line, said.err)
            ran.append(line.split()[1])
    (only,) = printed
    return ran, only
