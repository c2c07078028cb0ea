"""Predicted against executed peaks on a GPU: allocated and reserved bytes of PyTorch's allocator.

    python experiments/validate_planner_cuda.py --runs results/runs/NAME     # all that is missing in NAME/planner.json
    python experiments/validate_planner_cuda.py --list

Every configuration is simulated with the kernels of CUDA (`lowmem.plan_cuda`), then executed in a fresh process whose
allocator may hold what the plan calls enough for tensors and allocator. A row has the error against allocated bytes,
which the simulation claims, and reserved over predicted, which is `lowmem.plan_verdict`'s share. Never run: there was
no GPU, no row of it exists, and no accuracy on a GPU is claimed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from memory_samples import write_atomically  # noqa: E402
from run_outcome import OUT_OF_MEMORY  # noqa: E402

ROLLOUT = {
    "model": "Qwen3-0.6B",
    "dtype": "bfloat16",
    "prompt_tokens": 512,
    "response_tokens": 64,
    "optimizer": "adamw",
}
SFT = {"method": "sft", "model": "Qwen3-0.6B", "dtype": "bfloat16", "prompt_tokens": 1024, "response_tokens": 64}
T5 = {"method": "sft", "model": "t5-base", "prompts_per_step": 8, "prompt_tokens": 512, "response_tokens": 128}


def cases() -> dict[str, dict]:
    """Settings of `PlanConfig` by name."""
    rollout = {
        "rloo-full-k4": {"lm_head": "full"},
        "rloo-completion-k4": {"lm_head": "completion"},
        "rloo-completion-k8": {"lm_head": "completion", "rloo_k": 8},
        "rloo-chunked-k8": {"lm_head": "chunked", "rloo_k": 8},
        "rloo-completion-float32": {"lm_head": "completion", "dtype": "float32", "rows_per_micro_batch": 2},
        "rloo-ckpt": {"lm_head": "completion", "gradient_checkpointing": True},
        "rloo-selective": {"lm_head": "completion", "selective_checkpointing": True},
        "rloo-ratio-half": {"lm_head": "completion", "gradient_checkpointing_ratio": 0.5},
        "rloo-lora": {"lm_head": "completion", "lora_rank": 16},
        "rloo-eager": {"lm_head": "completion", "attention": "eager"},
        "shared-k4": {"shared_prefix": True, "lm_head": "completion", "rows_per_micro_batch": 2},
        "shared-k16": {"shared_prefix": True, "lm_head": "completion", "rows_per_micro_batch": 2, "rloo_k": 16},
        "shared-ckpt": {"shared_prefix": True, "gradient_checkpointing": True, "rows_per_micro_batch": 2},
        "grpo-completion": {"method": "grpo", "lm_head": "completion"},
        "ppo": {"method": "ppo", "prompts_per_step": 4, "lm_head": "completion"},
    }
    supervised = {
        "sft": {},
        "sft-float32-foreach": {"dtype": "float32", "optimizer": "adamw_foreach"},
        "sft-ckpt-3072": {"gradient_checkpointing": True, "prompt_tokens": 3072},
        "sft-tinyllama": {"model": "tinyllama"},
        "mtp4": {"method": "mtp", "num_future_tokens": 4},
        "mtp4-chunked": {"method": "mtp", "num_future_tokens": 4, "lm_head": "chunked"},
    }
    t5 = {"t5-base": {}, "t5-base-bf16-ckpt": {"dtype": "bfloat16", "gradient_checkpointing": True}}
    t5["mt5-small"] = {"model": "mt5-small", "dtype": "bfloat16"}
    groups = ((ROLLOUT, rollout), (SFT, supervised), (T5, t5))
    return {name: base | settings for base, group in groups for name, settings in group.items()}


def measure(settings: dict, device: str = "cuda") -> dict:
    """The row of one configuration; in a process of its own. On the CPU, for a test, live bytes stand for allocated
    ones, and reserved ones are not known."""
    import torch

    from lowmem.plan_config import PlanConfig
    from lowmem.plan_step import execute, simulate
    from lowmem.plan_verdict import CUDA

    plan = PlanConfig(**settings)
    step = simulate(plan, cuda=device == "cuda")
    row = {"settings": settings, "predicted_bytes": step.peak_bytes, "predicted_phase": step.peak_phase}
    row |= {"device": device, "allocated_bytes": None, "reserved_bytes": None, "status": "ok"}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        row["device"] = torch.cuda.get_device_name(0)
        torch.cuda.set_per_process_memory_fraction(min(1.0, step.peak_bytes * (1 + CUDA.fraction) / total))
    try:
        result = execute(plan, device=device)
    except RuntimeError as error:
        if not OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
            raise
        row["status"] = "oom"
    else:
        row |= {"live_bytes": result.peak_bytes, "measured_phase": result.peak_phase}
        row["allocated_bytes"] = result.peak_bytes
    if device == "cuda":
        row |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return row


def in_fresh_process(settings: dict) -> dict:
    code = f"import json, sys; sys.path[:0] = {[str(HERE), str(ROOT)]!r}; import validate_planner_cuda as v; "
    code += "print('\\nRESULT' + json.dumps(v.measure(json.loads(sys.argv[1]))))"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for line in result.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT"))
    raise RuntimeError(f"it ended with {result.returncode}: {result.stderr.strip()[-400:]}")


def report(rows: dict[str, dict]) -> str:
    """One line for each row, and the summary."""
    lines = [f"{'configuration':<26} predicted allocated reserved, GiB   error  reserved/predicted"]
    errors = []
    for name, row in rows.items():
        predicted, allocated, reserved = (row[f"{key}_bytes"] for key in ("predicted", "allocated", "reserved"))
        if row["status"] != "ok":
            lines.append(f"{name:<26} {predicted / 2**30:9.3f} {row['status']}")
            continue
        errors.append(abs(predicted / allocated - 1))
        sizes = f"{predicted / 2**30:9.3f} {allocated / 2**30:9.3f} {reserved / 2**30:8.3f}"
        lines.append(f"{name:<26} {sizes} {predicted / allocated - 1:+12.2%} {reserved / predicted:8.3f}")
    if errors:
        oom = sum(row["status"] == "oom" for row in rows.values())
        worst = f"median {statistics.median(errors):.2%}, worst {max(errors):.2%}"
        lines.append(f"{len(errors)} executed: error of allocated bytes {worst}; out of memory under the plan: {oom}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="results/runs/local", help="folder of the records; planner.json in it")
    parser.add_argument("--list", action="store_true", help="names of the configurations")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(cases()))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("validate_planner_cuda.py: PyTorch finds no CUDA device; --list shows what would run", file=sys.stderr)
        return 1
    file, failed = Path(args.runs) / "planner.json", 0
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, settings in cases().items():
        if name in rows:
            continue
        try:
            rows[name] = in_fresh_process(settings)
        except RuntimeError as error:
            failed += 1
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
    print(report(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
