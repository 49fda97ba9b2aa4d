"""What needs Triton's emulated driver is collected where it is there: under ``pytest -p ptx.plugin``."""

from __future__ import annotations

import sys

collect_ignore = [] if "ptx.plugin" in sys.modules else ["test_triton_faults.py"]
