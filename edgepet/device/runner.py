"""What every runner is: a thing that takes preprocessed images and puts out numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from edgepet.errors import InputError
from edgepet.graphs.slots import Slots
from edgepet.spec import NpArray, Precision


class Runner(Protocol):
    """An open network: images to pooled features, or to logits."""

    @property
    def runtime(self) -> str:
        """The runtime's name, as in ``RUNTIMES``."""
        ...

    @property
    def executed(self) -> Precision:
        """The precision that it computes in."""
        ...

    @property
    def evidence(self) -> Mapping[str, object]:
        """How that is known: what the runtime says of itself, as JSON values."""
        ...

    def __call__(self, images: NpArray) -> NpArray:
        """Output, float32 (n, k), for preprocessed float32 images (n, 3, H, W) or clips (n, frames, 3, H, W).

        ``images`` are not modified.

        Raises:
            InputError: another dtype or shape, or a run that a GPU did not finish.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; it cannot be called any more."""
        ...


class ModelRunner(Runner, Protocol):
    """An exported model: it puts out logits first, and of a task of masks the mask behind them."""

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out; ``images`` and errors as for calling it."""
        ...


class SharedRunner(Protocol):
    """An open int8 backbone that many tasks are bound to; they put out pooled features."""

    @property
    def own_bytes(self) -> int:
        """About what a task that is bound takes of memory to run at full speed; 0 where that is its slots alone."""
        ...

    def bind(self, slots: Slots, *, light: bool = False) -> Runner:
        """A task, ready to run: its slots are handed over once. Closing it leaves the backbone open.

        Args:
            light: it takes little more than its slots, however slow that is.
        """
        ...

    def close(self) -> None:
        """Give back what it holds, once no bound task runs any more."""
        ...


class PartRunner(Protocol):
    """An open stretch of a graph, which tasks are bound to as to a ``SharedRunner``."""

    def bind(self, values: Mapping[str, NpArray]) -> BoundPart:
        """Ready to run with these slots, none where it has none. Closing it leaves the stretch open."""
        ...

    def close(self) -> None:
        """Give back what it holds, once nothing that is bound runs any more."""
        ...


class BoundPart(Runner, Protocol):
    """A stretch of a graph with its slots: what it reads, (n, ...), to what it puts out first, (n, ...)."""

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out; ``images`` as for calling it."""
        ...


class HeadRunner(Protocol):
    """An open head that reads maps; it is tiny beside the backbone's network."""

    def __call__(self, given: Mapping[str, NpArray]) -> list[NpArray]:
        """What each head answers, float32, for float32 maps (n, channels, height, width), and features, by name.

        Raises:
            InputError: the runtime cannot run it on them.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; it cannot be called any more."""
        ...


def require_slots(shapes: Mapping[str, Sequence[int | None]], slots: Mapping[str, NpArray]) -> None:
    """Refuse slots that lack one which the graph asks for, or have one of another size: its description speaks of other
    layers, and not every runtime looks before it reads.

    Args:
        shapes: what the graph asks for, by name; None is any size.

    Raises:
        InputError: a slot is not there, or has another shape.
    """
    fix = "delete the graph and make it again"
    for name, shape in shapes.items():
        if name not in slots:
            raise InputError("backbone", "asks for a slot that its description has not", got=name, fix=fix)
        got = slots[name].shape
        if not _fits(got, shape):
            raise InputError(f"slot {name}", f"needs the shape {_spelled(shape)}", got=_spelled(got), fix=fix)


def _fits(got: Sequence[int], shape: Sequence[int | None]) -> bool:
    if tuple(shape) in ((), (1,)):
        return tuple(got) in ((), (1,))  # one number either way
    return len(got) == len(shape) and all(want in (None, have) for want, have in zip(shape, got, strict=True))


def _spelled(shape: Sequence[int | None]) -> str:
    return " x ".join("n" if side is None else str(side) for side in shape) or "of one number"


def check_images(images: NpArray, shape: tuple[int | None, ...], *, where: str, dtype: str = "float32") -> None:
    """Refuse a batch that the network would not take; None in ``shape`` is any size.

    Raises:
        InputError: another dtype than ``dtype``, or another shape.
    """
    fits = images.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(images.shape, shape, strict=True)
    )
    if not fits or images.dtype != dtype:
        wanted = ", ".join("n" if side is None else str(side) for side in shape)
        raise InputError(
            where,
            f"takes {dtype} images ({wanted})",
            got=f"{images.dtype.name} {tuple(images.shape)}",
            fix="preprocess the images with the artefact's own preprocessing",
        )
