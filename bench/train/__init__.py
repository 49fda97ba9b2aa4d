"""The end-to-end benchmark: ``python -m bench.train run``, then ``table``, ``plot`` and ``page``.

Importing this package does not import torch: OpenMP reads its environment when torch is loaded, and ``__main__`` sets
it first (:mod:`bench.ops.threads`).
"""
