"""``edgepet.store`` of before: its names are in ``edgepet.device.store``."""

import warnings

from edgepet.device.store import Store as Store

warnings.warn("edgepet.store is edgepet.device.store now", DeprecationWarning, stacklevel=2)
