"""How a monitored run ended and what its record says: the verdict from outside, merged with the command's own record.

Out of memory shows in several ways: as the command's own verdict, as words in its last lines, or as a SIGKILL while
the kernel's out-of-memory killer was active. None of them alone is always there.
"""

import contextlib
import json
import re
import signal
from pathlib import Path

from memory_samples import read_proc

EXIT_CODES = {"ok": 0, "error": 1, "oom": 3, "timeout": 4, "killed": 5}  # of the monitor, by a record's status
OUT_OF_MEMORY = re.compile(
    "can(no|')t allocate memory|out of memory|MemoryError|bad_alloc|bad allocation|could not create a memory"
    "|memory allocation of [0-9]+ bytes failed",  # Rust, in the tokenizers
    re.IGNORECASE,
)
TAIL_LINES = 15
TAIL_BYTES = 2**16
SUMMARY_KEYS = (
    *("live_peak_bytes", "live_peak_phase", "live_peak_bytes_by_phase", "rss_peak_bytes", "rss_start_bytes"),
    *("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes", "nvml_peak_bytes"),
    *("step_time_s", "step_time_median_s", "phase_time_s", "step_phase_time_s", "metrics"),
)


def oom_kill_counts():
    """Kills by the kernel's out-of-memory killer so far: of this control group (v1 and v2) and of the machine."""
    files = ["/proc/vmstat"]
    for line in read_proc("self", "cgroup").decode().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            files += [f"/sys/fs/cgroup{group}/memory.events"]
        elif "memory" in controllers.split(","):
            files += [f"/sys/fs/cgroup/memory{group}/memory.oom_control"]
    counts = {}
    for file in files:
        with contextlib.suppress(OSError):  # not this kind of control group, or its root
            counts[file] = re.findall(r"^oom_kill (\d+)$", Path(file).read_text(), re.MULTILINE)
    return counts


def last_lines(log_path):
    with open(log_path, "rb") as log:
        log.seek(max(0, log_path.stat().st_size - TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def judge(exit_code, killed_by, stopped_by, where, tail, oom_killer_was_active):
    """(status, error) from what was seen from outside; `where` says in which phase, when and at how much memory."""
    if stopped_by == "timeout":
        return "timeout", f"stopped at the time limit {where}"
    if stopped_by:
        return "killed", f"stopped because the monitor received {stopped_by} {where}"
    if exit_code == 0:
        return "ok", None
    seen = f"killed by signal {killed_by.value} ({killed_by.name})" if killed_by else f"exited with code {exit_code}"
    # a shell reports the SIGKILL of its child as 128 + 9, a launcher in words
    sigkill = killed_by == signal.SIGKILL or exit_code == 137 or any("SIGKILL" in line for line in tail)
    if sigkill and oom_killer_was_active:
        return "oom", f"{seen} {where}; the kernel's out-of-memory killer was active"
    if told := [line for line in tail if OUT_OF_MEMORY.search(line)]:
        return "oom", f"{seen} {where}; it said: {told[-1].strip()[:300]}"
    if killed_by:
        return "killed", f"{seen} {where}"
    return "error", f"{seen} {where}; " + (f"its last line: {tail[-1].strip()[:300]}" if tail else "it said nothing")


def read_own_record(path):
    """(the command's own record or None, what is wrong with it or None)"""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None, None
    except ValueError as error:
        return None, f"its record is not valid JSON ({error})"
    if not isinstance(record, dict) or not isinstance(record.get("summary") or {}, dict):
        return None, "its record is not a JSON object with an object `summary`"
    return record, None


def blank_record(label, command, started_at):
    """Every key of the schema (docs/measuring.md), null where only the command could know."""
    return {
        "schema": 1,
        "run": label,
        "status": None,
        "error": None,
        "command": command,
        "config": None,
        "env": None,
        "seed": None,
        "started_at": started_at,
        "wall_s": None,
        "tokens": None,
        "summary": dict.fromkeys(SUMMARY_KEYS),
        "monitor": None,
    }


def merge_record(blank, own, problem, status, error, stopped):
    """The command's own record laid over the blank one, with the graver of the two verdicts."""
    own = own or {}
    own_status = own.get("status")
    if own_status in EXIT_CODES and own_status != "ok" and (own_status == "oom" or not stopped):
        # a command told to stop records that as its own error, so then only an out-of-memory is news
        status, error = own_status, own.get("error") or error or "its own record does not say why"
    else:
        if own and (status, own_status) != ("ok", "ok"):
            problem = f"its own record says {own_status}" + (f": {own['error']}" if own.get("error") else "")
        if problem:
            status, error = "error" if status == "ok" else status, f"{error or 'exited with code 0'}; {problem}"
    return {**blank, **own, "status": status, "error": error, "summary": blank["summary"] | (own.get("summary") or {})}
