"""``edgepet.imaging`` of before: its names are in ``edgepet.images.preprocess``."""

import warnings

from edgepet.images.preprocess import load_clip as load_clip
from edgepet.images.preprocess import load_input as load_input
from edgepet.images.preprocess import load_pixels as load_pixels
from edgepet.images.preprocess import normalize as normalize
from edgepet.images.preprocess import to_pixels as to_pixels

warnings.warn("edgepet.imaging is edgepet.images.preprocess now", DeprecationWarning, stacklevel=2)
