"""What the charts and the table compare: which runs, which meter, and what stands in for a baseline that ran out of
memory."""

import numpy as np
import pandas as pd

from visualization.combine_memory_data import lookup, runs_table

COMPARED = ("baseline", "upstream", "string-level", "shared-prefix")  # in drawing order, ours last
ONE_ROW = "-mb1"  # suffix of a variant that ran with one row per micro-batch
WITH_ONE_ROW = tuple(name + suffix for name in COMPARED for suffix in ("", ONE_ROW))
# upstream@1: v1.16.0 whose fused head skips the prompt on a CPU as well
TABLED = (*WITH_ONE_ROW, "upstream@1", "upstream@1" + ONE_ROW)
EXTRAPOLATED_FROM = ("baseline", "baseline" + ONE_ROW)
EXPECTED_VARIANTS = ("baseline", "string-level", "upstream", "shared-prefix")
EXPECTED_KS = (2, 4, 8)
FIRST_WORKLOADS = ("cpu", "published")
# Workloads with a question of their own, not part of the comparison.
OWN_CHART = ("origin", "origin_two_prompts", "learning")


def workloads(records: list[dict]) -> list[str]:
    """The workloads that are compared over k, the default one first: those with a baseline."""
    names = {record["workload"] for record in records if record["variant"] == "baseline"} - set(OWN_CHART)
    first = [name for name in FIRST_WORKLOADS if name in names]
    return first + sorted(names - set(first))


def compared(records: list[dict], workload: str | None = None, variants: tuple[str, ...] = COMPARED) -> list[dict]:
    """The records of the compared variants, of one workload or of all that are compared."""
    wanted = workloads(records) if workload is None else [workload]
    return [record for record in records if record["workload"] in wanted and record["variant"] in variants]


def expected_in(workload: str) -> list[str]:
    return [f"{workload}/{variant}_k{k}" for variant in EXPECTED_VARIANTS for k in EXPECTED_KS]


def expected_runs(records: list[dict]) -> list[str]:
    """Every compared workload of the set needs these runs, with whatever outcome."""
    return [run for workload in workloads(records) for run in expected_in(workload)]


def missing_runs(records: list[dict], expected: list[str]) -> list[str]:
    present = {record["run"] for record in records}
    return [run for run in expected if run not in present]


def process_meter(records: list[dict]) -> tuple[str, str]:
    """The meter of the whole process and its words: NVML where the runs used CUDA, else resident memory."""
    if any(lookup(record, "summary.cuda_peak_allocated_bytes") is not None for record in records) and any(
        lookup(record, "summary.nvml_peak_bytes") is not None for record in records
    ):
        return "nvml_peak_bytes", "device memory in use (NVML)"
    return "rss_peak_bytes", "resident memory of the process tree"


def budgets(records: list[dict]) -> list[float]:
    """The distinct memory budgets in GiB."""
    return sorted({lookup(record, "config.budget_gib") for record in records} - {None})


def reached_budgets(records: list[dict]) -> list[float]:
    """The budgets in GiB under which a run was out of memory."""
    return budgets([record for record in records if record["status"] == "oom"])


def extrapolate(rows: list[int], peaks: list[float], at_rows: int) -> float | None:
    """The straight line through peak over rows per micro-batch (least squares), read at `at_rows`.

    The baseline holds its activations and logits for all rows of a micro-batch at once, so its peak is linear in them.
    None from fewer than two distinct numbers of rows.
    """
    if len(set(rows)) < 2:
        return None
    slope, intercept = np.polyfit(np.asarray(rows, dtype=float), np.asarray(peaks, dtype=float), 1)
    return float(slope * at_rows + intercept)


def extrapolation_points(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished baselines of one workload, those with one row per micro-batch among them."""
    ran = runs[runs["variant"].isin(EXTRAPOLATED_FROM) & (runs["status"] == "ok")]
    return ran[ran["live_peak_bytes"].notna()]


def extrapolated_peak(runs: pd.DataFrame, run: pd.Series) -> float | None:
    """Live bytes that the baseline `run` would have needed, from those of its workload that finished."""
    points = extrapolation_points(runs)
    if points.empty:
        return None
    rows = run["rows_per_micro_batch"]
    if pd.isna(rows):  # it ended before it could record its settings
        rows = run["k"] * (points["rows_per_step"] // points["k"]).iloc[0]
    return extrapolate(points["rows_per_micro_batch"].tolist(), points["live_peak_bytes"].tolist(), int(rows))


def baseline_peak(runs: pd.DataFrame, meter: str, k: int) -> tuple[float | None, bool]:
    """The baseline's peak in one workload at `k`, and whether it is extrapolated (live bytes of an OOM only)."""
    row = runs[(runs["variant"] == "baseline") & (runs["k"] == k)]
    if row.empty:
        return None, False
    row = row.iloc[0]
    if row["status"] == "ok":
        return (None if pd.isna(row[meter]) else float(row[meter])), False
    if row["status"] == "oom" and meter == "live_peak_bytes":
        return extrapolated_peak(runs, row), True
    return None, False


def extrapolated_peaks(runs: pd.DataFrame, meter: str) -> dict[int, float]:
    """By k, the extrapolated peak of each baseline of one workload that was out of memory."""
    peaks = {k: baseline_peak(runs, meter, k) for k in runs["k"].unique()}
    return {k: peak for k, (peak, guess) in peaks.items() if guess and peak}


def extrapolation_note(records: list[dict], names: list[str]) -> str:
    """On which rows the extrapolations of these workloads were fitted; empty where nothing is extrapolated."""
    rows_of = {}
    for name in names:
        runs = runs_table(compared(records, name, EXTRAPOLATED_FROM))
        if extrapolated_peaks(runs, "live_peak_bytes"):
            rows = sorted(set(extrapolation_points(runs)["rows_per_micro_batch"]))
            rows_of.setdefault(", ".join(map(str, rows)), []).append(name)
    fits = [f"{rows} rows" + (f" ({', '.join(where)})" if len(names) > 1 else "") for rows, where in rows_of.items()]
    return f"extrapolated linearly from micro-batches of {'; '.join(fits)}" if fits else ""


def runs_by_workload(records: list[dict]) -> dict[str, pd.DataFrame]:
    return {name: runs_table(compared(records, name)) for name in workloads(records)}


def tabled(records: list[dict]) -> list[dict]:
    """The records of the tables: the compared variants, row by row too, also of workloads without a baseline."""
    return [r for r in records if r["workload"] not in OWN_CHART and r["variant"] in TABLED]


def tabled_by_workload(records: list[dict]) -> dict[str, pd.DataFrame]:
    """The runs of the tables, the compared workloads first."""
    names = workloads(records) + sorted({record["workload"] for record in tabled(records)} - set(workloads(records)))
    return {name: runs_table(compared(records, name, TABLED)) for name in names}
