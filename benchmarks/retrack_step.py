"""A step of ReTrack against one that makes its targets image by image, and against two plain training steps.

The loops fetch one neighbour at a time. "loop" also runs the network on one forget image at a time; "loop, one
forward" runs it on all at once, as the vectorised step does. All optimise with AdamW in `train`, or as it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contenders import architecture
from benchmarks.registry import Benchmark, Case, Contender
from benchmarks.workloads import ARCHITECTURES
from guda_fast import Schedule
from guda_fast.counterfactuals import Batch, DenoisingObjective, ReTrackObjective, Rows, TrainConfig, train
from guda_fast.datasets import GroupedImages, load_digits

BATCH_SIZE = 64
STEPS = 2  # of a timed call, which also copies the base
LR = 1e-5


class LoopedReTrack(ReTrackObjective):
    """The same rows and targets, one image and one neighbour after another."""

    def draw(self, generator: torch.Generator) -> Batch:
        """The rows of a fresh step."""
        retain, forget = self.retain.rows(generator), list(self.singles(generator))
        joined = [torch.stack([row[part] for row in forget]) for part in range(3)]
        return Batch(retain, Rows(joined[0], joined[1], None, joined[2]))

    def singles(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x_t, t and target of each forget image."""
        drawn = torch.randint(len(self.forget), (self.retain.batch_size,), generator=generator)
        x0, noising = self.data.take(self.forget[drawn]), self.retain.noising
        t, eps = noising.sample(x0, generator)
        for number, image, step, noise in zip(drawn, x0, t, eps, strict=True):
            a, b = noising.x0_scale[step], noising.eps_scale[step]
            x_t = a * image + b * noise
            exponents, directions = [], []
            for neighbour in self.neighbours[number]:
                difference = x_t - a * self.data.take(neighbour[None])[0]
                exponents.append(-difference.square().sum() / (2 * b.square()))
                directions.append(difference / b)
            target = torch.zeros_like(x_t)
            for share, direction in zip(torch.softmax(torch.stack(exponents), dim=0), directions, strict=True):
                target += share * direction
            yield x_t, step, target


def _looped_steps(base: nn.Module, objective: LoopedReTrack) -> None:
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = objective.retain.rows(generator)
        assert isinstance(rows.target, Tensor)
        (model(rows.x_t, rows.t, return_dict=False)[0] - rows.target).square().mean().backward()
        for x_t, t, target in objective.singles(generator):
            error = (model(x_t[None], t, return_dict=False)[0][0] - target).square().mean()
            (objective.forget_weight * error / objective.retain.batch_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _check(vectorised: ReTrackObjective, looped: LoopedReTrack) -> None:
    found, expected = (objective.draw(torch.Generator().manual_seed(1)).forget for objective in (vectorised, looped))
    assert found is not None and expected is not None
    assert isinstance(found.target, Tensor) and isinstance(expected.target, Tensor)
    # Exponents of 1e5 in float32 move shares where two neighbours are almost as near.
    torch.testing.assert_close(found.target, expected.target, rtol=1e-3, atol=1e-2)


def step_case(quick: bool) -> Case:
    """Steps of training on digits."""
    kind = ARCHITECTURES["digits"]
    base, schedule, data = kind.make(), Schedule.from_scheduler(kind.scheduler()), load_digits()
    batch_size = 4 if quick else BATCH_SIZE
    vectorised, looped = (
        made(data, "3", schedule, batch_size=batch_size) for made in (ReTrackObjective, LoopedReTrack)
    )
    plain = DenoisingObjective(data, schedule, batch_size=batch_size)

    def trained(name: str, objective: ReTrackObjective | DenoisingObjective, steps: int) -> Contender:
        config = TrainConfig(steps, lr=LR)
        return Contender(name, architecture(), lambda number: train(base, objective, config))

    return Case(
        op="retrack step",
        shapes=f"digits UNet 1x8x8 B={batch_size} K=10, {STEPS} steps",
        dtype="float32",
        bytes=0,
        input_sets=1,
        rival=Contender("loop", architecture(), lambda number: _looped_steps(base, looped)),
        contenders=[
            trained("loop, one forward", looped, STEPS),
            trained("vectorised", vectorised, STEPS),
            trained("two plain steps", plain, 2 * STEPS),
        ],
        check=partial(_check, vectorised, looped),
    )


def draw_case(shape: tuple[int, int, int], quick: bool) -> Case:
    """Making the rows of a step, without the network."""
    pixels = torch.randint(256, (200 if quick else 4000, *shape), dtype=torch.uint8)
    data = GroupedImages(pixels, {"forget": torch.arange(len(pixels) // 10)})
    schedule = Schedule.from_scheduler(ARCHITECTURES["digits"].scheduler())
    vectorised, looped = (
        made(data, "forget", schedule, batch_size=BATCH_SIZE) for made in (ReTrackObjective, LoopedReTrack)
    )
    generator = torch.Generator().manual_seed(0)
    size = BATCH_SIZE * 10 * pixels[0].nbytes
    return Case(
        op="retrack draw",
        shapes="{}x{}x{} B={} K=10".format(*shape, BATCH_SIZE),
        dtype="float32",
        # Neighbours are read as bytes and are written as floats.
        bytes=5 * size,
        input_sets=1,
        rival=Contender("loop", architecture(), lambda number: looped.draw(generator)),
        contenders=[Contender("vectorised", architecture(), lambda number: vectorised.draw(generator))],
        check=partial(_check, vectorised, looped),
    )


def _cases(quick: bool) -> list[Callable[[], Case]]:
    return [partial(step_case, quick), *(partial(draw_case, shape, quick) for shape in ((1, 8, 8), (3, 32, 32)))]


BENCHMARK = Benchmark("retrack_step", _cases, ("tests/test_retrack.py",), repetitions=11)
