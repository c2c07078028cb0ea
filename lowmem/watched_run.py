"""Runs a command, samples its memory and the GPU from outside, and compares the run with the guideline's targets.

The guideline's targets (docs/planner.md): GPU utilisation 85 to 100 %, device memory 70 to 85 %, host memory below
80 % of its limit, step time within 1.5 times the reference. What cannot be measured here is said, not counted as met.
For records of whole series use experiments/memory_monitor.py; this needs nothing but /proc.
"""

import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from lowmem.plan_host import memory_limit

TARGETS = {
    "GPU utilisation": (0.85, 1.0),
    "device memory": (0.70, 0.85),
    "host memory": (0.0, 0.80),
    "step time": (0.0, 1.5),
}
STEP_TIME = re.compile(r"([0-9.]+)\s*(s/it|it/s)")
KEPT_LINES = 5000


@dataclass
class WatchedRun:
    """What was seen of a run.

    Attributes:
        exit_code: negative for a signal.
        log: its last lines.
        rss_bytes: resident memory of the process tree, one sample after the other.
        device_bytes, device_total_bytes, utilization: of the first GPU, None without one.
        step_time_s: median of what progress bars said, None if they said nothing.
    """

    exit_code: int
    log: str
    wall_s: float
    rss_bytes: list[int] = field(default_factory=list)
    device_bytes: int | None = None
    device_total_bytes: int | None = None
    utilization: float | None = None
    step_time_s: float | None = None


def tree_rss(root: int) -> int:
    """Resident bytes of a process and its descendants; a page that two share counts twice."""
    parents, sizes = {}, {}
    page = os.sysconf("SC_PAGE_SIZE")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)], sizes[int(name)] = int(fields[1]), int(fields[21]) * page

    def belongs(pid: int | None) -> bool:
        while pid in parents:
            if pid == root:
                return True
            pid = parents[pid]
        return False

    return sum(size for pid, size in sizes.items() if belongs(pid))


class _Gpu:
    """The first GPU through NVML, or nothing."""

    def __init__(self):
        self.handle = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no package, no driver or no device: there is nothing to sample
            return

    def read(self):
        if self.handle is None:
            return None
        memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
        return memory.used, memory.total, self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu / 100


def watch(command: list[str], interval_s: float = 0.2, show: bool = True, env: dict | None = None) -> WatchedRun:
    """Runs `command` to its end.

    Raises:
        ValueError: if it cannot be started.
    """
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        )
    except OSError as error:
        raise ValueError(f"the command {command[0]!r} cannot be started: {error}") from None
    lines: deque[str] = deque(maxlen=KEPT_LINES)

    def read():
        for line in process.stdout:
            lines.append(line)
            if show:
                sys.stdout.write(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    gpu, samples, used, utilization, total = _Gpu(), [], [], [], None
    while process.poll() is None:
        samples.append(tree_rss(process.pid))
        if (reading := gpu.read()) is not None:
            used.append(reading[0])
            utilization.append(reading[2])
            total = reading[1]
        time.sleep(interval_s)
    reader.join(timeout=5)
    log = "".join(lines)
    return WatchedRun(
        process.returncode,
        log,
        time.monotonic() - start,
        [size for size in samples if size],
        max(used, default=None),
        total,
        mean_while_used(utilization),
        step_time(log),
    )


def mean_while_used(utilization: list[float]) -> float | None:
    """Mean from the first to the last sample in which the GPU did anything: without start-up and end, with the pauses
    between. None if it never did."""
    used = [i for i, value in enumerate(utilization) if value > 0]
    return statistics.mean(utilization[used[0] : used[-1] + 1]) if used else None


def step_time(log: str) -> float | None:
    """Median seconds per step of a progress bar (`1.5s/it`, `2.0it/s`), without its first."""
    times = [float(n) if unit == "s/it" else 1 / float(n) for n, unit in STEP_TIME.findall(log) if float(n) > 0][1:]
    return sorted(times)[len(times) // 2] if times else None


def window_peaks(samples: list[int], windows: int = 10) -> list[float]:
    """Peaks of the second half of a run, in windows of equal length: for `lowmem.failures.leak`, where steps are not
    marked."""
    half = samples[len(samples) // 2 :]
    size = len(half) // windows
    return [max(half[i * size : (i + 1) * size]) for i in range(windows)] if size else []


def summary(run: WatchedRun, reference_s: float | None = None) -> list[str]:
    """One line for each target: what was seen, the target, met or not, or why it is not known."""
    limit, source = memory_limit()
    host = max(run.rss_bytes, default=None)
    values = {
        "GPU utilisation": (run.utilization, "no GPU was sampled"),
        "device memory": (
            run.device_bytes / run.device_total_bytes if run.device_bytes else None,
            "no GPU was sampled",
        ),
        "host memory": (host / limit if host else None, "the run was too short to be sampled"),
        "step time": (
            run.step_time_s / reference_s if run.step_time_s and reference_s else None,
            "no reference was given" if run.step_time_s else "the log shows no step times",
        ),
    }
    lines = []
    for name, (value, reason) in values.items():
        low, high = TARGETS[name]
        goal = (
            f"{high:g}x the reference"
            if name == "step time"
            else f"{low:.0%} to {high:.0%}"
            if low
            else f"below {high:.0%}"
        )
        if value is None:
            lines.append(f"{name}: not measured, {reason} (target {goal})")
            continue
        seen = f"{value:.2f}x" if name == "step time" else f"{value:.0%}"
        verdict = "ok" if low <= value <= high else "too low" if value < low else "too high"
        lines.append(
            f"{name}: {seen}, target {goal}: {verdict}" + (f" (limit: {source})" if name == "host memory" else "")
        )
    return lines
