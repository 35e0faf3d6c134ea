"""One vision backbone and fifty tasks on an edge device: PET deltas, folded, exported, measured and packed.

The public names are imported when they are first used, so that ``import edgepet`` costs nothing on a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepet.backbones import Backbone as Backbone
    from edgepet.calibrating import calibrate as calibrate
    from edgepet.calibrating import share as share
    from edgepet.delta import Delta as Delta
    from edgepet.deploy import export as export
    from edgepet.deploy import merge as merge
    from edgepet.deploy import verify as verify
    from edgepet.errors import EdgepetError as EdgepetError
    from edgepet.exporters.exporter import ExportOptions as ExportOptions
    from edgepet.interchange import export_peft as export_peft
    from edgepet.interchange import import_peft as import_peft
    from edgepet.methods import METHODS as METHODS
    from edgepet.methods import SSF as SSF
    from edgepet.methods import Consolidator as Consolidator
    from edgepet.methods import LoRA as LoRA
    from edgepet.ondevice import bench as bench
    from edgepet.ondevice import evaluate as evaluate
    from edgepet.ondevice import inspect as inspect
    from edgepet.ondevice import storage as storage
    from edgepet.pack import read_pack as read_pack
    from edgepet.pack import write_pack as write_pack
    from edgepet.runtime import Device as Device
    from edgepet.spec import Preprocess as Preprocess
    from edgepet.training import pretrain as pretrain
    from edgepet.training import train as train

__version__ = "0.1.0"

_HOME = {
    "Backbone": "edgepet.backbones",
    "Consolidator": "edgepet.methods",
    "Delta": "edgepet.delta",
    "Device": "edgepet.runtime",
    "EdgepetError": "edgepet.errors",
    "ExportOptions": "edgepet.exporters.exporter",
    "LoRA": "edgepet.methods",
    "METHODS": "edgepet.methods",
    "Preprocess": "edgepet.spec",
    "SSF": "edgepet.methods",
    "bench": "edgepet.ondevice",
    "calibrate": "edgepet.calibrating",
    "evaluate": "edgepet.ondevice",
    "export": "edgepet.deploy",
    "export_peft": "edgepet.interchange",
    "import_peft": "edgepet.interchange",
    "inspect": "edgepet.ondevice",
    "merge": "edgepet.deploy",
    "pretrain": "edgepet.training",
    "read_pack": "edgepet.pack",
    "share": "edgepet.calibrating",
    "storage": "edgepet.ondevice",
    "train": "edgepet.training",
    "verify": "edgepet.deploy",
    "write_pack": "edgepet.pack",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'edgepet' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
