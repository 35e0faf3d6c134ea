"""ONNX Runtime for tasks that share a backbone: a session that they are bound to, each with its own slots."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import onnxruntime

from edgepet.device.onnxruntime import CPU, Session, open_session, profiled, running
from edgepet.device.runner import check_images, require_slots
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.map_slots import in_form
from edgepet.graphs.onnx_file import OnnxFile, shape_of_port
from edgepet.graphs.parts import Part, part_of
from edgepet.graphs.slots import Slots
from edgepet.spec import NpArray, Tensors

_CONVOLUTIONS = ("QLinearConv",)
OF_CODES = 1.5  # times the bytes of the codes: a session that has packed its own, 1.3 to 1.5 of EfficientNet-Lite0


class SharedOnnxRuntime:
    """The int8 backbone: one session that every task is bound to, or, where its maps have codes, a session for each
    task over mapped codes, see ``OnnxRuntimePart``.

    ``codes`` are one task's own in place of the file's, as ``Slots.codes``: a session with them is that task's alone.

    Raises:
        InputError: ONNX Runtime cannot open the graph.
    """

    runtime = "onnxruntime"

    def __init__(
        self, graph: Int8Graph, *, threads: int | None = None, codes: Mapping[str, NpArray] | None = None,
        provider: str = CPU,
    ) -> None:  # fmt: skip
        part = part_of(graph, self.runtime)
        self._graph = graph
        self._part = OnnxRuntimePart(part, codes or {}, threads=threads, provider=provider)

    @property
    def own_bytes(self) -> int:
        """About what a task's own session takes, where it has one."""
        return int(OF_CODES * self._graph.weights_bytes) if self._part.wants_constants else 0

    def bind(self, slots: Slots, *, light: bool = False) -> BoundOnnxRuntime:
        """A task, ready to run: its slots are handed over once, and must stay as they are while it is bound.

        Args:
            light: it is bound to one session for all, see ``OnnxRuntimePart.bind``.
        """
        return self._part.bind(in_form(self._graph, slots, self.runtime), constant=not light)

    def close(self) -> None:
        """Give the session back, once no bound task runs any more."""
        self._part.close()


class OnnxRuntimePart:
    """A session on a stretch of a graph, with ``tensors`` in place of its own: they must stay as they are.

    Convolutions on codes have kernels for constant biases alone that take half of the time. So where there are some,
    what is bound has a session of its own, with its slots as constants; codes are mapped once for all.

    Raises:
        InputError: ONNX Runtime cannot open it.
    """

    runtime = "onnxruntime"

    def __init__(self, part: Part, tensors: Tensors, *, threads: int | None = None, provider: str = CPU) -> None:
        self._held: Tensors | None = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
        self._threads, self._provider, self._session = threads, provider, None
        self.wants_constants = bool(part.slots) and any(node.operator in _CONVOLUTIONS for node in part.file.nodes)
        self._part = part.pruned if self.wants_constants else part
        if not self.wants_constants:
            self._session = self._opened(part.file)

    def bind(self, values: Mapping[str, NpArray], *, constant: bool = True) -> BoundOnnxRuntime:
        """Ready to run with these slots, which are handed over once, and must stay as they are while it is bound.

        Args:
            constant: False leaves them inputs of one session, where they would be constants: megabytes less for each
                task, and about twice the time.
        """
        part, made = self._part, self._part.file
        if constant and self.wants_constants:
            asked = {name: shape_of_port(made.inputs[name]) for name in part.slots}
            require_slots(asked, values)
            constants = {name: values[name].reshape([side or -1 for side in shape]) for name, shape in asked.items()}
            made, values = made.with_constants(constants), {}
            session = self._opened(made)
        else:
            self._session = session = self._session or self._opened(made)
        return BoundOnnxRuntime(session, values, part, held=self._held, file=made)

    def _opened(self, file: OnnxFile) -> Session:
        return open_session(
            file.encoded(), threads=self._threads, tensors=self._held, folder=self._part.folder,
            provider=self._provider,
        )  # fmt: skip

    def close(self) -> None:
        """Give the session back, once nothing that is bound runs any more."""
        self._session = self._held = None


class BoundOnnxRuntime:
    """A shared session with one task's slots, n images or maps to its first output; closing it leaves it open."""

    runtime = "onnxruntime"

    def __init__(
        self, session: Session, slots: Mapping[str, NpArray], part: Part, *, held: object, file: OnnxFile
    ) -> None:
        # The session, which is of ``file``, reads the arrays of the slots where they lie; ``held`` are those that it
        # reads itself.
        self._session, self._binding, self._part, self._file = session, session.io_binding(), part, file
        self._reads, self._shape, self.executed = part.reads, (None, *part.shape), part.precision
        asked = {
            entry.name: [side if isinstance(side, int) else None for side in entry.shape]
            for entry in session.get_inputs()
            if entry.name != self._reads
        }
        require_slots(asked, slots)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(slots[name]) for name in asked}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._held: object = (values, slots, held)
        self._lock = threading.Lock()  # a binding holds one call's images
        self._puts_out = [entry.name for entry in session.get_outputs()]
        self._nothing = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(0, np.float32))

    @property
    def evidence(self) -> Mapping[str, object]:
        """Of codes, from a profile of one run with all slots one: layers that multiplied codes, and floats."""
        part = self._part
        if part.precision != "int8":
            return {"providers": self._session.get_providers()}
        return profiled(self._file.encoded(), self._shape, part.dtype, reads=part.reads, folder=part.folder)

    def __call__(self, images: NpArray) -> NpArray:
        return self.outputs(images)[0]

    def outputs(self, images: NpArray) -> list[NpArray]:
        """All that it puts out."""
        check_images(images, self._shape, where=self._reads, dtype=self._part.dtype)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(images))  # where they lie: not copied
        with self._lock, running(self._reads):
            self._binding.bind_ortvalue_input(self._reads, value)
            self._binding.clear_binding_outputs()  # the last call's has its batch's shape
            for name in self._puts_out:
                self._binding.bind_output(name)
            self._session.run_with_iobinding(self._binding)
            outputs: list[NpArray] = self._binding.copy_outputs_to_cpu()
            self._binding.bind_ortvalue_input(self._reads, self._nothing)  # or every task would keep its last images
        return outputs

    def close(self) -> None:
        """Give the slots back; the session stays open."""
        self._session = self._binding = self._held = None
