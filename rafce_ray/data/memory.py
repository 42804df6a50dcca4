"""Keeping the memory of preparing a dataset small, however many images it has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def system_allocator() -> Iterator[None]:
    """Let arrow allocate from the C library: its own pools keep some 20 MB of what reading 100,000 labels has freed."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def release_memory() -> None:
    """Hand memory that is free in this process back to the operating system; later needs would come on top of it."""
    # glibc keeps what was freed; other C libraries have no such call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
