"""The difference of a counterfactual and the base, formed before any rounding to the precision of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, TypeVar

import torch

from guda_fast.deltas.delta import Delta, Dense, LowRank, Part, cast
from guda_fast.deltas.weights import Entry, Factors, Weights
from guda_fast.errors import CheckpointError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_S = TypeVar("_S", bound=Entry | Factors)


@dataclass(frozen=True)
class BaseTensor:
    """What is known of a parameter or buffer of the base, under all the names that share its memory.

    names: the names; the first one identifies it
    shape: its shape
    dtype: in which its value is compared and subtracted: float32 or float64, or its own if that holds integers
    optional: whether a checkpoint may lack it (a buffer that is not persistent)
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    optional: bool = False

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


class KeyProblem(Exception):
    """What is wrong with one key; collected, so that an error can say how many more there are."""


class _Problems:
    """What is wrong with the keys of one model, said in one error: the first in the base's order, and how many more."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str]] = []

    def at(self, position: int, source: Entry | Factors, name: str) -> _Located:
        """A context in which a KeyProblem is noted as one of a key."""
        key = source.key if isinstance(source, Factors) else name
        return _Located(self._found, position, source.origin, key)

    def check(self) -> None:
        if self._found:
            _, first = min(self._found, key=itemgetter(0))
            raise CheckpointError(first + _more(len(self._found) - 1))


@dataclass(slots=True)
class _Located:
    found: list[tuple[int, str]]
    position: int
    origin: str
    key: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, problem: object, trace: object) -> bool:
        if isinstance(problem, KeyProblem):
            self.found.append((self.position, f"{self.origin}: key {self.key!r} {problem}"))
        return isinstance(problem, KeyProblem)


@cache
def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtypes`` are compared and subtracted: float32, or wider if one is."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def fitting(base: Sequence[BaseTensor], weights: Weights) -> Weights:
    """``weights`` under the base's names, checked against the base as far as that needs no values.

    Raises: CheckpointError when a key is missing (from complete weights), unknown, given as a value and as factors, or
        of another shape or kind of dtype than in the base
    """
    weights = weights.named_like([name for tensor in base for name in tensor.names])
    _check_names(base, weights)
    problems = _Problems()
    for position, tensor in enumerate(base):
        for name in tensor.names:
            source = _source(weights, name)
            if source is not None:
                with problems.at(position, source, name):
                    _check_source(tensor, source)
    problems.check()
    return weights


def differences(
    base: Sequence[BaseTensor],
    weights: Weights,
    theta_0: Callable[[str], torch.Tensor],
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Part]]:
    """theta_k - theta_0 of the parameters and floating buffers that are not equal bit for bit, one after the other.

    In float32 (float64 where either side has it), in the order of the names; dense ones in the memory layout of
    theta_0. Only what is asked for is read.

    base: all tensors of the base
    weights: the counterfactual's tensors, as ``fitting`` gives them
    theta_0: gives the base's value by its first name
    only: the first names to look at; None for all
    Raises: CheckpointError, after the last tensor, when values are not finite or contradict the base
    """
    problems = _Problems()
    sources: dict[str, Entry | Factors] = {**weights.entries, **weights.factors}
    for tensor, source, located in _present(base, sources, problems, only):
        part: Part | None = None
        with located:
            if isinstance(source, Factors):
                part = _checked_part(tensor, source.read())
            else:
                part = _difference(tensor, theta_0(tensor.name), source)
        if part is not None:
            yield tensor.name, part
        del part  # the next one is formed in its memory
    problems.check()


def finite_values(base: Sequence[BaseTensor], weights: Weights) -> Iterator[tuple[BaseTensor, torch.Tensor]]:
    """The tensors of ``weights``, one after the other.

    weights: as ``fitting`` gives them
    Raises: CheckpointError, after the last tensor, when values are not finite
    """
    problems = _Problems()
    for tensor, entry, located in _present(base, weights.entries, problems):
        found: torch.Tensor = entry.read()
        with located:
            check_finite(found)
        yield tensor, found
        del found  # the next one is read into its memory
    problems.check()


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


def _present(
    base: Sequence[BaseTensor], sources: Mapping[str, _S], problems: _Problems, only: Collection[str] | None = None
) -> Iterator[tuple[BaseTensor, _S, _Located]]:
    """Each tensor that ``sources`` has, in the order of the names, and where to note what is wrong with it."""
    for position, tensor in sorted(enumerate(base), key=lambda item: item[1].name):
        names = [name for name in tensor.names if name in sources]
        if not names or (only is not None and tensor.name not in only):
            continue
        source = sources[names[0]]
        for name in names[1:]:
            shared = sources[name]
            with problems.at(position, shared, name):
                _check_equal(source.read(), shared.read(), tensor.name)
        yield tensor, source, problems.at(position, source, names[0])


def _check_equal(one: Any, other: Any, name: str) -> None:
    common = torch.promote_types(one.dtype, other.dtype)
    if not torch.equal(one.to(common), other.to(common)):
        raise KeyProblem(f"must equal key {name!r}: the base shares one tensor between them")


def _source(weights: Weights, name: str) -> Entry | Factors | None:
    return weights.factors.get(name) or weights.entries.get(name)


def _check_names(base: Sequence[BaseTensor], weights: Weights) -> None:
    known = {name for tensor in base for name in tensor.names}
    given = {name: entry.origin for name, entry in weights.entries.items()}
    given |= {name: factors.origin for name, factors in weights.factors.items()}
    unknown = [name for name in given if name not in known]
    missing = [t.name for t in base if weights.complete and not t.optional and given.keys().isdisjoint(t.names)]
    problems = []
    if missing:
        problems.append(f"key {missing[0]!r} is missing{_more(len(missing) - 1)}")
    if unknown:
        problems.append(f"key {unknown[0]!r} is not in the base{_more(len(unknown) - 1)}")
    if problems:
        origin = weights.origin if missing else given[unknown[0]]
        problems += [weights.advice] if weights.advice else []
        raise CheckpointError(f"{origin}: {'; '.join(problems)}")
    for tensor in base:
        low_rank = [name for name in tensor.names if name in weights.factors]
        if low_rank and len(low_rank) + sum(name in weights.entries for name in tensor.names) > 1:
            factors = weights.factors[low_rank[0]]
            raise CheckpointError(
                f"{factors.origin}: key {factors.key!r} must be all that is given for {tensor.name!r}, "
                "found a value or other factors for it too"
            )


def _more(count: int) -> str:
    return "" if count <= 0 else f" (and {count} more {'key' if count == 1 else 'keys'})"


def _check_source(tensor: BaseTensor, source: Entry | Factors) -> None:
    if isinstance(source, Entry) and source.problem:
        raise KeyProblem(source.problem)
    if source.shape != tensor.shape:
        raise KeyProblem(f"must have shape {tensor.shape} as in the base, found {source.shape}")
    allowed = FLOATING if tensor.dtype.is_floating_point else INTEGER
    if source.dtype not in allowed:
        raise KeyProblem(f"must be {_names(allowed)}, found {_names([source.dtype])}")


def _difference(tensor: BaseTensor, theta_0: torch.Tensor, entry: Entry) -> Dense | None:
    if not tensor.dtype.is_floating_point:
        if not torch.equal(entry.read().to(torch.int64), theta_0.to(torch.int64)):
            raise KeyProblem("must equal the base's value, because it holds integers, which have no delta")
        return None
    dtype = wide(theta_0.dtype, entry.dtype)
    # Before what is read, which is freed first: the heap grows by no more than both.
    delta = torch.empty_like(theta_0, dtype=dtype)
    found: torch.Tensor = entry.read()
    torch.sub(cast(found, dtype), cast(theta_0, dtype), out=delta)
    least, most = extremes(delta)
    if not (math.isfinite(least) and math.isfinite(most)):
        check_finite(found)
        raise KeyProblem(f"differs from the base by more than {_names([dtype])} can hold")
    # Floating-point numbers that differ have a difference: underflow is gradual.
    return Dense(delta) if least or most else None


def _checked_part(target: BaseTensor, part: Part) -> Part | None:
    """A copy of a part that fits its tensor; None where it changes nothing."""
    shape = target.shape
    if not target.dtype.is_floating_point:
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
            raise KeyProblem(f"must have shape {shape} as in the base, found {tuple(part.value.shape)}")
        return Dense(_copied(part.value)) if any(extremes(part.value)) else None
    up, down = part.up, part.down
    if len(shape) < 2 or up.dim() != 2 or up.shape[0] != shape[0] or down.shape != (up.shape[1], *shape[1:]):
        raise KeyProblem(
            f"must have up (O, r) and down (r, *I) for the base's shape {shape} (O, *I), "
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
    if not found.is_floating_point() or all(map(math.isfinite, extremes(found))):
        return
    bad = ~torch.isfinite(found)
    first = tuple(bad.nonzero()[0].tolist())
    raise KeyProblem(
        f"must be finite, found {int(bad.sum())} NaN or infinite of {found.numel()} values, the first at {first}"
    )


def extremes(found: torch.Tensor) -> tuple[float, float]:
    """The least and the greatest value: NaN where there is one, and zeros only where all are zero or there is none."""
    if found.numel() == 0:
        return 0.0, 0.0
    # The reduction over memory as it lies is several times faster than over a permuted view of it.
    dense = found.as_strided((found.numel(),), (1,)) if is_dense(found) else found
    least, most = torch.aminmax(dense)
    return least.item(), most.item()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
