"""The graph as precision passes want it: constants are initializers, batch norms are parts of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from edgepet.calibration.writer import copied

if TYPE_CHECKING:
    from onnx import ModelProto

_Ir: TypeAlias = Any  # onnx_ir.Model, as onnxscript hands it on without types


def folded(model: ModelProto) -> ModelProto:
    """A copy of ``model``: constants are initializers, a batch norm behind a convolution is part of it."""
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    return _rewritten(model, fuse_batchnorm_into_conv_rule.apply_to_model)


def lifted(model: ModelProto) -> ModelProto:
    """A copy of ``model``: constants are initializers; values that lie in other files are not read."""
    return _rewritten(model, lambda graph: None)


def _rewritten(model: ModelProto, rule: Callable[[_Ir], object]) -> ModelProto:
    from onnxscript import ir

    graph = ir.from_proto(copied(model))  # onnx-ir gives the constants that it lifts their new names in the proto
    rule(graph)
    ir.passes.Sequential(
        ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir.passes.common.RemoveUnusedNodesPass(),
    )(graph)
    made: ModelProto = ir.to_proto(graph)
    return made
