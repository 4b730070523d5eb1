"""Original Stable Diffusion checkpoints: the UNet's tensors by the names of diffusers' own conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from guda_fast.deltas.weights import Entry, Weights
from guda_fast.errors import CheckpointError

_UNET = "model.diffusion_model."
_AVERAGE = "model_ema."
_TEXT = ("cond_stage_model.", "conditioner.", "embed")
_IGNORED = (
    *(_UNET, _AVERAGE, "model_ema_", "first_stage_model.", "denoiser.", "scale_factor", "logvar", "lvlb_weights"),
    *("betas", "alphas_", "sqrt_", "log_one_", "posterior_"),
)
_CLASS = "UNet2DConditionModel"


def is_compvis(weights: Weights) -> bool:
    """Whether there are keys of an original Stable Diffusion UNet."""
    return any(name.startswith(_UNET) for name in weights.entries)


def converted(weights: Weights, config: Mapping[str, Any] | None, names: int, *, average: bool) -> Weights:
    """The UNet of an original checkpoint by diffusers' names; whole, or some of its parameters.

    diffusers' conversion renames and copies nothing, so no value is read for it. Of a whole checkpoint it leaves out
    the VAE, the text encoder and the noise schedule, and so does this; a file with only some of the UNet's parameters
    names what its training changed, and a text encoder in it is refused.

    weights: as the file has them
    config: the base's complete configuration, by which diffusers numbers the blocks
    names: the number of tensors in the base; a file with at most half of them is a part
    average: take the moving average (``model_ema.*``) and not the weights themselves
    Raises: CheckpointError where the base is no UNet of Stable Diffusion, and for keys that the conversion ignores
    """
    if config is None or config.get("_class_name") != _CLASS:
        found = None if config is None else config.get("_class_name")
        raise CheckpointError(
            f"{weights.origin}: an original Stable Diffusion checkpoint, for which the base must be a {_CLASS} of "
            f"diffusers, found {found or 'a module without a configuration'}"
        )
    unet = _unet(weights, average=average)
    if len(unet) > 2 * names:
        raise CheckpointError(f"{weights.origin}: must have the base's {names} keys in {_UNET}*, found {len(unet)}")
    complete = 2 * len(unet) > names
    _check_others(weights, complete=complete)
    entries, left = _renamed(unet, config, weights.origin)
    if left:
        raise CheckpointError(f"{weights.origin}: key {_UNET + left[0]!r} is not one that diffusers' conversion knows")
    return replace(weights, entries=entries, complete=complete)


def _unet(weights: Weights, *, average: bool) -> dict[str, Entry]:
    """The UNet's tensors by the names inside of it."""
    names = [name for name in weights.entries if name.startswith(_UNET)]
    if not average:
        return {name.removeprefix(_UNET): weights.entries[name] for name in names}
    found = {}
    for name in names:
        # Lightning's moving average has the same keys without their dots, and without "model." in front.
        key = _AVERAGE + name.removeprefix("model.").replace(".", "")
        if key not in weights.entries:
            raise CheckpointError(f"{weights.origin}: key {key!r} is missing, which has the moving average of {name!r}")
        found[name.removeprefix(_UNET)] = weights.entries[key]
    return found


def _check_others(weights: Weights, *, complete: bool) -> None:
    for name in weights.entries:
        if name.startswith(_TEXT) and not complete:
            raise CheckpointError(
                f"{weights.origin}: key {name!r} changes the text encoder, which the base does not hold; pass the "
                "UNet's parameters alone if the text encoder stays as it was"
            )
        if not name.startswith(_TEXT + _IGNORED):
            raise CheckpointError(f"{weights.origin}: key {name!r} is not one of an original Stable Diffusion model")


def _renamed(unet: Mapping[str, Entry], config: Mapping[str, Any], origin: str) -> tuple[dict[str, Entry], list[str]]:
    """The tensors by diffusers' names, and which of them got none."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    given: dict[str, Entry | None] = {_UNET + name: entry for name, entry in unet.items()}
    try:
        # The conversion counts the blocks that it sees; of a part it must see them all to number them rightly.
        for block in range(len(config["block_out_channels"]) * (config["layers_per_block"] + 1)):
            given[f"{_UNET}input_blocks.{block}.none"] = given[f"{_UNET}output_blocks.{block}.none"] = None
        for block in range(3):
            given[f"{_UNET}middle_block.{block}.none"] = None
        found: dict[str, Entry | None] = convert_ldm_unet_checkpoint(given, config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{origin}: diffusers cannot convert this checkpoint to the base's configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    entries = {name: entry for name, entry in found.items() if entry is not None}
    used = {id(entry) for entry in entries.values()}
    return entries, [name for name, entry in unet.items() if id(entry) not in used]
