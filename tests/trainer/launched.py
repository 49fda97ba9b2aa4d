"""A run as ``accelerate launch`` starts it; see ``test_distributed.py``: folder, settings, a fate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# as pytest does for the tests of this folder
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main(folder: str, sections: str, *fate: str) -> None:
    import torch
    from distributed_runs import killed, train

    torch.set_num_threads(1)
    (killed if fate else train)(folder, json.loads(sections), reward="two")


if __name__ == "__main__":
    main(*sys.argv[1:])
