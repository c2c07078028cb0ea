"""What `python -m lowmem.plan` says: the tables and sentences of a terminal, and the same as a dictionary for JSON."""

from dataclasses import asdict

from lowmem.plan_memory import CATEGORIES
from lowmem.plan_verdict import judge

GIB = 2**30


def size(n: float) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def table(step) -> list[str]:
    """Peak by phase and category, in MiB."""
    shown = [name for name in CATEGORIES if any(c.get(name, 0) >= 2**19 for c in step.by_phase.values())]
    lines = ["  ".join([f"{'peak, MiB':<15}", *(f"{name:>11}" for name in shown), f"{'total':>9}"])]
    for phase in ("generate", "score", "train_forward", "train_backward", "optimizer"):
        if phase in step.by_phase:
            values = step.by_phase[phase]
            cells = [f"{values.get(name, 0) / 2**20:>11,.0f}" for name in shown]
            mark = "  <- peak" if phase == step.peak_phase else ""
            lines.append("  ".join([f"{phase:<15}", *cells, f"{sum(values.values()) / 2**20:>9,.0f}"]) + mark)
    if step.workspace_bytes:
        lines.append(f"workspace of kernels on a CPU in half precision: {size(step.workspace_bytes)}")
    return lines


def verdict_lines(verdict) -> list[str]:
    return [
        f"device {size(verdict.device_bytes)}, usable {size(verdict.usable_bytes)}",
        f"simulated {size(verdict.peak_bytes)} + not simulated {size(verdict.unseen_bytes)} ({verdict.source})",
        f"verdict: {verdict.verdict}, margin {size(verdict.margin_bytes)}",
    ]


def host_lines(host) -> list[str]:
    parts = [f"process {size(host.process_bytes)}", f"DataLoader workers {size(host.workers_bytes)}"]
    parts += [f"loading {size(host.loading_bytes)}"]
    if host.offload_bytes:
        parts.append(f"offloaded optimizer {size(host.offload_bytes)}")
    fits = "fits" if host.peak_bytes <= 0.8 * host.limit_bytes else "above 80 % of it"
    if host.peak_bytes > host.limit_bytes:
        fits = "does not fit"
    return [
        f"host {size(host.peak_bytes)}: {', '.join(parts)} (one worker {size(host.worker_bytes)}, measured here)",
        f"host limit {size(host.limit_bytes)} ({host.limit_source}): {fits}",
    ]


def fix_lines(fixes, refused, device, unseen) -> list[str]:
    lines = ["fixes, each simulated:"]
    for fix in fixes:
        ratio = "time not known" if fix.time_ratio is None else f"operations x{fix.time_ratio:.2f}"
        verdict = "" if device is None else judge(fix.step.needed_bytes, device, unseen).verdict
        note = f" ({fix.note})" if fix.note else ""
        lines.append(f"  {fix.name:<32} saves {size(fix.saved_bytes):>11}  {ratio:<17} {verdict}{note}")
    return lines + [f"  not possible: {reason}" for reason in refused]


def report_lines(planned) -> list[str]:
    """The whole report; `planned` is a `lowmem.plan.Planned`."""
    plan, step, verdict = planned.plan, planned.step, planned.verdict
    lines = [planned.found] if planned.found else []
    lines += [
        f"{plan.model or planned.model_type}: {step.parameters:,} parameters, {step.trainable:,} trained, "
        f"{plan.dtype}; {plan.method}, {plan.rows_per_step} rows of {plan.prompt_tokens} + "
        f"{plan.response_tokens} tokens, {plan.micro_batch_rows} at once",
        *table(step),
        *(verdict_lines(verdict) if verdict else [f"peak {size(step.peak_bytes)} of tensors in {step.peak_phase}"]),
        *host_lines(planned.host),
    ]
    if planned.fixes or planned.refused:
        device = verdict and verdict.device_bytes
        lines += fix_lines(planned.fixes, planned.refused, device, planned.unseen)
    return [*lines, f"simulated in {step.wall_s:.1f} s, {step.num_ops:,} operators"]


def as_json(planned) -> dict:
    step, _verdict = planned.step, planned.verdict
    return {
        "found": planned.found,
        "plan": asdict(planned.plan),
        "parameters": step.parameters,
        "trainable": step.trainable,
        "peak_bytes": step.peak_bytes,
        "peak_phase": step.peak_phase,
        "bytes_by_phase": step.by_phase,
        "workspace_bytes": step.workspace_bytes,
        "train_flops": step.train_flops,
        "verdict": asdict(planned.verdict) | {"margin_bytes": planned.verdict.margin_bytes}
        if planned.verdict
        else None,
        "host": asdict(planned.host) | {"peak_bytes": planned.host.peak_bytes},
        "fixes": [
            {"name": f.name, "changes": f.changes, "saved_bytes": f.saved_bytes, "time_ratio": f.time_ratio}
            for f in planned.fixes
        ],
        "wall_s": step.wall_s,
    }
