"""LoRA as others train and switch it: what benchmarks measure beside edgepet. Not a benchmark by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepet.deltas.delta import Delta
from edgepet.device.fitting import Fitted
from edgepet.device.onnxruntime import open_session
from edgepet.graphs.onnx_file import tensor_of
from edgepet.spec import NpArray

if TYPE_CHECKING:
    from edgepet.networks.backbone import Backbone


RANK, ON = 8, "qkv"  # PEFT cannot name q and v inside timm's fused layer


def timm_network(backbone: Backbone, classes: int) -> Any:
    """timm's network with the weights of ``backbone``, and a classifier as timm begins it.

    Raises:
        RuntimeError: the backbone has tensors that timm's network has not.
    """
    import timm
    import torch

    network = timm.create_model(backbone.name, num_classes=classes, **backbone.create_args)
    own = {name: torch.from_numpy(np.array(tensor)) for name, tensor in backbone.tensors.items()}
    network.load_state_dict({**network.state_dict(), **own}, strict=True)
    return network


def peft_lora(backbone: Backbone, classes: int) -> Any:
    """PEFT's LoRA around ``timm_network``, to be trained with the classifier."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[ON], modules_to_save=["head"])
    return peft.get_peft_model(timm_network(backbone, classes), config)


class OrtAdapters:
    """The graph with slots, which are its defaults as well, and an adapter of ONNX Runtime for each task.

    ``graph_bytes`` are the graph's with its defaults, without the backbone's tensors; ``files`` are the adapters.
    """

    def __init__(self, fitted: Sequence[Fitted], folder: Path, threads: int | None) -> None:
        import onnxruntime

        part, self._active, self._options = fitted[0].part, 0, list[Any]()
        self.files = [(folder / f"{number}.onnx_adapter").absolute() for number in range(len(fitted))]
        defaults = {name: tensor_of(name, value) for name, value in fitted[0].slots.items()}
        file = replace(part.file, tensors={**part.file.tensors, **defaults})
        encoded = file.encoded()
        self.graph_bytes = len(encoded)
        self._session = open_session(encoded, threads=threads, folder=part.folder)
        for path, each in zip(self.files, fitted, strict=True):
            made = onnxruntime.AdapterFormat()
            made.set_adapter_version(1)
            made.set_model_version(1)
            values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in each.slots.items()}
            made.set_parameters(values)
            made.export_adapter(str(path))
            adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
            adapter.Load(str(path))
            options.add_active_adapter(adapter)
            self._options.append((options, adapter))

    def switch(self) -> None:
        """The other task from now on."""
        self._active = 1 - self._active

    def of(self, task: int) -> Callable[[NpArray], NpArray]:
        """The network of one task: images to its features."""
        return partial(self._run, task)

    def __call__(self, images: NpArray) -> NpArray:
        return self._run(self._active, images)

    def _run(self, task: int, images: NpArray) -> NpArray:
        output: NpArray = self._session.run(None, {"images": images}, self._options[task][0])[0]
        return output


def hotswapped(
    backbone: Backbone, deltas: Sequence[Delta], folder: Path, threads: int
) -> tuple[Callable[[NpArray], NpArray], Callable[[NpArray], NpArray], Callable[[], None]]:
    """The backbone in torch, the same with a PEFT adapter, and what loads the other adapter in its place."""
    import torch
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter_from_state_dict
    from peft.utils.save_and_load import load_peft_weights

    from edgepet import export_peft, write_pack

    torch.set_num_threads(threads)
    places = []
    for number, delta in enumerate(deltas):
        write_pack(folder / f"lora{number}.pet", delta)
        export_peft(folder / f"lora{number}.pet", folder / f"lora{number}", backbone=backbone)
        places.append(str(folder / f"lora{number}"))
    plain = copy.deepcopy(backbone.module).eval()
    tuned = PeftModel.from_pretrained(backbone.with_head(deltas[0].head), places[0]).eval()
    turns = [0]

    def runs(module: Any) -> Callable[[NpArray], NpArray]:
        def run(images: NpArray) -> NpArray:
            with torch.no_grad():
                output: NpArray = module(torch.from_numpy(images)).numpy()
            return output

        return run

    def swap() -> None:
        turns[0] += 1
        loaded = load_peft_weights(places[turns[0] % 2])
        state = {key.replace(".weight", ".default.weight"): each for key, each in loaded.items() if "lora_" in key}
        hotswap_adapter_from_state_dict(tuned, state, adapter_name="default", config=tuned.peft_config["default"])

    return runs(plain), runs(tuned), swap
