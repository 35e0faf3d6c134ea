"""``edgepet.graph`` of before: its names are in ``edgepet.graphs.base``."""

import warnings

from edgepet.graphs.base import BaseGraph as BaseGraph
from edgepet.graphs.base import graph_folder as graph_folder
from edgepet.graphs.base import open_graph as open_graph

warnings.warn("edgepet.graph is edgepet.graphs.base now", DeprecationWarning, stacklevel=2)
