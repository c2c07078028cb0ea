"""The shared prefix equals k copies: log-probabilities, gradients, weights after real steps.

The whole grid and other architectures: `python -m pytest tests/test_shared_prefix.py -m slow`
"""

import copy
import functools
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_shared_prefix_models import (
    LENGTHS,
    MODELS,
    Float64Everywhere,
    Losses,
    gradients,
    make_groups,
    make_model,
    plain_scores,
    worst_relative_error,
)

from lowmem.logprobs import add_logprob_head
from lowmem.shared_prefix import (
    PromptGroup,
    micro_batches,
    shared_prefix_backward,
    shared_prefix_scores,
)
from lowmem.shared_prefix_prompt import SharedPrompt, score_chunks, score_logits
from lowmem.shared_prefix_self_check import TOLERANCES, check_shared_prefix

# logp in nats, absolute; gradient of the worst parameter, relative to its norm
TOLERANCE = {torch.float64: (1e-12, 1e-10), torch.float32: (1e-5, 1e-4)}
RAGGED_ONE_TOKEN = [*LENGTHS, (1, (6, 3)), (2, (4,))]  # also a prompt of one token, and a group of one


def assert_equals_plain(model, groups, loss_name="pg", *, dtype=torch.float64, **options) -> tuple[float, float]:
    """Returns the largest error of a log-probability, in nats, and the relative one of the worst gradient."""
    losses = Losses(model, groups)
    loss_fn = getattr(losses, loss_name)
    reference = plain_scores(model, groups)
    loss_fn(reference).backward()
    reference_grads = gradients(model)
    loss, scores = shared_prefix_backward(model, groups, loss_fn, self_check=False, **options)
    logp_tolerance, grad_tolerance = TOLERANCE[dtype]
    logp_error = (scores.logps - reference.logps).abs().max().item()
    grad_error = worst_relative_error(gradients(model), reference_grads)
    print(f"logp {logp_error:.1e} grad {grad_error:.1e}")
    assert logp_error <= logp_tolerance
    assert grad_error <= grad_tolerance
    assert torch.equal(scores.mask, reference.mask) and torch.equal(scores.rows, reference.rows)
    torch.testing.assert_close(loss, loss_fn(reference).detach(), rtol=1e-5, atol=logp_tolerance * 10)
    assert not scores.logps.requires_grad and not loss.requires_grad
    return logp_error, grad_error


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_float64_matches_plain(name, checkpointing):
    model = make_model(name)
    if checkpointing:
        model.activation_checkpointing_enable()
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), max_branch_tokens=24)


@pytest.mark.parametrize("name", MODELS)
def test_float32_matches_plain(name):
    model = make_model(name, torch.float32)
    assert_equals_plain(model, make_groups(), dtype=torch.float32, max_branches=2)


@pytest.mark.parametrize("loss_name", ["pg", "rloo", "grpo"])
@pytest.mark.parametrize("num_branches", [1, 2, 4])
def test_losses_and_micro_batches_match_plain(loss_name, num_branches):
    with Float64Everywhere():
        assert_equals_plain(make_model("qwen3"), make_groups(RAGGED_ONE_TOKEN), loss_name, max_branches=num_branches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss_name", "num_branches", "checkpointing"),
    list(itertools.product(MODELS, ["pg", "rloo", "grpo"], [1, 2, 4], [False, True])),
)
def test_grid_matches_plain(name, loss_name, num_branches, checkpointing):
    model = make_model(name)
    if checkpointing:
        model.activation_checkpointing_enable()
    groups = make_groups(RAGGED_ONE_TOKEN)
    with Float64Everywhere():
        assert_equals_plain(model, groups, loss_name, max_branches=num_branches)
    assert_equals_plain(model.float(), groups, "pg", dtype=torch.float32, max_branches=num_branches)


MLA = {
    "head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {}),
        ("gpt_oss", {"attn_implementation": "eager", "sliding_window": 6, "num_local_experts": 4}),
        ("deepseek_v3", MLA),
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2}),
        ("gemma4_text", {"sliding_window": 6, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0}),
        ("cohere2", {"sliding_window": 6}),
        ("granite", {"logits_scaling": 3.0}),
        ("olmo2", {}),
        ("glm4", {}),
        ("starcoder2", {}),
        ("smollm3", {}),
        ("exaone4", {"sliding_window": 6}),
        ("gpt_neox", {}),
        ("bloom", {"n_head": 4, "n_layer": 3, "attn_implementation": "eager"}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_architectures_match_plain(model_type, changes):
    model = make_model(model_type, torch.float32, **changes)
    assert_equals_plain(model, make_groups(), dtype=torch.float32, max_branches=2)
    model.activation_checkpointing_enable()
    assert_equals_plain(model, make_groups(), dtype=torch.float32, max_branches=2)


@pytest.mark.parametrize("part", ["prompt", "branches"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_checkpointing_of_one_part_matches_plain(name, part):
    model, group = make_model(name), make_groups()[0]
    losses = Losses(model, [group])
    with Float64Everywhere():
        losses.pg(plain_scores(model, [group])).backward()
        reference_grads = gradients(model)
        num_forwards = 0

        def count(*args):
            nonlocal num_forwards
            num_forwards += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        if part == "prompt":
            model.activation_checkpointing_enable()
        with SharedPrompt(model, group.prompt_ids) as prompt:
            model.activation_checkpointing_disable()
            if part == "branches":
                model.activation_checkpointing_enable()
            for row, completion in enumerate(group.completions):
                logps, _, _ = prompt.score([completion])
                (-losses.advantages[row] * logps.sum() / losses.num_rows).backward()
    assert worst_relative_error(gradients(model), reference_grads) <= 1e-10
    num_branches = len(group.completions)
    assert num_forwards == 1 + num_branches + (1 if part == "prompt" else num_branches), "recomputed in the backward"


def make_lora_model(targets, dtype, name="qwen3"):
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(name, dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the gradient of lora_A
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"]], ids=["all-linear", "gate_proj"])
def test_lora_matches_plain(targets, checkpointing):
    model = make_lora_model(targets, torch.float64)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), max_branches=2)
    assert_equals_plain(model.float(), make_groups(), dtype=torch.float32, max_branches=2)


def test_lora_on_experts_matches_plain():
    """PEFT puts an expert's frozen weight back in every forward, which is no change of the weights."""
    model = make_lora_model("all-linear", torch.float64, "qwen3-moe")
    assert any(hasattr(module, "parameter_name") for module in model.modules())
    model.get_base_model().activation_checkpointing_enable()
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), max_branches=2)


def test_a_frozen_prompt_matches_plain():
    model = make_model("qwen3").requires_grad_(False)
    model.model.layers[-1].mlp.requires_grad_(True)  # no key and no value has a gradient
    with Float64Everywhere():
        assert_equals_plain(model, make_groups(), max_branches=2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_chunked_head_matches_plain(name):
    model = make_model(name)
    with Float64Everywhere():
        add_logprob_head(model)
        forward = functools.partial(score_chunks, chunk_tokens=5)
        assert_equals_plain(model, make_groups(), max_branches=2, branch_forward=forward)


def test_entropies_and_temperature_match_plain():
    model, group = make_model("llama"), make_groups()[0]
    with torch.no_grad(), Float64Everywhere():
        forward = functools.partial(score_logits, temperature=0.7, with_entropy=True)
        scores = shared_prefix_scores(model, [group], branch_forward=forward, self_check=False)
        for row, completion in enumerate(group.completions):
            ids = torch.cat([group.prompt_ids, completion])[None]
            logps = (model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / 0.7).log_softmax(-1)
            num_tokens = len(completion)
            expected = logps.gather(-1, completion[:, None]).squeeze(-1)
            torch.testing.assert_close(scores.logps[row, :num_tokens], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(
                scores.entropies[row, :num_tokens], -(logps.exp() * logps).sum(-1), rtol=0, atol=1e-12
            )
            assert not scores.entropies[row, num_tokens:].any()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2"])
def test_scores_without_gradients_match_plain(name, checkpointing):
    model, groups = make_model(name), make_groups(RAGGED_ONE_TOKEN)
    if checkpointing:
        model.activation_checkpointing_enable()
    with Float64Everywhere():
        scores = shared_prefix_scores(model, groups, max_branch_tokens=20)
        with torch.no_grad():
            reference = plain_scores(model, groups)
    torch.testing.assert_close(scores.logps, reference.logps, rtol=0, atol=1e-12)
    assert not scores.logps.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("loss_name", ["pg", "grpo"])
def test_weights_after_three_adamw_steps_match_plain(loss_name):
    start, groups = make_model("qwen3"), make_groups()
    ends = []
    for shared in (True, False):
        model = copy.deepcopy(start)
        if shared:
            model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        loss_fn = getattr(Losses(start, groups), loss_name)
        with Float64Everywhere():
            for _ in range(3):
                if shared:
                    shared_prefix_backward(model, groups, loss_fn, max_branches=2)
                else:
                    loss_fn(plain_scores(model, groups)).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(dict(model.named_parameters()))
    ours, plain = ends
    moved = max((plain[name] - weight).abs().max().item() for name, weight in start.named_parameters())
    assert moved > 1e-2
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-9)


def test_gradients_add_to_those_already_there():
    model, groups = make_model("qwen3"), make_groups()
    loss_fn = Losses(model, groups).pg
    with Float64Everywhere():
        shared_prefix_backward(model, groups, loss_fn, self_check=False)
        once = {name: grad.clone() for name, grad in gradients(model).items()}
        for _ in range(2):
            shared_prefix_backward(model, groups, loss_fn)  # the self-check of the first use leaves .grad alone
    twice = {name: 2 * grad for name, grad in once.items()}
    assert worst_relative_error(gradients(model), twice) <= 1e-10


def test_backward_is_called_per_micro_batch_and_its_scaling_reaches_the_prompt():
    model, groups = make_model("qwen3"), make_groups()
    loss_fn, calls = Losses(model, groups).pg, []
    with Float64Everywhere():
        shared_prefix_backward(model, groups, loss_fn)
        reference = {name: grad / 4 for name, grad in gradients(model).items()}

        def backward(loss):
            calls.append(loss)
            (loss / 4).backward()

        shared_prefix_backward(model, groups, loss_fn, max_branches=2, backward=backward)
    assert len(calls) == 3  # 4 and 2 completions
    assert worst_relative_error(gradients(model), reference) <= 1e-10


def test_two_prompts_open_at_once_match_plain():
    model, groups = make_model("qwen3"), make_groups()
    model.activation_checkpointing_enable()
    losses = Losses(model, groups)
    with Float64Everywhere():
        losses.pg(plain_scores(model, groups)).backward()
        reference = gradients(model)
        with SharedPrompt(model, groups[0].prompt_ids) as first, SharedPrompt(model, groups[1].prompt_ids) as second:
            for row, (prompt, index) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]):
                logps, _, _ = (first, second)[prompt].score([groups[prompt].completions[index]])
                (-losses.advantages[row] * logps.sum() / losses.num_rows).backward()
    assert worst_relative_error(gradients(model), reference) <= 1e-10


def test_micro_batches_hold_the_limits_and_every_completion():
    lengths = [7, 12, 1, 5, 12, 3, 40]
    for max_tokens, max_branches in [(24, None), (24, 2), (1, None), (1000, 3), (1000, None)]:
        batches = micro_batches(lengths, max_tokens, max_branches)
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
            assert len(batch) <= (max_branches or len(lengths))
    assert micro_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="at least 1"):
        micro_batches(lengths, 0)


@pytest.mark.parametrize("ids", [torch.zeros(1, 4), torch.zeros(0)])
def test_padded_and_empty_ids_are_refused(ids):
    with pytest.raises(ValueError, match="unpadded"):
        PromptGroup(ids.long(), [torch.ones(3).long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_self_check_leaves_room_above_rounding_in_half_precision(name, dtype):
    """Also for groups of one token, whose mean error is left to chance. Experts are chosen, so theirs is less."""
    one_token = PromptGroup(make_groups()[0].prompt_ids, [torch.tensor([5])])
    room = 1.0 if name in ("qwen3-moe", "mixtral") else 0.4
    for group in (*make_groups(), one_token):
        figures = check_shared_prefix(make_model(name, dtype), group)
        assert figures["logp_error_mean"] <= room * figures["logp_tolerance"]
        assert figures["grad_error"] <= room * figures["grad_tolerance"]


def test_gradients_of_many_branches_under_autocast_are_as_near_to_float32_as_those_of_plain_rows():
    """Keys and values collect their gradients in bfloat16, here of branches whose sum cancels, in the worst order."""
    num_rows = 64
    group = make_groups([(40, [12 - 8 * i // num_rows for i in range(num_rows)])])[0]
    rows = [PromptGroup(group.prompt_ids, [completion]) for completion in group.completions]
    advantages = torch.linspace(3, -3, num_rows)
    model = make_model("qwen3", torch.float32)

    def loss_of(scores, first_row=0):
        return -(advantages[scores.rows + first_row] * scores.logps.sum(-1)).sum() / num_rows

    loss_of(plain_scores(model, [group])).backward()
    exact = gradients(model)
    for number, row in enumerate(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(plain_scores(model, [row]), number)
        loss.backward()
    plain = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared_prefix_backward(model, [group], loss_of, max_branches=1, self_check=False)
    shared = gradients(model)

    def error(grads):
        return torch.stack([(grads[name] - exact[name]).norm() for name in exact]).norm()

    print(f"shared {error(shared):.2e}, plain {error(plain):.2e}")
    assert error(shared) <= 1.1 * error(plain)


class QuantizedLinear(torch.nn.Module):
    """As those of bitsandbytes: products in bfloat16, the result in the dtype of the input."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        weight = self.weight.to(torch.bfloat16) * self.scale
        return torch.nn.functional.linear(hidden.to(torch.bfloat16), weight).to(hidden.dtype)


def test_self_check_sees_half_precision_behind_float32_keys_of_quantized_models():
    model = make_model("qwen3", torch.float32)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, QuantizedLinear(linear))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as TRL trains it; attention rounds too
        with SharedPrompt(model, make_groups()[0].prompt_ids) as prompt:
            assert prompt.dtype == torch.float32
            prompt.score(make_groups()[0].completions)[0].sum().backward()
        figures = check_shared_prefix(model, make_groups()[0])
    limit = TOLERANCES[torch.finfo(torch.float32).eps][0]
    assert figures["logp_error_max"] > limit, "rounding does not show"
    assert figures["logp_error_mean"] <= 0.5 * figures["logp_tolerance"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_self_check_passes_and_leaves_no_trace(name, dtype):
    model, group = make_model(name, dtype), make_groups()[0]
    marker = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = marker
    random_state = torch.get_rng_state()
    figures = check_shared_prefix(model, group)
    print(figures)
    tolerances = {"logp_tolerance", "grad_tolerance"}
    assert figures.keys() == {"logp_error_max", "logp_error_mean", "grad_error"} | tolerances
    assert model.lm_head.weight.grad is marker and bool((marker == 1).all())
    assert model.model.norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
