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
import contextlib
import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from memory_samples import (
    GRACE_S,
    MARKS_VARIABLE,
    TICK_S,
    Device,
    Marks,
    ProcessTree,
    Timeline,
    kernel_peak_bytes,
    largest,
    write_atomically,
)
from run_outcome import EXIT_CODES, blank_record, judge, last_lines, merge_record, oom_kill_counts, read_own_record

USAGE_EXIT_CODE = 2
DEFAULT_INTERVAL_S = 0.2
FLUSH_S = 1.0
PLAIN_PROGRESS_S = 15.0  # where no terminal redraws the line
GIB = 2**30


class UsageError(ValueError):
    """The request cannot be run; the message says what to do. Nothing was started."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came; raised when all is ended and written, so that a script of runs stops too."""

    def __init__(self, record):
        super().__init__(record["error"])
        self.record = record


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

    def outcome(self, record, log_path):
        if not self.quiet:
            status, wall_s = record["status"], record["wall_s"]
            print(f"{self.label}: {status}, {wall_s:.1f} s, {peaks_text(self.timeline)}", flush=True)
        if record["status"] != "ok":
            tail = [] if self.verbose else [f"  | {line}" for line in last_lines(log_path)]
            lines = [f"{self.label}: {record['error']} (all output: {log_path})", *tail]
            print("\n".join(lines), file=sys.stderr, flush=True)


def peaks_text(peaks):
    """`peaks` is anything with rss_peak_bytes and nvml_peak_bytes."""
    device = "" if peaks.nvml_peak_bytes is None else f", peak device {gib(peaks.nvml_peak_bytes)}"
    return f"peak {gib(peaks.rss_peak_bytes)}{device}"


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
        started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
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
        timeline.rss_peak_bytes = largest(timeline.rss_peak_bytes, kernel_peak_bytes(usage))
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
        reporter.outcome(record, log_path)
    if signals:
        raise Interrupted(record)
    return record


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
