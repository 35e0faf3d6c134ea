"""What the guides tell people to do works as they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from edgepet.methods import METHODS, Method, configure
from edgepet.methods.method import count
from edgepet.networks.backbone import Backbone
from tests.flow import Tasks, edgepet, train_arguments
from tests.methods import EXAMPLES, check_examples, check_merged, check_pack, check_start, check_steps
from tests.tiny import sites_of

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "add-a-method.md"


def block(mark: str) -> str:
    return GUIDE.read_text().split(f"<!-- {mark} -->")[1].split("```python\n")[1].split("```")[0]


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """The guide's method, added in the guide's three places."""
    tables = f"LINES = {{\n{block('the line')}}}\nROWS = {{\n{block('the row')}}}\n"
    (tmp_path / "residual_scale.py").write_text(f"{block('the file')}\n\n{tables}")
    spec = importlib.util.spec_from_file_location("residual_scale", tmp_path / "residual_scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "residual_scale", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for table, rows in ((METHODS, module.LINES), (EXAMPLES, module.ROWS)):
        for name, value in rows.items():
            monkeypatch.setitem(table, name, value)
    return EXAMPLES["residual-scale"]


def test_the_method_of_the_guide_passes_the_tests_of_every_method(
    method: Method, backbone: Backbone, scaled_backbone: Backbone
) -> None:
    check_examples()
    check_start(method, backbone)
    check_merged(method, scaled_backbone)
    check_pack(method, backbone)
    check_steps(method, backbone)


def test_it_has_as_many_parameters_as_the_guide_says(method: Method) -> None:
    assert "2 · 12 · 384 = 9,216" in GUIDE.read_text()
    assert count(method, sites_of("vit_small_patch14_dinov2"), {}) == 9216


def test_it_is_listed_trained_and_exported(method: Method, backbone: Backbone, tasks: Tasks, tmp_path: Path) -> None:
    assert "residual-scale" in {row["name"] for row in edgepet("methods", "--json").json["methods"]}
    assert configure("residual-scale", {"on": "mlp.fc2"}) == type(method)(on=("mlp.fc2",))  # type: ignore[call-arg]
    words = train_arguments(tasks.spec, tasks.data, "residual-scale", tmp_path / "t.pet")

    said = edgepet(*words, "--set", "on=mlp.fc2", "--json")

    assert said.code == 0, said.err
    assert said.json["trainable_params"] == 6 * backbone.width  # blocks
    exported = edgepet("export", tmp_path / "t.pet", "-o", tmp_path / "out", "--json")
    assert [row["verified"] for row in exported.json["artifacts"]] == [True]
