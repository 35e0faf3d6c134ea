"""Every family of timm, one model each: found, tuned with SSF, folded, traced and compared on every runtime.

    python benchmarks/timm_sweep.py            # about half an hour on 2 cores
    python benchmarks/timm_sweep.py swin vgg   # only these

Takes the smallest model of each of timm's modules, with seeded weights: what is asked is whether it can be exported,
not how well it sees. Each runs in a process of its own, so that one that fails or never ends does not end the others.
Writes ``timm-sweep.json`` and the table in docs/guide/timm.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import HERE, SWEEP, asked, earlier, parser_of, write_result

from edgepet.reports.tables import Column, Table, markdown

PAGE = HERE.parent / "docs" / "guide" / "timm.md"
QUICK = ("resnet",)
LIMIT_S = 600
CLOSE = 1e-4  # of the largest feature: edgepet.measuring.parity.STORED["fp32"]


def parser() -> argparse.ArgumentParser:
    """The arguments of this benchmark."""
    made = parser_of(__doc__)
    made.add_argument("families", nargs="*", help="modules of timm.models (default: all)")
    made.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Examine every family in a process of its own, or one in this one."""
    options = parser().parse_args()
    if options.one:
        print(json.dumps(examine(options.families[0])))
        return
    run = asked(options)
    families: list[str] = options.families or (list(QUICK) if run.quick else all_families())
    known: dict[str, Any] = {row["family"]: row for row in earlier(run, "timm-sweep").get("rows", [])}
    for number, family in enumerate(families, start=1):
        known[family] = apart(family)
        print(f"{number}/{len(families)} {family}: {known[family].get('refused') or 'ok'}", flush=True)
        write_result(run, "timm-sweep", {"rows": [known[name] for name in sorted(known)]})
    SWEEP.put(PAGE, table(earlier(run, "timm-sweep")), run.results if run.quick else None)


def all_families() -> list[str]:
    """timm's modules that have models."""
    import timm

    return sorted({str(timm.models.model_entrypoint(n).__module__).rsplit(".", 1)[-1] for n in timm.list_models()})


def apart(family: str) -> dict[str, Any]:
    """``examine`` in a process of its own."""
    line = [sys.executable, __file__, "--one", family]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"family": family, "refused": f"took longer than {LIMIT_S} s"}
    if done.returncode != 0:
        return {"family": family, "refused": f"a bug: {done.stderr.strip().splitlines()[-1][:200]}"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def examine(family: str) -> dict[str, Any]:
    """One row: what was found and how far apart the answers were, or who refused and why."""
    from edgepet.errors import EdgepetError

    name, parameters = smallest(family)
    row: dict[str, Any] = {"family": family, "model": name, "parameters": parameters}
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            row |= compared(name, Path(folder))
    except EdgepetError as error:
        row["refused"] = str(error).partition("\n")[0].replace(folder, "")[:300]
    return row | {"seconds": round(time.perf_counter() - began, 1)}


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


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Sites, algebra, and the largest difference on each runtime as a fraction of the largest feature."""
    import numpy as np
    import safetensors.torch
    import timm
    import torch

    from edgepet.deltas.delta import Score
    from edgepet.deltas.merge import merge
    from edgepet.device.onnxruntime import OnnxRuntime
    from edgepet.device.openvino import OpenVino
    from edgepet.errors import EdgepetError
    from edgepet.exporters.onnx import build_model, serialize
    from edgepet.exporters.tensorrt import build_engines
    from edgepet.exporters.trace import base_graph
    from edgepet.methods import SSF
    from edgepet.networks.loading import load_backbone
    from edgepet.tuning.model import TunedModel, algebra_error, extract

    torch.manual_seed(0)
    file = folder / "weights.safetensors"
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    safetensors.torch.save_file({key: tensor.clone() for key, tensor in state.items()}, file)  # twins under both names
    backbone = load_backbone(f"{name}@{file}")
    size = backbone.preprocess.image_size
    model = TunedModel(backbone, SSF(), 5)
    torch.nn.init.normal_(model.linear.weight)
    images = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    error, largest = algebra_error(model, backbone, images)
    graph = base_graph(backbone, root=folder)
    delta = extract(model, backbone, task="sweep", labels=tuple("abcde"), val=Score(top1=0.0, n=1))
    merged = merge(graph.base, delta)
    state = {key: torch.from_numpy(np.array(tensor)) for key, tensor in merge(backbone.base, delta).items()}
    with torch.no_grad():
        expected = torch.func.functional_call(
            backbone.module, state, (torch.from_numpy(images),), tie_weights=False
        ).numpy()
    faults(backbone, delta, images, expected)
    row: dict[str, Any] = {
        "image_size": size[0],
        "tensors": sum(tensor.dtype.kind == "f" for tensor in backbone.tensors.values()),
        "sites": {kind: sum(site.kind == kind for site in backbone.layers) for kind in ("linear", "conv", "norm")},
        "algebra": error / largest,
        "algebra_ok": bool(error <= 1e-9 * largest),
    }
    changed = {key: merged[key] for key in delta.targets}
    for runtime, open_graph in (("onnxruntime", OnnxRuntime.of_graph), ("openvino", OpenVino.of_graph)):
        try:
            with open_graph(graph, changed) as runner:
                row[runtime] = float(np.abs(runner(images) - expected).max() / np.abs(expected).max())
        except EdgepetError as refusal:
            row[f"{runtime}_refused"] = str(refusal).partition("\n")[0].replace(str(folder), "")[:300]
    try:
        build_engines(serialize(build_model(graph, merged, delta)), folder)
        row["tensorrt-rtx"] = "built"
    except EdgepetError as refusal:
        row["tensorrt-rtx_refused"] = str(refusal).partition("\n")[0].replace(str(folder), "")[:300]
    return row


def faults(backbone: Any, delta: Any, images: Any, features: Any) -> None:
    """Count every method, and load the merged weights strictly into timm's network: an error is the family's row."""
    import numpy as np
    import torch

    from edgepet.deltas.merge import merge
    from edgepet.errors import CheckError
    from edgepet.methods import METHODS, configure
    from edgepet.methods.method import count, fp16_bytes
    from edgepet.tuning.model import logits_of

    for method in map(configure, METHODS):
        count(method, backbone.layers, backbone.tensors)
        fp16_bytes(method, backbone.layers, backbone.tensors)
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
                row.get("model", ""),
                "/".join(str(sites[kind]) for kind in ("linear", "conv", "norm")) if sites else "",
                number(row, "algebra"),
                number(row, "onnxruntime"),
                number(row, "openvino"),
                "built" if row.get("tensorrt-rtx") else "no" if sites else "",
                reason(row),
            )
        )
    columns = (
        Column("timm module"), Column("smallest model"), Column("linear/conv/norm sites", right=True),
        Column("algebra", right=True), Column("ONNX Runtime", right=True), Column("OpenVINO", right=True),
        Column("TensorRT-RTX"), Column("who refuses what"),
    )  # fmt: skip
    here = result["environment"]
    versions = ", ".join(
        f"{name} {here['versions'][name]}"
        for name in ("torch", "timm", "onnxruntime", "openvino")
        if name in here["versions"]
    )
    return (
        f"{markdown(Table('', columns, rows))}\n`{result['command']}` on {here['cpu']}, {versions}, {here['date']}.\n"
    )


def reason(row: dict[str, Any]) -> str:
    """Who refuses what, or whose answers are too far apart, which ``export`` would refuse."""
    for key in ("refused", "onnxruntime_refused", "openvino_refused", "tensorrt-rtx_refused"):
        if key in row:
            return str(row[key])
    far = [name for name in ("onnxruntime", "openvino") if not row[name] <= CLOSE]
    return f"{', '.join(far)}: beyond the limit" if far else ""


def number(row: dict[str, Any], key: str) -> str:
    """A difference as the table shows it."""
    return f"{row[key]:.0e}" if key in row else ""


if __name__ == "__main__":
    main()
