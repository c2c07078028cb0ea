"""Searches over plans: the largest that fits, what a change would save, and the fastest that fits.

Bytes of a phase are affine in rows and in layers, so a few small simulations price many candidates; the peak is the
largest phase. (In branches of a shared prefix nearly: several may share a row.) What is proposed is always simulated
once in full, and the next one tried if the line was wrong.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from lowmem.plan_config import ROLLOUT_METHODS, PlanConfig, changed
from lowmem.plan_models import hidden_layers, with_layers
from lowmem.plan_step import StepMemory, model_config, simulate
from lowmem.plan_verdict import FITS, Unseen, judge, largest_peak

Simulate = Callable[[PlanConfig], StepMemory]
MAXIMIZED = {"k": "rloo_k", "micro_batch": "rows_per_micro_batch", "length": "response_tokens"}
LARGEST = {"k": 4096, "micro_batch": 4096, "length": 131_072}


def phase_bytes(step: StepMemory) -> dict[str, int]:
    """Peaks of the phases, the backward in parts; of a sharded step, which was divided, of whole phases."""
    totals = {phase: sum(categories.values()) for phase, categories in step.by_phase.items()}
    return step.segment_peaks if max(step.segment_peaks.values(), default=0) == max(totals.values()) else totals


def line(x0: float, y0: dict[str, int], x1: float, y1: dict[str, int]) -> Callable[[float], int]:
    """The largest phase at x, each phase on the line through its two points."""

    def peak(x: float) -> int:
        return int(max(y0[p] + (y1[p] - y0[p]) * (x - x0) / (x1 - x0) for p in y0 if p in y1))

    return peak


def with_value(plan: PlanConfig, what: str, value: int) -> PlanConfig:
    if what == "k" and plan.rows_per_micro_batch:
        rows = plan.prompts_per_step * value
        largest = max(r for r in range(1, plan.rows_per_micro_batch + 1) if rows % r == 0)
        return changed(plan, rloo_k=value, rows_per_micro_batch=largest)
    return changed(plan, **{MAXIMIZED[what]: value})


def candidates(plan: PlanConfig, what: str, limit: int | None) -> list[int]:
    """Values that are possible for `what`, ascending: divisors of the step's rows for a micro-batch."""
    if what == "micro_batch":
        return [rows for rows in range(1, plan.rows_per_step + 1) if plan.rows_per_step % rows == 0]
    if what == "k":
        return list(range(2, LARGEST[what] + 1))
    return list(range(1, (limit or LARGEST[what] + plan.prompt_tokens) - plan.prompt_tokens + 1))


def maximize(plan: PlanConfig, what: str, device: int, unseen: Unseen, run: Simulate) -> tuple[int, StepMemory] | None:
    """The largest k, micro-batch or length that fits, and its simulation; None if not even the smallest does.

    Raises:
        ValueError: if `what` changes nothing for the method.
    """
    if what not in MAXIMIZED:
        raise ValueError(f"{what!r} cannot be maximized; expected one of {', '.join(MAXIMIZED)}")
    if what == "k" and plan.method not in ("rloo", "grpo"):
        raise ValueError(f"method {plan.method} has no k to maximize; expected micro_batch or length")
    limit = getattr(model_config(plan).get_text_config(decoder=True), "max_position_embeddings", None)
    values = candidates(plan, what, limit)
    known: dict[int, StepMemory] = {}

    def step_at(value: int) -> StepMemory:
        if value not in known:
            known[value] = run(with_value(plan, what, value))
        return known[value]

    def fits(value: int) -> bool:
        return judge(step_at(value).needed_bytes, device, unseen).verdict == FITS

    if not fits(values[0]):
        return None
    low = 0
    x0 = min(len(values) - 1, 2 if what != "length" else 63)
    x1 = min(len(values) - 1, 2 * x0 + 2)
    high = len(values)
    if x0 < x1:
        peak = line(values[x0], phase_bytes(step_at(values[x0])), values[x1], phase_bytes(step_at(values[x1])))
        inside = [i for i, value in enumerate(values) if judge(peak(value), device, unseen).verdict == FITS]
        guess = inside[-1] if inside else 0
    else:
        guess = len(values) - 1
    # The line is confirmed or corrected by full simulations, in growing steps from its guess and then by halves: a
    # value has to fit, and the one after it must not
    stride, below, above = 1, False, False
    while high - low > 1:
        if fits(values[guess]):
            low, below = guess, True
        else:
            high, above = guess, True
        if below and above:
            guess = (low + high) // 2
        else:
            guess = min(low + stride, high - 1) if below else max(high - stride, low + 1)
            stride *= 2
    return values[low], known[values[low]]


@dataclass
class Fix:
    """A change of the plan, simulated: bytes below the present peak, and training operations against the present's."""

    name: str
    changes: dict
    step: StepMemory
    saved_bytes: int
    time_ratio: float | None
    note: str = ""


def possible_fixes(plan: PlanConfig) -> list[tuple[str, dict, str]]:
    """(name, changes, what they cost beside operations), of those that change something."""
    fixes = []
    decoder = plan.method in ("rloo", "grpo", "ppo")
    if plan.lm_head == "full" and decoder:
        fixes.append(("logits of the completion only", {"lm_head": "completion"}, ""))
    if plan.lm_head != "chunked":
        fixes.append(("chunked log-probabilities", {"lm_head": "chunked"}, ""))
    if plan.method in ("rloo", "grpo") and not plan.shared_prefix and not plan.padded:
        fixes.append(
            ("shared prefix", {"shared_prefix": True, "rows_per_micro_batch": 1}, "two stages, one branch at once")
        )
    if plan.micro_batch_rows > 1:
        half = max(r for r in range(1, plan.micro_batch_rows // 2 + 1) if plan.rows_per_step % r == 0)
        times = plan.rows_per_step // half
        fixes.append(
            (f"micro-batch {half}", {"rows_per_micro_batch": half}, f"accumulated {times} times: the same batch")
        )
    if plan.rollout_rows > 1 and decoder:
        fixes.append(
            (
                f"generate {plan.rollout_rows // 2} rows at once",
                {"rows_per_rollout": plan.rollout_rows // 2},
                "generation takes about twice as many passes",
            )
        )
    if not plan.recomputed_share:
        fixes.append(("gradient checkpointing", {"gradient_checkpointing": True}, ""))
        if plan.attention == "sdpa":
            fixes.append(("recompute all but the attention", {"selective_checkpointing": True}, ""))
    if plan.optimizer != "adamw" and not plan.optimizer.startswith(("sgd", "adafactor")):
        fixes.append(("fused optimizer", {"optimizer": "adamw"}, ""))
    if plan.optimizer == "adamw" and not plan.offload_optimizer and not plan.lora_rank:
        fixes.append(
            ("optimizer on the host", {"offload_optimizer": True}, "steps at the speed of the host; not timed")
        )
    if not plan.lora_rank:
        fixes.append(("LoRA, rank 16", {"lora_rank": 16}, "trains other parameters"))
    if plan.dtype == "float32":
        fixes.append(("bfloat16 weights", {"dtype": "bfloat16"}, "changes the numbers"))
    return fixes


def ranked_fixes(plan: PlanConfig, step: StepMemory, run: Simulate) -> tuple[list[Fix], list[str]]:
    """Every possible fix simulated, largest saving first, and those that cannot be, with the reason."""
    fixes, refused = [], []
    for name, changes, note in possible_fixes(plan):
        try:
            other = run(changed(plan, **changes))
        except (ValueError, NotImplementedError, RuntimeError) as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        ratio = other.train_flops / step.train_flops if other.train_flops and step.train_flops else None
        fixes.append(Fix(name, changes, other, step.peak_bytes - other.peak_bytes, ratio, note))
    return sorted(fixes, key=lambda fix: -fix.saved_bytes), refused


@dataclass
class Recommendation:
    """The cheapest plan that fits, its full simulation, how many candidates were priced, and its training operations
    against those of the cheapest candidate that was priced as fitting."""

    plan: PlanConfig
    step: StepMemory
    tried: int
    time_ratio: float | None


def recommend(
    plan: PlanConfig,
    device: int,
    unseen: Unseen,
    run: Simulate,
    *,
    cuda: bool,
    allowed: Callable[[PlanConfig], bool] | None = None,
) -> Recommendation | None:
    """The cheapest plan that fits, over recomputation x micro-batch x optimizer x LoRA x strategies.

    Cheapest: first what trains the same parameters on the device, then fewest operations, then the largest
    micro-batch. LoRA (other parameters) and the host's optimizer (not timed) only where nothing else fits.
    Steps on the GPU are not timed; operations are.

    Args:
        allowed: which plans may be recommended; all by default.
    """
    drastic = [{}] + ([{"offload_optimizer": True}] if plan.optimizer == "adamw" and not plan.lora_rank else [])
    drastic += [{"lora_rank": 16}] if not plan.lora_rank else []
    tried = 0
    for extra in drastic:
        bases = [extra | base for base in strategies(plan)]
        bases = [base for base in bases if allowed is None or allowed(changed(plan, **base))]
        limit = largest_peak(device, unseen)
        priced = [candidate for base in bases for candidate in _priced(plan, base, cuda, limit)]
        tried += len(priced)
        fitting = [c for c in priced if judge(c[0], device, unseen).verdict == FITS]
        off = 1.0  # how much a full simulation was above the line
        for peak, flops, changes in sorted(fitting, key=lambda c: (round(c[1], -9), -c[2]["rows_per_micro_batch"])):
            if judge(int(peak * off), device, unseen).verdict != FITS:
                continue
            proposal = changed(plan, **changes)
            step = run(proposal)
            if judge(step.needed_bytes, device, unseen).verdict == FITS:
                least = min(c[1] for c in fitting)
                return Recommendation(proposal, step, tried, flops / least if 0 < least < float("inf") else None)
            off = max(off, step.needed_bytes / peak)
    return None


def strategies(plan: PlanConfig) -> list[dict]:
    """Changes of recomputation, LM head and shared prefix that are possible for the plan, the given ones first."""
    given = ("gradient_checkpointing", "gradient_checkpointing_ratio", "selective_checkpointing")
    recompute = [{name: getattr(plan, name) for name in given}]
    if plan.attention == "sdpa":
        recompute.append(dict(zip(given, (False, None, True))))
    recompute.append(dict(zip(given, (True, None, False))))
    decoder = not model_config(plan).is_encoder_decoder
    heads = (["completion"] if plan.method in ROLLOUT_METHODS else ["full"]) + (["chunked"] if decoder else [])
    shared = [plan.shared_prefix]
    if plan.method in ("rloo", "grpo") and not plan.padded:
        shared = [False, True]
    out = []
    for parts in itertools.product(recompute, heads, shared):
        changes = parts[0] | {"lm_head": parts[1], "shared_prefix": parts[2]}
        if changes not in out:
            out.append(changes)
    return out


def _priced(plan: PlanConfig, base: dict, cuda: bool, limit: int) -> list[tuple[int, float, dict]]:
    """(peak bytes, operations, changes) of every micro-batch size, from two sizes simulated at two depths; only the
    smallest where that is above the limit, and nothing for what cannot be simulated."""
    sizes = [rows for rows in range(1, plan.rows_per_step + 1) if plan.rows_per_step % rows == 0]
    sizes = [rows for rows in sizes if rows & (rows - 1) == 0 or rows == plan.rows_per_step]
    points = []
    try:
        for rows in sizes[:2]:
            points.append(at_depth(changed(plan, **base, rows_per_micro_batch=rows), cuda))
            if max(points[0][0].values()) > limit:
                sizes = sizes[:1]
                break
    except (ValueError, NotImplementedError, RuntimeError):
        return []
    if len(points) == 1:
        peak = line(0, points[0][0], 1, points[0][0])
    else:
        peak = line(sizes[0], points[0][0], sizes[1], points[1][0])
    flops = points[0][1] or float("inf")
    return [(peak(rows), flops, base | {"rows_per_micro_batch": rows}) for rows in sizes]


def at_depth(plan: PlanConfig, cuda: bool) -> tuple[dict[str, int], float | None]:
    """Bytes by phase and operations at the full depth, from two shallow simulations (layers 2 and 4)."""
    config = model_config(plan)
    depth = hidden_layers(config)
    if depth <= 6:
        step = simulate(plan, config, cuda=cuda)
        return phase_bytes(step), step.train_flops
    two, four = (simulate(plan, with_layers(config, layers), cuda=cuda) for layers in (2, 4))
    few, more = phase_bytes(two), phase_bytes(four)
    phases = {name: int(few[name] + (more[name] - few[name]) * (depth - 2) / 2) for name in few if name in more}
    if None in (two.train_flops, four.train_flops):
        return phases, None
    return phases, two.train_flops + (four.train_flops - two.train_flops) * (depth - 2) / 2
