"""The doctor: what it finds in logs, records and commands, what it proposes, and the five-step workflow."""

import json
import sys

import pytest
import yaml

from lowmem.doctor import main
from lowmem.failures import cuda_figures, leak, read_log, timeline_peaks
from lowmem.remedies import remedies, smaller_batch
from lowmem.watched_run import mean_while_used, step_time, watch, window_peaks
from lowmem.workflow import workflow

GIB = 2**30
NEW = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity "
    "of 23.69 GiB of which 1.10 GiB is free. Including non-PyTorch memory, this process has 22.58 GiB "
    "memory in use. Of the allocated memory 17.90 GiB is allocated by PyTorch, and 4.21 GiB is reserved "
    "by PyTorch but unallocated."
)
OLD = (
    "RuntimeError: CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0; 23.69 GiB total capacity; 21.00 GiB "
    "already allocated; 100.00 MiB free; 22.00 GiB reserved in total by PyTorch)"
)
LOGS = {
    "device out of memory": OLD,
    "data loader worker killed": "RuntimeError: DataLoader worker (pid 4711) is killed by signal: Killed.",
    "host out of memory": "[1234.5] Out of memory: Killed process 4711 (python) total-vm:1kB",
    "shared memory exhausted": "ERROR: Unexpected bus error encountered in worker. insufficient shared memory (shm).",
    "NCCL time-out": "[rank1]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE)",
    "broken pipe": "BrokenPipeError: [Errno 32] Broken pipe",
}


@pytest.mark.parametrize("kind", LOGS)
def test_each_failure_is_found_with_its_line_and_remedies(kind):
    found = read_log(f"step 1\nstep 2\n{LOGS[kind]}\n")
    assert [(finding.kind, finding.line_number) for finding in found] == [(kind, 3)]
    assert found[0].line == LOGS[kind] and remedies(found[0])


def test_figures_come_out_of_both_wordings():
    old, new = cuda_figures(OLD), cuda_figures(NEW)
    assert old["tried_bytes"] == 512 * 2**20 and old["reserved_bytes"] == 22 * GIB and old["free_bytes"] == 100 * 2**20
    assert new["capacity_bytes"] == int(23.69 * GIB) and new["process_bytes"] == int(22.58 * GIB)
    assert new["reserved_bytes"] == pytest.approx(22.11 * GIB, rel=1e-6)


def test_fragmentation_is_what_is_reserved_beyond_what_was_asked():
    assert [finding.kind for finding in read_log(NEW)] == ["device out of memory", "fragmentation"]
    assert [finding.kind for finding in read_log(OLD)] == ["device out of memory"]


def test_a_killed_worker_is_the_cause_and_the_broken_pipe_comes_last():
    found = read_log("\n".join([LOGS["broken pipe"], LOGS["data loader worker killed"], "exitcode: -9"]))
    assert [finding.kind for finding in found] == ["data loader worker killed", "broken pipe"]


def test_a_worker_that_died_while_its_batch_was_handed_over():
    traceback = '  File "torch/utils/data/dataloader.py", line 725, in __next__\n'
    error = "ConnectionResetError: [Errno 104] Connection reset by peer"
    cut_off = "object repr     : ConnectionResetError(104, 'Connection reset by peer')\nlost sys.stderr"
    for end in (error, cut_off):
        assert [finding.kind for finding in read_log(traceback + end)] == ["data loader worker killed"]
    assert [finding.kind for finding in read_log(cut_off)] == ["data loader worker killed"]  # before its first line
    assert read_log(error) == []  # a connection of something else


def test_ordinary_logs_hold_no_failure():
    text = (
        "{'loss': 0.5, 'oom_score': 1}\nsaving to memory bank\n100%|###| 3/3 [00:03<00:00, 1.0s/it]\nNCCL version 2.27"
    )
    assert read_log(text) == []


def test_remedies_keep_the_effective_batch():
    for batch, accumulation in ((12, 2), (16, 1), (7, 3), (2, 1)):
        rows, times = smaller_batch(batch, accumulation)
        assert rows * times == batch * accumulation and rows < batch
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "dataloader_num_workers": 8}
    changes = [remedy.settings for remedy in remedies(read_log(OLD)[0], settings)]
    assert {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2} in changes
    assert not any("dataloader_num_workers" in change for change in changes)  # workers hold no device memory
    worker = remedies(read_log(LOGS["data loader worker killed"])[0], settings)
    assert worker[0].settings == {"dataloader_num_workers": 4}


def test_a_leak_rises_step_by_step_and_growth_that_ends_is_none():
    assert leak([50, 100, 110, 120, 130, 140, 150]) == pytest.approx(10)
    assert leak([50, 100, 140, 150, 150, 150, 150]) is None
    assert leak([100, 100, 100, 101, 100, 100]) is None
    assert leak([100, 200, 300]) is None
    rows = [{"step": str(s), "rss_bytes": str(v)} for s, v in ((1, 5), (1, 9), (2, 7), (2, 8))]
    assert timeline_peaks([*rows, {"step": "", "rss_bytes": "99"}]) == [9, 8]


def test_records_of_failed_and_leaking_runs(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"status": "oom", "error": LOGS["host out of memory"], "config": None, "env": None}))
    assert main(["record", str(path)]) == 1
    assert "evidence" in capsys.readouterr().out
    path.write_text(json.dumps({"status": "ok", "error": None}))
    assert main(["record", str(path)]) == 0
    rows = "".join(f"{step},{10**9 + step * 10**8}\n" for step in range(1, 9))
    (tmp_path / "run.timeline.csv").write_text(f"step,rss_bytes\n{rows}")
    assert main(["record", str(path)]) == 1
    assert "the peak rises by 95.4 MiB a step" in capsys.readouterr().out


def test_an_out_of_memory_run_is_planned_and_its_fixes_ranked(tmp_path, capsys):
    config = {"variant": "upstream@1", "vocab_size": 900, "num_hidden_layers": 1, "hidden_size": 16, "head_dim": 8}
    config |= {"intermediate_size": 16, "prompt_tokens": 16, "response_tokens": 8, "rloo_k": 2, "lora_rank": 1}
    config |= {"gradient_checkpointing": True, "dtype": "bfloat16"}
    error = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2747002880 bytes."
    record = {"status": "oom", "error": error, "config": config, "env": {"device": "cpu"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert main(["record", str(tmp_path / "run.json")]) == 1
    said = capsys.readouterr().out
    assert "tried 2.56 GiB" in said and "(simulated)" in said


def test_a_command_is_run_and_judged(capsys):
    code = "import sys; print('1.5s/it 2.0s/it 3.0s/it'); sys.exit('BrokenPipeError: [Errno 32] Broken pipe')"
    assert main(["run", "--reference_s", "1", "--", sys.executable, "-c", code]) == 1
    said = capsys.readouterr().out
    assert "broken pipe" in said and "step time: 3.00x, target 1.5x the reference: too high" in said
    assert "device memory: not measured" in said and "host memory" in said
    assert main(["run", "--", sys.executable, "-c", "import time; time.sleep(0.5)"]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out


def test_a_killed_command_is_seen():
    run = watch([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], show=False)
    assert run.exit_code == -9


def test_samples_and_step_times():
    assert step_time("a 2.0it/s b 4.0it/s c 1.0s/it") == 1.0 and step_time("nothing") is None
    assert mean_while_used([0, 0, 0.9, 0, 0.9, 0]) == pytest.approx(0.6) and mean_while_used([0, 0]) is None
    assert window_peaks(list(range(40))) == [21, 23, 25, 27, 29, 31, 33, 35, 37, 39] and window_peaks([1, 2]) == []


REAL = {
    "host out of memory": """
import resource, torch
resource.setrlimit(resource.RLIMIT_DATA, (2**30, resource.RLIM_INFINITY))
kept = [torch.ones(2**26) for _ in range(8)]
""",
    "data loader worker killed": """
import os, signal, torch
from torch.utils.data import DataLoader
class Data:
    def __len__(self): return 8
    def __getitem__(self, i): return torch.zeros(2) if i < 6 else os.kill(os.getpid(), signal.SIGKILL)
for batch in DataLoader(Data(), num_workers=1): pass
""",
    "leak": """
import time
kept = []
for step in range(80):
    kept.append(b"x" * 2**21)
    time.sleep(0.06)
""",
}


@pytest.mark.parametrize("kind", REAL)
def test_failures_that_really_happen_are_named(kind, capsys):
    assert main(["run", "--", sys.executable, "-c", REAL[kind]]) == 1
    said = capsys.readouterr().out
    findings = [line for line in said.splitlines() if line in {*LOGS, "leak", "fragmentation"}]
    assert findings == [kind] and "  1. " in said
    if kind == "host out of memory":
        assert "tried 0.25 GiB" in said


def test_a_run_that_frees_what_it_takes_has_no_leak(capsys):
    code = REAL["leak"].replace("kept.append(", "kept = (")
    assert main(["run", "--", sys.executable, "-c", code]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out


TRAINER = """
import json, sys, yaml
file, record = sys.argv[sys.argv.index("--config") + 1], sys.argv[sys.argv.index("--record") + 1]
rows = yaml.safe_load(open(file))["rows_per_micro_batch"]
peak = 100 * rows * 2**20
summary = {"live_peak_bytes": peak, "step_time_median_s": 1 + abs(rows - 6) / 10}
json.dump({"status": "ok" if rows < 12 else "oom", "error": None, "summary": summary}, open(record, "w"))
"""


def test_the_workflow_ends_with_the_fastest_settings_that_fit(tmp_path):
    script, out, said = tmp_path / "train.py", tmp_path / "out.yaml", []
    script.write_text(TRAINER)
    settings = {"rloo_k": 12, "steps": 2}
    final = workflow([sys.executable, str(script)], settings, GIB, out, rows=12, say=said.append)
    assert final == {"rloo_k": 12, "steps": 2, "rows_per_micro_batch": 6} == yaml.safe_load(out.read_text())
    assert any("rows_per_micro_batch 12" in line and "out of memory" in line for line in said)
    with pytest.raises(ValueError, match="not even"):
        workflow([sys.executable, str(script)], settings, 50 * 2**20, out, rows=12, say=said.append)
    with pytest.raises(ValueError, match="left no record"):
        workflow([sys.executable, "-c", "print('boom')"], settings, GIB, out, rows=12, say=said.append)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["log", "no-such.log"], "No such file"),
        (["run"], "there is no command"),
        (["record", "no-such.json"], "is no record"),
        (["log", "x", "--", "python"], "contradicts"),
        (["run", "--", "/no/such/program"], "cannot be started"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lowmem.doctor: ") and said in error and "\n" not in error


def test_a_log_without_an_error_is_told(tmp_path, capsys):
    (tmp_path / "fine.log").write_text("step 1\nstep 2\n")
    assert main(["log", str(tmp_path / "fine.log")]) == 2
    assert "holds no error that is known here" in capsys.readouterr().err
