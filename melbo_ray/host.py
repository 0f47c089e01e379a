"""Cores and memory of this process."""

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Progress:
    """What this process has done so far, for another thread to see that it is at work.

    Attributes:
        passes: number of passes through a model, or of solutions of a large linear problem, that were begun.
    """

    passes: int = 0


progress = Progress()


def resident_peak() -> int:
    """Peak resident memory of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the memory of the process that forked this one
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) << 10
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
