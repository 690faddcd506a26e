"""A report of an evaluation: one page that needs no network, figures and a table, all of the same numbers."""

from keepkv.report.join import join
from keepkv.report.numbers import Report, arrange
from keepkv.report.output import Written, steps, write
from keepkv.report.read import Evaluation, ReportError, read

__all__ = ["Evaluation", "Report", "ReportError", "Written", "arrange", "join", "read", "steps", "write"]
