"""Layers of a network whose rows belong to many models: each computes the rows that differ, and no others.

Imports diffusers: imported where a batched model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from diffusers.models import normalization
from torch import Tensor, nn

from guda_fast import ops
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward._batched_layers import Layer, NormLayer, StackedLayer, without_its_bias
from guda_fast.forward._fused_convolution import CONVOLUTIONS
from guda_fast.forward._fused_modules import FusedGroupNorm, PerRow
from guda_fast.forward._routing import FACTORS, Kind, RowModels, Selection

_LEAVES = {
    nn.Linear, *CONVOLUTIONS, nn.ConvTranspose2d, nn.Embedding, nn.GroupNorm, FusedGroupNorm, nn.LayerNorm, nn.RMSNorm,
    normalization.FP32LayerNorm, normalization.RMSNorm,
}  # fmt: skip


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that map each row by itself with parameters of their own, by name."""

    def is_leaf(module: nn.Module) -> bool:
        original = type(module.leaf.base if isinstance(module, BatchedLeaf) else module)
        rewrites = isinstance(module, nn.Embedding) and module.max_norm is not None
        return original in _LEAVES and not rewrites and any(p is not None for p in module._parameters.values())

    return {name: module for name, module in model.named_modules() if is_leaf(module)}


@dataclass
class Batch:
    """What runs now, for all leaves of one model.

    rows: None where nothing runs. computed: rows that each layer computed, by name.
    """

    rows: RowModels | None = None
    computed: dict[str, int] = field(default_factory=dict)


@dataclass
class Leaf:
    """Which rows a layer computes, and how.

    inputs: what its input depends on; None for one that has not the batch's rows and depends on no model, or that the
    rehearsal never called. changed: the attributes that some model changes. layer: None where there are none
    """

    name: str
    batch: Batch
    base: nn.Module
    inputs: Kind | None
    changed: frozenset[str] = frozenset()
    layer: Layer | None = None
    _bare: Leaf | None = field(default=None, init=False)
    _biases: Tensor | None = field(default=None, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        rows, layer = self._rows(x), self.layer
        if rows is None or self.inputs is None:
            return self._count(len(x), self.base.forward(x))
        if layer is None:
            return self._routed(rows, self.inputs, x, lambda x, _: self.base.forward(x))
        kind = self.inputs | {"model"}
        if isinstance(layer, StackedLayer) and kind != self.inputs and rows.crosses(self.inputs, layer.models):
            shared = rows.select(self.inputs)
            out = self._count(shared.count, layer.of_all_models(_take(x, shared.rows(x.device))))
            return _take(out, rows.select(kind).inverse(x.device))
        return self._routed(rows, kind, x, layer)

    def group_norm_silu(self, x: Tensor, **options: Any) -> Tensor:
        """The op with the parameters of each row's model; options as the op's."""
        rows, norm, layer = self._rows(x), self.base, self.layer
        assert isinstance(norm, nn.GroupNorm)
        assert rows is not None and self.inputs is not None, "blocks are fused where rows are rows"
        # What comes after the norm has factors of its own.
        kind = frozenset(FACTORS) if options["scale"] is not None else self.inputs
        selection = rows.select(kind if layer is None else kind | {"model"})
        chosen = selection.rows(x.device)
        options = {name: _take(o, chosen) if isinstance(o, Tensor) else o for name, o in options.items()}
        own = layer.affine(selection, x.device) if isinstance(layer, NormLayer) else norm._parameters
        out = ops.group_norm_silu(_take(x, chosen), norm.num_groups, eps=norm.eps, **own, **options)
        return _take(self._count(selection.count, out), selection.inverse(x.device))

    def without_bias(self, x: Tensor) -> Tensor:
        if self._bare is None:
            layer = None if self.layer is None else self.layer.without_bias()
            self._bare = replace(self, base=without_its_bias(self.base), layer=layer)
        return self._bare(x)

    def biases(self) -> Tensor | None:
        """The bias of each row of the batch."""
        rows, bias = self.batch.rows, self.base._parameters["bias"]
        assert rows is not None, "leaves run inside of a batched model"
        if self.layer is None or "bias" not in self.changed:
            return None if bias is None else bias.expand(len(rows), -1)
        if self._biases is None:
            self._biases = self.layer.biases()
        return self._biases[rows.models(self._biases.device)]

    def _rows(self, x: Tensor) -> RowModels | None:
        """The batch; None where the layer's input has no rows of it."""
        rows = self.batch.rows
        assert rows is not None, "leaves run inside of a batched model"
        if self.inputs is None and not self.changed:
            return None
        if self.inputs is None or len(x) != len(rows):
            raise RuntimeError(
                f"BatchedModel: layer {self.name!r} must be called as in the example, "
                f"{'never' if self.inputs is None else f'with the {len(rows)} rows of the batch'}, got {len(x)} rows"
            )
        return rows

    def _routed(self, rows: RowModels, kind: Kind, x: Tensor, compute: Callable[[Tensor, Selection], Tensor]) -> Tensor:
        """Compute one row of each kind, and give it to all rows of that kind."""
        selection = rows.select(kind)
        out = compute(_take(x, selection.rows(x.device)), selection)
        return _take(self._count(selection.count, out), selection.inverse(x.device))

    def _count(self, rows: int, out: Tensor) -> Tensor:
        self.batch.computed[self.name] = self.batch.computed.get(self.name, 0) + rows
        return out


class BatchedLeaf(PerRow):
    """Mixed into a layer's class: its rows belong to many models, and it has no parameter that fits them all."""

    leaf: Leaf

    def forward(self, x: Tensor) -> Tensor:
        return self.leaf(x)

    def group_norm_silu(self, x: Tensor, **options: Any) -> Tensor:
        return self.leaf.group_norm_silu(x, **options)

    def without_bias(self, x: Tensor) -> Tensor:
        return self.leaf.without_bias(x)

    def biases(self) -> Tensor | None:
        return self.leaf.biases()

    def __getattr__(self, name: str) -> Any:
        leaf: Leaf | None = self.__dict__.get("leaf")
        if leaf is not None and name in leaf.changed:
            raise BatchedUnavailableError(
                f"BatchedModel: {leaf.name}.{name} must only be used by its own layer, because models differ in it; "
                "the network reads it elsewhere"
            )
        return super().__getattr__(name)


def install(module: nn.Module, leaf: Leaf) -> None:
    """Make a module of the skeleton run ``leaf``; its parameters stay listed, and can be read if none differs."""
    original: Any = type(module)
    module.__class__ = _batched_class(original)
    module.__dict__["leaf"] = leaf


@cache
def _batched_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Batched{original.__name__}", (BatchedLeaf, original), {})


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    # Not index_select, which loses channels-last.
    return x if rows is None else x[rows]
