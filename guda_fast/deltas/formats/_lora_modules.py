"""The base's modules, by the names that LoRA files give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

from guda_fast.deltas.weights import wrapper

KOHYA_PREFIX = "lora_unet_"
# Each is removed where all names of a file start with it, and more are the base's without it.
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "unet.", "transformer.")
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


class Modules:
    """The modules with a weight.

    names: the base's parameters with their shapes
    """

    def __init__(self, names: Mapping[str, tuple[int, ...]]) -> None:
        weights = {name: shape for name, shape in names.items() if name.endswith(".weight")}
        self.shapes = {name.removesuffix(".weight"): shape for name, shape in weights.items()}

    def candidates(self, module: str) -> Collection[str]:
        """The modules that a name in a file may mean: none, one, or, of a name that kohya's scripts wrote, several.

        Those replace each dot by an underscore, in diffusers' names, or for SDXL in those of Stable Diffusion's own
        code.
        """
        if module.startswith(KOHYA_PREFIX):
            return self._flat.get(module.removeprefix(KOHYA_PREFIX), ())
        # Diffusers until 0.21 kept its factors in attention processors, and called the output projection to_out.
        module = module.replace(".processor.", ".")
        names = (module, f"{module}.0") if module.endswith("to_out") else (module,)
        return [name for name in names if name in self.shapes]

    @cached_property
    def _flat(self) -> dict[str, set[str]]:
        flat: dict[str, set[str]] = {}
        for module in self.shapes:
            flat.setdefault(module.replace(".", "_"), set()).add(module)
        for module, original in _original_names(self.shapes):
            flat.setdefault(original.replace(".", "_"), set()).add(module)
        return flat


def without_wrappers(keys: Collection[str], fits: Callable[[str], bool]) -> dict[str, str]:
    """Each key without the prefixes that say where the model was when its LoRA was saved.

    fits: whether a key without them is one that the base has a place for
    """
    start = len(wrapper(keys, _WRAPPERS, fits))
    return {key: key[start:] for key in keys}


def _original_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """The modules of a UNet2DConditionModel with their names in Stable Diffusion's own code."""
    blocks = [match for module in modules if (match := _BLOCK.fullmatch(module))]
    starts = _starts(blocks)
    attended = {(match[1], match[2]) for match in blocks if match[3] == "attentions"}
    for module in modules:
        if module in _OUTSIDE:
            yield module, _OUTSIDE[module]
        elif match := _MIDDLE.fullmatch(module):
            part, number, rest = match.groups()
            place = 1 if part == "attentions" else 2 * int(number)
            yield module, f"middle_block.{place}.{_IN_RESNETS.get(rest, rest)}"
        elif match := _BLOCK.fullmatch(module):
            side, block, part, number, rest = match.groups()
            first, count = starts[side, int(block)]
            if part == "downsamplers":
                yield module, f"input_blocks.{first + count}.0.op"
            elif part == "upsamplers":
                place = 2 if (side, block) in attended else 1
                yield module, f"output_blocks.{first + count - 1}.{place}.{rest}"
            else:
                where = "input_blocks" if side == "down_blocks" else "output_blocks"
                place = 1 if part == "attentions" else 0
                yield module, f"{where}.{first + int(number)}.{place}.{_IN_RESNETS.get(rest, rest)}"


def _starts(blocks: Collection[re.Match[str]]) -> dict[tuple[str, int], tuple[int, int]]:
    """Of each block, the original number of its first layer, and how many layers it has."""
    layers: dict[tuple[str, int], int] = {}
    for match in blocks:
        key = match[1], int(match[2])
        layers[key] = max(layers.get(key, 0), int(match[4]) + 1)
    starts, following = {}, {"down_blocks": 1, "up_blocks": 0}
    for side, block in sorted(layers):
        starts[side, block] = following[side], layers[side, block]
        # The original counts a downsampler as a layer of its own.
        following[side] += layers[side, block] + (side == "down_blocks")
    return starts
