"""Labelled images that ordinary packages carry, as folders of PNGs: for the extra ``demo``, tests and benchmarks.

Files are read out of installed packages; nothing is downloaded, and no code of those packages is imported or run
but librsvg, which draws cards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from edgepet.canonical import parse_json
from edgepet.errors import InputError, refusing
from edgepet.files import new_folder, read_file, write_file
from edgepet.samples.collect_clipart import CLIPART
from edgepet.samples.collect_drawings import CARDS, EMOJI
from edgepet.samples.collect_maps import LANDCOVER, LANDCOVER_SEG
from edgepet.samples.collect_objects import COUNT, STAMPS
from edgepet.samples.collect_scans import DIGITS, ELPV, FASHION
from edgepet.samples.collect_stamps import STAMPS_SCENE
from edgepet.samples.collect_textures import MATERIALS
from edgepet.samples.collect_trees import TREES
from edgepet.samples.masked import CONTENTS, MaskTask, drawn_splits, images_of, write_masked
from edgepet.samples.pools import LabelledImage, Pools, Task
from edgepet.samples.scenes import CONTENTS as SCENES
from edgepet.samples.scenes import SceneTask, scenes_of, write_scenes
from edgepet.strict import ObjectReader

_CONTENTS = ("train", "val", "test", "meta.json")  # of a built task of classes


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """A task on disk: ``counts`` is split -> images, ``pixel_sha256`` of every image's name, size and pixels."""

    name: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    licence: str
    source: str
    pixel_sha256: str


def build_task(name: str, folder: Path, *, test_cap: int | None = 2000) -> TaskSummary:
    """Write ``folder/{train,val,test}/CLASS/*.png`` and ``folder/meta.json``: the same pixels by one Pillow.

    Releases scale and turn cut-out pictures a little differently (12.3 and 13.0 do): ``pixel_sha256`` tells. A task of
    masks is ``folder/{images,masks}/{train,val,test}/*.png`` and ``folder/classes.txt``; one of boxes has
    ``folder/annotations/instances_{train,val,test}.json``, and may have masks too. The same task, whole and with this
    ``test_cap`` (None: no cap), is left as it is; another built task is replaced.

    Raises:
        InputError: no such task, a cap below one image a class, a package file of another release, or a ``folder`` that
            cannot be written or holds something other than a built task.
        MissingError: a package that carries the images is not installed.
    """
    purpose = f"demo:{name}"
    if name not in TASKS:
        raise InputError(purpose, f"sample tasks are one of {', '.join(TASKS)}", got=repr(name))
    task = TASKS[name]
    if test_cap is not None and test_cap < len(task.classes):
        raise InputError(purpose, f"test_cap must be at least {len(task.classes)}, one image a class", got=test_cap)
    if (standing := _standing(folder, name, test_cap)) is not None:
        return standing
    read = [file.read(purpose=purpose) for file in task.files]
    with new_folder(folder, only=(*_CONTENTS, *CONTENTS, *SCENES)) as scratch:
        if isinstance(task, MaskTask):
            masked = drawn_splits(task.collect(read), task.seed, test_cap)
            counts = {split: len(images) for split, images in masked.items()}
            digest = write_masked(masked, task.classes, scratch)
        elif isinstance(task, SceneTask):
            scenes = task.collect(read, test_cap)
            counts = {split: len(images) for split, images in scenes.items()}
            digest = write_scenes(scenes, task, scratch)
        else:
            splits = _split(task.collect(read), task.seed, test_cap)
            counts = {split: len(images) for split, images in splits.items()}
            digest = _write(splits, task.classes, scratch)
        summary = TaskSummary(
            name=name, classes=task.classes, counts=counts, licence=task.licence, source=_source(task),
            pixel_sha256=digest,
        )  # fmt: skip
        write_file(scratch / "meta.json", json.dumps(asdict(summary) | {"test_cap": test_cap}, indent=1).encode())
    return summary


def _standing(folder: Path, name: str, test_cap: int | None) -> TaskSummary | None:
    """What building again would give, where it is there whole; refuses a folder that building would wrongly delete."""
    held = {item.name for item in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    if not held:
        return None
    if "meta.json" not in held or not any(held <= set(known) for known in (_CONTENTS, CONTENTS, SCENES)):
        fix = "name a folder that does not exist yet"
        raise InputError(str(folder), "is not a built task", got=", ".join(sorted(held)[:5]), fix=fix)
    path = folder / "meta.json"
    try:
        meta = ObjectReader(parse_json(read_file(path)), str(path), error=InputError)
    except ValueError as error:
        raise InputError(str(path), "is not JSON", got=str(error), fix=f"remove {folder}") from error
    texts = {key: meta.text(key) for key in ("name", "licence", "source", "pixel_sha256")}
    counts = {split: meta.nested("counts").integer(split) for split in ("train", "val", "test")}
    if "annotations" in held:
        on_disk = scenes_of(folder)
    elif held <= set(CONTENTS):
        on_disk = images_of(folder)
    else:
        on_disk = {split: sum(1 for _ in (folder / split).glob("*/*.png")) for split in counts}
    same = (texts["name"], meta.raw("test_cap"), counts) == (name, test_cap, on_disk)
    return TaskSummary(classes=meta.texts("classes"), counts=counts, **texts) if same else None


def _source(task: Task | MaskTask | SceneTask) -> str:
    """Registry and releases, each once; ``none`` for what is made without a file."""
    releases: dict[str, dict[str, None]] = {}
    for file in task.files:
        releases.setdefault(file.registry, {})[file.requirement] = None
    return "; ".join(f"{registry} {', '.join(names)}" for registry, names in releases.items()) or "none"


def _split(pools: Pools, seed: int, cap: int | None) -> Pools:
    rng = np.random.RandomState(seed)  # the old generator: its stream is frozen, a Generator's may change
    if "val" in pools:
        train, val = _balanced(pools["train"], 800, rng), _balanced(pools["val"], 200, rng)
    else:
        train, val, seen = [], [], Counter[str]()
        for image in _balanced(pools["train"], 1000, rng):
            seen[image[1]] += 1
            (train if seen[image[1]] % 5 else val).append(image)
    return {"train": train, "val": val, "test": _balanced(pools["test"], cap, rng)}


def _balanced(images: list[LabelledImage], count: int | None, rng: np.random.RandomState) -> list[LabelledImage]:
    """One image of each class in turn, each class in random order, until there are ``count`` or no more."""
    by_label: dict[str, list[LabelledImage]] = {}
    for image in sorted(images, key=itemgetter(0)):
        by_label.setdefault(image[1], []).append(image)
    # From the end of each permutation: the digests in docs and results were made so.
    queues = [[members[i] for i in rng.permutation(len(members))[::-1]] for _, members in sorted(by_label.items())]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((image for image in turns if image is not None), count))


def _write(splits: Mapping[str, list[LabelledImage]], classes: Sequence[str], folder: Path) -> str:
    digest = hashlib.sha256()
    with refusing(folder, "could not be written"):
        for split, label in itertools.product(splits, classes):
            (folder / split / label).mkdir(parents=True)
        for split, images in splits.items():
            for key, label, draw in images:
                picture = draw()
                # Level 1 takes a quarter of the default's time for a quarter more bytes; the pixels are the same.
                picture.save(folder / split / label / f"{key}.png", compress_level=1)
                digest.update(f"{split}/{label}/{key}/{picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()


TASKS: dict[str, Task | MaskTask | SceneTask] = {
    "digits": DIGITS,
    "landcover": LANDCOVER,
    "landcover_seg": LANDCOVER_SEG,
    # Those below are for benchmarks: they need more than the extra ``demo`` (see CONTRIBUTING.md).
    "fashion": FASHION,
    "elpv": ELPV,
    "cards": CARDS,
    "materials": MATERIALS,
    "emoji": EMOJI,
    "stamps": STAMPS,
    "clipart": CLIPART,
    "count": COUNT,
    "trees": TREES,
    "stamps_scene": STAMPS_SCENE,
}
