"""Predictions: what the TPU compiler makes of a program, and what its schedule would take.

From the ground up:

    slices             TPUs that are not there, to compile for
    programs           a model's real training step;  operations: single collective products
    compiling          what the compiler answers, out of memory included
    prediction         a program's predicted time, from its schedule
    baselines          the ways to partition a step;  comparison: all of them in a table
    figures            pictures of predictions
    windows            what stands beside each hop of a schedule
    regression         predictions that are written down, and what changed
    points             what others measured;  reproductions: their programs
    calibration        how far predictions are from these points
"""
