"""The records of one set of runs as tidy tables: runs.csv, phases.csv, metrics.csv.

Reads every `<workload>/<variant>_k<k>.json` (learning curves: `<variant>_k<k>_seed<s>.json`) as docs/measuring.md
describes them. What was not measured stays an empty cell, never 0. A file that cannot be trusted (half written, of
another schema, without a required key, named unlike its content) stops the command instead of being skipped.

    python visualization/combine_memory_data.py --runs results/runs/local --out results/local
"""

import argparse
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd

SCHEMA = 1
GIB = 2**30
STATUSES = ("ok", "oom", "error", "timeout", "killed")
RUN_NAME = re.compile(r"(?P<variant>[A-Za-z][A-Za-z0-9.@-]*)_k(?P<k>\d+)(?:_seed(?P<seed>\d+))?")
REQUIRED = {
    "": ("schema", "run", "status", "error", "command", "config", "env", "seed", "started_at", "tokens", "summary"),
    "config": (
        *("model", "num_hidden_layers", "hidden_size", "vocab_size", "steps", "budget_gib", "count_live_bytes"),
        *("prompts_per_step", "rows_per_micro_batch"),
    ),
    "env": ("tree", "repo_commit", "repo_dirty", "device"),
    "env.tree": ("series_sha256",),
    "tokens": (
        *("prompt_tokens_per_row", "completion_tokens_per_row", "rows_per_step"),
        *("prompts_changed", "expected_prompt_tokens_per_row"),
    ),
    "summary": (
        *("live_peak_bytes", "live_peak_phase", "live_peak_bytes_by_phase", "rss_peak_bytes", "rss_start_bytes"),
        *("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes", "nvml_peak_bytes"),
        *("step_time_s", "step_time_median_s", "phase_time_s", "metrics"),
    ),
}
TEXTS = (  # columns that hold no number; every other one is whole, but for FLOATS
    *("workload", "variant", "run", "status", "error", "live_peak_phase", "model", "device", "commit"),
    *("series_sha256", "started_at", "phase", "metric"),
)
FLOATS = ("step_time_median_s", "phase_time_s", "value")
FROM_SUMMARY = (
    *("live_peak_bytes", "live_peak_phase", "rss_peak_bytes", "rss_start_bytes", "cuda_peak_allocated_bytes"),
    *("cuda_peak_reserved_bytes", "nvml_peak_bytes", "step_time_median_s"),
)


class RecordError(ValueError):
    """A record that cannot be used; the message names the file and the command that makes it anew."""


def make_command(runs_dir: Path, run: str) -> str:
    """The shell command that makes the run `<workload>/<variant>_k<k>` of this set."""
    workload, _, stem = run.partition("/")
    name = RUN_NAME.fullmatch(stem)
    command = ["python", "experiments/run_matrix.py", "--workload", workload, "--runs", str(runs_dir)]
    command += ["--variants", name["variant"], "--k", name["k"]]
    return shlex.join(command + (["--seeds", name["seed"]] if name["seed"] else []))


def timeline_path(path: Path) -> Path:
    """The samples beside the record `path`."""
    return path.with_name(f"{path.stem}.timeline.csv")


def lookup(record: dict, dotted: str):
    """`record["a"]["b"]` for "a.b"; None when "a" is null."""
    value = record
    for key in dotted.split("."):
        if value is None:
            return None
        value = value[key]
    return value


def read_record(path: Path) -> dict:
    """One record, checked, with `workload`, `variant`, `k` and `path` from its place beside what the run wrote."""
    run = f"{path.parent.name}/{path.stem}"
    again = f"make it again: {make_command(path.parent.parent, run)} --force"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not valid JSON ({error}), perhaps half written; {again}") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path}: not a record but a {type(record).__name__}; {again}")
    if record.get("command"):
        again += f" (it came from: {shlex.join(record['command'])})"
    if record.get("schema") != SCHEMA:
        raise RecordError(f"{path}: schema {record.get('schema')!r}, this reads schema {SCHEMA}; {again}")
    for section, keys in REQUIRED.items():
        content = lookup(record, section) if section else record
        if content is None and section and record["status"] != "ok":
            continue  # it ended before it could say
        for key in keys:
            if not isinstance(content, dict) or key not in content:
                raise RecordError(f"{path}: required key {f'{section}.{key}'.lstrip('.')!r} is missing; {again}")
    if record["status"] not in STATUSES:
        raise RecordError(f"{path}: status {record['status']!r} is none of {', '.join(STATUSES)}; {again}")
    if record["run"] != run:
        raise RecordError(f"{path}: holds the run {record['run']!r}; rename the file, or {again}")
    name = RUN_NAME.fullmatch(path.stem)
    if name["seed"] is not None and record["seed"] not in (None, int(name["seed"])):
        raise RecordError(f"{path}: holds seed {record['seed']}; rename the file, or {again}")
    seed = record["seed"] if name["seed"] is None else int(name["seed"])
    place = {"workload": path.parent.name, "variant": name["variant"], "k": int(name["k"]), "seed": seed, "path": path}
    return record | place


def load_records(runs_dir: str | Path) -> list[dict]:
    """Every record of the set, ordered by workload, variant and k."""
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise RecordError(f"{runs_dir}: no such set of runs; make it with {make_command(runs_dir, 'cpu/baseline_k2')}")
    records = []
    for path in sorted(runs_dir.glob("*/*.json")):
        if path.name.startswith("."):
            continue
        if RUN_NAME.fullmatch(path.stem):
            records.append(read_record(path))
        else:
            warnings.warn(f"{path}: not named <variant>_k<k>.json, so not read", stacklevel=2)
    if not records:
        raise RecordError(f"{runs_dir}: holds no run; make one with {make_command(runs_dir, 'cpu/baseline_k2')}")
    require_same_settings(records)
    return sorted(records, key=lambda record: (record["workload"], record["variant"], record["k"], record["run"]))


MAY_DIFFER = {"variant", "rloo_k", "seed", "record", "rows_per_micro_batch"}


def require_same_settings(records: list[dict]) -> None:
    """Runs of one workload are compared, so they must have the same model, data, budget and other settings."""
    first: dict[str, dict] = {}
    for record in records:
        config = record["config"]
        if not config:
            continue
        reference = first.setdefault(record["workload"], record)
        for key in reference["config"].keys() & config.keys() - MAY_DIFFER:
            if config[key] != reference["config"][key]:
                raise RecordError(
                    f"{record['path']} has {key} = {config[key]!r}, but {reference['path']} has "
                    f"{reference['config'][key]!r}: runs of one workload are compared and need the same settings. "
                    "Give the other settings a workload of their own in experiments/configs, or another --runs folder."
                )


def largest(values: list | None):
    return max(values) if values else None


def prompt_tokens_lost(record: dict) -> int | None:
    """Tokens of the data set's prompts that the first step did not use, summed over its rows.

    None if it did not come to a first step, or if a row is not recognised, so that what it should have is not known.
    """
    actual = lookup(record, "tokens.prompt_tokens_per_row")
    expected = lookup(record, "tokens.expected_prompt_tokens_per_row")
    if not actual or not expected or None in expected:
        return None
    if len(actual) != len(expected):
        raise RecordError(f"{record['path']}: {len(actual)} rows have a prompt length and {len(expected)} should")
    return sum(expected) - sum(actual)


def rows_per_micro_batch(record: dict) -> int | None:
    """Rows that one forward and backward of training holds, all rows of a step by default; None if not recorded."""
    config = record["config"]
    return config and (config["rows_per_micro_batch"] or record["k"] * config["prompts_per_step"])


def model_words(record: dict) -> str | None:
    """The model's name, without the folder of a local one, or the shape of the one that was built for the run."""
    config = record["config"]
    if config is None:
        return None
    if config["model"] is not None:
        return Path(config["model"]).name if Path(config["model"]).is_absolute() else config["model"]
    vocabulary = f"vocabulary {config['vocab_size']:,}" if config["vocab_size"] else "its tokenizer's vocabulary"
    return f"Qwen3 ({config['num_hidden_layers']} layers, hidden {config['hidden_size']}, {vocabulary})"


def typed(rows: list[dict], columns: tuple[str, ...] | None = None) -> pd.DataFrame:
    """A frame whose whole numbers stay whole beside missing ones; `columns` where there may be no row."""
    frame = pd.DataFrame(rows, columns=columns)
    numbers = [name for name in frame if name not in TEXTS]
    return frame.astype({name: "Float64" if name in FLOATS else "Int64" for name in numbers})


def runs_table(records: list[dict]) -> pd.DataFrame:
    """One row per run; memory in bytes, tokens per row as the largest of the first step."""
    rows = []
    for record in records:
        budget_gib = lookup(record, "config.budget_gib")
        steps = lookup(record, "summary.step_time_s")
        row = {name: record[name] for name in ("workload", "variant", "k", "status", "error")}
        row |= {
            "prompt_tokens_per_row": largest(lookup(record, "tokens.prompt_tokens_per_row")),
            "completion_tokens_per_row": largest(lookup(record, "tokens.completion_tokens_per_row")),
            "rows_per_step": lookup(record, "tokens.rows_per_step"),
            "rows_per_micro_batch": rows_per_micro_batch(record),
            "prompts_changed": lookup(record, "tokens.prompts_changed"),
            "prompt_tokens_lost": prompt_tokens_lost(record),
        }
        row |= {name: lookup(record, f"summary.{name}") for name in FROM_SUMMARY}
        row |= {
            "steps": None if steps is None else len(steps),
            "budget_bytes": None if budget_gib is None else round(budget_gib * GIB),
            "model": model_words(record),
            "device": lookup(record, "env.device"),
            "commit": lookup(record, "env.repo_commit"),
            "series_sha256": lookup(record, "env.tree.series_sha256"),
        }
        rows.append(row | {name: record[name] for name in ("started_at", "seed", "run")})
    return typed(rows)


def phases_table(records: list[dict]) -> pd.DataFrame:
    """One row per run and phase."""
    rows = []
    for record in records:
        peaks = lookup(record, "summary.live_peak_bytes_by_phase") or {}
        times = lookup(record, "summary.phase_time_s") or {}
        for phase in [*peaks, *(name for name in times if name not in peaks)]:
            row = {name: record[name] for name in ("run", "workload", "variant", "k", "status")}
            rows.append(row | {"phase": phase, "live_peak_bytes": peaks.get(phase), "phase_time_s": times.get(phase)})
    return typed(rows, ("run", "workload", "variant", "k", "status", "phase", "live_peak_bytes", "phase_time_s"))


def metrics_table(records: list[dict]) -> pd.DataFrame:
    """One row per run, step (from 1) and metric."""
    rows = []
    for record in records:
        for step, metrics in enumerate(lookup(record, "summary.metrics") or [], start=1):
            for metric, value in metrics.items():
                row = {name: record[name] for name in ("run", "workload", "variant", "k", "seed")}
                rows.append(row | {"step": step, "metric": metric, "value": value})
    return typed(rows, ("run", "workload", "variant", "k", "seed", "step", "metric", "value"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(path)`, but a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    write_atomically(path, lambda target: frame.to_csv(target, index=False, lineterminator="\n"))


def combine(records: list[dict], out: Path) -> None:
    """Writes runs.csv, phases.csv and metrics.csv into `out`."""
    for name, table in (("runs", runs_table), ("phases", phases_table), ("metrics", metrics_table)):
        write_csv(table(records), out / f"{name}.csv")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of one set: results/runs/<set>")
    parser.add_argument("--out", type=Path, required=True, help="folder the tables are written to")
    args = parser.parse_args(argv)
    try:
        records = load_records(args.runs)
        combine(records, args.out)
    except RecordError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(records)} runs -> {args.out}/runs.csv, phases.csv, metrics.csv")


if __name__ == "__main__":
    main()
