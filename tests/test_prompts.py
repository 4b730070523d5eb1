"""TextEncoder: the embeddings of diffusers' own pipelines, once a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

import guda_fast as gf
from conditional import FEATURES, POOLED, WORDS, tiny_text_encoder, tiny_tokenizer
from guda_fast.datasets import prompts as module
from guda_fast.diffusion.conditions import flat

PROMPTS = ["a cat", "dog", "a cat", ""]


@pytest.fixture(scope="module")
def t5() -> tuple[Any, Any]:
    """An encoder, and a tokenizer with a token for each letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{chr(97 + k): 3 + k for k in range(26)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    config = T5Config(vocab_size=29, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5EncoderModel(config).eval(), tokenizer


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Weights that are read from files lie otherwise in memory, and products of 32 terms are summed otherwise."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def save(folder: Path, **parts: Any) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def test_stable_diffusion(tmp_path) -> None:
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    nothing = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        text_encoder=encoder, tokenizer=tokenizer, requires_safety_checker=False, **nothing
    )
    wanted = [pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)[0][0] for prompt in PROMPTS]
    folder = save(tmp_path, text_encoder=encoder, tokenizer=tokenizer)
    for text in (gf.TextEncoder(folder), gf.TextEncoder(folder / "text_encoder"), gf.TextEncoder(encoder, tokenizer)):
        found = text(PROMPTS)
        assert found.row.tolist() == [0, 1, 0, 2] and found.keys == ("a cat", "dog", "")
        embedded = found.tensors["encoder_hidden_states"]
        assert isinstance(embedded, torch.Tensor)
        assert embedded.shape == (3, WORDS, FEATURES) and list(found.tensors) == ["encoder_hidden_states"]
        assert all(torch.equal(embedded[row], one) for row, one in zip(found.row, wanted, strict=True))
        alone = text(["dog"]).tensors["encoder_hidden_states"]
        assert isinstance(alone, torch.Tensor) and torch.equal(alone[0], embedded[1])
    other = gf.TextEncoder(tiny_text_encoder(seed=1), tokenizer)(PROMPTS)
    assert found.source == gf.TextEncoder(folder)(PROMPTS).source != other.source
    assert found.source["text_encoder"] == gf.TextEncoder(folder)(["a"]).source["text_encoder"]


@torch.no_grad()
def test_stable_diffusion_xl(tmp_path) -> None:
    encoders = tiny_text_encoder(), tiny_text_encoder(projected=True, features=16)
    tokenizer = tiny_tokenizer()
    pipeline = StableDiffusionXLPipeline(
        None, *encoders, tokenizer, tokenizer, unet=None, scheduler=None, add_watermarker=False
    )
    folder = save(
        tmp_path, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer, tokenizer_2=tokenizer
    )
    text = gf.TextEncoder(folder)
    found = text(PROMPTS, size=(48, 64))
    tensors = flat(found.take(found.row))
    for i, prompt in enumerate(PROMPTS):
        embedded, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        near(tensors["encoder_hidden_states"][i], embedded[0])
        near(tensors["added_cond_kwargs.text_embeds"][i], pooled[0])
        assert embedded.shape[-1] == FEATURES + 16 and pooled.shape == (1, POOLED)
    # Original size, top left corner, target size, as StableDiffusionXLPipeline adds them.
    assert tensors["added_cond_kwargs.time_ids"].tolist() == [[48, 64, 0, 0, 48, 64]] * 4
    assert flat(text(["a"], size=32).tensors)["added_cond_kwargs.time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert found.source["size"] == [48, 64]
    with pytest.raises(ValueError, match="size must be given for Stable Diffusion XL and for it alone, got None"):
        text(PROMPTS)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        text(PROMPTS, size=(0, 64))


@torch.no_grad()
def test_stable_diffusion_3(tmp_path, t5) -> None:
    encoders = [tiny_text_encoder(projected=True, features=features) for features in (12, 16)]
    tokenizer = tiny_tokenizer()
    parts: Any = (None, None, None, encoders[0], tokenizer, encoders[1], tokenizer, *t5)
    pipeline = StableDiffusion3Pipeline(*parts)
    folder = save(
        tmp_path, text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=t5[0],
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=t5[1],
    )  # fmt: skip
    found = gf.TextEncoder(folder)(PROMPTS)
    tensors = flat(found.take(found.row))
    for i, prompt in enumerate(PROMPTS):
        embedded, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, device=torch.device("cpu"), do_classifier_free_guidance=False
        )
        # The pipeline asks its first tokenizer how many tokens there are, and T5 takes 256.
        assert embedded.shape == (1, WORDS + 256, 32)
        near(tensors["encoder_hidden_states"][i], embedded[0])
        near(tensors["pooled_projections"][i], pooled[0])


def test_what_is_cut_is_said() -> None:
    text = gf.TextEncoder(tiny_text_encoder(), tiny_tokenizer())
    text(["abcdefg"])
    with pytest.warns(UserWarning, match="at most 9 tokens, the end is cut from 1 of them, as from 'abcdefgh'"):
        found = text(["abcdefgh", "a"])
    assert found.keys == ("abcdefgh", "a"), "the whole prompt is what the id covers"


def test_the_record_tells_tokenizers_and_configurations_apart() -> None:
    def source(**options: Any) -> Any:
        tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
        tokenizer.model_max_length = options.get("tokens", WORDS)
        tokenizer.padding_side = options.get("side", "right")
        encoder.config.hidden_act = options.get("act", encoder.config.hidden_act)
        return gf.TextEncoder(encoder, tokenizer)(["a", "b"]).source

    plain = source()
    assert plain == source()
    for changed in ({"tokens": 5}, {"side": "left"}, {"act": "gelu"}):
        assert source(**changed) != plain
    text = gf.TextEncoder(tiny_text_encoder(), tiny_tokenizer())
    assert text(["b", "a"]).source != plain, "the tokens of each query, in their order"


def test_a_tokenizer_without_a_length_takes_what_its_encoder_takes(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    encoder = tiny_text_encoder()
    wanted = flat(gf.TextEncoder(encoder, tiny_tokenizer())(["a"]).tensors)["encoder_hidden_states"]
    folder = save(tmp_path, text_encoder=encoder, tokenizer=tokenizer)
    for text in (gf.TextEncoder(encoder, tokenizer), gf.TextEncoder(folder, device="cpu")):
        near(flat(text(["a"]).tensors)["encoder_hidden_states"], wanted)


def test_more_prompts_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known from the first of them."""
    text = gf.TextEncoder(tiny_text_encoder(), tiny_tokenizer())
    a_prompt = WORDS * FEATURES * 4
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * a_prompt)
    assert text(["a", "b", "a"]).count == 2
    embedded: list[str] = []
    embed = text._embedded

    def counted(prompt: str, sides: tuple[int, ...]) -> dict[str, Any]:
        embedded.append(prompt)
        return embed(prompt, sides)

    monkeypatch.setattr(text, "_embedded", counted)
    with pytest.raises(MemoryError, match="got 3 distinct ones of 0.0 MB each where .* score the queries in parts"):
        text(["a", "b", "c"])
    assert embedded == ["a"]


def test_what_is_no_text_encoder(tmp_path) -> None:
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    with pytest.raises(FileNotFoundError, match="must be a pipeline saved by diffusers, or its text_encoder"):
        gf.TextEncoder(tmp_path)
    save(tmp_path, text_encoder=encoder)
    with pytest.raises(FileNotFoundError, match="must hold the tokenizer of text_encoder, found no"):
        gf.TextEncoder(tmp_path)
    with pytest.raises(TypeError, match="tokenizer must be given with a text encoder in memory"):
        gf.TextEncoder(encoder)
    with pytest.raises(TypeError, match="tokenizer must be None where folder is a path"):
        gf.TextEncoder(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="must hold the text encoders of one of .* got Linear; pass the tensors of"):
        gf.TextEncoder(torch.nn.Linear(1, 1), tokenizer)
    save(tmp_path, tokenizer=tokenizer)
    text = gf.TextEncoder(tmp_path)
    for prompts in ("a cat", ["a", 3]):
        with pytest.raises(TypeError, match="prompts must be a sequence of strings"):
            text(prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts must hold at least one, got none"):
        text([])
    with pytest.raises(ValueError, match="size must be given for .* alone, got 64 for Stable Diffusion$"):
        text(["a"], size=64)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("CLIPTextModel", "BertModel"))
    with pytest.raises(ValueError, match="must be a CLIPTextModel, .* found 'BertModel'"):
        gf.TextEncoder(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: must be JSON in UTF-8, found a damaged file"):
        gf.TextEncoder(tmp_path)
