"""How an op becomes one node of a `torch.compile` graph: its registration with torch.library.

Eager calls never come here: going through the dispatcher costs some ten microseconds a call, a plain function none.
Under compilation, and wherever else operations are recorded, the public function calls the registered op instead, with
the arguments that a schema can carry: the seed as the int64 of the same bits, the backend by name. The registered op
runs the eager path when the graph runs, so validation and the choice of a backend (with `use_backend` and the
environment) happen at each run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

NAMESPACE = "guda_fast"
_FRAGMENT = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Register ``guda_fast::name``; its schema is inferred from the annotations of `run`.

    run: the op on real tensors, whose results alias no argument
    fake: shapes, dtypes and devices of the results, from the same arguments without their contents
    mutates: the arguments that `run` writes to
    """
    # Not custom_op, whose wrappers cost several microseconds a call and serve gradients, which these ops have not.
    schema = torch.library.infer_schema(run, mutates_args=mutates)
    _FRAGMENT.define(name + schema)
    _FRAGMENT.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_FRAGMENT)
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def is_recorded() -> bool:
    """Whether operations are recorded now, by torch.compile, a trace or a dispatch mode such as make_fx's.

    Then the registered op must run: what a kernel does to memory that it gets by pointer none of them sees.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


def seed_to_bits(seed: int) -> int:
    """The int64 with a seed's bits; what is no seed passes through, for the op's validation to refuse.

    >>> seed_to_bits(2**64 - 1)
    -1
    """
    return seed - 2**64 if 2**63 <= seed < 2**64 else seed


def seed_from_bits(bits: int) -> int:
    """The seed in [0, 2**64) with the bits of an int64.

    >>> seed_from_bits(-1) == 2**64 - 1
    True
    """
    return bits % 2**64
