"""Which memory strategy for which case: settings, what contradicts what, and the choice.

    given = parse_memory_settings({"auto_memory_strategy": True, "selective_checkpointing": True})
    choice = choose_memory_strategy(given, num_processes=2, longest_tokens=14_000)
    print(choice)            # what was chosen, and why
    choice.settings          # every field decided

Without a budget three rules decide (docs/memory_strategies.md):

| case | what is chosen |
|---|---|
| one process | gradients and AdamW on the host |
| several processes, short sequences | ZeRO-2: every process keeps and offloads its own part of the gradients |
| several processes, long sequences | sequences split over the processes, and ZeRO-2 with offload |

With a budget and a predictor of the peak, the cheapest combination that fits is chosen: combinations are tried in the
order of what they cost (`candidates`). What was set by hand is never changed.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

GIB = 2**30
LONG_SEQUENCE_TOKENS = 8192  # from here on the activations of a sequence outweigh gradients


class MemorySettingsError(ValueError):
    """Settings of the `memory:` section that are unknown, of a wrong type, or contradict each other."""


@dataclass(frozen=True)
class MemorySettings:
    """The `memory:` section. None means not set: off, or left to `auto_memory_strategy`.

    Attributes:
        grad_offload: keep gradients, float32 weights and AdamW's state on the host and step there (DeepSpeed).
        gradient_checkpointing_ratio: share of layers that the backward recomputes, 0 to 1.
        zero2_gradient_sharding: every process keeps 1/N of gradients and optimizer state (DeepSpeed ZeRO-2).
        selective_checkpointing: recomputed layers keep their attention.
        sequence_parallelism: processes that split a sequence; True is all of them, False and 1 none.
        auto_memory_strategy: decide what is not set.
        activation_offloading: move activations to the host between forward and backward.
        oom_recovery: repeat a training step that is out of memory in parts.
        num_processes: how many have to be running; None takes what runs.
        long_sequence_tokens: from how many tokens on a sequence is long, for the rules.
    """

    grad_offload: bool | None = None
    gradient_checkpointing_ratio: float | None = None
    zero2_gradient_sharding: bool | None = None
    selective_checkpointing: bool | None = None
    sequence_parallelism: int | bool | None = None
    auto_memory_strategy: bool = False
    activation_offloading: bool | None = None
    oom_recovery: bool | None = None
    num_processes: int | None = None
    long_sequence_tokens: int = LONG_SEQUENCE_TOKENS

    def sequence_parallel_size(self, num_processes: int) -> int:
        if self.sequence_parallelism is True:
            return num_processes
        return int(self.sequence_parallelism or 1)

    @property
    def uses_deepspeed(self) -> bool:
        return bool(self.grad_offload or self.zero2_gradient_sharding)

    def describe(self) -> str:
        """The strategies that are on, by name."""
        names = ("grad_offload", "zero2_gradient_sharding", "selective_checkpointing")
        parts = [name for name in (*names, "activation_offloading", "oom_recovery") if getattr(self, name)]
        if self.gradient_checkpointing_ratio:
            parts.append(f"gradient_checkpointing_ratio {self.gradient_checkpointing_ratio:g}")
        if self.sequence_parallelism and self.sequence_parallelism != 1:
            size = "all processes" if self.sequence_parallelism is True else self.sequence_parallelism
            parts.append(f"sequence_parallelism {size}")
        return ", ".join(parts) or "no strategy"


def parse_memory_settings(section: dict | None) -> MemorySettings:
    """The `memory:` section of a configuration file; None and {} switch nothing on.

    Raises:
        MemorySettingsError: for an unknown key, with the nearest name, and for a value of a wrong type or range.
    """
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise MemorySettingsError(f"`memory` is a {type(section).__name__}; names with values expected")
    known = {field.name: field for field in dataclasses.fields(MemorySettings)}
    for name in section:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise MemorySettingsError(f"unknown key {name!r} in `memory`; {hint}")
    for name, setting in section.items():
        if setting is None:
            continue
        if name == "gradient_checkpointing_ratio":
            good, expected = _is_number(setting) and 0 <= setting <= 1, "a share between 0 and 1"
        elif name in ("num_processes", "long_sequence_tokens"):
            good, expected = type(setting) is int and setting >= 1, "a whole number from 1 on"
        elif name == "sequence_parallelism":
            good = isinstance(setting, bool) or (type(setting) is int and setting >= 1)
            expected = "true, false or a number of processes"
        else:
            good, expected = isinstance(setting, bool), "true or false"
        if not good:
            raise MemorySettingsError(f"memory.{name} is {setting!r}; {expected} expected")
    return MemorySettings(**{name: setting for name, setting in section.items() if setting is not None})


def _is_number(setting) -> bool:
    return isinstance(setting, (int, float)) and not isinstance(setting, bool)


def check_memory_settings(settings: MemorySettings, num_processes: int, *, has_accelerator: bool = True) -> None:
    """Raises MemorySettingsError if settings contradict each other or the processes that run, saying what to do."""
    size = settings.sequence_parallel_size(num_processes)
    if settings.num_processes not in (None, num_processes):
        raise MemorySettingsError(
            f"memory.num_processes is {settings.num_processes}, but {num_processes} run. Start them with `torchrun "
            f"--nproc_per_node {settings.num_processes}` (`accelerate launch` with MULTI_CPU starts one)."
        )
    if size > 1 and num_processes % size:
        raise MemorySettingsError(
            f"memory.sequence_parallelism is {size}, but {num_processes} process(es) run, which is no multiple of it. "
            "Start more with torchrun, or lower it."
        )
    if settings.sequence_parallelism is True and num_processes == 1:
        raise MemorySettingsError("memory.sequence_parallelism is true, but one process has nobody to split with")
    if settings.selective_checkpointing and settings.gradient_checkpointing_ratio == 0:
        raise MemorySettingsError(
            "memory.selective_checkpointing chooses what a recomputed layer keeps, but gradient_checkpointing_ratio "
            "is 0: no layer is recomputed. Set the ratio to 1, or leave one of them out."
        )
    if settings.grad_offload and settings.zero2_gradient_sharding is False and num_processes > 1:
        raise MemorySettingsError(
            "memory.grad_offload keeps this process's part of the gradients on the host, so with several processes it "
            "shards them, but zero2_gradient_sharding is false. Leave it out, or turn grad_offload off."
        )
    if settings.zero2_gradient_sharding and num_processes == 1 and not settings.grad_offload:
        raise MemorySettingsError(
            "memory.zero2_gradient_sharding divides gradients over processes, but one runs and grad_offload is off: "
            "nothing would be saved. Turn grad_offload on, or start several processes with torchrun."
        )
    if settings.oom_recovery and (settings.uses_deepspeed or size > 1):
        other = "sequence_parallelism" if size > 1 else "DeepSpeed (grad_offload, zero2_gradient_sharding)"
        raise MemorySettingsError(
            f"memory.oom_recovery and {other} contradict each other: a repeated part would leave the other processes "
            "waiting, or DeepSpeed with half a gradient. Turn one of them off."
        )
    if settings.oom_recovery and settings.activation_offloading:
        raise MemorySettingsError(
            "memory.oom_recovery and memory.activation_offloading contradict each other: what a failed attempt "
            "offloaded would be kept. Turn one of them off; gradient_checkpointing_ratio saves the same memory."
        )
    if settings.activation_offloading and not has_accelerator:
        raise MemorySettingsError(
            "memory.activation_offloading needs an accelerator to offload from, and there is none"
        )


@dataclass(frozen=True)
class MemoryChoice:
    """What was decided.

    Attributes:
        settings: with every strategy on or off.
        reason: one sentence.
        predicted_peak_bytes: of one process, None without a predictor.
        rejected: combinations that were predicted not to fit, `(description, predicted bytes)`.
    """

    settings: MemorySettings
    reason: str
    predicted_peak_bytes: int | None = None
    rejected: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        peak = "not predicted" if self.predicted_peak_bytes is None else f"{self.predicted_peak_bytes / GIB:.3g} GiB"
        return f"memory strategy: {self.settings.describe()} ({self.reason}; predicted peak {peak})"


def choose_memory_strategy(
    given: MemorySettings,
    num_processes: int,
    longest_tokens: int,
    *,
    budget_bytes: int | None = None,
    predict: Callable[[MemorySettings], int] | None = None,
    has_accelerator: bool = True,
) -> MemoryChoice:
    """Decides what `given` leaves open, if it has `auto_memory_strategy`; else everything open is off.

    Args:
        longest_tokens: of a prompt with its completion.
        budget_bytes: memory of one process's device.
        predict: peak bytes of one process under settings.

    Raises:
        MemorySettingsError: if what was given contradicts itself, or nothing that is open makes it fit.
    """
    check_memory_settings(given, num_processes, has_accelerator=has_accelerator)
    if not given.auto_memory_strategy:
        settings = _off_where_open(given)
        return MemoryChoice(settings, "set by hand", None if predict is None else predict(settings))
    if budget_bytes is None or predict is None:
        settings, reason = _by_rule(given, num_processes, longest_tokens)
        check_memory_settings(settings, num_processes, has_accelerator=has_accelerator)
        return MemoryChoice(settings, reason, None if predict is None else predict(settings))
    rejected = []
    for settings in candidates(given, num_processes, has_accelerator=has_accelerator):
        peak = predict(settings)
        if peak <= budget_bytes:
            reason = f"the cheapest of the combinations that fits {budget_bytes / GIB:.3g} GiB"
            return MemoryChoice(settings, reason, peak, tuple(rejected))
        rejected.append((settings.describe(), peak))
    if not rejected:
        raise MemorySettingsError("no combination agrees with what is set by hand in `memory`")
    name, least = min(rejected, key=lambda pair: pair[1])
    raise MemorySettingsError(
        f"no combination fits {budget_bytes / GIB:.3g} GiB; the least, {name}, is predicted at {least / GIB:.3g} GiB. "
        "Lower the rows per micro-batch or the lengths, or start more processes."
    )


def _off_where_open(given: MemorySettings) -> MemorySettings:
    off = {name: getattr(given, name) or False for name in ("grad_offload", "zero2_gradient_sharding")}
    off |= {name: getattr(given, name) or False for name in ("activation_offloading", "oom_recovery")}
    selective = given.selective_checkpointing or False
    ratio = given.gradient_checkpointing_ratio
    off |= {"selective_checkpointing": selective, "sequence_parallelism": given.sequence_parallelism or False}
    off["gradient_checkpointing_ratio"] = (1.0 if selective else 0.0) if ratio is None else ratio
    return dataclasses.replace(given, **off)


def _by_rule(given: MemorySettings, num_processes: int, longest_tokens: int) -> tuple[MemorySettings, str]:
    is_long = longest_tokens >= given.long_sequence_tokens
    length = f"{longest_tokens} tokens, {'long' if is_long else 'short'}: the limit is {given.long_sequence_tokens}"
    if num_processes == 1:
        rule, reason = {"grad_offload": True}, f"one process ({length})"
    elif not is_long:
        rule = {"grad_offload": True, "zero2_gradient_sharding": True}
        reason = f"{num_processes} processes, short sequences ({length})"
    else:
        rule = {"grad_offload": True, "zero2_gradient_sharding": True, "sequence_parallelism": num_processes}
        reason = f"{num_processes} processes, long sequences ({length})"
    if given.oom_recovery:  # set by hand, and it cannot go with the engine
        rule, reason = {}, reason + ", oom_recovery by hand rules out DeepSpeed and sequence parallelism"
    elif given.zero2_gradient_sharding is False and num_processes > 1:
        rule["grad_offload"] = False
    elif given.grad_offload is False and num_processes == 1:
        rule["zero2_gradient_sharding"] = False
    return _with(given, rule), reason


def _with(given: MemorySettings, chosen: dict) -> MemorySettings:
    """`chosen` where `given` is open, off elsewhere."""
    open_fields = {name: setting for name, setting in chosen.items() if getattr(given, name) is None}
    return _off_where_open(dataclasses.replace(given, **open_fields))


def candidates(given: MemorySettings, num_processes: int, *, has_accelerator: bool = True) -> Iterator[MemorySettings]:
    """Combinations that agree with `given`, the cheapest first.

    The order is that of the cost: recomputing MLPs (a sixth more matrix products), whole layers (a quarter more), then
    moving gradients and AdamW to the host, then splitting sequences, which communicates in every layer.
    """
    recompute = [(0.0, False), (0.5, True), (1.0, True), (1.0, False)]
    sharding = [{}, {"grad_offload": True} | ({"zero2_gradient_sharding": True} if num_processes > 1 else {})]
    sizes = [1] + [n for n in range(2, num_processes + 1) if num_processes % n == 0]
    seen = []
    for size in sizes:
        for shards in sharding:
            for ratio, selective in recompute:
                chosen = shards | {"gradient_checkpointing_ratio": ratio, "selective_checkpointing": selective}
                settings = _with(given, chosen | {"sequence_parallelism": size if size > 1 else False})
                try:
                    check_memory_settings(settings, num_processes, has_accelerator=has_accelerator)
                except MemorySettingsError:
                    continue
                if settings not in seen:
                    seen.append(settings)
                    yield settings
