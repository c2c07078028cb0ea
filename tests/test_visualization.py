"""Tables and charts from records, on synthetic sets of runs: no record of a real run is needed."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from synthetic_runs import (
    GIB,
    PHASES,
    write_full_set,
    write_one_row,
    write_oom,
    write_record,
    write_shared_prefix_measurements,
)

from visualization import combine_memory_data, comparison, create_charts, results_table
from visualization.charts_by_k import growth_with_k, peak_memory_comparison, spread
from visualization.charts_causes import ablation, ablation_records, published_origin
from visualization.charts_over_time import individual_peak_preserving, learning_curves, load_timeline
from visualization.charts_shared_prefix import shared_prefix
from visualization.combine_memory_data import RecordError, load_records, runs_table
from visualization.shared_prefix_table import (
    read_out_of_memory,
    read_time_ratios,
    read_training_peaks,
    steps_markdown,
    write_shared_prefix_table,
)
from visualization.smoothing import peak_preserving, trend

ALL_CHARTS = (
    *("peak_memory_comparison", "growth_with_k", "step_time", "ablation", "published_origin", "learning_curves"),
    *("rloo_individual_peak_preserving", "rloo_individual_ultra_smooth", "shared_prefix"),
)


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def bars(figure, gid: str) -> list:
    return [patch for axes in figure.axes for patch in axes.patches if patch.get_gid() == gid]


@pytest.fixture(scope="module")
def full_set(tmp_path_factory) -> Path:
    runs_dir = write_full_set(tmp_path_factory.mktemp("runs") / "synthetic")
    write_shared_prefix_measurements(runs_dir)
    return runs_dir


@pytest.fixture(scope="module")
def records(full_set) -> list[dict]:
    return load_records(full_set)


# tables


def test_runs_csv_holds_what_the_record_holds(tmp_path):
    write_record(tmp_path / "runs", "cpu", "string-level@2", 4, 1.5, tokens__completion_tokens_per_row=[53, 40, 53, 7])
    combine_memory_data.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    row = pd.read_csv(tmp_path / "out/runs.csv").iloc[0]
    assert (row["workload"], row["variant"], row["k"], row["status"]) == ("cpu", "string-level@2", 4, "ok")
    assert (row["prompt_tokens_per_row"], row["completion_tokens_per_row"], row["rows_per_step"]) == (512, 53, 4)
    assert (row["live_peak_bytes"], row["rss_peak_bytes"]) == (1.5 * GIB, 2 * GIB)
    assert (row["budget_bytes"], row["steps"], row["prompt_tokens_lost"]) == (6 * GIB, 4, 0)
    assert (row["commit"], row["started_at"]) == ("0123456789abcdef0123", "2025-11-21T10:00:00+00:00")
    phases = pd.read_csv(tmp_path / "out/phases.csv")
    assert phases["phase"].tolist() == list(PHASES)
    assert (phases["phase_time_s"] == 2.5).all()
    metrics = pd.read_csv(tmp_path / "out/metrics.csv")
    assert metrics["step"].tolist() == [1, 2, 3, 4]
    assert metrics["value"].tolist() == [0.1 * step for step in range(4)]


def test_what_was_not_measured_is_an_empty_cell_and_never_zero(tmp_path):
    unmeasured = {"summary__rss_peak_bytes": None, "config__budget_gib": None, "summary__step_time_median_s": None}
    write_record(tmp_path / "runs", "cpu", "baseline", 2, None, **unmeasured)
    combine_memory_data.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    cells = pd.read_csv(tmp_path / "out/runs.csv", dtype=str, keep_default_na=False).iloc[0]
    for name in (
        "live_peak_bytes",
        "rss_peak_bytes",
        "nvml_peak_bytes",
        "budget_bytes",
        "step_time_median_s",
        "error",
    ):
        assert cells[name] == "", name
    phases = pd.read_csv(tmp_path / "out/phases.csv", dtype=str, keep_default_na=False)
    assert (phases["live_peak_bytes"] == "").all()


def test_a_run_that_ended_before_its_first_step_is_a_row_with_its_outcome(tmp_path):
    nothing = {
        "tokens": None,
        "config": None,
        "env": None,
        "status": "killed",
        "error": "killed by signal 9 (SIGKILL)",
    }
    write_record(tmp_path, "cpu", "baseline", 8, None, **nothing)
    no_rows = {"tokens__prompt_tokens_per_row": [], "tokens__expected_prompt_tokens_per_row": []}
    write_oom(tmp_path, "cpu", "baseline", 4, **no_rows)
    oom, killed = runs_table(load_records(tmp_path)).to_dict("records")
    assert (killed["status"], killed["error"]) == ("killed", "killed by signal 9 (SIGKILL)")
    assert all(pd.isna(killed[name]) for name in ("prompt_tokens_per_row", "budget_bytes", "model", "commit"))
    assert oom["status"] == "oom"
    assert pd.isna(oom["prompt_tokens_lost"])
    assert oom["live_peak_bytes"] > 0


def test_prompt_tokens_lost_is_expected_minus_actual_over_all_rows(records):
    runs = runs_table(records).set_index("run")
    assert runs.loc["origin/as-published_k4", "prompt_tokens_lost"] == 4 * (3096 - 1024)
    assert runs.loc["origin/baseline_k4", "prompt_tokens_lost"] == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2, this reads schema 1"),
        (lambda text: text.replace('"rss_start_bytes"', '"rss"'), "required key 'summary.rss_start_bytes' is missing"),
        (
            lambda text: text.replace('"tokens": {', '"tokens": null, "t": {'),
            "'tokens.prompt_tokens_per_row' is missing",
        ),
        (lambda text: text.replace("cpu/baseline_k4", "cpu/baseline_k2"), "holds the run 'cpu/baseline_k2'"),
        (lambda text: text.replace('"status": "ok"', '"status": "fine"'), "status 'fine' is none of ok, oom"),
        (lambda text: "[]", "not a record but a list"),
    ],
)
def test_a_record_that_cannot_be_trusted_is_an_error_with_its_name_and_the_way_out(tmp_path, damage, says):
    write_record(tmp_path, "cpu", "baseline", 2, 1.0)
    path = write_record(tmp_path, "cpu", "baseline", 4, 2.0)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError) as error:
        load_records(tmp_path)
    assert str(path) in str(error.value)
    assert says in str(error.value)
    again = f"python experiments/run_matrix.py --workload cpu --runs {tmp_path} --variants baseline --k 4 --force"
    assert again in str(error.value)
    with pytest.raises(SystemExit, match=r"baseline_k4\.json"):
        combine_memory_data.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_with_another_name_is_left_out_with_a_warning(tmp_path):
    write_record(tmp_path, "cpu", "baseline", 2, 1.0)
    (tmp_path / "cpu/notes.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"notes\.json"):
        assert len(load_records(tmp_path)) == 1


def test_a_set_that_is_not_there_is_an_error_with_a_command(tmp_path):
    with pytest.raises(RecordError, match=r"no such set of runs; make it with python experiments/run_matrix\.py"):
        load_records(tmp_path / "none")


# smoothing


@pytest.mark.parametrize("seed", range(20))
def test_peak_preserving_draws_the_recorded_peak_at_its_time_and_only_recorded_points(seed):
    rng = np.random.default_rng(seed)
    count, window = int(rng.integers(1, 400)), int(rng.integers(1, 50))
    times = np.sort(rng.random(count)) * 100
    series = pd.Series(rng.integers(0, 50, count).astype(float), index=times)  # few values, so peaks tie
    series[rng.random(count) < 0.1] = np.nan
    series.iloc[0] = 1.0
    drawn = peak_preserving(series, window)
    assert drawn.max() == series.max()
    assert drawn.idxmax() == series.idxmax()
    assert (series.loc[drawn.index] == drawn).all()
    assert drawn.index.is_monotonic_increasing
    assert drawn.index[-1] == series.dropna().index[-1]
    assert len(drawn) <= -(-series.count() // window) + 2


def test_peak_preserving_keeps_a_spike_that_the_trend_hides():
    series = pd.Series(1.0, index=np.arange(100.0))
    series[41.0] = 9.0
    assert peak_preserving(series, 10)[41.0] == 9.0
    assert trend(series, 10).max() < 2.0


def test_smoothing_of_no_samples_is_empty_and_a_window_of_zero_is_refused():
    assert peak_preserving(pd.Series(dtype=float), 5).empty
    for smooth in (peak_preserving, trend):
        with pytest.raises(ValueError, match="window is 0"):
            smooth(pd.Series([1.0]), 0)


# comparison


def test_extrapolation_is_the_straight_line_through_the_points_and_needs_two_distinct_ones():
    assert comparison.extrapolate([2, 4], [3.0, 5.0], 8) == pytest.approx(9.0)
    assert comparison.extrapolate([2, 4, 6], [1.0, 2.0, 3.0], 64) == pytest.approx(32.0)
    assert comparison.extrapolate([1, 1, 3], [1.0, 3.0, 6.0], 5) == pytest.approx(10.0)  # least squares
    assert comparison.extrapolate([2], [3.0], 8) is None
    assert comparison.extrapolate([1, 1], [3.0, 3.5], 8) is None


def baseline_at(runs_dir: Path, k: int) -> tuple[float | None, bool]:
    records = comparison.compared(load_records(runs_dir), "published", comparison.EXTRAPOLATED_FROM)
    return comparison.baseline_peak(runs_table(records), "live_peak_bytes", k)


@pytest.mark.parametrize("prompts", [1, 2])
def test_one_row_and_k2_predict_a_linear_baseline_at_k8_exactly(tmp_path, prompts):
    def live(rows: int) -> float:
        return 0.25 + 1.75 * rows

    shape = {"config__prompts_per_step": prompts}
    write_oom(tmp_path, "published", "baseline", 8, **shape)
    write_record(tmp_path, "published", "baseline", 2, live(2 * prompts), **shape)
    assert baseline_at(tmp_path, 8) == (None, True)  # one point
    write_one_row(tmp_path, "published", "baseline", 2, live(1), **shape)
    peak, extrapolated = baseline_at(tmp_path, 8)
    assert extrapolated
    assert peak / GIB == pytest.approx(live(8 * prompts), rel=1e-12)
    assert baseline_at(tmp_path, 2) == (live(2 * prompts) * GIB, False)
    write_one_row(tmp_path, "published", "upstream", 2, 100.0, **shape)
    assert baseline_at(tmp_path, 8)[0] == peak


def test_a_baseline_that_died_before_its_settings_were_recorded_is_extrapolated_by_its_k(tmp_path):
    write_record(tmp_path, "published", "baseline", 2, 2.0, tokens__rows_per_step=6, config__prompts_per_step=3)
    write_one_row(tmp_path, "published", "baseline", 2, 1.0, tokens__rows_per_step=6, config__prompts_per_step=3)
    write_oom(tmp_path, "published", "baseline", 4, config=None, tokens=None, env=None, summary=None)
    peak, _ = baseline_at(tmp_path, 4)
    assert peak / GIB == pytest.approx(1.0 + (12 - 1) / 5)


def test_baseline_out_of_memory_is_extrapolated_in_live_bytes_only(records):
    runs = comparison.tabled_by_workload(records)["cpu"]
    peak, extrapolated = comparison.baseline_peak(runs, "live_peak_bytes", 8)
    assert extrapolated
    assert peak / GIB == pytest.approx(0.9 * 8 + 0.05)
    assert comparison.baseline_peak(runs, "rss_peak_bytes", 8) == (None, False)
    assert comparison.baseline_peak(runs, "live_peak_bytes", 4)[1] is False


def test_runs_row_by_row_are_in_the_table_and_the_growth_chart_but_no_bars_and_not_expected(records):
    assert not any("-mb1" in run for run in comparison.expected_runs(records))
    growth, bars_by_k = growth_with_k(records), peak_memory_comparison(records)
    labels = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (growth, bars_by_k)]
    assert [label for label in labels[0] if label.endswith("-mb1")] == ["baseline-mb1", "upstream-mb1"]
    assert not any("-mb1" in label for label in labels[1])
    live = next(axes for axes in growth.axes if axes.get_title(loc="left") == "published: live tensor bytes")
    parent, one_row = live.lines[:2]
    assert one_row.get_linestyle() == ":" and one_row.get_linewidth() < parent.get_linewidth()
    assert one_row.get_color() == parent.get_color()
    assert one_row.get_ydata().tolist() == pytest.approx([2.2 * 0.95] * 3)
    table = results_table.peak_memory_table(records).set_index(["workload", "k", "variant"])
    assert table.loc["published"].loc[2].index.tolist() == [
        *("baseline", "baseline-mb1", "upstream", "upstream-mb1", "string-level", "shared-prefix")
    ]
    assert table.loc[("published", 2, "baseline-mb1"), "live_reduction"] == pytest.approx(1 - 0.95 / 1.85)
    assert table.loc[("published", 8, "upstream-mb1"), "live_reduction"] == pytest.approx(1 - 0.77 / 7.25)


def test_a_workload_without_a_baseline_is_expected_to_hold_nothing_and_stands_in_the_tables(records, full_set):
    assert comparison.workloads(records) == ["cpu", "published"]
    assert {run.partition("/")[0] for run in comparison.expected_runs(records)} == {"cpu", "published"}
    growth = results_table.growth_table(records).set_index(["workload", "variant"])
    assert growth.loc[("published_flat", "string-level"), "live_growth"] == pytest.approx(1.1)
    assert list(growth.index)[-1] == ("published_flat", "string-level")


@pytest.mark.parametrize("ks", [(2, 8), (4,)])
@pytest.mark.parametrize("variant", ["string-level", "string-level@3"])
def test_a_set_without_any_baseline_is_no_error(tmp_path, capsys, ks, variant):
    for k in ks:
        write_record(tmp_path / "set", "published_flat", variant, k, 1.0)
    create_charts.main(["--runs", str(tmp_path / "set"), "--out", str(tmp_path / "out")])
    assert "not drawn: peak_memory_comparison: needs cpu/baseline_k2, " in capsys.readouterr().out
    table = tmp_path / "out/peak_memory.md"
    assert table.exists() == (variant == "string-level")
    if table.exists():
        assert ("| published_flat | string-level | 1.00 |" in table.read_text()) == (ks == (2, 8))


def test_spread_moves_labels_apart_and_keeps_their_order():
    moved = spread([1.0, 1.1, 5.0, 1.05], 0.5)
    assert np.diff(np.sort(moved)).min() >= 0.5 - 1e-6
    assert np.argsort(moved).tolist() == [0, 3, 1, 2]


# charts


def test_one_command_writes_every_table_and_chart(full_set, tmp_path):
    create_charts.main(["--runs", str(full_set), "--out", str(tmp_path), "--strict"])
    for name in ALL_CHARTS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    tables = ("runs.csv", "phases.csv", "metrics.csv", "peak_memory.csv", "growth.csv", "peak_memory.md")
    for name in (*tables, "shared_prefix.md"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_shared_prefix_table_has_the_ratios_of_the_pairs(full_set, tmp_path):
    peaks, times = read_training_peaks(full_set), read_time_ratios(full_set)
    row = times[times["pairs"] == 2].iloc[0]
    assert (row["k"], row["pairs"], row["checkpointing"]) == (8, 2, False)
    assert row["step"] == pytest.approx(1 / 0.15) and row["generate"] == pytest.approx(5) and row["train"] == 10
    assert row["token_ratio"] == pytest.approx(8 * 3125 / (3072 + 8 * 53))
    assert row["work_ratio"] == pytest.approx(8800 / 1800)
    write_shared_prefix_table(peaks, times, read_out_of_memory(full_set), tmp_path)
    text = (tmp_path / "shared_prefix.md").read_text()
    assert "| layers_3072_53 | 3,072 + 53 | off | all rows | 2.00 | 8.00 | 4.000 |" in text
    assert "| layers_3072_53 | 3,072 + 53 | off | shared | 1.50 | 1.50 | 1.000 |" in text
    assert "\na: one CPU; \\*: page faults in it, see below; –: not measured.\n" in text
    assert "| layers_3072_53 | 3,072 + 53 | off | token ratio | 7.15 |" in text
    assert "| layers_3072_53 | 3,072 + 53 | off | upstream@1 | 6.67 a |" in text  # with two pairs
    assert "| layers_3072_53 | 3,072 + 53 | off | upstream@1, k branches | 2.00 a |" in text
    assert "| 3,072 + 53 | 8 | 8 | one CPU | off | upstream@1 (1.06 x tokens) |" in text
    assert "| 3,072 + 53 | 8 | 1 | one CPU | off | upstream@1 (1.06 x tokens) |" in text
    assert "6.67 (5.00 to 10.00)" in text and "| 5.00 | 8.00 | 10.00 | 4.89 |" in text


def test_table_of_steps_names_the_machine_and_what_memory_forbids(full_set):
    peaks, times = read_training_peaks(full_set), read_time_ratios(full_set)
    measured = times[times["pairs"] == 2]
    beside = measured.assign(machine="another CPU", step=5.0)
    row_by_row = measured.assign(k=64, peer="upstream@1-mb1", step=20.0)
    four_at_once = measured.assign(branches=4, step=9.0, keeps_memory=False)
    times = pd.concat([measured, beside, row_by_row, four_at_once])
    largest = peaks[peaks["k"] == 8]
    too_large = pd.concat([peaks, largest.assign(k=64, peak_live_bytes=64 * GIB)])
    failed = read_out_of_memory(full_set)
    table = steps_markdown(times, too_large, failed[:0])
    assert table.startswith("a: another CPU; b: one CPU; \\*: page faults in it, see below; –: not measured.\n")
    setting = "| layers_3072_53 | 3,072 + 53 | off |"
    assert f"{setting} upstream@1 | 5.00 a, 6.67 b | over 16 GiB |" in table
    assert f"{setting} upstream@1-mb1 | – | 20.00 b |" in table  # one row at a time is not all rows
    assert f"{setting} upstream@1, 4 branches | 9.00 b\\* | – |" in table  # not under that of one branch
    assert f"{setting} upstream@1 | 5.00 a, 6.67 b | – |" in steps_markdown(times, peaks, failed[:0])
    table = steps_markdown(times, peaks, failed.assign(k=32))  # more completions do not fit where fewer did not
    assert f"{setting} upstream@1 | 5.00 a, 6.67 b | out of memory |" in table
    assert f"{setting} upstream@1, 4 branches | 9.00 b\\* | – |" in table
    table = steps_markdown(times, too_large, failed.assign(k=32))
    assert f"{setting} upstream@1 | 5.00 a, 6.67 b | over 16 GiB |" in table
    table = steps_markdown(times, too_large, failed)  # at k = 64, of all rows and one branch at a time
    assert f"{setting} upstream@1 | 5.00 a, 6.67 b | out of memory |" in table
    assert f"{setting} upstream@1, 4 branches | 9.00 b\\* | – |" in table


def test_shared_prefix_chart_prefers_kept_memory_and_stars_page_faults(full_set):
    peaks, times = read_training_peaks(full_set), read_time_ratios(full_set)
    measured = times[times["pairs"] == 2]
    faults = measured.assign(step=12.0, pairs=3, keeps_memory=False)
    only_faults = measured.assign(k=64, step=20.0, keeps_memory=False)
    figure = shared_prefix(peaks, pd.concat([measured, faults, only_faults]))
    assert texts(figure) == ["6.7", "20.0*"]
    note = " ".join(text.get_text() for text in figure.texts)
    assert "*: with glibc's own allocator settings" in note


def test_an_expected_run_that_is_missing_is_an_error_with_its_name_and_command(tmp_path, capsys):
    for variant in comparison.EXPECTED_VARIANTS:
        for k in comparison.EXPECTED_KS:
            if (variant, k) != ("upstream", 8):
                write_record(tmp_path / "set", "cpu", variant, k, 1.0)
    command = ["--runs", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        create_charts.main(command)
    assert "lacks 1 expected run(s):\n  cpu/upstream_k8: make it with python experiments/" in str(error.value)
    assert f"--workload cpu --runs {tmp_path / 'set'} --variants upstream --k 8" in str(error.value)
    write_record(tmp_path / "set", "cpu", "upstream", 8, None, status="error", error="failed", summary=None)
    create_charts.main(command)
    said = capsys.readouterr().out
    for name in ("ablation", "published_origin", "learning_curves", "rloo_individual_peak_preserving"):
        assert f"not drawn: {name}: needs " in said
    assert "cpu/baseline_k2.timeline.csv" in said
    assert "origin/as-published_k<k>" in said
    with pytest.raises(SystemExit, match="not drawn: ablation"):
        create_charts.main([*command, "--strict"])


def test_a_file_of_expected_runs_replaces_the_default(tmp_path):
    write_record(tmp_path / "set", "cpu", "baseline", 2, 1.0)
    expect = tmp_path / "expect.txt"
    expect.write_text("# only this one\ncpu/baseline_k2\n")
    command = ["--runs", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--expect", str(expect)]
    create_charts.main(command)
    assert (tmp_path / "out/peak_memory_comparison.png").exists()
    expect.write_text("cpu/baseline_k2\ncpu/string-level_k16  # ours\n")
    with pytest.raises(SystemExit, match="cpu/string-level_k16"):
        create_charts.main(command)


def test_out_of_memory_is_a_hatched_bar_at_the_budget_with_its_name(records):
    figure = peak_memory_comparison(records)
    drawn = bars(figure, "oom")
    # live bytes and resident memory of the baseline on cpu at k=8, on published at k=4 and 8, and of upstream there
    assert [bar.get_height() for bar in drawn] == [6.0] * 8
    assert all(bar.get_hatch() for bar in drawn)
    assert texts(figure).count("OOM") == 8
    assert [text for text in texts(figure) if "extrapolated" in text] == [
        *("7.25*\nextrapolated", "8.03*\nextrapolated", "↑ 16.0*\nextrapolated")
    ]
    note = " ".join(text.get_text() for text in figure.texts)
    assert "* extrapolated linearly from micro-batches of 2, 4 rows (cpu); 1, 2 rows (published)" in note
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    assert "OOM" in texts(growth_with_k(records))


def test_one_baseline_point_gives_no_extrapolation_and_no_budget_still_a_bar(tmp_path):
    write_record(tmp_path, "cpu", "baseline", 2, 1.0, config__budget_gib=None)
    write_oom(tmp_path, "cpu", "baseline", 4, config__budget_gib=None)
    figure = peak_memory_comparison(load_records(tmp_path))
    assert len(bars(figure, "oom")) == 2
    assert not any("extrapolated" in text for text in texts(figure))


def test_a_picture_says_model_device_number_of_runs_date_and_commit(records):
    lines = [text.get_text() for text in peak_memory_comparison(records).texts]
    assert (
        "Qwen3 (2 layers, hidden 8, vocabulary 151,936) · cpu · n = 24 runs · 2025-11-21 · commit 0123456789" in lines
    )
    assert lines[0].endswith("?")


def test_ablation_takes_the_largest_k_that_every_stage_finished_and_states_small_savings(records):
    stages, needs = ablation_records(records)
    assert not needs
    assert [record["variant"] for record in stages] == ["baseline", *(f"string-level@{n}" for n in range(1, 7))]
    assert {record["k"] for record in stages} == {4}
    figure = ablation(stages, {"string-level@2": "given name"})
    assert " 16.0 KiB (<0.1%)" in texts(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["unpatched", "1. string repetition", "2. given name"]


def test_ablation_names_the_stage_that_is_missing(tmp_path):
    for variant in ("baseline", "string-level@1", "string-level@3"):
        write_record(tmp_path, "cpu", variant, 4, 1.0)
    assert ablation_records(load_records(tmp_path)) == ([], ["cpu/string-level@2_k4 (finished)"])


def test_origin_chart_marks_cut_prompts_and_states_the_tokens(records):
    figure = published_origin(records)
    assert [round(bar.get_height(), 3) for bar in bars(figure, "prompts cut")] == [1.092, 2.142, 4.3]
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "1,024 tokens\n4,144 lost" in labels
    assert "3,096 tokens\n0 lost" in labels
    said = texts(figure)
    assert "5.10\n0.0%" in said
    assert "2.14\n−58.0%\nprompts cut" in said
    assert "4.30\n−57.4%*\nprompts cut" in said


def test_origin_chart_does_not_take_a_crash_for_cut_prompts(records):
    broken = [dict(record) for record in records if record["workload"] == "origin"]
    crashed = next(record for record in broken if record["run"] == "origin/as-published_k2")
    crashed["summary"] = crashed["summary"] | {"step_time_s": [1.0]}
    assert len(bars(published_origin(broken), "prompts cut")) == 2


def test_panels_over_time_draw_the_peak_sample_the_recorded_peak_and_the_end(records):
    cpu = comparison.compared(records, "cpu")
    timelines = {record["run"]: load_timeline(record) for record in cpu}
    figure = individual_peak_preserving(records, timelines, "cpu")
    axes = next(panel for panel in figure.axes if panel.get_title() == "baseline")  # the first row: k=2
    line = max(axes.lines, key=lambda drawn: len(drawn.get_xdata()))
    samples = timelines["cpu/baseline_k2"].set_index("t_s")["rss_bytes"] / GIB
    assert max(line.get_ydata()) == samples.max()
    assert line.get_xdata()[int(np.argmax(line.get_ydata()))] == samples.idxmax()
    assert "2.30" in [text.get_text() for text in axes.texts]  # the recorded peak, above every sample
    assert samples.max() < 2.29
    assert texts(figure).count("OOM") == 1


def test_learning_curves_draw_ours_last_dashed_and_thinner(records):
    axes = learning_curves(records).axes[0]
    ours, baseline = sorted(axes.lines, key=lambda line: line.get_linewidth())[-2:]
    assert (ours.get_linestyle(), baseline.get_linestyle()) == ("--", "-")
    assert axes.lines.index(ours) > axes.lines.index(baseline)
    assert len(ours.get_xdata()) == 40
    assert np.array_equal(ours.get_ydata(), baseline.get_ydata())


# table


def test_table_states_reductions_marks_extrapolations_and_leaves_failed_peaks_empty(records):
    peaks, growth = results_table.peak_memory_table(records), results_table.growth_table(records)
    table = peaks.set_index(["workload", "k", "variant"])
    assert table.loc[("cpu", 4, "string-level"), "live_reduction"] == pytest.approx(1 - 0.87 / 3.65)
    assert table.loc[("cpu", 8, "string-level"), "live_reduction"] == pytest.approx(1 - 1.39 / 7.25)
    assert table.loc[("cpu", 8, "string-level"), "live_reduction_extrapolated"]
    assert pd.isna(table.loc[("cpu", 8, "string-level"), "rss_reduction"])
    assert table.loc[("cpu", 8, "baseline"), ["live_peak_gib", "rss_peak_gib"]].isna().all()
    text = results_table.to_markdown(peaks, growth, "provenance", "extrapolated from 2 rows")
    assert "- `*` the baseline ran out of memory there, so not measured: extrapolated from 2 rows." in text
    assert "| cpu | 8 | baseline | OOM (6 GiB) | – | – | – | – | – | 512 + 53 |" in text
    assert "| cpu | 4 | string-level | ok | 0.870 | 76.2% | 1.32 | 67.8% |" in text
    assert "| 80.8%* |" in text
    assert "NVML GiB" not in text
    assert "| cpu | baseline | 3.92* | – |" in text
    assert "| cpu | shared-prefix | 1.00 | 1.00 |" in text


def test_table_marks_a_comparison_of_different_prompts(tmp_path):
    write_record(tmp_path, "cpu", "baseline", 2, 2.0)
    write_record(tmp_path, "cpu", "upstream", 2, 1.0, prompt=300)
    records = load_records(tmp_path)
    table, growth = results_table.peak_memory_table(records), results_table.growth_table(records)
    assert "| 1.00 | 50.0%† |" in results_table.to_markdown(table, growth, "", "")


def test_runs_of_one_workload_with_other_settings_are_not_compared(tmp_path):
    path = write_full_set(tmp_path)
    changed = path / "cpu/string-level_k4.json"
    record = json.loads(changed.read_text())
    record["config"]["budget_gib"] = 99
    changed.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="string-level_k4.json has budget_gib = 99, but .*same settings"):
        load_records(path)


def test_time_lines_are_drawn_for_the_k_of_every_variant_only(tmp_path, capsys):
    runs = write_full_set(tmp_path / "synthetic")
    write_record(runs, "cpu", "string-level", 64, 1.0)  # its time line is not needed
    create_charts.main(["--runs", str(runs), "--out", str(tmp_path / "out")])
    assert "rloo_individual" not in capsys.readouterr().out
    assert (tmp_path / "out/rloo_individual_peak_preserving.png").exists()
