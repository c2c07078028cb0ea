"""The guideline's five steps for a new model, as one command that ends with a written configuration.

1. small start; 2. a quarter more while the memory allows; 3. the fastest of what fits; 4. a longer run of it, watched
for a leak; 5. the settings written, with what was measured. The command has to take `--config FILE --record FILE` and
any setting as an option, and leave a record as docs/measuring.md describes, which experiments/train.py does. The
effective batch never changes: only the rows that are held at once do.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from lowmem.failures import leak
from lowmem.watched_run import WatchedRun, watch, window_peaks

FRACTION = 0.85  # of the memory: the upper end of the guideline's target
GROWTH = 1.25
STABILITY_FACTOR = 3


def divisors(rows: int) -> list[int]:
    return [n for n in range(1, rows + 1) if rows % n == 0]


def next_size(size: int, rows: int) -> int | None:
    """The smallest divisor of the step's rows that is a quarter larger; None at the end."""
    return next((n for n in divisors(rows) if n >= GROWTH * size), None)


def peak_of(record: dict, run: WatchedRun) -> int | None:
    """Bytes: what CUDA's allocator held, else live tensors, else resident memory from outside."""
    found = record.get("summary") or {}
    for name in ("cuda_peak_reserved_bytes", "live_peak_bytes"):
        if found.get(name):
            return found[name]
    return max(run.rss_bytes, default=None)


def workflow(
    command: list[str],
    settings: dict,
    limit_bytes: int,
    write: Path,
    *,
    key: str = "rows_per_micro_batch",
    rows: int,
    start: int = 4,
    say: Callable[[str], None] = print,
) -> dict:
    """Runs the five steps and returns the written settings.

    Args:
        command: how to train, without settings.
        settings: of the YAML file.
        limit_bytes: memory of the device.
        key: the setting that says how many rows are held at once; must divide `rows`.
        rows: rows of an optimizer step.

    Raises:
        ValueError: if not even the smallest start fits, the run fails for another reason, or memory leaks.
    """

    def one(size: int, **extra) -> tuple[dict, WatchedRun]:
        with tempfile.TemporaryDirectory() as folder:
            file, record_file = Path(folder) / "settings.yaml", Path(folder) / "record.json"
            file.write_text(yaml.safe_dump(settings | {key: size} | extra))
            run = watch([*command, "--config", str(file), "--record", str(record_file)], show=False)
            try:
                record = json.loads(record_file.read_text())
            except (OSError, ValueError):
                last = run.log.strip().splitlines()[-1:] or ["it said nothing"]
                raise ValueError(f"the command left no record with {key} = {size}: {last[0][:300]}") from None
        if record.get("status") not in ("ok", "oom"):
            raise ValueError(f"the run with {key} = {size} failed: {record.get('error')}")
        return record, run

    def measure(size: int) -> dict:
        record, run = one(size)
        peak = peak_of(record, run)
        step_s = (record.get("summary") or {}).get("step_time_median_s")
        fits = record["status"] == "ok" and peak is not None and peak <= FRACTION * limit_bytes
        state = (
            "fits" if fits else "out of memory" if record["status"] == "oom" else f"above {FRACTION:.0%} of the device"
        )
        pace = f", {step_s:.2f} s a step" if step_s else ""
        say(f"  {key} {size}: peak {(peak or 0) / 2**20:.0f} MiB{pace}: {state}")
        return {"size": size, "peak_bytes": peak, "step_time_s": step_s, "fits": fits}

    say("1. small start")
    size = max(n for n in divisors(rows) if n <= start)
    tried = [measure(size)]
    while not tried[-1]["fits"] and size > 1:
        size = max(n for n in divisors(rows) if n < size)
        tried.append(measure(size))
    if not tried[-1]["fits"]:
        raise ValueError(f"not even {key} = 1 fits; ask `python -m lowmem.plan --recommend` for other settings")
    say("2. a quarter more, while the memory allows")
    while (size := next_size(tried[-1]["size"], rows)) is not None and tried[-1]["fits"]:
        tried.append(measure(size))
    say("3. the fastest that fits")
    fitting = [entry for entry in tried if entry["fits"]]
    if all(entry["step_time_s"] for entry in fitting):
        best = min(fitting, key=lambda entry: entry["step_time_s"])
    else:
        best = max(fitting, key=lambda entry: entry["size"])
        say("  no step times were recorded (a run of one step has none): the largest is taken")
    say(f"  {key} {best['size']}")
    say("4. stability")
    steps = max(STABILITY_FACTOR * settings.get("steps", 3), 6)
    record, run = one(best["size"], steps=steps)
    if record["status"] != "ok":
        raise ValueError(f"{key} = {best['size']} ran out of memory in a longer run of {steps} steps")
    slope = leak(window_peaks(run.rss_bytes))
    if slope is not None:
        raise ValueError(
            f"resident memory rises by {slope / 2**20:.1f} MiB a tenth of the second half of {steps} steps: a leak; "
            "look for tensors that are kept with their graphs"
        )
    say(f"  {steps} steps without a leak")
    final = settings | {key: best["size"]}
    measured = f"# {key} {best['size']}: peak {best['peak_bytes'] / 2**20:.0f} MiB of {limit_bytes / 2**20:.0f}"
    write.write_text(f"{measured}, {steps} steps without a leak\n{yaml.safe_dump(final, sort_keys=False)}")
    say(f"5. settings written to {write}")
    return final
