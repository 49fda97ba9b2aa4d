"""Compiled kernels run without a GPU: PTX on an emulator, launched through Triton's and CUDA's own host code."""
