# SPDX-License-Identifier: Apache-2.0
"""Memory that was used before, for new tensors: :func:`keep_memory`."""

from __future__ import annotations

import ctypes
import logging

__all__ = ["keep_memory"]

log = logging.getLogger("sparsebwd")

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


_kept = False


def keep_memory() -> bool:
    """Have malloc keep the memory that this process frees, so that the next training step need not ask for it again.

    By default glibc gives large blocks, and the end of its heap, back to the system as they are freed. PyTorch takes every
    tensor on the CPU from malloc, so that each step writes its tensors to fresh pages, which the system has to clear first.
    With dense convolutions as with sparse ones, the pages of a step are afterwards those of the step before.

    It holds for the whole process and to its end, for all that malloc serves. The process stays as large as it was at its
    largest, and somewhat larger than without: blocks of all sizes share one heap, whose gaps do not always fit. Call it
    at the start, before the first step. Calling it again does nothing more. Memory on a GPU is not concerned.

    Returns:
        True: done. False: not done, because the C library is not glibc or refused; the logger "sparsebwd" says so at
        level WARNING. Everything works as before then.

    Examples:
        >>> import sparsebwd
        >>> sparsebwd.keep_memory()  # at the start of a program, where the C library is glibc
        True
    """
    global _kept
    reason = _keep()
    _kept = _kept or reason is None
    if reason is not None:
        log.warning("keep_memory: freed memory goes back to the system as before: %s", reason)
    return reason is None


def kept() -> bool:
    """Whether :func:`keep_memory` has been called and did it."""
    return _kept


def _keep() -> str | None:
    """Why not; None: done."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  others have a mallopt too, with other parameters
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return "the C library is not glibc"
    # Large blocks come from the heap, and the heap never shrinks.
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    return None if done else "mallopt refused"
