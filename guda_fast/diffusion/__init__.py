"""Noise schedules, protocols of draws, noise from elsewhere, and query ids."""

from guda_fast.diffusion.flow import FlowSchedule
from guda_fast.diffusion.noise import GivenNoise, NoiseSource, SeededNoise
from guda_fast.diffusion.protocol import DrawTable, Protocol
from guda_fast.diffusion.query_id import NOISE_CONTRACT, query_id
from guda_fast.diffusion.schedule import Schedule

__all__ = [
    "NOISE_CONTRACT",
    "DrawTable",
    "FlowSchedule",
    "GivenNoise",
    "NoiseSource",
    "Protocol",
    "Schedule",
    "SeededNoise",
    "query_id",
]
