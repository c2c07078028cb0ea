"""Runs `memory_probe` in forks of one process that has imported everything: the ranks of torchrun, sooner.

Started and spoken to by torchrun.py. A line of stdin is a request, `{"out", "settings", "processes", "timeout_s"}`; a
line of stdout is the answer, `{"returncodes", "said"}`: exit status of every rank (negative: ended by that signal) and
what the ranks printed.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print, while they are imported too, is no answer

import memory_probe  # noqa: E402

import variants  # noqa: E402

variants.activate(memory_probe.DEFAULTS["_variant"])

import datasets  # noqa: E402, F401  (what every probe imports)
import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

import data  # noqa: E402, F401
import trl  # noqa: E402, F401
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402, F401


def start(request: dict, rank: int, port: int, log: str) -> int:
    """The process id of a fork that runs the probe as `rank` and exits."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if (processes := request["processes"]) > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ.update(address | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        memory_probe.main(request["out"], request["settings"])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [f"{request['out']}{rank}.log" for rank in range(request["processes"])]
    running = {start(request, rank, port, log): rank for rank, log in enumerate(logs)}
    returncodes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout_s"]
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                returncodes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if any(returncodes.values()) or time.monotonic() > deadline:  # the others wait for a rank that failed
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    failed = [rank for rank in sorted(returncodes) if returncodes[rank] not in (0, -signal.SIGKILL)]
    said = [open(logs[rank], errors="replace").read() for rank in failed or range(len(logs))]
    return {"returncodes": [returncodes[rank] for rank in range(len(logs))], "said": "\n".join(said)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=ANSWERS, flush=True)
