"""Several completions in a row equal one in a row and plain rows, for every type that is said to, and are worth it."""

import dataclasses
import random

import pytest
import torch
from test_shared_prefix import assert_equals_plain, make_lora_model
from test_shared_prefix_models import MODELS, Float64Everywhere, make_groups, make_model
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lowmem import shared_prefix_prompt
from lowmem.live_bytes import LiveBytes
from lowmem.logprobs import add_logprob_head
from lowmem.shared_prefix import PromptGroup, shared_prefix_scores
from lowmem.shared_prefix_packing import PACKED_MODEL_TYPES, can_pack, cheapest_rows, deal, pack_rows
from lowmem.shared_prefix_prompt import SharedPrompt, score_chunks, score_logits
from lowmem.shared_prefix_self_check import IN_ONE_ROW, SharedPrefixMismatch, check_shared_prefix

CHANGES = {name: changes for name, changes in MODELS.values()} | {
    "mistral": {"sliding_window": None},
    "granite": {"logits_scaling": 3.0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    "qwen3": {},
}


@pytest.fixture(params=[1, 2], ids=["in one row", "in two rows"])
def packed(monkeypatch, request):
    """Packs the completions of every micro-batch into one row or two, and makes sure that it happened."""
    layouts = []

    def count(completions, num_rows, *args):
        layouts.append((len(completions), num_rows))
        return pack_rows(completions, num_rows, *args)

    monkeypatch.setattr(shared_prefix_prompt, "cheapest_rows", lambda _, lengths: min(request.param, len(lengths)))
    monkeypatch.setattr(shared_prefix_prompt, "pack_rows", count)
    yield
    assert any(num_rows == request.param < num for num, num_rows in layouts), layouts


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
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_every_number_of_rows_gives_the_same(num_rows, attention):
    model = make_model("qwen3", attn_implementation=attention)
    for group in make_groups([(23, (7, 12, 1, 5)), (1, (6, 3, 3, 2))]):  # also behind a prompt of one token
        with Float64Everywhere(), torch.no_grad(), SharedPrompt(model, group.prompt_ids) as prompt:
            alone, entropies, mask = prompt.score(group.completions, scores_with_entropy, 4)
            together, entropies_together, same_mask = prompt.score(group.completions, scores_with_entropy, num_rows)
        assert torch.equal(mask, same_mask)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(entropies_together, entropies, rtol=0, atol=1e-12)
        assert (together[~mask] == 0).all() and (entropies_together[~mask] == 0).all()


def scores_with_entropy(model, inputs, labels):
    return score_logits(model, inputs, labels, with_entropy=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_their_own_match_plain(attention, monkeypatch):
    """Where `share_rows=False` says so, though the lengths would have them packed."""
    monkeypatch.setattr(shared_prefix_prompt, "cheapest_rows", lambda *args: pytest.fail("packed"))
    model = make_model("qwen3", attn_implementation=attention)
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), share_rows=False)
        shared_prefix_scores(model, make_groups(), share_rows=False)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["mask", "positions", "starts"])
def test_a_fault_in_the_rows_is_seen(fault, dtype, monkeypatch):
    """Negative control, of the tests above and of the self-check alike: in rows of several completions only."""

    def faulty(completions, num_rows, *args):
        rows = pack_rows(completions, num_rows, *args)
        if num_rows == len(completions):
            return rows
        changes = {
            "mask": {"attention_mask": rows.attention_mask * 0},
            "positions": {"position_ids": rows.position_ids[:, :1] + torch.arange(rows.position_ids.shape[1])},
            "starts": {"starts": rows.starts.clamp(max=0)},
        }[fault]
        return dataclasses.replace(rows, **changes)

    model, group = make_model("qwen3", dtype), group_of_four()
    check_shared_prefix(model, group)
    monkeypatch.setattr(shared_prefix_prompt, "pack_rows", faulty)
    for completions in (group.completions, group.completions[:1]):  # a group of one is checked for groups of several
        with pytest.raises(SharedPrefixMismatch, match="exceeds"):
            check_shared_prefix(model, PromptGroup(group.prompt_ids, completions))
    with pytest.raises(SharedPrefixMismatch, match=f"exceeds [^;]*{IN_ONE_ROW}") as error:
        check_shared_prefix(model, group)
    assert str(error.value).count("exceeds") == str(error.value).count(IN_ONE_ROW)
    check_shared_prefix(model, group, share_rows=False)
    if dtype == torch.float64:
        monkeypatch.setattr(shared_prefix_prompt, "cheapest_rows", lambda *args: 1)
        with pytest.raises(AssertionError):
            assert_equals_plain(model, [group])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_wrong_in_shared_rows_only_is_seen(dtype, monkeypatch):
    """The log-probabilities are right here."""

    def faulty(completions, num_rows, *args):
        rows = pack_rows(completions, num_rows, *args)
        if num_rows < len(completions):
            right = rows.unpack
            rows.unpack = lambda *args: 2 * right(*args) - right(*args).detach()
        return rows

    monkeypatch.setattr(shared_prefix_prompt, "pack_rows", faulty)
    model, group = make_model("qwen3", dtype), group_of_four()
    with pytest.raises(SharedPrefixMismatch, match=f"differ: grad_error exceeds [^;]*{IN_ONE_ROW}"):
        check_shared_prefix(model, group)
    check_shared_prefix(model, group, share_rows=False)


def test_a_branch_forward_with_values_of_another_shape_is_refused():
    def one_too_many(model, inputs, labels):
        logps, _ = score_logits(model, inputs, labels)
        return torch.nn.functional.pad(logps, (1, 0)), None

    with pytest.raises(ValueError, match="one value for every label"):
        shared_prefix_scores(make_model("qwen3"), make_groups(), branch_forward=one_too_many, self_check=False)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_rows_that_cannot_be_are_refused(num_rows):
    group = group_of_four()
    with torch.no_grad(), SharedPrompt(make_model("gemma3"), group.prompt_ids) as prompt:
        with pytest.raises(ValueError, match="of a model that cannot share a row"):
            prompt.score(group.completions, score_logits, num_rows)


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


class OwnAttention(Qwen3Attention):
    pass


class OwnModel(Qwen3ForCausalLM):
    pass


@pytest.mark.parametrize("own", ["another attention", "sdpa", "eager", "mask", "module", "model", "layers"])
def test_what_is_the_users_own_is_not_packed(own, monkeypatch):
    model = make_model("qwen3", attn_implementation="eager" if own == "eager" else "sdpa")
    assert can_pack(model)
    if own in ("another attention", "sdpa", "eager"):
        name = own.replace(" ", "_")
        monkeypatch.setitem(AttentionInterface._global_mapping, name, lambda *args, **kwargs: None)
        model.set_attn_implementation(name)
    elif own == "mask":
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)
    elif own == "layers":
        model.config.layer_types[1] = "sliding_attention"
    else:
        part, own_class = (model.model.layers[1].self_attn, OwnAttention) if own == "module" else (model, OwnModel)
        monkeypatch.setattr(part, "__class__", own_class)
    assert not can_pack(model)


@pytest.mark.parametrize(
    ("num_prefix", "length", "num_completions", "num_rows"),
    [(3072, 53, 8, 1), (3072, 53, 16, 2), (1024, 53, 8, 2), (1024, 128, 4, 2), (3072, 256, 4, 4), (1024, 1024, 8, 8)],
)
def test_completions_share_a_row_while_copies_cost_more_than_their_pairs(
    num_prefix, length, num_completions, num_rows
):
    assert cheapest_rows(num_prefix, [length] * num_completions) == num_rows


def test_rows_hold_no_more_tokens_than_one_for_each_completion():
    generator = random.Random(0)
    for _ in range(300):
        lengths = [generator.randint(1, 60) for _ in range(generator.randint(1, 20))]
        num_prefix = generator.choice([0, 5, 300, 5000])
        num_rows = cheapest_rows(num_prefix, lengths)
        dealt = deal(len(lengths), num_rows)
        assert sorted(index for row in dealt for index in row) == list(range(len(lengths)))
        assert num_rows * max(sum(lengths[i] for i in row) for row in dealt) <= len(lengths) * max(lengths)
    assert cheapest_rows(7268, [341] * 3) != 2  # one completion of padding


def test_a_packed_row_holds_less_than_a_row_for_each():
    """Of the prompt's keys and values one copy, whatever the number of completions."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 211}
    model = make_model("qwen3", torch.float32, **sizes, max_position_embeddings=1024)
    group = make_groups([(600, (8,) * 16)])[0]
    peaks = {}
    for num_rows in (16, 1):
        meter = LiveBytes()
        meter.track([*model.parameters(), *model.buffers()])
        with meter, SharedPrompt(model, group.prompt_ids) as prompt:
            bytes_before = meter.live_bytes
            meter.peak_bytes = bytes_before
            prompt.score(group.completions, score_logits, num_rows)[0].sum().backward()
            peaks[num_rows] = meter.peak_bytes - bytes_before
        model.zero_grad()
    print(peaks)
    assert peaks[1] < 0.5 * peaks[16]
