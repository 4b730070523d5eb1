"""The difference of a counterfactual and the base, formed before any rounding to the precision of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from guda_fast.deltas.delta import Delta, Dense, LowRank, Part
from guda_fast.deltas.weights import Entry, Weights
from guda_fast.errors import CheckpointError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class BaseTensor:
    """A parameter or buffer of the base, under all the names that share its memory.

    names: the names; the first one identifies it
    value: its value on the CPU, floating ones in float32 or wider
    optional: whether a checkpoint may lack it (a buffer that is not persistent)
    """

    names: tuple[str, ...]
    value: torch.Tensor
    optional: bool = False

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


class KeyProblem(Exception):
    """What is wrong with one key; collected, so that an error can say how many more there are."""


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtypes`` are compared and subtracted: float32, or wider if one is."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def diff(base: Sequence[BaseTensor], weights: Weights) -> Delta:
    """theta_k - theta_0 for every parameter and floating buffer, in float32 (float64 where either side has it).

    base: all tensors of the base
    weights: the counterfactual's tensors
    Returns: the delta, with the parameters that are not equal bit for bit
    Raises: CheckpointError when a key is missing, unknown or does not fit the base
    """
    parts: dict[str, Part] = {}

    def subtract(tensor: BaseTensor, found: torch.Tensor) -> None:
        part = _difference(tensor, found)
        if part is not None:
            parts[tensor.name] = part

    _each_tensor(base, weights, subtract)
    return Delta(parts, weights.origin)


def fitted(base: Sequence[BaseTensor], delta: Delta, origin: str) -> Delta:
    """A delta that was made elsewhere, checked against the base, with its parts under the base's first names.

    Its tensors are copied; parts of zeros are dropped, as `diff` would.
    Raises: CheckpointError where a name is unknown or given twice, or a part does not fit the base's tensor
    """
    targets = {name: tensor for tensor in base for name in tensor.names}
    parts: dict[str, Part] = {}
    for name, part in delta.parts.items():
        if name not in targets:
            raise CheckpointError(f"{origin}: key {name!r} is not in the base")
        target = targets[name]
        try:
            if target.name in parts:
                raise KeyProblem(f"must not be given twice: the base shares its tensor with {target.name!r}")
            copied = _checked_part(target, part)
        except KeyProblem as problem:
            raise CheckpointError(f"{origin}: key {name!r} {problem}") from None
        if copied is not None:
            parts[target.name] = copied
    return Delta(parts, origin)


def read_values(base: Sequence[BaseTensor], weights: Weights) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` by the base's first names, each checked against the base's shape and type."""
    values: dict[str, torch.Tensor] = {}

    def keep(tensor: BaseTensor, found: torch.Tensor) -> None:
        check_finite(found)
        values[tensor.name] = found

    _each_tensor(base, weights, keep)
    return values


def _each_tensor(
    base: Sequence[BaseTensor], weights: Weights, visit: Callable[[BaseTensor, torch.Tensor], None]
) -> None:
    """Call ``visit`` for each tensor that ``weights`` has; raise the first problem with the number of others."""
    weights = weights.named_like([name for tensor in base for name in tensor.names])
    _check_names(base, weights)
    problems: list[str] = []
    for tensor in base:
        first: torch.Tensor | None = None
        for name in tensor.names:
            if name not in weights.entries:
                continue
            entry = weights.entries[name]
            try:
                found = _checked(tensor, entry)
                if first is None:
                    visit(tensor, found)
                    first = found
                elif not torch.equal(first, found):
                    raise KeyProblem(f"must equal key {tensor.name!r}: the base shares one tensor between them")
            except KeyProblem as problem:
                problems.append(f"{entry.origin}: key {name!r} {problem}")
    if problems:
        raise CheckpointError(problems[0] + _more(len(problems) - 1))


def _check_names(base: Sequence[BaseTensor], weights: Weights) -> None:
    known = {name for tensor in base for name in tensor.names}
    unknown = [name for name in weights.entries if name not in known]
    missing = [t.name for t in base if not t.optional and weights.entries.keys().isdisjoint(t.names)]
    problems = []
    if missing:
        problems.append(f"key {missing[0]!r} is missing{_more(len(missing) - 1)}")
    if unknown:
        problems.append(f"key {unknown[0]!r} is not in the base{_more(len(unknown) - 1)}")
    if problems:
        origin = weights.origin if missing else weights.entries[unknown[0]].origin
        raise CheckpointError(f"{origin}: {'; '.join(problems)}")


def _more(count: int) -> str:
    return "" if count <= 0 else f" (and {count} more {'key' if count == 1 else 'keys'})"


def _checked(tensor: BaseTensor, entry: Entry) -> torch.Tensor:
    """The tensor of ``entry`` on the CPU, of the base tensor's shape and kind of dtype."""
    found = entry.read()
    if not isinstance(found, torch.Tensor):
        raise KeyProblem(f"must be a tensor, found {type(found).__name__}")
    if found.layout != torch.strided or found.is_meta:
        kind = "on the meta device" if found.is_meta else f"with layout {found.layout}"
        raise KeyProblem(f"must be a dense tensor with values, found one {kind}")
    if found.shape != tensor.value.shape:
        raise KeyProblem(f"must have shape {tuple(tensor.value.shape)} as in the base, found {tuple(found.shape)}")
    allowed = FLOATING if tensor.value.is_floating_point() else INTEGER
    if found.dtype not in allowed:
        raise KeyProblem(f"must be {_names(allowed)}, found {_names([found.dtype])}")
    return found.detach().to("cpu")


def _difference(tensor: BaseTensor, found: torch.Tensor) -> Dense | None:
    if not found.is_floating_point():
        if not torch.equal(found.to(torch.int64), tensor.value.to(torch.int64)):
            raise KeyProblem("must equal the base's value, because it holds integers, which have no delta")
        return None
    dtype = wide(tensor.value.dtype, found.dtype)
    value, base = found.to(dtype), tensor.value.to(dtype)
    if torch.equal(value, base):
        return None
    delta = value - base
    if not bool(torch.isfinite(delta).all()):
        check_finite(found)
        raise KeyProblem(f"differs from the base by more than {_names([dtype])} can hold")
    return Dense(delta)


def _checked_part(target: BaseTensor, part: Part) -> Part | None:
    """A copy of a part that fits its tensor; None where it changes nothing."""
    shape = target.value.shape
    if not target.value.is_floating_point():
        raise KeyProblem("must have no delta, because the base holds integers there")
    if not isinstance(part, Dense | LowRank):
        raise KeyProblem(f"must be a Dense or a LowRank part, found {type(part).__name__}")
    for role, tensor in part.tensors():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise KeyProblem(f"must have a float32 or float64 tensor as {role}, found {found}")
        check_finite(tensor)
    if isinstance(part, Dense):
        if part.value.shape != shape:
            raise KeyProblem(f"must have shape {tuple(shape)} as in the base, found {tuple(part.value.shape)}")
        return Dense(_copied(part.value)) if bool(part.value.any()) else None
    up, down = part.up, part.down
    if len(shape) < 2 or up.dim() != 2 or up.shape[0] != shape[0] or down.shape != (up.shape[1], *shape[1:]):
        raise KeyProblem(
            f"must have up (O, r) and down (r, *I) for the base's shape {tuple(shape)} (O, *I), "
            f"found {tuple(up.shape)} and {tuple(down.shape)}"
        )
    if up.dtype != down.dtype:
        raise KeyProblem(f"must have up and down of one dtype, found {_names([up.dtype, down.dtype])}")
    changes = bool(up.any()) and bool(down.any())
    return LowRank(_copied(up), _copied(down)) if changes else None


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_finite(found: torch.Tensor) -> None:
    """Raise KeyProblem when a floating tensor holds NaN or infinity; integers always pass."""
    bad = ~torch.isfinite(found)
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise KeyProblem(
            f"must be finite, found {int(bad.sum())} NaN or infinite of {found.numel()} values, the first at {first}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
