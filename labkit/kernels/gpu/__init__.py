"""Kernels for NVIDIA GPUs in Triton, one idea per file. Nothing here is imported before it is used, because Triton
comes with torch's builds for GPUs and with no other.

Each kernel has a set of block sizes, beside it as a constant, that was the fastest of those tried on an H100. What the
compiler makes of them on other chips, registers and shared memory, is read by ``compiled``; there they are not timed.
"""
