"""``edgepet.int8`` of before: its names are in ``edgepet.graphs.int8``."""

import warnings

from edgepet.graphs.int8 import Int8Graph as Int8Graph
from edgepet.graphs.int8 import open_int8 as open_int8

warnings.warn("edgepet.int8 is edgepet.graphs.int8 now", DeprecationWarning, stacklevel=2)
