"""Anchors: the conditions that the conditions of a group are redirected to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from guda_fast._validate import check_choice, check_real, check_tensor, describe
from guda_fast.datasets.grouped import GroupedImages
from guda_fast.diffusion.conditions import Conditions

Key = str | int | bytes
"""What stands for a condition: its key, or its row where the conditions have no keys."""
Table = Mapping[Key, Mapping[Key, float]]
"""For each condition of a group its anchors with their weights [>= 0, in any scale]."""

KINDS = ("weighted_style", "uniform", "removed", "matched")
_WHERE = "Anchors"
_DESCRIPTORS = 3  # a group, where they are made of its images


@dataclass(frozen=True, eq=False)
class Anchors:
    """For each condition of a group: candidate conditions, and how probable each is.

    conditions: of the group's images [(G,), int64, rising]. probability: over all conditions of the data
        [(G, U), float64; rows have the sum 1]
    """

    conditions: Tensor
    probability: Tensor

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A fresh anchor for each of these conditions [(B,), int64]. rows: of ``conditions`` [(B,), int64]."""
        uniform = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator)
        cumulative = self._cumulative[torch.searchsorted(self.conditions, rows)]
        # The first entry above a number in [0, 1) is one where the sum has just risen: of positive probability.
        return torch.searchsorted(cumulative, uniform, right=True).squeeze(1)

    @cached_property
    def _cumulative(self) -> Tensor:
        cumulative = self.probability.cumsum(dim=1)
        return cumulative / cumulative[:, -1:]


def make_anchors(
    anchors: str | Table,
    data: GroupedImages,
    group: str,
    *,
    descriptors: Mapping[str, Tensor] | None = None,
    beta: float = 2.0,
    eta: float = 0.3,
) -> Anchors:
    """The anchors of a group's conditions.

    anchors: a table, or one of
        ``weighted_style``: the condition of another group's image with the same object, groups with
            pi_s = (1 - eta) softmax_s( beta cos(e, p_s) ) + eta / (number of other groups), e a random descriptor of
            the group, p_s the mean of the descriptors of s;
        ``uniform``: the same with all other groups alike;
        ``matched``: the condition of an image outside of the group with the same object, all such images alike;
        ``removed``: the condition without the group, ``data.removed``.
        Conditions have the same object where ``data.removed`` agrees; without it, every group must have one condition.
        Control groups are no styles: no anchor comes from them.
    descriptors: embeddings of each group, as of phrases that describe its style, compared after division by their
        norms [(J, E), floating, J >= 1, by group; None: mean images of three parts of a group, less the mean of all]
    beta: [>= 0]. eta: [0..1].

    Raises TypeError or ValueError naming the argument: also where the table or the descriptors do not have the
    group, and where a condition has no anchor but itself. Source: GUDA (arXiv 2601.22651), GUDA-C.

    >>> members = {"cat": torch.tensor([0]), "dog": torch.tensor([1]), "eel": torch.tensor([2])}
    >>> labels = Conditions({"class_labels": torch.arange(3)}, torch.arange(3))
    >>> data = GroupedImages(torch.zeros(3, 1, 8, 8), members, labels)
    >>> make_anchors("uniform", data, "dog").probability
    tensor([[0.5000, 0.0000, 0.5000]], dtype=torch.float64)
    """
    given = conditions_of(_WHERE, data)
    used = given.row[data.group(group)].unique()
    if isinstance(anchors, Mapping):
        return _checked(given, group, Anchors(used, _from_table(given, group, used, anchors)))
    check_choice(_WHERE, "anchors", anchors, KINDS)
    beta, eta = check_real(_WHERE, "beta", beta, 0), check_real(_WHERE, "eta", eta, 0, 1)
    if anchors == "removed":
        if data.removed is None:
            raise ValueError(f"{_WHERE}: anchors must not be 'removed' where data.removed is not given, got 'removed'")
        weights = torch.nn.functional.one_hot(data.removed[used], given.count).double()
        return _checked(given, group, Anchors(used, weights))
    same_object = _same_object(data, used)
    if anchors == "matched":
        weights = _counts(given, data.rest(group)) * same_object
        weights[torch.arange(len(used)), used] = 0
        return _checked(given, group, Anchors(used, weights))
    others = [name for name in data.groups if name != group and name not in data.controls]
    if not others:
        raise ValueError(f"{_WHERE}: data must have other groups than {group!r} for {anchors!r} anchors, got none")
    pi = torch.full((len(others),), 1 / len(others), dtype=torch.float64)
    if anchors == "weighted_style":
        embedded = _image_descriptors(data, [group, *others]) if descriptors is None else descriptors
        pi = (1 - eta) * _similarity(embedded, group, others, beta) + eta * pi
    return _checked(given, group, Anchors(used, _over_groups(data, group, others, pi, used, same_object)))


def conditions_of(where: str, data: GroupedImages) -> Conditions:
    """The conditions of the data; ValueError where there are none."""
    if data.conditions is None or not data.conditions.tensors:
        raise ValueError(f"{where}: data must have conditions, got those of an unconditional model")
    return data.conditions


def _checked(given: Conditions, group: str, anchors: Anchors) -> Anchors:
    """With rows of sum 1; ValueError naming a condition that has no anchor, or itself for one."""
    for row, weights in zip(anchors.conditions.tolist(), anchors.probability, strict=True):
        if weights[row] > 0:
            raise ValueError(f"{_WHERE}: anchors must be other conditions, got {_name(given, row)!r} for itself")
        if not weights.sum() > 0:
            raise ValueError(
                f"{_WHERE}: every condition of {group!r} must have an anchor, got none for {_name(given, row)!r}"
            )
    return Anchors(anchors.conditions, anchors.probability / anchors.probability.sum(dim=1, keepdim=True))


def _from_table(given: Conditions, group: str, used: Tensor, table: Table) -> Tensor:
    rows = {_name(given, row): row for row in range(given.count)}
    weights = torch.zeros(len(used), given.count, dtype=torch.float64)
    for number, row in enumerate(used.tolist()):
        name = _name(given, row)
        if name not in table:
            raise ValueError(f"{_WHERE}: anchors must have every condition of {group!r}, got a table without {name!r}")
        for anchor, weight in table[name].items():
            if anchor not in rows:
                raise ValueError(f"{_WHERE}: anchors of {name!r} must be conditions of the data, got {anchor!r}")
            weights[number, rows[anchor]] = check_real(_WHERE, f"anchors[{name!r}][{anchor!r}]", weight, 0)
    return weights


def _name(given: Conditions, row: int) -> Key:
    return row if given.keys is None else given.keys[row]


def _counts(given: Conditions, images: Tensor) -> Tensor:
    """How many of these images each condition has [(U,), float64]."""
    return torch.bincount(given.row[images], minlength=given.count).double()


def _same_object(data: GroupedImages, used: Tensor) -> Tensor:
    """Which conditions have the object of each condition of the group [(G, U), bool]."""
    given = conditions_of(_WHERE, data)
    if data.removed is not None:
        return data.removed[used, None] == data.removed
    for name in data.groups:
        if name not in data.controls and len(given.row[data.group(name)].unique()) > 1:
            raise ValueError(
                f"{_WHERE}: data.removed must say which conditions have the same object where a group has several "
                f"conditions, got none, and several of {name!r}"
            )
    return torch.ones(len(used), given.count, dtype=torch.bool)


def _over_groups(
    data: GroupedImages, group: str, others: list[str], pi: Tensor, used: Tensor, same_object: Tensor
) -> Tensor:
    """The weights of all conditions, where groups have the probabilities pi and their images are alike [(G, U)]."""
    given = conditions_of(_WHERE, data)
    remains = torch.zeros(len(data), dtype=torch.bool)
    remains[data.rest(group)] = True
    weights = torch.zeros(len(used), given.count, dtype=torch.float64)
    for share, name in zip(pi, others, strict=True):
        index = data.group(name)
        counts = _counts(given, index[remains[index]]) * same_object
        counts[torch.arange(len(used)), used] = 0
        # A group without the object has no share of it.
        weights += share * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def _similarity(descriptors: Mapping[str, Tensor], group: str, others: list[str], beta: float) -> Tensor:
    """softmax over the other groups of beta times the cosine, in the mean over the group's descriptors [(S,)].

    To draw a descriptor for an image and then a group by it is to draw a group by this mean.
    """
    for name in (group, *others):
        if name not in descriptors:
            raise ValueError(f"{_WHERE}: descriptors must have group {name!r}, got {describe(tuple(descriptors))}")
    width = check_tensor(_WHERE, f"descriptors[{group!r}]", descriptors[group], shape=(None, None)).shape[1]
    unit = {}
    for name in (group, *others):
        where = f"descriptors[{name!r}]"
        values = check_tensor(_WHERE, where, descriptors[name], shape=(None, width)).double()
        norms = values.norm(dim=1, keepdim=True)
        if len(values) == 0 or not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError(f"{_WHERE}: {where} must be finite and not zero, got {describe(descriptors[name])}")
        unit[name] = values / norms
    prototypes = torch.stack([unit[name].mean(dim=0) for name in others])
    cosine = torch.nn.functional.cosine_similarity(unit[group][:, None], prototypes, dim=2)
    return torch.softmax(beta * cosine, dim=1).mean(dim=0)


def _image_descriptors(data: GroupedImages, groups: list[str]) -> dict[str, Tensor]:
    mean = torch.stack([data.take(part).double().sum(dim=0) for part in torch.arange(len(data)).split(1024)]).sum(dim=0)
    mean = mean.flatten() / len(data)
    found = {}
    for name in groups:
        index = data.group(name)
        parts = [index[start::_DESCRIPTORS] for start in range(min(_DESCRIPTORS, len(index)))]
        found[name] = torch.stack([data.take(part).double().mean(dim=0).flatten() - mean for part in parts])
    return found
