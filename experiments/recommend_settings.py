"""The cheapest settings of a workload whose whole trainer fits on a device, written as a file for train.py.

    python experiments/recommend_settings.py --config experiments/configs/cpu.yaml --device 1GiB --write found.yaml
    python experiments/train.py --config found.yaml

`python -m lowmem.plan --recommend` confirms a candidate by the planner's own step, and a trainer keeps more alive than
that. Here every candidate is confirmed by experiments/plan_trainer.py, the real trainer in a dry run, in a fresh
process because a process has one tree. Options are those of `python -m lowmem.plan`; kernels are those of the CPU.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from lowmem.devices import device_bytes  # noqa: E402
from lowmem.plan import can_be_written, parser, plan_of, training_yaml  # noqa: E402
from lowmem.plan_config import PlanConfig  # noqa: E402
from lowmem.plan_search import recommend  # noqa: E402
from lowmem.plan_verdict import CPU  # noqa: E402
from memory_samples import write_atomically  # noqa: E402


@dataclass
class TrainerStep:
    """What `recommend` asks of a confirmed candidate."""

    needed_bytes: int


def trainer_step(plan: PlanConfig) -> TrainerStep:
    """The peak of the plan's trainer over two optimizer steps; the first is without gradients and optimizer state.

    Raises:
        RuntimeError: with what plan_trainer.py says, if it cannot be simulated.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(training_yaml(plan) | {"steps": 2}, file)
        file.flush()
        command = [sys.executable, "-W", "ignore", str(HERE / "plan_trainer.py"), "--config", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    peak = json.loads(result.stdout.splitlines()[-1])["live_peak_bytes"]
    print(f"trainer of {training_yaml(plan)['variant']}: {peak / 2**20:,.0f} MiB", file=sys.stderr)
    return TrainerStep(peak)


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        if not args.device or not args.write:
            raise ValueError("--device, which it has to fit on, and --write, the file for train.py, are needed")
        plan = plan_of(args)
        training_yaml(plan)  # refused before anything is simulated
        best = recommend(plan, device_bytes(args.device), CPU, trainer_step, cuda=False, allowed=can_be_written)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        print(f"recommend_settings.py: {error}", file=sys.stderr)
        return 2
    if best is None:
        print(f"no trainer that train.py can be told fits on {args.device}; take a larger one or a smaller workload")
        return 1
    write_atomically(Path(args.write), yaml.safe_dump(training_yaml(best.plan), sort_keys=False))
    print(f"peak {best.step.needed_bytes / 2**20:,.0f} MiB of {args.device}, settings in {args.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
