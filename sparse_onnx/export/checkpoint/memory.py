"""How much memory is left: of the machine, and of the control groups that this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process may still use, pages of files counted as free. None where the system does not say."""
    free: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for group in _ancestors(path):
                if not controllers:
                    free += left_in(_GROUPS / group)
                elif "memory" in controllers.split(","):
                    free += left_in_first_version(_GROUPS / "memory" / group)
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)


def _ancestors(path: str) -> Iterator[str]:
    """A group and all above it, whose limits hold too. Within a container the path may be another's: the root stays."""
    parts = [part for part in path.split("/") if part]
    for length in range(len(parts), -1, -1):
        yield "/".join(parts[:length])


def left_in(group: Path) -> list[int]:
    """Of a control group with a limit, what it leaves; nothing of one without."""
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        files = _files(group, ("inactive_file", "active_file"))
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - int(used) + files]


def left_in_first_version(group: Path) -> list[int]:
    """The same where control groups are of version 1, in which no limit is an enormous one."""
    try:
        limit, used = (int((group / f"memory.{name}_in_bytes").read_text()) for name in ("limit", "usage"))
        files = _files(group, ("total_inactive_file", "total_active_file"))
    except OSError:
        return []
    return [] if limit >= 1 << 60 else [limit - used + files]


def _files(group: Path, names: tuple[str, ...]) -> int:
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(line[1]) for line in lines if line[0] in names)
