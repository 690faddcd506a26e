"""A report of an evaluation: one page that needs no network, figures and a table, all of the same numbers."""

from keepkv.evaluation.report.numbers import Report, arrange
from keepkv.evaluation.report.output import Written, write
from keepkv.evaluation.report.read import Evaluation, ReportError, read

__all__ = ["Evaluation", "Report", "ReportError", "Written", "arrange", "read", "write"]
