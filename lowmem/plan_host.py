"""Host memory of a training process: what it is made of, measured here where it can be, and the limit that stops
it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# A process that imports only what a worker needs after it was forked or spawned; prints its resident KiB
_PROBE = """
import json, sys, torch
def resident():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS')) * 1024
from torch.utils.data import DataLoader
class Data:
    def __len__(self): return 4
    def __getitem__(self, i): return own()
def own():
    # memory that this worker does not share with its parent
    fields = dict(l.split(':') for l in open('/proc/self/smaps_rollup') if ':' in l and 'kB' in l)
    return int(fields['Private_Dirty'].split()[0]) * 1024
if len(sys.argv) > 1:
    import transformers, transformers.trainer
worker = max(int(x) for x in DataLoader(Data(), num_workers=1, batch_size=2, collate_fn=max))
print(json.dumps([resident(), worker]))
"""


@dataclass
class HostMemory:
    """Bytes on the host.

    Attributes:
        process_bytes: interpreter and libraries, measured here.
        worker_bytes: what one DataLoader worker does not share with its parent, measured here right after its start;
            a data set that the worker loads itself comes on top.
        workers_bytes: of all workers.
        loading_bytes: while weights are read: the largest tensor of the file beside what goes to the device, or the
            whole model where it stays on the host.
        offload_bytes: optimizer state, float32 master weights and gradients that live on the host.
        limit_bytes: of the container or the machine.
        limit_source: the file that says so.
    """

    process_bytes: int
    worker_bytes: int
    workers_bytes: int
    loading_bytes: int
    offload_bytes: int
    limit_bytes: int
    limit_source: str

    @property
    def peak_bytes(self) -> int:
        return self.process_bytes + self.workers_bytes + self.loading_bytes + self.offload_bytes


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> tuple[int, str]:
    """Bytes that this process may use and where that is written: the tightest control group (v2 or v1), or the RAM."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [(total, "RAM")]
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        groups = []
    for controllers, group in groups:
        if controllers == "":
            folder, name = cgroup / group.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = cgroup / "memory" / group.lstrip("/"), "memory.limit_in_bytes"
        else:
            continue
        while True:
            file = folder / name
            if file.exists() and (text := file.read_text().strip()).isdigit():
                limits.append((int(text), f"{file}"))
            if folder == cgroup or cgroup not in folder.parents:
                break
            folder = folder.parent
    return min(limits)


def measure_process(with_transformers: bool = True) -> tuple[int, int]:
    """(resident bytes of a process with torch and transformers, bytes of one DataLoader worker of its own)."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, *(["transformers"] if with_transformers else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the host memory could not be measured: {result.stderr.strip().splitlines()[-1:]}")
    process, worker = json.loads(result.stdout)
    return process, worker


def host_memory(
    weight_bytes: int,
    largest_weight_bytes: int,
    trainable: int,
    gradient_width: int,
    *,
    workers: int = 0,
    offload_optimizer: bool = False,
    on_device: bool = True,
    measured: tuple[int, int] | None = None,
) -> HostMemory:
    """Host memory of one training process.

    Offloaded states follow DeepSpeed's ZeRO-Offload: float32 master weights and two moments, and the gradients in
    their own type. `measured` is what `measure_process` returns, measured now if left out.
    """
    process, worker = measured or measure_process()
    limit, source = memory_limit()
    offload = trainable * (12 + gradient_width) if offload_optimizer else 0
    loading = largest_weight_bytes if on_device else weight_bytes + largest_weight_bytes
    return HostMemory(process, worker, workers * worker, loading, offload, limit, source)
