"""The base and its K deltas, with one resident model that becomes any of the counterfactuals."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, overload

import torch

from guda_fast._validate import check_choice, check_int, describe
from guda_fast.deltas.base import Base, open_base
from guda_fast.deltas.delta import HASH_BYTES, Delta, Part
from guda_fast.deltas.diff import FLOATING
from guda_fast.deltas.groups import Group, HeldGroup, open_group
from guda_fast.deltas.pack import Pack, PackGroup
from guda_fast.deltas.resident import ResidentModel
from guda_fast.deltas.sources import SourceLike, check_source, opened_pack, resolved
from guda_fast.deltas.staging import Staging, stages
from guda_fast.deltas.survey import Survey, survey
from guda_fast.errors import CheckpointError

ProgressCallback = Callable[[int, int], object]
"""Called with (groups done, groups in all)."""
_T = TypeVar("_T")


class DeltaBank:
    """A base model and the K differences that turn it into its counterfactuals; made by ``DeltaBank.load``.

    theta_k = theta_0 + delta_k, formed in float32 (or the resident dtype if that is wider) and rounded once.

    Source: arXiv 2601.22651, section 3: one unlearned model a group, compared with the full-data model.

    >>> bank = DeltaBank.load("runs/full", {"cat": "runs/unlearn_cat"})  # doctest: +SKIP
    >>> with bank.applied("cat") as model:  # doctest: +SKIP
    ...     prediction = model(x_t, t).sample
    """

    def __init__(self, base: Base, resident: ResidentModel, *, allow_identical: bool) -> None:
        self._base = base
        self._resident = resident
        self._staging = Staging(resident)
        self._allow_identical = allow_identical
        self._sources: dict[str, Group | PackGroup] = {}
        self._surveys: dict[str, Survey] = {}
        self._applied: str | None = None
        self._changed: set[str] = set()
        self._weights_hash: str | None = None

    @classmethod
    def load(
        cls,
        base: str | os.PathLike[str] | torch.nn.Module,
        counterfactuals: Mapping[str, SourceLike] | str | os.PathLike[str] | Pack,
        *,
        scheduler: object = None,
        allow_identical: bool = False,
    ) -> DeltaBank:
        """Load a base, and open its counterfactuals.

        The differences delta_k = theta_k - theta_0 are formed in float32 from the stored values (float64 where one
        side has it), over parameters and floating buffers: of objects in memory here, of files whenever a group is
        used. Of files only names, shapes, dtypes and configurations are read here, and nothing is kept; ``survey``
        checks their values. Everything is read on the CPU; nothing is downloaded, and no pickle may run code.
        Objects in memory are copied or only read.

        base: a diffusers folder (flat, or with ``unet/`` or ``transformer/`` inside), or a module
        counterfactuals: for each group name, in the order of the result's columns, a diffusers folder, a
            state dict file (safetensors or torch), an adapter, a state dict, a module, a Delta, a callable that gives
            one of these, a Pack of one group or its path, or a Source, which says how to read it [K >= 1 entries];
            or a delta pack or its path, for all groups of it
        scheduler: the noise scheduler's configuration, a diffusers scheduler, or a path; None takes
            ``scheduler_config.json`` from the base's folder, ``scheduler/`` in it, or beside it, if there is one
        allow_identical: accept a counterfactual that equals the base

        Returns: the bank, with the base resident on the CPU in float32 (or the module's own dtypes and device)
        Raises: TypeError for an argument of another type; CheckpointError when a model is missing, unreadable,
            does not fit the base, or (the base, and objects in memory) holds NaN or infinity or equals the base,
            naming the file and the key

        >>> bank = DeltaBank.load("runs/full", {"cat": "runs/unlearn_cat"})  # doctest: +SKIP
        >>> bank.groups  # doctest: +SKIP
        ('cat',)
        """
        if isinstance(counterfactuals, str | os.PathLike):
            counterfactuals = Pack.open(counterfactuals)
        if not isinstance(counterfactuals, Pack):
            _check_counterfactuals(counterfactuals)
        # Tensors made under inference mode could never be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            opened = open_base(base, scheduler)
            bank = cls(opened, ResidentModel(opened.model, opened.origin), allow_identical=allow_identical)
            if isinstance(counterfactuals, Pack):
                bank._add_packed(counterfactuals, {group: group for group in counterfactuals.groups})
            else:
                bank._add(counterfactuals)
        return bank

    @property
    def origin(self) -> str:
        """Where the base came from: a path, or a description of an object in memory."""
        return self._base.origin

    @property
    def model(self) -> torch.nn.Module:
        """The resident model, in eval mode: the base, or the counterfactual that is applied."""
        return self._resident.model

    @property
    def config(self) -> dict[str, Any] | None:
        """The base's complete configuration, or None for a module without one."""
        return None if self._base.config is None else dict(self._base.config)

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """The noise scheduler's configuration, or None if none was found or given."""
        return None if self._base.scheduler is None else dict(self._base.scheduler)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group names, in the order in which they were given."""
        return tuple(self._sources)

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """The deltas, in the order of ``groups``, their dense parts in the memory layout of the resident model.

        Parts of a group in files are read whenever they are asked for, and not kept.
        """
        return tuple(source.delta(partial(self._support, group)) for group, source in self._sources.items())

    @property
    def applied_group(self) -> str | None:
        """The group whose counterfactual is resident; None for the base."""
        return self._applied

    @property
    def base_hash(self) -> str:
        """A hash of theta_0 and the model's configuration; dtype and device of the resident model do not matter."""
        return _json_hash([self._base.config, self.weights_hash])

    @property
    def weights_hash(self) -> str:
        """A hash of theta_0 alone, by which a pack knows its base; dtype and device do not matter."""
        if self._weights_hash is None:
            # The tensors that no delta changes are read from the model, and hold theta_0 at all times.
            self._weights_hash = self._resident.hash("")
        return self._weights_hash

    @property
    def delta_hashes(self) -> dict[str, str]:
        """A hash of each group's delta, over names and bytes; surveys the groups that have not been."""
        return {group: self.survey(group).hash for group in self.groups}

    @property
    def hash(self) -> str:
        """A hash of the base, and of all groups' names and deltas in their order."""
        return _json_hash([self.base_hash, list(self.delta_hashes.items())])

    @overload
    def survey(self, group: int | str, *, progress: ProgressCallback | None = None) -> Survey: ...

    @overload
    def survey(self, group: None = None, *, progress: ProgressCallback | None = None) -> dict[str, Survey]: ...

    def survey(
        self, group: int | str | None = None, *, progress: ProgressCallback | None = None
    ) -> Survey | dict[str, Survey]:
        """Read and check all values of a group, or of every group, once; later calls return what was found.

        One tensor is in memory at a time. Files must not change from ``load`` on.

        group: a name, or its position in ``groups`` [0 <= k < K]; None for all
        progress: called after each group with (groups done, groups in all)
        Returns: the survey, or all of them by group name, in the order of ``groups``
        Raises: TypeError or ValueError when there is no such group; CheckpointError when a counterfactual holds NaN or
            infinity, equals the base, or has changed since it was opened, naming the file and the key

        >>> bank.survey("cat").cosine["bfloat16"]  # doctest: +SKIP
        0.97
        """
        names = self.groups if group is None else (self._name(group),)
        for done, name in enumerate(names, 1):
            if name not in self._surveys:
                source = self._sources[name]
                with torch.no_grad():
                    found = survey(source.origin, source.parts(), self._resident.theta_0)
                self.check_different(name, found.support)
                self._surveys[name] = found
            if progress is not None:
                progress(done, len(names))
        return {name: self._surveys[name] for name in names} if group is None else self._surveys[names[0]]

    def prefetch(self, group: int | str) -> None:
        """Begin to form the counterfactual of ``group`` on the host, for an ``apply`` that then only copies it.

        A thread reads and adds the delta into pinned memory while the device works. On a CPU this does nothing,
        because ``apply`` writes in place there. What goes wrong is raised by ``apply``.

        group: a name, or its position in ``groups`` [0 <= k < K]
        Raises: TypeError or ValueError when there is no such group; CheckpointError as ``survey``, which comes first
            where it was not done yet
        """
        name = self._name(group)
        if name != self._applied and stages(self._resident.device):
            self._staging.begin(name, self._parts(name))

    def apply(self, group: int | str) -> torch.nn.Module:
        """Make the resident model the counterfactual of ``group``, in place.

        Surveys the group first, if that was not done. Only tensors that differ from what is resident are written, into
        the memory they have; on a CUDA device the copies are queued on the current stream. When that fails, the base
        is restored.

        group: a name, or its position in ``groups`` [0 <= k < K]
        Returns: the resident model
        Raises: TypeError or ValueError when there is no such group; CheckpointError as ``survey``
        """
        name = self._name(group)
        if name != self._applied:
            try:
                parts = self._parts(name)
                if stages(self._resident.device):
                    self._write(self._staging.take(name, parts), self._resident.put)
                    self._staging.copied()
                else:
                    self._write(parts(), self._resident.write)
            except BaseException:
                self.restore()
                raise
            self._applied = name
        return self.model

    def restore(self) -> torch.nn.Module:
        """Make the resident model the base again, bit for bit, and return it."""
        self._write((), self._resident.write)
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
        self._staging.clear()
        self.restore()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._resident.move(**{key: value for key, value in how.items() if value is not None})
                for source in self._sources.values():
                    source.lay_out()
        finally:
            if before is not None:
                self.apply(before)
        return self

    @property
    def memory(self) -> int:
        """A number that changes when `to` gives the resident model other memory."""
        return hash(tuple(tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())))

    def __len__(self) -> int:
        return len(self._sources)

    def __repr__(self) -> str:
        changed = f", {self._applied!r} applied" if self._applied is not None else ""
        return f"DeltaBank({type(self.model).__name__} from {self._base.origin}, {len(self)} groups{changed})"

    def _add(self, counterfactuals: Mapping[str, SourceLike]) -> None:
        for group, source in counterfactuals.items():
            name = f"counterfactuals[{group!r}]"
            what, how = resolved(source, name)
            if (pack := opened_pack(what, how)) is not None:
                self._add_packed(pack, {group: pack.only_group(name)})
                continue
            # What a callable gave, which is called once.
            opened = self._sources[group] = open_group(replace(how, what=what), name, self._base, self._resident)
            if isinstance(opened, HeldGroup):
                self.check_different(group, opened.names)

    def _add_packed(self, pack: Pack, names: Mapping[str, str]) -> None:
        """Add groups of a pack; names gives what the pack calls each."""
        self.check_owns(pack)
        pack.check_fits(self._resident.tensors)
        for group, name in names.items():
            opened = self._sources[group] = PackGroup(pack, name, self._resident)
            self.check_different(group, opened.survey.support)
            self._surveys[group] = opened.survey

    def check_owns(self, pack: Pack) -> None:
        """Raise CheckpointError where a pack belongs to another base."""
        pack.check_base(self._base, self.weights_hash)

    def _support(self, group: str) -> Collection[str]:
        return self.survey(group).support

    def source(self, group: int | str) -> Group | PackGroup:
        """What gives the parts of a group, and says where it came from."""
        return self._sources[self._name(group)]

    def theta_0(self, name: str) -> torch.Tensor:
        """The base's value on the CPU, in float32 or wider; it may share the model's memory."""
        return self._resident.theta_0(name)

    def check_different(self, group: str, changed: Collection[str]) -> None:
        """Raise CheckpointError where a group changes nothing, unless that was allowed."""
        if not (changed or self._allow_identical):
            raise CheckpointError(
                f"{self._sources[group].origin}: equals the base ({self._base.origin}) in every parameter, so that "
                f"group {group!r} would score zero everywhere; pass allow_identical=True if that is meant"
            )

    def _parts(self, group: str) -> Callable[[], Iterable[tuple[str, Part]]]:
        """Gives the parts of a group, of which only what the survey found changed is read."""
        support = self.survey(group).support
        with torch.inference_mode(False), torch.no_grad():
            self._resident.keep(support)
        return partial(self._sources[group].parts, support)

    def _write(self, parts: Iterable[tuple[str, _T]], write: Callable[[str, _T], None]) -> None:
        """Write ``parts``, and the base wherever the model may still differ from it."""
        self._applied = None
        written: set[str] = set()
        with torch.inference_mode(False), torch.no_grad():
            for name, part in parts:
                # Noted first: after an interruption nobody knows whether it was written.
                self._changed.add(name)
                write(name, part)
                written.add(name)
                del part  # the next one is formed in its memory
            for name in self._changed - written:
                self._resident.restore(name)
        self._changed = written

    def _name(self, group: int | str) -> str:
        if isinstance(group, str):
            return check_choice("DeltaBank", "group", group, self.groups)
        return self.groups[check_int("DeltaBank", "group", group, 0, len(self) - 1)]


def _json_hash(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=HASH_BYTES).hexdigest()


def _check_counterfactuals(counterfactuals: object) -> None:
    if not isinstance(counterfactuals, Mapping):
        raise TypeError(
            "DeltaBank.load: counterfactuals must be a mapping of group names, or a delta pack, "
            f"got {describe(counterfactuals)}"
        )
    if not counterfactuals:
        raise CheckpointError("DeltaBank.load: counterfactuals must name at least one group, got an empty mapping")
    for group, source in counterfactuals.items():
        if not isinstance(group, str):
            raise TypeError(f"DeltaBank.load: group names must be strings, got {describe(group)}")
        if not group:
            raise ValueError("DeltaBank.load: group names must not be empty, got ''")
        check_source(source, f"counterfactuals[{group!r}]")
