"""What a run may change and when it ends: patterns, saliency, forget shares, the retain bound, precision, dropout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from conditional import conditions_of, prompted, prompted_xl
from guda_fast.counterfactuals import Batch, FromBase, Rows, TrainConfig, TrainResult, train
from guda_fast.counterfactuals.loop import _SALIENCY_DRAWS
from guda_fast.counterfactuals.selection import selected
from tiny import Scaled, tiny_unet
from training import Dropping, Fixed, Noise, assert_equal, changed, constant, distance, weights


def log_of(result: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.log]


@pytest.mark.parametrize(
    ("trained", "parts"),
    [
        ("cross-attention", ("attn2.",)),
        ("cross-attention-kv", ("attn2.to_k.", "attn2.to_v.")),
        (("conv_in.*", "*.attn1.to_q.weight"), ("conv_in.", "attn1.to_q.weight")),
    ],
)
def test_only_selected_parameters_change(trained, parts) -> None:
    base = prompted()
    objective = Noise(shape=(2, 4, 8, 8))
    conditions = conditions_of("prompts", [0, 0])
    objective.conditions = conditions
    draw = objective.draw

    def with_conditions(generator: torch.Generator) -> Batch:
        batch = draw(generator)
        given = [
            None if rows is None else Rows(rows.x_t, rows.t, torch.tensor([0, 2]), rows.target)
            for rows in (batch.retain, batch.forget)
        ]
        return Batch(*given)

    objective.draw = with_conditions  # type: ignore[method-assign]
    result = train(base, objective, TrainConfig(1, weight_decay=0.1, trained=trained))
    expected = [name for name in weights(base) if any(part in name for part in parts)]
    assert expected and changed(result.model, base) == expected


@pytest.mark.parametrize("trained", ["mid_block.*", "up_blocks.*", "*norm*"])
def test_norms_may_be_the_first_that_changes(trained: str) -> None:
    """PyTorch 2.13 would crash where their input has no gradient and is in channels-last."""
    base, objective = tiny_unet(), Noise(shape=(2, 1, 8, 8))
    found = train(base, objective, TrainConfig(1, trained=(trained,)))
    assert changed(found.model, base)


def test_cross_attention_of_models_with_added_conditions_and_of_all_names() -> None:
    model = prompted_xl()
    assert selected(model, "all") == tuple(name for name, _ in model.named_parameters())
    keys = selected(model, "cross-attention-kv")
    assert keys and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in keys)


@pytest.mark.parametrize("trained", ["cross-attention", ("conv_in.*", "atn.*"), ()])
def test_patterns_that_select_nothing_are_named(trained) -> None:
    wrong = "cross-attention" if isinstance(trained, str) else "atn" if trained else "()"
    with pytest.raises(ValueError, match="trained must select parameters of UNet2DModel") as error:
        train(tiny_unet(), Noise(), TrainConfig(1, trained=trained))
    assert wrong in str(error.value)


def test_saliency_lets_the_largest_gradients_of_the_forget_loss_change_and_nothing_else() -> None:
    """With weight decay, which would change all others too."""
    base, share = tiny_unet().double(), 0.2
    result = train(base, Noise(), TrainConfig(2, lr=1e-2, weight_decay=0.1, saliency=share, seed=5))

    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    for _ in range(_SALIENCY_DRAWS):
        rows = Noise().draw(generator).forget
        (model(rows.x_t.double(), rows.t).sample - rows.target).square().mean().backward()
    for (name, value), new in zip(model.named_parameters(), result.model.parameters(), strict=True):
        size, differs = value.grad.abs(), new != value
        assert int(differs.sum()) == max(1, round(share * value.numel())), name
        # Pairs of channels that a norm makes one have gradients of equal size: either may be taken.
        if ".to_k.bias" not in name and not differs.all():  # softmax does not see it: its gradient is rounding
            assert size[differs].min() >= (1 - 1e-9) * size[~differs].max(), name


def test_saliency_needs_forget_rows() -> None:
    with pytest.raises(ValueError, match="saliency must be None for an objective without forget rows"):
        train(tiny_unet(), Noise(forget=None), TrainConfig(1, saliency=0.5))


@pytest.mark.parametrize(("share", "clipped"), [(0.1, True), (1e6, False)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_forget_gradient_is_held_to_its_share_in_every_step(share: float, clipped: bool, accumulate: int) -> None:
    """Steps of a plain loop in float64, with both gradients formed apart."""
    base = tiny_unet().double()
    config = TrainConfig(3, lr=1e-3, seed=2, accumulate=accumulate)
    result = train(base, Noise(forget_share=share, forget_weight=5.0), config)

    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    values = list(model.parameters())
    for line in log_of(result):
        sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        for _ in range(accumulate):
            batch = Noise().draw(generator)
            for number, rows in enumerate((batch.retain, batch.forget)):
                error = model(rows.x_t.double(), rows.t).sample - rows.target.double()
                sums[number] = sums[number] + (1.0, 5.0)[number] * error.square().mean() / accumulate
        retain, forget = (torch.autograd.grad(each, values) for each in sums)
        norms = [float(torch.cat([each.flatten() for each in found]).norm()) for found in (retain, forget)]
        scale = min(1.0, share * norms[0] / norms[1])
        assert (scale < 1) == clipped and norms[1] > 0
        assert [line["retain_norm"], line["forget_norm"], line["forget_scale"]] == pytest.approx([*norms, scale])
        for value, kept, forgotten in zip(values, retain, forget, strict=True):
            value.grad = kept + scale * forgotten
        assert line["grad_norm"] == pytest.approx(float(nn.utils.clip_grad_norm_(values, 1.0)))
        optimizer.step()
    assert distance(result.model.parameters(), values) < 1e-3 * 1e-6  # see the plain loop of test_trainer.py


def test_a_step_without_forget_rows_has_no_forget_gradient() -> None:
    expected = train(tiny_unet(), Noise(forget=None), TrainConfig(2))
    found = train(tiny_unet(), Noise(forget=None, forget_share=0.1), TrainConfig(2))
    assert_equal(found, expected)
    assert all("forget_norm" not in line and line["forget"] is None for line in log_of(found))


def test_a_run_stops_at_the_retain_bound_and_gives_the_last_state_within() -> None:
    """A factor that begins 0.1 off and moves away by 0.01 a step: retain loss times (1 + n / 10)^2 after n steps."""
    objective = Fixed(constant(0.9), constant(9.0), 0.0, 1.0)

    def run(**options: Any) -> TrainResult:
        return train(Scaled(1.0), objective, TrainConfig(9, lr=0.01, **options))

    every = run(retain_bound=1.5, bound_every=1)  # 1.21, 1.44, 1.69
    assert every.steps == 2 and len(every.losses) == 3
    assert every.model.factor.item() == pytest.approx(1.02, abs=1e-5)
    assert every.stopped is not None and "1.69 times the base's at step 3, over the bound of 1.5" in every.stopped
    assert "the state of step 2 is given" in every.stopped
    for rarely, step in (4, 4), (100, 9):
        with pytest.raises(ValueError, match=f"at step {step}, over the bound of 1.5, before any state within it"):
            run(retain_bound=1.5, bound_every=rarely)
    within = run(retain_bound=100.0, bound_every=2)
    assert within.stopped is None and within.steps == 9
    assert_equal(within, run())
    # The average lags, and is what is judged.
    assert run(retain_bound=1.65, bound_every=1).steps == 2
    averaged = run(retain_bound=1.65, bound_every=1, ema_decay=0.9)
    assert averaged.steps == 3 and averaged.model.factor.item() < 1 + 0.1 * (1.65**0.5 - 1)


def test_the_retain_bound_judges_distilled_rows_by_their_true_target() -> None:
    rows = constant(FromBase())
    true = torch.full_like(rows.x_t, 0.9)
    config = TrainConfig(5, lr=0.01, retain_bound=1.5, bound_every=1)
    result = train(Scaled(1.0), Fixed(Rows(rows.x_t, rows.t, None, rows.target, true), constant(9.0)), config)
    assert result.stopped is not None and result.steps == 2
    with pytest.raises(ValueError, match="retain_bound must be None where all that retain rows aim at"):
        train(Scaled(1.0), Fixed(rows), config)


def test_bfloat16_forwards_over_float32_weights() -> None:
    exact = train(tiny_unet(), Noise(), TrainConfig(3))
    rounded = train(tiny_unet(), Noise(), TrainConfig(3, precision="bf16"))
    assert all(value.dtype == torch.float32 for value in weights(rounded).values())
    # Predictions keep 8 bits; the loss of a fresh model is that of its targets, which keep all of theirs.
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=2**-7)


def test_float16_leaves_out_steps_whose_scaled_gradient_overflows() -> None:
    """Errors of 300 times a loss scale of 2^16 are over float16's 65504 until the scale has been halved."""
    base = tiny_unet()
    rows = Noise().draw(torch.Generator()).retain
    objective = Fixed(Rows(rows.x_t, rows.t, None, torch.full_like(rows.x_t, 300.0)))
    with pytest.raises(FloatingPointError, match="some step must be applied, got 1 whose gradients overflowed"):
        train(base, objective, TrainConfig(1, precision="fp16"))
    result = train(base, objective, TrainConfig(20, precision="fp16"))
    norms = [line["grad_norm"] for line in log_of(result)]
    assert norms[0] is None and norms[-1] is not None
    skipped = norms.index(next(norm for norm in norms if norm is not None))
    assert [line["skipped"] for line in log_of(result)][:: len(norms) - 1] == [1, norms.count(None)] and skipped > 0
    exact = train(base, objective, TrainConfig(1))
    found = next(norm for norm in norms if norm is not None)
    assert found == pytest.approx(log_of(exact)[0]["grad_norm"], rel=2**-7)  # unscaled; the weights are still those
    assert changed(result.model, base) != []


def test_dropout_is_the_runs_own() -> None:
    """Not of what was drawn before, and nothing that is drawn afterwards depends on it."""
    torch.manual_seed(0)
    expected = train(Dropping(1.0), Noise(), TrainConfig(3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = train(Dropping(1.0), Noise(), TrainConfig(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(found, expected)
    assert found.losses != train(Scaled(1.0), Noise(), TrainConfig(3)).losses
    # Batches that are all the same are dropped from differently in every step.
    assert len(set(train(Dropping(1.0), Fixed(constant(5.0, 64)), TrainConfig(3, lr=1e-30)).losses)) == 3


class NotANumber(Scaled):
    """Its gradient is never finite, though its prediction is."""

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (sample + (0 * self.factor).sqrt(),)


def test_gradients_that_never_become_finite_end_their_run_and_no_other(tmp_path: Path) -> None:
    """Halved in every step, the scale would be 0 after 166 of them, and its inverse infinite."""
    with pytest.raises(FloatingPointError, match="the gradient must become finite in float16 as its scale falls"):
        train(NotANumber(1.0), Fixed(constant(1.5)), TrainConfig(300, precision="fp16"))
    with pytest.raises(FloatingPointError, match="some step must be applied, got 4 whose"):
        train(NotANumber(1.0), Fixed(constant(1.5)), TrainConfig(4, precision="fp16"), work=tmp_path)
    with pytest.raises(FloatingPointError, match="some step must be applied"):  # also from what the checkpoint says
        train(NotANumber(1.0), Fixed(constant(1.5)), TrainConfig(4, precision="fp16"), work=tmp_path)


def test_a_gradient_that_overflows_when_it_is_unscaled_is_never_applied(tmp_path: Path) -> None:
    """The scaler looks before it unscales: a finite 1e38 over a scale of 2^-2 is infinite."""
    x_t = torch.full((1, 1, 2, 2), 1e25)
    rows = Rows(x_t, torch.zeros(1, dtype=torch.int64), None, x_t * (1 - 2**-23))
    with pytest.raises(FloatingPointError, match="gradient"):
        train(Scaled(1.0), Fixed(rows), TrainConfig(60, precision="fp16"), work=tmp_path, checkpoint_every=1)
    kept = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    assert kept["student.factor"].item() == 1.0


def test_weights_that_are_not_finite_are_never_a_checkpoint(tmp_path: Path) -> None:
    """A decay by 1e10 * 1e10 takes 1e20 over the largest float; loss and gradient are finite."""
    x_t = torch.full((1, 1, 2, 2), 1e-20)
    rows = Rows(x_t, torch.zeros(1, dtype=torch.int64), None, torch.zeros_like(x_t))
    config = TrainConfig(3, lr=1e10, weight_decay=1e10)
    with pytest.raises(FloatingPointError, match="the weights must stay finite, got NaN or infinity after step 1"):
        train(Scaled(1e20), Fixed(rows), config, work=tmp_path, checkpoint_every=1)
    assert not (tmp_path / "checkpoint.safetensors").exists()
