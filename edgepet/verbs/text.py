"""``text``: a table with a vector for each class, of the vectors of words that a package carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.errors import InputError, option
from edgepet.files import require_file_place
from edgepet.images.dense_folders import class_names
from edgepet.packs.text_file import write_text
from edgepet.reports.screen import Screen, lines, program
from edgepet.reports.tables import format_bytes
from edgepet.samples.words import WORDS, class_vectors
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb, output_option

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    """The table that ``text`` wrote; ``width`` are the numbers of a class."""

    path: Path
    classes: tuple[str, ...]
    width: int
    source: str
    sha256: str
    bytes: int


def text(classes: FilePath, output: FilePath, *, source: str) -> TextReport:
    """Write ``output`` (``TABLE.safetensors``): the vector of each class is the mean of those of its words.

    Args:
        classes: a text with a class a line.
        source: one of ``samples.words.WORDS``.

    Raises:
        InputError: no such source, classes at fault, or words without a vector, all of them in one message.
        MissingError: the package, or the one that reads its table of words, is not installed.
    """
    output = Path(output)
    if source not in WORDS:
        raise InputError(option("source"), f"is {', '.join(WORDS)}", got=repr(source))
    if output.suffix != ".safetensors":
        raise InputError(option("output"), "needs a file name ending in .safetensors", got=repr(output.name))
    require_file_place(output)
    names = class_names(Path(classes), least=1)
    made = write_text(output, names, class_vectors(source, names), WORDS[source].source)
    return TextReport(
        path=output, classes=names, width=made.width, source=made.source, sha256=made.sha256,
        bytes=output.stat().st_size,
    )  # fmt: skip


def _options(parser: Parser) -> None:
    parser.add_argument("classes", metavar="CLASSES", help="a text with a class a line, as a task's classes.txt")
    told = f"the package whose words have vectors: {', '.join(WORDS)}"
    parser.add_argument("--from", dest="source", required=True, metavar="PACKAGE", help=told)
    output_option(parser, "TABLE.safetensors", "the table to write")


def _run(options: Options, progress: Progress) -> TextReport:
    del progress
    return text(options.classes, options.output, source=options.source)


def _screen(report: TextReport) -> Screen:
    yield lines(
        f"{report.path}  {format_bytes(report.bytes)}",
        f"  {len(report.classes)} classes of {report.width} numbers each",
        f"  {report.source}",
        f"next: {program()} train DATA --head score --text {report.path} ...",
    )


VERB = Verb(options=_options, run=_run, screen=_screen)
