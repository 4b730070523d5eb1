"""Which implementation runs an op: a static, ordered table per op and device type.

A backend is chosen by the argument ``backend=``, else by `use_backend`, else by the environment variable
GUDA_FAST_BACKEND; where none of them names one, the first of the table with no reason against the call runs.
Nothing falls back silently: a named backend runs or raises, and an exception inside a backend propagates.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from guda_fast._validate import check_choice
from guda_fast.errors import BackendUnavailableError

ENVIRONMENT_VARIABLE = "GUDA_FAST_BACKEND"
BACKEND_NAMES = ("auto", "cpp", "triton", "cuda", "torch", "reference")


class Request(Protocol):
    """A validated call of an op."""

    @property
    def device(self) -> torch.device: ...


RequestT = TypeVar("RequestT", bound=Request)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Backend(Generic[RequestT, ResultT]):
    """One implementation of one op."""

    name: str
    run: Callable[[RequestT], ResultT]
    # The reason why not, for this call.
    supports: Callable[[RequestT], str | None] = lambda request: None
    # The reason why not on this machine, whatever the call.
    available: Callable[[], str | None] = lambda: None
    # What `explain` adds, such as the instruction set.
    detail: Callable[[], str] = lambda: ""

    def reason_against(self, request: RequestT) -> str | None:
        return self.available() or self.supports(request)


class Choice(NamedTuple):
    """A backend's name and who asked for it; name is "auto" where nobody did."""

    name: str
    asked_by: str


_DEFAULT = Choice("auto", "default")


class Availability(NamedTuple):
    """One line of `availability`: reason is None where the backend can run."""

    op: str
    device: str
    backend: str
    reason: str | None
    detail: str


@dataclass(frozen=True)
class Op(Generic[RequestT, ResultT]):
    """An op: how a call is validated, and its backends by device type, best first ("*": other devices)."""

    name: str
    request: Callable[..., RequestT]
    backends: Mapping[str, tuple[Backend[RequestT, ResultT], ...]]
    # The public function, whose arguments `explain` takes.
    function: Callable[..., Any] | None = None

    def table(self, device: torch.device) -> tuple[Backend[RequestT, ResultT], ...]:
        return self.backends.get(device.type, self.backends["*"])

    def run(self, request: RequestT, backend: str) -> ResultT:
        """Run the request on the chosen backend; results carry no gradient."""
        chosen = self.chosen(request, backend)
        if not torch.is_grad_enabled():
            return chosen.run(request)
        with torch.no_grad():
            return chosen.run(request)

    def chosen(self, request: RequestT, backend: str) -> Backend[RequestT, ResultT]:
        """The backend that runs the request; raises BackendUnavailableError where a named one cannot."""
        choice = requested_backend(self.name, backend)
        reasons = []
        for candidate in self.table(request.device):
            if choice.name not in ("auto", candidate.name):
                continue
            reason = candidate.reason_against(request)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        if choice.name == "auto":
            raise BackendUnavailableError(f"{self.name}: no backend can run this call: {'; '.join(reasons)}")
        reason = reasons[0] if reasons else self._absence(choice.name, request.device)
        raise BackendUnavailableError(f"{self.name}: backend asked by {choice.asked_by} cannot run: {reason}")

    def _absence(self, backend: str, device: torch.device) -> str:
        """Why a backend is not in a device's table."""
        if any(backend == entry.name for table in self.backends.values() for entry in table):
            return f"{backend}: it does not serve {device.type} tensors"
        return f"{backend}: {self.name} has no such backend"

    def explain(self, request: RequestT, choice: Choice) -> str:
        """The decision as text: the first line is what runs, then one line a backend in order."""
        table = self.table(request.device)
        reasons = {backend.name: backend.reason_against(request) for backend in table}
        if choice.name == "auto":
            chosen = next((name for name, reason in reasons.items() if reason is None), None)
            because = "first in order"
        else:
            chosen = choice.name if reasons.get(choice.name, "absent") is None else None
            because = f"asked by {choice.asked_by}"
        outcome = chosen or f"none ({choice.name} {because} raises BackendUnavailableError)"
        lines = [f"{self.name} on {request.device.type}: {outcome}"]
        if choice.name not in ("auto", *reasons):
            lines.append(f"  {self._absence(choice.name, request.device)}")
        width = max(len(name) for name in reasons)
        for backend in table:
            reason = reasons[backend.name]
            if reason is not None:
                text = f"unavailable: {reason}"
            elif backend.name == chosen:
                text = f"chosen ({'; '.join(filter(None, (because, backend.detail())))})"
            else:
                text = "available"
            lines.append(f"  {backend.name:{width}}  {text}")
        return "\n".join(lines)


_OPS: dict[str, Op[Any, Any]] = {}
_context: ContextVar[str | None] = ContextVar("guda_fast_backend", default=None)


def register(op: Op[RequestT, ResultT]) -> Op[RequestT, ResultT]:
    """Make an op known to `explain` and `availability`; each module of `guda_fast.ops` does so once."""
    _OPS[op.name] = op
    return op


def requested_backend(where: str, argument: str) -> Choice:
    """Who names a backend for this call, by precedence; ValueError where the name is unknown."""
    if argument != "auto":
        return Choice(check_choice(where, "backend", argument, BACKEND_NAMES), "backend=")
    context = _context.get()
    if context is not None:
        return Choice(context, "use_backend")
    environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if environment:
        name = check_choice(where, f"backend (from {ENVIRONMENT_VARIABLE})", environment, BACKEND_NAMES)
        return Choice(name, ENVIRONMENT_VARIABLE)
    return _DEFAULT


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every op called inside, unless the call names one; "auto" chooses freely again.

    >>> with use_backend("reference"):
    ...     pass
    """
    token = _context.set(check_choice("use_backend", "name", name, BACKEND_NAMES))
    try:
        yield
    finally:
        _context.reset(token)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Which backend a call would run, and why not the others; validates the arguments, computes nothing.

    op: the op's name, such as "add_noise"
    args, kwargs: the arguments of the call

    Returns text. Raises what the call's validation raises, and TypeError where the call would not take the arguments.
    """
    found = _OPS[check_choice("explain", "op", op, list(_OPS))]
    if found.function is not None:
        try:
            inspect.signature(found.function).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"explain: {op}: {error}") from None
    choice = requested_backend(op, kwargs.pop("backend", "auto"))
    return found.explain(found.request(*args, **kwargs), choice)


def availability() -> list[Availability]:
    """Every op's backends by device type in order, with the reason where this machine cannot run one."""
    return [
        Availability(
            op.name, device, backend.name, reason := _reason(backend, device), "" if reason else backend.detail()
        )
        for op in _OPS.values()
        for device, table in op.backends.items()
        for backend in table
    ]


def _reason(backend: Backend[Any, Any], device: str) -> str | None:
    """Why this machine cannot run a backend on tensors of a device, whatever the call, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    reason = backend.available()
    if reason is None and backend.name == "triton":
        return triton_device_reason(torch.device(device))
    return reason


@functools.cache
def native() -> ModuleType | None:
    """The C++ extension, or None where it was not built. A build that fails to load raises ImportError."""
    if importlib.util.find_spec("guda_fast._C") is None:
        return None
    return importlib.import_module("guda_fast._C")


def native_unavailable() -> str | None:
    """Why the `cpp` backend cannot run on this machine, or None."""
    if native() is None:
        return "the extension guda_fast._C was not built (GUDA_FAST_NATIVE=OFF, or not installed)"
    return None


@functools.cache
def cuda_unavailable() -> str | None:
    """Why the `cuda` backend cannot run on this machine, whatever the call, or None."""
    extension = native()
    if extension is None:
        return native_unavailable()
    status = extension.cuda_status()
    if not status["compiled"]:
        return "the extension guda_fast._C was built without CUDA (GUDA_FAST_CUDA=OFF, or no nvcc)"
    return f"no CUDA device: {status['error']}" if status["error"] else None


@functools.cache
def triton_unavailable() -> str | None:
    """Why the `triton` backend cannot run on this machine, whatever the call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def triton_device_reason(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on tensors of this device, or None. Its interpreter also takes CPU tensors."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device.type}, and triton needs CUDA tensors or its interpreter (TRITON_INTERPRET=1)"


def native_detail() -> str:
    """The instruction set that the extension uses now."""
    extension = native()
    return "" if extension is None else str(extension.instruction_set())


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Make the `cpp` backend use one instruction set inside, for tests and benchmarks; for the whole process.

    name: one of ``guda_fast._C.instruction_sets()``; ValueError otherwise
    """
    extension = native()
    if extension is None:
        raise BackendUnavailableError(f"use_instruction_set: {native_unavailable()}")
    before = extension.instruction_set()
    extension.set_instruction_set(name)
    try:
        yield
    finally:
        extension.set_instruction_set(before)
