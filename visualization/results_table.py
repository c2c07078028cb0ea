"""The peaks as a table: one row per workload, k and variant, and the growth from k=2 to k=8, as Markdown and CSV."""

from pathlib import Path

import pandas as pd

from visualization import style
from visualization.combine_memory_data import GIB, write_atomically, write_csv
from visualization.comparison import (
    TABLED,
    baseline_peak,
    extrapolation_note,
    tabled,
    tabled_by_workload,
    workloads,
)

METERS = {
    "live": "live_peak_bytes",
    "rss": "rss_peak_bytes",
    "allocated": "cuda_peak_allocated_bytes",
    "reserved": "cuda_peak_reserved_bytes",
    "nvml": "nvml_peak_bytes",
}
METER_WORDS = {"live": "live", "rss": "RSS", "allocated": "allocated", "reserved": "reserved", "nvml": "NVML"}
GROWTH_KS = (2, 8)
NOTES = """
- Live: bytes of live tensor storages. RSS: resident memory of the process tree. Allocated, reserved: PyTorch's caching
  allocator. NVML: device memory in use. A meter that no run has is left out. GiB is 2^30 bytes.
- Tokens: the longest row of the first step. Reduction: against the baseline at the same k. -mb1: one row per
  micro-batch.
- `†` the prompts or the rows are not the baseline's: no like-for-like comparison.
- `–` not measured.
"""


def missing(value) -> bool:
    return value is None or pd.isna(value)


def peak_memory_table(records: list[dict]) -> pd.DataFrame:
    """One row per workload, k and variant; the peak of a run that did not finish is no peak and stays empty."""
    rows = []
    for workload, runs in tabled_by_workload(records).items():
        order = runs.assign(place=runs["variant"].map(TABLED.index)).sort_values(["k", "place"])
        for run in order.itertuples():
            row = {"workload": workload, "k": run.k, "variant": run.variant, "status": run.status}
            row["budget_gib"] = None if missing(run.budget_bytes) else run.budget_bytes / GIB
            for name, meter in METERS.items():
                peak = getattr(run, meter) if run.status == "ok" else None
                row[f"{name}_peak_gib"] = None if missing(peak) else peak / GIB
                reference, guess = baseline_peak(runs, meter, run.k)
                known = run.variant != "baseline" and not missing(peak) and reference
                row[f"{name}_reduction"] = 1 - peak / reference if known else None
                if name == "live":
                    row["live_reduction_extrapolated"] = guess if known else None
            row["step_time_median_s"] = run.step_time_median_s if run.status == "ok" else None
            row["prompt_tokens_per_row"] = run.prompt_tokens_per_row
            row["completion_tokens_per_row"] = run.completion_tokens_per_row
            row["rows_per_step"] = run.rows_per_step
            row["prompts_differ_from_baseline"] = prompts_differ(runs, run)
            rows.append(row)
    frame = pd.DataFrame(rows)
    numbers = [name for name in frame if name.endswith(("_gib", "_reduction", "_s"))]
    whole = [name for name in frame if name.endswith(("_row", "_step"))]
    return frame.astype({name: "Float64" for name in numbers} | {name: "Int64" for name in whole})


def prompts_differ(runs: pd.DataFrame, run: tuple) -> bool | None:
    """Whether the run's prompts or rows are not the baseline's at the same k; None where that is not known."""
    base = runs[(runs["variant"] == "baseline") & (runs["k"] == run.k)]
    if run.variant == "baseline" or base.empty:
        return None
    base = base.iloc[0]
    pairs = [(base[name], getattr(run, name)) for name in ("prompt_tokens_per_row", "rows_per_step")]
    if any(missing(a) or missing(b) for a, b in pairs):
        return None
    return any(a != b for a, b in pairs) or bool(not missing(run.prompts_changed) and run.prompts_changed > 0)


def growth_table(records: list[dict]) -> pd.DataFrame:
    """peak(k=8) / peak(k=2) per workload and variant; a baseline out of memory at k=8 counts by its extrapolation.

    A workload without a baseline is only there with what can be stated.
    """
    ratios = [f"{name}_growth" for name in METERS]
    rows = []
    for workload, runs in tabled_by_workload(records).items():
        for variant in [name for name in TABLED if name in set(runs["variant"])]:
            row = {"workload": workload, "variant": variant}
            for name, meter in METERS.items():
                ends = [peak_or_extrapolation(runs, variant, meter, k) for k in GROWTH_KS]
                known = all(peak for peak, _ in ends)
                row[f"{name}_growth"] = ends[1][0] / ends[0][0] if known else None
                if name == "live":
                    row["live_growth_extrapolated"] = any(guess for _, guess in ends) if known else None
            if workload in workloads(records) or any(row[name] for name in ratios):
                rows.append(row)
    frame = pd.DataFrame(rows, columns=["workload", "variant", *ratios, "live_growth_extrapolated"])
    return frame.astype(dict.fromkeys(ratios, "Float64"))


def peak_or_extrapolation(runs: pd.DataFrame, variant: str, meter: str, k: int) -> tuple[float | None, bool]:
    if variant == "baseline":
        return baseline_peak(runs, meter, k)
    row = runs[(runs["variant"] == variant) & (runs["k"] == k) & (runs["status"] == "ok")]
    return (None if row.empty or missing(row.iloc[0][meter]) else float(row.iloc[0][meter])), False


def markdown_rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(value, text: str, mark: str = "") -> str:
    return "–" if missing(value) else text.format(value) + mark


def number(value) -> str:
    return "–" if missing(value) else style.three_digits(value)


def to_markdown(table: pd.DataFrame, growth: pd.DataFrame, provenance: str, fit: str) -> str:
    """Both tables with their notes; a meter that no run has gets no column. `fit`: how a baseline was extrapolated."""
    meters = [name for name in METERS if table[f"{name}_peak_gib"].notna().any()]
    header = ["workload", "k", "variant", "status"]
    header += [f"{METER_WORDS[name]} {what}" for name in meters for what in ("GiB", "reduction")]
    header += ["step time s", "prompt + completion tokens"]
    rows = []
    for row in table.to_dict("records"):
        budget = "" if missing(row["budget_gib"]) else f" ({row['budget_gib']:g} GiB)"
        status = f"OOM{budget}" if row["status"] == "oom" else row["status"]
        cells = [row["workload"], str(row["k"]), row["variant"], status]
        for name in meters:
            mark = "*" if name == "live" and row["live_reduction_extrapolated"] is True else ""
            mark += "†" if row["prompts_differ_from_baseline"] is True else ""
            cells.append(number(row[f"{name}_peak_gib"]))
            cells.append(cell(row[f"{name}_reduction"], "{:.1%}", mark))
        cells.append(number(row["step_time_median_s"]))
        tokens = (row["prompt_tokens_per_row"], row["completion_tokens_per_row"])
        cells.append(" + ".join(cell(count, "{:,}") for count in tokens))
        rows.append(cells)
    growth_header = ["workload", "variant", *(METER_WORDS[name] for name in meters)]
    growth_rows = []
    for row in growth.to_dict("records"):
        marks = {"live": "*" if row["live_growth_extrapolated"] is True else ""}
        ratios = [cell(row[f"{name}_growth"], "{:.2f}", marks.get(name, "")) for name in meters]
        growth_rows.append([row["workload"], row["variant"], *ratios])
    title = f"## Growth: peak(k={GROWTH_KS[1]}) / peak(k={GROWTH_KS[0]})"
    parts = [f"{provenance}\n", markdown_rows(header, rows), title + "\n", markdown_rows(growth_header, growth_rows)]
    notes = NOTES + (f"- `*` the baseline ran out of memory there, so not measured: {fit}.\n" if fit else "")
    return "# Peak memory\n\n" + "\n".join(parts) + notes


def write_table(records: list[dict], out: Path) -> None:
    """Writes peak_memory.md and peak_memory.csv (the growth table into growth.csv) of the workloads with a table."""
    records = tabled(records)
    table, growth = peak_memory_table(records), growth_table(records)
    write_csv(table, out / "peak_memory.csv")
    write_csv(growth, out / "growth.csv")
    fit = extrapolation_note(records, workloads(records))
    text = to_markdown(table, growth, style.provenance(records), fit)
    write_atomically(out / "peak_memory.md", lambda target: target.write_text(text, encoding="utf-8"))
