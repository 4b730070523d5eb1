"""What flow-matching networks take as their timestep, and which of them no `FlowSchedule` describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from guda_fast.diffusion.flow import FlowSchedule, steps_of

# As the pipelines of diffusers 0.42 call them: T s, times the network's own timestep_scale if it has one; or s itself.
_TAKES_STEPS = ("SD3Transformer2DModel", "SanaTransformer2DModel", "HunyuanImageTransformer2DModel")
_TAKES_LEVEL = ("AuraFlowTransformer2DModel",)

_REVERSED = "predicts x0 - eps at 1 - s"
_TOKENS = "takes latents as a sequence of tokens"
_UNSHIFTED = "takes its timestep from before the scheduler's shift"
_OTHERS = {
    "HiDreamImageTransformer2DModel": "predicts x0 - eps",
    "Ideogram4Transformer2DModel": _REVERSED,
    "Lumina2Transformer2DModel": _REVERSED,
    "LuminaNextDiT2DModel": _REVERSED,
    "OmniGenTransformer2DModel": _REVERSED,
    "ZImageTransformer2DModel": _REVERSED,
    "CogView4Transformer2DModel": _UNSHIFTED,
    "GlmImageTransformer2DModel": _UNSHIFTED,
    "BriaFibo2Transformer2DModel": _TOKENS,
    "BriaFiboTransformer2DModel": _TOKENS,
    "BriaTransformer2DModel": _TOKENS,
    "ChromaTransformer2DModel": _TOKENS,
    "Flux2Transformer2DModel": _TOKENS,
    "FluxTransformer2DModel": _TOKENS,
    "Krea2Transformer2DModel": _TOKENS,
    "LongCatImageTransformer2DModel": _TOKENS,
    "NucleusMoEImageTransformer2DModel": _TOKENS,
    "OvisImageTransformer2DModel": _TOKENS,
    "QwenImage21Transformer2DModel": _TOKENS,
    "QwenImageTransformer2DModel": _TOKENS,
}
_KNOWN = {*_TAKES_STEPS, *_TAKES_LEVEL, *_OTHERS}


def check_network(model: nn.Module, schedule: FlowSchedule, scheduler: Mapping[str, Any] | None) -> None:
    """Raise ValueError where a network would not see the schedule's s, or does not predict eps - x0.

    scheduler: the configuration that the network came with. A network of an unknown class is taken where the schedule's
    timestep_scale was given.
    """
    kind = next((parent.__name__ for parent in type(model).__mro__ if parent.__name__ in _KNOWN), None)
    if kind in _OTHERS:
        raise ValueError(
            "attribute: bank must hold a model that takes latents (N, C, H, W) at s and predicts eps - x0, got "
            f"{kind}, which {_OTHERS[kind]}"
        )
    where, found = "attribute: protocol must have a FlowSchedule with timestep_scale", schedule.timestep_scale
    if kind is None:
        if found is None:
            raise ValueError(
                f"{where} for {type(model).__name__}, which is unknown, got none; if it predicts eps - x0, pass "
                "FlowSchedule.from_scheduler(scheduler, timestep_scale=...): 1 where it takes s, "
                f"{schedule.model_scale:g} where it takes {schedule.model_scale:g} s"
            )
        return
    wanted = 1.0
    if kind in _TAKES_STEPS:
        own = getattr(getattr(model, "config", None), "timestep_scale", 1.0)
        wanted = own * (steps_of(schedule.config) if scheduler is None else steps_of(scheduler))
        if scheduler is None and not schedule.config and found is not None:
            return  # nothing else says how many steps it was trained with
    if schedule.model_scale != wanted:
        raise ValueError(f"{where}={wanted:g} for {kind}, got {schedule.model_scale:g}")
