"""experiments/memory_monitor.py and its modules against children whose memory, phases and deaths are known beforehand.

    python -m pytest tests/test_memory_monitor.py

Children are bare Pythons (-S, nothing imported), so a peak is what the child allocated plus about 10 MB.
"""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

mm, samples, outcome = map(importlib.import_module, ("memory_monitor", "memory_samples", "run_outcome"))

CLI = [sys.executable, str(EXPERIMENTS / "memory_monitor.py")]
MB = 10**6
BARE_BYTES = 40 * MB  # more than a bare Python ever has resident
TOP_LEVEL_KEYS = set(outcome.blank_record("", [], ""))


def python(code, *arguments):
    return [
        sys.executable,
        "-S",
        "-c",
        f"import sys, os, time, json, signal, subprocess\n{code}",
        *map(str, arguments),
    ]


def allocate(n_bytes):
    return f"b = b'x' * {n_bytes}\n"  # written to, so resident


@pytest.fixture
def monitored(tmp_path):
    def run(command, **options):
        return mm.run_monitored(
            command,
            tmp_path / "run.json",
            tmp_path / "run.timeline.csv",
            **{"interval_s": 0.05, "quiet": True} | options,
        )

    return run


@pytest.fixture
def no_grace(monkeypatch):
    for module, name in ((mm, "GRACE_S"), (samples, "GRACE_S"), (samples, "LEAVE_S")):
        monkeypatch.setattr(module, name, 0.3)


def cli(tmp_path, *arguments):
    paths = ["--record", str(tmp_path / "run.json"), "--timeline", str(tmp_path / "run.timeline.csv")]
    return subprocess.run([*CLI, *paths, *arguments], check=False, capture_output=True, text=True, timeout=30)


def timeline(tmp_path):
    with open(tmp_path / "run.timeline.csv") as file:
        return list(csv.DictReader(file))


def runs(pid):
    stat = samples.read_stat(int(pid))
    return stat is not None and stat[0] != b"Z"


def wait_for(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


# memory


def test_peak_matches_what_the_child_allocated_and_freed(monitored, tmp_path):
    record = monitored(python(allocate(200 * MB) + "time.sleep(0.4)\ndel b\ntime.sleep(0.4)"))
    rss = [int(row["rss_bytes"]) for row in timeline(tmp_path) if row["rss_bytes"]]
    assert 200 * MB <= record["summary"]["rss_peak_bytes"] <= 200 * MB + BARE_BYTES
    assert 200 * MB <= max(rss) <= 200 * MB + BARE_BYTES
    assert rss[-1] < BARE_BYTES


def test_peak_is_the_sum_over_child_and_grandchild(monitored):
    grandchild = allocate(120 * MB) + "import time; time.sleep(0.6)"
    code = allocate(120 * MB) + f"subprocess.run([sys.executable, '-S', '-c', {grandchild!r}], check=True)"
    record = monitored(python(code))
    assert 240 * MB <= record["summary"]["rss_peak_bytes"] <= 240 * MB + 2 * BARE_BYTES


def test_a_grandchild_in_a_session_of_its_own_is_counted(monitored):
    grandchild = allocate(120 * MB) + "import time; time.sleep(0.6)"
    code = f"subprocess.Popen([sys.executable, '-S', '-c', {grandchild!r}], start_new_session=True).wait()"
    assert monitored(python(code))["summary"]["rss_peak_bytes"] >= 120 * MB


def test_a_spike_between_samples_is_seen_through_the_high_water_mark(monitored, tmp_path):
    code = f"time.sleep(0.3)\n{allocate(200 * MB)}del b\ntime.sleep(1.2)"
    record = monitored(python(code), interval_s=1.0)
    assert max(int(row["rss_bytes"]) for row in timeline(tmp_path)) < BARE_BYTES
    assert 200 * MB <= record["monitor"]["rss_peak_bytes"] <= 200 * MB + BARE_BYTES


def test_the_high_water_mark_is_read_while_the_process_lives(tmp_path):
    code = f"{allocate(200 * MB)}del b\nopen(sys.argv[1], 'w').close(); time.sleep(20)"
    with subprocess.Popen(python(code, tmp_path / "freed"), start_new_session=True) as process:
        tree = samples.ProcessTree(process.pid, b"no process has this")
        try:
            wait_for((tmp_path / "freed").exists)
            rss_bytes, high_water_bytes = tree.memory()
        finally:
            tree.send(signal.SIGKILL)
    assert rss_bytes < BARE_BYTES
    assert 200 * MB <= high_water_bytes <= 200 * MB + BARE_BYTES


def test_a_spike_after_the_last_sample_is_seen(tmp_path):
    # through the command line: the kernel's figure only says something above this process's own peak
    assert cli(tmp_path, "--interval", "30", "--", *python(allocate(200 * MB))).returncode == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["monitor"]["samples"] == 1
    assert 200 * MB <= record["summary"]["rss_peak_bytes"] <= 200 * MB + BARE_BYTES


def test_a_process_between_fork_and_exec_is_counted_from_its_second_sample(tmp_path):
    go, forked = tmp_path / "go", tmp_path / "forked"
    code = f"""{allocate(100 * MB)}
while not os.path.exists({str(go)!r}): time.sleep(0.01)
if os.fork() == 0: open({str(forked)!r}, "w").close()
time.sleep(20)"""
    with subprocess.Popen(python(code), start_new_session=True) as process:
        try:
            tree = samples.ProcessTree(process.pid, b"no process has this")
            wait_for(lambda: (tree.memory()[0] or 0) > 100 * MB)
            go.touch()
            wait_for(forked.exists)
            assert tree.memory()[0] < 100 * MB + BARE_BYTES
            assert tree.memory()[0] > 200 * MB
        finally:
            tree.send(signal.SIGKILL)


def test_thinning_keeps_the_rows_with_the_largest_rss_and_nvml():
    rows = [(0.2 * i, 1000 + i % 7, None if i % 2 else 500, None, None) for i in range(50_000)]
    rows[12_345] = (0.2 * 12_345, 9999, 500, None, None)
    rows[31_416] = (0.2 * 31_416, 1000, 8888, None, None)
    thinned = samples.thin_rows(rows, 2000)
    assert 1000 <= len(thinned) <= 2000
    assert rows[12_345] in thinned and rows[31_416] in thinned
    assert thinned == sorted(thinned)
    assert samples.thin_rows(rows[:2000], 2000) == rows[:2000]


def test_a_long_timeline_is_thinned_in_memory_and_in_the_file(tmp_path):
    with open(tmp_path / "t.csv", "w") as file:
        line = samples.Timeline(file, samples.Marks(None), 0.0)
        for i in range(30_000):
            line.add(0.2 * i, 7777 if i == 4321 else 10, 10, None, None, None)
            assert len(line.rows) <= 4 * samples.MAX_ROWS
        line.finish()
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert len(rows) <= samples.MAX_ROWS + 1
    assert "864.200,7777,,,,," in rows
    assert (line.rss_peak_bytes, line.samples) == (7777, 30_000)


# phases


def test_marks_appear_as_phase_and_step_columns(monitored, tmp_path):
    code = f"""sys.path.insert(0, {str(EXPERIMENTS)!r})
from memory_samples import mark_phase
for step in (1, 2):
    for phase in ("generate", "train_forward"):
        mark_phase(phase, step, 2); time.sleep(0.3)
mark_phase("other"); time.sleep(0.3)"""
    record = monitored(python(code))
    seen = [(row["phase"], row["step"]) for row in timeline(tmp_path)]
    assert list(dict.fromkeys(seen)) == [
        *[
            ("", ""),
            ("generate", "1"),
            ("train_forward", "1"),
            ("generate", "2"),
            ("train_forward", "2"),
            ("other", ""),
        ]
    ]
    assert record["status"] == "ok"
    assert list(timeline(tmp_path)[0]) == samples.HEADER.strip().split(",")


def test_an_unreadable_mark_is_skipped_and_noted(monitored, tmp_path):
    code = """with open(os.environ["MEMORY_MONITOR_MARKS"], "a") as file:
    file.write('nonsense\\n[1]\\n{"t": 0, "phase": "score"}\\n')
time.sleep(0.3)"""
    record = monitored(python(code))
    assert {row["phase"] for row in timeline(tmp_path)} == {"score"}
    assert any("2 phase marks were unreadable" in note for note in record["monitor"]["notes"])


def test_mark_phase_does_nothing_without_a_monitor(monkeypatch, tmp_path):
    monkeypatch.delenv(samples.MARKS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    samples.mark_phase("generate", 1, 3)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_helper_imports_neither_torch_nor_nvml():
    code = "import memory_samples, sys; sys.exit(bool({'torch', 'pynvml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=EXPERIMENTS).returncode == 0


def test_progress_names_label_step_phase_and_memory(monitored, monkeypatch, capsys):
    monkeypatch.setattr(mm, "PLAIN_PROGRESS_S", 0.5)
    code = (
        f"sys.path.insert(0, {str(EXPERIMENTS)!r})\nimport memory_samples\nmemory_samples.mark_phase('score', 2, 3)\n"
    )
    monitored(python(code + "time.sleep(1.4)"), quiet=False, label="cpu/x_k4")
    printed = capsys.readouterr()
    assert "cpu/x_k4 step 2/3 score, " in printed.err
    assert printed.out.startswith("cpu/x_k4: ok, ") and "peak 0.0" in printed.out


# records


def own_record(path, **fields):
    text = json.dumps({"schema": 1, "status": "ok", "error": None, "seed": 7, **fields})
    return f"open({str(path)!r}, 'w').write({text!r})\n"


def test_the_childs_record_is_kept_and_the_monitors_part_merged_in(monitored, tmp_path):
    summary = {"live_peak_bytes": 123, "rss_peak_bytes": 1, "step_time_s": [1.5]}
    code = own_record(tmp_path / "run.json", summary=summary, run="cpu/own_k2", wall_s=0.001, config={"rloo_k": 2})
    record = monitored(python(code + "time.sleep(0.2)"))
    assert record == json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["run"], record["seed"], record["config"]) == (
        "ok",
        "cpu/own_k2",
        7,
        {"rloo_k": 2},
    )
    assert (record["summary"]["live_peak_bytes"], record["summary"]["step_time_s"]) == (123, [1.5])
    assert record["summary"]["rss_peak_bytes"] == record["monitor"]["rss_peak_bytes"] > MB
    assert 0.2 < record["wall_s"] < 5
    assert set(record) == TOP_LEVEL_KEYS
    assert set(record["monitor"]) == {
        *("interval_s", "samples", "cpu_fraction", "exit_code", "signal", "rss_peak_bytes", "nvml_peak_bytes", "notes")
    }
    assert (record["monitor"]["exit_code"], record["monitor"]["signal"]) == (0, None)


def test_a_plain_command_without_a_record_is_ok(monitored):
    record = monitored(["true"], label="plain")
    assert (record["status"], record["error"], record["run"], record["command"]) == ("ok", None, "plain", ["true"])
    assert set(record) == TOP_LEVEL_KEYS
    assert record["config"] is None and record["summary"]["live_peak_bytes"] is None


def test_a_stale_record_is_not_taken_for_this_runs(monitored, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "ok", "seed": 1234, "summary": {"live_peak_bytes": 5}}))
    (tmp_path / "run.log").write_text("of yesterday")
    record = monitored(python("sys.exit(1)"))
    assert (record["status"], record["seed"], record["summary"]["live_peak_bytes"]) == ("error", None, None)
    assert (tmp_path / "run.log").read_text() == ""


@pytest.mark.parametrize("text", ['{"status": "ok", "summ', "[1, 2]", '{"status": "ok", "summary": 3}'])
@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_broken_record_is_replaced_by_a_failure_record(monitored, tmp_path, text, exit_code):
    record = monitored(python(f"open({str(tmp_path / 'run.json')!r}, 'w').write({text!r}); os._exit({exit_code})"))
    assert record["status"] == "error" and "its record is not" in record["error"]
    assert f"exited with code {exit_code}" in record["error"]
    assert json.loads((tmp_path / "run.json").read_text()) == record
    assert set(record) == TOP_LEVEL_KEYS


def test_a_childs_oom_record_is_kept(tmp_path):
    code = own_record(tmp_path / "run.json", status="oom", error="tried to allocate 3 GiB") + "sys.exit(3)"
    result = cli(tmp_path, "--", *python(code))
    record = json.loads((tmp_path / "run.json").read_text())
    assert (result.returncode, record["status"], record["error"]) == (3, "oom", "tried to allocate 3 GiB")


def test_a_record_that_says_ok_does_not_hide_a_failing_exit_code(monitored, tmp_path):
    record = monitored(python(own_record(tmp_path / "run.json") + "sys.exit(9)"))
    assert record["status"] == "error" and record["seed"] == 7
    assert "exited with code 9" in record["error"] and "its own record says ok" in record["error"]


def test_a_record_left_unfinished_is_an_error(monitored, tmp_path):
    record = monitored(python(own_record(tmp_path / "run.json", status="running")))
    assert record["status"] == "error" and "its own record says running" in record["error"]


# deaths


def test_sigkill_is_killed_with_a_complete_record(tmp_path):
    code = f"""sys.path.insert(0, {str(EXPERIMENTS)!r})
from memory_samples import mark_phase
mark_phase("train_backward", 1, 1)
print("last words"); time.sleep(0.4); os.kill(os.getpid(), 9)"""
    result = cli(tmp_path, "--interval", "0.05", "--label", "a", "--", *python(code))
    record = json.loads((tmp_path / "run.json").read_text())
    assert (result.returncode, record["status"]) == (5, "killed")
    assert record["error"].startswith("killed by signal 9 (SIGKILL) during phase train_backward after ")
    assert record["error"].endswith("GiB resident")
    assert (record["monitor"]["exit_code"], record["monitor"]["signal"]) == (None, "SIGKILL")
    assert set(record) == TOP_LEVEL_KEYS and record["summary"]["rss_peak_bytes"] > MB
    assert "last words" in result.stderr and record["error"] in result.stderr


@pytest.mark.parametrize(
    "death", ["os.kill(os.getpid(), 9)", "os._exit(137)", "print('Signal 9 (SIGKILL)'); sys.exit(1)"]
)
def test_sigkill_while_the_kernels_oom_killer_was_active_is_oom(monitored, monkeypatch, death):
    counts = iter([{"memory.events": ["4"]}, {"memory.events": ["5"]}])
    monkeypatch.setattr(mm, "oom_kill_counts", lambda: next(counts))
    record = monitored(python(death))
    assert record["status"] == "oom" and "the kernel's out-of-memory killer was active" in record["error"]


def test_the_kernels_oom_counters_are_readable_here():
    counts = outcome.oom_kill_counts()
    assert counts["/proc/vmstat"][0].isdigit()


@pytest.mark.parametrize(
    "code",
    [
        "raise MemoryError",
        'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 8 bytes")',
        "raise OSError('Cannot allocate memory')",
        "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "print('torch.OutOfMemoryError', file=sys.stderr); os.abort()",
    ],
)
def test_an_out_of_memory_message_at_the_end_is_oom(monitored, code):
    record = monitored(python(code))
    assert record["status"] == "oom" and "it said: " in record["error"]


def test_an_out_of_memory_that_was_recovered_from_is_not_the_cause(monitored):
    code = (
        "print('CUDA out of memory: splitting the batch')\nfor i in range(50): print('step', i)\nraise KeyError('k')"
    )
    assert monitored(python(code))["status"] == "error"


def test_a_nonzero_exit_is_an_error_with_the_last_lines(tmp_path):
    code = "print('\\n'.join(f'line {i}' for i in range(40)))\nraise ValueError('rloo_k is 0')"
    result = cli(tmp_path, "--", *python(code))
    record = json.loads((tmp_path / "run.json").read_text())
    assert (result.returncode, record["status"], record["monitor"]["exit_code"]) == (1, "error", 1)
    assert "exited with code 1" in record["error"] and record["error"].endswith("ValueError: rloo_k is 0")
    assert "line 39" in result.stderr and "line 10" not in result.stderr and "line" not in result.stdout
    assert "line 0" in (tmp_path / "run.log").read_text()


FAMILY = """
pids = []
for own_session in (False, True):  # a grandchild in the group and one that left it; both deaf to SIGTERM
    pids.append(subprocess.Popen([sys.executable, "-S", "-c", "import signal, time\\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"],
        start_new_session=own_session, stdout=subprocess.PIPE))
    pids[-1].stdout.readline()
with open(sys.argv[1] + ".new", "w") as file: file.write(" ".join(str(p.pid) for p in pids) + f" {os.getpid()}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
"""


def test_a_timeout_ends_the_whole_tree(monitored, tmp_path, no_grace):
    record = monitored(python(FAMILY + "time.sleep(60)", tmp_path / "pids"), timeout_s=2.5)
    assert record["status"] == "timeout" and record["error"].startswith("stopped at the time limit after 2.")
    assert not any(runs(pid) for pid in (tmp_path / "pids").read_text().split())
    assert record["wall_s"] < 5


def test_a_child_deaf_to_sigterm_is_killed_at_the_timeout(monitored, no_grace):
    record = monitored(python("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"), timeout_s=0.7)
    assert (record["status"], record["monitor"]["signal"]) == ("timeout", "SIGKILL")


@pytest.mark.parametrize("own_status, status", [("ok", "timeout"), ("error", "timeout"), ("oom", "oom")])
def test_of_a_stopped_runs_own_verdicts_only_oom_stands(monitored, tmp_path, no_grace, own_status, status):
    code = own_record(tmp_path / "run.json", status=own_status, error=own_status) + "time.sleep(60)"
    record = monitored(python(code), timeout_s=1.0)
    assert record["status"] == status and own_status in record["error"] and record["seed"] == 7


def test_what_a_finished_command_leaves_running_is_ended_and_noted(monitored, tmp_path, no_grace):
    record = monitored(python(FAMILY, tmp_path / "pids"))
    assert record["status"] == "ok" and record["wall_s"] < 5
    assert not any(runs(pid) for pid in (tmp_path / "pids").read_text().split())
    assert any("left 2 processes running" in note for note in record["monitor"]["notes"])


def start_cli(tmp_path, *command):
    paths = ["--record", str(tmp_path / "run.json"), "--timeline", str(tmp_path / "run.timeline.csv")]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [*CLI, *paths, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_monitor_writes_the_record_and_leaves_no_orphan(tmp_path, signum):
    code = """child = subprocess.Popen(["sleep", "60"])
with open(sys.argv[1] + ".new", "w") as file: file.write(f"{child.pid} {os.getpid()}")
os.rename(sys.argv[1] + ".new", sys.argv[1]); time.sleep(60)"""
    with start_cli(tmp_path, *python(code, tmp_path / "pids")) as monitor:
        wait_for((tmp_path / "pids").exists)
        monitor.send_signal(signum)
        monitor.communicate(timeout=15)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (monitor.returncode, record["status"]) == (5, "killed")
    assert f"the monitor received {signum.name}" in record["error"] and set(record) == TOP_LEVEL_KEYS
    assert not any(runs(pid) for pid in (tmp_path / "pids").read_text().split())
    assert len(timeline(tmp_path)) >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.log", "run.timeline.csv", "pids"}


def test_a_script_that_runs_the_monitor_is_interrupted_after_the_record_is_written(monitored, tmp_path):
    with pytest.raises(mm.Interrupted) as interruption:
        monitored(python("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"))
    assert interruption.value.record == json.loads((tmp_path / "run.json").read_text())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_monitor_leaves_the_samples_so_far(tmp_path):
    code = "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    with start_cli(tmp_path, *python(code, tmp_path / "pid")) as monitor:
        csv_path = tmp_path / "run.timeline.csv"
        wait_for(lambda: csv_path.exists() and len(timeline(tmp_path)) >= 4)
        monitor.kill()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert all(int(row["rss_bytes"]) > 0 for row in timeline(tmp_path))


# device


def test_without_a_gpu_the_columns_are_empty_and_the_peak_null(monitored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import fails
    record = monitored(["sleep", "0.3"])
    assert record["status"] == "ok"
    for row in timeline(tmp_path):
        assert (row["nvml_used_bytes"], row["gpu_utilization_percent"], row["power_w"]) == ("", "", "")
    assert record["summary"]["nvml_peak_bytes"] is None and record["monitor"]["nvml_peak_bytes"] is None
    assert [note for note in record["monitor"]["notes"] if "pynvml is not installed" in note]


def fake_nvml(used_bytes):
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})

    def power(handle):
        raise nvml.NVMLError("Not Supported")

    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=next(used_bytes))
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=0)
    nvml.nvmlDeviceGetPowerUsage = power
    return nvml


def test_device_columns_and_peak_come_from_nvml_and_what_fails_is_empty(monitored, tmp_path, monkeypatch):
    used = (value for values in ([5 * MB, 900 * MB], [7 * MB] * 1000) for value in values)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(used))
    record = monitored(["sleep", "0.4"])
    rows = timeline(tmp_path)
    assert [int(row["nvml_used_bytes"]) for row in rows[:3]] == [5 * MB, 900 * MB, 7 * MB]
    assert {(row["gpu_utilization_percent"], row["power_w"]) for row in rows} == {("0", "")}
    assert record["summary"]["nvml_peak_bytes"] == 900 * MB
    assert record["monitor"]["notes"] == ["device power was not readable at every sample: Not Supported"]


# cost and usage


def test_the_monitor_costs_less_than_two_percent_of_a_core(tmp_path):
    fractions = []
    for _ in range(2):  # a shared machine may spoil one
        assert cli(tmp_path, "--", "sleep", "5.2").returncode == 0
        fractions.append(json.loads((tmp_path / "run.json").read_text())["monitor"]["cpu_fraction"])
        if fractions[-1] < 0.02:
            return
    pytest.fail(f"fraction of one core: {fractions}")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "there is no command to run"),
        (["--"], "there is no command to run"),
        (["--interval", "0", "--", "true"], "the interval is 0.0 s"),
        (["--interval", "nan", "--", "true"], "the interval is nan s"),
        (["--timeout", "-1", "--", "true"], "the timeout is -1.0 s"),
        (["--", "no-such-command"], "'no-such-command' is not found"),
        (["--record", "run.csv", "--", "true"], "has to end in .json"),
        (["--no-such-option", "--", "true"], "unrecognized arguments"),
    ],
)
def test_bad_input_exits_2_and_deletes_nothing(tmp_path, capsys, arguments, said):
    (tmp_path / "run.json").write_text("yesterday's")
    paths = ["--record", str(tmp_path / "run.json"), "--timeline", str(tmp_path / "run.timeline.csv")]
    try:
        exit_code = mm.main([*paths, *arguments])
    except SystemExit as exit:  # argparse's own
        exit_code = exit.code
    assert exit_code == 2 and said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "yesterday's"


def test_verbose_shows_the_output_too(tmp_path):
    result = cli(tmp_path, "--verbose", "--", "echo", "hello")
    assert result.stdout.startswith("hello\nrun: ok, ")
    assert (tmp_path / "run.log").read_text() == "hello\n"
