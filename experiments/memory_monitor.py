"""Runs any command and samples its memory from outside, so that no meter of ours sits in the process that is measured.

    python experiments/memory_monitor.py --record RUN.json --timeline RUN.timeline.csv -- COMMAND ARG...

Unlike a sampling thread inside the program it survives the program's death and says what it died of. It leaves
RUN.json (the program's own record with `monitor` and the peaks merged in, or a complete failure record), the timeline,
and RUN.log with all that the command printed. Linux only: everything is read from /proc. Standard input is empty.

Resident memory is the sum of VmRSS over the process tree, so a page that two processes share counts twice. Device
memory is NVML's figure for the whole device, whoever uses it; the index is NVML's, which ignores CUDA_VISIBLE_DEVICES.
Whatever the command leaves running when it ends is ended too.

Exit codes: 0 ok, 1 error, 2 usage, 3 out of memory, 4 timeout, 5 killed (or the monitor itself was interrupted).
"""

import argparse
import bisect
import contextlib
import csv
import datetime
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MARKS_VARIABLE = "MEMORY_MONITOR_MARKS"
EXIT_CODES = {"ok": 0, "error": 1, "oom": 3, "timeout": 4, "killed": 5}
USAGE_EXIT_CODE = 2
HEADER = "t_s,rss_bytes,nvml_used_bytes,gpu_utilization_percent,power_w,phase,step\n"
RSS, NVML = 1, 2  # places in a row whose maxima thinning keeps
MAX_ROWS = 2000
DEFAULT_INTERVAL_S = 0.2
TICK_S = 0.02  # how soon the end of the command, or a signal, is noticed
FLUSH_S = 1.0
PLAIN_PROGRESS_S = 15.0  # where no terminal redraws the line
LEAVE_S = 1.0  # for helpers that end by themselves once their parent is gone
GRACE_S = 5.0  # between SIGTERM and SIGKILL
TAIL_LINES = 15
TAIL_BYTES = 2**16
GIB = 2**30
PF_FORKNOEXEC = 0x40  # include/linux/sched.h
HIGH_WATER_AND_RESIDENT = re.compile(rb"VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB")
OUT_OF_MEMORY = re.compile(
    "can(no|')t allocate memory|out of memory|MemoryError|bad_alloc|bad allocation|could not create a memory",
    re.IGNORECASE,
)
SUMMARY_KEYS = (
    *("live_peak_bytes", "live_peak_phase", "live_peak_bytes_by_phase", "rss_peak_bytes", "rss_start_bytes"),
    *("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes", "nvml_peak_bytes"),
    *("step_time_s", "step_time_median_s", "phase_time_s", "metrics"),
)


class UsageError(ValueError):
    """The request cannot be run; the message says what to do. Nothing was started."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came; raised when all is ended and written, so that a script of runs stops too."""

    def __init__(self, record):
        super().__init__(record["error"])
        self.record = record


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


class Device:
    """One GPU as its driver sees it. What cannot be read is None, and said once in `notes`."""

    def __init__(self, index, notes):
        self.readers, self.notes = {}, notes
        try:
            import pynvml  # only here: a child that imports mark_phase must not pay for it

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


def gib(n_bytes):
    return "unknown" if n_bytes is None else f"{n_bytes / GIB:.2f} GiB"


class Reporter:
    """Reads the marks, writes the samples out, shows the progress and, if verbose, what the command printed."""

    def __init__(self, label, timeline, log, verbose, quiet):
        self.label, self.timeline, self.log, self.verbose, self.quiet = label, timeline, log, verbose, quiet
        self.redraw = sys.stderr.isatty() and not verbose
        self.next_progress = timeline.started + (0 if self.redraw else PLAIN_PROGRESS_S)

    def update(self, now):
        self.timeline.marks.read_new()
        self.timeline.flush()
        if self.verbose:
            print(self.log.read(), end="", flush=True)
        if now >= self.next_progress and not self.quiet:
            self.next_progress = now + (FLUSH_S if self.redraw else PLAIN_PROGRESS_S)
            line = f"\r{self.progress(now)}\x1b[K" if self.redraw else f"{self.progress(now)}\n"
            print(line, end="", file=sys.stderr, flush=True)

    def progress(self, now):
        phase, step, steps = self.timeline.marks.at(now)
        words = [self.label] + ([f"step {step}/{steps}" if steps else f"step {step}"] if step is not None else [])
        memory = f"{gib(self.timeline.rss_bytes)} now, {peaks_text(self.timeline)}"
        return f"{' '.join(words)} {phase or 'running'}, {now - self.timeline.started:.0f} s, {memory}"

    def finish(self, now):
        self.update(now)
        if self.redraw and not self.quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def peaks_text(peaks):
    """`peaks` is anything with rss_peak_bytes and nvml_peak_bytes."""
    device = "" if peaks.nvml_peak_bytes is None else f", peak device {gib(peaks.nvml_peak_bytes)}"
    return f"peak {gib(peaks.rss_peak_bytes)}{device}"


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


def check_request(command, record_path, interval_s, timeout_s, env):
    if not Path("/proc/self/status").exists():
        raise UsageError("this monitor reads /proc: run it on Linux")
    if not command:
        raise UsageError("there is no command to run: put it behind --, as in: ... -- COMMAND ARG...")
    if record_path.suffix != ".json":
        raise UsageError(f"the record {record_path} has to end in .json: the log goes beside it as .log")
    if not (math.isfinite(interval_s) and interval_s > 0):
        raise UsageError(
            f"the interval is {interval_s} s: give a number of seconds above 0, such as {DEFAULT_INTERVAL_S}"
        )
    if timeout_s is not None and not timeout_s > 0:
        raise UsageError(f"the timeout is {timeout_s} s: give a number of seconds above 0, or leave it out")
    if shutil.which(command[0], path=env.get("PATH")) is None:
        raise UsageError(f"the command {command[0]!r} is not found or not executable: check its name and the PATH")


@contextlib.contextmanager
def caught_signals():
    """Collects the signals that ask to stop instead of dying of them; an ignored one (nohup) stays ignored."""
    caught, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, lambda signum, frame: caught.append(signal.Signals(signum)))
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def reap(process):
    """None while the process runs, then its resource usage (which Popen.wait does not give)."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def watch(process, tree, device, reporter, signals, interval_s, timeout_s):
    """Samples until the process ends; stops it at the time limit or a signal. Returns (usage, why it was stopped)."""
    timeline = reporter.timeline
    stopped_by = None
    next_sample = next_update = timeline.started
    while (usage := reap(process)) is None:
        now = time.monotonic()
        if now >= next_sample:
            next_sample = now + interval_s
            timeline.add(now, *tree.memory(), *device.read())
        if now >= next_update:
            next_update = now + FLUSH_S
            reporter.update(now)
        overdue = timeout_s is not None and now - timeline.started >= timeout_s
        if stopped_by is None and (signals or overdue):
            stopped_by, kill_at = signals[0].name if signals else "timeout", now + GRACE_S
            tree.send(signals[0] if signals else signal.SIGTERM)
        elif stopped_by and (now >= kill_at or len(signals) > 1):
            tree.send(signal.SIGKILL)
        time.sleep(max(0, min(TICK_S, next_sample - time.monotonic())))
    return usage, stopped_by


def run_monitored(
    command: list[str],
    record_path: Path | str,
    timeline_path: Path | str,
    *,
    interval_s: float = DEFAULT_INTERVAL_S,
    timeout_s: float | None = None,
    label: str | None = None,
    env: dict[str, str] | None = None,
    verbose: bool = False,
    device_index: int = 0,
    quiet: bool = False,
) -> dict:
    """Runs `command` to its end and returns the final record, which is also written.

    `env` is the command's whole environment (default: this one's), `label` the record's `run` (default: its stem).

    Raises:
        UsageError: before anything is started.
        Interrupted: with the record, after a signal.
    """
    record_path, timeline_path = Path(record_path), Path(timeline_path)
    env = dict(os.environ if env is None else env)
    check_request(command, record_path, interval_s, timeout_s, env)
    label, notes = label or record_path.stem, []
    for path in (record_path, timeline_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    log_path = record_path.with_suffix(".log")
    for path in (record_path, log_path):
        path.unlink(missing_ok=True)  # an earlier run's record must not pass for this one's
    with (
        caught_signals() as signals,
        tempfile.NamedTemporaryFile(prefix="memory_monitor_", suffix=".jsonl") as marks_file,
        open(log_path, "a") as log_out,  # appending, for a command that opens /dev/stdout anew
        open(log_path, errors="replace") as log,
        open(timeline_path, "w") as timeline_out,
    ):
        env[MARKS_VARIABLE] = marks_file.name
        env.setdefault("PYTHONUNBUFFERED", "1")  # or a killed Python takes its last lines with it
        device = Device(device_index, notes)
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        oom_kills = oom_kill_counts()
        marks = Marks(marks_file)
        started, cpu_started = time.monotonic(), time.process_time()
        timeline = Timeline(timeline_out, marks, started)
        reporter = Reporter(label, timeline, log, verbose, quiet)
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log_out, stderr=log_out, env=env, start_new_session=True
            )
        except OSError as error:
            raise UsageError(f"the command {command[0]!r} cannot be started: {error}") from error
        tree = ProcessTree(process.pid, marks_file.name.encode())
        try:
            usage, stopped_by = watch(process, tree, device, reporter, signals, interval_s, timeout_s)
        finally:
            ended = time.monotonic()
            cpu_fraction = (time.process_time() - cpu_started) / (ended - started)
            left = tree.end()
        reporter.finish(ended)
        # The kernel's own peak of the process, which no sample can miss. Up to exec it was a fork of this one, so it
        # is at least this one's own peak and says nothing where it does not exceed that.
        own_peak_bytes = 1024 * int(HIGH_WATER_AND_RESIDENT.search(read_proc("self", "status"))[1])
        if usage.ru_maxrss * 1024 > own_peak_bytes:
            timeline.rss_peak_bytes = largest(timeline.rss_peak_bytes, usage.ru_maxrss * 1024)
        timeline.finish()
        if left:
            notes.append(f"the command left {left} processes running, which were told to end")
        if marks.unreadable:
            notes.append(f"{marks.unreadable} phase marks were unreadable")

        exit_code, killed_by = process.returncode, None
        if exit_code < 0:
            exit_code, killed_by = None, signal.Signals(-exit_code)
        phase = marks.at(ended)[0]
        resident = "" if timeline.rss_bytes is None else f" at {gib(timeline.rss_bytes)} resident"
        where = f"{f'during phase {phase} ' if phase else ''}after {ended - started:.1f} s{resident}"
        oom_killer_was_active = oom_kill_counts() != oom_kills
        verdict = judge(exit_code, killed_by, stopped_by, where, last_lines(log_path), oom_killer_was_active)
        blank = blank_record(label, list(command), started_at)
        record = merge_record(blank, *read_own_record(record_path), *verdict, stopped_by is not None)
        peaks = {"rss_peak_bytes": timeline.rss_peak_bytes, "nvml_peak_bytes": timeline.nvml_peak_bytes}
        record["wall_s"] = round(ended - started, 3)
        record["summary"] |= {name: peak for name, peak in peaks.items() if peak is not None}
        record["monitor"] = {
            "interval_s": interval_s,
            "samples": timeline.samples,
            "cpu_fraction": round(cpu_fraction, 5),
            "exit_code": exit_code,
            "signal": killed_by.name if killed_by else None,
            **peaks,
            "notes": notes,
        }
        write_atomically(record_path, json.dumps(record, indent=2) + "\n")
        if not quiet:
            print(f"{label}: {record['status']}, {record['wall_s']:.1f} s, {peaks_text(timeline)}", flush=True)
        if record["status"] != "ok":
            tail = [] if verbose else [f"  | {line}" for line in last_lines(log_path)]
            print(
                "\n".join([f"{label}: {record['error']} (all output: {log_path})", *tail]), file=sys.stderr, flush=True
            )
    if signals:
        raise Interrupted(record)
    return record


def last_lines(log_path):
    with open(log_path, "rb") as log:
        log.seek(max(0, log_path.stat().st_size - TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-TAIL_LINES:]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        usage="memory_monitor.py --record RUN.json --timeline RUN.timeline.csv [options] -- COMMAND ARG...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", type=Path, required=True, help="JSON record; the log goes beside it as .log")
    parser.add_argument("--timeline", type=Path, required=True, help="CSV of the samples")
    parser.add_argument("--interval", type=float, default=DEFAULT_INTERVAL_S, help="s between samples (%(default)s)")
    parser.add_argument("--timeout", type=float, help="s after which the command is stopped (never)")
    parser.add_argument("--label", help="what the progress and the record call the run (the record's stem)")
    parser.add_argument("--device-index", type=int, default=0, help="GPU to sample, as NVML counts (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary, failures only")
    parser.add_argument("--verbose", action="store_true", help="show what the command prints, too")
    options = parser.parse_args(arguments[:split])
    try:
        record = run_monitored(
            arguments[split + 1 :],
            options.record,
            options.timeline,
            interval_s=options.interval,
            timeout_s=options.timeout,
            label=options.label,
            verbose=options.verbose,
            device_index=options.device_index,
            quiet=options.quiet,
        )
    except UsageError as error:
        print(f"memory_monitor.py: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    except Interrupted as interruption:
        record = interruption.record
    return EXIT_CODES[record["status"]]


if __name__ == "__main__":
    sys.exit(main())
