"""``edgepet sites``: the table, what is kept of it, the choice, and what is refused before anything is measured."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import edgepet
from edgepet.files import cache_folder
from edgepet.packs.pack import read_pack
from edgepet.reports.screen import show, terminal
from edgepet.verbs import sites as verb
from edgepet.verbs.sites import SitesReport
from tests.flow import Tasks, refused
from tests.flow import edgepet as command

IMAGES, HELD = 9, 27  # 12 of val, and 15 of train's others
ESTIMATE = "12 submodules: up to 6 short fits each, at most "


@pytest.fixture(scope="module")
def report(tasks: Tasks) -> SitesReport:
    """With another LoRA the same is measured: all tests of this file share it."""
    return edgepet.sites(tasks.data, tasks.spec, image_size=32, images=IMAGES)


def words(tasks: Tasks, *more: object) -> list[object]:
    return ["sites", tasks.data, "--backbone", tasks.spec, "--img-size", 32, "--images", IMAGES, *more]


def test_every_submodule_has_a_row_with_what_was_tried(report: SitesReport) -> None:
    kinds = ["q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert [row.name for row in report.sites] == [f"{kind} in {blocks}" for blocks in ("0-2", "3-5") for kind in kinds]
    for row in report.sites:
        assert [each.dimension for each in row.tried] == [0, 16, 128, 1024, 8192][: len(row.tried)]
        assert (row.gain, row.error, row.top1) == (row.tried[0].gain, row.tried[0].error, row.tried[0].top1)
        assert (row.dimension is None) is (len(row.tried) == 1)
    assert report.images == {"train": IMAGES, "val": HELD}
    assert report.estimate_seconds is None or report.estimate_seconds > 0
    assert report.budget_bytes == 2 * 12288  # LoRA by itself: fp16 of q and v in six blocks


def test_what_was_measured_is_kept_and_another_budget_measures_nothing(tasks: Tasks, report: SitesReport) -> None:
    told: list[str] = []

    again = edgepet.sites(
        tasks.data, tasks.spec, image_size=32, images=IMAGES, budget=500, tell=lambda line, more: told.append(line)
    )

    assert (again.sites, again.estimate_seconds, again.budget_bytes) == (report.sites, None, 500_000)
    assert told == [f"{tasks.data}: {IMAGES} train and {HELD} val images"]


def test_a_run_that_was_ended_goes_on_and_what_is_not_whole_is_measured_again(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPET_CACHE", str(tmp_path))
    given = {"image_size": 32, "images": 6}

    def stop(name: str) -> None:
        if ", 4 of 12" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edgepet.sites(tasks.data, tasks.spec, **given, stage=stop)  # type: ignore[arg-type]
    kept = sorted((tmp_path / "sites").iterdir())
    kept[1].write_bytes(kept[1].read_bytes()[:-9])
    kept[2].write_text('{"tried": [{"dimension": 0, "gain": 1, "error": true, "top1": 1}]}')
    told: list[str] = []
    edgepet.sites(tasks.data, tasks.spec, **given, tell=lambda line, more: told.append(line))  # type: ignore[arg-type]

    assert len(kept) == 3
    assert told[1].startswith("11 submodules, 1 are known from before: up to 6 short fits each, at most ")
    assert sorted(path.suffix for path in (tmp_path / "sites").iterdir()) == [".json"] * 12


def test_another_seed_is_measured_anew(tasks: Tasks, report: SitesReport) -> None:
    told: list[str] = []

    def stop(name: str) -> None:
        if ", 1 of 12" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edgepet.sites(
            tasks.data, tasks.spec, image_size=32, images=IMAGES, seed=1, stage=stop,
            tell=lambda line, more: told.append(line),
        )  # fmt: skip

    assert told[1].startswith(ESTIMATE)
    assert told[1].endswith(" at the speed of now")


# --------------------------------------------------------------------------------------------------------- the screen


def shown(report: SitesReport, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    show(terminal(stderr=False), verb.VERB.screen(report))
    return capsys.readouterr().out


def test_the_screen_says_what_to_do_and_the_command_runs_as_printed(
    tasks: Tasks, report: SitesReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--backbone", tasks.spec, "--method", "lora", "--img-size", "32", "--set", "rank=2"]
    train = ("train", str(tasks.data), *given, "--set", "on=v,mlp.fc1", "--set", "blocks=3-5")
    chosen = replace(report, settings={"rank": "2"}, on=("v", "mlp.fc1"), blocks="3-5", fp16_bytes=5376,
                     least_bytes=1536, budget_bytes=6000, train=train)  # fmt: skip

    out = shown(chosen, capsys)

    assert "  within 6.0 kB of lora rank=2: --set on=v,mlp.fc1 --set blocks=3-5, 5.4 kB\n" in out
    line = out.splitlines()[-1]
    assert line.endswith(f" {shlex.join(train)} -o task.pet")
    monkeypatch.chdir(tmp_path)
    printed = shlex.split(f"train {line.partition(' train ')[2]}")
    assert command(*printed, "--epochs", 1, "--quiet").code == 0
    settings = read_pack(tmp_path / "task.pet").delta.settings
    assert (settings["rank"], settings["on"], settings["blocks"]) == (2, ["v", "mlp.fc1"], "3-5")


def test_where_nothing_gains_or_fits_the_table_is_there_without_a_choice(
    report: SitesReport, capsys: pytest.CaptureFixture[str]
) -> None:
    none = replace(report, on=(), blocks=None, fp16_bytes=None, least_bytes=None, train=())

    nothing, small = shown(none, capsys), shown(replace(none, least_bytes=6144, budget_bytes=2000), capsys)

    assert "  nothing gains more than its standard error: try more --images\n" in nothing
    assert "  within 2.0 kB of lora: nothing; the smallest place that gains takes 6.1 kB\n" in small
    assert "mlp.fc2" in nothing
    assert "next:" not in nothing + small


def test_the_words_of_training_have_what_was_asked(tasks: Tasks, report: SitesReport) -> None:
    if report.blocks is None:
        pytest.skip("nothing gained on these images, with this processor's sums")
    assert report.train[:2] == ("train", str(tasks.data))
    assert f"blocks={report.blocks}" in report.train
    assert f"on={','.join(report.on)}" in report.train
    assert report.fp16_bytes is not None
    assert report.fp16_bytes <= report.budget_bytes


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0"], "--budget: must be above 0 kilobytes, and at most 1e+09, got 0.0\n"),
        (["--budget", "nan"], "--budget: must be above 0 kilobytes, and at most 1e+09, got nan\n"),
        (["--budget", "0.1"], "--budget: must hold at least one submodule, and the smallest takes 6.144 kB, got 0.1\n"),
        (["--images", "1"], "--images: must be at least 2: one alone has no standard error, got 1\n"),
        (["--method", "linear-probe"], "--method: tunes nothing in the blocks of test_vit, got 'linear-probe'\n"),
        (["--set", "on=q"], "--set on: is what is asked for, got 'q'\n  fix: leave it out\n"),
        (["--set", "blocks=1"], "--set blocks: is what is asked for, got '1'\n  fix: leave it out\n"),
        (["--set", "rang=1"],
         "--set rang: lora has the settings alpha, alphas, blocks, on, rank, ranks, rslora, got 'rang'\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_measured(
    more: list[str], message: str, tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPET_CACHE", str(tmp_path))

    assert refused(3, *words(tasks), *more) == message
    assert not (tmp_path / "sites").exists()


def test_features_that_were_kept_are_gone(report: SitesReport) -> None:
    assert report.sites
    assert {path.suffix for path in (cache_folder() / "sites").iterdir()} == {".json"}
