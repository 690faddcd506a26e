"""What a method costs and is worth on a machine: speed, energy and quality of the same requests (arXiv 2508.16712).

``grid`` says what is measured, ``workload`` makes the requests and when they arrive, ``drive`` sends them and takes the
time, ``record`` writes rows and computes what they say, ``analyse`` compares and recommends.
"""

from typing import TYPE_CHECKING

from keepkv.core.lazy import lazily

if TYPE_CHECKING:
    from keepkv.characterize.analyse.pareto import pareto
    from keepkv.characterize.analyse.recommend import recommend
    from keepkv.characterize.drive.run import characterize
    from keepkv.characterize.grid.levels import Application, Hardware, Point, Technique, Workload
    from keepkv.characterize.grid.read import Grid, read_grid
    from keepkv.characterize.record.summary import summarise

__all__ = [
    "Application", "Grid", "Hardware", "Point", "Technique", "Workload", "characterize", "pareto", "read_grid",
    "recommend", "summarise",
]  # fmt: skip

lazily(
    __name__,
    {
        "Application": "grid.levels", "Hardware": "grid.levels", "Point": "grid.levels", "Technique": "grid.levels",
        "Workload": "grid.levels", "Grid": "grid.read", "read_grid": "grid.read", "characterize": "drive.run",
        "summarise": "record.summary", "pareto": "analyse.pareto", "recommend": "analyse.recommend",
    },
)  # fmt: skip
