"""The ways that a task gets on a device, the files of each, and what opens them: what ``peers.py`` measures.

Not a benchmark by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors.numpy
from adapters import OrtAdapters, timm_network
from int8 import written_with_ranges
from judging import tested_images
from neighbours import quantised
from shared_int8 import graph_of
from trainings import Trained, images_of, named_file, named_pack, pack_of

from edgepet import import_peft, read_pack
from edgepet.calibration.images import CalibrationImages, calibration_images
from edgepet.deltas.delta import Head
from edgepet.deltas.merge import task_tensors
from edgepet.device.fitting import Fitted, fit, opened
from edgepet.device.onnxruntime import OnnxRuntime
from edgepet.device.openvino import OpenVino
from edgepet.device.runtime import SharedInt8, TaskNetwork
from edgepet.device.runtimes import SHARED_RUNTIMES, shared_runtime
from edgepet.exporters.onnx import build_model, serialize
from edgepet.files import write_file
from edgepet.graphs.base import open_graph
from edgepet.images.batches import batched
from edgepet.jobs.job import Job, Result
from edgepet.networks.loading import load_backbone
from edgepet.proving.in_torch import tuned_network
from edgepet.proving.precision import calibration_of
from edgepet.proving.subject import Subject
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone

Network: TypeAlias = Callable[[NpArray], NpArray]

MANY, ADAPTER, ADAPTERS = 10, "adapter/adapter_model.safetensors", "adapters"


# --------------------------------------------------------------------------------------------------- what opens a file


class Adapted:
    """A task of ``OrtAdapters``, with the head, which adapters hold no part of: it is NumPy's, as elsewhere."""

    def __init__(self, features: Network, head: Head) -> None:
        self._features, self._head = features, head

    def __call__(self, images: NpArray) -> NpArray:
        return self._head(self._features(images))


def of_file(path: Path, runtime: str, threads: int | None) -> list[Network]:
    """A file of the task's own."""
    made: Any = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}[runtime]
    return [made.of_model(path, threads=threads)]


def in_slots(path: Path, runtime: str, threads: int | None) -> list[Network]:
    """A pack on the fp32 backbone, and another one on the same open network."""
    fitted = fitted_to(path)
    part = opened(shared_runtime(runtime, purpose="a benchmark"), fitted.part, {}, threads)
    return [TaskNetwork(part.bind(fitted.slots), fitted.head) for _ in range(2)]


def on_codes(path: Path, runtime: str, threads: int | None) -> list[Network]:
    """A pack on the int8 backbone, and another one on the same open network."""
    shared, delta = SharedInt8(graph_of(path), runtime=runtime, threads=threads), read_pack(path).delta
    return [shared.bind(delta) for _ in range(2)]


def with_adapters(path: Path, runtime: str, threads: int | None) -> list[Network]:
    """Two adapters of ONNX Runtime on one session, with the numbers of a pack."""
    del runtime
    fitted = fitted_to(path)
    with tempfile.TemporaryDirectory() as folder:  # adapters are read whole
        active = OrtAdapters([fitted, fitted], Path(folder), threads)
    return [Adapted(active.of(task), fitted.head) for task in range(2)]


def fitted_to(path: Path) -> Fitted:
    """A pack in slots of its backbone's graph."""
    delta = read_pack(path).delta
    return fit(open_graph(delta.fingerprint, delta.preprocess), delta, "slots")


# ------------------------------------------------------------------------------------------------------------ the ways


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a task gets on a device: who makes it of which training, and what it is kept as.

    ``open`` opens ``file`` on a runtime, and where tasks share a network another task beside it. ``counted`` is what
    lies on a device, as patterns, where that is not the file alone; ``shares`` names what all tasks have in common.
    """

    name: str
    who: str
    trained: str
    kept_as: str
    file: str
    open: Callable[[Path, str, int | None], list[Network]] = of_file
    runtimes: tuple[str, ...] = SHARED_RUNTIMES
    counted: tuple[str, ...] = ()
    shares: str | None = None


FP32_FILE = "ssf file"
WAYS = (
    *(
        Way(name=f"{method} pack", who="edgepet", trained=method, kept_as="pack, fp32 backbone", file=f"{method}.pet",
            open=in_slots, shares="fp32")
        for method in ("linear-probe", "ssf", "lora")
    ),
    Way(name="ssf pack int8", who="edgepet", trained="ssf", kept_as="pack, int8 backbone", file="ssf-int8.pet",
        open=on_codes, shares="int8"),
    Way(name=FP32_FILE, who="edgepet", trained="ssf", kept_as="file, fp32", file="ssf.onnx"),
    Way(name="ssf file int8", who="edgepet", trained="ssf", kept_as="file, int8", file="ssf-int8.onnx"),
    Way(name="full file", who="edgepet", trained="full", kept_as="file, fp32", file="full.onnx"),
    Way(name="peft file", who="PEFT, torch.onnx", trained="peft", kept_as="file, fp32", file="peft.onnx"),
    Way(name="peft adapter", who="PEFT, ONNX Runtime", trained="peft", kept_as="adapter, fp32 backbone",
        file="peft.pet", open=with_adapters, runtimes=("onnxruntime",), counted=(f"{ADAPTERS}/*",), shares="adapters"),
    Way(name="peft nncf onnxruntime", who="PEFT, NNCF", trained="peft", kept_as="file, int8", file="nncf.onnx",
        runtimes=("onnxruntime",)),
    Way(name="peft nncf openvino", who="PEFT, NNCF", trained="peft", kept_as="file, int8", file="nncf.xml",
        runtimes=("openvino",), counted=("nncf.xml", "nncf.bin")),
    Way(name="peft quantize_static", who="PEFT, ONNX Runtime", trained="peft", kept_as="file, int8",
        file="static.onnx", runtimes=("onnxruntime",)),
)  # fmt: skip


def ways_in(folder: Path) -> list[Way]:
    """Those whose files are there: a quick run has not all trainings."""
    return [way for way in WAYS if (folder / way.file).is_file()]


# ----------------------------------------------------------------------------------------------------------- the files


def deploying_job(own: Mapping[str, Trained], peft: Result, calib: int) -> Job:
    """The files of all ways, of edgepet's trainings by method and PEFT's, and what they answer."""
    given: Any = own["ssf"].result.job.specification
    packs = {name: named_pack(each) for name, each in own.items()}
    shared = {key: given[key] for key in ("data", "backbone", "threads")}
    return Job(
        function="peer_ways:deploy",
        specification={**shared, "packs": packs, "adapter": named_file(peft, ADAPTER), "calib": calib},
    )


def deploy(specification: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """The files of all ways in ``folder``; of each its bytes, test top-1, and how many answers are those of torch."""
    import torch

    from edgepet.tuning.model import logits_of

    torch.set_num_threads(specification["threads"])
    data, network = images_of(specification, folder), specification["backbone"]
    backbone = load_backbone(network["name"], image_size=network["image_size"])
    packs = {name: pack_of({"pack": pack}, folder) for name, pack in specification["packs"].items()}
    subjects = {name: Subject(pack, backbone, None) for name, pack in packs.items()}
    ssf, calib = subjects["ssf"], specification["calib"]
    images, labels = tested_images(ssf.delta, data, None)
    chosen = calibration_images(data, ssf.delta.labels, ssf.delta.preprocess, evaluation=data, count=calib)
    expected = {name: logits_of(tuned_network(subject), images) for name, subject in subjects.items()}
    shared = ours(subjects, data, chosen, folder)
    adapter = pack_of({"pack": specification["adapter"]}, folder).parent
    expected["peft"] = theirs(adapter, backbone, images, chosen, folder)
    import_peft(adapter, folder / "peft.pet", backbone=backbone, labels=ssf.delta.labels)
    shared["adapters"] = ssf.graph.weights_bytes + keep_adapter(folder / "peft.pet", folder / ADAPTERS)
    return {way.name: judged(way, folder, shared, images, labels, expected[way.trained]) for way in ways_in(folder)}


def ours(subjects: Mapping[str, Subject], data: Path, chosen: CalibrationImages, folder: Path) -> dict[str, int]:
    """edgepet's files, of packs by method; the bytes that tasks share, in fp32 and int8."""
    ssf = subjects["ssf"]
    for name, subject in subjects.items():
        if name != "full":
            write_file(folder / f"{name}.pet", subject.path.read_bytes())
        if name in ("full", "ssf"):
            write_file(folder / f"{name}.onnx", serialize(in_fp32(subject)))
    coded = calibration_of(ssf, chosen, in_fp32(ssf)).for_format("onnx")  # of a ViT all runtimes have the same
    write_file(folder / "ssf-int8.onnx", serialize(coded.made(coded.choose()[0].recipe).model))
    codes, _ = written_with_ranges(ssf.path, data, folder / "ssf-int8.pet", len(chosen.digests))
    return {
        "fp32": ssf.graph.weights_bytes + ssf.graph.graph_bytes,
        "int8": codes.weights_bytes + codes.graph_bytes,
    }


def in_fp32(subject: Subject) -> Any:
    """A task folded, as an ONNX model."""
    return build_model(subject.graph, task_tensors(subject.graph.base, subject.delta), subject.delta)


def theirs(adapter: Path, backbone: Backbone, images: NpArray, chosen: CalibrationImages, folder: Path) -> NpArray:
    """The files of others: PEFT's adapter merged and exported as torch does, and that in int8; its logits unmerged."""
    import onnx
    import peft
    import torch

    from edgepet.tuning.model import logits_of

    base = timm_network(backbone, len(chosen.measured.classes))
    tuned: Any = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    expected, merged = logits_of(tuned, images), tuned.merge_and_unload()
    path = folder / "peft.onnx"
    torch.onnx.export(
        merged.eval(), (torch.from_numpy(images[:2]),), path, dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for _, made in quantised(onnx.load(path), chosen.images, Path(scratch)):
            for each in made.parent.glob(f"{made.stem}.*"):
                write_file(folder / each.name, each.read_bytes())
    return expected


def keep_adapter(pack: Path, folder: Path) -> int:
    """Write ONNX Runtime's adapter with the numbers of a pack, and the head; the bytes of the graph that takes them."""
    fitted = fitted_to(pack)
    folder.mkdir()
    head = {"weight": fitted.head.weight, "bias": fitted.head.bias}
    write_file(folder / "head.safetensors", safetensors.numpy.save(head))
    return OrtAdapters([fitted], folder, None).graph_bytes


def judged(
    way: Way, folder: Path, shared: Mapping[str, int], images: NpArray, labels: NpArray, expected: NpArray
) -> dict[str, object]:
    """What a device keeps of one task and of many, and what it answers on the first of the way's runtimes."""
    answers = batched(way.open(folder / way.file, way.runtimes[0], None)[0], images).argmax(axis=1)
    size = sum(path.stat().st_size for name in way.counted or (way.file,) for path in folder.glob(name))
    return {
        "test_top1": float((answers == labels).mean()),
        "test_n": len(labels),
        "same_answers": int((answers == expected.argmax(axis=1)).sum()),
        "task_bytes": size,
        "many_bytes": MANY * size + (0 if way.shares is None else shared[way.shares]),
    }
