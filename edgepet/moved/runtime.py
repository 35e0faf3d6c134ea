"""``edgepet.runtime`` of before: its names are in ``edgepet.device.runtime``."""

import warnings

from edgepet.device.answers import Answer as Answer
from edgepet.device.runtime import SharedInt8 as SharedInt8
from edgepet.device.runtime import TaskNetwork as TaskNetwork
from edgepet.device.runtime import open_task as open_task
from edgepet.device.serving import Device as Device
from edgepet.device.serving import DeviceRun as DeviceRun

warnings.warn("edgepet.runtime is edgepet.device.runtime now", DeprecationWarning, stacklevel=2)
