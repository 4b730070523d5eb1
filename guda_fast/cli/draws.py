"""The protocol's draws where nothing is said: one for all commands, as scores compare within one protocol only."""

from __future__ import annotations

START, STRIDE, SEED = 10, 10, 42
