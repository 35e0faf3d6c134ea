"""The PET methods, a file each; ``table`` lists them."""

from __future__ import annotations

from edgepet.methods.adapter import Adapter, Houlsby
from edgepet.methods.adaptformer import AdaptFormer
from edgepet.methods.arc import ARC
from edgepet.methods.baselines import Full, LinearProbe
from edgepet.methods.bi_lora import BiLoRA
from edgepet.methods.bitfit import BitFit
from edgepet.methods.consolidator import Consolidator
from edgepet.methods.conv_adapter import ConvAdapter
from edgepet.methods.convpass import Convpass
from edgepet.methods.dora import DoRA
from edgepet.methods.fact import FacTTK, FacTTT
from edgepet.methods.glora import GLoRA
from edgepet.methods.hira import HiRA
from edgepet.methods.hta import HTA
from edgepet.methods.ia3 import IA3
from edgepet.methods.kadaptation import KAdaptation
from edgepet.methods.krona import KronA, LoKr
from edgepet.methods.lora import LoRA
from edgepet.methods.lora_mul import LoRAMul
from edgepet.methods.method import ActivationPath, Branching, Method, Recipe
from edgepet.methods.multi_scale_adapter import MultiScaleAdapter
from edgepet.methods.norm_tuning import NormTuning
from edgepet.methods.parallel_adapter import ParallelAdapter
from edgepet.methods.prefix import MAM, Prefix
from edgepet.methods.pro_tuning import ProTuning
from edgepet.methods.repadapter import RepAdapter
from edgepet.methods.rlrr import RLRR
from edgepet.methods.semantic_prompt import SemanticPrompt
from edgepet.methods.settings import configure
from edgepet.methods.ssf import SSF
from edgepet.methods.st_adapter import STAdapter
from edgepet.methods.table import METHODS
from edgepet.methods.uni_lora import UniLoRA
from edgepet.methods.vera import VeRA
from edgepet.methods.vpt import VPTDeep, VPTShallow

__all__ = [
    "ARC",
    "HTA",
    "IA3",
    "MAM",
    "METHODS",
    "RLRR",
    "SSF",
    "ActivationPath",
    "AdaptFormer",
    "Adapter",
    "BiLoRA",
    "BitFit",
    "Branching",
    "Consolidator",
    "ConvAdapter",
    "Convpass",
    "DoRA",
    "FacTTK",
    "FacTTT",
    "Full",
    "GLoRA",
    "HiRA",
    "Houlsby",
    "KAdaptation",
    "KronA",
    "LinearProbe",
    "LoKr",
    "LoRA",
    "LoRAMul",
    "Method",
    "MultiScaleAdapter",
    "NormTuning",
    "ParallelAdapter",
    "Prefix",
    "ProTuning",
    "Recipe",
    "RepAdapter",
    "STAdapter",
    "SemanticPrompt",
    "UniLoRA",
    "VPTDeep",
    "VPTShallow",
    "VeRA",
    "configure",
]
