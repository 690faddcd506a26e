"""The report of a characterisation, and of the studies made of one: tables and figures of the same rows, on one page
that fetches nothing, and as Markdown."""

from keepkv.report.characterization.output import Pages, write_pages
from keepkv.report.characterization.run import run_pages
from keepkv.report.characterization.studies import capacity_pages, recommended, schedule_pages, search_pages

__all__ = [
    "Pages", "capacity_pages", "recommended", "run_pages", "schedule_pages", "search_pages", "write_pages",
]  # fmt: skip
