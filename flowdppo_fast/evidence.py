"""Which GPU backends have passed the GPU tests, and where; written by ``python -m bench.ops evidence DIR...``.

A backend is in :data:`PASSED` if the result folders named beside it hold a run of ``pytest -m gpu`` in which it passed
everything, skipped nothing and failed nothing. The first of :data:`ORDER` that can run is what ``auto`` takes for CUDA
tensors: backends that passed, the faster first, then ``triton``.
"""

from __future__ import annotations

PASSED: dict[str, tuple[str, ...]] = {}
ORDER: tuple[str, ...] = ("triton",)
