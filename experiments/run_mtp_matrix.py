"""Multi-token-prediction runs one after another, each in a fresh process under the memory monitor.

    python experiments/run_mtp_matrix.py --workload learning --pipelines baseline verifiable rho1 --losses hidden

Options that this program does not know go to experiments/train_mtp.py (`--steps 100`, `--seed 1`, ...). A run is
skipped when its record is whole, ended ok or out of memory, and was made with the same settings and the same library.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from run_matrix import DONE, MALLOC  # noqa: E402

from memory_monitor import run_monitored  # noqa: E402
from mtp_config import LOSSES, PIPELINES, MtpConfig, library_sha256, parse_config  # noqa: E402


def unfinished_reason(path: Path, config: MtpConfig) -> str | None:
    """Why the run of `path` has to be made, or None if it is done."""
    if not path.exists():
        return "missing"
    try:
        record = json.loads(path.read_text())
        if record["status"] not in DONE:
            return f"ended as {record['status']}"
        if record["config"] != asdict(config):
            return "its settings were others"
        if record["env"]["mtp_sha256"] != library_sha256():
            return "the library has changed since"
    except (ValueError, KeyError, TypeError):
        return "its record is not whole"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workload", default="learning", help="a file of experiments/configs/mtp")
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), help=f"of {', '.join(PIPELINES)}")
    parser.add_argument("--losses", nargs="+", default=["hidden"], help=f"of {', '.join(LOSSES)}")
    parser.add_argument("--runs", default="results/runs/local/mtp", help="folder of the records")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a run is ended")
    parser.add_argument("--force", action="store_true", help="make runs again that are done")
    args, options = parser.parse_known_args(argv)
    for word in options:
        if word.partition("=")[0] in ("--pipeline", "--loss", "--config", "--record"):
            parser.error(f"{word} is decided here: use --pipelines, --losses, --workload or --runs")
    file = HERE / f"configs/mtp/{args.workload}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        parser.error(f"unknown workload {args.workload!r}; known: {known} (experiments/configs/mtp/)")

    failed = []
    for pipeline in args.pipelines:
        for loss in args.losses:
            command = [
                "--config",
                os.path.relpath(file, HERE.parent),
                "--pipeline",
                pipeline,
                "--loss",
                loss,
                *options,
            ]
            try:
                config = parse_config(command)
            except ValueError as error:
                print(f"run_mtp_matrix.py: {error}", file=sys.stderr)
                return 2
            path = Path(args.runs) / args.workload / f"{config.run_name}.json"
            config.record = str(path)
            reason = "--force" if args.force else unfinished_reason(path, config)
            label = f"{args.workload}/{config.run_name}"
            print(f"{label}: {'done before' if reason is None else 'running (' + reason + ')'}", flush=True)
            if reason is None:
                continue
            record = run_monitored(
                [sys.executable, "experiments/train_mtp.py", *command, "--record", str(path)],
                path,
                path.with_suffix(".timeline.csv"),
                timeout_s=args.timeout,
                label=label,
                env=dict(os.environ) | MALLOC,
            )
            if unfinished_reason(path, config) is not None:
                failed.append(f"{label}: {record['status']}: {record['error']}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
