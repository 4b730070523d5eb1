"""The scores of all cells, how sure they are, and their way into files and tables."""

from guda_fast.results.attribution import ESTIMATE_KIND, Attribution, RankedGroup
from guda_fast.results.files import COLUMNS, CONTROLS, P_VALUE, RACE_CONFIDENCE, RECORD, SCORES, WIDE

__all__ = [
    "COLUMNS",
    "CONTROLS",
    "ESTIMATE_KIND",
    "P_VALUE",
    "RACE_CONFIDENCE",
    "RECORD",
    "SCORES",
    "WIDE",
    "Attribution",
    "RankedGroup",
]
