"""attribute() with conditions: prompts, classes and given tensors, against a float64 loop; ids; what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from PIL import Image

import guda_fast as gf
from conditional import (
    CLASSES,
    FEATURES,
    IMAGE,
    MODELS,
    TOKENS,
    conditions_of,
    loop_errors,
    prompted,
    randomised,
    save_pipeline,
)
from guda_fast.diffusion import query_id
from guda_fast.diffusion.conditions import flat
from tiny import perturbed, tiny_unet

SCHEDULER = DDPMScheduler(num_train_timesteps=100)
PROTOCOL = gf.Protocol.from_scheduler(SCHEDULER, start=5, stride=50)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.rand((4, 4, 8, 8), generator=torch.Generator().manual_seed(0)) * 2 - 1


def models_of(base: torch.nn.Module) -> list[torch.nn.Module]:
    return [base, perturbed(base, 0.02, 1), perturbed(base, 0.02, 2)]


def bank_of(base: torch.nn.Module) -> gf.DeltaBank:
    _, *others = models_of(base)
    return gf.DeltaBank.load(base, {f"g{k}": other for k, other in enumerate(others)}, scheduler=SCHEDULER)


def looped(base: torch.nn.Module, x0: torch.Tensor, ids: tuple[int, ...], conditions: gf.Conditions) -> np.ndarray:
    errors = [loop_errors(copy.deepcopy(m).double(), x0, ids, conditions, PROTOCOL).sum(1) for m in models_of(base)]
    return np.stack([error - errors[0] for error in errors[1:]], axis=1)


def dit() -> torch.nn.Module:
    return randomised(
        DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1,
        norm_num_groups=4, sample_size=8, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip


def close(found: np.ndarray, wanted: np.ndarray, scale: float | None = None) -> None:
    """To 1e-5 of the scale, by default the largest score: what a float32 forward varies by."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * (scale or np.abs(wanted).max()))


def test_a_pipeline_that_diffusers_saved(tmp_path) -> None:
    """Images, prompts and models from folders alone; latents by the mode, text by CLIP."""
    unet = prompted()
    save_pipeline(tmp_path / "base", unet)
    for k, other in enumerate(models_of(unet)[1:]):
        other.save_pretrained(tmp_path / f"g{k}")  # type: ignore[operator]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, IMAGE, IMAGE, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    bank = gf.DeltaBank.load(tmp_path / "base", {f"g{k}": tmp_path / f"g{k}" for k in (0, 1)})
    text, latents = gf.TextEncoder(tmp_path / "base"), gf.Latents(tmp_path / "base")
    prompts = ["a cat", "a dog", "a cat"]
    result = gf.attribute(files, bank, PROTOCOL, conditions=text(prompts), latents=latents)
    assert result.query_ids == tuple(query_id(image, prompt) for image, prompt in zip(pixels, prompts, strict=True))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    x0 = latents.encode(images, result.query_ids)
    close(result.scores, looped(unet, x0, result.query_ids, text(prompts)))
    record = result.provenance
    assert record["conditions"] == {"names": ["encoder_hidden_states"], **text(prompts).source}
    assert record["latents"] == latents.to_dict()
    sampled = gf.Latents(tmp_path / "base", mode="sample", seed=1)
    other = gf.attribute(files, bank, PROTOCOL, conditions=text(prompts), latents=sampled)
    assert other.query_ids == result.query_ids, "ids are of images, never of latents"
    assert (other.scores != result.scores).all() and not other.same_run(record, result.query_ids)
    alone = gf.attribute(files[1:2], bank, PROTOCOL, conditions=text(["a dog"]), latents=sampled)
    close(alone.scores, other.scores[1:2], np.abs(other.scores).max())


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("plan", ["swap", "batched"])
def test_tensors_by_name(latents, network: str, plan: str) -> None:
    base, conditions = MODELS[network](), conditions_of(network, [0, 1, 1, 2])
    given = conditions.take(conditions.row)
    found = gf.attribute(latents, bank_of(base), PROTOCOL, conditions=given, plan=plan, batch_size=8)
    close(found.scores, looped(base, latents, found.query_ids, conditions))
    # Tiles and audits take the conditions of their own queries.
    tiled = gf.attribute(latents, bank_of(base), PROTOCOL, conditions=given, estimator=gf.Full(tile_bytes=1))
    close(tiled.scores, found.scores)
    order = [2, 0, 3]
    few = gf.Conditions(conditions.tensors, conditions.row[order])
    shuffled = gf.attribute(latents[order], bank_of(base), PROTOCOL, conditions=few)
    assert shuffled.query_ids == tuple(found.query_ids[index] for index in order)
    close(shuffled.scores, found.scores[order])


def test_class_labels(latents) -> None:
    base = MODELS["classes"]()
    found = gf.attribute(latents, bank_of(base), PROTOCOL, conditions=[3, 0, 0, 2])
    labels = gf.Conditions({"class_labels": torch.tensor([3, 0, 2])}, torch.tensor([0, 1, 1, 2]))
    close(found.scores, looped(base, latents, found.query_ids, labels))
    assert found.query_ids[0] == query_id(latents[0].numpy(), 3)
    for same in (torch.tensor([3, 0, 0, 2]), np.array([3, 0, 0, 2])):
        again = gf.attribute(latents, bank_of(base), PROTOCOL, conditions=same)
        assert again.query_ids == found.query_ids
    with pytest.raises(ValueError, match=f"class label must be between 0 and {CLASSES - 1}, got {CLASSES}"):
        gf.attribute(latents, bank_of(base), PROTOCOL, conditions=[0, 1, 2, CLASSES])


def test_the_label_of_no_class() -> None:
    """DiT has a row more than classes, which it learns from labels that are dropped."""
    base = dit()
    x0 = torch.zeros(1, 4, 8, 8)
    found = gf.attribute(x0, bank_of(base), PROTOCOL, conditions=[CLASSES])
    labels = gf.Conditions({"class_labels": torch.tensor([CLASSES])}, torch.tensor([0]))
    close(found.scores, looped(base, x0, found.query_ids, labels))
    with pytest.raises(ValueError, match=f"class label must be between 0 and {CLASSES}, got {CLASSES + 1}"):
        gf.attribute(x0, bank_of(base), PROTOCOL, conditions=[CLASSES + 1])


@pytest.mark.parametrize("ids", [None, [5, 6, 7, 8]])
def test_the_record_tells_tensors_with_the_same_keys_apart(latents, ids: list[int] | None) -> None:
    bank, conditions = bank_of(MODELS["prompts"]()), conditions_of("prompts", [0, 1, 1, 2])
    named = replace(conditions, keys=("a", "b", "c"))
    found = gf.attribute(latents, bank, PROTOCOL, conditions=named, ids=ids)
    order = torch.tensor([2, 0, 1])  # only another way to hold the same
    same = gf.Conditions(named.take(order), torch.tensor([1, 2, 2, 0]), ("c", "a", "b"))
    other = replace(named, tensors={"encoder_hidden_states": 2 * flat(named.tensors)["encoder_hidden_states"]})
    for given, equal in ((same, True), (other, False)):
        again = gf.attribute(latents, bank, PROTOCOL, conditions=given, ids=ids)
        assert again.query_ids == found.query_ids and found.same_run(again.provenance, again.query_ids) == equal
    if ids is not None:
        labelled = bank_of(MODELS["classes"]())
        runs = [
            gf.attribute(latents, labelled, PROTOCOL, conditions=labels, ids=ids)
            for labels in ([1, 2, 3, 0], [1, 2, 3, 1])
        ]
        assert not runs[0].same_run(runs[1].provenance, runs[1].query_ids)


# Of Inductor itself, and of diffusers' version checks.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:Dynamo detected a call to a")
@pytest.mark.slow
@pytest.mark.parametrize("network", ["prompts", "classes"])
def test_compiled_code_reads_the_conditions_of_each_batch(latents, network: str) -> None:
    """In batches of 3, so that one has several conditions and the last is padded."""
    base, conditions = MODELS[network](), conditions_of(network, [0, 1, 1, 2])
    bank = bank_of(base)
    found = gf.attribute(latents, bank, PROTOCOL, conditions=conditions, compiled=True, plan="swap", batch_size=3)
    close(found.scores, looped(base, latents, found.query_ids, conditions))


class Unnamed(torch.nn.Module):
    """Calls its timestep otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.factor * x,)


def test_a_forward_without_a_timestep_by_name(latents) -> None:
    bank = gf.DeltaBank.load(Unnamed(), {"g": Unnamed()}, scheduler=SCHEDULER)
    with pytest.raises(ValueError, match=r"takes timestep and return_dict by name, .*Unnamed.forward\(x, t, return_"):
        gf.attribute(latents, bank, PROTOCOL)


def test_an_image_under_another_condition_is_another_query(latents) -> None:
    bank, twice = bank_of(MODELS["classes"]()), latents[[0, 0, 0]]
    forwards: list[int] = []
    found = gf.attribute(
        twice, bank, PROTOCOL, conditions=[1, 2, 1], progress=lambda done, total: forwards.append(total)
    )
    assert forwards[-1] == 2 * 3 * PROTOCOL.draws
    assert found.query_ids[0] == found.query_ids[2] != found.query_ids[1]
    assert (found.scores[0] == found.scores[2]).all() and (found.scores[0] != found.scores[1]).all()
    with pytest.raises(ValueError, match="ids must differ where conditions differ, got 0x0+7 for both 0 and 1"):
        gf.attribute(twice, bank, PROTOCOL, conditions=[1, 2, 1], ids=[7, 7, 7])


def test_the_audit_scores_queries_under_their_conditions(latents, monkeypatch: pytest.MonkeyPatch) -> None:
    base, conditions = MODELS["prompts"](), conditions_of("prompts", [0, 1, 1, 2])
    found = gf.precision_audit(bank_of(base), latents, PROTOCOL, precision="bf16", conditions=conditions)
    scores = [
        gf.attribute(
            latents, bank_of(base), PROTOCOL, conditions=conditions, precision=precision, plan="swap", allow_lossy=True
        ).scores
        for precision in ("fp32", "bf16")
    ]
    error = np.linalg.norm(scores[1] - scores[0], axis=0) / np.linalg.norm(scores[0], axis=0)
    assert found.queries == 4 and found.relative_error == pytest.approx(error.max(), rel=1e-2)


@pytest.mark.parametrize(
    ("network", "given", "error", "message"),
    [
        ("prompts", None, ValueError,
         "UNet2DConditionModel its encoder_hidden_states \\(cross_attention_dim=12\\), got none"),
        ("prompts", [1, 2, 3, 4], ValueError, "its encoder_hidden_states .*, got class_labels"),
        ("prompts, added", {"encoder_hidden_states": torch.zeros(4, TOKENS, FEATURES)}, ValueError,
         r"its added_cond_kwargs.text_embeds \(addition_embed_type=text_time\), added_cond_kwargs.time_ids"),
        ("classes", None, ValueError, r"UNet2DModel its class_labels \(num_class_embeds=4\), got none"),
        ("classes", {"class_labels": torch.ones(4).long(), "encoder_hidden_states": torch.zeros(4, 1, 1)}, ValueError,
         r"must be what UNet2DModel takes \(class_labels\), got encoder_hidden_states"),
        ("classes", {"class_labels": torch.ones(4).long(), "colour": torch.zeros(4)}, ValueError,
         "must be arguments of UNet2DModel.forward beside sample and timestep, got 'colour'"),
        ("classes", {"class_labels": torch.ones(4).long(), "timestep": torch.zeros(4)}, ValueError,
         "beside sample and timestep, got 'timestep'"),
        ("prompts", {"encoder_hidden_states": torch.zeros(4, TOKENS, 3)}, ValueError,
         "must have encoder_hidden_states with 12 features, got float32 tensor of shape"),
        ("prompts", {"encoder_hidden_states": torch.zeros(3, TOKENS, FEATURES)}, ValueError,
         r"conditions\['encoder_hidden_states'\] must have 4 rows, one a query"),
        ("prompts", {"encoder_hidden_states": torch.full((4, TOKENS, FEATURES), torch.nan)}, ValueError,
         "conditions must have finite encoder_hidden_states, got NaN or infinity"),
        ("prompts", ["a", "b", "c", "d"], TypeError, "must be embedded prompts, got text; make them by"),
        ("prompts", "a cat", TypeError, "must be embedded prompts, got text"),
        ("prompts", 3.5, TypeError, "must be Conditions, tensors by name or class labels, got 3.5"),
        ("classes", [1, 2, 3], ValueError, "must be those of 4 queries, got those of 3"),
        ("classes", [1, 2, 3, 0.5], TypeError, "class label must be an integer, got 0.5"),
        ("classes", [1, 2, 3, -1], ValueError, "class label must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_take(latents, network: str, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gf.attribute(latents, bank_of(MODELS[network]()), PROTOCOL, conditions=given)


def test_an_unconditional_model_takes_none(latents) -> None:
    bank = bank_of(tiny_unet(4))
    with pytest.raises(ValueError, match="UNet2DModel takes .None, because it is unconditional.*got class_labels"):
        gf.attribute(latents, bank, PROTOCOL, conditions=[1, 2, 3, 0])
    plain = gf.attribute(latents, bank, PROTOCOL)
    none = gf.attribute(latents, bank, PROTOCOL, conditions=gf.Conditions.none(4))
    np.testing.assert_array_equal(plain.scores, none.scores)
    assert plain.query_ids == none.query_ids and plain.provenance["conditions"] == {"names": []}


def test_images_must_fit_the_latents(latents, tmp_path) -> None:
    save_pipeline(tmp_path, prompted())
    bank, text, vae = bank_of(prompted()), gf.TextEncoder(tmp_path), gf.Latents(tmp_path)
    small = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="must have 3 x 16 x 16 channels, height and width, found 3 x 8 x 8"):
        gf.attribute(small, bank, PROTOCOL, conditions=text(["a"]), latents=vae)
    with pytest.raises(TypeError, match="latents must be Latents, got"):
        gf.attribute(latents, bank, PROTOCOL, conditions=text(["a"]), latents=Path(tmp_path))  # type: ignore[arg-type]
    wide = bank_of(prompted(in_channels=8, out_channels=8))
    images = np.zeros((1, IMAGE, IMAGE, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="latents must have the model's 8 channels, got a VAE of 4"):
        gf.attribute(images, wide, PROTOCOL, conditions=text(["a"]), latents=vae)
