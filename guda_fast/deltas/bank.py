"""The base and its K deltas, with one resident model that becomes any of the counterfactuals."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from guda_fast._validate import check_choice, check_int, describe
from guda_fast.deltas.base import Base, open_base
from guda_fast.deltas.delta import HASH_BYTES, Delta
from guda_fast.deltas.diff import FLOATING, BaseTensor, diff, fitted
from guda_fast.deltas.formats.diffusers import check_config
from guda_fast.deltas.resident import ResidentModel, base_tensors
from guda_fast.deltas.sources import Source, check_source, open_source
from guda_fast.errors import CheckpointError


class DeltaBank:
    """A base model and the K differences that turn it into its counterfactuals; made by ``DeltaBank.load``.

    theta_k = theta_0 + delta_k, formed in float32 (or the resident dtype if that is wider) and rounded once.

    Source: arXiv 2601.22651, section 3: one unlearned model a group, compared with the full-data model.

    >>> bank = DeltaBank.load("runs/full", {"cat": "runs/unlearn_cat"})  # doctest: +SKIP
    >>> with bank.applied("cat") as model:  # doctest: +SKIP
    ...     prediction = model(x_t, t).sample
    """

    def __init__(self, base: Base, resident: ResidentModel, deltas: Mapping[str, Delta]) -> None:
        self._base = base
        self._resident = resident
        self._deltas = dict(deltas)
        self._applied: str | None = None
        self._changed: set[str] = set()
        self._base_hash: str | None = None

    @classmethod
    def load(
        cls,
        base: str | os.PathLike[str] | torch.nn.Module,
        counterfactuals: Mapping[str, Source],
        *,
        scheduler: object = None,
        allow_identical: bool = False,
    ) -> DeltaBank:
        """Load a base and its counterfactuals and keep delta_k = theta_k - theta_0 of each.

        The differences are formed in float32 from the stored values (float64 where one side has it), over
        parameters and floating buffers. Everything is read on the CPU; nothing is downloaded, and no pickle
        may run code. Objects in memory are copied or only read.

        base: a diffusers folder (flat, or with ``unet/`` or ``transformer/`` inside), or a module
        counterfactuals: for each group name, in the order of the result's columns, a diffusers folder, a
            state dict file (safetensors or torch), a state dict, a module, or a Delta [K >= 1 entries]
        scheduler: the noise scheduler's configuration, a diffusers scheduler, or a path; None takes
            ``scheduler_config.json`` from the base's folder, ``scheduler/`` in it, or beside it, if there is one
        allow_identical: accept a counterfactual that equals the base

        Returns: the bank, with the base resident on the CPU in float32 (or the module's own dtypes and device)
        Raises: TypeError for an argument of another type; CheckpointError when a model is missing, unreadable,
            does not fit the base, holds NaN or infinity, or equals the base, naming the file and the key

        >>> bank = DeltaBank.load("runs/full", {"cat": "runs/unlearn_cat"})  # doctest: +SKIP
        >>> bank.groups  # doctest: +SKIP
        ('cat',)
        """
        _check_counterfactuals(counterfactuals)
        # Tensors made under inference mode could never be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            opened = open_base(base, scheduler)
            tensors = base_tensors(opened.model, opened.origin)
            deltas: dict[str, Delta] = {}
            for group, source in counterfactuals.items():
                deltas[group] = _delta(opened, tensors, source, f"counterfactuals[{group!r}]")
                if not deltas[group].parts and not allow_identical:
                    raise CheckpointError(
                        f"{deltas[group].origin}: equals the base ({opened.origin}) in every parameter, so that group "
                        f"{group!r} would score zero everywhere; pass allow_identical=True if that is meant"
                    )
            changing = {name for delta in deltas.values() for name in delta.parts}
            return cls(opened, ResidentModel(opened.model, tensors, changing), deltas)

    @property
    def model(self) -> torch.nn.Module:
        """The resident model, in eval mode: the base, or the counterfactual that is applied."""
        return self._resident.model

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """The noise scheduler's configuration, or None if none was found or given."""
        return None if self._base.scheduler is None else dict(self._base.scheduler)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group names, in the order in which they were given."""
        return tuple(self._deltas)

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """The deltas, in the order of ``groups``."""
        return tuple(self._deltas.values())

    @property
    def applied_group(self) -> str | None:
        """The group whose counterfactual is resident; None for the base."""
        return self._applied

    @property
    def base_hash(self) -> str:
        """A hash of theta_0 and the model's configuration; dtype and device of the resident model do not matter."""
        if self._base_hash is None:
            # The tensors that no delta changes are read from the model, and hold theta_0 at all times.
            self._base_hash = self._resident.hash(json.dumps(self._base.config, sort_keys=True))
        return self._base_hash

    @property
    def delta_hashes(self) -> dict[str, str]:
        """A hash of each group's delta, over names and bytes."""
        return {group: delta.hash for group, delta in self._deltas.items()}

    @property
    def hash(self) -> str:
        """A hash of the base, and of all groups' names and deltas in their order."""
        content = json.dumps([self.base_hash, list(self.delta_hashes.items())])
        return hashlib.blake2b(content.encode(), digest_size=HASH_BYTES).hexdigest()

    def apply(self, group: int | str) -> torch.nn.Module:
        """Make the resident model the counterfactual of ``group``, in place.

        Only tensors that differ from what is resident are written, into the memory they have. When that
        fails, the base is restored.

        group: a name, or its position in ``groups`` [0 <= k < K]
        Returns: the resident model
        Raises: TypeError or ValueError when there is no such group
        """
        name = self._name(group)
        if name != self._applied:
            parts = self._deltas[name].parts
            try:
                self._write(parts)
            except BaseException:
                self.restore()
                raise
            self._applied = name
        return self.model

    def restore(self) -> torch.nn.Module:
        """Make the resident model the base again, bit for bit, and return it."""
        self._write({})
        return self.model

    @contextmanager
    def applied(self, group: int | str) -> Iterator[torch.nn.Module]:
        """The resident model as the counterfactual of ``group`` for the length of a ``with`` block.

        At its end, also after an exception, the model is again what it was before: the base, or the group of
        an enclosing block.

        group: a name, or its position in ``groups``
        """
        before = self._applied
        try:
            yield self.apply(group)
        finally:
            if before is None:
                self.restore()
            else:
                self.apply(before)

    def to(
        self,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> DeltaBank:
        """Move or cast the resident model, and keep the group that is applied.

        Use this and not ``bank.model.to(...)``: what a narrower dtype rounds away is kept on the host, so that
        a later cast to a wider one gives the base back bit for bit.

        device, memory_format: as in ``torch.nn.Module.to``
        dtype: float32, float64, bfloat16 or float16
        Returns: the bank
        Raises: TypeError for another dtype
        """
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(f"DeltaBank.to: dtype must be float32, float64, bfloat16 or float16, got {describe(dtype)}")
        how = {"device": device, "dtype": dtype, "memory_format": memory_format}
        before = self._applied
        self.restore()
        try:
            self._resident.move(**{key: value for key, value in how.items() if value is not None})
        finally:
            if before is not None:
                self.apply(before)
        return self

    def __len__(self) -> int:
        return len(self._deltas)

    def __repr__(self) -> str:
        changed = f", {self._applied!r} applied" if self._applied is not None else ""
        return f"DeltaBank({type(self.model).__name__} from {self._base.origin}, {len(self)} groups{changed})"

    def _write(self, parts: Mapping[str, Any]) -> None:
        """Write ``parts``, and the base wherever the model may still differ from it."""
        touched = self._changed.union(parts)
        # Noted first: after an interruption nobody knows which of them were written.
        self._changed, self._applied = touched, None
        self._resident.write((name, parts.get(name)) for name in touched)
        self._changed = set(parts)

    def _name(self, group: int | str) -> str:
        if isinstance(group, str):
            return check_choice("DeltaBank", "group", group, self.groups)
        return self.groups[check_int("DeltaBank", "group", group, 0, len(self) - 1)]


def _delta(base: Base, tensors: Sequence[BaseTensor], source: Source, name: str) -> Delta:
    if isinstance(source, Delta):
        return fitted(tensors, source, name)
    weights = open_source(source, name)
    if base.config is not None:
        check_config(base.config, type(base.model), weights)
    return diff(tensors, weights)


def _check_counterfactuals(counterfactuals: object) -> None:
    if not isinstance(counterfactuals, Mapping):
        raise TypeError(
            f"DeltaBank.load: counterfactuals must be a mapping of group names, got {describe(counterfactuals)}"
        )
    if not counterfactuals:
        raise CheckpointError("DeltaBank.load: counterfactuals must name at least one group, got an empty mapping")
    for group, source in counterfactuals.items():
        if not isinstance(group, str):
            raise TypeError(f"DeltaBank.load: group names must be strings, got {describe(group)}")
        if not group:
            raise ValueError("DeltaBank.load: group names must not be empty, got ''")
        check_source(source, f"counterfactuals[{group!r}]")
