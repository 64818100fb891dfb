"""Freed memory kept for the next step, as the operating system sees it."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch

from hfbench.allocator import can_keep_freed_memory, keep_freed_memory, keeps_freed_memory

pytestmark = pytest.mark.skipif(not can_keep_freed_memory(), reason="needs Linux with glibc")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    keep_freed_memory(False)


def page_faults(mebibytes: int) -> int:
    """Return how many pages the system has to find for a block that is freed and taken again."""
    found = []
    for _ in range(10):  # aligned blocks leave crumbs, so that the first ones do not fit again
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(mebibytes * 2**18)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


@pytest.mark.parametrize("mebibytes", [16, 128])
def test_kept_memory_is_not_asked_for_again(mebibytes: int) -> None:
    pages = mebibytes * 256
    keep_freed_memory(True)
    assert keeps_freed_memory()
    assert page_faults(mebibytes) < pages / 10


def test_memory_is_given_back_when_keeping_ends() -> None:
    keep_freed_memory(True)
    assert page_faults(128) < 1000
    keep_freed_memory(False)
    assert not keeps_freed_memory()
    # Of huge pages, where the system uses them, there are 64.
    assert page_faults(128) >= 64
