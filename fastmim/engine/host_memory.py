"""On a CPU: memory that a step frees stays with the process, for the next step.

glibc hands blocks of 32 MiB and more back to the system at once, so every large activation of every step costs
thousands of page faults anew. PyTorch keeps a pool of its own on GPUs, on CPUs it does not.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell malloc so, for this process and those it forks from now on; False where malloc is not glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _MOST))
