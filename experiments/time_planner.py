"""How long a plan of Qwen3-8B takes here, and how much memory: the whole command, imports included.

    python experiments/time_planner.py      # writes results/planner/time.json

Wall time, CPU time of the command and what it starts, and the largest resident memory of one of its processes, as
getrusage counts them. On a busy machine the wall time says less than the CPU time.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from train import environment  # noqa: E402

from memory_samples import write_atomically  # noqa: E402

REPEATS = 3
COMMON = "--model Qwen3-8B --method rloo --dtype bfloat16 --lm_head completion --prompt_tokens 2048".split()
COMMON += "--response_tokens 1024 --rows_per_micro_batch 1".split()
PLANS = {
    "full": [*COMMON, "--device", "H200"],
    "lora, recomputed": [*COMMON, "--device", "RTX 4090", "--lora_rank", "16", "--gradient_checkpointing"],
}


def timed(options: list[str]) -> dict:
    """Seconds and bytes of one `python -m lowmem.plan`; its exit status may be that of a plan that does not fit.

    Raises:
        RuntimeError: if it ended with neither.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "lowmem.plan", *options, "--json", "-"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.strip()[-300:]}")
    plan = json.loads(result.stdout)
    return {
        "wall_s": wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "max_rss_bytes": after.ru_maxrss * 1024,
        "simulation_s": plan["wall_s"],
        "peak_bytes": plan["peak_bytes"],
    }


def main() -> int:
    record = {"env": environment(), "load_average": os.getloadavg()[0], "plans": {}}
    for name, options in PLANS.items():
        runs = [timed(options) for _ in range(REPEATS)]
        record["plans"][name] = {"command": ["python", "-m", "lowmem.plan", *options], "runs": runs}
        walls = ", ".join(f"{run['wall_s']:.1f}" for run in runs)
        print(f"{name}: {walls} s, {max(run['max_rss_bytes'] for run in runs) / 2**20:.0f} MiB")
    write_atomically(ROOT / "results" / "planner" / "time.json", json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
