"""Noise schedules, protocols of draws, and query ids."""

from guda_fast.diffusion.protocol import DrawTable, Protocol
from guda_fast.diffusion.query_id import NOISE_CONTRACT, query_id
from guda_fast.diffusion.schedule import Schedule

__all__ = ["NOISE_CONTRACT", "DrawTable", "Protocol", "Schedule", "query_id"]
