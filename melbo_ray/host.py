"""What this machine gives a process: cores, and the memory it took."""

import os
import re
import resource
from pathlib import Path


def resident_peak() -> int:
    """The most resident memory that this process has had until now, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process that started this one held
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) << 10
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
