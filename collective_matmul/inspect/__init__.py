"""Reading any compiled JAX program: what it overlaps, predicted from its schedule.

`overlap_report(compiled)` parses the scheduled HLO text (`hlo`), finds its loops, products and
collectives (`trips`, `dots`, `collectives`), places its devices on their network (`network`), and
runs the schedule of one device (`simulate`). Nothing is executed, and no time is measured.
"""

from collective_matmul.inspect.overlap import overlap_report
from collective_matmul.inspect.reconcile import ReconciliationError
from collective_matmul.inspect.report import OverlapReport

__all__ = ["overlap_report", "OverlapReport", "ReconciliationError"]
