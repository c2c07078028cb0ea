"""Chunked log-probabilities against the plain computation: values, gradients, models, adapters, and the memory."""

import copy
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config

from lowmem.live_bytes import LiveBytes
from lowmem.logprobs import add_logprob_head, chunked_logprobs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPE = dict(
    vocab_size=211,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma2-softcap": Gemma2Config(**SHAPE, query_pre_attn_scalar=8),
    "cohere2-logit-scale": Cohere2Config(**SHAPE),
    "granite-logits-scaling": GraniteConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logits_scaling=4.0),
}


def plain(hidden, weight, targets, bias, temperature, softcap, logit_scale):
    logits = hidden @ weight.T
    logits = logit_scale * (logits if bias is None else logits + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_tokens, chunk_tokens", [(37, 8), (37, 1), (37, 64), (1, 8), (0, 8)])
@pytest.mark.parametrize("with_bias, softcap, logit_scale", [(False, None, 1.0), (True, None, 0.5), (False, 5.0, 2.0)])
@pytest.mark.parametrize("use", ["logps", "entropy", "both"])
def test_values_and_gradients_match_plain(dtype, num_tokens, chunk_tokens, with_bias, softcap, logit_scale, use):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(101, dtype=dtype, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 101, (num_tokens,))
    coefficients = torch.randn(2, num_tokens, dtype=dtype)
    inputs = [x for x in (hidden, weight, bias) if x is not None]

    def loss(logps, entropy):
        terms = {"logps": logps @ coefficients[0], "entropy": entropy @ coefficients[1]}
        return sum(terms.values()) if use == "both" else terms[use]

    expected = plain(hidden, weight, targets, bias, 1.3, softcap, logit_scale)
    settings = dict(bias=bias, temperature=1.3, softcap=softcap, logit_scale=logit_scale, chunk_tokens=chunk_tokens)
    found = chunked_logprobs(hidden, weight, targets, **settings)
    for ours, reference in zip(found, expected):
        torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE[dtype])
    found_grads = torch.autograd.grad(loss(*found), inputs)
    for ours, reference in zip(found_grads, torch.autograd.grad(loss(*expected), inputs)):
        torch.testing.assert_close(ours, reference, rtol=0, atol=TOLERANCE[dtype])


def test_bfloat16_is_no_further_from_float32_than_plain():
    """Excess error of the chunked path over the plain path, both in bfloat16, against a float32 truth."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 128) / 8, torch.randn(503, 128)
    targets, coefficients = torch.randint(0, 503, (64,)), torch.randn(64)

    def run(dtype, chunked):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        if chunked:
            logps, _ = chunked_logprobs(h, w, targets, chunk_tokens=8)
        else:
            logps = (h @ w.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        grads = torch.autograd.grad(logps.float() @ coefficients, (h, w))
        return [logps.float(), *(g.float() for g in grads)]

    truth = run(torch.float32, chunked=False)
    for ours, stock, exact in zip(run(torch.bfloat16, True), run(torch.bfloat16, False), truth):
        assert (ours - exact).norm() <= 1.05 * (stock - exact).norm()


def batch(config):
    torch.manual_seed(1)
    ids = torch.randint(1, config.vocab_size, (3, 14))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0  # left padding
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", CONFIGS)
def test_head_matches_plain_logits(name):
    torch.manual_seed(0)
    # sdpa ignores Gemma 2's other soft cap; eager attention in float64 turns padding into NaN (its softmax is float32)
    attention = "eager" if name == "gemma2-softcap" else "sdpa"
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).double()
    reference = copy.deepcopy(model)
    add_logprob_head(model)
    add_logprob_head(model)  # twice changes nothing
    inputs, num_tokens = batch(CONFIGS[name]), 6
    if attention == "eager":
        inputs = {"input_ids": inputs["input_ids"]}
    targets = inputs["input_ids"][:, -num_tokens:]
    logits = reference(**inputs).logits[:, -num_tokens - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    found = model(**inputs, response_ids=targets, temperature=0.7, chunk_tokens=4).logps
    tolerance = 1e-6 if name == "cohere2-logit-scale" else 1e-12  # its layer norm returns float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (key, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters()):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_without_response_ids_the_model_is_untouched():
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    inputs = batch(CONFIGS["qwen3"])
    before = model(**inputs).logits
    add_logprob_head(model)
    assert torch.equal(model(**inputs).logits, before)


def test_generate_still_projects_one_position_only():
    """A replaced forward that hides `logits_to_keep` makes the prefill compute the logits of the whole prompt."""
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    add_logprob_head(model)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model.generate(**{k: v for k, v in batch(CONFIGS["qwen3"]).items() if k != "position_ids"}, max_new_tokens=3)
    assert set(seen) == {1}


def test_a_deep_copy_uses_its_own_weights():
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    add_logprob_head(model)
    twin = copy.deepcopy(model)
    inputs = batch(CONFIGS["qwen3"])
    with torch.no_grad():
        before = model(**inputs, response_ids=inputs["input_ids"][:, -3:]).logps
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        after = model(**inputs, response_ids=inputs["input_ids"][:, -3:]).logps
        logits = twin(**inputs).logits
    assert torch.equal(before, after) and not torch.equal(logits, model(**inputs).logits)


def test_lora_and_checkpointing_match_plain():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    inputs = batch(CONFIGS["qwen3"])
    targets = inputs["input_ids"][:, -5:]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(**inputs).logits[:, -6:-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    reference = torch.autograd.grad(expected.sum(), parameters)
    add_logprob_head(model)
    found = model(**inputs, response_ids=targets).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), parameters), reference):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["qwen3"]), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="plain linear LM head"):
        add_logprob_head(model)


def test_a_model_that_changes_its_logits_otherwise_is_refused():
    class Odd(type(AutoModelForCausalLM.from_config(CONFIGS["qwen3"]))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model = Odd(CONFIGS["qwen3"])
    with pytest.raises(ValueError, match="not known here"):
        add_logprob_head(model)
    assert "forward" not in vars(model), "a refused model is left as it was"


@pytest.mark.parametrize(
    "change", [{"chunk_tokens": 0}, {"temperature": 0.0}, {"targets": torch.zeros(3, dtype=torch.long)}], ids=str
)
def test_bad_input_is_an_error(change):
    arguments = dict(hidden=torch.zeros(4, 8), weight=torch.zeros(11, 8), targets=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="expected"):
        chunked_logprobs(**(arguments | change))


@pytest.mark.parametrize("softcap, tiles", [(None, 2), (5.0, 3)])
def test_peak_does_not_depend_on_the_number_of_tokens(softcap, tiles):
    """A few tiles of (chunk, V) whatever N: what grows is hidden, its gradient and a few numbers per token."""
    vocab, hidden_size, chunk = 5000, 8, 16

    def peak(num_tokens):
        hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
        weight = torch.randn(vocab, hidden_size, requires_grad=True)
        targets = torch.randint(0, vocab, (num_tokens,))
        with LiveBytes() as meter:
            logps, entropy = chunked_logprobs(hidden, weight, targets, chunk_tokens=chunk, softcap=softcap)
            (logps.sum() + entropy.sum()).backward()
        return meter.peak_bytes

    tile, weight_gradient = chunk * vocab * 4, vocab * hidden_size * 4
    small, large = peak(64), peak(1024)
    assert small <= tiles * tile + 2 * weight_gradient + 64 * 200
    assert large - small <= (1024 - 64) * (hidden_size * 4 + 80)


def test_a_second_derivative_is_an_error():
    """It would lack the part through the normaliser, without a word."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    logps, entropy = chunked_logprobs(hidden, weight, torch.arange(5))
    loss = (logps + 0.1 * entropy).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):  # a gradient penalty
        (loss + torch.autograd.grad(loss, hidden, create_graph=True)[0].square().sum()).backward()


def test_float64_stays_float64_under_autocast():
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = chunked_logprobs(hidden, weight, torch.arange(5))
        expected = (hidden @ weight.T).log_softmax(-1).gather(-1, torch.arange(5)[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-12)


def test_a_refused_model_keeps_a_forward_of_its_own():
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)  # not known to the chunks
    model.forward = own = types.MethodType(type(model).forward, model)
    with pytest.raises(ValueError, match="not known here"):
        add_logprob_head(model)
    assert vars(model)["forward"] is own
