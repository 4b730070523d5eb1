"""Attribution by unlearning the query: the training images whose loss rises with it are what it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from guda_fast import ops
from guda_fast._validate import check_int, check_real
from guda_fast.attribution import attribute
from guda_fast.baselines.asked import check_asked
from guda_fast.counterfactuals.selection import selected
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.deltas import DeltaBank
from guda_fast.diffusion import Protocol
from guda_fast.diffusion.conditions import Conditions, map_tensors

_WHERE = "query_unlearning"
_BLOCK = 16  # queries whose models are in memory together
_PER_SAMPLE = 16  # images whose gradients are
Weights = dict[str, Tensor]


def query_unlearning(
    bank: DeltaBank,
    protocol: Protocol,
    data: GroupedImages,
    queries: Tensor,
    ids: Sequence[int],
    *,
    conditions: Conditions | None = None,
    rise: float = 0.5,
    damping: float = 0.1,
    images_per_group: int | None = None,
    trained: str | tuple[str, ...] = "all",
    batch_size: int | None = None,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Unlearn each query with one natural-gradient step, and see which groups' losses rise.

        theta_q = theta_0 + s (F + damping mean(F))^-1 g,     g = grad L(q; theta_0)
        score_k(q) = mean over x in D_k of L(x; theta_q) - L(x; theta_0)

    L is the protocol's weighted error, F the diagonal of the Fisher information of the training images (mean squared
    gradients of single draws), and s is such that, to first order, L(q) rises by the share ``rise`` of itself: the
    paper tunes a constant instead, whose best value depends on the network. Losses are compared with the same noise,
    by the engine that scores counterfactuals: here the training images are the queries, and the queries the groups.

    bank: gives the base; its groups are not used.
    protocol: the draws of all losses; weighting "simple" is the paper's.
    data: the training images and their groups. queries: x0 [(N, C, H, W), float32]. ids: of them [N, 0..2^64-1]
    conditions: of the queries, for a conditional model; those of the training images are ``data.conditions``.
    rise: see above [> 0]. damping: of F [>= 0]. images_per_group: random images that stand for a group [all].
    trained: the parameters that change, "all", "cross-attention", "cross-attention-kv" (the paper's), or name patterns.
    batch_size: rows a forward [the engine's choice]. seed: of the random images. advance: called with rows done.

    Returns scores [(N, K), float64], groups in the order of ``data.groups``.
    Raises TypeError or ValueError naming the argument.
    Source: Wang et al., Data Attribution for Text-to-Image Models by Unlearning Synthesized Images (2024).
    """
    check_asked(_WHERE, data, queries, conditions)
    check_real(_WHERE, "rise", rise, np.nextafter(0, 1))
    check_real(_WHERE, "damping", damping, 0.0)
    if len(ids) != len(queries):
        raise ValueError(f"{_WHERE}: ids must be those of {len(queries)} queries, got {len(ids)}")
    told = advance or (lambda rows: None)
    members = _sampled(data, images_per_group, seed)
    rows = torch.cat(members).unique()
    images, of_group = data.take(rows), [torch.searchsorted(rows, index).numpy() for index in members]
    known = None if data.conditions is None else data.conditions[rows]
    losses = _Losses(bank.model, protocol, trained, told)
    fisher = losses.fisher(images, losses.placed(known, len(images)))
    asked = losses.placed(conditions, len(queries))
    floor = damping * _mean(fisher)
    preconditioner = {name: 1 / (value + floor) for name, value in fisher.items()}
    found = np.empty((len(queries), len(members)))
    for begin in range(0, len(queries), _BLOCK):
        block = range(begin, min(begin + _BLOCK, len(queries)))
        models = {
            str(query): losses.unlearned(
                queries[query : query + 1], int(ids[query]), asked[query : query + 1], preconditioner, rise
            )
            for query in block
        }
        changes = attribute(
            images,
            DeltaBank.load(losses.model, models, scheduler=bank.scheduler),
            protocol,
            conditions=known,
            batch_size=batch_size,
            device=losses.device,
        )
        told(len(images) * protocol.draws * (len(block) + 1))
        found[block.start : block.stop] = np.stack([changes.scores[index].mean(axis=0) for index in of_group], axis=1)
    return found


def _sampled(data: GroupedImages, count: int | None, seed: int) -> list[Tensor]:
    """Which images stand for each group, in order."""
    if count is None:
        return list(data.members.values())
    check_int(_WHERE, "images_per_group", count, 1)
    generator = torch.Generator().manual_seed(seed)
    return [
        index[torch.randperm(len(index), generator=generator)[:count]].sort().values for index in data.members.values()
    ]


class _Losses:
    """Gradients of the protocol's weighted error of single images, in the parameters that change."""

    def __init__(
        self, model: nn.Module, protocol: Protocol, trained: str | tuple[str, ...], advance: Callable[[int], object]
    ) -> None:
        self.model, self.protocol, self._advance = model, protocol, advance
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        self._dtype = next(iter(parameters.values())).dtype
        self._changing = {name: parameters[name].detach() for name in selected(model, trained)}
        self._draws = torch.arange(protocol.draws)

    def _rows(self, x0: Tensor, ids: Sequence[int], query: Tensor, draw: Tensor) -> tuple[Tensor, ...]:
        """x_t, what the model should predict, its time and the weight of each row."""
        table = self.protocol.table
        numbers = torch.from_numpy(np.array(ids, dtype=np.uint64).view(np.int64))
        counters = (query, numbers[query], torch.from_numpy(table.timestep)[draw], torch.from_numpy(table.sample)[draw])
        noise: dict[str, Any] = {"seed": self.protocol.seed, "antithetic": self.protocol.antithetic}
        scales = (table.x0_scale, table.eps_scale, table.target_x0_scale, table.target_eps_scale)
        of_x, of_eps, to_x, to_eps = (torch.from_numpy(scale).to(x0.dtype)[draw] for scale in scales)
        x_t = ops.add_noise(x0, *counters, of_x, of_eps, **noise)
        target = ops.add_noise(x0, *counters, to_x, to_eps, **noise)
        time, weight = torch.from_numpy(table.model_timestep)[draw], torch.from_numpy(table.weight).to(x0.dtype)[draw]
        return tuple(part.to(self.device) for part in (x_t, target, time, weight))

    def placed(self, conditions: Conditions | None, count: int) -> Conditions:
        """Where the model is, as the forward takes them."""
        return (Conditions.none(count) if conditions is None else conditions).to(self.device, self._dtype)

    def _loss(
        self, weights: Weights, given: Mapping[str, Any], x_t: Tensor, target: Tensor, time: Tensor, weight: Tensor
    ) -> Tensor:
        """The weighted error, summed over rows [()]. given: the conditions of the rows."""
        arguments = {**given, "return_dict": False}
        prediction = functional_call(self.model, weights, (x_t, time), arguments)[0][:, : x_t.shape[1]]
        loss: Tensor = (weight * (prediction - target).square().flatten(1).sum(1)).sum()
        return loss

    def fisher(self, images: Tensor, conditions: Conditions) -> Weights:
        """The mean squared gradient of one draw of each image, whose draws take turns; by parameter."""
        sums = {name: torch.zeros_like(value) for name, value in self._changing.items()}

        def loss(weights: Weights, given: dict[str, Any], *row: Tensor) -> Tensor:
            one = map_tensors(lambda tensor: tensor[None], given)
            return self._loss(weights, one, *(part[None] for part in row))

        each = vmap(grad(loss), (None, *(0,) * 5))
        for some in torch.arange(len(images)).split(_PER_SAMPLE):
            rows = self._rows(images, range(len(images)), some, some % self.protocol.draws)
            given = conditions.take(conditions.row[some].to(self.device))
            with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
                gradients = each(self._changing, given, *rows)
            for name, gradient in gradients.items():
                sums[name] += gradient.square().sum(0) * self.protocol.draws**2
            self._advance(len(some))
        return {name: value / len(images) for name, value in sums.items()}

    def unlearned(
        self, x0: Tensor, number: int, condition: Conditions, preconditioner: Weights, rise: float
    ) -> Weights:
        """All weights after the step that makes the query [(1, C, H, W)] of this id less likely."""
        rows = self._rows(x0, [number], torch.zeros(self.protocol.draws, dtype=torch.int64), self._draws)
        changing = {name: value.clone().requires_grad_() for name, value in self._changing.items()}
        loss = self._loss(changing, condition.take(condition.row.expand(len(self._draws)).to(self.device)), *rows)
        gradients = dict(zip(changing, torch.autograd.grad(loss, list(changing.values())), strict=True))
        step = {name: preconditioner[name] * gradient for name, gradient in gradients.items()}
        slope = sum(float((gradient.double() * step[name].double()).sum()) for name, gradient in gradients.items())
        if not slope > 0:
            raise FloatingPointError(
                f"{_WHERE}: the gradient of a query's loss must be finite and not zero, got {slope}"
            )
        length = rise * float(loss.detach()) / slope
        self._advance(len(self._draws))
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        for name, direction in step.items():
            weights[name] += length * direction
        return weights


def _mean(fisher: Weights) -> float:
    """Over all entries of all parameters."""
    return sum(float(value.double().sum()) for value in fisher.values()) / sum(
        value.numel() for value in fisher.values()
    )
