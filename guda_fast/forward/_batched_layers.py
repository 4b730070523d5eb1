"""One layer of many models: its parameters and differences, and how rows of several models go through it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guda_fast import ops
from guda_fast.deltas.delta import Dense, LowRank, Part
from guda_fast.forward._fused_convolution import is_conv2d
from guda_fast.forward._routing import Segment, Selection

# Of a weight that is merged with low-rank differences on a CPU. Measured with K 8 and 1 to 16 rows a model, merged
# weights are up to 1.5 times as fast below, and up to ten times as slow above, where reading them takes longest.
_MERGED_BYTES = 2**20


class Layer(Protocol):
    """One layer of many models."""

    merges: bool
    """Whether `add` reads ``merged``."""

    def add(self, model: int, parts: Mapping[str, Part], merged: Mapping[str, Tensor]) -> None:
        """Give a model its own parameters; models come in ascending order.

        parts: differences by attribute ("weight", "bias"). merged: the same as base and difference in one, which
        change later.
        """

    def finish(self) -> None:
        """After all models."""

    def __call__(self, x: Tensor, selection: Selection) -> Tensor:
        """The rows of ``x`` are those that ``selection`` selects."""

    def without_bias(self) -> Layer:
        """The same without biases, after `finish`."""

    def biases(self) -> Tensor:
        """The bias of each model [(models, O)]."""

    @property
    def bytes(self) -> int:
        """Memory beside the base."""


class SeparateLayer:
    """One call of the original's code for each segment of rows, with the parameters of its model.

    Merged beforehand, which no call pays for; a low-rank difference of fewer than 32 bits stays a branch, since
    rounding the sum may erase it.
    """

    merges = True

    def __init__(self, module: nn.Module, models: int) -> None:
        self._base = module
        self._variants = [module] * models
        self._branches: dict[int, tuple[nn.Module, Tensor]] = {}

    def add(self, model: int, parts: Mapping[str, Part], merged: Mapping[str, Tensor]) -> None:
        own = dict(self._base._parameters)
        for name, part in parts.items():
            base = own[name]
            assert base is not None, "a part belongs to a parameter"
            if isinstance(part, LowRank) and base.dtype.itemsize < 4 and _has_factors(self._base):
                up, down = part.up.to(base), part.down.to(base)
                self._branches[model] = (_with_parameters(self._base, {"weight": down, "bias": None}), up)
            else:
                own[name] = merged[name].detach().clone()  # type: ignore[assignment]
        self._variants[model] = _with_parameters(self._base, own)

    def finish(self) -> None:
        if _PackedConv2d.takes(self._base):
            self._each_variant(_PackedConv2d.of)

    def _each_variant(self, change: Callable[[nn.Module], nn.Module]) -> None:
        """Change the variants, and keep those that are the same module the same."""
        changed = {id(variant): change(variant) for variant in self._variants}
        self._variants = [changed[id(variant)] for variant in self._variants]

    def without_bias(self) -> SeparateLayer:
        other = copy.copy(self)
        other._each_variant(without_its_bias)
        return other

    def biases(self) -> Tensor:
        biases = [variant._parameters["bias"] for variant in self._variants]
        return torch.stack([bias for bias in biases if bias is not None])

    def __call__(self, x: Tensor, selection: Selection) -> Tensor:
        parts = [self._run(segment.model, x[segment.rows]) for segment in self._runs(selection)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    def _runs(self, selection: Selection) -> Iterator[Segment]:
        """The segments, joined where neighbours have the same parameters."""
        last: Segment | None = None
        for segment in selection.segments:
            if last is not None and self._variants[last.model] is self._variants[segment.model]:
                last = Segment(last.model, slice(last.rows.start, segment.rows.stop))
                continue
            if last is not None:
                yield last
            last = segment
        if last is not None:
            yield last

    def _run(self, model: int, x: Tensor) -> Tensor:
        out: Tensor = self._variants[model].forward(x)
        if model in self._branches:
            down, up = self._branches[model]
            hidden = down.forward(x)
            out = out + (F.linear(hidden, up) if isinstance(down, nn.Linear) else F.conv2d(hidden, up[..., None, None]))
        return out

    @property
    def bytes(self) -> int:
        base = {id(parameter) for parameter in self._base.parameters()}
        owners = [*self._variants, *(down for down, _ in self._branches.values())]
        own = {
            id(p): p.numel() * p.element_size() for owner in owners for p in owner._parameters.values() if p is not None
        }
        factors = sum(up.nbytes for _, up in self._branches.values())
        return factors + sum(size for number, size in own.items() if number not in base)


class _PackedConv2d(nn.Conv2d):
    """A convolution whose weight lies as the library wants it, which else arranges it in every call.

    Measured, that is up to half of the time of a small layer's call with one row, and a sixth with four.
    """

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Windows of one pixel gain nothing."""
        if not is_conv2d(module) or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return False
        weight, library = module.weight, torch.backends.mkldnn
        known = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
        in_format = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        return known and in_format and max(module.kernel_size) > 1 and library.is_available() and bool(library.enabled)

    @classmethod
    def of(cls, conv: nn.Module) -> nn.Module:
        assert isinstance(conv, nn.Conv2d)
        window = (conv.padding, conv.stride, conv.dilation, conv.groups)
        weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *window)
        packed = _with_parameters(conv, {**conv._parameters, "weight": weight})
        packed.__class__ = cls
        return packed

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the original's name)
        window = (self.padding, self.stride, self.dilation, self.groups)
        call = torch.ops.mkldnn._convolution_pointwise
        out: Tensor = call(input, self.weight, self.bias, *window, "none", [], "")
        return out


class StackedLayer:
    """A linear layer or convolution of all models in one call of `delta_linear` or `delta_conv2d`."""

    merges = False

    def __init__(self, module: nn.Linear | nn.Conv2d, models: int) -> None:
        self._base = module
        self.models = models
        self._index = [-1] * models
        self._parts: list[Mapping[str, Part]] = []
        self._deltas: dict[str, Any] = {}  # arguments of the op

    @staticmethod
    def takes(module: nn.Module, forms: set[type[Part]], device: torch.device) -> bool:
        """Whether the ops compute this layer, with weight differences of these forms, and had better do so.

        On a CPU a call for each model beats adding dense differences in every call, and small low-rank ones too.
        """
        if not _has_factors(module) or isinstance(module.padding if isinstance(module, nn.Conv2d) else 0, str):
            return False
        if device.type == "cuda":
            return forms == {LowRank} or forms <= {Dense}
        weight = module._parameters["weight"]
        assert weight is not None
        return forms == {LowRank} and (weight.dtype.itemsize < 4 or weight.nbytes > _MERGED_BYTES)

    def add(self, model: int, parts: Mapping[str, Part], merged: Mapping[str, Tensor]) -> None:
        self._index[model] = len(self._parts)
        self._parts.append(parts)

    def finish(self) -> None:
        weight = self._base.weight
        weights = [parts.get("weight") for parts in self._parts]
        biases = [parts.get("bias") for parts in self._parts]
        ranks = [part.rank for part in weights if isinstance(part, LowRank)]
        if ranks:
            rank = max(ranks)
            up = weight.new_zeros(len(weights), weight.shape[0], rank)
            down = weight.new_zeros(len(weights), rank, *weight.shape[1:])
            for k, part in enumerate(weights):
                if isinstance(part, LowRank):
                    up[k, :, : part.rank], down[k, : part.rank] = part.up.to(weight), part.down.to(weight)
            self._deltas |= {"up": up, "down": down}
        elif any(weights):
            self._deltas["delta"] = _stacked(weight, weights)
        if any(biases):
            assert self._base.bias is not None, "a part belongs to a parameter"
            self._deltas["bias_delta"] = _stacked(self._base.bias, biases)
        self._parts = []
        self._deltas["delta_index"] = torch.tensor(self._index, device=weight.device)

    def without_bias(self) -> Layer:
        base = without_its_bias(self._base)
        deltas = {name: tensor for name, tensor in self._deltas.items() if name != "bias_delta"}
        if len(deltas) == 1:  # The index, of models that only differ in their biases.
            return SeparateLayer(base, self.models)
        other = copy.copy(self)
        other._base, other._deltas = base, deltas  # type: ignore[assignment]
        return other

    def biases(self) -> Tensor:
        bias = self._base._parameters["bias"]
        assert bias is not None, "asked for where there is one that models differ in"
        if "bias_delta" not in self._deltas:
            return bias.expand(self.models, -1)
        index = self._deltas["delta_index"]
        own = bias + self._deltas["bias_delta"][index.clamp(min=0)]
        return torch.where(index[:, None] < 0, bias, own)

    def __call__(self, x: Tensor, selection: Selection) -> Tensor:
        return self._call(x, selection.offsets(self.models, x.device))

    def of_all_models(self, x: Tensor) -> Tensor:
        """The result for each model of all rows, one model after another."""
        return self._call(x, None).flatten(0, 1)

    def _call(self, x: Tensor, offsets: Tensor | None) -> Tensor:
        own = self._base._parameters
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        if isinstance(self._base, nn.Linear):
            return ops.delta_linear(x, weight, bias, offsets=offsets, **self._deltas)
        window: dict[str, Any] = {name: getattr(self._base, name) for name in ("stride", "padding", "dilation")}
        return ops.delta_conv2d(x, weight, bias, offsets=offsets, **window, **self._deltas)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._deltas.values())


class NormLayer(SeparateLayer):
    """A group norm: in channels-last one call, that takes each row's own weight and bias."""

    def __init__(self, module: nn.GroupNorm, models: int) -> None:
        super().__init__(module, models)
        self._norm = module
        self._affine: dict[str, Tensor] = {}

    def finish(self) -> None:
        for name, base in self._norm._parameters.items():
            if base is not None:
                rows = [variant._parameters[name] for variant in self._variants]
                self._affine[name] = torch.stack([row for row in rows if row is not None])

    def affine(self, selection: Selection, device: torch.device) -> dict[str, Any]:
        """What `group_norm_silu` takes for the selected rows: weight, bias and model_index."""
        return {**self._affine, "model_index": selection.model(device)}

    def __call__(self, x: Tensor, selection: Selection) -> Tensor:
        if x.dim() > 5 or x.stride(1) != 1:
            return super().__call__(x, selection)
        norm, affine = self._norm, self.affine(selection, x.device)
        return ops.group_norm_silu(x, norm.num_groups, eps=norm.eps, silu=False, **affine)

    @property
    def bytes(self) -> int:
        return super().bytes + sum(tensor.nbytes for tensor in self._affine.values())


def make_layer(module: nn.Module, models: int, forms: set[type[Part]]) -> Layer:
    """An empty layer for a base and others; ``forms`` are those of the weight's differences."""
    device = next(module.parameters()).device
    if StackedLayer.takes(module, forms, device):
        assert isinstance(module, nn.Linear | nn.Conv2d)
        return StackedLayer(module, models)
    return NormLayer(module, models) if isinstance(module, nn.GroupNorm) else SeparateLayer(module, models)


def _has_factors(module: nn.Module) -> bool:
    """Whether a low-rank difference is a layer to r channels and another one to the outputs."""
    if is_conv2d(module):
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module for calls of its ``forward``, which go past all hooks."""
    return _with_parameters(module, module._parameters)


def _with_parameters(module: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
    other = copy.copy(module)
    other.__dict__["_parameters"] = dict(own)
    return other


def without_its_bias(module: nn.Module) -> nn.Module:
    return _with_parameters(module, {**module._parameters, "bias": None})


def _stacked(base: Tensor, parts: list[Part | None]) -> Tensor:
    """Dense differences in the base's dtype, zero where there is none [(K, *base.shape)]."""
    out = base.new_zeros(len(parts), *base.shape)
    for k, part in enumerate(parts):
        if isinstance(part, Dense):
            out[k] = part.value
    return out
