"""What a log says about how a run ended: the kinds of failure, the line that shows each, and the figures in it."""

import re
from dataclasses import dataclass, field

GIB = 2**30
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "bytes": 1}
_SIZE = r"([0-9.]+)\s*(B|KiB|MiB|GiB|bytes)\b"

# kind -> patterns, in the order in which they are looked for: the cause before what follows from it
PATTERNS = {
    "device out of memory": [
        r"CUDA out of memory",
        r"torch\.(cuda\.)?OutOfMemoryError",
        r"CUDA error: out of memory",
        r"CUBLAS_STATUS_ALLOC_FAILED",
        r"HIP out of memory",
    ],
    "data loader worker killed": [
        r"DataLoader worker \(pid\(?s?\)?[ ,0-9]*\).*(killed by signal|exited unexpectedly)"
    ],
    "host out of memory": [
        r"oom-kill:|Out of memory: Killed process|oom_reaper",
        r"DefaultCPUAllocator: can't allocate memory",
        r"(std::)?bad_alloc|\bMemoryError\b|Cannot allocate memory",
        r"signal 9 \(SIGKILL\)|exitcode\s*: -9|\bSIGKILL\b|returned non-zero exit status 137|^Killed$",
    ],
    "shared memory exhausted": [r"Bus error|insufficient shared memory|unable to (open|allocate) shared memory"],
    "NCCL time-out": [
        r"Watchdog caught collective operation timeout",
        r"NCCL.*(timed? ?out|timeout)",
        r"ProcessGroupNCCL.*Timeout",
    ],
    "broken pipe": [r"BrokenPipeError|\[Errno 32\] Broken pipe|BrokenPipe"],
}


@dataclass
class Finding:
    """One thing that went wrong.

    Attributes:
        kind: a key of PATTERNS, or "fragmentation" or "leak".
        line: the evidence, as it stands in the log.
        line_number: from 1; None for a record.
        figures: bytes by name, out of the message.
    """

    kind: str
    line: str
    line_number: int | None = None
    figures: dict[str, int] = field(default_factory=dict)


def parse_size(text: str) -> int | None:
    match = re.search(_SIZE, text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def cuda_figures(message: str) -> dict[str, int]:
    """Bytes in PyTorch's out-of-memory message, of its old and new wordings; a figure that is not there is left
    out."""
    patterns = {
        "tried_bytes": rf"Tried to allocate {_SIZE}",
        "capacity_bytes": rf"total capacity of {_SIZE}|{_SIZE} total capacity",
        "free_bytes": rf"of which {_SIZE} is free|{_SIZE} free",
        "allocated_bytes": rf"{_SIZE} is allocated by PyTorch|{_SIZE} already allocated",
        "unused_reserved_bytes": rf"{_SIZE} is reserved by PyTorch but unallocated",
        "reserved_bytes": rf"{_SIZE} reserved in total by PyTorch",
        "process_bytes": rf"this process has {_SIZE} memory in use",
    }
    figures = {}
    for name, pattern in patterns.items():
        if match := re.search(pattern, message):
            groups = [group for group in match.groups() if group]
            figures[name] = int(float(groups[0]) * _UNITS[groups[1]])
    if "reserved_bytes" not in figures and {"allocated_bytes", "unused_reserved_bytes"} <= figures.keys():
        figures["reserved_bytes"] = figures["allocated_bytes"] + figures["unused_reserved_bytes"]
    return figures


def read_log(text: str) -> list[Finding]:
    """Findings in the order of PATTERNS, each with its first line; fragmentation after the out-of-memory it explains.

    A broken pipe beside a killed worker or an exhausted host is what the survivor says, so it comes last.
    """
    lines = text.splitlines()
    findings = []
    for kind, patterns in PATTERNS.items():
        number = next((i for i, line in enumerate(lines) if any(re.search(p, line) for p in patterns)), None)
        if number is None and kind == "data loader worker killed":
            number = _lost_worker(lines)
        if number is None:
            continue
        if kind == "host out of memory" and any(f.kind == "data loader worker killed" for f in findings):
            continue  # the same signal, seen from the parent
        finding = Finding(kind, lines[number].strip()[:400], number + 1)
        if kind == "device out of memory":
            finding.figures = cuda_figures(" ".join(lines[number : number + 4]))
        elif kind == "host out of memory" and (size := parse_size(lines[number])):
            finding.figures = {"tried_bytes": size}
        findings.append(finding)
        if kind == "device out of memory" and (fragmented := fragmentation(finding)):
            findings.append(fragmented)
    return findings


def _lost_worker(lines: list[str]) -> int | None:
    """A connection that ended inside the data loader: the worker died while its batch was being handed over.

    Its death may also interrupt the printing of that traceback, before or after its lines, of which Python then shows
    the exception's repr: a signal handler that raises is what the data loader has.
    """
    for number, line in enumerate(lines):
        ended = re.match(r"(object repr\s*: )?(ConnectionResetError|ConnectionRefusedError|EOFError)\b", line.strip())
        if not ended:
            continue
        traceback = lines[max(0, number - 80) : number]
        if ended[1] or any("utils/data/dataloader.py" in earlier for earlier in traceback):
            return number
    return None


def of_tensors(finding: Finding) -> bool:
    """Whether tensors of the training took the memory, on the device or, in a run on the CPU, on the host."""
    return finding.kind == "device out of memory" or (
        finding.kind == "host out of memory" and "DefaultCPUAllocator" in finding.line
    )


def fragmentation(oom: Finding) -> Finding | None:
    """The allocator holds more that is unused than was asked for, and at least a tenth of what is allocated."""
    figures = oom.figures
    reserved, allocated = figures.get("reserved_bytes"), figures.get("allocated_bytes")
    if reserved is None or allocated is None:
        return None
    unused = reserved - allocated
    if unused > figures.get("tried_bytes", 0) and unused > 0.1 * allocated:
        return Finding("fragmentation", oom.line, oom.line_number, {"unused_reserved_bytes": unused, **figures})
    return None


def leak(peaks: list[float], min_steps: int = 4) -> float | None:
    """Bytes per step by which the peak rises: from the second step on it rises in nine of ten steps, by 1 % at least
    over the run and not by its first half alone; else None."""
    steps = peaks[1:]
    if len(steps) < min_steps:
        return None
    rises = sum(later > earlier for earlier, later in zip(steps[:-1], steps[1:]))
    middle = steps[len(steps) // 2]
    slope = (steps[-1] - steps[0]) / (len(steps) - 1)
    still_rising = steps[-1] - middle > 0.25 * (steps[-1] - steps[0])
    if rises >= 0.9 * (len(steps) - 1) and steps[-1] > 1.01 * steps[0] and still_rising:
        return slope
    return None


def timeline_peaks(rows: list[dict], column: str = "rss_bytes") -> list[float]:
    """Largest value of `column` in every step of a recorded time line (docs/measuring.md)."""
    peaks: dict[int, float] = {}
    for row in rows:
        if row.get("step") and row.get(column):
            step, value = int(row["step"]), float(row[column])
            peaks[step] = max(peaks.get(step, 0.0), value)
    return [peaks[step] for step in sorted(peaks)]
