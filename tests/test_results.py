"""The committed figures: every value in the README's table is that of a recorded run, and the records are whole."""

import csv
import re

import pytest
from conftest import ROOT

from visualization.combine_memory_data import load_records

TABLE = ROOT / "results/peak_memory.csv"


@pytest.fixture(scope="module")
def peaks() -> dict:
    with open(TABLE) as file:
        return {(row["workload"], int(row["k"]), row["variant"]): row for row in csv.DictReader(file)}


def readme_rows() -> list[dict]:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    header = next(line for line in lines if "workload" in line)
    names = [cell.strip(" `") for cell in header.strip("|").split("|")]
    body = lines[lines.index(header) + 2 :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    return [dict(zip(names, row)) for row in rows if len(row) == len(names) and row[1].isdigit()]


def test_readme_table_is_that_of_the_records(peaks):
    rows = readme_rows()
    assert len(rows) >= 6
    for row in rows:
        k = int(row["k"])
        for variant in ("baseline", "upstream", "upstream@1", "string-level", "shared-prefix"):
            shown, record = row[variant], peaks.get((row["workload"], k, variant))
            if shown == "–":
                assert record is None or record["status"] != "ok", (row, variant)
            elif shown.startswith("OOM"):
                assert record["status"].startswith("oom"), (row, variant)
                ours = peaks[(row["workload"], k, "string-level")]
                expected = float(ours["live_peak_gib"]) / (1 - float(ours["live_reduction"]))
                assert float(re.search(r"([\d.]+)\\\*", shown)[1]) == pytest.approx(expected, rel=5e-3)
            else:
                assert float(shown) == pytest.approx(float(record["live_peak_gib"]), rel=5e-3), (row, variant)


def test_committed_records_are_whole_and_name_no_folder_of_a_machine():
    records = load_records(ROOT / "results/runs/cpu-2core")
    assert len(records) >= 30
    for path in (ROOT / "results/runs/cpu-2core").rglob("*.json"):
        assert not re.search(r'"/(work|root|home|tmp)/', path.read_text()), path


def test_every_chart_of_the_readme_exists():
    for name in re.findall(r"\]\((results/[\w./-]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
