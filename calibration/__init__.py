"""Where precision will be decided, once, on the ONNX graph: fp16 and int8 passes (ADR-0004). fp32 needs none."""
