"""What computes: by name, and with how many cores."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may run on, as many of them as its container's quota pays for."""
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def share_cores(processes: int) -> None:
    """Give this process its threads of a machine with so many, where nobody has decided that."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    by_torch = torch.get_num_threads()
    threads = threads_for(usable_cores(), processes, by_torch)
    if processes > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for those that this one starts
    if threads < by_torch:
        torch.set_num_threads(threads)


def threads_for(cores: int, processes: int, by_torch: int) -> int:
    """Threads of one of the ``processes`` that share ``cores``.

    ``by_torch``: what torch would take, one for each core that is not a second thread of another.
    """
    return min(by_torch, max(1, cores // processes))


def _quotas() -> list[float]:
    """Cores' worth of time that control groups allow, this process's and those around it."""
    quotas = []
    with suppress(OSError, ValueError):  # version 1
        time, period = (
            int((_CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text())
            for name in ("quota", "period")
        )
        quotas += [time / period] if time > 0 else []
    with suppress(OSError, ValueError, StopIteration):  # version 2
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = _CGROUPS / next(line for line in lines if line.startswith("0::"))[3:].strip("/")
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):
                time, period = map(int, (group / "cpu.max").read_text().split())  # or "max 100000"
                quotas.append(time / period)
    return quotas


def cpu_name() -> str:
    """The processor's name as its maker writes it, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
