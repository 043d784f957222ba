"""What this machine is: the name of its processor, and how much its caches hold."""

from __future__ import annotations

import glob
import os
import platform

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
#: Where the system does not say.
_USUAL_CACHE = 64 << 20


def processor() -> str:
    """The processor's model, else its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes() -> int:
    """Bytes of the largest cache; 64 MiB where the system does not say."""
    sizes = [_size(path) for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max(sizes, default=0) or _USUAL_CACHE


def _size(path: str) -> int:
    try:
        with open(path) as file:
            text = file.read().strip()
        return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)
    except (OSError, ValueError, IndexError):
        return 0
