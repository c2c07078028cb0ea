"""Starts a script alone or under torchrun, with a time limit: a hang is a failure with the last words of the ranks."""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}


def launch(script: str, *arguments: str, processes: int = 1, timeout_s: float = 300, ok: bool = True, env=None) -> str:
    """The script's stdout and stderr.

    Raises:
        AssertionError: if it did not end in time, or failed although `ok`, or did not fail although not `ok`.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script), *arguments]
    environment = os.environ | ENVIRONMENT | (env or {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        output, _ = process.communicate()
        raise AssertionError(f"{script} did not end within {timeout_s} s; its last lines:\n{output[-3000:]}") from None
    if (process.returncode == 0) != ok:
        said = output.partition("failed (exitcode")[0]  # before torchrun's own report
        raise AssertionError(f"{script} ended with {process.returncode}:\n{said[-4000:]}")
    return output


def kill_tree(pid: int) -> None:
    """Ends a process and all of its descendants: torchrun gives every rank a session of its own, so that killing
    its process group leaves ranks behind, which hold the pipe that `communicate` reads to its end."""
    processes = psutil.Process(pid).children(recursive=True) + [psutil.Process(pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def probe(folder: Path, settings: dict, processes: int = 1, timeout_s: float = 300, env=None) -> list[dict]:
    """`memory_probe.py` in `processes` processes: one result per rank, its weights under "weights".

    Raises:
        AssertionError: as `launch`.
    """
    from safetensors.torch import load_file

    out = folder / "run-"
    folder.mkdir(parents=True, exist_ok=True)
    if env is None:
        said = ask_server({"out": str(out), "settings": settings, "processes": processes, "timeout_s": timeout_s})
        assert not any(said["returncodes"]), f"ranks ended with {said['returncodes']}:\n{said['said'][-4000:]}"
    else:
        launch("tests/memory_probe.py", str(out), json.dumps(settings), processes=processes, env=env)
    results = []
    for rank in range(processes):
        result = json.loads(Path(f"{out}{rank}.json").read_text())
        results.append(result | {"weights": load_file(f"{out}{rank}.safetensors")})
    return results


def failing_probe(folder: Path, settings: dict, processes: int = 1) -> str:
    """What a probe says that has to fail."""
    out = str(folder / "run-")
    said = ask_server({"out": out, "settings": settings, "processes": processes, "timeout_s": 120})
    assert any(said["returncodes"]), "the run did not fail"
    return said["said"]


@functools.cache
def server() -> subprocess.Popen:
    """probe_server.py, which imports once for all probes of a test session; it ends when its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/probe_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    atexit.register(process.stdin.close)
    return process


def ask_server(request: dict) -> dict:
    process = server()
    print(json.dumps(request), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, f"probe_server.py ended with {process.wait()}"
    return json.loads(answer)


def largest_difference(ours: dict, reference: dict) -> float:
    """Over tensors of the same names."""
    assert ours.keys() == reference.keys()
    return max((ours[name] - reference[name]).abs().max().item() for name in reference)
