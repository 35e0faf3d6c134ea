"""``python -m edgepet``, as ``accelerate launch -m edgepet train ...`` starts it."""

import sys

from edgepet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
