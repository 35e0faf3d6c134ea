"""One vision backbone and fifty tasks on an edge device: PET deltas, folded, exported, measured and packed.

The public names are imported when they are first used, so that ``import edgepet`` costs nothing on a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepet.deltas.delta import Delta as Delta
    from edgepet.device.serving import Device as Device
    from edgepet.errors import EdgepetError as EdgepetError
    from edgepet.exporters.exporter import ExportOptions as ExportOptions
    from edgepet.methods import METHODS as METHODS
    from edgepet.methods import SSF as SSF
    from edgepet.methods import Consolidator as Consolidator
    from edgepet.methods import LoRA as LoRA
    from edgepet.networks.backbone import Backbone as Backbone
    from edgepet.packs.pack import read_pack as read_pack
    from edgepet.packs.pack import write_pack as write_pack
    from edgepet.spec import Preprocess as Preprocess
    from edgepet.tuning.options import TrainOptions as TrainOptions
    from edgepet.verbs.bench import bench as bench
    from edgepet.verbs.calibrate import calibrate as calibrate
    from edgepet.verbs.calibrate import calibrate_all as calibrate_all
    from edgepet.verbs.calibrate import share as share
    from edgepet.verbs.evaluate import evaluate as evaluate
    from edgepet.verbs.export import export as export
    from edgepet.verbs.inspect import inspect as inspect
    from edgepet.verbs.merge import merge as merge
    from edgepet.verbs.pack import keygen as keygen
    from edgepet.verbs.pack import pack as pack
    from edgepet.verbs.peft import export_peft as export_peft
    from edgepet.verbs.peft import import_peft as import_peft
    from edgepet.verbs.predict import predict as predict
    from edgepet.verbs.pretrain import pretrain as pretrain
    from edgepet.verbs.report import report as report
    from edgepet.verbs.sites import sites as sites
    from edgepet.verbs.storage import storage as storage
    from edgepet.verbs.text import text as text
    from edgepet.verbs.train import train as train
    from edgepet.verbs.verify import verify as verify

__version__ = "0.1.0"
__path__.append(f"{__path__[0]}/moved")  # import names that guides of before used (ADR-0017)

_HOME = {
    "Backbone": "edgepet.networks.backbone",
    "Consolidator": "edgepet.methods",
    "Delta": "edgepet.deltas.delta",
    "Device": "edgepet.device.serving",
    "EdgepetError": "edgepet.errors",
    "ExportOptions": "edgepet.exporters.exporter",
    "LoRA": "edgepet.methods",
    "METHODS": "edgepet.methods",
    "Preprocess": "edgepet.spec",
    "SSF": "edgepet.methods",
    "TrainOptions": "edgepet.tuning.options",
    "bench": "edgepet.verbs.bench",
    "calibrate": "edgepet.verbs.calibrate",
    "calibrate_all": "edgepet.verbs.calibrate",
    "evaluate": "edgepet.verbs.evaluate",
    "export": "edgepet.verbs.export",
    "export_peft": "edgepet.verbs.peft",
    "import_peft": "edgepet.verbs.peft",
    "inspect": "edgepet.verbs.inspect",
    "keygen": "edgepet.verbs.pack",
    "merge": "edgepet.verbs.merge",
    "pack": "edgepet.verbs.pack",
    "predict": "edgepet.verbs.predict",
    "pretrain": "edgepet.verbs.pretrain",
    "read_pack": "edgepet.packs.pack",
    "report": "edgepet.verbs.report",
    "share": "edgepet.verbs.calibrate",
    "sites": "edgepet.verbs.sites",
    "storage": "edgepet.verbs.storage",
    "text": "edgepet.verbs.text",
    "train": "edgepet.verbs.train",
    "verify": "edgepet.verbs.verify",
    "write_pack": "edgepet.packs.pack",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'edgepet' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
