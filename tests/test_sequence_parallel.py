"""`lowmem.sequence_parallel` against one process: log-probabilities, gradients, live bytes, and refusals.

Run by torchrun, this file is one such comparison, see `compare`.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lowmem.sequence_parallel import (
    LONG_ROW,
    SequenceMismatch,
    SequencePeers,
    _causal_attention,
    check_sequence_logps,
    check_sequence_parallel_size,
    exchange_rows,
    make_peers,
    score_shard,
    sequence_attention,
    sequence_logps,
    split_attention,
    why_not_split,
)

VOCAB, COMPLETION = 64, 7


# --- under torchrun --------------------------------------------------------------------------------------------------


def build(kind: str, dtype=torch.float64, **shape):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2} | shape
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**({"head_dim": 8} | common), tie_word_embeddings=True))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        shape = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0))
    return model.to(dtype).train()


def use_float64() -> None:
    """transformers computes RMSNorm and RoPE in float32 even in a float64 model."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    def rms_norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self, x, position_ids):
        freqs = position_ids[:, :, None].double() * self.inv_freq.double()
        freqs = torch.cat([freqs, freqs], -1)
        return freqs.cos().to(x.dtype), freqs.sin().to(x.dtype)

    modeling_qwen3.Qwen3RMSNorm.forward = modeling_llama.LlamaRMSNorm.forward = rms_norm
    modeling_qwen3.Qwen3RotaryEmbedding.forward = modeling_llama.LlamaRotaryEmbedding.forward = angles


def padded_rows(number: int, rows: int = 3, prompt: int = 9):
    """(ids, mask): prompts padded on the left, completions on the right, odd lengths, one completion masked whole."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, VOCAB, (rows, prompt + COMPLETION), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : int(torch.randint(0, prompt - 1, (1,), generator=generator))] = 0
        mask[row, prompt + int(torch.randint(1, COMPLETION + 1, (1,), generator=generator)) :] = 0
    mask[-1, prompt:] = 0
    return ids, mask


def whole_logps(model, ids, mask):
    """What one process computes, positions as transformers counts them without `position_ids`."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -COMPLETION - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, -COMPLETION:, None])[..., 0]
    return logps.masked_fill(mask[:, -COMPLETION:] == 0, 0.0)


def gradients(model, logps, number: int):
    generator = torch.Generator().manual_seed(100 + number)
    weights = torch.randn(logps.shape, generator=generator, dtype=torch.float64).to(logps.dtype)
    model.zero_grad(set_to_none=True)
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(peers: SequencePeers, kind: str, dtype, checkpointing: str) -> dict:
    """Errors of log-probabilities and of the gradients that an engine averages over the world."""
    from lowmem.recompute import recompute_activations

    num_pools = dist.get_world_size() // peers.size
    reference, model = build(kind, dtype), build(kind, dtype)
    split_attention(model)
    if checkpointing != "none":
        recompute_activations(model, selective=checkpointing == "selective")
    expected: dict[str, torch.Tensor] = {}
    for pool in range(num_pools):  # data parallel: the mean over pools of different rows
        rows = padded_rows(pool)
        logps = whole_logps(reference, *rows)
        for name, grad in gradients(reference, logps, pool).items():
            expected[name] = expected.get(name, 0) + grad / num_pools
        if pool == dist.get_rank() // peers.size:
            own_rows, own_expected, own_pool = rows, logps.detach(), pool
    logps, _ = sequence_logps(model, peers, *own_rows, COMPLETION)
    found = gradients(model, logps, own_pool)
    errors = []
    for name, grad in found.items():
        dist.all_reduce(grad)
        errors.append((grad / dist.get_world_size() - expected[name]).abs().max().item())
    scale = max(grad.abs().max().item() for grad in expected.values())
    return {"logp": (logps - own_expected).abs().max().item(), "grad": max(errors), "scale": scale}


def compare_all() -> dict:
    use_float64()
    results = {}
    world = dist.get_world_size()
    for size in (n for n in (2, 4) if n <= world):
        peers = make_peers(size)
        for kind in ("qwen3", "llama", "gpt2"):
            results[f"{kind} sp{size} dp{world // size}"] = compare(peers, kind, torch.float64, "none")
        for checkpointing in ("full", "selective"):
            name = f"{checkpointing} sp{size} dp{world // size}"
            results[name] = compare(peers, "qwen3", torch.float64, checkpointing)
        results[f"float32 sp{size} dp{world // size}"] = compare(peers, "qwen3", torch.float32, "none")
        results |= controls(peers)
    return results


def controls(peers: SequencePeers) -> dict:
    """What must be seen: a gather whose gradient stays in the own part, lost positions, peers with different rows."""
    results = {}
    gather = SequencePeers.gather

    def gather_without_gradient_of_others(self, tensor, dim):
        parts = list(gather(self, tensor.detach(), dim).chunk(self.size, dim))
        parts[self.rank] = tensor
        return torch.cat(parts, dim)

    SequencePeers.gather = gather_without_gradient_of_others
    results["control gather"] = compare(peers, "qwen3", torch.float64, "none")
    SequencePeers.gather = gather

    model, (ids, mask) = build("qwen3"), padded_rows(0)
    expected = whole_logps(model, ids, mask).detach()
    split_attention(model)

    def lose_positions(model, inputs, labels):
        return score_shard(model, {**inputs, "position_ids": None}, labels)

    def lose_peers(model, inputs, labels):  # as a model that does not hand its keyword arguments on would
        return score_shard(model, {key: inputs[key] for key in ("input_ids", "position_ids")}, labels)

    for name, forward in (("none", score_shard), ("positions", lose_positions), ("peers", lose_peers)):
        try:
            check_sequence_logps(model, peers, ids, mask, COMPLETION, expected, forward)
            results[f"check {name}"] = None
        except SequenceMismatch as error:
            results[f"check {name}"] = str(error)
    peers.check_same(ids, "rows")
    try:
        peers.check_same(ids + dist.get_rank() % peers.size, "rows")
        results["check rows"] = None
    except RuntimeError as error:
        results["check rows"] = str(error)
    own = {
        "prompt_ids": torch.full((1, 2 + peers.rank), 5 + peers.rank),
        "completion_ids": torch.full((1, 3 - peers.rank % 2), 8),
        "completion_mask": torch.ones(1, 3 - peers.rank % 2, dtype=torch.long),
        "advantages": torch.tensor([float(peers.rank)]),
    }
    shared = exchange_rows(own, peers, pad_token_id=1)
    results["exchanged"] = {name: tensor.tolist() for name, tensor in shared.items()}
    with peers.same_random_numbers(7):
        results["permutation"] = torch.randperm(50).tolist()
    return results


def live_bytes() -> dict:
    """Bytes held after the forward, parameters excluded, by number of peers and form of checkpointing."""
    from lowmem.live_bytes import LiveBytes
    from lowmem.recompute import recompute_activations

    results = {}
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
    ids = torch.randint(1, VOCAB, (1, 1024), generator=torch.Generator().manual_seed(0))
    for size in (n for n in (1, 2, 4) if n <= dist.get_world_size()):
        peers = make_peers(size) if size > 1 else None
        for checkpointing in ("none", "selective", "full"):
            model = build("qwen3", torch.float32, **shape)
            if peers is not None:
                split_attention(model)
            if checkpointing != "none":
                recompute_activations(model, selective=checkpointing == "selective")
            meter = LiveBytes()
            meter.track([*model.parameters(), *model.buffers()])  # a transposed weight would count as an activation
            standing = meter.live_bytes
            with meter:
                if peers is None:
                    logps = whole_logps(model, ids, torch.ones_like(ids))
                else:
                    logps, _ = sequence_logps(model, peers, ids, torch.ones_like(ids), COMPLETION, last_logps)
                results[f"{checkpointing} {size}"] = meter.live_bytes - standing
                logps.sum().backward()
                results[f"{checkpointing} {size} peak"] = meter.peak_bytes - standing
    return results


def last_logps(model, inputs, labels):
    """Scores the labelled positions only, as the fused head does."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    logps = hidden.new_zeros(labels.shape)
    chosen = model.lm_head(hidden[labels != -100]).log_softmax(-1)
    return logps.masked_scatter(labels != -100, chosen.gather(-1, labels[labels != -100][:, None])[:, 0]), None


def main(out: str, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {"compare": compare_all, "bytes": live_bytes}[what]()
    Path(f"{out}{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(what, processes)` -> results of every rank; every distinct call runs once."""
    from torchrun import launch

    cache: dict[tuple, list[dict]] = {}

    def run(what: str, processes: int) -> list[dict]:
        if (what, processes) not in cache:
            folder = tmp_path_factory.mktemp("split")
            launch("tests/test_sequence_parallel.py", f"{folder}/", what, processes=processes, timeout_s=240)
            results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
            cache[what, processes] = results
        return cache[what, processes]

    return run


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_split_sequences_match_one_process(run, processes):
    for result in run("compare", processes):
        compared = {name: errors for name, errors in result.items() if " dp" in name}
        assert len(compared) == (6 if processes == 2 else 12)
        for name, errors in compared.items():
            tolerance = 1e-5 if "float32" in name else 1e-12
            assert errors["scale"] > 0.1, name
            assert errors["logp"] < tolerance and errors["grad"] < tolerance * max(1, errors["scale"]), (name, errors)
        # Negative controls
        assert result["control gather"]["logp"] < 1e-12 and result["control gather"]["grad"] > 0.01
        assert result["check none"] is None
        assert "differ from those of the whole" in result["check positions"]
        assert "differ from those of the whole" in result["check peers"]
        assert "hold different rows" in result["check rows"]


def test_rows_are_exchanged_in_the_order_of_the_ranks(run):
    first, second = run("compare", 2)
    assert first["exchanged"] == second["exchanged"]
    assert first["exchanged"]["prompt_ids"] == [[1, 5, 5], [6, 6, 6]]
    assert first["exchanged"]["completion_ids"] == [[8, 8, 8], [8, 8, 1]]
    assert first["exchanged"]["completion_mask"] == [[1, 1, 1], [1, 1, 0]]
    assert first["exchanged"]["advantages"] == [0.0, 1.0]
    assert first["permutation"] == second["permutation"]


@pytest.mark.slow
def test_activation_bytes_fall_with_the_number_of_peers(run):
    results = run("bytes", 4)
    for result in results:
        for checkpointing in ("none", "selective", "full"):
            whole = result[f"{checkpointing} 1"]
            for size in (2, 4):  # keys and values of all peers are 4 % here; a kept attention are two outputs on a CPU
                share = result[f"{checkpointing} {size}"] / whole
                assert share < {"none": 1.12, "selective": 1.15, "full": 1.0}[checkpointing] / size, (size, share)


def test_counted_activations_of_fourteen_thousand_tokens_are_close_to_one_nth():
    """The last of four processes, whose queries have the longest past, in a group that does not communicate."""
    from recompute_table import measure

    whole = measure(None, False, 14_100, has_head=False)["held_bytes"]
    last = measure(None, False, 14_100, 4, 3, has_head=False)
    assert whole / 4 < last["held_bytes"] < 1.07 * whole / 4
    half = measure(None, False, 7_050, 4, 3, has_head=False)
    for name in ("held_bytes", "peak_bytes"):
        assert last[name] < 2.01 * half[name], "something is quadratic"


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_both_causal_attentions_are_the_last_rows_of_the_whole(heads, kv_heads):
    """The one for CPUs and the one for accelerators, whose aligned mask also runs on a CPU; gradients too."""

    def aligned(query, keys, values, scale):
        bias = torch.nn.attention.bias.causal_lower_right(query.shape[2], keys.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, bias, scale=scale, enable_gqa=heads != kv_heads
        )

    torch.manual_seed(0)
    tensors = [torch.randn(2, n, 10, 8, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]
    for start, end in ((0, 4), (6, 10), (9, 10)):
        query, keys, values = (tensor[:, :, :end].clone().requires_grad_() for tensor in tensors)
        whole = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=0.3, enable_gqa=heads != kv_heads
        )[:, :, start:]
        weights = torch.randn_like(whole)
        expected = torch.autograd.grad((whole * weights).sum(), (query, keys, values))
        for attention in (_causal_attention, aligned):
            found = attention(query[:, :, start:], keys, values, 0.3)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
            grads = torch.autograd.grad((found * weights).sum(), (query, keys, values))
            torch.testing.assert_close(grads, expected, rtol=0, atol=1e-12)


def test_a_world_that_does_not_fit_is_an_error_that_names_the_launcher():
    with pytest.raises(ValueError, match="sequence_parallel_size is 3, but 4 process.*torchrun.*MULTI_CPU"):
        check_sequence_parallel_size(3, 4)
    with pytest.raises(ValueError, match="1 process.*no multiple"):
        make_peers(2)


def test_what_is_not_exact_is_refused(monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    eager = build("qwen3")
    eager.set_attn_implementation("eager")
    assert "'eager'" in why_not_split(eager)[0]
    sliding = build("qwen3", use_sliding_window=True, max_window_layers=1, sliding_window=4)
    assert any("sliding_attention" in reason for reason in why_not_split(sliding))
    dynamic = build("qwen3", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert any("'dynamic'" in reason for reason in why_not_split(dynamic))
    with pytest.raises(NotImplementedError, match="Attention dropout"):
        split_attention(build("qwen3", attention_dropout=0.1))
    assert why_not_split(build("qwen3")) == []
    activated = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5], target_modules=["q_proj"])
    assert any("activated LoRA" in reason for reason in why_not_split(get_peft_model(build("qwen3"), activated)))
    own_attention = build("qwen3")
    monkeypatch.setattr(type(own_attention), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(NotImplementedError, match="does not ask transformers for its attention function"):
        split_attention(own_attention)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=8))
    assert any("sliding" in reason for reason in why_not_split(windowed))


def test_generation_keeps_its_padding_mask():
    """A registered attention without a registered mask would attend to the padding, silently."""
    model, (ids, mask) = build("qwen3"), padded_rows(0)
    prompts, prompt_mask = ids[:, :-COMPLETION], mask[:, :-COMPLETION]
    options = {"attention_mask": prompt_mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(prompts, **options)
    logits = model(prompts, attention_mask=prompt_mask).logits[:, -1]
    split_attention(model)
    assert torch.equal(model.generate(prompts, **options), expected)
    torch.testing.assert_close(model(prompts, attention_mask=prompt_mask).logits[:, -1], logits)
    ignored = model(prompts, attention_mask=torch.ones_like(prompt_mask)).logits[:, -1]
    assert not torch.allclose(ignored, logits), "the padding changes nothing here, so this is no test"


def test_long_padded_rows_are_scored_without_a_dense_mask():
    """Scoring and generation of whole rows, which nobody splits; the plain model's mask has rows x S x S entries."""
    from lowmem.live_bytes import LiveBytes

    tokens, peaks = 1100, {}
    model = build("qwen3", torch.float64, num_hidden_layers=2)
    ids = torch.randint(1, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :300], mask[1, -5:] = 0, 0
    scores = {}
    for name in ("plain", "split"):
        if name == "split":
            split_attention(model)
        with LiveBytes() as meter, torch.no_grad():
            scores[name] = whole_logps(model, ids, mask)
        peaks[name] = meter.peak_bytes
    torch.testing.assert_close(scores["split"], scores["plain"], rtol=0, atol=1e-5)  # float32 positions of RoPE
    assert peaks["plain"] > peaks["split"] + 2 * tokens**2
    options = {"attention_mask": mask[:1], "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = model.eval().generate(ids[:1], **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model.generate(ids[:1], **options))


def test_rows_beyond_the_learned_positions_are_refused():
    """A row that starts late is rounded up to the longest one, and its padding would stand beyond the table."""
    model = build("gpt2")
    num_positions = model.config.max_position_embeddings
    ids, mask = torch.ones(2, num_positions, dtype=torch.long), torch.ones(2, num_positions, dtype=torch.long)
    mask[1, : num_positions // 2] = 0
    with pytest.raises(NotImplementedError, match=f"beyond the {num_positions} that the model has learned"):
        sequence_logps(model, SequencePeers(None, 0, 2), ids, mask, 4)


def test_heads_whose_values_are_narrower_than_their_keys():
    """As in multi-head latent attention."""
    query, key, value = torch.randn(2, 3, LONG_ROW, 6), torch.randn(2, 3, LONG_ROW, 6), torch.randn(2, 3, LONG_ROW, 4)
    mask = torch.ones(2, LONG_ROW, dtype=torch.bool)
    mask[0, :5] = False
    found, _ = sequence_attention(None, query, key, value, mask)
    expected = F.scaled_dot_product_attention(query[1:], key[1:], value[1:], is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found[1:], expected)


def test_a_hole_in_a_mask_is_an_error():
    ids = torch.ones(1, 8, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="hole"):
        sequence_logps(build("qwen3"), SequencePeers(None, 0, 2), ids, mask, 4)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], sys.argv[2])
