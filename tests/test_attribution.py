"""attribute(): against posterior means and Gaussian KLs in float64, and what scores must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import guda_fast as gf
from guda_fast import reference
from tiny import Scaled, perturbed, tiny_unet

SCHEDULER = DDPMScheduler(num_train_timesteps=100)


def bank_of(base, *others, scheduler=SCHEDULER, **options):
    return gf.DeltaBank.load(base, {f"g{k}": other for k, other in enumerate(others)}, scheduler=scheduler, **options)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand((7, 1, 8, 8), generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def models() -> list[torch.nn.Module]:
    base = tiny_unet()
    return [base, perturbed(base, 0.01, 1), perturbed(base, 0.02, 2)]


@pytest.fixture
def bank(models) -> gf.DeltaBank:
    return bank_of(*models)


def gaussian_kl_scores(models, images, protocol, ids) -> np.ndarray:
    """ELBO drops from the posterior means of every model, in float64, one query and draw at a time.

    Written from the definitions: q(x_{t-1} | x_t, x0) against p(x_{t-1} | x_t) with the same variance.
    """
    betas = protocol.schedule.betas
    bar = np.cumprod(1 - betas)
    kinds = {
        "epsilon": lambda out, x_t, bar_t: (x_t - np.sqrt(1 - bar_t) * out) / np.sqrt(bar_t),
        "sample": lambda out, x_t, bar_t: out,
        "v_prediction": lambda out, x_t, bar_t: np.sqrt(bar_t) * x_t - np.sqrt(1 - bar_t) * out,
    }
    to_x0 = kinds[protocol.schedule.prediction_type]
    scores = np.zeros((len(images), len(models) - 1))
    for i, image in enumerate(images.double()):
        for t in protocol.timesteps:
            for s in range(protocol.samples):
                negated = protocol.antithetic and s % 2 == 1
                counters = (ids[i : i + 1], torch.tensor([t]), torch.tensor([s - negated]), image.numel())
                eps = reference.standard_normals(*counters, seed=protocol.seed, dtype=torch.float64)
                eps = (-eps if negated else eps).reshape(image.shape)
                x_t = np.sqrt(bar[t]) * image + np.sqrt(1 - bar[t]) * eps
                previous, beta = bar[t - 1], betas[t]
                variance = beta * (1 - previous) / (1 - bar[t])
                if protocol.weighting == "elbo_fixed_large":
                    variance = beta

                def mean(x0, x_t=x_t, previous=previous, beta=beta, t=t):
                    by_x0 = np.sqrt(previous) * beta / (1 - bar[t])
                    by_x_t = np.sqrt(1 - beta) * (1 - previous) / (1 - bar[t])
                    return by_x0 * x0 + by_x_t * x_t

                kls = []
                for model in models:
                    out = model(x_t[None], torch.tensor([t]), return_dict=False)[0][0, : len(image)]
                    difference = mean(image) - mean(to_x0(out, x_t, bar[t]))
                    kls.append((difference**2).sum().item() / (2 * variance))
                scores[i] += (np.array(kls[1:]) - kls[0]) / protocol.samples
    return scores


@torch.no_grad()
@pytest.mark.parametrize(
    ("prediction_type", "weighting", "samples", "antithetic", "out_channels"),
    [
        ("epsilon", "elbo", 1, False, 1),
        ("epsilon", "elbo_fixed_large", 2, False, 1),
        ("epsilon", "elbo", 2, True, 1),
        ("epsilon", "elbo", 1, False, 2),
        ("v_prediction", "elbo", 2, False, 1),
        ("sample", "elbo", 1, False, 1),
    ],
)
def test_float64_scores_are_differences_of_gaussian_kls(
    images, prediction_type, weighting, samples, antithetic, out_channels
) -> None:
    images = images[:3]
    base = tiny_unet(out_channels=out_channels).double()
    models = [base, perturbed(base, 0.01, 1), perturbed(base, 0.02, 2)]
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type)
    protocol = gf.Protocol.from_scheduler(
        scheduler, start=1, stride=14, weighting=weighting, samples=samples, antithetic=antithetic
    )
    result = gf.attribute(images, bank_of(*models, scheduler=scheduler), protocol, precision="fp64")
    ids = torch.from_numpy(np.array(result.query_ids, dtype=np.uint64).view(np.int64))
    expected = gaussian_kl_scores(models, images, protocol, ids)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-6)


def test_closed_form_score_of_scaled_models() -> None:
    """eps_hat = f x_t makes each error a quadratic in known noise."""
    x0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    protocol = gf.Protocol(gf.Schedule.from_scheduler(SCHEDULER), (50,), weighting="simple")
    bank = gf.DeltaBank.load(Scaled(0.0), {"half": Scaled(0.5)}, scheduler=SCHEDULER)
    result = gf.attribute(x0, bank, protocol, ids=[9])
    eps = reference.standard_normals(torch.tensor([9]), torch.tensor([50]), torch.tensor([0]), 16, seed=42)[0].double()
    signal, sigma = protocol.schedule.scales([50])
    x_t = signal[0] * x0.flatten().double() + sigma[0] * eps
    expected = ((0.5 * x_t - eps) ** 2).sum() - (eps**2).sum()
    # Normals and products are float32.
    assert result.scores[0, 0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def protocol() -> gf.Protocol:
    return gf.Protocol.from_scheduler(SCHEDULER, start=5, stride=10)


def test_scores_do_not_depend_on_batch_size_order_subset_or_threads(images, bank, protocol) -> None:
    expected = gf.attribute(images, bank, protocol)
    scale = np.abs(expected.scores).max()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    for batch_size in (1, 3, 64, 1000):
        found = gf.attribute(images, bank, protocol, batch_size=batch_size)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5 * scale, rtol=0)
    shuffled = gf.attribute(images[order], bank, protocol)
    np.testing.assert_allclose(shuffled.scores, expected.scores[order], atol=1e-5 * scale, rtol=0)
    alone = gf.attribute(images[4:5], bank, protocol)
    np.testing.assert_allclose(alone.scores, expected.scores[4:5], atol=1e-5 * scale, rtol=0)
    tiled = gf.attribute(images, bank, protocol, estimator=gf.Full(tile_bytes=1))
    np.testing.assert_allclose(tiled.scores, expected.scores, atol=1e-5 * scale, rtol=0)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        other = gf.attribute(images, bank, protocol)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(other.scores, expected.scores, atol=1e-5 * scale, rtol=0)


def test_noised_queries_are_bit_equal_at_every_batch_size(images, models, protocol) -> None:
    """Whatever the batches, the base sees the same x_t for the same (query, draw)."""
    seen: list[set[tuple[int, bytes]]] = []

    class Recorder(torch.nn.Module):
        config = models[0].config

        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, sample, timestep, return_dict):
            rows = zip(timestep.tolist(), sample, strict=True)
            seen[-1].update((t, x.numpy().tobytes()) for t, x in rows)
            return (self.factor * sample,)

    other = Recorder()
    torch.nn.init.constant_(other.factor, 0.6)
    bank = bank_of(Recorder(), other)
    for batch_size in (1, 9, 64):
        seen.append(set())
        gf.attribute(images, bank, protocol, batch_size=batch_size, plan="swap")
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == len(images) * protocol.draws


def test_duplicates_are_computed_once_and_reported_each(images, bank, protocol) -> None:
    forwards = []
    twice = torch.cat([images[:2], images[:1]])
    result = gf.attribute(twice, bank, protocol, progress=lambda done, total: forwards.append((done, total)))
    assert forwards[-1] == (2 * 3 * protocol.draws,) * 2
    np.testing.assert_array_equal(result.scores[0], result.scores[2])
    assert len(result) == 3 and result.query_ids[0] == result.query_ids[2]


def test_the_base_is_resident_again_after_success_error_and_cancellation(images, models, bank, protocol) -> None:
    def check() -> None:
        assert bank.applied_group is None
        for found, wanted in zip(bank.model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(found, wanted)

    gf.attribute(images, bank, protocol)
    check()
    calls = iter(range(1000))
    with pytest.raises(gf.CancelledError, match=r"cancelled after \d+ of \d+ forwards"):
        gf.attribute(images, bank, protocol, batch_size=16, cancel=lambda: next(calls) > 8)
    check()


def test_the_shifted_model_scores_positive_where_it_is_worse(images, protocol) -> None:
    bank = bank_of(Scaled(0.5), Scaled(3.0), Scaled(0.5), allow_identical=True)
    scores = gf.attribute(images, bank, protocol).scores
    assert (scores[:, 0] > 0).all()
    assert (scores[:, 1] == 0).all()


def test_a_model_that_gives_nan_is_named(images, protocol) -> None:
    bank = bank_of(Scaled(0.5), Scaled(3e38))
    with pytest.raises(FloatingPointError, match="got inf from group 'g0' for query 0 at draw 0"):
        gf.attribute(images * 1e30, bank, protocol)


def test_schedule_of_another_model_is_refused(images, bank) -> None:
    longer = gf.Protocol.from_scheduler(DDPMScheduler(), start=10, stride=10)
    with pytest.raises(ValueError, match=r"bank's noise schedule \(100 timesteps.*got 1000 timesteps"):
        gf.attribute(images, bank, longer)
    v = gf.Protocol.from_scheduler(DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="bank's prediction type 'epsilon', got 'v_prediction'"):
        gf.attribute(images, bank, v)
    same_betas = gf.Protocol.from_scheduler(DDIMScheduler(num_train_timesteps=100), start=50, stride=50)
    assert len(gf.attribute(images, bank, same_betas)) == 7


def test_bad_arguments(images, bank, protocol) -> None:
    cases = [
        ((images, models, protocol), {}, TypeError, "bank must be a DeltaBank"),
        ((images, bank, "elbo"), {}, TypeError, "protocol must be a Protocol, got 'elbo'"),
        ((images, bank, protocol), {"estimator": "full"}, TypeError, "estimator must be an estimator such as Full"),
        ((images, bank, protocol), {"progress": "yes"}, TypeError, "progress must be a bool or a callback"),
        ((images, bank, protocol), {"cancel": True}, TypeError, "cancel must be a callback"),
        ((images, bank, protocol), {"device": "gpu"}, ValueError, "device must be a device such as 'cpu'"),
        ((images, bank, protocol), {"precision": "float8"}, ValueError, "precision must be one of"),
        ((images, bank, protocol), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ((images[..., :4], bank, protocol), {}, ValueError, "query 0 must have 1 x 8 x 8"),
        ((images.expand(7, 3, 8, 8), bank, protocol), {}, ValueError, "query 0 must have 1 x 8 x 8"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            gf.attribute(*arguments, **options)
    with pytest.raises(TypeError, match="queries must be a tensor of shape"):
        gf.attribute("folder", bank_of(Scaled(0.1), Scaled(0.2)), protocol)


def test_output_channels_must_fit(images, protocol) -> None:
    base = tiny_unet(out_channels=3)
    with pytest.raises(ValueError, match="1 output channels, or 2 with learned variance, got 3"):
        gf.attribute(images, bank_of(base, perturbed(base)), protocol)


def test_a_bank_with_a_group_applied_is_refused(images, bank, protocol) -> None:
    bank.apply("g1")
    with pytest.raises(ValueError, match="bank must hold its base, got group 'g1' applied"):
        gf.attribute(images, bank, protocol)
    assert bank.applied_group == "g1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_an_absent_cuda_device_is_named(images, bank, protocol) -> None:
    with pytest.raises(ValueError, match="device must be available, got 'cuda'"):
        gf.attribute(images, bank, protocol, device="cuda")
