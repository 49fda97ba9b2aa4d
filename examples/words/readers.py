"""The two readers: PP-OCRv6, which training rewards, and PP-OCRv4, which has no part in it."""

from __future__ import annotations

from pathlib import Path

from flowdppo_fast.trainer.rewards import OCRReward

ROOT = Path(__file__).resolve().parents[2]
SECOND = ROOT / "build" / "readers" / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_rec_infer.onnx"
FIRST_NAME, SECOND_NAME = "PP-OCRv6", "PP-OCRv4"


def first_reader(threads: int = 1) -> OCRReward:
    """The reader of the reward. One page is one line, and more letters than asked are a fault."""
    return OCRReward("both", lines="one", anywhere=False, threads=threads)


def second_reader(threads: int = 1) -> OCRReward:
    """The reader that only watches.

    Raises:
        SystemExit: its file is not there.
    """
    if not SECOND.is_file():
        raise SystemExit(
            f"{SECOND.relative_to(ROOT)} is missing, expected the second reader: make build, or "
            "pip install --no-deps --target build/readers rapidocr-onnxruntime==1.4.4"
        )
    return OCRReward("both", lines="one", anywhere=False, recogniser=SECOND, threads=threads)
