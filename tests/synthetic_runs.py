"""Synthetic sets of runs: records and timelines as docs/measuring.md states them, with numbers known beforehand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

GIB = 2**30
VARIANTS = ("baseline", "upstream", "string-level", "shared-prefix")
PHASES = ("generate", "score", "train_forward", "train_backward", "optimizer")


def synthetic_record(run: str, k: int, live_gib: float | None, **changes) -> dict:
    """A complete record as docs/measuring.md states it. `changes` reach into it: `summary__rss_peak_bytes=None`."""
    live = None if live_gib is None else round(live_gib * GIB)
    prompt = changes.pop("prompt", 512)
    record = {
        "schema": 1,
        "run": run,
        "status": "ok",
        "error": None,
        "command": ["python", "experiments/train.py", "--rloo_k", str(k)],
        "config": {
            "model": None,
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "vocab_size": 151_936,
            "rloo_k": k,
            "prompts_per_step": 1,
            "rows_per_micro_batch": None,
            "steps": 4,
            "budget_gib": 6.0,
            "count_live_bytes": True,
        },
        "env": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "device": "cpu",
            "cpu": "synthetic",
            "tree": {"pin": "v0.20.0", "stage": "0", "commit": "c" * 40, "series_sha256": "s" * 64},
            "repo_commit": "0123456789abcdef0123",
            "repo_dirty": False,
        },
        "seed": 0,
        "started_at": "2025-11-21T10:00:00+00:00",
        "wall_s": 60.0,
        "tokens": {
            "prompt_tokens_per_row": [prompt] * k,
            "completion_tokens_per_row": [53] * k,
            "rows_per_step": k,
            "prompts_changed": 0,
            "expected_prompt_tokens_per_row": [prompt] * k,
        },
        "summary": {
            "live_peak_bytes": live,
            "live_peak_phase": "train_backward",
            "live_peak_bytes_by_phase": {name: live and live // (5 - i) for i, name in enumerate(PHASES)},
            "rss_peak_bytes": live and live + GIB // 2,
            "rss_start_bytes": GIB // 3,
            "cuda_peak_allocated_bytes": None,
            "cuda_peak_reserved_bytes": None,
            "nvml_peak_bytes": None,
            "step_time_s": [9.0, 1.1 * k, 0.9 * k, 1.0 * k],
            "step_time_median_s": 1.0 * k,
            "phase_time_s": dict.fromkeys(PHASES, 2.5),
            "metrics": [{"objective/scores": 0.1 * step} for step in range(4)],
        },
        "monitor": {"interval_s": 0.2, "samples": 300, "cpu_fraction": 0.01, "exit_code": 0, "signal": None},
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = record
        for key in path:
            place = place[key]
        place[last] = value
    return record


def write_record(runs_dir: Path, workload: str, variant: str, k: int, live_gib: float | None, **changes) -> Path:
    seed = changes.get("seed")
    name = f"{variant}_k{k}" + ("" if seed is None else f"_seed{seed}")
    path = runs_dir / workload / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(synthetic_record(f"{workload}/{name}", k, live_gib, **changes)))
    return path


def write_oom(runs_dir: Path, workload: str, variant: str, k: int, **changes) -> Path:
    failed = {"status": "oom", "error": "out of memory in train_backward", "summary__step_time_median_s": None}
    failed |= {"summary__step_time_s": [], "summary__metrics": [], "summary__rss_peak_bytes": round(5.97 * GIB)}
    return write_record(runs_dir, workload, variant, k, 5.3, **(failed | changes))


def write_one_row(runs_dir: Path, workload: str, variant: str, k: int, live_gib: float, **changes) -> Path:
    """A run of the variant with one row per micro-batch."""
    return write_record(runs_dir, workload, f"{variant}-mb1", k, live_gib, config__rows_per_micro_batch=1, **changes)


def write_timeline(record_path: Path, peak_gib: float, seconds: int = 40, steps: int = 3) -> pd.DataFrame:
    """Samples that rise through the phases of each step, the largest of them at 98 % of `peak_gib`."""
    samples = seconds * 10
    t = np.arange(samples) / 10
    inside = np.clip((t - 6) / (seconds - 7), 0, 0.9999) * steps
    share = inside % 1
    heights = np.array([0.35, 0.5, 0.75, 1.0, 0.45])
    number = np.minimum((share * 5).astype(int), 4)
    rng = np.random.default_rng(0)
    rss = 0.3 + (peak_gib - 0.3) * heights[number] * (0.93 + 0.05 * rng.random(samples))
    started = t >= 6
    rss = np.where(started, rss, 0.3 * t / 6 + 0.02)
    rss[int(np.argmax(rss))] = 0.98 * peak_gib
    frame = pd.DataFrame({"t_s": t, "rss_bytes": (rss * GIB).astype(int), "nvml_used_bytes": None})
    frame["gpu_utilization_percent"] = frame["power_w"] = None
    frame["phase"] = np.where(started, np.array(PHASES)[number], "")
    frame["step"] = np.where(started, inside.astype(int) + 1, 0)
    frame.to_csv(record_path.with_name(f"{record_path.stem}.timeline.csv"), index=False)
    return frame


def live_gib(variant: str, k: int) -> float:
    return {"baseline": 0.9 * k, "upstream": 0.3 + 0.42 * k, "string-level": 0.3 + 0.13 * k, "shared-prefix": 0.5}[
        variant
    ] + 0.05


def write_full_set(runs_dir: Path, ks: tuple[int, ...] = (2, 4, 8)) -> Path:
    """Every workload and variant. A run that needs more than its budget of 6 GiB is out of memory.

    On `cpu` that is the baseline at k=8, on `published` the baseline from k=4 and upstream at k=8.
    """
    for k in ks:
        for variant in ("baseline", "upstream"):
            write_one_row(runs_dir, "published", variant, k, 2.2 * live_gib(variant, 1))
    write_record(runs_dir, "published_flat", "string-level", 2, 1.0)
    write_record(runs_dir, "published_flat", "string-level", 8, 1.1)
    for workload, scale in (("cpu", 1.0), ("published", 2.2)):
        for k in ks:
            for variant in VARIANTS:
                live = scale * live_gib(variant, k)
                if live > 6:
                    write_timeline(write_oom(runs_dir, workload, variant, k), 5.9, seconds=16, steps=1)
                else:
                    rss = round((live + 0.45) * GIB)
                    seconds = k ** (1 - 0.2 * VARIANTS.index(variant)) / scale
                    times = {"summary__step_time_s": [9.0, 1.1 * seconds, seconds, 0.95 * seconds]}
                    times |= {"summary__step_time_median_s": seconds, "summary__rss_peak_bytes": rss}
                    path = write_record(runs_dir, workload, variant, k, live, **times)
                    write_timeline(path, live + 0.45, seconds=30 + 4 * k)
    names = ["string repetition", "no stacked generation scores", "completion-only logits, no in-place division"]
    names += ["log-probabilities in chunks", "entropy without a full softmax", "hidden states of the last layer only"]
    lives = [3.65 - 16 / 2**20, 3.1, 1.6, 0.9, 0.88, 0.82]
    for stage, (name, live) in enumerate(zip(names, lives, strict=True), start=1):
        for k in (2, 4):
            write_record(runs_dir, "cpu", f"string-level@{stage}", k, live * k / 4, env__tree__stage_name=name)
    for k, live in ((2, 2.6), (4, 5.1)):
        write_record(runs_dir, "origin", "baseline", k, live, prompt=3096)
        write_record(runs_dir, "origin", "string-level@1", k, live, prompt=3096)
        cut = {"status": "error", "error": "prompts were changed", "tokens__prompts_changed": k}
        cut |= {"tokens__expected_prompt_tokens_per_row": [3096] * k, "prompt": 1024}
        write_record(runs_dir, "origin", "as-published", k, 0.42 * live, **cut)
    write_oom(runs_dir, "origin", "baseline", 8, prompt=3096)
    write_oom(runs_dir, "origin", "string-level@1", 8, prompt=3096)
    cut |= {"tokens__prompts_changed": 8, "tokens__expected_prompt_tokens_per_row": [3096] * 8}
    write_record(runs_dir, "origin", "as-published", 8, 4.3, **cut)
    rng = np.random.default_rng(1)
    for seed in range(4):
        rewards = 0.28 + 0.1 * (1 - np.exp(-np.arange(40) / 15)) + 0.01 * rng.standard_normal(40)
        metrics = [{"objective/scores": value} for value in rewards.tolist()] + [{"train_runtime": 9.0}]
        for variant in ("baseline", "string-level"):
            write_record(runs_dir, "learning", variant, 4, 0.4, seed=seed, summary__metrics=metrics)
    return runs_dir


RATIOS = ("ratio_min", "ratio_median", "ratio_max")


def write_shared_prefix_measurements(runs_dir: Path) -> None:
    """training_peaks.csv and time_pairs.json, the latter with a comparison that is not the shared prefix's."""
    rows = ["workload,prompt_tokens,completion_tokens,k,gradient_checkpointing,way,peak_live_bytes,flops"]
    for way, per_row, fixed in (("all rows", 1.0, 0.0), ("row by row", 0.0, 1.6), ("shared", 0.0, 1.5)):
        for checkpointing in (False, True):
            for k in (2, 8):
                peak = int((fixed + per_row * k) * GIB / (1 + checkpointing))
                flops = 1000 + 100 * k if way == "shared" else 1100 * k
                rows.append(f"layers_3072_53,3072,53,{k},{checkpointing},{way},{peak},{flops}")
    (runs_dir / "training_peaks.csv").write_text("\n".join(rows) + "\n")
    theirs = {"generate": 10.0, "score": 8.0, "train_forward": 6.0, "train_backward": 4.0}
    ours = {"generate": 2.0, "score": 1.0, "train_forward": 0.4, "train_backward": 0.6}
    entry = {
        "pairs_s": [[100.0, 10.0], [100.0, 20.0]],
        "phase_pairs_s": [[theirs, ours]] * 2,
        "ratio_min": 0.1,
        "ratio_median": 0.15,
        "ratio_max": 0.2,
        "tokens_per_row": [3072, 53],
        "completion_tokens": [424, 400],
        "machine": "one CPU",
        "allocator": "glibc.malloc.hugetlb=1",
        "env": {},
    }
    older = {"pairs_s": [[4.4, 2.6]], "ratio_median": 0.59}  # made before phases were kept
    name = "layers_3072_53/shared-prefix_vs_upstream@1_k8"
    one_pair = {"pairs_s": [[100.0, 50.0]], "phase_pairs_s": [[theirs, ours]]} | dict.fromkeys(RATIOS, 0.5)
    all_at_once = f"{name}/steps/2/rows_per_forward/8/one CPU"
    entries = {name: entry, f"{name}/steps/1": entry | one_pair, all_at_once: entry | one_pair}
    failed = {"pairs_s": [], "phase_pairs_s": [], "machine": "one CPU", "out_of_memory": {"budget_gib": 16}}
    entries |= {"cpu/string-level_vs_baseline_k4": older, f"{name.removesuffix('8')}64/steps/1/one CPU": failed}
    (runs_dir / "time_pairs.json").write_text(json.dumps(entries))
