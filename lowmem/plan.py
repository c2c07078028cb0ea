"""Knows the peak before the run: simulates the step of a method on tensors without data, and says whether it fits.

    python -m lowmem.plan --model Qwen3-8B --method rloo --dtype bfloat16 --lora_rank 16 --device "RTX 4090"
    python -m lowmem.plan --config experiments/configs/cpu.yaml --device 7GiB --cpu
    python -m lowmem.plan --model Qwen3-0.6B --method rloo --device 24GiB --maximize k
    python -m lowmem.plan --model Qwen3-8B --method rloo --device 24GiB --recommend --write qwen3-8b.yaml

Reads the settings of experiments/train.py (`--config`, and every field of lowmem/plan_config.py as an option). It
plans a step of its own; the trainers of both TRL trees are planned by experiments/plan_trainer.py. No accuracy on a
GPU is claimed: docs/planner.md. Exit status: 0 fits, 1 tight or does not fit, 2 bad input.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints

from lowmem.devices import device_bytes
from lowmem.plan_config import PlanConfig, from_training_file

GIB = 2**30
NAMES = {"lm_head": "LM head"}


def size(n: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m lowmem.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--config", help="YAML of experiments/train.py")
    top.add_argument("--device", help="name (RTX 3090, H100, ...) or size (24GiB); without it there is no verdict")
    top.add_argument("--cpu", action="store_true", help="kernels of the CPU, and a budget beside the process")
    top.add_argument("--calibration", help="JSON of --calibrate, instead of the figures for what is not simulated")
    top.add_argument("--calibrate", metavar="FILE", help="measure on this machine's GPU what is not simulated")
    top.add_argument("--maximize", metavar="k|micro_batch|length", help="the largest that fits")
    top.add_argument("--recommend", action="store_true", help="the cheapest settings that fit")
    top.add_argument("--write", metavar="FILE", help="YAML with the recommended or given settings, for train.py")
    top.add_argument("--fixes", action="store_true", help="simulate what would save memory, even if the plan fits")
    top.add_argument("--json", metavar="FILE", help="the plan as JSON; - for standard output")
    top.add_argument("--chart", metavar="FILE", help="time line of one step, PNG")
    group = top.add_argument_group("settings")
    hints = get_type_hints(PlanConfig)
    for field in fields(PlanConfig):
        kind = next(
            k for k in (bool, int, float, str) if k in (hints[field.name], *getattr(hints[field.name], "__args__", ()))
        )
        parse = _boolean if kind is bool else kind
        options = {
            "type": parse,
            "default": argparse.SUPPRESS,
            "help": field.metadata["help"],
            "metavar": kind.__name__,
        }
        if kind is bool:
            options |= {"nargs": "?", "const": True}
        group.add_argument(f"--{field.name}", **options)
    return top


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "false", "no", "0"):
        return text.lower() in ("true", "yes", "1")
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def plan_of(args: argparse.Namespace) -> PlanConfig:
    """The plan of the file with the options on top.

    Raises:
        ValueError: see `PlanConfig` and `from_training_file`; or if the file cannot be read.
    """
    settings = {}
    if args.config:
        import yaml

        try:
            settings = yaml.safe_load(Path(args.config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{args.config} cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{args.config} holds no settings; expected lines such as `rloo_k: 8`")
        settings = from_training_file(settings)
    names = {field.name for field in fields(PlanConfig)}
    return PlanConfig(**settings | {key: value for key, value in vars(args).items() if key in names})


def states_per_rank(step, plan: PlanConfig) -> dict[str, dict[str, int]]:
    """Categories by phase with the sharded states divided by the ranks (arithmetic, not simulated; the gathered
    layer and the communication buffers of an engine come on top)."""
    if plan.ranks == 1:
        return step.by_phase
    shared = {"optimizer": ("optimizer",), "gradients": ("optimizer", "gradients")}
    shared["weights"] = ("optimizer", "gradients", "weights")
    divided = shared[plan.shard]
    return {
        phase: {name: -(-size // plan.ranks) if name in divided else size for name, size in categories.items()}
        for phase, categories in step.by_phase.items()
    }


def sharded(step, plan: PlanConfig):
    """The step with its states divided over the ranks."""
    if plan.ranks == 1:
        return step
    step.by_phase = states_per_rank(step, plan)
    totals = {phase: sum(categories.values()) for phase, categories in step.by_phase.items()}
    step.peak_phase = max(totals, key=totals.get)
    step.peak_bytes = totals[step.peak_phase]
    return step


def table(step) -> list[str]:
    """Peak by phase and category, in MiB."""
    from lowmem.plan_memory import CATEGORIES

    shown = [name for name in CATEGORIES if any(c.get(name, 0) >= 2**19 for c in step.by_phase.values())]
    lines = ["  ".join([f"{'peak, MiB':<15}", *(f"{name:>11}" for name in shown), f"{'total':>9}"])]
    for phase in ("generate", "score", "train_forward", "train_backward", "optimizer"):
        if phase in step.by_phase:
            values = step.by_phase[phase]
            cells = [f"{values.get(name, 0) / 2**20:>11,.0f}" for name in shown]
            mark = "  <- peak" if phase == step.peak_phase else ""
            lines.append("  ".join([f"{phase:<15}", *cells, f"{sum(values.values()) / 2**20:>9,.0f}"]) + mark)
    if step.workspace_bytes:
        lines.append(f"workspace of kernels on a CPU in half precision: {size(step.workspace_bytes)}")
    return lines


def verdict_lines(verdict) -> list[str]:
    return [
        f"device {size(verdict.device_bytes)}, usable {size(verdict.usable_bytes)}",
        f"simulated {size(verdict.peak_bytes)} + not simulated {size(verdict.unseen_bytes)} ({verdict.source})",
        f"verdict: {verdict.verdict}, margin {size(verdict.margin_bytes)}",
    ]


def host_lines(host) -> list[str]:
    parts = [f"process {size(host.process_bytes)}", f"DataLoader workers {size(host.workers_bytes)}"]
    parts += [f"loading {size(host.loading_bytes)}"]
    if host.offload_bytes:
        parts.append(f"offloaded optimizer {size(host.offload_bytes)}")
    fits = "fits" if host.peak_bytes <= 0.8 * host.limit_bytes else "above 80 % of it"
    if host.peak_bytes > host.limit_bytes:
        fits = "does not fit"
    return [
        f"host {size(host.peak_bytes)}: {', '.join(parts)} (one worker {size(host.worker_bytes)}, measured here)",
        f"host limit {size(host.limit_bytes)} ({host.limit_source}): {fits}",
    ]


def fix_lines(fixes, refused, device, unseen) -> list[str]:
    from lowmem.plan_verdict import judge

    lines = ["fixes, each simulated:"]
    for fix in fixes:
        ratio = "time not known" if fix.time_ratio is None else f"operations x{fix.time_ratio:.2f}"
        verdict = "" if device is None else judge(fix.step.needed_bytes, device, unseen).verdict
        note = f" ({fix.note})" if fix.note else ""
        lines.append(f"  {fix.name:<32} saves {size(fix.saved_bytes):>11}  {ratio:<17} {verdict}{note}")
    return lines + [f"  not possible: {reason}" for reason in refused]


def training_yaml(plan: PlanConfig) -> dict:
    """Settings that experiments/train.py takes, for a plan of RLOO; its variant follows from the strategies.

    Raises:
        ValueError: if train.py cannot do what the plan says.
    """
    if plan.method != "rloo":
        raise ValueError(f"experiments/train.py trains rloo only, so a plan of {plan.method} cannot be written for it")
    unknown = [name for name in ("offload_optimizer",) if getattr(plan, name)]
    if unknown or plan.ranks > 1:
        raise ValueError("experiments/train.py has no setting for offload_optimizer or ranks; leave them out")
    partly = plan.selective_checkpointing or plan.gradient_checkpointing_ratio is not None
    if partly and not plan.shared_prefix and plan.lm_head == "chunked":
        raise ValueError(
            "experiments/train.py recomputes part of the activations in the v1.16.0 tree and has chunked "
            "log-probabilities in the v0.20.0 tree; leave one of them out"
        )
    variant = "shared-prefix" if plan.shared_prefix else "memory" if partly else "upstream@1"
    variant = "string-level" if variant == "upstream@1" and plan.lm_head == "chunked" else variant
    names = ("model", "dtype", "prompt_tokens", "prompt_tokens_min", "response_tokens", "rloo_k", "prompts_per_step")
    names += ("rows_per_micro_batch", "kl_coef", "lora_rank", "gradient_checkpointing")
    if variant == "string-level":
        names += ("rows_per_rollout", "rows_per_forward", "logprob_chunk_tokens")
    if plan.model is None:
        names += ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    values = {name: getattr(plan, name) for name in names}
    memory = {"selective_checkpointing": plan.selective_checkpointing or None}
    memory["gradient_checkpointing_ratio"] = plan.gradient_checkpointing_ratio
    memory = {name: value for name, value in memory.items() if value is not None}
    settings = {"variant": variant} | {name: value for name, value in values.items() if value is not None}
    return settings | ({"memory": memory} if memory else {})


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"lowmem.plan: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from lowmem.plan_verdict import CPU, CUDA, FITS, calibrate, judge, load_calibration

    if args.calibrate:
        print(json.dumps(asdict(calibrate(args.calibrate))))
        return 0
    plan = plan_of(args)
    device = device_bytes(args.device) if args.device else None
    if (args.maximize or args.recommend) and device is None:
        raise ValueError("--maximize and --recommend need a --device to fit on")
    if args.maximize and args.recommend:
        raise ValueError("--maximize contradicts --recommend: the one changes the workload, the other keeps it")
    if args.cpu and args.calibration:
        raise ValueError("--calibration contradicts --cpu: it holds the figures of a GPU")
    unseen = load_calibration(args.calibration) if args.calibration else CPU if args.cpu else CUDA

    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from lowmem import plan_host
    from lowmem.plan_search import maximize, ranked_fixes, recommend
    from lowmem.plan_step import model_config, simulate

    def simulated(other: PlanConfig):
        return sharded(simulate(other, cuda=not args.cpu), other)

    config = model_config(plan)
    pool = ThreadPoolExecutor(1)
    measuring = pool.submit(plan_host.measure_process)  # a process of its own, beside the simulation
    head = []
    if args.maximize:
        found = maximize(plan, args.maximize, device, unseen, simulated)
        if found is None:
            print(f"not even the smallest {args.maximize} fits on {args.device}; try --recommend")
            return 1
        from lowmem.plan_search import with_value

        plan, step = with_value(plan, args.maximize, found[0]), found[1]
        head.append(f"largest {args.maximize} that fits on {args.device}: {found[0]} (confirmed by a full simulation)")
    elif args.recommend:
        best = recommend(plan, device, unseen, simulated, cuda=not args.cpu)
        if best is None:
            print(
                f"nothing among the strategies known here fits on {args.device}; "
                "a larger device or smaller model is needed"
            )
            return 1
        changes = {
            f.name: getattr(best.plan, f.name)
            for f in fields(PlanConfig)
            if getattr(best.plan, f.name) != getattr(plan, f.name)
        }
        plan, step = best.plan, best.step
        said = ", ".join(f"{key}={value}" for key, value in changes.items()) or "as given"
        head.append(f"recommended of {best.tried} candidates: {said} (confirmed by a full simulation)")
    else:
        step = simulated(plan)
    verdict = judge(step.needed_bytes, device, unseen) if device else None
    fixes, refused = [], []
    if args.fixes or (verdict and verdict.verdict != FITS and not args.recommend):
        fixes, refused = ranked_fixes(plan, step, simulated)
    width = {"float32": 4, "float64": 8}.get(plan.dtype, 2)
    text = config.get_text_config(decoder=True)
    host = plan_host.host_memory(
        step.parameters * width,
        text.vocab_size * text.hidden_size * width,
        step.trainable,
        width,
        workers=plan.dataloader_num_workers,
        offload_optimizer=plan.offload_optimizer,
        on_device=not args.cpu,
        measured=measuring.result(),
    )

    result = {
        "plan": asdict(plan),
        "parameters": step.parameters,
        "trainable": step.trainable,
        "peak_bytes": step.peak_bytes,
        "peak_phase": step.peak_phase,
        "bytes_by_phase": step.by_phase,
        "workspace_bytes": step.workspace_bytes,
        "train_flops": step.train_flops,
        "verdict": asdict(verdict) if verdict else None,
        "host": asdict(host) | {"peak_bytes": host.peak_bytes},
        "fixes": [
            {"name": f.name, "changes": f.changes, "saved_bytes": f.saved_bytes, "time_ratio": f.time_ratio}
            for f in fixes
        ],
        "wall_s": step.wall_s,
    }
    lines = head + [
        f"{plan.model or config.model_type}: {step.parameters:,} parameters, {step.trainable:,} trained, "
        f"{plan.dtype}; {plan.method}, {plan.rows_per_step} rows of {plan.prompt_tokens} + "
        f"{plan.response_tokens} tokens, {plan.micro_batch_rows} at once",
        *table(step),
        *(verdict_lines(verdict) if verdict else [f"peak {size(step.peak_bytes)} of tensors in {step.peak_phase}"]),
        *host_lines(host),
        *(fix_lines(fixes, refused, device, unseen) if fixes or refused else []),
        f"simulated in {step.wall_s:.1f} s, {step.num_ops:,} operators",
    ]
    if args.json == "-":
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(lines))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.write:
        import yaml

        Path(args.write).write_text(yaml.safe_dump(training_yaml(plan), sort_keys=False))
        print(f"settings for experiments/train.py in {args.write}")
    if args.chart:
        from lowmem.plan_chart import draw_step

        draw_step(step, f"{plan.model or config.model_type}, {plan.method}", args.chart, device)
        print(f"time line of one step in {args.chart}")
    return 0 if verdict is None or verdict.verdict == FITS else 1


if __name__ == "__main__":
    sys.exit(main())
