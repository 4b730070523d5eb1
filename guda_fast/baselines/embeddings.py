"""Features of images for `similarity`: of the diffusion UNet itself, of an image encoder, or of any callable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from guda_fast._json import read_object
from guda_fast._validate import check_int, check_tensor, describe
from guda_fast.baselines.gradients.noised import Draws
from guda_fast.diffusion import FlowSchedule, Schedule
from guda_fast.diffusion.conditions import map_tensors
from guda_fast.diffusion.flow import read_schedule

Embedder = Callable[[Tensor], Tensor]
"""Takes images [(B, C, H, W), float32, in [-1, 1]] and gives features [(B, F), floating point]."""

_PREPROCESSOR = "preprocessor_config.json"


def embed(images: Tensor, embedder: Embedder, *, batch_size: int = 64) -> Tensor:
    """Features of images, some at a time.

    images: [(N, C, H, W), float32, in [-1, 1], N >= 1]. embedder: see `Embedder`. batch_size: images at once [>= 1].

    Returns features [(N, F), float32, on the CPU]. Raises TypeError or ValueError where ``embedder`` gives something
    else than a row of finite numbers an image.

    >>> embed(torch.ones(3, 1, 2, 2), lambda images: images.flatten(1)).shape
    torch.Size([3, 4])
    """
    where = "embed"
    check_tensor(where, "images", images, shape=(None,) * 4, dtypes=(torch.float32,))
    check_int(where, "batch_size", batch_size, 1)
    parts = []
    with torch.no_grad():
        for some in images.split(batch_size):
            features = embedder(some)
            if not (isinstance(features, Tensor) and features.dim() == 2 and len(features) == len(some)):
                wanted = f"a tensor with a row for each of {len(some)} images"
                raise ValueError(f"{where}: embedder must give {wanted}, got {describe(features)}")
            if not bool(torch.isfinite(features).all()):
                raise ValueError(f"{where}: embedder must give finite features, got NaN or infinity")
            parts.append(features.float().cpu())
    return torch.cat(parts)


def unet_features(
    model: nn.Module,
    scheduler: Any,
    *,
    condition: Mapping[str, Any] | None = None,
    timestep: int | None = None,
    seed: int = 0,
) -> Embedder:
    """The middle block of the diffusion UNet itself, averaged over positions.

    The image is noised with the contract's noise of its content, so that its features depend on nothing else.

    model: has a ``mid_block``, as diffusers' UNets. scheduler: its schedule; see ``Protocol.from_scheduler``.
    condition: of a conditional model, the same for all images, so that features are of images alone: what its
        ``forward`` takes by name, as `Conditions.take` gives it [(1, ...) each; none].
    timestep: of the noise [a tenth of the schedule]. seed: of the noise.

    Raises ValueError for a model without a ``mid_block``, or a timestep outside of the schedule.
    """
    where = "unet_features"
    block = getattr(model, "mid_block", None)
    if not isinstance(block, nn.Module):
        raise ValueError(f"{where}: model must have a mid_block, got {type(model).__name__} without one")
    schedule = scheduler if isinstance(scheduler, Schedule | FlowSchedule) else read_schedule(scheduler)
    length = len(schedule)
    step = check_int(where, "timestep", length // 10 if timestep is None else timestep, 0, length - 1)
    like = next(model.parameters())
    draws = Draws(schedule, [step], seed, device=like.device, dtype=torch.float32)
    shared = condition or {}

    def features(images: Tensor) -> Tensor:
        x_t, _ = draws.noised(images)
        seen: list[Tensor] = []
        handle = block.register_forward_hook(lambda *given: seen.append(given[2]))
        try:
            given = map_tensors(lambda tensor: tensor.expand(len(images), *tensor.shape[1:]), shared)
            model(x_t[:, 0].to(like.dtype), draws.time.expand(len(images)), **given, return_dict=False)
        finally:
            handle.remove()
        return seen[0].flatten(2).mean(dim=2)

    return features


def transformers_encoder(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Embedder:
    """The image encoder of a ``transformers`` folder, such as CLIP, DINO or ViT.

    Of a model with text and images the projected image features, of others the first token of the last layer. Grey
    images become three equal channels; images are resized to the encoder's square, without a crop, and normalised as
    its preprocessor_config.json says. Nothing is downloaded, and no code of the folder is run.

    folder: has config.json, the weights and preprocessor_config.json

    Raises FileNotFoundError, ValueError naming the file; ImportError naming the extra without transformers.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError("encoders come with transformers: pip install 'guda_fast[sd]'") from error
    place = Path(folder)
    for name in ("config.json", _PREPROCESSOR):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place}: must be a transformers folder with {name}, found none")
    mean, std = _normalisation(place / _PREPROCESSOR)
    try:
        model = AutoModel.from_pretrained(place, local_files_only=True)
    except (SafetensorError, UnpicklingError, EOFError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{place}: must hold a model that transformers loads, found none ({reason})") from error
    model = model.to(device).eval()
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{place / 'config.json'}: must have an image_size, found {json.dumps(size)}")
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))

    def features(images: Tensor) -> Tensor:
        pixels = images.to(device).expand(-1, 3, -1, -1) / 2 + 0.5
        pixels = functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - shift) / scale
        if hasattr(model, "visual_projection"):
            projected: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            return projected
        first: Tensor = model(pixel_values=pixels).last_hidden_state[:, 0]
        return first

    return features


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation by channel."""
    given: Mapping[str, Any] = read_object(path)
    found = [given.get(name) for name in ("image_mean", "image_std")]
    for values in found:
        if not (
            isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values)
        ):
            raise ValueError(f"{path}: image_mean and image_std must be three numbers each, found {json.dumps(values)}")
    mean, std = found
    return mean, std  # type: ignore[return-value]
