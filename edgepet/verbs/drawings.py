"""Masks as files: index PNGs, whose values are classes, and pictures under the colours of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepet.device.answers import ClassShare, MaskAnswer
from edgepet.errors import InputError, option
from edgepet.files import made_folder, write_file
from edgepet.images.inputs import Input
from edgepet.images.masks import NOT_COUNTED, class_colours, mask_png, overlay_png
from edgepet.reports.tables import format_percent
from edgepet.spec import FilePath
from edgepet.verbs.verb import Parser

_COLOURS = class_colours(NOT_COUNTED)
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

    def write(self, answer: MaskAnswer, picture: Input, *, alone: bool = True) -> tuple[Path | None, Path | None]:
        """Write what is asked for of one answer: the paths of its mask and of the picture under it.

        Args:
            alone: no other task has masks of the same images; else each has a folder of its own.

        Raises:
            InputError: the picture cannot be read any more, or a folder not be written.
        """
        within = f"{_stem(answer.image)}.png" if alone else f"{answer.task}/{_stem(answer.image)}.png"
        paths = tuple(None if folder is None else folder / within for folder in (self.masks, self.draw))
        mask, drawn = paths
        if mask is not None:
            _write(mask, mask_png(answer.mask, _COLOURS))
        if drawn is not None:
            _write(drawn, overlay_png(picture.upright(answer.preprocess), answer.mask, _COLOURS))
        return mask, drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskResult:
    """A mask as JSON says it: what is there of each class, and the files that were written."""

    image: str
    task: str
    classes: tuple[ClassShare, ...]
    mask: Path | None
    drawn: Path | None


def result_of(answer: MaskAnswer, picture: Input, drawings: Drawings, *, alone: bool = True) -> MaskResult:
    """``answer``, written where ``drawings`` says. Raises as ``Drawings.write``."""
    mask, drawn = drawings.write(answer, picture, alone=alone)
    return MaskResult(image=answer.image, task=answer.task, classes=answer.classes, mask=mask, drawn=drawn)


def told(classes: Sequence[ClassShare]) -> str:
    """The classes of a mask in one line, the largest first."""
    shown = ", ".join(f"{each.label} {format_percent(each.pixels)}" for each in classes[:_MOST_TOLD])
    return f"{shown}, …" if len(classes) > _MOST_TOLD else shown


def drawing_options(parser: Parser) -> None:
    """``--masks`` and ``--draw``."""
    text = "of tasks of masks: a PNG for each image, whose value n is class n (default: none)"
    parser.add_argument("--masks", metavar="DIR", help=text)
    text = "of tasks of masks: each image under the colours of its classes (default: none)"
    parser.add_argument("--draw", metavar="DIR", help=text)


def _stem(name: str) -> str:
    return Path(name).stem or name


def _write(path: Path, data: bytes) -> None:
    made_folder(path.parent, "masks are written there")
    write_file(path, data)
