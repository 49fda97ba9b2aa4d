"""Seeds without state."""

from __future__ import annotations

import hashlib
from typing import Any


def derive_seed(*keys: Any) -> int:
    """A 63-bit seed that is a function of ``keys``; what is drawn from it needs no state in a checkpoint."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1
