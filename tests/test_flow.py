"""Flow matching: its grid against diffusers' scheduler, its weights against the ELBO, scores against a float64 loop."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

import guda_fast as gf
from conditional import loop_errors, randomised
from guda_fast.diffusion import flow_networks
from guda_fast.diffusion.flow_networks import check_network
from tiny import Scaled, perturbed

SCHEDULER = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
TOKENS, FEATURES, POOLED = 5, 24, 10


def sd3() -> nn.Module:
    return randomised(
        SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=FEATURES, caption_projection_dim=16,
        pooled_projection_dim=POOLED, pos_embed_max_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_is_that_of_diffusers(tmp_path, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = gf.FlowSchedule.from_scheduler(scheduler)
    assert len(schedule) == 1000
    index = np.arange(1, 1000)
    # Its own are float32, from 1 downwards.
    np.testing.assert_allclose(schedule.scales(index)[1][::-1], scheduler.sigmas[1:].numpy(), rtol=1e-6)
    times = schedule.model_timesteps(index)
    np.testing.assert_allclose(times[::-1], scheduler.timesteps[1:].numpy(), rtol=1e-6)
    assert times.dtype == np.float32
    x0, eps = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    signal, noise = schedule.scales([700])
    wanted = scheduler.scale_noise(x0, torch.tensor([scheduler.timesteps[300]]), eps)
    torch.testing.assert_close(signal[0] * x0 + noise[0] * eps, wanted, rtol=0, atol=1e-6)
    scheduler.save_pretrained(tmp_path)
    for source in (tmp_path, {**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}):
        read = gf.Protocol.from_scheduler(source, start=10, stride=10).schedule
        assert isinstance(read, gf.FlowSchedule) and (read.sigmas == schedule.sigmas).all()


def test_elbo_weights_integrate_the_kl_of_the_process() -> None:
    """Against half the decrease of the signal-to-noise ratio times the error of x0, on a fine grid, for one error.

    A velocity that is off by f(s) puts x0 off by s f(s).
    """
    for shift in (1.0, 3.0):
        schedule = gf.FlowSchedule.from_scheduler(
            FlowMatchEulerDiscreteScheduler(num_train_timesteps=4000, shift=shift)
        )
        t = np.arange(1, 4000)
        s = schedule.sigmas[t]
        error = np.square(s * np.cos(3 * s))
        found = float(schedule.weights("elbo", t) @ error)
        fine = np.linspace(1e-5, 1, 400_001)
        ratio = np.square((1 - fine) / fine)
        middle = (fine[1:] + fine[:-1]) / 2
        wanted = float(-np.diff(ratio) / 2 @ np.square(middle * middle * np.cos(3 * middle)))
        # The trapezoid's error is the square of the spacing, 7.5e-4 at most, times a few.
        assert found == pytest.approx(wanted, rel=1e-5)


def test_weights_targets_and_indices() -> None:
    schedule = gf.FlowSchedule(np.array([0.0, 0.1, 0.4, 1.0]), timestep_scale=1.0)
    np.testing.assert_allclose(schedule.weights("elbo", [1, 2]), [9 * 0.2, 1.5 * 0.45])
    assert schedule.weights("simple", [2]).tolist() == [1.0]
    assert schedule.weights((3.0, 0.0), [1, 2]).tolist() == [3.0, 0.0]
    assert [scale.tolist() for scale in schedule.target_scales([1, 2])] == [[-1.0, -1.0], [1.0, 1.0]]
    assert schedule.model_timesteps([2]).tolist() == [np.float32(0.4)]
    protocol = gf.Protocol(schedule, (2, 1), samples=2, weighting="simple")
    assert protocol.table.timestep.tolist() == [1, 1, 2, 2], "the noise contract's index is the grid's"
    assert protocol.table.weight.tolist() == [0.5] * 4
    record = protocol.to_dict()
    assert json.loads(json.dumps(record)) == record and record["prediction_type"] == "flow"
    other = gf.FlowSchedule(np.array([0.0, 0.1, 0.5, 1.0]), timestep_scale=1.0)
    assert gf.Protocol(other, (1, 2)).to_dict()["sigmas"] != record["sigmas"]


@pytest.mark.parametrize("plan", ["swap", "batched"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_scores_of_a_transformer_are_those_of_a_loop(plan: str, precision: str) -> None:
    base = sd3()
    models = [base, perturbed(base, 0.02, 1), perturbed(base, 0.02, 2)]
    bank = gf.DeltaBank.load(base, {f"g{k}": model for k, model in enumerate(models[1:])}, scheduler=SCHEDULER)
    protocol = gf.Protocol.from_scheduler(SCHEDULER, start=5, stride=30)
    random = torch.Generator().manual_seed(2)
    x0 = torch.randn(3, 4, 8, 8, generator=random)
    given = {
        "encoder_hidden_states": torch.randn(3, TOKENS, FEATURES, generator=random),
        "pooled_projections": torch.randn(3, POOLED, generator=random),
    }
    result = gf.attribute(x0, bank, protocol, conditions=given, plan=plan, precision=precision, batch_size=5)
    conditions = gf.Conditions(given, torch.arange(3))
    errors = [
        loop_errors(copy.deepcopy(model).double(), x0, result.query_ids, conditions, protocol) for model in models
    ]
    np.testing.assert_allclose(result.base_errors, errors[0], rtol=1e-6 if precision == "fp64" else 1e-4)
    scores = np.stack([(error - errors[0]).sum(1) for error in errors[1:]], axis=1)
    # In float64 what is left is the bank's addition of float32 weights.
    scale = np.abs(scores).max() if precision == "fp32" else 0.1 * np.abs(scores).max()
    np.testing.assert_allclose(result.scores, scores, rtol=0, atol=1e-5 * scale)
    with pytest.raises(ValueError, match=r"pooled_projections \(pooled_projection_dim=10\)"):
        gf.attribute(x0, bank, protocol, conditions={"encoder_hidden_states": given["encoder_hidden_states"]})


def test_a_transformer_that_takes_s_itself() -> None:
    base = randomised(
        AuraFlowTransformer2DModel, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=FEATURES,
        caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    other = perturbed(base, 0.02, 1)
    bank = gf.DeltaBank.load(base, {"g": other}, scheduler=SCHEDULER)
    random = torch.Generator().manual_seed(2)
    x0 = torch.randn(2, 4, 8, 8, generator=random)
    given = {"encoder_hidden_states": torch.randn(2, TOKENS, FEATURES, generator=random)}
    with pytest.raises(ValueError, match="a FlowSchedule with timestep_scale=1 for AuraFlow.*, got 100"):
        gf.attribute(x0, bank, gf.Protocol.from_scheduler(SCHEDULER, start=5, stride=60), conditions=given)
    schedule = gf.FlowSchedule.from_scheduler(SCHEDULER, timestep_scale=1.0)
    protocol = gf.Protocol.from_scheduler(schedule, start=5, stride=60)
    result = gf.attribute(x0, bank, protocol, conditions=given, precision="fp64")
    conditions = gf.Conditions(given, torch.arange(2))
    errors = [loop_errors(copy.deepcopy(m).double(), x0, result.query_ids, conditions, protocol) for m in (base, other)]
    np.testing.assert_allclose(result.scores[:, 0], (errors[1] - errors[0]).sum(1), rtol=1e-5)


def sana(scale: float) -> nn.Module:
    return randomised(
        SanaTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=4,
        num_layers=1, num_cross_attention_heads=1, cross_attention_head_dim=4, cross_attention_dim=4,
        caption_channels=4, sample_size=4, timestep_scale=scale,
    )  # fmt: skip


def lumina() -> nn.Module:
    return randomised(
        Lumina2Transformer2DModel, sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 8, 8), axes_lens=(8, 8, 8),
        cap_feat_dim=8,
    )  # fmt: skip


def test_what_a_network_takes_as_its_timestep() -> None:
    """T s, s, or T s times its own factor, with T of the bank's scheduler or else of the schedule's."""
    make = gf.FlowSchedule.from_scheduler
    plain, level, coarse = make(SCHEDULER), make(SCHEDULER, timestep_scale=1.0), np.linspace(0, 1, 11)
    assert (plain.timestep_scale, plain.model_scale, level.model_scale) == (None, 100, 1)
    assert plain.to_dict()["timestep_scale"] == 100
    own = {**SCHEDULER.config}
    for scheduler in (own, None):
        check_network(sd3(), plain, scheduler)
        check_network(sana(1.0), plain, scheduler)
        with pytest.raises(ValueError, match="with timestep_scale=100 for SD3Transformer2DModel, got 1$"):
            check_network(sd3(), level, scheduler)
        with pytest.raises(ValueError, match="with timestep_scale=0.1 for SanaTransformer2DModel, got 100"):
            check_network(sana(0.001), plain, scheduler)
    # A grid of one's own does not say how many steps there were.
    check_network(sd3(), gf.FlowSchedule(coarse), None)
    check_network(sd3(), gf.FlowSchedule(coarse, timestep_scale=100), own)
    check_network(sd3(), gf.FlowSchedule(coarse, timestep_scale=100), None)
    with pytest.raises(ValueError, match="with timestep_scale=100 for SD3Transformer2DModel, got 1000"):
        check_network(sd3(), gf.FlowSchedule(coarse), own)
    derived = type("Fine", (SD3Transformer2DModel,), {}).from_config(sd3().config)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="with timestep_scale=100 for SD3Transformer2DModel, got 1$"):
        check_network(derived, level, own)
    # Sign and shift are not a matter of scale.
    for schedule in (plain, level):
        with pytest.raises(ValueError, match="Lumina2Transformer2DModel, which predicts x0 - eps at 1 - s"):
            check_network(lumina(), schedule, own)


def test_the_table_names_classes_of_diffusers() -> None:
    """A class that was renamed would be taken for an unknown one."""
    import diffusers

    missing = [name for name in flow_networks._KNOWN if not hasattr(diffusers, name)]
    assert not missing


@pytest.mark.parametrize("scheduler", [SCHEDULER, None])
def test_networks_are_checked_with_and_without_a_scheduler(scheduler: object) -> None:
    x0 = torch.zeros(1, 4, 8, 8)
    plain = gf.Protocol.from_scheduler(SCHEDULER, start=5, stride=60)
    bank = gf.DeltaBank.load(lumina(), {"g": perturbed(lumina(), 0.02, 1)}, scheduler=scheduler)
    with pytest.raises(ValueError, match="must hold a model that takes .* got Lumina2Transformer2DModel, which"):
        gf.attribute(x0, bank, plain)
    bank = gf.DeltaBank.load(Scaled(0.0), {"half": Scaled(0.5)}, scheduler=scheduler)
    with pytest.raises(ValueError, match="timestep_scale for Scaled, which is unknown, got none; .* 100 where it"):
        gf.attribute(x0, bank, plain)


def test_closed_form_score() -> None:
    """A model that predicts f x_s: its error is a quadratic in x0 and the noise."""
    x0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    bank = gf.DeltaBank.load(Scaled(0.0), {"half": Scaled(0.5)}, scheduler=SCHEDULER)
    schedule = gf.FlowSchedule.from_scheduler(SCHEDULER, timestep_scale=100)
    protocol = gf.Protocol.from_scheduler(schedule, start=50, stride=100)
    result = gf.attribute(x0, bank, protocol, ids=[9])
    index = (torch.tensor([9]), torch.tensor([50]), torch.tensor([0]))
    eps = gf.reference.standard_normals(*index, 16, seed=42)[0].double().numpy()  # type: ignore[attr-defined]
    s, image = 3 * 0.5 / (1 + 2 * 0.5), x0.flatten().double().numpy()
    spacing = (3 * 0.51 / (1 + 2 * 0.51) - 3 * 0.49 / (1 + 2 * 0.49)) / 2
    velocity = eps - image
    wanted = np.square(0.5 * ((1 - s) * image + s * eps) - velocity).sum() - np.square(velocity).sum()
    # Normals and products are float32.
    assert result.scores[0, 0] == pytest.approx((1 - s) / s * spacing * wanted, rel=1e-5)


def test_errors(tmp_path) -> None:
    make = gf.FlowSchedule.from_scheduler
    with pytest.raises(ValueError, match="shift must be given for a scheduler with use_dynamic_shifting"):
        make(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    assert len(make(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), shift=1.15)) == 1000
    with pytest.raises(ValueError, match="must have noise levels that rise with t, got invert_sigmas"):
        make(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="scheduler must be one of 'FlowMatchEulerDiscreteScheduler'"):
        make(DDPMScheduler())
    with pytest.raises(ValueError, match="shift must be finite and at least"):
        make(SCHEDULER, shift=0.0)
    for scale in (0, 0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="timestep_scale must be finite and at least"):
            make(SCHEDULER, timestep_scale=scale)
    for sigmas in ([0.0, 1.0], [0.0, 0.5, 0.5, 1.0], [0.1, 0.5, 1.0], [[0.0, 0.5, 1.0]]):
        with pytest.raises(ValueError, match="sigmas must rise from 0 to 1 in at least two steps"):
            gf.FlowSchedule(np.array(sigmas))
    schedule = make(SCHEDULER)
    for t in (0, 100):
        with pytest.raises(ValueError, match=f"between 1 and 99, where 0 < s < 1, got {t}"):
            gf.Protocol(schedule, (t,))
    with pytest.raises(ValueError, match="weighting must be one of 'elbo', 'simple', got 'elbo_fixed_large'"):
        gf.Protocol(schedule, (5,), weighting="elbo_fixed_large")
    with pytest.raises(ValueError, match="a name or 1 finite weights of at least 0"):
        gf.Protocol(schedule, (5,), weighting=(-1.0,))
    with pytest.raises(TypeError, match="timesteps must be a sequence of integers"):
        schedule.scales([0.5])  # type: ignore[list-item]
    bank = gf.DeltaBank.load(Scaled(0.0), {"half": Scaled(0.5)}, scheduler=SCHEDULER)
    x0 = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="must have the schedule of the bank's FlowMatchEuler.* got a Schedule"):
        gf.attribute(x0, bank, gf.Protocol.from_scheduler(DDPMScheduler(), start=10, stride=500))
    bank = gf.DeltaBank.load(Scaled(0.0), {"half": Scaled(0.5)}, scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="must have the schedule of the bank's DDPMScheduler, got a FlowSchedule"):
        gf.attribute(x0, bank, gf.Protocol(schedule, (5,)))
