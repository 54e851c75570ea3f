"""Kernels for NVIDIA GPUs in Triton, one idea per file. Nothing here is imported before it is used, because Triton
comes with torch's builds for GPUs and with no other.

Each kernel has its block sizes beside it as constants. Those of products and attention were tried out on an H100. What
the compiler makes of them on other chips, registers and shared memory, ``compiled`` reads; there they are not timed.
"""
