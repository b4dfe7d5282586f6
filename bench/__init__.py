"""Benchmarks of collective_matmul and of models: FLOPs and MFU, predictions, measurements.

`python -m bench` lists the subcommands (`bench.commands`). From the ground up:

    products      FLOPs of the primitives that multiply
    flops         FLOPs of a whole program, from its jaxpr
    work, mfu     model FLOPs and hardware FLOPs with their conventions; FLOPs over time and peak
    record        what every result says about itself: predicted or measured, on what, when
    slices        TPUs that are not there, to compile for
    programs      a model's real training step;  operations: single collective products
    compiling     what the compiler answers, out of memory included
    prediction    a program's predicted time, from its schedule
    baselines     the ways to partition a step;  comparison: all of them in a table
    figures       pictures of predictions
    calibration   how far predictions are from published measurements
    timing        measurements on the devices of this machine

Neither the library nor the models import any of this.
"""
