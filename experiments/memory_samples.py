"""What memory_monitor.py samples of a running command, and how.

`ProcessTree` finds the command's processes and their resident memory in /proc, `Device` reads a GPU through NVML,
`Marks` reads the phases that the command tells with `mark_phase`, and `Timeline` keeps the samples. A command that
imports `mark_phase` pays for nothing but the standard library.
"""

import bisect
import contextlib
import csv
import io
import json
import os
import re
import signal
import time
from pathlib import Path

MARKS_VARIABLE = "MEMORY_MONITOR_MARKS"
HEADER = "t_s,rss_bytes,nvml_used_bytes,gpu_utilization_percent,power_w,phase,step\n"
RSS, NVML = 1, 2  # places in a row whose maxima thinning keeps
MAX_ROWS = 2000
TICK_S = 0.02  # how soon the end of the command, or a signal, is noticed
LEAVE_S = 1.0  # for helpers that end by themselves once their parent is gone
GRACE_S = 5.0  # between SIGTERM and SIGKILL
PF_FORKNOEXEC = 0x40  # include/linux/sched.h
HIGH_WATER_AND_RESIDENT = re.compile(rb"VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB")


def mark_phase(phase: str, step: int | None = None, steps: int | None = None) -> None:
    """Tells a monitor outside, if there is one, that `phase` of step `step` of `steps` begins now."""
    if path := os.environ.get(MARKS_VARIABLE):
        line = json.dumps({"t": time.monotonic(), "phase": phase, "step": step, "steps": steps}) + "\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, line.encode())  # one write: lines of several processes do not mix
        os.close(handle)


def read_proc(pid, name):
    """Bytes of /proc/<pid>/<name>, empty if the process has gone or is not ours to read."""
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def status_kib(field: str) -> int:
    """A field of this process's /proc/self/status such as VmRSS, in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def read_stat(pid):
    """[state, ppid, group, session, tty, tty group, flags, ...] of a process, or None if it has gone."""
    text = read_proc(pid, "stat")
    return text[text.rindex(b")") + 2 :].split() if text else None


class ProcessTree:
    """The living processes of one command: by descent, by session, or by `token` (bytes) in the inherited environment.

    The last finds who left the session and lost the parent between two samples. A pid is looked up once, when it is
    new.
    """

    def __init__(self, root_pid, token):
        self.root_pid, self.token = root_pid, token
        self.members, self.strangers = {root_pid}, set()

    def refresh(self):
        """Updates `members`; returns those that were caught between fork and exec."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self.members &= pids
        self.strangers &= pids
        forked = set()
        for pid in sorted(pids - self.members - self.strangers):  # a parent comes before its child
            if stat := read_stat(pid):
                related = int(stat[1]) in self.members or int(stat[3]) == self.root_pid
                related = related or self.token in read_proc(pid, "environ")
                (self.members if related else self.strangers).add(pid)
                if related and int(stat[6]) & PF_FORKNOEXEC:
                    forked.add(pid)
        return forked

    def memory(self):
        """(sum of resident bytes, largest high-water mark of one process in bytes), None if nobody could be read."""
        forked = self.refresh()  # still shows its parent's pages: counted once it has had an interval to exec
        found = [HIGH_WATER_AND_RESIDENT.search(read_proc(pid, "status")) for pid in self.members - forked]
        kib = [(int(match[1]), int(match[2])) for match in found if match]
        return (1024 * sum(rss for _, rss in kib), 1024 * max(hwm for hwm, _ in kib)) if kib else (None, None)

    def alive(self):
        self.refresh()
        return [pid for pid in self.members if (stat := read_stat(pid)) and stat[0] not in (b"Z", b"X")]

    def send(self, signum):
        """Signals the process group at once, then the members that left it."""
        if pids := self.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.root_pid, signum)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != self.root_pid:
                    os.kill(pid, signum)

    def end(self):
        """Ends what is left: waits, SIGTERM, SIGKILL. Returns how many processes did not leave by themselves."""
        told = 0
        for signum, patience_s in ((None, LEAVE_S), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            if signum:
                told = max(told, len(self.alive()))
                self.send(signum)
            deadline = time.monotonic() + patience_s
            while self.alive() and time.monotonic() < deadline:
                time.sleep(TICK_S)
        return told


def kernel_peak_bytes(usage):
    """The largest resident size that the kernel saw of a process that has ended, which no sample can miss, or None.

    Up to exec the process was a fork of this one, so the figure is at least this one's own peak and says nothing where
    it does not exceed that.
    """
    own_peak_kib = int(HIGH_WATER_AND_RESIDENT.search(read_proc("self", "status"))[1])
    return 1024 * usage.ru_maxrss if usage.ru_maxrss > own_peak_kib else None


class Device:
    """One GPU as its driver sees it. What cannot be read is None, and said once in `notes`."""

    def __init__(self, index, notes):
        self.readers, self.notes = {}, notes
        try:
            import pynvml  # only here: a command that imports mark_phase must not pay for it

            self.error = pynvml.NVMLError
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        except ImportError:
            notes.append("no device columns: pynvml is not installed (package nvidia-ml-py)")
        except pynvml.NVMLError as error:
            notes.append(f"no device columns: NVML, device {index}: {error}")
        else:
            self.readers = {
                "memory": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
                "utilization": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # mW -> W
            }

    def read(self):
        """(used bytes, utilization in percent, power in W)"""
        return tuple(self.read_one(name) for name in self.readers) or (None, None, None)

    def read_one(self, name):
        try:
            return self.readers[name]()
        except self.error as error:
            note = f"device {name} was not readable at every sample: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return None


class Marks:
    """The phase marks that the command has written so far, in order of time."""

    def __init__(self, file):
        self.file, self.rest, self.unreadable = file, b"", 0
        self.marks = []  # (time.monotonic() in s, phase, step, steps)

    def read_new(self):
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        for line in lines:
            try:
                mark = json.loads(line)
                self.marks.append((float(mark["t"]), str(mark["phase"]), mark.get("step"), mark.get("steps")))
            except (ValueError, KeyError, TypeError):
                self.unreadable += 1
        self.marks.sort(key=lambda mark: mark[0])

    def at(self, t):
        """(phase, step, steps) in force at time t; None each before the first mark."""
        index = bisect.bisect_right(self.marks, t, key=lambda mark: mark[0])
        return self.marks[index - 1][1:] if index else (None, None, None)


def largest(*values):
    return max((value for value in values if value is not None), default=None)


def thin_rows(rows, max_rows):
    """At most max_rows of the rows (time first): of each equal span of time the row with most rss and most nvml."""
    if len(rows) <= max_rows:
        return rows
    spans = max_rows // 2
    start, length_s = rows[0][0], rows[-1][0] - rows[0][0]
    kept = {}
    for row in rows:
        span = int((row[0] - start) / length_s * (spans - 1))
        for place in (RSS, NVML):
            best = kept.get((span, place))
            if row[place] is not None and (best is None or row[place] > best[place]):
                kept[span, place] = row
    return sorted(set(kept.values()), key=lambda row: row[0])


def write_atomically(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Timeline:
    """The samples, on disk as they come and thinned in memory, with the peaks of all of them."""

    def __init__(self, file, marks, started):
        self.file, self.marks, self.started = file, marks, started
        self.file.write(HEADER)
        self.rows, self.unwritten, self.samples = [], [], 0
        self.rss_bytes = self.rss_peak_bytes = self.nvml_peak_bytes = None

    def add(self, t, rss_bytes, high_water_bytes, nvml_bytes, utilization_percent, power_w):
        row = (t, rss_bytes, nvml_bytes, utilization_percent, power_w)
        self.samples += 1
        self.rows.append(row)
        self.unwritten.append(row)
        if len(self.rows) > 4 * MAX_ROWS:
            self.rows = thin_rows(self.rows, MAX_ROWS)
        self.rss_bytes = rss_bytes or self.rss_bytes  # of a tree that has just died, what it had last
        self.rss_peak_bytes = largest(self.rss_peak_bytes, rss_bytes, high_water_bytes)
        self.nvml_peak_bytes = largest(self.nvml_peak_bytes, nvml_bytes)

    def csv_text(self, rows):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows((f"{t - self.started:.3f}", *values, *self.marks.at(t)[:2]) for t, *values in rows)
        return text.getvalue()

    def flush(self):
        self.file.write(self.csv_text(self.unwritten))
        self.file.flush()
        self.unwritten = []

    def finish(self):
        write_atomically(Path(self.file.name), HEADER + self.csv_text(thin_rows(self.rows, MAX_ROWS)))
