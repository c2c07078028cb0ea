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
import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from lowmem.devices import device_bytes
from lowmem.plan_config import PlanConfig, from_training_file

if TYPE_CHECKING:  # PyTorch is imported when there is something to simulate
    from lowmem.plan_host import HostMemory
    from lowmem.plan_step import StepMemory
    from lowmem.plan_verdict import Unseen, Verdict


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
    if plan.model is None and plan.vocab_size < 8192:  # the built-in tokenizer's default size
        values["tokenizer_vocab_size"] = plan.vocab_size
    settings = {"variant": variant} | {name: value for name, value in values.items() if value is not None}
    return settings | ({"memory": memory} if memory else {})


def can_be_written(plan: PlanConfig) -> bool:
    try:
        training_yaml(plan)
    except ValueError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"lowmem.plan: {error}", file=sys.stderr)
        return 2


@dataclass
class Planned:
    """A plan that was simulated, and what is said about it.

    Attributes:
        found: what a search found, as a sentence; None without one.
        verdict: None without a device.
        fixes, refused: of `lowmem.plan_search.ranked_fixes`; empty where they were not asked for.
    """

    plan: PlanConfig
    step: "StepMemory"
    model_type: str
    found: str | None
    verdict: "Verdict | None"
    unseen: "Unseen"
    host: "HostMemory"
    fixes: list
    refused: list[str]


class NothingFits(Exception):
    """A search ended without a plan; in one sentence."""


def run(args: argparse.Namespace) -> int:
    import logging
    import warnings

    from lowmem.plan_report import as_json, report_lines
    from lowmem.plan_verdict import FITS, calibrate

    if args.calibrate:
        print(json.dumps(asdict(calibrate(args.calibrate))))
        return 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        planned = planned_for(args)
    except NothingFits as reason:
        print(json.dumps({"found": None, "reason": str(reason)}, indent=1) if args.json == "-" else reason)
        return 1
    if args.json == "-":
        print(json.dumps(as_json(planned), indent=1))
    else:
        print("\n".join(report_lines(planned)))
        if args.json:
            Path(args.json).write_text(json.dumps(as_json(planned), indent=1) + "\n")
    said = sys.stderr if args.json == "-" else sys.stdout
    if args.write:
        import yaml

        Path(args.write).write_text(yaml.safe_dump(training_yaml(planned.plan), sort_keys=False))
        device = f" --device '{args.device}'" if args.device else ""
        print(
            f"settings for experiments/train.py in {args.write}; its trainer keeps more alive than this step, so "
            f"before a long run: python experiments/plan_trainer.py --config {args.write}{device}, or search with "
            "experiments/recommend_settings.py",
            file=said,
        )
    if args.chart:
        from lowmem.plan_chart import draw_step

        title = f"{planned.plan.model or planned.model_type}, {planned.plan.method}"
        draw_step(planned.step, title, args.chart, planned.verdict and planned.verdict.device_bytes)
        print(f"time line of one step in {args.chart}", file=said)
    return 0 if planned.verdict is None or planned.verdict.verdict == FITS else 1


def planned_for(args: argparse.Namespace) -> Planned:
    """Simulates, searches and judges what the options ask for.

    Raises:
        NothingFits: if a search finds nothing.
        ValueError: for bad input.
    """
    from lowmem import plan_host
    from lowmem.plan_search import ranked_fixes
    from lowmem.plan_step import model_config, simulate
    from lowmem.plan_verdict import CPU, CUDA, FITS, judge, load_calibration

    plan = plan_of(args)
    device = device_bytes(args.device) if args.device else None
    if (args.maximize or args.recommend) and device is None:
        raise ValueError("--maximize and --recommend need a --device to fit on")
    if args.maximize and args.recommend:
        raise ValueError("--maximize contradicts --recommend: the one changes the workload, the other keeps it")
    if args.cpu and args.calibration:
        raise ValueError("--calibration contradicts --cpu: it holds the figures of a GPU")
    if args.write:
        training_yaml(plan)  # refused before anything is simulated
    unseen = load_calibration(args.calibration) if args.calibration else CPU if args.cpu else CUDA
    config = model_config(plan)

    def simulated(other: PlanConfig):
        return sharded(simulate(other, cuda=not args.cpu), other)

    gc.freeze()  # collections during a simulation need not look at the libraries
    with ThreadPoolExecutor(1) as pool:
        measuring = pool.submit(plan_host.measure_process)  # a process of its own, beside the simulation
        if args.maximize or args.recommend:
            plan, step, found = searched(args, plan, device, unseen, simulated)
        else:
            step, found = simulated(plan), None
        verdict = judge(step.needed_bytes, device, unseen) if device else None
        fixes, refused = [], []
        if args.fixes or (verdict and verdict.verdict != FITS and not args.recommend):
            fixes, refused = ranked_fixes(plan, step, simulated)
        measured = measuring.result()
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
        measured=measured,
    )
    return Planned(plan, step, config.model_type, found, verdict, unseen, host, fixes, refused)


def searched(args, plan: PlanConfig, device: int, unseen, simulated) -> tuple:
    """`(plan, its full simulation, what was found)` of --maximize or --recommend.

    Raises:
        NothingFits: if nothing does.
    """
    from lowmem.plan_search import maximize, recommend, with_value

    if args.maximize:
        largest = maximize(plan, args.maximize, device, unseen, simulated)
        if largest is None:
            raise NothingFits(f"not even the smallest {args.maximize} fits on {args.device}; try --recommend")
        value, step = largest
        said = f"largest {args.maximize} that fits on {args.device}: {value} (confirmed by a full simulation)"
        return with_value(plan, args.maximize, value), step, said
    allowed = can_be_written if args.write else None
    best = recommend(plan, device, unseen, simulated, cuda=not args.cpu, allowed=allowed)
    if best is None:
        known = "that train.py can be told" if args.write else "known here"
        raise NothingFits(
            f"nothing among the strategies {known} fits on {args.device}; a larger device or smaller model is needed"
        )
    names = [f.name for f in fields(PlanConfig) if getattr(best.plan, f.name) != getattr(plan, f.name)]
    changes = ", ".join(f"{name}={getattr(best.plan, name)}" for name in names) or "as given"
    return best.plan, best.step, f"recommended of {best.tried} candidates: {changes} (confirmed by a full simulation)"


if __name__ == "__main__":
    sys.exit(main())
