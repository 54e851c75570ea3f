"""Kernels for NVIDIA GPUs in Triton, one idea per file. Nothing here is imported before it is used, because Triton
comes with torch's builds for GPUs and with no other.

Each kernel has one set of block sizes, beside it as a constant. They were chosen from what ``compiled`` reads off the
compiled code, registers and shared memory, and have not been timed on a GPU.
"""
