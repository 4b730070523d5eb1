"""How the resident model is called: as it is, compiled, or as a CUDA graph for each size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guda_fast.diffusion.conditions import map_tensors
from guda_fast.forward._routing import Inputs
from guda_fast.forward.fuse import fuse

_WARM_UP = 3
_Key = tuple[tuple[str, torch.Size, torch.dtype], ...]


class ResidentForward:
    """Calls a model whose weights change in place between calls.

    On CUDA each batch size, with conditions of one shape, is captured in a CUDA graph at its first use, and replayed:
    the weights keep their memory, so that one graph serves all models. Its result is overwritten by the next replay.

    model: its residual blocks, norms and attention are fused here. compiled: through torch.compile.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        # A model of diffusers has imported diffusers; fusing another one would import it for nothing.
        if "diffusers" in sys.modules:
            fuse(model)
        self._call: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
        self._graphs: dict[_Key, _Graph] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        """The prediction for one batch."""
        if inputs.x.device.type != "cuda":
            return inputs.run(self._call)
        return self._graph(inputs)(inputs)

    def _graph(self, inputs: Inputs) -> _Graph:
        """The graph for inputs of these shapes, captured at their first use."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.tensors().items())
        graph = self._graphs.get(key)
        if graph is None:
            pool = next((graph.pool for graph in self._graphs.values()), None)
            graph = self._graphs[key] = _Graph(self._call, inputs, pool)
        return graph

    def forget_graphs(self) -> None:
        """Give back the memory that captured graphs hold."""
        self._graphs.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class _Graph:
    """One forward, captured for one shape of each input."""

    def __init__(self, call: Callable[..., Any], like: Inputs, pool: Any) -> None:
        inputs = Inputs(like.x.clone(), like.timestep.clone(), map_tensors(torch.clone, like.conditions))
        self._inputs = inputs.tensors()
        # Libraries choose their algorithms and allocate in the first calls, which a capture must not hold.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                inputs.run(call)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local: meanwhile another thread may allocate pinned memory for the next delta.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._prediction = inputs.run(call)
        self.pool = self._graph.pool()

    def __call__(self, inputs: Inputs) -> Tensor:
        for name, tensor in inputs.tensors().items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self._prediction
