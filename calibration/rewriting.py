"""The graph as precision passes want it: constants are initializers, batch norms are parts of convolutions."""

from __future__ import annotations

from typing import Any


def folded(model: Any) -> Any:
    """A copy of an ``onnx.ModelProto``: constants are initializers, a batch norm behind a convolution is part of it."""
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    return _rewritten(model, fuse_batchnorm_into_conv_rule.apply_to_model)


def lifted(model: Any) -> Any:
    """A copy of an ``onnx.ModelProto``: constants are initializers; values that lie in other files are not read."""
    return _rewritten(model, lambda graph: None)


def _rewritten(model: Any, rule: Any) -> Any:
    from onnxscript import ir

    copied = type(model)()
    copied.CopyFrom(model)  # onnx-ir gives the constants that it lifts their new names in the proto itself
    graph = ir.from_proto(copied)
    rule(graph)
    ir.passes.Sequential(
        ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir.passes.common.RemoveUnusedNodesPass(),
    )(graph)
    return ir.to_proto(graph)
