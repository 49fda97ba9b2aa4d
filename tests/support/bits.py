"""What a test that asks for equal bits lets differ between its two sides; all else is the same.

All else: processor, instruction sets, versions of the libraries, number of threads, dtypes, and the shapes of all
matrix products. Fresh tensors are aligned to 64 bytes, in every process. Under these torch, MKL and oneDNN give the
same bits. ``threads``, ``rows`` and ``layout`` are only asked of the project's own kernels and of torch's elementwise
operations, never of a network: its matrix products may round otherwise. What a network gives in another batch is held
to a bound that is derived from roundings.
"""

from __future__ import annotations

ACROSS = {
    "again": "nothing: the same computation once more in this process",
    "process": "another process, or one that continued from files",
    "threads": "the number of threads",
    "rows": "the other rows of the batch, and the place of a row in it",
    "layout": "strides and alignment of the inputs",
}
