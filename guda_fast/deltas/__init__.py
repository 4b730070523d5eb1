"""The delta bank: a base model and what each counterfactual changes in it."""

from guda_fast.deltas.bank import DeltaBank
from guda_fast.deltas.delta import Delta, Dense, LowRank, Part
from guda_fast.deltas.pack import Pack, PackedGroup
from guda_fast.deltas.pack_writer import append_pack, build_pack
from guda_fast.deltas.sources import Source
from guda_fast.deltas.survey import Survey

__all__ = [
    "Delta",
    "DeltaBank",
    "Dense",
    "LowRank",
    "Pack",
    "PackedGroup",
    "Part",
    "Source",
    "Survey",
    "append_pack",
    "build_pack",
]
