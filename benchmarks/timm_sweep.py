"""Every family of timm, one model each: found, tuned with SSF, folded, traced and compared on every runtime.

    python benchmarks/timm_sweep.py            # about two hours on 2 cores
    python benchmarks/timm_sweep.py swin vgg   # only these
    python benchmarks/timm_sweep.py --size 384 qwen3_vit   # smaller images, where a network's own take hours

Takes the smallest model of each of timm's modules, with seeded weights: what is asked is whether it can be exported,
not how well it sees. Each runs in a process of its own, so that one that fails or never ends does not end the others.
Writes ``timm-sweep.json`` and the table in docs/guide/timm.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness import HERE, SWEEP, asked, earlier, parser_of, write_result

from edgepet.reports.tables import Column, Table, markdown
from edgepet.spec import StoredPrecision

if TYPE_CHECKING:
    from edgepet.device.runtimes import Format
    from edgepet.networks.backbone import Backbone
    from edgepet.proving.exported import Exported

PAGE = HERE.parent / "docs" / "guide" / "timm.md"
QUICK = ("resnet",)
LIMIT_S = 1200
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt-rtx"}  # by format
PRECISIONS: tuple[StoredPrecision, ...] = ("fp32", "fp16", "int8")
LABELS = tuple("abcde")
CLOSE = 1e-4  # of the largest feature: edgepet.measuring.parity.STORED["fp32"]


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("families", nargs="*", help="modules of timm.models (default: all)")
    made.add_argument("--limit", type=int, default=LIMIT_S, metavar="S", help="of each family (default: %(default)s)")
    made.add_argument("--size", type=int, metavar="PX", help="height and width of images (default: the network's own)")
    made.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Examine every family in a process of its own, or one in this one."""
    options = parser().parse_args()
    if options.one:
        examine(options.families[0], options.size)
        return
    run = asked(options)
    families: list[str] = options.families or (list(QUICK) if run.quick else all_families())
    known: dict[str, Any] = {row["family"]: row for row in earlier(run, "timm-sweep").get("rows", [])}
    for number, family in enumerate(families, start=1):
        known[family] = apart(family, options.limit, options.size)
        print(f"{number}/{len(families)} {family}: {reason(known[family]) or 'ok'}", flush=True)
        write_result(run, "timm-sweep", {"rows": [known[name] for name in sorted(known)]})
    SWEEP.put(PAGE, table(earlier(run, "timm-sweep")), run.results if run.quick else None)


def all_families() -> list[str]:
    """timm's modules that have models."""
    import timm

    return sorted({str(timm.models.model_entrypoint(n).__module__).rsplit(".", 1)[-1] for n in timm.list_models()})


def apart(family: str, limit_s: int = LIMIT_S, size: int | None = None) -> dict[str, Any]:
    """``examine`` in a process of its own, with a cache of its own; what it had found when it was stopped is kept."""
    line = [sys.executable, __file__, "--one", family, *([] if size is None else ["--size", str(size)])]
    with tempfile.TemporaryDirectory() as folder:
        told, place = Path(folder) / "rows", {**os.environ, "EDGEPET_CACHE": folder, "TMPDIR": folder}
        with told.open("w") as out:
            try:
                done = subprocess.run(
                    line, stdout=out, stderr=subprocess.PIPE, text=True, timeout=limit_s, check=False, env=place
                )
                last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1][:200]
                bug = f"ended with exit code {done.returncode}: {last}" if done.returncode else None
            except subprocess.TimeoutExpired:
                bug = f"took longer than {limit_s} s"
        rows = [json.loads(text) for text in told.read_text().splitlines() if text.startswith("{")]
    row: dict[str, Any] = rows[-1] if rows else {"family": family}
    return row if bug is None else row | {"refused": bug}


def examine(family: str, size: int | None = None) -> None:
    """Print one row, each time as far as it is known: what was found and how far apart the answers were, or who
    refused and why.
    """
    from edgepet.errors import EdgepetError

    name, parameters = smallest(family)
    row: dict[str, Any] = {"family": family, "model": name, "parameters": parameters, "other_size": size is not None}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for part in compared(name, Path(folder), size):
                row |= part
                print(json.dumps(row), flush=True)
        except EdgepetError as error:
            row["refused"] = told_of(error, folder)
    print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


def told_of(error: Exception, folder: Path | str) -> str:
    """The first line of an error, without this machine's paths."""
    return str(error).partition("\n")[0].replace(f"{folder}/", "").replace(str(folder), "")[:300]


def smallest(family: str) -> tuple[str, int]:
    """The model of a timm module with the fewest parameters, built without memory for its weights."""
    import timm
    import torch

    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            try:
                module = timm.create_model(name, pretrained=False, num_classes=0)
            except (RuntimeError, NotImplementedError, TypeError):  # an initialisation that needs its weights
                continue
        sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not sizes:
        name = timm.list_models(module=family)[0]
        sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False, num_classes=0).parameters())
    return min(sizes.items(), key=lambda item: item[1])


def compared(name: str, folder: Path, image_size: int | None = None) -> Iterator[dict[str, Any]]:
    """Sites, algebra, and the largest difference on each runtime as a fraction of the largest answer, part by part."""
    import numpy as np
    import safetensors.torch
    import timm
    import torch

    from edgepet.deltas.delta import Score
    from edgepet.deltas.merge import merge
    from edgepet.device.onnxruntime import OnnxRuntime
    from edgepet.device.openvino import OpenVino
    from edgepet.errors import EdgepetError
    from edgepet.exporters.trace import base_graph
    from edgepet.methods import SSF
    from edgepet.networks.loading import load_backbone
    from edgepet.packs.pack import write_pack
    from edgepet.tuning.model import TunedModel, algebra_error, extract

    torch.manual_seed(0)
    file = folder / "weights.safetensors"
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, file)  # twins under both names
    backbone = load_backbone(f"{name}@{file}", image_size=image_size)
    size = backbone.preprocess.image_size
    model = TunedModel(backbone, SSF(), len(LABELS))
    torch.nn.init.normal_(model.linear.weight)
    images = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    error, largest = algebra_error(model, backbone, images)
    yield {
        "image_size": list(size),
        "tensors": sum(tensor.dtype.kind == "f" for tensor in backbone.tensors.values()),
        "sites": {kind: sum(site.kind == kind for site in backbone.layers) for kind in ("linear", "conv", "norm")},
        "algebra": error / largest,
        "algebra_ok": bool(error <= 1e-9 * largest),
    }
    graph = base_graph(backbone)
    delta = extract(model, backbone, task="sweep", labels=LABELS, val=Score(top1=0.0, n=1))
    merged = merge(graph.base, delta)
    state = {key: torch.from_numpy(np.array(tensor)) for key, tensor in merge(backbone.base, delta).items()}
    with torch.no_grad():
        expected = torch.func.functional_call(
            backbone.module, state, (torch.from_numpy(images),), tie_weights=False
        ).numpy()
    faults(backbone, delta, images, expected)
    changed = {key: merged[key] for key in delta.targets}
    for runtime, open_graph in (("onnxruntime", OnnxRuntime.of_graph), ("openvino", OpenVino.of_graph)):
        try:
            with open_graph(graph, changed) as runner:
                yield {runtime: float(np.abs(runner(images) - expected).max() / np.abs(expected).max())}
        except EdgepetError as refusal:
            yield {f"{runtime}_refused": told_of(refusal, folder)}
    pack = folder / "sweep.pet"
    write_pack(pack, delta)
    yield from answered(pack, backbone, folder)
    for precision in PRECISIONS:
        yield exported(pack, backbone, precision, folder)


def answered(pack: Path, backbone: Backbone, folder: Path) -> Iterator[dict[str, Any]]:
    """``eval`` in torch and on a device's runtime, on drawn images."""
    from edgepet.errors import EdgepetError
    from edgepet.verbs.evaluate import evaluate

    images = drawn(folder / "images", backbone.preprocess.image_size)
    for runtime in ("torch", "onnxruntime"):
        try:
            test: Any = evaluate(pack, images, runtime=runtime, backbone=backbone)  # of classes
            yield {f"eval_{runtime}": test.top1}
        except EdgepetError as refusal:
            yield {f"eval_{runtime}_refused": told_of(refusal, folder)}


def drawn(folder: Path, size: tuple[int, int]) -> Path:
    """A folder of coloured patterns in ``LABELS`` classes: what networks answer, not how well they see.

    In train there are 35, and int8 needs 32.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 2), ("test", 2)):
        for label in LABELS:
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
                small.resize(size[::-1], Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return folder


def exported(pack: Path, backbone: Backbone, precision: StoredPrecision, folder: Path) -> dict[str, Any]:
    """``export`` in one precision to all formats, or where one refuses to each alone: the parity that it proves."""
    from edgepet.calibration import search
    from edgepet.errors import EdgepetError
    from edgepet.exporters.exporter import ExportOptions
    from edgepet.verbs.export import export

    for candidates in ("SMOOTH", "ESTIMATORS"):  # int8 by the recipe where the search starts: nothing is won on these
        setattr(search, candidates, ())
    images = folder / "images"

    def made(formats: Sequence[str]) -> dict[str, Any]:
        calib = None if precision == "fp32" else images
        options = ExportOptions(to=cast("tuple[Format, ...]", tuple(formats)), precision=precision, calib=calib)
        report = export([pack], folder / precision, backbone=backbone, data=images, options=options)
        return {RUNTIMES[row.artifact.format]: parity(row) for row in report.artifacts}

    try:
        rows = made(list(RUNTIMES))
    except EdgepetError:
        rows = {}
        for name, runtime in RUNTIMES.items():
            try:
                rows |= made([name])
            except EdgepetError as refusal:
                rows[runtime] = {"refused": told_of(refusal, folder)}
    return {precision: rows}


def parity(row: Exported) -> dict[str, Any]:
    """What an artefact's manifest says of it: how far its logits are from torch's, or that nothing here runs it."""
    found = row.artifact.parity
    if found is None:
        return {"built": True}
    return {"max_abs": found.max_abs, "limit": found.limit, "top1_agreement": found.top1_agreement, "n": found.n}


def faults(backbone: Any, delta: Any, images: Any, features: Any) -> None:
    """Count every method, and load the merged weights strictly into timm's network: an error is the family's row."""
    import numpy as np
    import torch

    from edgepet.deltas.merge import merge
    from edgepet.errors import CheckError
    from edgepet.tuning.model import logits_of
    from edgepet.verbs.methods import methods

    methods(backbone)
    network = backbone.with_head(delta.head)
    weights = backbone.named_weights(merge(backbone.base, delta), delta.head)
    network.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in weights.items()}, strict=True)
    expected = delta.head(features)
    worst = float(np.abs(logits_of(network, images) - expected).max() / np.abs(expected).max())
    if not worst <= CLOSE:
        raise CheckError(backbone.label, f"timm's network must answer as the merged one, within {CLOSE}", got=worst)


def table(result: dict[str, Any]) -> str:
    """The page's table, with the command and the machine."""
    rows = []
    for row in result["rows"]:
        sites = row.get("sites", {})
        rows.append(
            (
                row["family"],
                f"{row['model']} at {row['image_size'][0]} px" if row.get("other_size") else row.get("model", ""),
                "/".join(str(sites[kind]) for kind in ("linear", "conv", "norm")) if sites else "",
                number(row, "algebra"),
                number(row, "onnxruntime"),
                number(row, "openvino"),
                "/".join(number(row, f"eval_{runtime}", ".2f") or "–" for runtime in ("torch", "onnxruntime")),
                relative(row, "fp16"),
                relative(row, "int8"),
                ", ".join(name for name in PRECISIONS if row.get(name, {}).get("tensorrt-rtx", {}).get("built")),
                reason(row),
            )
        )
    columns = (
        Column("timm module"), Column("smallest model"), Column("linear/conv/norm sites", right=True),
        Column("algebra", right=True), Column("ONNX Runtime", right=True), Column("OpenVINO", right=True),
        Column("eval torch/ONNX Runtime", right=True), Column("fp16", right=True), Column("int8", right=True),
        Column("TensorRT-RTX"), Column("who refuses what"),
    )  # fmt: skip
    here = result["environment"]
    versions = ", ".join(
        f"{name} {here['versions'][name]}"
        for name in ("torch", "timm", "onnxruntime", "openvino", "tensorrt-rtx")
        if name in here["versions"]
    )
    before = sum("fp32" not in row and "refused" not in row for row in result["rows"])
    older = f" {before} rows without fp16 and int8 are of an earlier run." if before else ""
    made = f"`{result['command']}` on {here['cpu']}, {versions}, {here['date']}.{older}"
    return f"{markdown(Table('', columns, rows))}\n{made}\n"


def relative(row: dict[str, Any], precision: str) -> str:
    """How far ONNX Runtime's and OpenVINO's logits are from torch's in fp32, as fractions of the largest."""
    found = [row.get(precision, {}).get(runtime, {}) for runtime in ("onnxruntime", "openvino")]
    limits = [each["limit"] for each in row.get("fp32", {}).values() if each.get("limit")]
    if not limits or not any("max_abs" in each for each in found):
        return ""
    largest = limits[0] / CLOSE
    return "/".join(f"{each['max_abs'] / largest:.0e}" if "max_abs" in each else "–" for each in found)


def reason(row: dict[str, Any]) -> str:
    """Who refuses what, or whose answers are too far apart, which ``export`` would refuse."""
    keys = ("refused", "onnxruntime_refused", "openvino_refused", "eval_torch_refused", "eval_onnxruntime_refused")
    told = [str(row[key]) for key in keys if key in row]
    told += [f"{name}: beyond the limit" for name in ("onnxruntime", "openvino") if not row.get(name, 0) <= CLOSE]
    for precision in PRECISIONS:
        for runtime, found in row.get(precision, {}).items():
            if "refused" in found:
                told.append(f"{precision}, {runtime}: {found['refused']}")
    return "; ".join(dict.fromkeys(told))


def number(row: dict[str, Any], key: str, form: str = ".0e") -> str:
    """A number as the table shows it."""
    return f"{row[key]:{form}}" if key in row else ""


if __name__ == "__main__":
    main()
