"""Several completions in a row equal one in a row and plain rows, for every type that is said to, and are worth it."""

import dataclasses

import pytest
import torch
from test_shared_prefix import assert_equals_plain, make_lora_model
from test_shared_prefix_models import MODELS, Float64Everywhere, make_groups, make_model
from transformers import AttentionInterface

from lowmem import shared_prefix_packing, shared_prefix_prompt
from lowmem.live_bytes import LiveBytes
from lowmem.logprobs import add_logprob_head
from lowmem.shared_prefix import PromptGroup, shared_prefix_backward
from lowmem.shared_prefix_packing import PACKED_MODEL_TYPES, can_pack, completions_per_row, pack_rows
from lowmem.shared_prefix_prompt import SharedPrompt, score_chunks, score_logits
from lowmem.shared_prefix_self_check import SharedPrefixMismatch, check_shared_prefix

CHANGES = {name: changes for name, changes in MODELS.values()} | {
    "mistral": {"sliding_window": None},
    "granite": {"logits_scaling": 3.0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "qwen3": {},
}


@pytest.fixture
def packed(monkeypatch):
    """Packs all completions of a micro-batch into one row, and says so."""
    monkeypatch.setattr(shared_prefix_packing, "PAIRS_PER_COPY", 10**6)
    counts = []

    def count(completions, per_row, *args):
        counts.append(per_row)
        return pack_rows(completions, per_row, *args)

    monkeypatch.setattr(shared_prefix_prompt, "pack_rows", count)
    yield counts
    assert max(counts, default=0) > 1, "nothing was packed"


def group_of_four():
    return make_groups([(23, (7, 12, 1, 5))])[0]


@pytest.mark.parametrize("name", sorted(PACKED_MODEL_TYPES))
def test_packed_rows_match_plain(name, packed):
    model = make_model(name, **CHANGES.get(name, {}))
    assert can_pack(model)
    with Float64Everywhere():
        assert_equals_plain(model, make_groups())
    model.activation_checkpointing_enable()
    assert_equals_plain(model.float(), make_groups(), dtype=torch.float32, max_branches=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("per_row", [1, 2, 3, 4])
def test_every_number_of_completions_in_a_row_gives_the_same(per_row, attention):
    model = make_model("qwen3", attn_implementation=attention)
    for group in make_groups([(23, (7, 12, 1, 5)), (1, (6, 3, 3, 2))]):  # also behind a prompt of one token
        with Float64Everywhere(), torch.no_grad(), SharedPrompt(model, group.prompt_ids) as prompt:
            alone, entropies, mask = prompt.score(group.completions, scores_with_entropy, 1)
            together, entropies_together, same_mask = prompt.score(group.completions, scores_with_entropy, per_row)
        assert torch.equal(mask, same_mask)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(entropies_together, entropies, rtol=0, atol=1e-12)
        assert (together[~mask] == 0).all() and (entropies_together[~mask] == 0).all()


def scores_with_entropy(model, inputs, labels):
    return score_logits(model, inputs, labels, with_entropy=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_packed_rows_match_plain_with_lora(checkpointing, packed):
    model = make_lora_model("all-linear", torch.float64)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), "grpo")


def test_packed_rows_match_plain_with_the_chunked_head(packed):
    model = make_model("qwen3")
    add_logprob_head(model)
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), branch_forward=score_chunks)


@pytest.mark.parametrize("fault", ["mask", "positions", "starts"])
def test_a_fault_in_the_rows_is_seen(fault, monkeypatch):
    """Negative control, of the test above and of the self-check alike."""

    def faulty(*args):
        rows = pack_rows(*args)
        changes = {
            "mask": {"attention_mask": rows.attention_mask * 0},
            "positions": {"position_ids": rows.position_ids[:, :1] + torch.arange(rows.position_ids.shape[1])},
            "starts": {"starts": rows.starts.clamp(max=0)},
        }[fault]
        return dataclasses.replace(rows, **changes)

    model, group = make_model("qwen3"), group_of_four()
    check_shared_prefix(model, group)
    monkeypatch.setattr(shared_prefix_prompt, "pack_rows", faulty)
    monkeypatch.setattr(shared_prefix_packing, "PAIRS_PER_COPY", 10**6)
    with pytest.raises(SharedPrefixMismatch, match="logp_error_max exceeds"):
        check_shared_prefix(model, group)
    with pytest.raises(AssertionError):
        assert_equals_plain(model, [group])


NOT_PACKED = {
    "mistral": {},
    "gemma2": {},
    "gemma3": {},
    "bloom": {"n_head": 4, "attn_implementation": "eager"},
    "gpt_neox": {},
    "starcoder2": {},
}


@pytest.mark.parametrize(("name", "changes"), NOT_PACKED.items(), ids=NOT_PACKED)
def test_windows_and_types_that_were_not_compared_are_not_packed(name, changes):
    assert not can_pack(make_model(name, **changes))


def test_an_attention_of_the_users_own_is_not_packed():
    AttentionInterface.register("of_the_user", lambda *args, **kwargs: None)
    model = make_model("qwen3")
    assert can_pack(model)
    model.set_attn_implementation("of_the_user")
    assert not can_pack(model)


@pytest.mark.parametrize(
    ("num_prefix", "length", "num_completions", "per_row"),
    [(3072, 53, 8, 8), (3072, 53, 9, 5), (1024, 53, 8, 4), (1024, 128, 4, 2), (1024, 1024, 8, 1), (0, 5, 4, 1)],
)
def test_completions_share_a_row_while_copies_cost_more_than_their_pairs(num_prefix, length, num_completions, per_row):
    assert completions_per_row(num_prefix, [length] * num_completions) == per_row  # rows are filled evenly


def test_a_packed_row_holds_less_than_a_row_for_each():
    """Of the prompt's keys and values one copy, whatever the number of completions."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 211}
    model = make_model("qwen3", torch.float32, **sizes, max_position_embeddings=1024)
    group = make_groups([(600, (8,) * 16)])[0]
    peaks = {}
    for per_row in (1, 16):
        meter = LiveBytes()
        meter.track([*model.parameters(), *model.buffers()])
        with meter, SharedPrompt(model, group.prompt_ids) as prompt:
            bytes_before = meter.live_bytes
            meter.peak_bytes = bytes_before
            prompt.score(group.completions, score_logits, per_row)[0].sum().backward()
            peaks[per_row] = meter.peak_bytes - bytes_before
        model.zero_grad()
    print(peaks)
    assert peaks[16] < 0.5 * peaks[1]


def test_a_group_of_one_is_one_row():
    model = make_model("qwen3")
    group = PromptGroup(group_of_four().prompt_ids, group_of_four().completions[:1])
    shared_prefix_backward(model, [group], lambda scores: scores.logps.sum(), self_check=True)
