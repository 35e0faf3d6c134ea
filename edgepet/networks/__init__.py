"""Backbones in torch: their layers, and what a task puts into them."""

import os

# Large tensors lie in huge pages of Linux: without them up to half of a ConvNet's time goes into zeroing small ones.
# torch reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
