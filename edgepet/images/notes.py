"""What is said of a data folder: in one line what is used and what is passed over, and why; each file with ``-v``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from edgepet.errors import InputError, refusing
from edgepet.files import sha256_file
from edgepet.images.folders import PassedOver, Split, grouped, split_folders
from edgepet.images.sets import ImageSet, open_split

Tell: TypeAlias = Callable[[str, Sequence[str]], None]  # a line, and those below it where everything is asked for


def tell_nobody(line: str, details: Sequence[str]) -> None:
    """For those who do not ask."""


def tell_of(folder: Path, sets: Mapping[Split, ImageSet], tell: Tell, *, clips: bool = False) -> None:
    """Tell what is used of ``folder`` and what is passed over, then which pictures of train are in another split too.

    Training images are compared with a test split that is not used, and a split that is used with them.

    Raises:
        InputError: ``folder`` cannot be read any more.
    """
    if tell is tell_nobody:
        return
    found = split_folders(folder, clips=clips)
    passed = dict.fromkeys(each for images in sets.values() for each in images.passed_over)
    counts = (f"{len(images)} {split}{_called(split, found)}" for split, images in sets.items())
    told = f"{folder}: {' and '.join(counts)} {'clips' if clips else 'images'}"
    summary = passed_over(folder, tuple(passed))
    details = [f"  {_within(each.path, folder)}: {each.why}" for each in passed]
    tell(f"{told}; {summary}" if summary else told, details)
    for line, pairs in () if clips else _shared(folder, {**_others(folder, sets, found), **sets}):
        tell(line, pairs)


def passed_over(folder: Path, passed: Sequence[PassedOver]) -> str | None:
    """How many files of ``folder`` are passed over, by why, in one line; None where none is worth a word."""
    groups = grouped(passed)
    if not groups:
        return None
    whys = (why if why.startswith(".") else f"{why} ({_within(first, folder)})" for why, _, first in groups)
    told = ", ".join(f"{count} {why}" for (_, count, _), why in zip(groups, whys, strict=True))
    return f"passed over {sum(count for _, count, _ in groups)}: {told}"


def same_pictures(first: ImageSet, second: ImageSet) -> list[tuple[Path, Path]]:
    """Each file of ``second`` whose bytes a file of ``first`` has too, behind that one.

    Only files of one size are read.

    Raises:
        InputError: a file cannot be read any more.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in first.paths:
        by_size[_size(path)].append(path)
    known: dict[int, dict[str, Path]] = {}
    pairs = []
    for path in second.paths:
        size = _size(path)
        if size in by_size:
            if size not in known:
                known[size] = {sha256_file(other): other for other in reversed(by_size[size])}
            same = known[size].get(sha256_file(path))
            pairs += [(same, path)] if same is not None else []
    return pairs


def _size(path: Path) -> int:
    with refusing(path, "could not be read"):
        return path.stat().st_size


def _others(folder: Path, sets: Mapping[Split, ImageSet], found: Mapping[Split, Path]) -> dict[Split, ImageSet]:
    """The split to compare with: test beside train, train beside another; none where it cannot be read."""
    wanted: Split = "test" if "train" in sets else "train"
    try:
        return {wanted: open_split(folder, wanted)} if wanted in found else {}
    except InputError:  # it is not what was asked for
        return {}


def _shared(folder: Path, sets: Mapping[Split, ImageSet]) -> Iterator[tuple[str, list[str]]]:
    for split, images in sets.items() if "train" in sets else ():
        pairs = [] if split == "train" else same_pictures(sets["train"], images)
        if pairs:
            named = [f"{_within(other, folder)} is {_within(mine, folder)}" for mine, other in pairs]
            told = f"{len(pairs)} of {len(images)} {split} images are among those of train too"
            yield f"{folder}: {told} ({named[0]}): accuracy on them says little", [f"  {pair}" for pair in named]


def _called(split: Split, found: Mapping[Split, Path]) -> str:
    """The folder's name, where it is not the split's."""
    return f" ({found[split].name}/)" if split in found and found[split].name != split else ""


def _within(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
