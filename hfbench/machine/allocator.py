"""Whether the C library keeps freed memory for the next step, or gives it back to the system.

A training step on a CPU frees all activations and asks for them again. glibc returns what is above
its thresholds to the kernel, which then has to find and zero every page anew; that can take as long
as the arithmetic (`docs/performance.md`). What is kept is cut up, so that large images need up to a
third more memory.
"""

from __future__ import annotations

import ctypes
import sys

# mallopt(3) and malloc.h. Setting a threshold stops glibc from moving both by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER_TRIM, _NO_MMAP = -1, 0
_USUAL_MMAP_MAX = 65536
# Where glibc's own moving ends once blocks of 32 MiB have been freed: twice that may lie idle.
_LAST_MMAP_THRESHOLD = 32 * 2**20

_kept = False


def keep_freed_memory(enabled: bool) -> None:
    """Turn keeping on or off for this process; nothing happens without glibc.

    Off, the C library is left as it is if nothing was ever kept, else set to where it ends by
    itself.
    """
    global _kept
    if enabled == _kept or not can_keep_freed_memory():
        return
    library = ctypes.CDLL(None)
    if enabled:
        # A block with a mapping of its own is given back whatever its size.
        library.mallopt(_MMAP_MAX, _NO_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    else:
        library.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        library.mallopt(_MMAP_THRESHOLD, _LAST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LAST_MMAP_THRESHOLD)
        library.malloc_trim(0)
    _kept = enabled


def keeps_freed_memory() -> bool:
    """Tell whether freed memory is kept."""
    return _kept


def can_keep_freed_memory() -> bool:
    """Tell whether this process allocates with glibc."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
