"""The op-level benchmark: ``python -m bench.ops run``, then ``table``, ``plot``, ``compare``, ``readme``, ``goals``.

Importing this package does not import torch: OpenMP reads its environment when torch is loaded, and ``__main__`` sets
it first (:mod:`bench.ops.threads`).
"""
