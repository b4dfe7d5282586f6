"""Measurements: medians and spreads by a clock, on the devices that this machine has.

timing             the clock: warm-up, rounds, median, spread
bounds             the least that an operation can take: its products, or its links
gpu, gpu_cases     blocks and models on one GPU;  torch_peer: PyTorch's beside them
sockets            overlap over a slow link between two processes;  sockets_worker: one of them
"""
