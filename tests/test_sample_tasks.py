"""Where sample tasks come from: files of Debian and npm packages, drawings, and what is made of their contents."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import re
import shutil
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgepet.errors import InputError, MissingError
from edgepet.samples import drawings
from edgepet.samples.drawings import DebianDrawing
from edgepet.samples.packages import DebianFile, NpmFile, PackageFile
from edgepet.samples.pools import Pools, Task, split_groups
from edgepet.samples.tasks import TASKS, build_task

ROOT = Path(__file__).parent.parent
CONTRIBUTING, PYPROJECT = ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def program(folder: Path, name: str, script: str) -> None:
    """A program of the test's own, which the search path finds first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# Debian packages


@pytest.fixture
def system_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages lie where apt-get installs them, whatever the shell says."""
    monkeypatch.delenv("DPKG_ROOT", raising=False)


@pytest.mark.usefixtures("system_root")
def test_a_debian_file_is_read_where_the_package_put_it(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(b"seven")
    digest = digest_of(b"seven")

    assert DebianFile("some-data", "1-1", str(path), digest).read(purpose="demo:x") == b"seven"
    with pytest.raises(InputError) as refused:
        DebianFile("some-data", "1-1", str(path), "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs {path} of some-data 1-1, sha256:{'0' * 16}, got sha256:{digest}\n"
        "  fix: apt-get install some-data=1-1"
    )


@pytest.mark.usefixtures("system_root")
def test_a_missing_debian_package_is_named_with_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as refused:
        DebianFile("some-data", "1-1", str(tmp_path / "absent"), "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs the Debian package 'some-data', got no {tmp_path}/absent\n  fix: apt-get install some-data"
    )


def test_debian_packages_may_be_unpacked_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``dpkg -x`` does it, which needs no rights; dpkg itself calls the folder by the same name."""
    monkeypatch.setenv("DPKG_ROOT", str(tmp_path))
    (tmp_path / "usr/share").mkdir(parents=True)
    (tmp_path / "usr/share/labels.gz").write_bytes(b"seven")
    file = DebianFile("some-data", "1-1", "/usr/share/labels.gz", digest_of(b"seven"))

    assert file.read(purpose="demo:x") == b"seven"
    with pytest.raises(MissingError) as refused:
        replace(file, path="/usr/share/images.gz").read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs the Debian package 'some-data', got no {tmp_path}/usr/share/images.gz\n"
        "  fix: apt-get install some-data"
    )


# Packages of npm and PyPI


@pytest.fixture
def npm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that an npm says is its own; it holds release 2.0 of ``faces``."""
    folder = tmp_path / "lib" / "node_modules"
    (folder / "faces").mkdir(parents=True)
    (folder / "faces" / "list.json").write_bytes(b"[]")
    program(tmp_path / "bin", "npm", f'[ "$*" = "root -g" ] && echo "{folder}"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


def test_an_npm_file_is_read_in_the_folder_that_npm_names(npm_folder: Path) -> None:
    assert NpmFile("faces", "2.0", "list.json", digest_of(b"[]")).read(purpose="demo:x") == b"[]"


def test_another_release_of_an_npm_package_is_refused(npm_folder: Path) -> None:
    with pytest.raises(InputError) as refused:
        NpmFile("faces", "1.9", "list.json", "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs {npm_folder}/faces/list.json of faces 1.9, sha256:{'0' * 16}, got sha256:{digest_of(b'[]')}\n"
        "  fix: npm install -g faces@1.9"
    )


def test_a_missing_npm_package_is_named_with_the_line_that_installs_it(npm_folder: Path) -> None:
    with pytest.raises(MissingError) as refused:
        NpmFile("hands", "2.0", "list.json", "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: needs the npm package 'hands', got no {npm_folder}/hands/list.json\n  fix: npm install -g hands@2.0"
    )


def test_without_npm_its_packages_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingError) as refused:
        NpmFile("faces", "2.0", "list.json", "0" * 16).read(purpose="demo:x")

    assert str(refused.value) == (
        "demo:x: needs the npm package 'faces', got no npm\n  fix: install Node.js, then npm install -g faces@2.0"
    )


def test_a_package_of_another_extra_is_named_with_it() -> None:
    with pytest.raises(MissingError) as refused:
        replace(TASKS["elpv"].files[0], package="edgepet-no-such-package").read(purpose="demo:elpv")

    assert str(refused.value) == (
        "demo:elpv: needs the package 'edgepet-no-such-package', "
        "got No package metadata was found for edgepet-no-such-package\n  fix: pip install 'edgepet[bench]'"
    )


@pytest.mark.usefixtures("system_root")
def test_a_task_names_each_release_that_it_was_made_of_once(
    tmp_path: Path, npm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"[]")
    faces = NpmFile("faces", "2.0", "list.json", digest_of(b"[]"))
    debian = [DebianFile(name, "1-1", str(path), digest_of(b"[]")) for name in ("first", "second", "first")]

    def collect(contents: Sequence[bytes]) -> Pools:
        assert list(contents) == [b"[]"] * 4
        return {"train": [], "val": [], "test": []}

    task = Task(classes=("a",), licence="none", files=(faces, *debian), seed=1, collect=collect)
    monkeypatch.setitem(TASKS, "tiny", task)

    assert build_task("tiny", tmp_path / "t").source == "npm faces@2.0; deb first=1-1, second=1-1"


# Drawings

SQUARE = gzip.compress(
    b'<svg xmlns="http://www.w3.org/2000/svg" width="2" height="1"><rect width="1" height="1"/></svg>'
)


@pytest.fixture
def square(tmp_path: Path, system_root: None) -> DebianDrawing:
    """The left half of a drawing is black, the right half is not there."""
    path = tmp_path / "square.svgz"
    path.write_bytes(SQUARE)
    return DebianDrawing("some-drawings", "1-1", str(path), digest_of(SQUARE), 8)


def test_a_drawing_is_read_as_a_picture_of_the_width_that_is_asked_for(square: DebianDrawing) -> None:
    if shutil.which("rsvg-convert") is None or not all(Path(font.path).is_file() for font in drawings.FONTS):
        pytest.skip("needs the Debian packages librsvg2-bin and fonts-dejavu-core")

    picture = Image.open(io.BytesIO(square.read(purpose="demo:x"))).convert("RGBA")

    assert picture.size == (8, 4)
    assert [picture.getpixel((x, 2)) for x in (3, 4)] == [(0, 0, 0, 255), (0, 0, 0, 0)]


def test_a_drawing_is_drawn_with_the_listed_letters_alone(
    square: DebianDrawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Plain.ttf").write_bytes(b"letters")
    font = DebianFile("some-font", "1-1", str(tmp_path / "Plain.ttf"), digest_of(b"letters"))
    monkeypatch.setattr(drawings, "FONTS", (font,))
    program(
        tmp_path / "bin", "rsvg-convert", 'echo "$@"; cat "$FONTCONFIG_FILE"; cat "${FONTCONFIG_FILE%/*}/Plain.ttf"'
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    told = square.read(purpose="demo:x").decode()

    assert re.sub(r"<dir>/.*?</dir>", "<dir>HERE</dir>", told) == (
        "-w 8 -u\n"
        "<fontconfig>\n<dir>HERE</dir>\n"
        "<alias><family>Serif</family><prefer><family>DejaVu Serif</family></prefer></alias>\n"
        '<match target="pattern"><edit name="family" mode="append_last"><string>DejaVu Sans</string></edit></match>\n'
        "</fontconfig>\n"
        "letters"
    )


def test_a_drawing_that_cannot_be_drawn_says_why(
    square: DebianDrawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawings, "FONTS", ())
    program(tmp_path / "bin", "rsvg-convert", 'echo "Error: no root element" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    with pytest.raises(InputError) as refused:
        square.read(purpose="demo:x")

    assert str(refused.value) == (
        f"demo:x: could not draw {square.path}, got Error: no root element\n  fix: apt-get install librsvg2-bin"
    )


def test_drawings_without_the_program_that_draws_them_name_its_package(
    square: DebianDrawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingError) as refused:
        square.read(purpose="demo:x")

    assert str(refused.value) == (
        "demo:x: needs the Debian package 'librsvg2-bin', got no rsvg-convert\n  fix: apt-get install librsvg2-bin"
    )


# Groups


def test_groups_are_dealt_to_three_splits() -> None:
    groups = [f"group {i}" for i in range(25)]

    split = split_groups([*groups, *groups], seed=5)

    assert sorted(split) == sorted(groups)
    assert Counter(split.values()) == {"train": 11, "val": 3, "test": 11}
    assert split == split_groups(reversed(groups), seed=5)
    assert split != split_groups(groups, seed=6)


def test_three_groups_are_one_of_each_split() -> None:
    assert sorted(split_groups("abc", seed=0).values()) == ["test", "train", "val"]


# What is made of the contents


def test_garments_are_read_from_the_files_of_their_publisher() -> None:
    def files(labels: list[int]) -> list[bytes]:
        images = np.arange(len(labels) * 28 * 28, dtype=np.uint8)
        return [gzip.compress(bytes(8) + bytes(labels)), gzip.compress(bytes(16) + images.tobytes())]

    pools = TASKS["fashion"].collect([*files([9, 0]), *files([1])])

    assert [(key, label) for key, label, _ in pools["train"]] == [("train00000", "ankleboot"), ("train00001", "tshirt")]
    assert [(key, label) for key, label, _ in pools["test"]] == [("t10k00000", "trouser")]
    picture = pools["train"][1][2]()
    assert (picture.mode, picture.size) == ("RGB", (28, 28))
    assert picture.getpixel((0, 0)) == (28 * 28 % 256,) * 3


def test_solar_cells_that_the_experts_were_not_sure_of_are_left_out() -> None:
    lines = b"images/a.png  1.0  mono\nimages/b.png  0.0  poly\nimages/c.png  0.3333  mono\n"

    pools = TASKS["elpv"].collect([lines])

    assert {(key, label) for key, label, _ in pools["train"]} == {("a", "mono_defect"), ("b", "poly_ok")}
    assert pools["test"] == []


def test_cards_are_cut_from_decks_and_laid_on_felt() -> None:
    """Every cell of a deck has a colour of its own: red is its rank's place, green its suit, blue the deck."""
    decks = []
    for number in range(len(TASKS["cards"].files)):
        cells = np.zeros((5, 13, 4), np.uint8)
        cells[:4, :] = [[(10 * rank, 20 * suit, number, 255) for rank in range(13)] for suit in range(4)]
        decks.append(png(Image.fromarray(cells.repeat(30, axis=0).repeat(20, axis=1))))

    pools = TASKS["cards"].collect(decks)

    assert {split: len(images) for split, images in pools.items()} == {
        "train": 10 * 104,
        "val": 3 * 104,
        "test": 9 * 104,
    }
    ranks = ("ace", "02", "03", "04", "05", "06", "07", "08", "09", "10", "jack", "queen", "king")
    seen: dict[str, set[int]] = {}
    for split, images in pools.items():
        for key, label, draw in images[:: 1 if split == "val" else 13]:
            picture = draw()
            red, green, blue = picture.getpixel((112, 112))
            assert (picture.mode, picture.size) == ("RGB", (224, 224))
            assert picture.getpixel((0, 0)) == picture.getpixel((223, 223)) == (0, 96, 48)
            assert (label, key.split("_")[-3:]) == (ranks[red // 10], [str(green // 20), label, key[-1]])
            seen.setdefault(split, set()).add(blue)
    assert sorted(itertools.chain.from_iterable(seen.values())) == list(range(22))  # so no deck is in two splits
    first, second = (draw().tobytes() for _, _, draw in pools["val"][:2])
    assert first != second  # the same card, on two tables


def test_both_pictures_of_an_emoji_are_in_one_split() -> None:
    names = ("Animals & Nature", "Flags", "Component", "Objects")
    rows = [{"category": names[i % 4], "unified": f"1F{i:03X}", "sheet_x": i % 5, "sheet_y": i // 5} for i in range(20)]
    styles = []
    for style in range(2):
        cells = np.zeros((4, 5, 66, 66, 4), np.uint8)
        cells[:, :, 1:-1, 1:-1] = [[[[(x, y, style, 255)]] for x in range(5)] for y in range(4)]
        cells[:, :, 1, 1] = 0  # transparent there
        styles.append(png(Image.fromarray(cells.swapaxes(1, 2).reshape(4 * 66, 5 * 66, 4))))

    pools = TASKS["emoji"].collect([json.dumps(rows).encode(), *styles])

    assert {split: len(images) for split, images in pools.items()} == {"train": 2 * 4, "val": 2 * 1, "test": 2 * 5}
    for split in pools.values():
        assert Counter(key.split("_")[1] for key, _, _ in split) == dict.fromkeys(
            {key.split("_")[1] for key, _, _ in split}, 2
        )
    for key, label, draw in itertools.chain.from_iterable(pools.values()):
        style, unified = key.split("_")
        i, picture = int(unified[2:], 16), draw()
        assert label == {0: "animals_nature", 3: "objects"}[i % 4]
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        colours = {(i % 5, i // 5, ("google", "twitter").index(style)): 64 * 64 - 1, (255, 255, 255): 1}
        assert {colour: count for count, colour in picture.getcolors()} == colours


def texture(seed: int, size: tuple[int, int] = (200, 160)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def test_textures_that_look_alike_are_in_one_split() -> None:
    """Six that are bricks, two variants of the first among them; the archive holds much that is not looked at."""
    first = texture(0)
    bricks = {f"t/brick{i}.png": texture(i) for i in range(4)}
    bricks["t/brick_dark.PNG"] = first.point(lambda value: value // 2)
    bricks["t/brick_negative.png"] = first.point(lambda value: 255 - value)
    others = {
        "t/brick_nm.png": texture(20),  # a map of its normals
        "t/tex_pics/brick9.png": texture(21),
        "t/brick_window.png": texture(22),
        "t/brick_wood.png": texture(23),  # two materials
        "t/plaster.png": texture(24),  # none
        "t/brick_again.png": first,
        "t/brick_small.png": texture(25, (200, 127)),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, picture in {**bricks, **others, "t/rust.png": texture(9)}.items():
            file.writestr(name, png(picture))
        file.writestr("t/brick.txt", b"not a picture")

    pools = TASKS["materials"].collect([archive.getvalue()])

    name_of = {hashlib.md5(name.encode()).hexdigest()[:8]: name for name in (*bricks, *others, "t/rust.png")}
    split = {name_of[key.split("_")[0]]: split for split, images in pools.items() for key, _, _ in images}
    assert sorted(split) == sorted([*bricks, "t/rust.png"])
    assert split["t/brick0.png"] == split["t/brick_dark.PNG"] == split["t/brick_negative.png"]
    four = [split[f"t/brick{i}.png"] for i in range(4)]
    assert Counter(four) == {"train": 2, "val": 1, "test": 1}
    images = list(itertools.chain.from_iterable(pools.values()))
    assert Counter(label for _, label, _ in images) == {"brick": 6 * 12, "metal": 12}
    drawn = [draw() for _, _, draw in images]
    assert {(picture.mode, picture.size) for picture in drawn} == {("RGB", (112, 112))}
    assert len({picture.tobytes() for picture in drawn}) > 7 * 9  # of 7 x 12 places, some may be the same


def archive(files: dict[str, Image.Image]) -> bytes:
    """A tar of PNGs, as ``DebianFolder`` reads them."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as held:
        for name, picture in files.items():
            member, data = tarfile.TarInfo(name), png(picture)
            member.size = len(data)
            held.addfile(member, io.BytesIO(data))
    return made.getvalue()


def cut_out(seed: int) -> Image.Image:
    """A photograph of an object: opaque in the middle, and of many colours."""
    values = np.random.default_rng(seed).integers(0, 256, (60, 40, 4), dtype=np.uint8)
    values[..., 3] = 0
    values[10:50, 5:35, 3] = 255
    return Image.fromarray(values)


def stamps_and_places() -> list[bytes]:
    """Nine birds and nine vehicles, a drawing and a mirrored one of each, and nine places of one level of grey."""
    folders = ("animals/birds", "vehicles")
    stamps = {f"{folder}/o{i}.png": cut_out(10 * i + len(folder)) for folder in folders for i in range(9)}
    for folder in folders:
        stamps |= {f"{folder}/o1_mirror.png": cut_out(90), f"{folder}/cartoon/o9.png": cut_out(91)}
        stamps[f"{folder}/flat.png"] = Image.new("RGBA", (60, 60), (10, 20, 30, 255))
    places = {f"Indoors/{i}.png": Image.new("RGB", (300, 240), (20 * i,) * 3) for i in range(9)}
    return [archive(stamps), archive(places)]


def test_an_object_and_a_place_are_in_one_split() -> None:
    pools = TASKS["stamps"].collect(stamps_and_places())

    objects = {split: {key.rpartition("_")[0] for key, _, _ in images} for split, images in pools.items()}
    levels = {split: {draw().getpixel((0, 0)) for _, _, draw in images[::7]} for split, images in pools.items()}
    assert {split: len(names) for split, names in objects.items()} == {"train": 8, "val": 2, "test": 8}
    for sets in (objects, levels):
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(sets.values(), 2))
    _, label, draw = pools["train"][0]
    assert (label, len(pools["val"])) == ("bird", 2 * 30)
    assert draw().size == (224, 224)
    assert draw().tobytes() == draw().tobytes() != pools["train"][1][2]().tobytes()


def test_as_many_objects_are_on_a_place_as_its_class_says() -> None:
    pools = TASKS["count"].collect(stamps_and_places())

    assert {split: len(images) for split, images in pools.items()} == {"train": 804, "val": 204, "test": 1200}
    assert Counter(label for _, label, _ in pools["val"]) == dict.fromkeys("123456", 34)
    for _, label, draw in pools["val"][:6]:
        values = np.asarray(draw()).astype(int)
        changed = (values != values[0, 0]).any(axis=2)
        # Each takes half of a box whose longer side has 40 to 80 pixels, and none hides another.
        assert 0.5 * int(label) * 1000 < changed.sum() < int(label) * 4200


def test_drawings_that_are_variants_of_one_are_in_one_split() -> None:
    """By name up to digits, or nearly the same when small; what is too thin or has one colour is no drawing."""
    rng = np.random.default_rng(5)
    shapes = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((80, 80)) for _ in range(20)]
    files = {f"animals/beast{chr(97 + i)}.png": shape for i, shape in enumerate(shapes[:9])}
    files |= {"animals/sub/beasta-2.png": shapes[9], "animals/other.png": shapes[1].point(lambda value: value // 2 + 9)}
    files |= {f"tools/saw{chr(97 + i)}.png": shape for i, shape in enumerate(shapes[10:19])}
    files |= {"tools/thin.png": shapes[0].resize((50, 400)), "tools/grey.png": Image.new("RGB", (80, 80), (9, 9, 9))}

    pools = TASKS["clipart"].collect([archive(files)])

    of = {key: split for split, images in pools.items() for key, _, _ in images}
    labels = {key: label for images in pools.values() for key, label, _ in images}
    assert set(of) == {re.sub(r"\W+", "_", name[:-4]) for name in files if "thin" not in name and "grey" not in name}
    assert of["animals_beasta"] == of["animals_sub_beasta_2"]
    assert of["animals_beastb"] == of["animals_other"]
    assert (labels["animals_other"], labels["tools_sawa"]) == ("animal", "tool_weapon")
    assert Counter(of[key] for key in of if key.startswith("tools")) == {"train": 4, "val": 1, "test": 4}
    assert all(draw().size == (160, 160) for images in pools.values() for _, _, draw in images)


# The real ones

BUILT = {
    "fashion": ((800, 200, 2000), "867361c9279edadd3e8219ea714518fd65d0ff97731f263348dbc91e3e59d1ca"),
    "elpv": ((802, 198, 1023), "144ec7de5b12821686f2728a249a683b5d0e7a49bcf4cf0cb7e5b238e8dbb692"),
    "cards": ((800, 200, 936), "692b380786e763d86ebb9e640e329f78ad1b25244ad2dcacd645e7f218db2022"),
    "materials": ((800, 200, 2000), "e8c132fe04a55a860a1bd7cea3e7e0fa7aeadede6183f8bd93a0115dbec57c4b"),
    "emoji": ((800, 200, 1440), "a1bbc97807de1e5be10fbbf69612fc96413302449199b1a42b9e7f5fd840ebe4"),
    "stamps": ((800, 200, 965), "96488fb0e0748ab40126876b6befa68390bdf202b17d5c736e3fcdb2d787564a"),
    "clipart": ((800, 200, 1126), "eaa4ccfb28dd38dec2d4f9434f47d9313b51c97a8d636fdd764f0d9f56816291"),
    "count": ((800, 200, 1200), "fecb4916b5d02867b88bcd325a9d887f0f6d927af5869c0c45a09e3eb0be72a8"),
}
# What no two splits may share, as the names of the pictures have it.
GROUP = {
    "fashion": r"(.*)",
    "elpv": r"(.*)",
    "cards": r"(.*)_\d_\w+_\d",
    "materials": r"(\w{8})_\d+",
    "emoji": r"(?:google|twitter)_(.*)",
    "stamps": r"(.*)_\d+",
    "clipart": r"(.*)",
    "count": r"(.*)",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_tasks_of_the_benchmarks_are_the_published_ones_and_splits_share_no_group(name: str, tmp_path: Path) -> None:
    """On Debian 12, as to cards: another librsvg may smooth their edges otherwise."""
    try:
        summary = build_task(name, tmp_path / name)
    except MissingError as error:
        pytest.skip(str(error))

    assert (tuple(summary.counts.values()), summary.pixel_sha256) == BUILT[name]
    groups = {
        split: {re.fullmatch(GROUP[name], path.stem)[1] for path in (tmp_path / name / split).rglob("*.png")}
        for split in summary.counts
    }
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(groups.values(), 2))
    for split in summary.counts:
        folders = {path.name: len(list(path.iterdir())) for path in (tmp_path / name / split).iterdir()}
        assert sorted(folders) == sorted(summary.classes)
        assert min(folders.values()) > 0


def test_contributors_are_told_of_every_task_its_classes_and_its_packages() -> None:
    section = CONTRIBUTING.read_text(encoding="utf-8").partition("## Add a sample task\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]

    assert [(name, classes, licence) for name, _, classes, _, licence in rows] == [
        (f"`{name}`", str(len(task.classes)), task.licence) for name, task in TASKS.items()
    ]
    for (_, _, _, packages, _), task in zip(rows, TASKS.values(), strict=True):
        needed = {f"{file.registry} {file.package}" for file in task.files}
        if any(isinstance(file, DebianDrawing) for file in task.files):
            needed |= {"deb librsvg2-bin", *(f"deb {font.package}" for font in drawings.FONTS)}
        assert set(packages.split(", ")) == needed


def test_each_extra_brings_the_releases_that_tasks_ask_of_it() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    files = [file for task in TASKS.values() for file in task.files if isinstance(file, PackageFile)]

    assert [each.requirement for each in files if each.extra and each.requirement not in extras[each.extra]] == []
