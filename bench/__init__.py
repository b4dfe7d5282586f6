"""Benchmarks of collective_matmul and of models: accounting, predictions, measurements.

`python -m bench` lists the subcommands (`bench.commands`). The rooms:

    products, flops    FLOPs of what multiplies, and of a whole program, from its jaxpr
    work, mfu          model FLOPs and hardware FLOPs with their conventions; over time and peak
    predicted/         steps and products on TPUs that are not there, by the TPU compiler
    measured/          the same on devices that are, by a clock
    suites/            the pytest-benchmark suites of the measurements
    record, results/   what a result says about itself: predicted or measured, on what, when
    report             the page of all results;  tables, plots, predicted_tables: what it draws
    commands/          one file, one subcommand

Neither the library nor the models import any of this.
"""
