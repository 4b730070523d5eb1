"""Standard errors: against plain formulas, and against the spread of scores over seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import guda_fast as gf
from guda_fast.estimators.cells import standard_error, std_error_kind
from tiny import Scaled

SCHEDULE = gf.Schedule.from_scheduler(DDPMScheduler(num_train_timesteps=100))


def test_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    several = gf.Protocol(SCHEDULE, (10, 20), samples=3)
    terms = rng.standard_normal((4, 6))
    expected = [np.sqrt(3 * sum(np.var(row[t : t + 3], ddof=1) for t in (0, 3))) for row in terms]
    np.testing.assert_allclose(standard_error(terms, several), expected)
    pairs = gf.Protocol(SCHEDULE, (10, 20), samples=4, antithetic=True)
    terms = rng.standard_normal((4, 8))
    sums = terms.reshape(4, 2, 2, 2).sum(axis=3)
    np.testing.assert_allclose(standard_error(terms, pairs), np.sqrt(2 * np.var(sums, axis=2, ddof=1).sum(axis=1)))
    collapsed = gf.Protocol(SCHEDULE, (10, 20, 30, 40, 50))
    terms = rng.standard_normal((4, 5))
    expected = np.sqrt((terms[:, 0] - terms[:, 1]) ** 2 + 3 * np.var(terms[:, 2:], axis=1, ddof=1))
    np.testing.assert_allclose(standard_error(terms, collapsed), expected)
    assert np.isnan(standard_error(np.ones((1, 1)), gf.Protocol(SCHEDULE, (10,)))).all()


def test_kinds() -> None:
    for options, kind in [
        ({"samples": 2}, "samples"),
        ({"samples": 4, "antithetic": True}, "antithetic pairs"),
        ({"samples": 2, "antithetic": True}, "collapsed pairs (approximate)"),
        ({}, "collapsed pairs (approximate)"),
    ]:
        assert std_error_kind(gf.Protocol(SCHEDULE, (10, 20), **options)) == kind
    assert std_error_kind(gf.Protocol(SCHEDULE, (10,))) == "none"
    assert std_error_kind(gf.Protocol(SCHEDULE, (10,), samples=2, antithetic=True)) == "none"


@pytest.mark.parametrize("antithetic", [False, True])
def test_standard_error_is_the_spread_over_seeds(antithetic: bool) -> None:
    """64 seeds estimate a standard deviation to 9 % (one sigma): four sigma are allowed."""
    x0 = torch.rand((16, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    bank = gf.DeltaBank.load(Scaled(0.4), {"k": Scaled(0.6)})
    results = [
        gf.attribute(
            x0, bank, gf.Protocol(SCHEDULE, (20, 40, 60), samples=8, seed=seed, antithetic=antithetic), batch_size=512
        )
        for seed in range(64)
    ]
    spread = np.std([result.scores[:, 0] for result in results], axis=0, ddof=1)
    stated = np.sqrt(np.mean([result.std_error[:, 0] ** 2 for result in results], axis=0))
    assert np.abs(np.log(stated / spread)).max() < 4 * 0.09
