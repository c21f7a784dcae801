"""Memory of this process in MiB, on Linux and macOS. Windows has no module `resource`."""

import os
import subprocess
import sys


def peak():
    """What it held at most."""
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def resident():
    """What it holds now."""
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return int(subprocess.run(command, capture_output=True, check=True).stdout) / 2**10
