"""Selections, one file per idea: which older slots a decoded token attends to.

Importing this package registers them all.
"""

from keepkv.select import exact, low_rank, pages  # noqa: F401
from keepkv.select.base import SELECTIONS, Asked, Select, always, choose, make_select, register_select

__all__ = ["SELECTIONS", "Asked", "Select", "always", "choose", "make_select", "register_select"]
