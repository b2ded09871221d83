"""Whether the C library keeps freed memory, which decides how often a training step has to ask for pages again."""

from __future__ import annotations

import ctypes
import os

# Names of glibc's parameters for `mallopt`, from <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT_PIECE_BYTES = 32 * 2**20  # glibc accepts no more
_NEVER_TRIM_BYTES = 2**31 - 1
SETTINGS_OF_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep memory that is freed in this process, for what is allocated next.

    By itself it gives the top of its heap back to the system at the end of a backward pass, when activations and
    gradients are freed. The next step then takes hundreds of page faults, each of which clears a page. What a step
    needs at most stays the same: it is only kept between steps.

    Returns:
        False if freed memory is given back as before: the environment has settings of the user's, or the C library
        is another one.
    """
    if any(name in os.environ for name in SETTINGS_OF_USERS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Both: a threshold that is set switches off the adaptation of the other one.
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_PIECE_BYTES) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES)
    )
