"""How the C library hands out memory: on a CPU a fifth of a network's time may go into asking for the same pages."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
_MOST = 2**25  # the largest threshold that glibc takes; blocks above it go back to the system all the same


def keep_freed_memory() -> bool:
    """Lets this process keep blocks of up to 32 MB that it frees, for the next ones; returns whether it does.

    By default glibc gives the memory of feature maps back to the system when they are freed, and gets it again, page
    by page and zeroed, for the next ones. The process no longer shrinks then, but its peak is the same: what is freed
    is what is used next. Does nothing where there is another C library. For programs alone (the command line, the
    demonstrations, the benchmarks): a library does not decide this for the process that imports it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_MMAP_THRESHOLD, _MOST), mallopt(_M_TRIM_THRESHOLD, _NEVER)])
