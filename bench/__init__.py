"""Benchmarks of collective_matmul and of models: today the accounting, FLOPs and MFU.

    products    FLOPs of the primitives that multiply
    flops       FLOPs of a whole program, from its jaxpr
    work        model FLOPs and hardware FLOPs, with their conventions
    mfu         FLOPs over time, devices and peak

Timing and compile-only prediction are not here yet. Neither the library nor the models import any
of this.
"""
