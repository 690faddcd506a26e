"""How a measurement is taken and written down: meters, what it was made with, intervals, rows, ledgers."""

from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate, Percentiles, bootstrap, share, wilson
from keepkv.measure.ledger import Ledger
from keepkv.measure.meters import Energy, Peak, Time
from keepkv.measure.rows import Row, RowError, method_label

__all__ = [
    "Energy", "Estimate", "Ledger", "MadeWith", "Peak", "Percentiles", "Row", "RowError", "Time", "bootstrap",
    "method_label", "share", "wilson",
]  # fmt: skip
