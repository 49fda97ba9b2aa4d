"""A run as ``accelerate launch`` starts it; see ``test_distributed.py``: folder, settings, a fate."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

# as pytest does for the tests of this folder
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def main(folder: str, sections: str, *fate: str) -> None:
    import torch
    from distributed_runs import make_trainer, train

    torch.set_num_threads(1)
    values = json.loads(sections)
    if not fate:
        train(folder, values, reward="two")
        return
    trainer = make_trainer(folder, values, reward="two")
    update = trainer.update

    def die(*args, **kwargs):
        if trainer.iteration == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args, **kwargs)

    trainer.update = die  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
