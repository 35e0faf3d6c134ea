"""``report``: one page, complete in itself, of what was measured and of what was not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgepet import report
from edgepet.errors import InputError
from edgepet.reports.page.parts import fronts
from edgepet.verbs.report import PageReport
from tests.flow import Tasks, edgepet

pytest.importorskip("matplotlib", reason="charts need the package matplotlib")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GUIDE = ROOT / "docs" / "guide" / "report.md"
MOST_BYTES = 250_000
MADE = {
    "cpu": "Tiny CPU", "cores": 2, "cpu_features": ["avx2"], "system": "Linux", "python": "3.11.7",
    "versions": {"edgepet": "0.1.0"}, "date": "2026-11-20",
}  # fmt: skip
EMPTY = {"br", "hr", "img", "input", "link", "meta"}  # elements that have no end


class Reader(HTMLParser):
    """The elements of a page, each with its attributes, the path to it, and the text right below it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.path, self.found = list[int](), list[dict[str, Any]]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append({"tag": tag, "in": tuple(self.path), "text": "", **{k: v or "" for k, v in attrs}})
        if tag not in EMPTY:
            self.path.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.path.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.path.pop()]["tag"] == tag, "elements must be nested"

    def handle_data(self, data: str) -> None:
        for place in self.path:
            self.found[place]["text"] += data

    def all(self, tag: str, within: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        return [
            each for each in self.found
            if each["tag"] == tag and (within is None or self.found.index(within) in each["in"])
        ]  # fmt: skip


def write(folder: Path, **results: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, facts in results.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(facts))
    return folder


def scores(**packs: tuple[float, int]) -> dict[str, Any]:
    """A result of methods on one task: top-1 and bytes."""
    rows = [
        {"backbone": "net", "method": name.replace("_", "-"), "task": "digits", "test_top1": top1, "test_n": 300,
         "pack_bytes": size}
        for name, (top1, size) in packs.items()
    ]  # fmt: skip
    return {"command": "python x.py", "rows": rows, "environment": MADE}


def made(tmp_path: Path, *folders: Path) -> tuple[PageReport, str]:
    page = tmp_path / "page.html"
    told = report(folders, output=page)
    return told, page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the committed results."""
    page = tmp_path_factory.mktemp("report") / "page.html"
    report([RESULTS], output=page)
    return page.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ the document


def test_the_page_of_the_committed_results_is_one_small_file_that_asks_for_nothing(committed: str) -> None:
    reader = Reader(committed)

    assert len(committed.encode()) <= MOST_BYTES
    assert reader.path == []  # every element has ended
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & {each["tag"] for each in reader.found}
    assert not re.search(r"https?:|//|@import|url\((?!#)", committed)
    linked = [each[key] for each in reader.found for key in ("href", "src", "xlink:href") if key in each]
    ids = Counter(each["id"] for each in reader.found if "id" in each)
    assert set(ids.values()) == {1}
    assert {link for link in linked if not (link.startswith("#") and link[1:] in ids)} == set()
    assert set(re.findall(r"url\(#([^)]+)\)", committed)) <= set(ids)


def test_every_chart_has_a_name_a_sentence_and_its_table(committed: str) -> None:
    reader = Reader(committed)
    figures = reader.all("figure")

    assert len(figures) >= 12
    for figure in figures:
        (svg,) = reader.all("svg", figure)
        (title,) = [each for each in reader.all("title", svg) if each.get("id", "").endswith("-t")]
        (told,) = reader.all("desc", svg)
        assert svg["role"] == "img"
        assert svg["aria-labelledby"] == f"{title['id']} {told['id']}"
        assert title["text"]
        assert told["text"] == reader.all("figcaption", figure)[0]["text"]
        (details,) = reader.all("details", figure)
        assert len(reader.all("tr", details)) >= 3
        assert {svg["viewbox"].split()[2]} == {"360"}
        hovered = [each for each in reader.all("title", svg) if "id" not in each]
        assert len(hovered) >= 3
        assert all(reader.found[each["in"][-1]]["tag"] == "use" for each in hovered)  # what the pointer meets


def test_a_table_has_headings_a_name_and_scrolls_by_keyboard(committed: str) -> None:
    reader = Reader(committed)

    for table in reader.all("table"):
        box = reader.found[table["in"][-1]]
        assert table["aria-label"] == box["aria-label"] != ""
        assert (box["class"], box["tabindex"], box["role"]) == ("scroll", "0", "group")
        headings = reader.all("th", table)
        assert all(each["scope"] == "col" and each["text"] for each in headings)
    assert reader.found[[each["tag"] for each in reader.found].index("html")]["lang"] == "en"


def test_sections_are_headings_that_the_top_links_to(committed: str) -> None:
    reader = Reader(committed)
    (nav,) = reader.all("nav")

    headings = [(f"#{each['id']}", each["text"]) for each in reader.all("h2")]

    assert [(each["href"], each["text"]) for each in reader.all("a", nav)] == headings
    assert [title for _, title in headings] == [
        "Accuracy against kilobytes", "Accuracy against milliseconds", "Storage as tasks grow",
        "Many tasks on one image", "Latency", "Parity", "Provenance",
    ]  # fmt: skip


def test_light_and_dark_share_a_drawing(committed: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", committed, re.DOTALL))
    styles = committed.split("<style>")[1].split("</style>")[0]

    assert "prefers-color-scheme:dark" in styles
    assert "@media print" in styles
    assert "#" not in re.sub(r'(href="|url\()#[a-z0-9-]+', "", drawn)  # no colour of its own
    rules = re.findall(r"^\.s\d+\{(.*)\}$", styles, re.MULTILINE)
    assert rules
    assert not any("#" in rule for rule in rules)
    assert "stroke:currentColor" in styles


def test_the_same_results_give_the_same_bytes_whatever_is_set(tmp_path: Path, committed: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 20, "svg.hashsalt": "other", "axes.grid": True}):
        _, again = made(tmp_path, RESULTS)

    assert again == committed


def test_names_from_files_are_no_markup(tmp_path: Path) -> None:
    rows = scores(a=(0.5, 100), b=(0.6, 200), c=(0.7, 300))
    rows["rows"][2]["method"] = '<script>alert("x")</script>\x1b[31m & <b>'
    rows["command"] = "python <img src=x>"

    _, page = made(tmp_path, write(tmp_path / "r", accuracy=rows))

    reader = Reader(page)
    assert not {"script", "img", "b"} & {each["tag"] for each in reader.found}
    assert "\x1b" not in page
    assert '<script>alert("x")</script>\N{REPLACEMENT CHARACTER}[31m & <b>' in {
        each["text"] for each in reader.all("td")
    }


# ----------------------------------------------------------------------------------------------------- what it shows


@pytest.mark.parametrize(
    ("pairs", "front"),
    [
        ([(1, 1)], [True]),
        ([(1, 1), (2, 2), (3, 1.5)], [True, True, False]),
        ([(1, 1), (1, 2)], [False, True]),
        ([(1, 1), (2, 1)], [True, False]),
        ([(1, 1), (1, 1)], [True, True]),
    ],
)
def test_on_the_front_is_what_no_other_beats_in_both(pairs: list[tuple[float, float]], front: list[bool]) -> None:
    assert list(fronts(pairs)) == front


def cells(reader: Reader, title: str) -> list[list[str]]:
    """The rows of the table of this name."""
    (table,) = [each for each in reader.all("table") if each["aria-label"] == title]
    return [[cell["text"] for cell in reader.all("td", row)] for row in reader.all("tr", table)][1:]


def test_methods_are_told_with_their_front_and_what_was_judged_on_fewer_tasks_is_not_drawn(tmp_path: Path) -> None:
    rows = scores(linear_probe=(0.5, 8000), ssf=(0.9, 200_000), lora=(0.8, 300_000))
    for row in [dict(row) for row in rows["rows"]]:
        rows["rows"] += [row | {"task": "signs", "test_top1": row["test_top1"] - 0.1}]
    rows["rows"].append(rows["rows"][0] | {"method": "hira", "test_top1": 1.0})

    told, page = made(tmp_path, write(tmp_path / "r", accuracy_net=rows))

    reader = Reader(page)
    assert cells(reader, "net, accuracy-net.json") == [
        ["ssf", "digits, signs", "85.0 %", "± 2.8", "200.0 kB", "2", "yes"],
        ["lora", "digits, signs", "75.0 %", "± 3.4", "300.0 kB", "2", ""],
        ["linear-probe", "digits, signs", "45.0 %", "± 4.0", "8.0 kB", "2", "yes"],
        ["hira", "digits", "100.0 %", "± 0.0", "8.0 kB", "1", ""],
    ]
    (figure,) = reader.all("figure")
    assert reader.all("figcaption", figure)[0]["text"] == (
        "3 methods, mean test top-1 over digits, signs. From few bytes to many, the front is linear-probe (45.0 %,"
        " 8.0 kB), ssf (85.0 %, 200.0 kB). Test images leave each uncertain by about ± 3.4 points. Not drawn, for they"
        " were not judged on all of these: hira (digits)."
    )
    hovered = {each["text"] for each in reader.all("title", figure)}
    assert "ssf (85.0 %, 200.0 kB)" in hovered
    assert not any("hira" in text for text in hovered)
    assert [each.drawn for each in told.read] == [True]


def test_bytes_as_tasks_grow_are_counted_from_the_measured_ones(committed: str) -> None:
    found = json.loads((RESULTS / "shared-int8.json").read_text())["backbones"]["vit-small"]
    packs = list(found["pack_bytes"].values())

    rows = {row[0]: row[1:] for row in cells(Reader(committed), "demo:vit-small, bytes")}

    ten = found["codes_bytes"] + found["graph_bytes"] + 10 * sum(packs) / len(packs)
    assert rows["int8 backbone + packs"][3] == f"{ten / 1e6:.1f} MB"
    assert rows["full copies, fp32"][3] == f"{10 * found['fp32_bytes'] / 1e6:.1f} MB"
    assert rows["full copies / int8 backbone + packs"][3] == f"{10 * found['fp32_bytes'] / ten:.1f}×"


def test_a_check_that_said_no_is_red_and_named_at_the_top(tmp_path: Path) -> None:
    half = json.loads((RESULTS / "half.json").read_text())
    half["rows"] = half["rows"][:3]  # the third was not run
    half["rows"][0]["parity"]["max_abs"] = 0.5
    half["rows"][1]["parity"]["top1_agreement"] = 0.9

    told, page = made(tmp_path, write(tmp_path / "r", half=half))

    assert [(each.result, each.what, each.why) for each in told.failed] == [
        ("half", "landcover-ssf, onnx, fp32", "failed: 5.0e-01 is beyond 5.4e-02"),
        ("half", "landcover-ssf, openvino, fp32", "failed: 90.0 % of top-1 is below 99.0 %"),
    ]
    assert told.checks == 2
    reader = Reader(page)
    assert "2 of 2 checks said no or were refused" in reader.all("header")[0]["text"]
    assert [each["text"] for each in reader.all("li") if each["text"].startswith("failed")] == [
        "failed: landcover-ssf, onnx, fp32 (half): 5.0e-01 is beyond 5.4e-02",
        "failed: landcover-ssf, openvino, fp32 (half): 90.0 % of top-1 is below 99.0 %",
    ]
    red = [each["text"] for each in reader.found if "bad" in each.get("class", "").split()]
    assert red == ["failed or refused: 2 of 2 checks.", "failed", "failed", "failed: 5.0e-01 is beyond 5.4e-02",
                   "failed: 90.0 % of top-1 is below 99.0 %"]  # fmt: skip
    assert [each["text"] for each in reader.all("td") if each.get("class") == "none"] == ["not run"]


def test_what_was_not_measured_is_said_and_nothing_is_drawn_for_it(tmp_path: Path) -> None:
    told, page = made(tmp_path, write(tmp_path / "r", other={"command": "python x.py", "environment": MADE}))

    reader = Reader(page)
    assert reader.all("svg") == []
    missing = [each["text"] for each in reader.all("p") if "not measured" in each["text"]]
    assert [text.partition(": not measured.")[0] for text in missing] == [
        "Accuracy of methods", "Milliseconds of methods", "Milliseconds of precisions", "Storage as tasks grow",
        "A device's whole folder, caches too", "Many tasks on one image", "Latency of a task over its backbone",
        "p90 and p99", "Fp16 beside the tuned network", "Every method's algebra and its exports",
        "Every family of timm's networks",
    ]  # fmt: skip
    assert len(told.lacks) == 11
    assert [(each.name, each.drawn) for each in told.read] == [("other", False)]
    assert cells(reader, "Every result") == [
        ["other", "python x.py", "2026-11-20", "Tiny CPU", "2", "Python 3.11.7, edgepet 0.1.0", "no"]
    ]


def test_percentiles_and_folders_of_ones_own_models_are_drawn(tasks: Tasks, tmp_path: Path) -> None:
    """What ``bench --json`` and ``storage --json`` print are results."""
    folder = tmp_path / "measured"
    folder.mkdir()
    for name, words in (
        ("bench-box", ("bench", tasks.shapes, "--rounds", 3, "--runtime", "onnxruntime")),
        ("storage-box", ("storage", tasks.shapes, tasks.tints)),
    ):
        said = edgepet(*words, "--json")
        assert said.code == 0, said.err
        (folder / f"{name}.json").write_text(said.out)

    said = edgepet("report", folder, "-o", tmp_path / "page.html", "--json")

    assert said.code == 0, said.err
    assert [each["drawn"] for each in said.json["read"]] == [True, True]
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    told = json.loads((folder / "storage-box.json").read_text())
    (row,) = cells(reader, "Folders that tasks were run from, all files counted")
    assert row[:3] == ["storage-box", "fp32", "2"]
    assert row[-1] == f"{told['ratio']:.2f}×"
    assert "Percentiles: bench-box" in {each["text"] for each in reader.all("h3")}


# -------------------------------------------------------------------------------------------------- the command line


def test_the_screen_and_the_json_say_what_was_read_and_what_is_lacking(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "r", accuracy=scores(a=(0.5, 100), b=(0.6, 200), c=(0.7, 300)), other={"environment": MADE}
    )

    said = edgepet("report", folder, "-o", tmp_path / "page.html")
    told = edgepet("report", folder, "-o", tmp_path / "page.html", "--json").json

    size = (tmp_path / "page.html").stat().st_size
    assert said.code == 0, said.err
    assert "of 2 results\n  listed and not drawn: other\n  0 of 0 checks in them said no" in said.out
    assert "serving" in said.out
    assert sorted(told) == ["bytes", "checks", "failed", "lacks", "path", "read"]
    assert (told["path"], told["bytes"], told["failed"]) == (str(tmp_path / "page.html"), size, [])
    assert told["read"][0] == {
        "name": "accuracy", "command": "python x.py", "date": "2026-11-20", "cpu": "Tiny CPU", "drawn": True,
    }  # fmt: skip
    assert {"section": "Many tasks on one image", "needs": "serving"} in told["lacks"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "{folder}: holds no result, a file ending in .json\n  fix: `make bench` writes benchmarks/results"),
        ({"a.json": "{"}, "{folder}/a.json: needs JSON, got"),
        ({"a.json": "[1]"}, "a.json: needs an object, got"),
        ({"a.json": '{"environment": {"versions": {}}}'}, "a.json.environment: needs the key 'cpu'"),
        ({"half.json": '{"rows": [{"task": 3}]}'}, "half.json.rows[0].task: needs a text, got 3"),
        ({"serving.json": '{"tasks": "ten"}'}, "serving.json.tasks: needs an integer of at least 0, got 'ten'"),
        ({"methods.json": '{"networks": {}, "cells": []}'}, "methods.json.cells: needs an object, got"),
    ],
)
def test_a_result_that_is_none_is_refused_by_its_place(files: dict[str, str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)

    with pytest.raises(InputError) as refusal:
        report([folder], output=tmp_path / "page.html")

    assert str(refusal.value).startswith(message.format(folder=folder)), str(refusal.value)
    assert not (tmp_path / "page.html").exists()


def test_two_results_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, speed={}) for name in ("a", "b")]

    with pytest.raises(InputError) as refusal:
        report(folders, output=tmp_path / "page.html")

    assert str(refusal.value) == "results: need names of their own, got speed twice"


def test_a_page_has_the_name_of_one_and_folders_are_there(tmp_path: Path) -> None:
    said = edgepet("report", RESULTS, "-o", tmp_path / "page.txt")
    assert (said.code, said.err) == (3, "-o: needs a file name ending in .html, got 'page.txt'\n")

    said = edgepet("report", tmp_path / "nothing", "-o", tmp_path / "page.html", "--quiet")
    assert said.code == 3
    assert said.err.startswith(f"{tmp_path}/nothing: is no folder of results\n  fix: ")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    said = edgepet("report", RESULTS, "-o", tmp_path / "page.html", "--quiet")

    assert said.code == 5
    assert said.err.startswith("a chart: needs the package 'matplotlib'")
    assert said.err.endswith("fix: pip install 'edgepet[report]'\n")


@pytest.mark.slow
def test_the_commands_of_the_guide_end_well(tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    shutil.copy(tasks.shapes, tmp_path / "flowers.pet")
    shutil.copy(tasks.tints, tmp_path / "birds.pet")
    monkeypatch.chdir(tmp_path)
    ran = 0

    for block in re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            program, *words = shlex.split(line.replace("--rounds 200", "--rounds 2"))
            if program == "mkdir":
                Path(words[0]).mkdir()
            if program != "edgepet":
                continue
            words, _, target = (words[:-2], ">", words[-1]) if ">" in words else (words, "", "")
            said = edgepet(*words)
            assert said.code == 0, (line, said.err)
            if target:
                Path(target).write_text(said.out)
            ran += 1

    assert ran == 4
    assert Path("report.html").exists()
    assert Path("box.html").exists()
