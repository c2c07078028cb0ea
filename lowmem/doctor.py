"""Says why a run failed, from its log, its record or while it runs, and what to do about it.

    python -m lowmem.doctor log train.log --config settings.yaml
    python -m lowmem.doctor record results/runs/cpu-2core/cpu/baseline_k8.json
    python -m lowmem.doctor run -- python train.py
    python -m lowmem.doctor workflow --config experiments/configs/cpu.yaml --device 1GiB --write settings.yaml \\
        -- python experiments/train.py --variant string-level

With --config the run is planned, and the remedies for the device are ranked by simulated savings. Exit status: 0
nothing found, 1 something found, 2 bad input.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from lowmem.failures import Finding, leak, of_tensors, read_log, timeline_peaks
from lowmem.remedies import remedies
from lowmem.watched_run import summary, watch, window_peaks

BATCH_KEYS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
BATCH_KEYS += ("dataloader_num_workers",)


def findings_of_record(path: Path) -> list[Finding]:
    """Findings of a record and of the log and the time line beside it.

    Raises:
        ValueError: if it is no record.
    """
    try:
        record = json.loads(path.read_text())
        status, error = record["status"], record["error"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path} is no record of a run ({problem}); docs/measuring.md describes one") from None
    found = read_log(error or "")
    log = path.with_suffix(".log")
    if not found and log.exists():
        found = read_log(log.read_text(errors="replace"))
    if not found and status == "oom":
        on_device = ((record.get("env") or {}).get("device") or "cpu") != "cpu"
        found = [Finding("device out of memory" if on_device else "host out of memory", error)]
    if not found and status not in ("ok", None):
        found = [Finding(f"ended as {status}", error or "without a reason")]
    timeline = path.with_name(f"{path.stem}.timeline.csv")
    if timeline.exists():
        with open(timeline) as rows:
            slope = leak(timeline_peaks(list(csv.DictReader(rows))))
        if slope is not None:
            found.append(Finding("leak", f"{timeline.name}: the peak rises by {slope / 2**20:.1f} MiB a step"))
    return found


def planned_fixes(config: str | dict, cpu: bool) -> tuple[list, dict]:
    """Fixes of the run that `config` (a YAML file, or the settings of a record) describes, simulated, and the settings
    of the file that the planner does not know (batch sizes and workers of the Hugging Face Trainer)."""
    import yaml

    from lowmem.plan_config import PlanConfig, from_training_file
    from lowmem.plan_search import ranked_fixes
    from lowmem.plan_step import simulate

    if isinstance(config, str):
        try:
            settings = yaml.safe_load(Path(config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{config} cannot be read as YAML: {' '.join(str(error).split())}") from None
    else:
        settings = config
    trainer = {key: settings[key] for key in BATCH_KEYS if key in settings}
    plan = PlanConfig(
        **from_training_file({key: v for key, v in settings.items() if key not in BATCH_KEYS}, nearest=True)
    )

    def run(other):
        return simulate(other, cuda=not cpu)

    return ranked_fixes(plan, run(plan), run)[0], trainer


def report(found: list[Finding], settings: dict, fixes: list) -> list[str]:
    lines = []
    for finding in found:
        where = f"line {finding.line_number}: " if finding.line_number else ""
        lines += [f"{finding.kind}", f"  evidence: {where}{finding.line}"]
        if finding.figures:
            sizes = ", ".join(
                f"{name.removesuffix('_bytes').replace('_', ' ')} {n / 2**30:.2f} GiB"
                for name, n in finding.figures.items()
            )
            lines.append(f"  figures: {sizes}")
        if fixes and of_tensors(finding):
            lines.append("  savings are simulated on the planner's own step of the method (docs/planner.md)")
        for number, remedy in enumerate(remedies(finding, settings, fixes), 1):
            changes = ", ".join(f"{key}: {value}" for key, value in remedy.settings.items())
            lines.append(f"  {number}. {remedy.action}: {remedy.reason}" + (f" [{changes}]" if changes else ""))
    return lines


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m lowmem.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = top.add_subparsers(dest="what", required=True)
    plan = argparse.ArgumentParser(add_help=False)
    plan.add_argument("--config", help="YAML of the run: its remedies are then simulated")
    plan.add_argument("--cpu", action="store_true", help="plan with the kernels of the CPU")
    for key in BATCH_KEYS:
        plan.add_argument(f"--{key}", type=int, help="as the run had it")
    log = what.add_parser("log", parents=[plan], help="a log file, - for standard input")
    log.add_argument("file")
    record = what.add_parser("record", parents=[plan], help="a record of experiments/train.py")
    record.add_argument("file")
    run = what.add_parser("run", parents=[plan], help="a command, behind --")
    run.add_argument("--reference_s", type=float, help="step time to compare with, seconds")
    workflow = what.add_parser("workflow", help="the guideline's five steps; a command behind --")
    workflow.add_argument("--config", required=True)
    workflow.add_argument("--device", required=True)
    workflow.add_argument("--write", required=True, help="YAML with the settings that were found")
    workflow.add_argument("--start", type=int, default=4, help="rows of the small start (4)")
    return top


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:split])
    try:
        return run(args, argv[split + 1 :])
    except (ValueError, OSError) as error:
        print(f"lowmem.doctor: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, command: list[str]) -> int:
    if args.what in ("run", "workflow") and not command:
        raise ValueError("there is no command to run; put it behind --, as in: ... -- python train.py")
    if args.what in ("log", "record") and command:
        raise ValueError(f"a command contradicts `{args.what}`, which reads a file; use `run -- COMMAND`")
    if args.what == "workflow":
        return _workflow(args, command)
    settings = {key: getattr(args, key) for key in BATCH_KEYS if getattr(args, key) is not None}
    if args.what == "log":
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(errors="replace")
        found = read_log(text)
        if not found:
            raise ValueError(
                f"{args.file} holds no error that is known here: no out-of-memory, killed worker, broken pipe or "
                f"time-out in {len(text.splitlines())} lines"
            )
    elif args.what == "record":
        found = findings_of_record(Path(args.file))
    else:
        watched = watch(command)
        found = read_log(watched.log) if watched.exit_code else []
        slope = leak(window_peaks(watched.rss_bytes))
        if slope is not None:
            found.append(Finding("leak", f"resident memory rises by {slope / 2**20:.1f} MiB a twentieth of the run"))
        if watched.exit_code and not found:
            last = watched.log.strip().splitlines()[-1:] or ["it said nothing"]
            kind = "host out of memory" if watched.exit_code in (-9, 137) else f"exit code {watched.exit_code}"
            found = [Finding(kind, last[0][:400])]
        print("\n".join(summary(watched, args.reference_s)))
    fixes = []
    source = args.config
    if args.what == "record" and source is None:
        record = json.loads(Path(args.file).read_text())
        source = {key: value for key, value in (record.get("config") or {}).items() if value is not None}
        args.cpu = args.cpu or (record.get("env") or {}).get("device") == "cpu"
    if source and any(of_tensors(finding) for finding in found):
        fixes, of_file = planned_fixes(source, args.cpu)
        settings = of_file | settings
    print("\n".join(report(found, settings, fixes)) if found else "nothing wrong was found")
    return 1 if found else 0


def _workflow(args, command) -> int:
    import yaml

    from lowmem.devices import device_bytes
    from lowmem.workflow import workflow

    try:
        settings = yaml.safe_load(Path(args.config).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{args.config} cannot be read as YAML: {' '.join(str(error).split())}") from None
    rows = settings.get("rloo_k", 4) * settings.get("prompts_per_step", 1)
    workflow(command, settings, device_bytes(args.device), Path(args.write), rows=rows, start=args.start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
