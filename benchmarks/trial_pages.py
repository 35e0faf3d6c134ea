"""The tables of ``trials.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from harness import missing, source, spread
from judging import points_between, read

from edgepet.reports.tables import Column, Table, format_bytes, format_percent, markdown
from edgepet.spec import NpArray


def trial_tables(results: Mapping[str, Any]) -> str:
    """The tables of all trials that there are results of."""
    made = {
        "methods": methods_table,
        "depth": depth_table,
        "few-shots": shots_table,
        "starts": starts_table,
        "pretrained": shots_table,
        "long": long_table,
        "sites": sites_table,
        "grid": grid_table,
    }
    known = {name: results[f"trials-{name}"] for name in made if f"trials-{name}" in results}
    return "\n".join(made[name](found, results.get("trials-speed")) for name, found in known.items())


def methods_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each method, with PACE or without, and its points above two others on the tasks that both have."""
    told = (
        "Test top-1 after 800 images at each method's defaults; of several seeds the mean, and the lowest and highest."
    )
    table = _by_task("Methods on four tasks, demo:vit-small at 112 px", told, result, timed)
    return f"{table}\n{_points(result['rows'])}"


def depth_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each method and range of blocks."""
    told = "Test top-1 after 800 images at defaults, one seed."
    return _by_task("Only some of the blocks, demo:vit-small at 112 px", told, result, timed)


def grid_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each method, and by how many points it is above two others on the tasks that both were tried on."""
    parts = []
    for backbone in dict.fromkeys(row["backbone"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["backbone"] == backbone]
        title = f"The grid, {backbone} at {rows[0]['image_size']} px"
        told = "Test top-1 after 800 images at defaults; of several seeds the mean, and the lowest and highest."
        parts += [_by_task(title, told, {**result, "rows": rows, "trainings": len(rows)}, timed), _points(rows)]
    return "\n".join([*parts, f"{missing(result).strip()}\n"])


def _points(rows: Sequence[Mapping[str, Any]]) -> str:
    right: dict[str, dict[str, list[NpArray]]] = {}
    for row in rows:
        found = read(row["test_right"], row["test_n"])
        right.setdefault(_name(row), {}).setdefault(row["task"], []).append(found)
    beside = [name for name in ("linear-probe", "full") if name in right]
    shown = []
    for name in right:
        cells = []
        for other in beside:
            both = [task for task in right[name] if task in right[other]]
            points = [{task: right[which][task] for task in both} for which in (other, name)]
            known = both and name != other
            cells.append(
                "{:+.1f} ({:+.1f} to {:+.1f}), {}".format(*points_between(*points), len(both)) if known else ""
            )
        shown.append((name, *cells))
    columns = (Column("method"), *(Column(f"points above {name}", right=True) for name in beside))
    told = "Means over tasks with their 95 % intervals, paired by test image, and of how many tasks."
    return f"{markdown(Table('Beside the probe and full fine-tuning', columns, shown))}\n{told}\n"


def _by_task(title: str, told: str, result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    rows, tasks = result["rows"], list(dict.fromkeys(row["task"] for row in result["rows"]))
    speeds = {_name(row): row["images_per_second"] for row in timed["rows"]} if timed else {}
    shown = []
    for name in dict.fromkeys(map(_name, rows)):
        of = [row for row in rows if _name(row) == name]
        top1 = {task: [row["test_top1"] for row in of if row["task"] == task] for task in tasks}
        means = [np.mean(found) for found in top1.values() if found]
        mean = format_percent(float(np.mean(means))) if len(means) == len(tasks) else ""
        speed = f"{speeds[name]:.0f}" if name in speeds else ""
        pack = format_bytes(max(row["pack_bytes"] for row in of))
        shown.append((name, *map(spread, top1.values()), mean, pack, speed))
    numbers = (*tasks, "mean", "largest pack", "images/s")
    columns = (Column("method"), *(Column(name, right=True) for name in numbers))
    sources = " ".join(source(each) for each in (result, timed) if each)
    return f"{markdown(Table(title, columns, shown))}\n{told} {sources}\n"


def shots_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each task and method, a column for each number of images."""
    del timed
    rows, shots = result["rows"], sorted({row["shots"] for row in result["rows"]})
    shown = []
    for task, name in sorted({(row["task"], _name(row)) for row in rows}):
        of = [row for row in rows if (row["task"], _name(row)) == (task, name)]
        shown.append((task, name, *(spread([row["test_top1"] for row in of if row["shots"] == n]) for n in shots)))
    first = rows[0]
    title = f"Images of each class, {first['backbone']} at {first['image_size']} px"
    columns = (Column("task"), Column("method"), *(Column(str(n), right=True) for n in shots))
    told = f"Test top-1 of {first['test_n']} images; mean of the draws of images, and the lowest and highest."
    return f"{markdown(Table(title, columns, shown))}\n{told} {source(result)}\n"


def starts_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each task and method, a column for each number of images."""
    del timed
    rows, shots = result["rows"], sorted({row["shots"] for row in result["rows"]})
    far = {(row["task"], row["method"], row["shots"]): f"{row['largest_logit']:.0f}" for row in rows}
    names = sorted({(row["task"], row["method"]) for row in rows})
    shown = [(*name, *(far.get((*name, count), "") for count in shots)) for name in names]
    columns = (Column("task"), Column("method"), *(Column(str(n), right=True) for n in shots))
    title = f"The largest logit after one epoch of that many images of each class, {rows[0]['backbone']}"
    return f"{markdown(Table(title, columns, shown))}\nOf the images of val. {source(result)}\n"


def long_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each training."""
    epochs = result["rows"][0]["epochs"]
    told = f"Test top-1 after {epochs} epochs of 800 images, one seed."
    return _by_task(f"{epochs} epochs, demo:vit-small at 112 px", told, result, timed)


def sites_table(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """A row for each submodule, by what its dimension is; and below it what the choice is worth."""
    found, rows = result["sites"], result["rows"]
    shown = [
        (site["name"], f"{site['parameters']:,}", "" if site["dimension"] is None else f"{site['dimension']:,}",
         f"{site['gain']:.3f}", format_percent(site["top1"]))
        for site in found["sites"]
    ]  # fmt: skip
    columns = (
        Column("submodule"),
        *(Column(name, right=True) for name in ("parameters", "dimension", "gain", "top-1")),
    )
    told = (
        f"`edgepet sites` on {rows[0]['task']}, tuned on {found['images']['train']} images, "
        f"{found['seconds'] / 60:.0f} min. {source(result)}"
    )
    title = f"Local intrinsic dimension, {found['backbone']}"
    beside = "Test top-1 after 800 images, three seeds, in equal kilobytes."
    worth = _by_task(f"{rows[0]['method']} where it goes by itself, and where `sites` says", beside, result, timed)
    return f"{markdown(Table(title, columns, shown))}\n{told}\n\n{worth}"


def _name(row: Mapping[str, Any]) -> str:
    settings = "".join(f", {key} {value}" for key, value in row["settings"].items())
    begun = f", begun on {', '.join(row['init'])}" if row.get("init") else ""
    return f"{row['method']}{' + PACE' if 'consistency' in row['options'] else ''}{settings}{begun}"
