"""Words that every room shares: arrays, targets, sites, preprocessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy.typing as npt

from edgepet.errors import InputError
from edgepet.strict import ObjectReader

NpArray: TypeAlias = npt.NDArray[Any]
Array: TypeAlias = Any  # a NumPy array or a torch tensor: formulas use only operators that both have
Tensors: TypeAlias = Mapping[str, NpArray]
FilePath: TypeAlias = Path | str
ImageSize: TypeAlias = int | tuple[int, int]  # the side of a square, or height and width, in pixels
Tuned: TypeAlias = Mapping[str, Mapping[str, Array]]  # site name -> method tensor name -> value

StoredPrecision: TypeAlias = Literal["fp32", "fp16", "int8"]  # what the numbers of a file are
Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]  # what a network is computed in

_TARGET = re.compile(
    r"(?P<tensor>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)(?:\[(?P<rows>N:N|:(?=,))(?:, (?P<cols>N:N))?\])?".replace(
        "N", "(?:0|[1-9][0-9]{0,9})"
    )
)


@dataclass(frozen=True, slots=True)
class Target:
    """A state-dict name with an optional block of rows and columns: ``blocks.0.mlp.fc2.weight[:, 384:768]``.

    A convolution kernel (out, in, kh, kw) is seen as (out, in * kh * kw). ``rows`` and ``cols`` are a start and the end
    behind the last, None for all.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None

    @property
    def is_block(self) -> bool:
        """Whether it is a part of its tensor."""
        return self.rows is not None or self.cols is not None

    @classmethod
    def parse(cls, text: str, *, where: str) -> Target:
        """Read the written form.

        Raises:
            InputError: ``text`` is not a name with an optional block, or the block is empty.
        """
        match = _TARGET.fullmatch(text)
        if match is None:
            raise InputError(where, "a target is NAME, NAME[a:b] or NAME[a:b, c:d]", got=repr(text))

        def span(part: str | None) -> tuple[int, int] | None:
            if part is None or part == ":":
                return None
            start, stop = (int(number) for number in part.split(":"))
            if start >= stop:
                raise InputError(where, "a block's end must be greater than its start", got=repr(text))
            return start, stop

        return cls(match["tensor"], span(match["rows"]), span(match["cols"]))

    def __str__(self) -> str:
        if self.rows is None and self.cols is None:
            return self.tensor
        rows = ":" if self.rows is None else f"{self.rows[0]}:{self.rows[1]}"
        return (
            f"{self.tensor}[{rows}]" if self.cols is None else f"{self.tensor}[{rows}, {self.cols[0]}:{self.cols[1]}]"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A layer of the backbone where a method can act.

    ``kind`` is "linear", "conv" or "norm", "tensor" for one bare parameter, or "block" for a ``Block``. A weight is
    seen as a matrix of ``out_features`` rows and ``columns``; a convolution has ``taps`` columns for each of its
    ``in_features`` input channels, those of one group where ``groups`` is above 1. ``blocks`` names row blocks of a
    fused weight, as timm's ``qkv`` has: q = (0, d), k = (d, 2d), v = (2d, 3d). ``channel_axis`` is where the layer's
    output has its channels.

    ``mean`` is the running mean of the batch norm that alone reads this layer, where the layer has no bias.
    ``scalable`` is false where the bias is put together on the way, so that no tensor could be scaled with the weight.
    ``exposed`` says that the layer's output is also its module's, where a forward hook sees it.
    """

    name: str
    kind: Literal["linear", "conv", "norm", "tensor", "block"]
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    channel_axis: Literal[-1, 1] = -1
    blocks: tuple[tuple[str, tuple[int, int]], ...] = ()
    mean: str | None = None
    scalable: bool = True
    exposed: bool = True

    @property
    def columns(self) -> int:
        """Inputs of one output, as the updates see a weight."""
        return self.in_features * self.taps

    @property
    def operates(self) -> bool:
        """Whether this is a layer, and no block or bare parameter."""
        return self.kind in ("linear", "conv", "norm")

    @property
    def dense(self) -> bool:
        """Whether every output reads every input channel: a linear layer, or a convolution of one group."""
        return self.kind in ("linear", "conv") and self.groups == 1

    @property
    def takes_shift(self) -> bool:
        """Whether a constant added to the output can be written into a tensor that is there."""
        return self.bias is not None or self.mean is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(Site):
    """A repeated part of the network, a transformer's block or a ConvNet's, whose ``weight`` is empty.

    ``points`` are shapes of one image's features, by where they flow: ":in" and ":out" of the block, "norm1:in" and the
    like of the modules right in it. Those of tokens are (N, d), of maps (C, H, W), or (H, W, C) where ``channel_axis``
    is the last; windows of an image have none. ``ran`` names the modules right in it that ran, whatever they worked on.
    ``container`` is what the block is one of. ``heads`` are those of a plain attention called "attn", else 0;
    ``prefix`` counts the tokens in front of the patches, which form a ``grid`` (rows, columns). ``stem_columns`` are
    the inputs of one output of the first layer. The features are those of ``frames`` images that follow one another.
    """

    points: Mapping[str, tuple[int, ...]]
    ran: frozenset[str]
    container: str
    heads: int = 0
    prefix: int = 0
    grid: tuple[int, int] | None = None
    stem_columns: int = 1
    frames: int = 1

    def has(self, *children: str) -> bool:
        """Whether modules of these names lie right in the block, and ran."""
        return self.ran.issuperset(children)

    @property
    def on_maps(self) -> bool:
        """Whether it works on maps (C, H, W)."""
        return self.channel_axis == 1

    @property
    def grid_behind(self) -> tuple[int, int] | None:
        """Rows and columns of what it puts out, where that is ``grid`` again or maps (H, W, C), else none."""
        given = self.points.get(":out", ())
        if len(given) == 3:
            return None if self.on_maps else (given[0], given[1])
        return self.grid if given[:1] == self.points[":in"][:1] else None


def spelled_size(sides: tuple[int, int]) -> str:
    """``224``, or ``224x384`` where height and width differ: as ``--img-size`` takes it."""
    height, width = sides
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """How an image becomes the network's input, in timm's words (``timm.data.resolve_data_config``).

    ``image_size`` is (height, width) in pixels; ``crop`` is timm's ``crop_mode``; ``mean`` and ``std`` are per channel
    of an RGB image scaled to 0..1. Where ``frames`` is above 1 the input is a clip of so many images. ``orientation``
    is whether an image is turned as its EXIF data say; None does not say so, as older files do not, and is "none".
    """

    image_size: tuple[int, int]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_fraction: float = 1.0
    crop: Literal["center", "squash"] = "center"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: int = 1
    orientation: Literal["exif", "none"] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image, (3, H, W), or of one clip, (frames, 3, H, W)."""
        return (3, *self.image_size) if self.frames == 1 else (self.frames, 3, *self.image_size)

    def as_json(self) -> dict[str, object]:
        """As packs, artefacts and graphs have it: ``frames`` is there for clips only, None is left out."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        told = {key: value for key, value in values.items() if key != "frames" or self.frames > 1}
        return {key: value for key, value in told.items() if value is not None}


LEAST_CROP, LEAST_STD, MOST_MEAN = 1 / 64, 1e-30, 1e6  # what keeps pixels finite, and a resized image small


def read_preprocess(table: ObjectReader) -> Preprocess:
    """Preprocessing from JSON, as ``Preprocess.as_json`` writes it.

    Raises:
        EdgepetError: of the kind of ``table``: ``image_size`` is not two sizes, ``crop_fraction`` not in [1/64, 1], a
            ``std`` not above 0, or a ``mean`` or ``std`` that float32 would be divided out of range by.
    """
    sizes = table.integers("image_size", least=1)
    if len(sizes) != 2:
        raise table.refusal("image_size", "needs a height and a width", list(sizes))
    preprocess = Preprocess(
        image_size=(sizes[0], sizes[1]),
        interpolation=cast(
            Literal["bicubic", "bilinear"], table.text("interpolation", choices=["bicubic", "bilinear"])
        ),
        crop_fraction=table.number("crop_fraction"),
        crop=cast(Literal["center", "squash"], table.text("crop", choices=["center", "squash"])),
        mean=cast(tuple[float, float, float], table.numbers("mean", count=3)),
        std=cast(tuple[float, float, float], table.numbers("std", count=3)),
        frames=table.integer("frames", least=2) if "frames" in table.names() else 1,
        orientation=cast(Literal["exif", "none"], table.text("orientation", choices=["exif", "none"]))
        if table.has("orientation")
        else None,
    )
    table.end()
    if not LEAST_CROP <= preprocess.crop_fraction <= 1 or min(preprocess.std) < LEAST_STD:
        raise table.refusal("", f"needs a crop_fraction in [{LEAST_CROP:.2g}, 1] and a std above 0")
    if max(map(abs, (*preprocess.mean, *preprocess.std))) > MOST_MEAN:
        raise table.refusal("", f"needs a mean and a std of at most {MOST_MEAN:g}")
    return preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A backbone's dense tensors, as merging needs them: no framework, no classifier.

    ``fingerprint`` is taken at the native image size; ``tensors``, by state-dict name, may hold a position table
    resampled to another one.
    """

    name: str
    fingerprint: str
    tensors: Tensors
