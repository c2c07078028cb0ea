"""What the shared prefix saves, as a table: training peaks over k and paired step times beside the token ratio.

Reads two files of a set of runs: `training_peaks.csv` (experiments/training_peaks.py) and the pairs of the variant
shared-prefix in `time_pairs.json` (experiments/compare_time.py).
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from visualization.combine_memory_data import GIB, write_atomically, write_csv
from visualization.results_table import markdown_rows
from visualization.style import three_digits

VARIANT = "shared-prefix"
TRAIN_PHASES = ("train_forward", "train_backward")
PEAK_KEY = ["workload", "k", "gradient_checkpointing"]
ALL_ROWS = ("upstream", "upstream@1")
BUDGET_GIB = 16
NOTES = r"""
- Peaks: live tensor bytes of one training forward and backward of one prompt with k completions, weights and
  gradients included (experiments/training_peaks.py, fake tensors; the same chunked LM head in all ways, on the rows
  of the completions). Growth: peak(k = 64) / peak(k = 2).
- Times: whole optimizer steps of the two trainers in turn, each in a fresh process, without the meter
  (experiments/compare_time.py); how many times less time the shared prefix takes, over all pairs. Threads: of each
  process. Token ratio:
  k (P + R) / (P + k R), what computing every prompt token once can save at most where time goes by tokens; of the
  ratio: how near the step comes. Work ratio: floating-point operations of the rows' training over those of the shared
  prefix's, counted with the peaks, the limit of the training's gain where time goes by operations. A completion has an
  LM head of its own and meets the whole prompt in attention, where a CPU's kernel skips what is causal and not what a
  mask hides. (Above the token ratio: in the last layer the prompt's backward is that of its keys and values only.)
- Ours holds one branch at once (`per_device_train_batch_size=1`), which has the smallest peak; `k branches`: all of
  them, as TRL with all rows does, and string-level beside it k rows. Branches: how many. Work ratio: with one.
- over 16 GiB: the training peak of all rows at once, counted as above. Out of memory: the step, or one of fewer
  completions, was tried within 16 GiB; an allocator that keeps what is freed has holes and holds more than is live.
  \*, keeps memory "no": with glibc's own settings, which map every large tensor anew (docs/measuring.md): all rows pay
  for that and ours hardly do, so a figure above the token ratio says more of the allocator. `upstream` is TRL v1.16.0
  as released, whose LM head scores prompts too on a CPU, besides all that `upstream@1` does.
- `upstream@1` is TRL v1.16.0 with its LM head on the completions' rows, `-mb1` one row per micro-batch: the same
  tokens as ours. `string-level` (v0.20.0) samples every completion to its full length, where v1.16.0 ends it at an
  end-of-sequence token; where that made a difference, its completions' tokens over ours stand behind the name. They
  are scored and trained, so part of the gain is theirs.
"""


def read_training_peaks(runs_dir: Path) -> pd.DataFrame:
    """One row per workload, k, checkpointing and way; empty where the file is not there."""
    path = runs_dir / "training_peaks.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def token_ratio(prompt_tokens: int, completion_tokens: int, k: int) -> float:
    """k (P + R) / (P + k R)."""
    return k * (prompt_tokens + completion_tokens) / (prompt_tokens + k * completion_tokens)


def work_ratios(peaks: pd.DataFrame) -> dict[tuple[str, int, bool], float]:
    """Operations of k rows over those of the shared prefix in training, by (workload, k, checkpointing)."""
    by_way = peaks.pivot_table(values="flops", index=PEAK_KEY, columns="way")
    return (by_way["row by row"] / by_way["shared"]).to_dict()


def read_comparisons(runs_dir: Path) -> Iterator[tuple[dict, dict]]:
    """What every comparison with the shared prefix is of, and its entry in time_pairs.json."""
    path = runs_dir / "time_pairs.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, entry in entries.items():
        workload, comparison, *options = key.split("/")
        ours, _, rest = comparison.partition("_vs_")
        peer, _, k = rest.rpartition("_k")
        if ours != VARIANT:
            continue
        values = dict(zip(options, options[1:], strict=False))  # of each option the word behind it
        setting = {
            "workload": workload,
            "peer": peer,
            "k": int(k),
            "checkpointing": "gradient_checkpointing" in options,
            "branches": int(values.get("rows_per_forward", 1)),
        }
        yield setting, entry


def read_out_of_memory(runs_dir: Path) -> pd.DataFrame:
    """Workload, peer, k, checkpointing and branches of the comparisons whose peer was out of memory."""
    columns = ["workload", "peer", "k", "checkpointing", "branches"]
    found = [setting for setting, entry in read_comparisons(runs_dir) if "out_of_memory" in entry]
    return pd.DataFrame(found, columns=columns)


def read_time_ratios(runs_dir: Path) -> pd.DataFrame:
    """One row per comparison with the shared prefix: how many times less time, whole step and by phase.

    Columns: workload, peer, k, checkpointing, branches (that ours held at once), prompt_tokens, completion_tokens,
    tokens_of_peer (its completions' over ours; NaN where not recorded), token_ratio, work_ratio (of the training; NaN
    without its training peak), pairs, threads, machine, keeps_memory (the allocator), step, step_min, step_max,
    generate, score, train. Empty where there are none.
    """
    peaks = read_training_peaks(runs_dir)
    works = work_ratios(peaks) if "flops" in peaks else {}
    rows = []
    for setting, entry in read_comparisons(runs_dir):
        if not entry["pairs_s"]:
            continue
        k, (prompt_tokens, completion_tokens) = setting["k"], entry["tokens_per_row"]
        sampled = entry.get("completion_tokens", (math.nan, math.nan))
        phases = {}
        for name, parts in (("generate", ("generate",)), ("score", ("score",)), ("train", TRAIN_PHASES)):
            sums = [[sum(run[part] for part in parts) for run in pair] for pair in entry["phase_pairs_s"]]
            phases[name] = statistics.median(theirs / ours for theirs, ours in sums)
        rows.append(
            {
                **setting,
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "tokens_of_peer": sampled[0] / sampled[1],
                "token_ratio": token_ratio(prompt_tokens, completion_tokens, k),
                "work_ratio": works.get((setting["workload"], k, setting["checkpointing"]), math.nan),
                "pairs": len(entry["pairs_s"]),
                "threads": entry["env"].get("num_threads"),
                "machine": entry["machine"],
                "keeps_memory": entry.get("allocator") is not None,
                "step": 1 / entry["ratio_median"],
                "step_min": 1 / entry["ratio_max"],
                "step_max": 1 / entry["ratio_min"],
                **phases,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["workload", "machine", "checkpointing", "peer", "k", "branches"]) if rows else frame


def preferred(times: pd.DataFrame) -> pd.DataFrame:
    """Of comparisons alike the one whose allocator keeps memory, and of those the one with most pairs."""
    alike = ["workload", "checkpointing", "peer", "branches", "k", "machine"]
    return times.sort_values(["keeps_memory", "pairs"], kind="stable").drop_duplicates(alike, keep="last")


def peaks_markdown(peaks: pd.DataFrame) -> str:
    """One row per workload, checkpointing and way, a column per k, in GiB."""
    ks = sorted(peaks["k"].unique())
    header = ["workload", "tokens", "checkpointing", "way", *(f"k = {k}" for k in ks), "growth"]
    rows = []
    for (workload, checkpointing), part in peaks.groupby(["workload", "gradient_checkpointing"], sort=False):
        tokens = f"{part['prompt_tokens'].iloc[0]:,} + {part['completion_tokens'].iloc[0]:,}"
        for way, mine in part.groupby("way", sort=False):
            by_k = mine.set_index("k")["peak_live_bytes"]
            cells = [three_digits(by_k[k] / GIB) for k in ks]
            growth = f"{by_k[ks[-1]] / by_k[ks[0]]:.3f}"
            rows.append([workload, tokens, "on" if checkpointing else "off", way, *cells, growth])
    return markdown_rows(header, rows)


def label_of(row: pd.Series | dict) -> str:
    """The peer, and how many branches ours held at once if more than one."""
    if row["branches"] == 1:
        return row["peer"]
    return f"{row['peer']}, {'k' if row['branches'] == row['k'] else row['branches']} branches"


def steps_markdown(times: pd.DataFrame, peaks: pd.DataFrame, failed: pd.DataFrame) -> str:
    """Times less time a step: a row per workload, checkpointing, peer and branches below their token ratio, by k.

    A figure carries the letter of its machine, and a star without an allocator that keeps memory. What was not
    measured is `out of memory` where it `failed` so, itself or with fewer completions, and all rows at once are `over
    16 GiB` where their training is.
    """
    ks = sorted(times["k"].unique())
    letters = {machine: chr(ord("a") + i) for i, machine in enumerate(sorted(times["machine"].unique()))}
    all_rows = peaks[peaks["way"] == "all rows"] if "way" in peaks else pd.DataFrame(columns=PEAK_KEY)
    peak_gib = (all_rows.set_index(PEAK_KEY)["peak_live_bytes"] / GIB).to_dict() if len(all_rows) else {}
    failed = failed.assign(label=[label_of(row) for row in failed.to_dict("records")])
    failed_ks = failed.groupby(["workload", "checkpointing", "label"])["k"].apply(set).to_dict()
    rows = []
    for (workload, checkpointing), part in preferred(times).groupby(["workload", "checkpointing"]):
        prompt_tokens, completion_tokens = part[["prompt_tokens", "completion_tokens"]].iloc[0]
        setting = [workload, f"{prompt_tokens:,} + {completion_tokens:,}", "on" if checkpointing else "off"]
        ratios = (token_ratio(prompt_tokens, completion_tokens, k) for k in ks)
        rows.append([*setting, "token ratio", *(f"{ratio:.2f}" for ratio in ratios)])
        part = part.assign(label=part.apply(label_of, axis=1))
        for label, mine in part.groupby("label"):
            cells = []
            tried = failed_ks.get((workload, checkpointing, label), set())
            for k in ks:
                figures = mine[mine["k"] == k].sort_values("machine").itertuples()
                shown = ", ".join(
                    f"{row.step:.2f} {letters[row.machine]}" + ("" if row.keeps_memory else "\\*") for row in figures
                )
                too_large = label in ALL_ROWS and peak_gib.get((workload, k, checkpointing), 0) > BUDGET_GIB
                if k in tried or (not too_large and k > min(tried, default=k)):
                    missing = "out of memory"
                else:
                    missing = f"over {BUDGET_GIB} GiB" if too_large else "–"
                cells.append(shown or missing)
            rows.append([*setting, label, *cells])
    header = ["workload", "tokens", "checkpointing", "against", *(f"k = {k}" for k in ks)]
    machines = "; ".join(f"{letter}: {machine}" for machine, letter in letters.items())
    return f"{machines}; \\*: page faults in it, see below; –: not measured.\n\n{markdown_rows(header, rows)}"


def times_markdown(times: pd.DataFrame) -> str:
    header = ["workload", "tokens", "k", "branches", "machine", "checkpointing", "against", "pairs", "threads"]
    header += ["keeps memory", "token ratio", "step", "of the ratio", "generation", "scoring", "training"]
    header += ["work ratio"]
    rows = []
    for row in times.itertuples():
        span = f" ({row.step_min:.2f} to {row.step_max:.2f})" if row.pairs > 1 else ""
        cells = [row.workload, f"{row.prompt_tokens:,} + {row.completion_tokens:,}", str(row.k), str(row.branches)]
        cells += [row.machine]
        longer = f" ({row.tokens_of_peer:.2f} x tokens)" if row.tokens_of_peer > 1 else ""
        cells += ["on" if row.checkpointing else "off", row.peer + longer, str(row.pairs)]
        cells += ["all" if pd.isna(row.threads) else f"{row.threads:.0f}", "yes" if row.keeps_memory else "no"]
        cells += [f"{row.token_ratio:.2f}"]
        cells += [f"{row.step:.2f}{span}", f"{row.step / row.token_ratio:.0%}"]
        cells += [f"{value:.2f}" for value in (row.generate, row.score, row.train)]
        cells += ["–" if math.isnan(row.work_ratio) else f"{row.work_ratio:.2f}"]
        rows.append(cells)
    return markdown_rows(header, rows)


def write_shared_prefix_table(peaks: pd.DataFrame, times: pd.DataFrame, failed: pd.DataFrame, out: Path) -> None:
    """Writes shared_prefix.md, and shared_prefix_times.csv beside it."""
    parts = ["# Shared prefix\n"]
    if not peaks.empty:
        parts += ["## Training peak, GiB\n", peaks_markdown(peaks)]
    if not times.empty:
        parts += ["## How many times less time a step takes\n", steps_markdown(times, peaks, failed)]
        parts += ["## The same by phase\n", times_markdown(times)]
        write_csv(times, out / "shared_prefix_times.csv")
    text = "\n".join(parts) + NOTES
    write_atomically(out / "shared_prefix.md", lambda target: target.write_text(text, encoding="utf-8"))
