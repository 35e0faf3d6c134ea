"""A data folder as people's tools write it: which folders are splits and classes, which files are images.

No image is opened here. What is not used is kept with the reason why, and what could not be read is refused by name.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

from edgepet.errors import InputError, option
from edgepet.images.formats import is_image, lacks

Split: TypeAlias = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MOST_NAMED = 20  # unreadable files in one message

_ByClass: TypeAlias = Mapping[str, Sequence[Path]]  # class name -> its images; both in sorted order

# What a split's folder is called, in any case, by those who write one.
_CALLED: Mapping[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip

# What systems leave in folders, besides names that begin with a dot.
_LEFT_BY_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
     "ehthumbs.db", "desktop.ini", "icon\r"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file or folder that is not used, and why; ``worth`` a word, where it may be an image that somebody misses."""

    path: Path
    why: str
    worth: bool = True


@dataclass(frozen=True, slots=True)
class Listing:
    """The images, or clips' folders, of each class of a split, and what beside them is not used."""

    by_class: _ByClass
    passed_over: tuple[PassedOver, ...]


def split_of(name: str) -> Split | None:
    """The split whose folder may be called ``name``."""
    return _CALLED.get(name.casefold())


def split_folders(folder: Path, *, clips: bool = False) -> dict[Split, Path]:
    """The folders of the splits that are there, by any of their names; empty for one folder of class folders.

    Raises:
        InputError: ``folder`` cannot be read, or two folders are one split.
    """
    inside = folders_in(folder)
    named: dict[Split, list[Path]] = {split: [] for split in SPLITS}
    for item in inside:
        split = split_of(item.name)
        if split is not None:
            named[split].append(item)
    count = sum(map(len, named.values()))
    # A class may be called "train": then its folder holds images, and it has neighbours that are no splits.
    if count < len(inside) and not _are_splits(named["train"], inside, clips):
        return {}
    for called, items in named.items():
        if len(items) > 1:
            got, fix = " and ".join(f"{item.name}/" for item in items), "keep one of them, or join them"
            raise InputError(str(folder), f"needs one folder for {called}", got=got, fix=fix)
    return {split: items[0] for split, items in named.items() if items}


def _are_splits(train: Sequence[Path], inside: Sequence[Path], clips: bool) -> bool:
    """Whether what is called train holds class folders, with folders beside it that may be anything."""
    below = [item for folder in train for item in folders_in(folder)]
    if clips:
        return any(folders_in(item) for item in below)
    return bool(below) and not all(any(map(is_image, _files(item))) for item in inside)


def beside_splits(folder: Path, found: Collection[Path]) -> tuple[PassedOver, ...]:
    """What lies beside the folders of splits: ``found``."""
    others = [item for item in _all(folder) if item not in found]
    return tuple(_passed(item, _beside(item)) for item in others)


def _beside(item: Path) -> str | None:
    if item.is_dir():
        return "beside the splits"
    return "in no split" if is_image(item) else None


def list_classes(folder: Path, *, least: int = 2, clips: bool = False, sparse: bool = False) -> Listing:
    """The images of every class folder in ``folder``, classes and files in sorted order.

    Args:
        least: classes that there must be.
        clips: a class folder holds folders, each with the frames of a clip.
        sparse: a class without an image is left out, and not refused.

    Raises:
        InputError: fewer classes, one without an image, two of one name or a name that is no UTF-8; a link that leads
            nowhere, a pipe or a device among the images, or one that may not be read: all of them in one message.
    """
    class_folders = folders_in(folder)
    if len(class_folders) < least:
        few = {1: "a class folder", 2: "two class folders"}[least]
        fix = "make one folder a class"
        raise InputError(str(folder), f"needs at least {few}", got=len(class_folders), fix=fix)
    known = set(class_folders)
    passed = [_passed(item, "in no class folder") for item in _all(folder) if item not in known]
    dangling = [item for item in _entries(folder) if item.is_symlink() and not item.exists()]
    by_class: dict[str, Sequence[Path]] = {}
    for name, item in _named(class_folders):
        used, left = _clips(item) if clips else _images(item)
        passed += left
        if used or not sparse:
            by_class[name] = used or _refuse_empty(item, left, clips)
    if not by_class:
        _refuse_empty(folder, passed, clips)
    require_readable([*dangling, *(path for paths in by_class.values() for path in paths)])
    return Listing(by_class, tuple(passed))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder but those that systems leave there, by name."""
    return [item for item in _entries(folder) if item.is_dir()]


def class_name(text: str) -> str:
    """A class's name in the one spelling that is compared: systems spell an accented letter as one sign or as two."""
    return unicodedata.normalize("NFC", text)


def class_places(labels: Sequence[str]) -> dict[str, int]:
    """Where each of a model's ``labels`` is, by the name that folders have for it."""
    return {class_name(label): index for index, label in enumerate(labels)}


def _named(class_folders: Sequence[Path]) -> list[tuple[str, Path]]:
    named: dict[str, Path] = {}
    for item in class_folders:
        name = class_name(item.name)
        if not _is_utf8(name):
            raise InputError(str(item), "needs a class name in UTF-8", got=ascii(item.name), fix="rename the folder")
        if name in named:
            fix = "join the folders: their names look alike"
            raise InputError(str(item.parent), "needs one folder a class", got=f"two called {name!r}", fix=fix)
        named[name] = item
    return sorted(named.items())


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # what Python makes of a byte that is no UTF-8
        return False
    return True


def _images(folder: Path) -> tuple[list[Path], list[PassedOver]]:
    used, passed = [], []
    for item in _all(folder):
        if item.is_dir() and not _is_left_by_system(item):
            passed += [_passed(path, "in a folder within a class") for path in images_below(item)]
        elif _is_left_by_system(item) or not is_image(item):
            passed.append(_passed(item, ""))
        else:
            used.append(item)
    return used, passed


def _clips(folder: Path) -> tuple[list[Path], list[PassedOver]]:
    used = folders_in(folder)
    known = set(used)
    return used, [_passed(item, "in no clip's folder") for item in _all(folder) if item not in known]


def images_below(folder: Path) -> list[Path]:
    """Every image in a folder, at any depth, sorted; what systems leave there is none."""
    found = list[Path]()
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_by_system(Path(name)))
        found += (path for name in sorted(names) if is_image(path := Path(where, name)) and name[0] != ".")
    return found


def _passed(path: Path, why: str | None) -> PassedOver:
    """With its reason: its name, its suffix, or ``why`` an image or a folder is not used."""
    if _is_left_by_system(path):
        return PassedOver(path, "left by the system, or hidden", worth=False)
    if why is None:
        return PassedOver(path, "no image", worth=False)
    package = lacks(path)
    if package is not None:
        return PassedOver(path, f"{path.suffix.lower()}, which Pillow reads with {package}")
    if is_image(path) or path.is_dir():
        return PassedOver(path, why)
    return PassedOver(path, path.suffix.lower() or "without a suffix")


def grouped(passed_over: Sequence[PassedOver]) -> list[tuple[str, int, Path]]:
    """Every reason, for how many, and the first of them; what is not worth a word is not counted."""
    groups: dict[str, list[Path]] = {}
    for each in dict.fromkeys(passed_over):
        if each.worth:
            groups.setdefault(each.why, []).append(each.path)
    return [(why, len(paths), paths[0]) for why, paths in groups.items()]


def _refuse_empty(folder: Path, passed: Sequence[PassedOver], clips: bool) -> NoReturn:
    if clips:
        fix = f"put every clip's frames into a folder of its own, or leave out {option('frames')}"
        raise InputError(str(folder), "holds no folder of frames", fix=fix)
    got = ", ".join(f"{count} {why}" for why, count, _ in grouped(passed))
    raise InputError(str(folder), "holds no image", got=got or None, fix="remove the folder or add images")


def require_readable(paths: Sequence[Path]) -> None:
    """Refuse images that no decoder must be given: a pipe would wait for ever.

    Raises:
        InputError: a link that leads nowhere, what is no file, or may not be read; all of them in one message.
    """
    what, fix = "is not a readable image", "replace the file or remove it"
    bad = [InputError(str(p), what, got=got, fix=fix) for p in paths if (got := _unreadable(p)) is not None]
    if bad:
        raise unreadable(bad, len(paths))


def _unreadable(path: Path) -> str | None:
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        return "a link that leads nowhere" if path.is_symlink() else error.strerror or str(error)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return "a pipe or a device"
    return None if os.access(path, os.R_OK) else "no permission to read it"


def unreadable(bad: Sequence[InputError], among: int) -> InputError:
    """One error as it is; several as a list under the folder that holds them all."""
    if len(bad) == 1:
        return bad[0]
    folder = os.path.commonpath([Path(error.where).parent for error in bad])
    lines = [f"  {os.path.relpath(error.where, folder)}: {error.got}" for error in bad[:MOST_NAMED]]
    lines += [f"  and {len(bad) - MOST_NAMED} more"] if len(bad) > MOST_NAMED else []
    told = "\n".join([f"{len(bad)} of {among} images that are not", *lines])
    return InputError(folder, "needs readable images", got=told, fix="replace these files or remove them")


def _is_left_by_system(path: Path) -> bool:
    return path.name.startswith(".") or path.name.casefold() in _LEFT_BY_SYSTEMS


def _entries(folder: Path) -> list[Path]:
    return [item for item in _all(folder) if not _is_left_by_system(item)]


def _files(folder: Path) -> list[Path]:
    return [item for item in _entries(folder) if not item.is_dir()]


def _all(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda item: item.name)
    except OSError as error:
        fix = "pass a folder with train/ and val/, or a folder of class folders"
        raise InputError(str(folder), "is not a readable folder", got=error.strerror or str(error), fix=fix) from error
