"""Leases: one holder at a time, by the file system's clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from guda_fast.store import Store
from store_cases import fill, made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return made(tmp_path / "store", queries=4, groups=2)


def lease_files(store: Store) -> list[Path]:
    return sorted(store.claims_folder.iterdir())


def test_one_has_a_shard_until_it_is_released(store: Store) -> None:
    (shard,) = store.missing()
    lease = store.claim(shard, "a", 60)
    assert lease is not None and store.claim(shard, "b", 60) is None
    assert store.leases() == [(shard, "a")] and lease.renew()
    lease.release()
    assert store.leases() == [] and lease_files(store) == []
    with store.claim(shard, "b", 60):
        assert store.leases() == [(shard, "b")]


def test_a_finished_shard_cannot_be_claimed(store: Store) -> None:
    (shard,) = store.missing()
    fill(store)
    assert store.claim(shard, "a", 60) is None


def test_nobody_computes_a_shard_that_is_finished(store: Store) -> None:
    """A process was killed between writing the part and releasing the lease."""
    (shard,) = store.missing()
    assert store.claim(shard, "dead", 60) is not None
    fill(store)
    assert len(lease_files(store)) == 1
    assert Store.open(store.path).leases() == []


@pytest.mark.parametrize("jump", [-120.0, 120.0], ids=["forward", "back"])
def test_a_lease_is_over_when_its_owner_died_or_the_clock_jumped(store: Store, jump: float) -> None:
    """Seen from now, the lease was made long ago; or in the future, as where the clock was set back since."""
    (shard,) = store.missing()
    first = store.claim(shard, "dead", 60)
    now = time.time() + jump
    os.utime(lease_files(store)[0], (now, now))
    assert store.leases() == []
    second = store.claim(shard, "b", 60)
    assert first is not None and second is not None and store.claim(shard, "c", 60) is None
    assert not first.renew()
    first.release()  # of what is another's now
    assert store.leases() == [(shard, "b")]
    second.release()
    assert lease_files(store) == []
    assert not first.renew()


def test_a_small_jump_changes_nothing(store: Store) -> None:
    (shard,) = store.missing()
    store.claim(shard, "a", 60)
    for jump in (-30.0, 30.0):
        now = time.time() + jump
        os.utime(lease_files(store)[0], (now, now))
        assert store.claim(shard, "b", 60) is None


def test_leases_that_are_over_are_cleaned(store: Store) -> None:
    (shard,) = store.missing()
    store.claim(shard, "a", 60)
    assert store.clean() == []
    os.utime(lease_files(store)[0], (1, 1))
    (removed,) = store.clean()
    assert removed.name.startswith(shard.name) and lease_files(store) == []


def test_a_lease_without_content_is_over_by_who_asks(store: Store) -> None:
    (shard,) = store.missing()
    store.claim(shard, "a", 60)
    lease_files(store)[0].write_text("")
    assert store.claim(shard, "b", 60) is None
    now = time.time() - 30
    os.utime(lease_files(store)[0], (now, now))
    assert store.claim(shard, "b", 60) is None
    assert store.claim(shard, "b", 20) is not None


def test_arguments_are_checked(store: Store) -> None:
    with pytest.raises(ValueError, match="claim: seconds must be finite and at least 0.001, got 0.0"):
        store.claim(store.missing()[0], "a", 0)
