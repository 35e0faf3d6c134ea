"""Tasks of drawings: playing cards and emoji."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from edgepet.samples.drawings import DebianDrawing
from edgepet.samples.packages import NpmFile
from edgepet.samples.pools import Pools, Task, empty_pools, opaque, split_groups

_RANKS = ("ace", "02", "03", "04", "05", "06", "07", "08", "09", "10", "jack", "queen", "king")
# Every design once: most others of the package are one of these in other colours, letters or resolutions.
_DECKS = {
    "ancient_french": "412b579260ec6de9",
    "anglo": "781d7e8ca6f61f4f",
    "anglo_modern": "357aeb21a427845b",
    "anglo_poker": "c410a478531cbb8b",
    "atlasnye": "71d1185c7ff75af9",
    "bellot": "eafb31e3abe7274a",
    "berlin": "4dd6f6b0b7735bf0",
    "dondorf": "ec67a4b70997f619",
    "gnomangelo": "8c5e57951b7633ac",
    "guyenne-classic": "17bfef621c595074",
    "lattmann": "f85a7d00f251e34b",
    "neoclassical": "492f8f8e342fc9e4",
    "orell": "9b334dad6b292fa2",
    "ornamental": "6700294904c0818c",
    "paris": "f3e3c8cb94be50cf",
    "plastic": "27a177a84b02a694",
    "rheinland": "3efff1931ebc8ba2",
    "simplistic": "3ca6bc38b6ab9d99",
    "slavic_costumes": "73f7fb6e1c41b55c",
    "tango": "a0fdb06482fcb17d",
    "tango_nuevo": "2043ecd620396ce9",
    "tigullio": "1ccd4ffacc3a5a86",
}
_FELT = (0, 96, 48)


def _cards(contents: Sequence[bytes]) -> Pools:
    """Every card of every deck, as it lies on two tables; no two splits share a deck.

    A deck is a picture of 13 ranks across and 4 suits down, with jokers and backs in a fifth row.
    """
    split, pools = split_groups(_DECKS, seed=11), empty_pools()
    for deck, content in zip(_DECKS, contents, strict=True):
        sheet = opaque(Image.open(io.BytesIO(content)), _FELT)
        width, height = sheet.width / len(_RANKS), sheet.height / 5
        for suit, (column, rank), table in itertools.product(range(4), enumerate(_RANKS), range(2)):
            edges = (column * width, suit * height, (column + 1) * width, (suit + 1) * height)
            left, upper, right, lower = map(round, edges)
            lying = partial(_lying, sheet, (left, upper, right, lower), f"{deck}{suit}{column}{table}")
            pools[split[deck]].append((f"{deck}_{suit}_{rank}_{table}", rank, lying))
    return pools


def _lying(sheet: Image.Image, box: tuple[int, int, int, int], name: str) -> Image.Image:
    """A card on felt, a little turned, smaller and off the middle, as its name's digest has it."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    rng = np.random.RandomState(int(digest[:7], 16))
    angle, size, right, down = rng.uniform(-25, 25), rng.uniform(0.75, 1), rng.uniform(-8, 8), rng.uniform(-8, 8)
    card = sheet.crop(box).convert("RGBA")
    scale = 190 * size / max(card.size)
    card = card.resize((round(card.width * scale), round(card.height * scale)), Image.Resampling.LANCZOS)
    card = card.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    table = Image.new("RGB", (224, 224), _FELT)
    table.paste(card, (round(112 - card.width / 2 + right), round(112 - card.height / 2 + down)), card)
    return table


CARDS = Task(
    classes=tuple(sorted(_RANKS)),
    licence="GPL-3.0-or-later",
    files=tuple(
        DebianDrawing("gnome-cards-data", "1:3.22.23-1", f"/usr/share/aisleriot/cards/{deck}.svgz", digest, 2080)
        for deck, digest in _DECKS.items()
    ),
    seed=20,
    collect=_cards,
)


_GROUPS = (
    "activities",
    "animals_nature",
    "food_drink",
    "objects",
    "people_body",
    "smileys_emotion",
    "symbols",
    "travel_places",
)
# Each emoji of 64 pixels has a margin of one pixel around it. "clean" sheets hold no picture of another publisher.
_STYLES = {"google": "795a0c598d162c9a", "twitter": "daa7711b29897de6"}
_CELL = 66


def _emoji(contents: Sequence[bytes]) -> Pools:
    """Unicode's groups, but for flags, in two styles; both pictures of an emoji are in one split."""
    listed = [(re.sub(r"\W+", "_", row["category"].lower()), row) for row in json.loads(contents[0])]
    listed = [(group, row) for group, row in listed if group in _GROUPS]
    split, pools = split_groups((row["unified"] for _, row in listed), seed=10), empty_pools()
    for style, content in zip(_STYLES, contents[1:], strict=True):
        sheet = Image.open(io.BytesIO(content)).convert("RGBA")
        for group, row in listed:
            drawn = partial(_symbol, sheet, row["sheet_x"] * _CELL + 1, row["sheet_y"] * _CELL + 1)
            pools[split[row["unified"]]].append((f"{style}_{row['unified']}", group, drawn))
    return pools


def _symbol(sheet: Image.Image, x: int, y: int) -> Image.Image:
    return opaque(sheet.crop((x, y, x + _CELL - 2, y + _CELL - 2)), (255, 255, 255))


EMOJI = Task(
    classes=_GROUPS,
    licence="Noto Emoji Apache-2.0; Twemoji CC BY 4.0; packages MIT",
    files=(
        NpmFile("emoji-datasource-google", "16.0.0", "emoji.json", "1d602e65be88772b"),
        *(
            NpmFile(f"emoji-datasource-{style}", "16.0.0", f"img/{style}/sheets-clean/64.png", digest)
            for style, digest in _STYLES.items()
        ),
    ),
    seed=19,
    collect=_emoji,
)
