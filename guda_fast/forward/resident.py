"""How the resident model is called: as it is, compiled, or as a CUDA graph for each size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guda_fast.forward.fuse import fuse

_WARM_UP = 3


class ResidentForward:
    """Calls a model whose weights change in place between calls.

    On CUDA each batch size is captured in a CUDA graph at its first use, and replayed: the weights keep their
    memory, so that one graph serves all models. Its result is overwritten by the next replay.

    model: its residual blocks, norms and attention are fused here. compiled: through torch.compile.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        # A model of diffusers has imported diffusers; fusing another one would import it for nothing.
        if "diffusers" in sys.modules:
            fuse(model)
        self._call: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The prediction for one batch [x_t: (B, C, H, W); timestep: (B,), int64]."""
        if x_t.device.type != "cuda":
            prediction: Tensor = self._call(x_t, timestep, return_dict=False)[0]
            return prediction
        graph = self._graphs.get(tuple(x_t.shape))
        if graph is None:
            pool = next((graph.pool for graph in self._graphs.values()), None)
            graph = self._graphs[tuple(x_t.shape)] = _Graph(self._call, x_t, timestep, pool)
        return graph(x_t, timestep)

    def forget_graphs(self) -> None:
        """Give back the memory that captured graphs hold."""
        self._graphs.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Graph:
    """One forward, captured for one shape."""

    def __init__(self, call: Callable[..., Any], x_t: Tensor, timestep: Tensor, pool: Any) -> None:
        self._x_t, self._timestep = x_t.clone(), timestep.clone()
        # Libraries choose their algorithms and allocate in the first calls, which a capture must not hold.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                call(self._x_t, self._timestep, return_dict=False)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: meanwhile another thread may allocate pinned memory for the next delta.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._prediction: Tensor = call(self._x_t, self._timestep, return_dict=False)[0]
        self.pool = self._graph.pool()

    def __call__(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        self._x_t.copy_(x_t)
        self._timestep.copy_(timestep)
        self._graph.replay()
        return self._prediction
