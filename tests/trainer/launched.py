"""A run as ``accelerate launch`` starts it; see ``test_distributed.py``: folder, settings, a fate."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

# as pytest does for the tests of this folder
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main(folder: str, sections: str, *fate: str) -> None:
    import torch
    from distributed_runs import killed, train

    torch.set_num_threads(1)

    # what was registered before the trainer's own runs after it
    @atexit.register
    def note_the_group() -> None:
        Path(folder, f"group-{os.environ['RANK']}").write_text(str(torch.distributed.is_initialized()))

    (killed if fate else train)(folder, json.loads(sections), reward="two")


if __name__ == "__main__":
    main(*sys.argv[1:])
