"""`lowmem.memory_strategy`: the seed's three cases, overrides, contradictions, and the choice under a budget."""

import dataclasses

import pytest

from lowmem.memory_strategy import (
    GIB,
    MemorySettings,
    MemorySettingsError,
    candidates,
    check_memory_settings,
    choose_memory_strategy,
    parse_memory_settings,
)

AUTO = {"auto_memory_strategy": True}
SHORT, LONG = 2048, 14_000


def choose(section: dict, processes: int = 1, tokens: int = SHORT, **options):
    return choose_memory_strategy(parse_memory_settings(section), processes, tokens, **options)


def on(settings: MemorySettings) -> dict:
    names = [field.name for field in dataclasses.fields(MemorySettings)]
    kept = {name: getattr(settings, name) for name in names if getattr(settings, name)}
    return {name: v for name, v in kept.items() if name not in ("auto_memory_strategy", "long_sequence_tokens")}


@pytest.mark.parametrize(
    "processes, tokens, expected",
    [
        (1, SHORT, {"grad_offload": True}),
        (1, LONG, {"grad_offload": True}),  # the seed's first scenario: one GPU, long sequences, offloading only
        (2, SHORT, {"grad_offload": True, "zero2_gradient_sharding": True}),
        (4, 8191, {"grad_offload": True, "zero2_gradient_sharding": True}),
        (2, LONG, {"grad_offload": True, "zero2_gradient_sharding": True, "sequence_parallelism": 2}),
        (4, 8192, {"grad_offload": True, "zero2_gradient_sharding": True, "sequence_parallelism": 4}),
    ],
)
def test_the_three_cases(processes, tokens, expected):
    choice = choose(AUTO, processes, tokens)
    assert on(choice.settings) == expected
    assert f"{tokens} tokens" in choice.reason and "predicted peak not predicted" in str(choice)


def test_without_auto_nothing_is_chosen():
    assert on(choose({}, 4, LONG).settings) == {}
    assert on(choose(None, 4, LONG).settings) == {}
    choice = choose({"selective_checkpointing": True})
    assert on(choice.settings) == {"selective_checkpointing": True, "gradient_checkpointing_ratio": 1.0}
    assert choice.reason == "set by hand"


@pytest.mark.parametrize(
    "override, processes, expected",
    [
        ({"sequence_parallelism": False}, 2, {"grad_offload": True, "zero2_gradient_sharding": True}),
        ({"sequence_parallelism": 2}, 4, {"grad_offload", "zero2_gradient_sharding", "sequence_parallelism"}),
        ({"grad_offload": False}, 2, {"zero2_gradient_sharding": True, "sequence_parallelism": 2}),
        ({"grad_offload": False}, 1, {}),
        ({"zero2_gradient_sharding": False}, 2, {"sequence_parallelism": 2}),
        ({"oom_recovery": True}, 2, {"oom_recovery": True}),
        (
            {"gradient_checkpointing_ratio": 0.5},
            1,
            {"grad_offload": True, "gradient_checkpointing_ratio": 0.5},
        ),
    ],
    ids=str,
)
def test_what_is_set_by_hand_stays(override, processes, expected):
    settings = choose(AUTO | override, processes, LONG).settings
    assert set(on(settings)) == set(expected)
    assert all(getattr(settings, name) == setting for name, setting in override.items())
    if isinstance(expected, dict):
        assert on(settings) == expected


@pytest.mark.parametrize(
    "section, processes, reason",
    [
        ({"selective_checkpointing": True, "gradient_checkpointing_ratio": 0}, 1, "no layer is recomputed"),
        ({"grad_offload": True, "zero2_gradient_sharding": False}, 2, "leave it out"),
        ({"grad_offload": False, "zero2_gradient_sharding": True}, 1, "nothing would be saved"),
        ({"sequence_parallelism": 3}, 4, "no multiple"),
        ({"sequence_parallelism": 2}, 1, "no multiple"),
        ({"sequence_parallelism": True}, 1, "nobody to split with"),
        ({"oom_recovery": True, "grad_offload": True}, 1, "DeepSpeed"),
        ({"oom_recovery": True, "sequence_parallelism": 2}, 2, "sequence_parallelism contradict"),
        ({"oom_recovery": True, "activation_offloading": True}, 1, "failed attempt"),
        ({"num_processes": 2}, 1, "torchrun --nproc_per_node 2"),
        ({"activation_offloading": True}, 1, "needs an accelerator"),
    ],
    ids=str,
)
@pytest.mark.parametrize("auto", [False, True])
def test_contradictions_are_errors(section, processes, reason, auto):
    with pytest.raises(MemorySettingsError, match=f"(?i){reason}"):
        choose(section | {"auto_memory_strategy": auto}, processes, LONG, has_accelerator=False)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"grad_ofload": True}, "did you mean 'grad_offload'"),
        ({"zero2_sharding": True}, "did you mean 'zero2_gradient_sharding'"),
        ({"selective_checkpoint": True}, "did you mean 'selective_checkpointing'"),
        ({"sequence_parallel": 2}, "did you mean 'sequence_parallelism'"),
        ({"xyz": 1}, "known: grad_offload"),
        ({"grad_offload": "yes"}, "true or false expected"),
        ({"grad_offload": 1}, "true or false expected"),
        ({"gradient_checkpointing_ratio": 1.5}, "between 0 and 1"),
        ({"gradient_checkpointing_ratio": True}, "between 0 and 1"),
        ({"sequence_parallelism": 0}, "number of processes"),
        ({"sequence_parallelism": "2"}, "number of processes"),
        ({"num_processes": 0}, "from 1 on"),
        ([], "names with values expected"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_an_error(section, message):
    with pytest.raises(MemorySettingsError, match=message):
        parse_memory_settings(section)


def peak_gib(states: float, activations: float, processes: int):
    """A simple device: `predict` for states and activations in GiB."""

    def predict(settings: MemorySettings) -> int:
        held = activations / settings.sequence_parallel_size(processes)
        ratio = settings.gradient_checkpointing_ratio or 0.0
        held *= 1 - ratio * (0.7 if settings.selective_checkpointing else 0.9)
        return int(GIB * (held + (states / 4 if settings.grad_offload else states)))

    return predict


@pytest.mark.parametrize(
    "budget, expected",
    [
        (100, {}),
        (15, {"gradient_checkpointing_ratio": 0.5, "selective_checkpointing": True}),
        (11, {"gradient_checkpointing_ratio": 1.0, "selective_checkpointing": True}),
        (9.2, {"gradient_checkpointing_ratio": 1.0}),
        (8.6, {"gradient_checkpointing_ratio": 0.5, "selective_checkpointing": True, "grad_offload": True}),
        (5.1, {"gradient_checkpointing_ratio": 1.0, "selective_checkpointing": True, "grad_offload": True}),
    ],
    ids=str,
)
def test_the_cheapest_combination_that_fits(budget, expected):
    choice = choose(AUTO, budget_bytes=int(budget * GIB), predict=peak_gib(8, 10, 1))
    assert on(choice.settings) == expected
    assert choice.predicted_peak_bytes <= budget * GIB
    assert all(peak > budget * GIB for _, peak in choice.rejected)
    assert f"fits {budget:g} GiB" in str(choice)


def test_sequences_are_split_last():
    """Activations that recomputation cannot bring under the budget."""
    choice = choose(AUTO, 4, budget_bytes=int(2.8 * GIB), predict=peak_gib(8, 20, 4))
    assert choice.settings.sequence_parallelism == 4 and choice.settings.zero2_gradient_sharding
    assert len(choice.rejected) > 8


def test_a_budget_respects_what_is_set_by_hand():
    section = AUTO | {"grad_offload": False, "gradient_checkpointing_ratio": 0.0}
    with pytest.raises(MemorySettingsError, match="no combination fits 11 GiB; the least, no strategy, .* 18 GiB"):
        choose(section, budget_bytes=11 * GIB, predict=peak_gib(8, 10, 1))


@pytest.mark.parametrize("processes", [1, 2, 4, 6])
@pytest.mark.parametrize("section", [{}, {"selective_checkpointing": True}, {"oom_recovery": True}], ids=str)
def test_candidates_agree_with_themselves_and_with_what_is_given(processes, section):
    given = parse_memory_settings(section)
    found = list(candidates(given, processes))
    assert len(found) == len(set(found)) >= 2
    for settings in found:
        check_memory_settings(settings, processes)
        assert all(getattr(settings, name) == setting for name, setting in section.items())
