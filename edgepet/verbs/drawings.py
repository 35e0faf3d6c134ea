"""Masks and boxes as files: index PNGs, whose values are classes, and pictures under what was found on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepet.device.answers import BoxesAnswer, ClassShare, FoundBox, Guess, MaskAnswer
from edgepet.errors import InputError, option
from edgepet.files import made_folder, write_file
from edgepet.images.boxes import boxes_png
from edgepet.images.inputs import Input
from edgepet.images.masks import NOT_COUNTED, class_colours, mask_png, overlay_png
from edgepet.reports.tables import format_percent
from edgepet.spec import FilePath
from edgepet.verbs.verb import Parser

_COLOURS = class_colours(NOT_COUNTED)
SURE = 0.4  # the score of a box that is drawn, or counted on the screen; JSON has those below too
_MOST_TOLD = 5  # classes of one image, on the screen


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """Where masks are written to, as index PNGs in ``masks`` and over their pictures in ``draw``; None writes none."""

    masks: Path | None = None
    draw: Path | None = None

    @classmethod
    def of(cls, masks: FilePath | None, draw: FilePath | None) -> Drawings:
        """From what an option says.

        Raises:
            InputError: both are one folder: files would be of one name.
        """
        made = cls(masks=None if masks is None else Path(masks), draw=None if draw is None else Path(draw))
        if made.masks is not None and made.draw is not None and made.masks.absolute() == made.draw.absolute():
            raise InputError(option("masks"), f"needs another folder than {option('draw')}", got=made.masks)
        return made

    def require_names(self, names: Iterable[str]) -> None:
        """Refuse images whose files would take each other's place.

        Raises:
            InputError: two of them have one name but for its ending.
        """
        seen = set[str]()
        for stem in map(_stem, names) if self.masks is not None or self.draw is not None else ():
            if stem in seen:
                raise InputError("images", "must have names of their own to be drawn", got=f"two called {stem}")
            seen.add(stem)

    def write(
        self, answer: MaskAnswer | BoxesAnswer, picture: Input, *, alone: bool = True
    ) -> tuple[Path | None, Path | None]:
        """Write what is asked for of one answer: the paths of its mask and of the picture under it, or under boxes.

        Args:
            alone: no other task is drawn of the same images; else each has a folder of its own.

        Raises:
            InputError: the picture cannot be read any more, or a folder not be written.
        """
        within = f"{_stem(answer.image)}.png" if alone else f"{answer.task}/{_stem(answer.image)}.png"
        paths = tuple(None if folder is None else folder / within for folder in (self.masks, self.draw))
        mask, drawn = paths
        if isinstance(answer, BoxesAnswer):
            if drawn is not None:
                _write(drawn, _drawn_boxes(answer, picture))
            return None, drawn
        if mask is not None:
            _write(mask, mask_png(answer.mask, _COLOURS))
        if drawn is not None:
            _write(drawn, overlay_png(picture.upright(answer.preprocess), answer.mask, _COLOURS))
        return mask, drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxesResult:
    """Boxes as JSON says them, and the file that was written."""

    image: str
    task: str
    boxes: tuple[FoundBox, ...]
    drawn: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskResult:
    """A mask as JSON says it: what is there of each class, and the files that were written."""

    image: str
    task: str
    classes: tuple[ClassShare, ...]
    mask: Path | None
    drawn: Path | None


def result_of(
    answer: MaskAnswer | BoxesAnswer, picture: Input, drawings: Drawings, *, alone: bool = True
) -> MaskResult | BoxesResult:
    """``answer``, written where ``drawings`` says. Raises as ``Drawings.write``."""
    mask, drawn = drawings.write(answer, picture, alone=alone)
    if isinstance(answer, BoxesAnswer):
        return BoxesResult(image=answer.image, task=answer.task, boxes=answer.boxes, drawn=drawn)
    return MaskResult(image=answer.image, task=answer.task, classes=answer.classes, mask=mask, drawn=drawn)


def told(classes: Sequence[ClassShare]) -> str:
    """The classes of a mask in one line, the largest first."""
    shown = ", ".join(f"{each.label} {format_percent(each.pixels)}" for each in classes[:_MOST_TOLD])
    return f"{shown}, …" if len(classes) > _MOST_TOLD else shown


def told_boxes(boxes: Sequence[FoundBox]) -> str:
    """The boxes of an image in one line: how many of each class are surely there, the most first."""
    counts = Counter(each.label for each in boxes if each.score >= SURE)
    shown = ", ".join(f"{count} {label}" for label, count in counts.most_common(_MOST_TOLD))
    return (f"{shown}, …" if len(counts) > _MOST_TOLD else shown) or "nothing"


def told_labels(labels: Sequence[Guess]) -> str:
    """The labels of an image in one line, the surest first."""
    shown = ", ".join(f"{each.label} {format_percent(each.score)}" for each in labels[:_MOST_TOLD])
    return (f"{shown}, …" if len(labels) > _MOST_TOLD else shown) or "none"


def _drawn_boxes(answer: BoxesAnswer, picture: Input) -> bytes:
    sure = [each for each in answer.boxes if each.score >= SURE][::-1]  # the best ones on top
    return boxes_png(
        picture.upright(answer.preprocess), [each.box for each in sure],
        [f"{each.label} {format_percent(each.score)}" for each in sure],
        [_COLOURS[answer.labels.index(each.label)] for each in sure],
    )  # fmt: skip


def drawing_options(parser: Parser) -> None:
    """``--masks`` and ``--draw``."""
    text = "of tasks of masks: a PNG for each image, whose value n is class n (default: none)"
    parser.add_argument("--masks", metavar="DIR", help=text)
    text = "each image under the colours of its mask's classes, or under its boxes (default: none)"
    parser.add_argument("--draw", metavar="DIR", help=text)


def _stem(name: str) -> str:
    return Path(name).stem or name


def _write(path: Path, data: bytes) -> None:
    made_folder(path.parent, "masks are written there")
    write_file(path, data)
