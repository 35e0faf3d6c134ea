"""``merge``: dense weights that plain timm loads strictly, compared before they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import safetensors.numpy

from edgepet.deltas.merge import require_foldable
from edgepet.errors import require
from edgepet.files import require_file_place, require_other, require_space, write_file
from edgepet.measuring.parity import Against, Inputs, require_parity
from edgepet.networks.backbone import AnyBackbone
from edgepet.proving.in_torch import plain_network
from edgepet.proving.subject import Subject
from edgepet.reports.screen import Screen, lines
from edgepet.reports.tables import format_bytes
from edgepet.spec import FilePath
from edgepet.verbs.verb import Options, Parser, Verb, backbone_option, data_option, output_option, path

if TYPE_CHECKING:
    from edgepet.reports.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Dense weights on disk. ``max_abs_diff`` is on logits, against the network that ``against`` names.

    ``loads_into`` is the Python that makes the network which takes them strictly.
    """

    path: Path
    bytes: int
    create_args: dict[str, object]
    loads_into: str
    max_abs_diff: float
    limit: float
    n: int
    inputs: Inputs
    against: Against


def merge(
    pack: FilePath, output: FilePath, *, backbone: AnyBackbone = None, data: FilePath | None = None
) -> MergeReport:
    """Write dense weights that plain timm loads strictly, after loading them there and comparing.

    Args:
        data: images to compare on; None is the work folder's, or seeded noise.

    Raises:
        InputError: pack or backbone at fault.
        CheckError: the merged network answers otherwise than the tuned one.
        MissingError: torch or timm is not installed.
    """
    require("torch", extra="train", purpose="merge")
    from edgepet.tuning.model import logits_of

    output = Path(output)
    require_other(output, Path(pack), *_weights(backbone))
    require_file_place(output)
    subject = Subject(pack, backbone, data)
    require_foldable(subject.delta)
    require_space(output, subject.backbone.native_bytes, "the merged weights")
    weights = subject.dense_weights
    parity = subject.judge(logits_of(plain_network(subject), subject.images[0]))
    require_parity(parity, str(output))
    dense = {name: np.asarray(tensor, order="C") for name, tensor in weights.items()}
    write_file(output, safetensors.numpy.save(dense))
    return MergeReport(
        path=output,
        bytes=output.stat().st_size,
        create_args=subject.backbone.head_args,
        loads_into=subject.backbone.spelled_with_head(len(subject.delta.labels)),
        max_abs_diff=parity.max_abs,
        limit=cast(float, parity.limit),
        n=parity.n,
        inputs=parity.inputs,
        against=parity.against,
    )


def _weights(backbone: AnyBackbone) -> list[Path]:
    """The file of ``NAME@FILE``, if it is spelled so."""
    return [Path(backbone.partition("@")[2]).expanduser()] if isinstance(backbone, str) and "@" in backbone else []


def _options(parser: Parser) -> None:
    parser.add_argument("pack", metavar="TASK.pet", help="the task to fold")
    backbone_option(parser)
    data_option(parser)
    output_option(parser, "FILE.safetensors", "the weights to write")


def _run(options: Options, progress: Progress) -> MergeReport:
    with progress.stage(f"merge {options.pack}"):
        return merge(Path(options.pack), Path(options.output), backbone=options.backbone, data=path(options.data))


def _screen(report: MergeReport) -> Screen:
    yield lines(
        f"{report.path}  {format_bytes(report.bytes)}",
        f"  loads strictly into {report.loads_into}",
        f"  {report.max_abs_diff:.1e} from the {report.against} network on {report.n} images ({report.inputs}),"
        f" limit {report.limit:.1e}",
    )


VERB = Verb(options=_options, run=_run, screen=_screen)
