"""The next counterfactual, formed on the host by a thread while the resident model runs on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from guda_fast.deltas.delta import Part
from guda_fast.deltas.resident import ResidentModel

Parts = Callable[[], Iterable[tuple[str, Part]]]


def stages(device: torch.device) -> bool:
    """Whether counterfactuals reach ``device`` through staging memory; on a CPU they are formed in place."""
    return device.type == "cuda"


class Staging:
    """Forms the values of one counterfactual at a time, in pinned memory that is used again and again.

    resident: the model that the values are for
    """

    def __init__(self, resident: ResidentModel) -> None:
        self._resident = resident
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[str, Future[list[str]]] | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, group: str, parts: Parts) -> None:
        """Begin to form the values of a group, unless that was begun already."""
        if self._next is not None and self._next[0] == group:
            return
        self.finish()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="guda_fast-prefetch")
        self._next = group, self._thread.submit(self._form, parts)

    def take(self, group: str, parts: Parts) -> Iterable[tuple[str, torch.Tensor]]:
        """The values of a group by first name, waiting for them; the memory is ours again after ``copied``.

        Raises: what forming them raised
        """
        self.begin(group, parts)
        assert self._next is not None
        formed = self._next[1]
        try:
            names = formed.result()
        finally:
            # An interruption leaves the thread at work, and ``finish`` to wait for it.
            if formed.done():
                self._next = None
        return [(name, self._buffers[name]) for name in names]

    def copied(self) -> None:
        """The copies of what was taken are queued on the current stream."""
        if self._resident.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._resident.device))

    def finish(self) -> None:
        """Wait for what was begun and drop it, whether or not it succeeded."""
        if self._next is not None:
            self._next[1].exception()
            self._next = None

    def clear(self) -> None:
        """Drop everything: the resident model's tensors are about to change."""
        self.finish()
        self._buffers.clear()

    def _form(self, parts: Parts) -> list[str]:
        # The memory may still be read by copies that wait for the device; it is the thread that waits, not the caller.
        if self._copied is not None:
            self._copied.synchronize()
        names = []
        with torch.no_grad():
            for name, part in parts():
                if name not in self._buffers:
                    self._buffers[name] = self._resident.staging(name)
                self._resident.value(name, part, self._buffers[name])
                names.append(name)
        return names
