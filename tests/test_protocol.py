"""Protocols: which draws, with which weights, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from diffusers import DDPMScheduler

from guda_fast import Protocol, Schedule

SCHEDULE = Schedule.from_scheduler(DDPMScheduler())


def test_from_scheduler_counts_from_start_in_strides_below_stop() -> None:
    protocol = Protocol.from_scheduler(DDPMScheduler(), start=10, stride=10)
    assert protocol.timesteps == tuple(range(10, 1000, 10))
    assert Protocol.from_scheduler(SCHEDULE, start=3, stop=10, stride=3).timesteps == (3, 6, 9)
    assert Protocol.from_scheduler(SCHEDULE).timesteps == tuple(range(1, 1000))


def test_table_has_samples_innermost_and_divides_weights_by_them() -> None:
    protocol = Protocol(SCHEDULE, (5, 7), samples=3)
    table = protocol.table
    assert protocol.draws == len(table) == 6
    assert table.timestep.tolist() == [5, 5, 5, 7, 7, 7]
    assert table.sample.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(table.weight.reshape(2, 3).sum(axis=1), SCHEDULE.weights("elbo", [5, 7]))
    np.testing.assert_allclose(table.x0_scale**2 + table.eps_scale**2, 1)


def test_to_dict_is_json_and_tells_protocols_apart() -> None:
    variants = [
        Protocol(SCHEDULE, (5,)),
        Protocol(SCHEDULE, (6,)),
        Protocol(SCHEDULE, (5,), weighting="simple"),
        Protocol(SCHEDULE, (5,), weighting=(1.0,)),
        Protocol(SCHEDULE, (5,), samples=2),
        Protocol(SCHEDULE, (5,), samples=2, antithetic=True),
        Protocol(SCHEDULE, (5,), seed=1),
        Protocol(Schedule(SCHEDULE.betas, "v_prediction"), (5,)),
        Protocol(Schedule(SCHEDULE.betas * 0.5), (5,)),
    ]
    assert len({json.dumps(protocol.to_dict()) for protocol in variants}) == len(variants)
    assert Protocol(SCHEDULE, (5,)).to_dict() == variants[0].to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": (1000,)}, "timesteps must be between 0 and 999, got 1000"),
        ({"timesteps": (0,)}, "timesteps must be at least 1"),
        ({"timesteps": ()}, "timesteps must name at least one"),
        ({"timesteps": (4, 5, 4)}, "timesteps must be distinct, got 4"),
        ({"timesteps": (4,), "samples": 0}, "samples must be between 1 and 65536, got 0"),
        ({"timesteps": (4,), "samples": 3, "antithetic": True}, "samples must be even"),
        ({"timesteps": (4,), "seed": -1}, "seed must be between 0"),
        ({"timesteps": (4,), "seed": 2**64}, "seed must be between 0"),
        ({"timesteps": (4,), "weighting": "ebo"}, "weighting must be one of"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(SCHEDULE, **arguments)


def test_from_scheduler_errors() -> None:
    for arguments, message in [
        ({"start": 1000}, "start must be between 0 and 999"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"start": 10, "stop": 10}, "stop must be between 11 and 1000"),
    ]:
        with pytest.raises(ValueError, match=message):
            Protocol.from_scheduler(SCHEDULE, **arguments)
    with pytest.raises(TypeError, match="stride must be an integer"):
        Protocol.from_scheduler(SCHEDULE, stride=2.5)


def test_the_order_of_timesteps_does_not_matter() -> None:
    rising = Protocol(SCHEDULE, (5, 7, 9), weighting=(1.0, 2.0, 3.0))
    shuffled = Protocol(SCHEDULE, (9, 5, 7), weighting=(3.0, 1.0, 2.0))
    assert shuffled.timesteps == (5, 7, 9) and shuffled.weighting == (1.0, 2.0, 3.0)
    assert rising.to_dict() == shuffled.to_dict()


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="schedule must be a Schedule or a FlowSchedule, got DDPMScheduler"):
        Protocol(DDPMScheduler(), (1,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="antithetic must be"):
        Protocol(SCHEDULE, (1,), antithetic="no")  # type: ignore[arg-type]
