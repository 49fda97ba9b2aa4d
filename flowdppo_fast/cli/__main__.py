"""``python -m flowdppo_fast.cli``, which is also what ``accelerate launch --module`` starts."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
