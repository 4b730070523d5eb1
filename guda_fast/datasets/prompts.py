"""Prompts: what a model sees of them, by the text encoders of a pipeline."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guda_fast._json import read_object
from guda_fast._memory import free_bytes
from guda_fast._validate import check_int, describe
from guda_fast.datasets.encoders import component, frozen, networks_hash
from guda_fast.diffusion.conditions import Conditions, flat, map_tensors

_PLAIN, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_FAMILIES = {
    (_PLAIN,): "Stable Diffusion",
    (_PLAIN, _PROJECTED): "Stable Diffusion XL",
    (_PROJECTED, _PROJECTED, _T5): "Stable Diffusion 3",
}
_T5_TOKENS = 256  # of Stable Diffusion 3's pipeline


@dataclass(frozen=True, eq=False)
class _Encoder:
    """A text encoder with its tokenizer. tokens: that every prompt is padded or cut to."""

    model: nn.Module
    tokenizer: Any
    tokens: int

    def tokenized(self, prompt: str) -> Any:
        """What the encoder sees of a prompt."""
        return self.tokenizer(
            prompt, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )

    def __call__(self, prompt: str) -> Any:
        padded = self.tokenized(prompt)
        device = next(self.model.parameters()).device
        config: Any = self.model.config
        mask = padded.attention_mask.to(device) if getattr(config, "use_attention_mask", False) else None
        return self.model(padded.input_ids.to(device), attention_mask=mask, output_hidden_states=True)

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than it takes."""
        return len(self.tokenizer(prompt, padding=False, truncation=False).input_ids) > self.tokens


class TextEncoder:
    """Makes `Conditions` of prompts, as the pipeline that it belongs to does without guidance.

    Each distinct prompt is embedded once and by itself in float32, and is what enters the ids of its queries.
    Known are the text encoders of Stable Diffusion 1 and 2 (``encoder_hidden_states``), of XL (also
    ``added_cond_kwargs``) and of 3 with its T5 (also ``pooled_projections``). For another pipeline pass what its
    ``encode_prompt`` gives to ``attribute``, by the names of the model's arguments.

    folder: of a pipeline that diffusers saved; or a CLIPTextModel, which needs ``tokenizer``
    tokenizer: of a text encoder in memory [a tokenizer of transformers]
    device: of encoders that are loaded [CUDA where there is one]

    Raises TypeError or ValueError naming the argument, FileNotFoundError where the folder has no text encoder,
    ImportError naming the extra without transformers.

    >>> text = gf.TextEncoder("sd15")  # doctest: +SKIP
    >>> gf.attribute(images, bank, protocol, conditions=text(prompts), latents=gf.Latents("sd15"))  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(folder, nn.Module):
            if tokenizer is None:
                raise TypeError("TextEncoder: tokenizer must be given with a text encoder in memory, got None")
            self._encoders = [_Encoder(folder, tokenizer, _most_tokens(folder, tokenizer))]
        elif tokenizer is not None:
            raise TypeError("TextEncoder: tokenizer must be None where folder is a path, which holds it")
        else:
            self._encoders = _load(Path(folder), device)
        kinds = tuple(type(encoder.model).__name__ for encoder in self._encoders)
        if kinds not in _FAMILIES:
            raise ValueError(
                f"TextEncoder: folder must hold the text encoders of one of {', '.join(_FAMILIES.values())}, got "
                f"{' and '.join(kinds)}; pass the tensors of the pipeline's encode_prompt to attribute instead"
            )
        self.family = _FAMILIES[kinds]

    @property
    def takes_size(self) -> bool:
        """Whether prompts come with the size of the images."""
        return self.family == "Stable Diffusion XL"

    def __call__(self, prompts: Sequence[str], *, size: int | tuple[int, int] | None = None) -> Conditions:
        """The conditions of queries with these prompts.

        prompts: one a query [N]; what exceeds an encoder's tokens is cut, with a warning
        size: height and width of the images in pixels, which Stable Diffusion XL is told [it alone needs it]
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"TextEncoder: prompts must be a sequence of strings, got {describe(prompts)}")
        if not prompts:
            raise ValueError("TextEncoder: prompts must hold at least one, got none")
        if (size is None) == self.takes_size:
            raise ValueError(
                "TextEncoder: size must be given for Stable Diffusion XL and for it alone, got "
                f"{size} for {self.family}"
            )
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        sides = tuple(check_int("TextEncoder", "size", side, 1) for side in sides)
        distinct = list(dict.fromkeys(prompts))
        self._warn(distinct)
        number = {prompt: row for row, prompt in enumerate(distinct)}
        row = torch.tensor([number[prompt] for prompt in prompts], dtype=torch.int64)
        tensors = _joined((self._embedded(prompt, sides) for prompt in distinct), len(distinct))
        source: dict[str, Any] = {"text_encoder": self._hash, "tokens": self._tokens_hash(prompts)}
        if sides:
            source["size"] = list(sides)
        return Conditions(tensors, row, tuple(distinct), source)

    @cached_property
    def _hash(self) -> str:
        return networks_hash(*(encoder.model for encoder in self._encoders))

    def _tokens_hash(self, prompts: Sequence[str]) -> str:
        """Over all that tokenizers make of the prompts, whatever their vocabulary and rules."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in prompts:
            for encoder in self._encoders:
                padded = encoder.tokenized(prompt)
                for part in (padded.input_ids, padded.attention_mask):
                    digest.update(str(part.tolist()).encode())
        return digest.hexdigest()

    def _warn(self, prompts: Sequence[str]) -> None:
        long = [prompt for prompt in prompts if any(encoder.cuts(prompt) for encoder in self._encoders)]
        if long:
            most = min(encoder.tokens for encoder in self._encoders)
            warnings.warn(
                f"TextEncoder: prompts should have at most {most} tokens, the end is cut from {len(long)} of them, as "
                f"from {long[0]!r}",
                stacklevel=3,
            )

    @torch.no_grad()
    def _embedded(self, prompt: str, sides: tuple[int, ...]) -> dict[str, Any]:
        """The tensors of one prompt [one row each, on the CPU]."""
        outputs = [encoder(prompt) for encoder in self._encoders]
        if self.family == "Stable Diffusion":
            return {"encoder_hidden_states": outputs[0][0].float().cpu()}
        # The last layer but one, and the projection of the last one's end token.
        clip = torch.cat([output.hidden_states[-2] for output in outputs[:2]], dim=-1).float().cpu()
        if self.family == "Stable Diffusion XL":
            # Integers stay exact in every precision: original size, corner of the crop, target size.
            times = torch.tensor([[*sides, 0, 0, *sides]])
            added = {"text_embeds": outputs[1].text_embeds.float().cpu(), "time_ids": times}
            return {"encoder_hidden_states": clip, "added_cond_kwargs": added}
        t5 = outputs[2][0].float().cpu()
        wide = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([output.text_embeds for output in outputs[:2]], dim=-1).float().cpu()
        return {"encoder_hidden_states": torch.cat([wide, t5], dim=1), "pooled_projections": pooled}


def _joined(rows: Iterable[dict[str, Any]], count: int) -> dict[str, Any]:
    """The tensors of all rows, one after another into memory that is there before the second row is made."""
    joined: dict[str, Any] = {}
    for number, row in enumerate(rows):
        if not number:
            _check_memory(sum(tensor.nbytes for tensor in flat(row).values()), count)
            joined = map_tensors(lambda tensor: tensor.new_empty((count, *tensor.shape[1:])), row)
        into = flat(joined)
        for name, tensor in flat(row).items():
            into[name][number] = tensor[0]
    return joined


def _check_memory(bytes_a_prompt: int, count: int) -> None:
    free = free_bytes(torch.device("cpu"))
    if free is not None and count * bytes_a_prompt > free:
        raise MemoryError(
            f"TextEncoder: prompts must be so few that their embeddings fit into memory, got {count} distinct ones of "
            f"{bytes_a_prompt / 1e6:.1f} MB each where {free / 1e9:.1f} GB are free; score the queries in parts"
        )


def _load(folder: Path, device: torch.device | str | None) -> list[_Encoder]:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("TextEncoder needs transformers: pip install 'guda_fast[sd]'") from error
    first = component("TextEncoder", folder, "text_encoder")
    found = []
    for path in (first, *(folder / f"text_encoder{suffix}" for suffix in ("_2", "_3"))):
        if not path.is_dir():
            continue
        tokens = path.parent / path.name.replace("text_encoder", "tokenizer")
        if not tokens.is_dir():
            raise FileNotFoundError(f"TextEncoder: {folder} must hold the tokenizer of {path.name}, found no {tokens}")
        config = read_object(path / "config.json")
        architectures: Any = config.get("architectures") or [config.get("_class_name")]
        kind = architectures[0]
        if kind not in (_PLAIN, _PROJECTED, _T5):
            raise ValueError(
                f"TextEncoder: {path} must be a {_PLAIN}, {_PROJECTED} or {_T5}, found {kind!r}; pass the tensors of "
                "the pipeline's encode_prompt to attribute instead"
            )
        model_class: Any = getattr(transformers, kind)
        tokenizer_class: Any = transformers.AutoTokenizer
        model = frozen(model_class.from_pretrained(path, local_files_only=True), device)
        tokenizer = tokenizer_class.from_pretrained(tokens, local_files_only=True)
        found.append(_Encoder(model, tokenizer, _T5_TOKENS if kind == _T5 else _most_tokens(model, tokenizer)))
    return found


def _most_tokens(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens an encoder takes; a tokenizer whose configuration does not say so gives some 1e30."""
    most = int(tokenizer.model_max_length)
    return min(most, int(getattr(getattr(model, "config", None), "max_position_embeddings", most)))
