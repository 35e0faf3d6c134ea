"""Generations on the disk, and the files that they name.

<root>/generations/<number>-<digits>.json: ``digits`` are of the sha256 of the file. The newest whole one counts;
the one before is kept, in case that a disk forgets what it was told to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from edgepet.bringing import clear_folder
from edgepet.canonical import canonical_json, parse_json
from edgepet.device.generations import Generation, as_json, from_json
from edgepet.device.graph_states import GraphState
from edgepet.errors import EdgepetError, InputError, refusing
from edgepet.files import made_folder, read_file, sha256_file, write_file
from edgepet.graphs.base import BaseGraph, graph_at
from edgepet.graphs.int8 import Int8Graph, int8_at
from edgepet.graphs.manifest import Listed, damaged, is_whole, listed_files, read_manifest

KEPT = 2  # generations on the disk
BRING = "edgepet device init --store STORE --for TASK.pet on a host, or --from a folder that has it whole"
_GENERATION = re.compile(r"(\d{10})-([0-9a-f]{16})\.json")
_PACK = re.compile(r"[0-9a-f]{64}\.pet")
_KEY = re.compile(r".+\.pub")
_MOST_SEEN = 8
_AGAIN = 3  # times that generations are listed, when those that were are gone
_seen: dict[Path, tuple[tuple[int, int, int], Generation]] = {}  # of this process: generations never change
_GRAPH = re.compile(r"(graph-[A-Za-z0-9_-]+|backbone(-int8)?)\.(json|onnx|safetensors)")


class DamagedError(InputError):
    """The bytes of a generation are not those that its name has the digits of: the one before counts."""


def newest(root: Path) -> Generation:
    """The generation of the store ``root`` that counts, an empty one where there is none.

    Raises:
        InputError: all that there are are damaged or gone, one cannot be read or is of a later version, or the folder
            was written before stores had generations.
    """
    for attempt in range(_AGAIN):
        files = generation_files(root)
        try:
            for path in files:
                with contextlib.suppress(DamagedError):
                    return read_generation(path)
        except InputError:
            if attempt == _AGAIN - 1 or all(path.exists() for path in files):
                raise
            continue  # others wrote newer ones meanwhile
        break
    if files or any((root / "packs").glob("*.pet")):
        fix = "edgepet device init into another folder, then install its packs/*.pet there"
        got = files[0].name if files else "none at all beside its packs"
        raise InputError(str(root), "has no generation that is whole", got=got, fix=fix)
    if (root / "tasks").is_dir():
        fix = f"edgepet device init into another folder, then install {root / 'tasks'}/*.pet there"
        raise InputError(str(root), "was written before stores had generations", fix=fix)
    return Generation()


def write_generation(root: Path, then: Generation) -> None:
    """Write the generation that counts from now on, then clear what it and the one before do not name.

    Raises:
        InputError: it cannot be written; then the one before still counts.
    """
    text = canonical_json(as_json(then))
    folder = made_folder(root / "generations", "what the store holds is kept there")
    name = f"{then.number:010d}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    write_file(folder / name, text, read_only=True)
    with contextlib.suppress(OSError):
        _remember(folder / name, _stamp(folder / name), then)
    clear(root)


def clear(root: Path) -> None:
    """Remove what the kept generations do not name. What cannot be removed now is removed later.

    Raises:
        InputError: a generation, or a folder, cannot be read: then nothing is removed.
    """
    whole = dict[str, Generation]()
    for path in generation_files(root):
        with contextlib.suppress(DamagedError):
            if len(whole) < KEPT:
                whole[path.name] = read_generation(path)
    if not whole:
        return
    with refusing(root, "could not be read"):
        clear_folder(root / "generations", _GENERATION, keep=whole)
        packs = {f"{digest}.pet" for each in whole.values() for digest in each.packs}
        clear_folder(root / "packs", _PACK, keep=packs)
        clear_folder(root / "trusted", _KEY, keep={path.name for path in root.glob("trusted/*.pub")})
        graphs = {name for each in whole.values() for name in each.graphs}
        for folder in _folders(root / "backbones"):
            descriptions = [name for name in graphs if name.startswith(f"{folder.name}/")]
            kept = {Path(name).name for name in descriptions}
            try:
                for name in descriptions:
                    kept.update(listed(root / "backbones" / name))
            except EdgepetError:
                continue  # one that is damaged does not say what it keeps
            clear_folder(folder, _GRAPH, keep=kept)


def generation_files(root: Path) -> list[Path]:
    """Those of generations, the newest first."""
    folder = root / "generations"
    try:
        return sorted((path for path in folder.iterdir() if _GENERATION.fullmatch(path.name)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(str(folder), "could not be read", got=error.strerror) from error


def read_generation(path: Path) -> Generation:
    """One generation; a file is read again only where it was changed.

    Raises:
        InputError: it is damaged, or cannot be read.
    """
    with refusing(path, "could not be read"):
        stamp = _stamp(path)
    seen = _seen.get(path)
    if seen is None or seen[0] != stamp:
        seen = stamp, _parsed(path, read_file(path))
        _remember(path, *seen)
    return seen[1]


def _stamp(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _remember(path: Path, stamp: tuple[int, int, int], now: Generation) -> None:
    while len(_seen) >= _MOST_SEEN:
        _seen.pop(next(iter(list(_seen)), path), None)
    _seen[path] = stamp, now


def _parsed(path: Path, text: bytes) -> Generation:
    digits = hashlib.sha256(text).hexdigest()[:16]
    match = _GENERATION.fullmatch(path.name)
    if match is None or match[2] != digits:
        raise DamagedError(str(path), "is not what its name says", got=digits)
    try:
        now = from_json(parse_json(text), path.name)
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), "is not readable JSON", got=error) from error
    if now.number != int(match[1]):
        raise InputError(str(path), "is not what its name says", got=now.number)
    return now


def listed(path: Path) -> Listed:
    """The files that a graph's description lists."""
    return listed_files(read_manifest(path, where=path.name, fix=BRING))


def require_own(root: Path, path: Path) -> None:
    """Refuse a link in place of a file of the store ``root``, or of a folder that it is in: others may change it.

    Raises:
        InputError: there is one.
    """
    for each in (path, *(parent for parent in path.parents if root in parent.parents)):
        if each.is_symlink():
            raise InputError(str(each), "must be a file or folder of the store itself", got="a link", fix=BRING)


def damaged_files(root: Path, name: str, graph: GraphState) -> list[Path]:
    """Files of a graph of the store ``root`` that are missing or others: its description, or what that lists."""
    path = root / "backbones" / name
    found = sha256_file(path) if path.is_file() else ""
    sha256 = found if found in graph.digests else graph.sha256
    files: Listed = {path.name: (sha256, path.stat().st_size if found else 0)}
    if not damaged(path.parent, files):
        files = {**files, **listed(path)}
    wrong = {*damaged(path.parent, files), *(each for each in files if (path.parent / each).is_symlink())}
    return [path.parent / each for each in sorted(wrong)]


def adds_to(root: Path, name: str, kept: GraphState, graph: BaseGraph | Int8Graph) -> bool:
    """Whether ``graph``, which comes, is the one that is here but for what that lacks: ranges of its own, or maps."""
    path = root / "backbones" / name
    if isinstance(graph, Int8Graph):
        same = kept.ranges in (None, graph.ranges_sha256)
        adds_maps = same and bool(graph.maps) and not int8_at(path).maps
        lacks = (kept.ranges is None and graph.ranges is not None) or adds_maps
    else:
        lacks = bool(graph.maps) and not graph_at(path).maps
    return lacks and dict(listed(path)) == dict(graph.files)


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.is_symlink()) if path.is_dir() else []


def require_same(root: Path, now: Generation, name: str, files: Listed) -> None:
    """Refuse ``files`` of a graph that would take the place of whole ones that another graph of the backbone runs on.

    Raises:
        InputError: one would.
    """
    folder, _, _ = name.partition("/")
    for other in (each for each in now.graphs if each.startswith(f"{folder}/") and each != name):
        path, here = root / "backbones" / other, dict[str, tuple[str, int]]()
        with contextlib.suppress(EdgepetError):  # a description that is damaged
            here.update(listed(path))
        unlike = [file for file, told in here.items() if files.get(file, told)[0] != told[0]]
        if unlike and not damaged_files(root, other, now.graphs[other]):  # which reads all of it: seldom
            what, fix = "is another file than the graph's that comes", "make all graphs of a backbone on one host"
            raise InputError(str(path.parent / unlike[0]), what, got=f"{here[unlike[0]][0][:12]} here", fix=fix)


def is_own(path: Path, sha256: str, size: int) -> bool:
    """Whether a file of a store is there and whole, and no link."""
    return not path.is_symlink() and is_whole(path, sha256, size)


@contextlib.contextmanager
def mending() -> Iterator[None]:
    """In a store nothing is made again: what is damaged is brought.

    Raises:
        InputError: as the block, with that as its cure.
    """
    try:
        yield
    except InputError as error:
        raise InputError(error.where, error.what, got=error.got, fix=BRING) from error
