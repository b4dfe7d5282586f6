"""The QK-norm experiment: training diverges without norms on queries and keys, and not with them.

`sweep` trains, `figure` draws, and `python -m models.stability` does both.
"""
