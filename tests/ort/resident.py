"""What sessions keep in memory, in a process of its own.

`python resident.py JOBS` reads ``[{"model": path, "entries": {...}, "feeds": [{name: shape or flag}, ...]}, ...]`` and
prints ``[[[anonymous, file], ...], ...]``: for each job the megabytes by which the process has grown after the session
was made and after each run. Memory of files is that of weights which are mapped and were touched.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from typing import Any

import numpy as np
import onnxruntime


def resident() -> np.ndarray:
    gc.collect()
    # Packing allocates and frees; the allocator keeps what was freed, and it would count as the session's.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        sizes = dict(line.split(":", 1) for line in file)
    return np.asarray([int(sizes[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile")])


def measure(job: dict[str, Any]) -> list[list[float]]:
    before = resident()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in job.get("entries", {}).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    grown = [resident() - before]
    for feeds in job["feeds"]:
        given = {
            name: np.asarray(value) if isinstance(value, bool) else np.ones(value, np.float32)
            for name, value in feeds.items()
        }
        session.run(None, given)
        grown.append(resident() - before)
    return [step.tolist() for step in grown]


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    measure(jobs[0])  # the library's own pages are touched now, not in the first job that counts
    print(json.dumps([measure(job) for job in jobs]))


if __name__ == "__main__":
    main()
