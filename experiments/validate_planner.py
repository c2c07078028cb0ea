"""Predicted against really executed peaks: every configuration in a fresh process, under a budget that the plan calls
enough.

    python experiments/validate_planner.py                     # all that is missing in results/planner/validation.json
    python experiments/validate_planner.py --only trainer      # or step, recorded
    python experiments/validate_planner.py --changed           # predict all rows again, run what is predicted anew

Three kinds: `step`, the planner's own step of a method, executed on real tensors; `trainer`, the trainers of both
trees, executed by experiments/train.py; `recorded`, the runs of results/runs/, predicted from their settings. The
executed run may allocate what `lowmem.plan_verdict` calls enough for the predicted peak and not more (RLIMIT_DATA), so
a wrong "fits" is an out-of-memory. Writes validation.json and validation.csv after every configuration.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from run_matrix import MALLOC  # noqa: E402

from memory_samples import status_kib, write_atomically  # noqa: E402

RESULTS = ROOT / "results" / "planner"
RECORDED = ROOT / "results" / "runs" / "cpu-2core"
PROCESS_BYTES = 520 * 2**20  # interpreter and libraries, which train.py's budget contains (docs/measuring.md)
COLUMNS = ("name", "kind", "predicted_bytes", "measured_bytes", "error", "predicted_phase", "measured_phase")
COLUMNS += ("budget_bytes", "status", "rule_bytes", "accelerate_bytes", "rss_bytes", "predicted_s", "measured_s")

TINY = {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "prompt_tokens": 256}
TINY |= {"response_tokens": 48, "optimizer": "adamw"}

SMALLER = {"vocab_size": 8000, "num_hidden_layers": 2, "prompt_tokens": 128, "response_tokens": 12}


def step_cases() -> dict[str, dict]:
    """Settings of `PlanConfig` by name."""
    cases = {}
    for k in (2, 4, 8):
        for head in ("full", "completion", "chunked"):
            cases[f"rloo-{head}-k{k}"] = {"rloo_k": k, "lm_head": head}
    for k in (4, 8):
        for head in ("completion", "chunked"):
            cases[f"shared-{head}-k{k}"] = {
                "rloo_k": k,
                "lm_head": head,
                "shared_prefix": True,
                "rows_per_micro_batch": 2,
            }
    cases |= {
        "rloo-bf16": {"dtype": "bfloat16", "lm_head": "completion"},
        "rloo-mb1": {"rows_per_micro_batch": 1, "lm_head": "completion"},
        "rloo-ckpt": {"gradient_checkpointing": True, "lm_head": "completion"},
        "rloo-lora": {"lora_rank": 8, "lm_head": "completion"},
        "rloo-lora-ckpt-bf16": {"lora_rank": 8, "gradient_checkpointing": True, "dtype": "bfloat16"},
        "rloo-no-reference": {"kl_coef": 0.0, "lm_head": "completion"},
        "rloo-padded": {"prompts_per_step": 2, "prompt_tokens_min": 100, "lm_head": "completion"},
        "rloo-eager": {"attention": "eager", "lm_head": "completion"},
        "rloo-rollout2": {"rows_per_rollout": 2, "rloo_k": 8, "lm_head": "chunked"},
        "rloo-foreach": {"optimizer": "adamw_foreach", "lm_head": "chunked"},
        "rloo-for-loop": {"optimizer": "adamw_for_loop", "lm_head": "chunked"},
        "rloo-sgd": {"optimizer": "sgd", "lm_head": "chunked"},
        "rloo-adafactor": {"optimizer": "adafactor", "lm_head": "chunked"},
        "rloo-long-prompt": {"prompt_tokens": 768, "rloo_k": 2, "lm_head": "completion"},
        "rloo-long-response": {"prompt_tokens": 64, "response_tokens": 128, "rloo_k": 4, "lm_head": "chunked"},
        "rloo-cache": {
            "rloo_k": 24,
            "response_tokens": 96,
            "lm_head": "chunked",
            "vocab_size": 2000,
            "rows_per_micro_batch": 1,
        },
        "rloo-float64": {"dtype": "float64", "lm_head": "completion"},
        "rloo-selective": {"selective_checkpointing": True, "lm_head": "chunked", "num_hidden_layers": 6},
        "rloo-ratio-half": {"gradient_checkpointing_ratio": 0.5, "lm_head": "chunked", "num_hidden_layers": 6},
        "rloo-selective-lora-bf16": {"selective_checkpointing": True, "lora_rank": 8, "dtype": "bfloat16"},
        "rloo-1024-prompt": {"prompt_tokens": 1024, "rloo_k": 4, "lm_head": "chunked"},
        "shared-1024-prompt": {"shared_prefix": True, "prompt_tokens": 1024, "rloo_k": 16, "rows_per_micro_batch": 2},
        "shared-selective": {"shared_prefix": True, "selective_checkpointing": True, "rows_per_micro_batch": 2},
        "shared-bf16": {"shared_prefix": True, "dtype": "bfloat16", "lm_head": "chunked"},
        "grpo-shared-ckpt": {"method": "grpo", "shared_prefix": True, "gradient_checkpointing": True},
        "ppo-lora": {"method": "ppo", "prompts_per_step": 4, "lora_rank": 8, "lm_head": "completion"},
        "ppo-bf16-ckpt": {"method": "ppo", "prompts_per_step": 4, "dtype": "bfloat16", "gradient_checkpointing": True},
        "sft-selective": {"method": "sft", "prompts_per_step": 4, "selective_checkpointing": True},
        "sft-sgd": {"method": "sft", "prompts_per_step": 4, "optimizer": "sgd"},
        "sft-foreach": {"method": "sft", "prompts_per_step": 4, "optimizer": "adamw_foreach"},
        "mtp4-chunked": {"method": "mtp", "prompts_per_step": 2, "num_future_tokens": 4, "lm_head": "chunked"},
        "llama-lora-ckpt": {
            "method": "sft",
            "model": "llama-tiny",
            "prompts_per_step": 2,
            "lora_rank": 8,
            "gradient_checkpointing": True,
        },
        "llama-shared": {"model": "llama-tiny", "shared_prefix": True, "rows_per_micro_batch": 2},
        "mt5-tiny-bf16": {"method": "sft", "model": "mt5-tiny", "prompts_per_step": 2, "dtype": "bfloat16"},
        "shared-ckpt": {"shared_prefix": True, "gradient_checkpointing": True, "rows_per_micro_batch": 2},
        "shared-lora": {"shared_prefix": True, "lora_rank": 8, "rows_per_micro_batch": 2},
        "shared-two-prompts": {"shared_prefix": True, "prompts_per_step": 2, "rows_per_micro_batch": 4},
        "grpo-completion": {"method": "grpo", "lm_head": "completion"},
        "grpo-bf16-ckpt": {"method": "grpo", "dtype": "bfloat16", "gradient_checkpointing": True},
        "grpo-chunked-k8": {"method": "grpo", "lm_head": "chunked", "rloo_k": 8},
        "ppo": {"method": "ppo", "prompts_per_step": 4, "lm_head": "completion"},
        "ppo-chunked-mb2": {"method": "ppo", "prompts_per_step": 4, "lm_head": "chunked", "rows_per_micro_batch": 2},
        "sft": {"method": "sft", "prompts_per_step": 4},
        "sft-bf16-long": {"method": "sft", "dtype": "bfloat16", "prompt_tokens": 1024},
        "sft-ckpt": {"method": "sft", "prompts_per_step": 4, "gradient_checkpointing": True},
        "sft-chunked": {"method": "sft", "prompts_per_step": 4, "lm_head": "chunked", "logprob_chunk_tokens": 64},
        "sft-lora": {"method": "sft", "prompts_per_step": 2, "lora_rank": 8},
        "mtp2": {"method": "mtp", "prompts_per_step": 2},
        "mtp4": {"method": "mtp", "prompts_per_step": 2, "num_future_tokens": 4},
        "llama-sft": {"method": "sft", "model": "llama-tiny", "prompts_per_step": 2},
        "llama-rloo": {"model": "llama-tiny", "lm_head": "completion"},
        "t5-small-b2": {"method": "sft", "model": "t5-small", "prompts_per_step": 2, "prompt_tokens": 192},
        "t5-small-b8": {"method": "sft", "model": "t5-small", "prompts_per_step": 8, "prompt_tokens": 96},
        "t5-small-bf16-ckpt": {
            "method": "sft",
            "model": "t5-small",
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
        },
        "mt5-tiny": {"method": "sft", "model": "mt5-tiny", "prompts_per_step": 2},
        "mt5-tiny-adafactor": {"method": "sft", "model": "mt5-tiny", "prompts_per_step": 2, "optimizer": "adafactor"},
    }
    larger = re.compile("(rloo|grpo)-(full|completion|chunked)(-k.)?$")
    return {name: TINY | ({} if larger.match(name) else SMALLER) | settings for name, settings in cases.items()}


SMALL_MODELS = {
    "llama-tiny": {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 704}
    | {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "mt5-tiny": {"model_type": "mt5", "vocab_size": 50_000, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 4}
    | {"num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}


def trainer_cases() -> dict[str, list[str]]:
    """Options of experiments/train.py by name."""
    tiny = ["--vocab_size=8192", "--tokenizer_vocab_size=2048", "--hidden_size=128", "--intermediate_size=256"]
    tiny += ["--num_hidden_layers=3", "--head_dim=32", "--prompt_tokens=192", "--response_tokens=24", "--steps=2"]
    cases = {}
    for variant in ("baseline", "string-level", "upstream", "upstream@1", "shared-prefix"):
        for k in (2, 6):
            cases[f"{variant}-k{k}"] = [f"--variant={variant}", f"--rloo_k={k}"]
        cases[f"{variant}-lora"] = [f"--variant={variant}", "--lora_rank=4"]
    for variant in ("baseline", "upstream", "shared-prefix"):
        cases[f"{variant}-bf16"] = [f"--variant={variant}", "--dtype=bfloat16", "--prompts_per_step=2"]
        cases[f"{variant}-ckpt"] = [
            f"--variant={variant}",
            "--gradient_checkpointing=true",
            "--rows_per_micro_batch=2",
        ]
    for variant in ("baseline", "string-level", "upstream", "shared-prefix"):
        cases[f"{variant}-two-prompts"] = [f"--variant={variant}", "--prompts_per_step=2", "--prompt_tokens_min=100"]
    for name, strategy in (("selective", '{"selective_checkpointing": true}'),) + (
        ("ratio", '{"gradient_checkpointing_ratio": 0.5}'),
    ):
        cases[f"memory-{name}"] = ["--variant=memory", f"--memory={strategy}", "--rows_per_micro_batch=2"]
    cases["shared-prefix-selective"] = ["--variant=shared-prefix", '--memory={"selective_checkpointing": true}']
    for variant in ("upstream", "shared-prefix"):
        cases[f"grpo-{variant}"] = ["GRPO", f"--variant={variant}"]
        cases[f"grpo-{variant}-lora-ckpt"] = [
            *("GRPO", f"--variant={variant}", "--lora_rank=4", "--gradient_checkpointing=true"),
        ]
    cases["grpo-shared-prefix-bf16"] = ["GRPO", "--variant=shared-prefix", "--dtype=bfloat16", "--prompts_per_step=2"]
    cases["string-level-bf16"] = ["--variant=string-level", "--dtype=bfloat16", "--prompts_per_step=2"]
    # "GRPO" first: the same run with GRPOTrainer, which experiments/train.py has no setting for
    return {
        name: [*options[:1], *tiny, *options[1:]] if options[0] == "GRPO" else [*tiny, *options]
        for name, options in cases.items()
    }


def recorded_cases() -> dict[str, dict]:
    """Configs of the recorded runs that ended ok and counted live bytes."""
    cases = {}
    for path in sorted(RECORDED.glob("*/*.json")):
        record = json.loads(path.read_text())
        if record.get("status") == "ok" and (record.get("summary") or {}).get("live_peak_bytes"):
            cases[f"{path.parent.name}/{path.stem}"] = record
    return cases


# --- in the fresh process ---


def measure_step(settings: dict, budget_bytes: int | None) -> dict:
    """Executes the step, allowed to allocate `budget_bytes` more than the process has."""
    import resource

    import torch
    from train import lift_budget

    from lowmem.plan_config import PlanConfig
    from lowmem.plan_step import execute, model_config

    torch.manual_seed(0)
    plan = PlanConfig(**settings)
    config = model_config(plan)
    tiny = {"prompt_tokens": 8, "response_tokens": 3} | ({"prompt_tokens_min": 5} if plan.padded else {})
    small = PlanConfig(**settings | tiny)
    execute(small, model_config(small))  # libraries that are loaded at first use
    before = status_kib("VmRSS") * 1024
    if budget_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (status_kib("VmData") * 1024 + budget_bytes, resource.RLIM_INFINITY))
    try:
        result, status = execute(plan, config), "ok"
    except (RuntimeError, MemoryError) as error:
        lift_budget()
        return {"status": "oom" if "alloc" in str(error) or isinstance(error, MemoryError) else str(error)[:200]}
    lift_budget()
    rss = status_kib("VmHWM") * 1024 - before
    return {
        "status": status,
        "measured_bytes": result.peak_bytes,
        "measured_phase": result.peak_phase,
        "rss_bytes": rss,
        "measured_s": result.wall_s,
    }


def predict_step(settings: dict) -> dict:
    from lowmem.plan_config import PlanConfig
    from lowmem.plan_step import model_config, simulate

    plan = PlanConfig(**settings)
    config = model_config(plan)
    result = simulate(plan, config)
    text = config.get_text_config(decoder=True)
    rule, accelerate = rules_of_thumb(
        result.parameters,
        {"float32": 4, "float64": 8}.get(plan.dtype, 2),
        plan.micro_batch_rows,
        plan.prompt_tokens + plan.response_tokens,
        text.hidden_size,
        plan.needs_reference and not plan.lora_rank,
    )
    return {
        "predicted_bytes": result.peak_bytes,
        "needed_bytes": result.needed_bytes,
        "predicted_phase": result.peak_phase,
        "predicted_s": result.wall_s,
        "rule_bytes": rule,
        "accelerate_bytes": accelerate,
    }


def rules_of_thumb(parameters, width, rows, tokens, hidden, reference) -> tuple[int, int]:
    """The guideline's formula (weights x (1 + 1.5 + 1) + batch x sequence x hidden x 4, a reference model added), and
    what `accelerate estimate-memory` says for training with Adam: four times the weights in float32, and in half
    precision twice the float32 weights."""
    model = parameters * width
    rule = int(model * 3.5 + rows * tokens * hidden * 4 + (model if reference else 0))
    return rule, parameters * 4 * (4 if width >= 4 else 2)


# --- the loop ---


def in_forked_process(function, *arguments) -> dict:
    """Runs in a process of its own that has the libraries of this one, so that a limit and a peak are its own."""
    import lowmem.plan_step  # noqa: F401  (imported once, here)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call():
        sender.send(function(*arguments))

    process = context.Process(target=call)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} of {arguments} ended with {process.exitcode}") from None
    finally:
        process.join()


def in_fresh_process(function: str, *arguments) -> dict:
    code = f"import sys, json; sys.path[:0] = {[str(HERE), str(ROOT)]!r}; import validate_planner as v; "
    code += f"print('\\nRESULT' + json.dumps(v.{function}(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    env = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=480)
    line = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    if not line:
        raise RuntimeError(f"{function}{arguments} ended with {result.returncode}: {result.stderr.strip()[-400:]}")
    return json.loads(line[0].removeprefix("RESULT"))


def with_grpo(options: list[str]) -> list[str]:
    """The options that train.py takes; after a leading "GRPO" this process builds GRPOTrainer where it built
    RLOOTrainer."""
    if options[0] != "GRPO":
        return options
    import functools

    import trainers

    trainers.build_v116 = functools.partial(trainers.build_v116, algorithm="GRPO")
    return options[1:]


def predict_trainer(options: list[str]) -> dict:
    from plan_trainer import plan_trainer
    from train import parse_config

    config, stage = parse_config(with_grpo(options))
    figures = plan_trainer(config, stage)
    parameters = figures["parameters"]
    width = {"float32": 4, "float64": 8, "bfloat16": 2}[config.dtype]
    rows = config.rows_per_micro_batch or config.rows_per_step
    tokens = config.prompt_tokens + config.response_tokens
    rule, accelerate = rules_of_thumb(parameters, width, rows, tokens, config.hidden_size, not config.lora_rank)
    return {
        "predicted_bytes": figures["live_peak_bytes"],
        "predicted_phase": figures["live_peak_phase"],
        "predicted_s": figures["wall_s"],
        "rule_bytes": rule,
        "accelerate_bytes": accelerate,
    }


def run_trainer(options: list[str], budget_bytes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        budget_gib = (budget_bytes + PROCESS_BYTES) / 2**30
        code = f"import sys; sys.path[:0] = {[str(HERE), str(ROOT)]!r}; import train, validate_planner as v; "
        code += "sys.exit(train.main(v.with_grpo(sys.argv[1:])))"
        command = [sys.executable, "-c", code, *options, f"--record={path}", f"--budget_gib={budget_gib:.4f}"]
        env = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=480)
        if not path.exists():
            raise RuntimeError(f"{' '.join(options)} left no record: {result.stderr.strip()[-400:]}")
        record = json.loads(path.read_text())
    summary = record["summary"]
    return {
        "status": record["status"] if record["status"] in ("ok", "oom") else record["error"],
        "measured_bytes": summary["live_peak_bytes"],
        "measured_phase": summary["live_peak_phase"],
        "rss_bytes": summary["rss_peak_bytes"] - summary["rss_start_bytes"],
        "measured_s": record["wall_s"],
    }


def predict_case(kind: str, settings) -> dict:
    if kind == "step":
        return in_forked_process(predict_step, settings)
    return in_fresh_process("predict_trainer", settings if kind == "trainer" else recorded_options(settings))


def recorded_options(record: dict) -> list[str]:
    config = {key: value for key, value in record["config"].items() if value is not None and key != "record"}
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in config.items()]


def run_case(name: str, kind: str, settings, known: dict | None = None) -> dict:
    """The row of a configuration: predicted, executed and compared; `known` itself if its prediction stands."""
    from lowmem.plan_verdict import CPU, device_needed

    row = dict.fromkeys(COLUMNS) | {"name": name, "kind": kind}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "step" and settings.get("model") in SMALL_MODELS:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(SMALL_MODELS[settings["model"]]))
            settings = settings | {"model": str(path)}
        row |= predict_case(kind, settings)
        if kind != "recorded":
            row["budget_bytes"] = device_needed(row.pop("needed_bytes", row["predicted_bytes"]), CPU)
        if known and all(known[key] == row[key] for key in ("predicted_bytes", "predicted_phase", "budget_bytes")):
            return known | {"predicted_s": row["predicted_s"]}
        if kind == "step":
            row |= in_forked_process(measure_step, settings, row["budget_bytes"])
            if row["status"] == "oom":
                row |= in_forked_process(measure_step, settings, None) | {"status": "oom"}
        elif kind == "trainer":
            row |= run_trainer(settings, row["budget_bytes"])
        else:
            summary = settings["summary"]
            row |= {
                "status": "ok",
                "measured_bytes": summary["live_peak_bytes"],
                "measured_phase": summary["live_peak_phase"],
                "measured_s": settings["wall_s"],
            }
    if row["measured_bytes"]:
        row["error"] = row["predicted_bytes"] / row["measured_bytes"] - 1
    return row


def write(row: dict | None = None) -> list[dict]:
    """Adds a row to what is on disk, where another process may have added its own; returns all rows."""
    file = RESULTS / "validation.json"
    known = {(old["kind"], old["name"]): old for old in (json.loads(file.read_text()) if file.exists() else [])}
    if row is not None:
        known[row["kind"], row["name"]] = row
    rows = [known[key] for key in sorted(known)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / "validation.json", json.dumps(rows, indent=1) + "\n")
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    write_atomically(RESULTS / "validation.csv", text.getvalue())
    return rows


def summary_line(rows: list[dict]) -> str:
    """Median and worst error, and the wrong verdicts."""
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    wrong = [row["name"] for row in rows if row["status"] == "oom"]
    rule = [abs(row["rule_bytes"] / row["measured_bytes"] - 1) for row in rows if row["measured_bytes"]]
    other = [abs(row["accelerate_bytes"] / row["measured_bytes"] - 1) for row in rows if row["measured_bytes"]]
    return (
        f"{len(errors)} configurations: median error {statistics.median(errors):.4%}, worst {max(errors):.3%}; "
        f"wrong 'fits': {len(wrong)} {wrong or ''}; rule of thumb: mean {statistics.mean(rule):.0%}, worst "
        f"{max(rule):.0%}; accelerate: mean {statistics.mean(other):.0%}, worst {max(other):.0%}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("step", "trainer", "recorded"), help="one kind of configuration")
    parser.add_argument("--match", help="a regular expression on names")
    parser.add_argument("--changed", action="store_true", help="predict known rows again; execute what changed")
    parser.add_argument("--hours", type=float, default=1e9, help="begin nothing later than this")
    args = parser.parse_args(argv)
    file = RESULTS / "validation.json"
    rows = {(row["kind"], row["name"]): row for row in json.loads(file.read_text())} if file.exists() else {}
    failed, start = 0, time.monotonic()
    cases = {"trainer": trainer_cases(), "step": step_cases(), "recorded": recorded_cases()}
    for kind in cases:
        for name, settings in cases[kind].items():
            wanted = args.only in (None, kind) and (args.match is None or re.search(args.match, name))
            known = rows.get((kind, name))
            if not wanted or (known is not None) != args.changed or time.monotonic() - start > 3600 * args.hours:
                continue
            try:
                rows[kind, name] = run_case(name, kind, settings, known)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"{kind} {name}: failed: {str(error)[-500:]}", file=sys.stderr, flush=True)
                continue
            row = rows[kind, name]
            error = "-" if row["error"] is None else f"{row['error']:+.3%}"
            again = "" if known is None else ", as before" if row["error"] == known["error"] else ", anew"
            print(f"{kind} {name}: {error} of {row['measured_bytes']} bytes, {row['status']}{again}", flush=True)
            write(row)
    if all_rows := write():
        print(summary_line(all_rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
