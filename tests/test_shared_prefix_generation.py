"""Prompts prefilled once: the tokens of stock `generate` for the same seed."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_shared_prefix_models import MODELS, VOCAB_SIZE, WINDOW, make_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowmem import shared_prefix_decode, shared_prefix_generation
from lowmem.live_bytes import LiveBytes
from lowmem.shared_prefix_decode import SharedPromptLayer, can_share_cache
from lowmem.shared_prefix_generation import shared_prefix_generate

NUM_GENERATIONS = 3
NEW_TOKENS = 12


def make_prompts(lengths=(9, 23, 1, 14)):
    """Left-padded prompts (n, P) and their mask."""
    generator = torch.Generator().manual_seed(4)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


def stock_generate(model, ids, mask, **options):
    torch.manual_seed(0)
    rows = {"input_ids": ids.repeat_interleave(NUM_GENERATIONS, 0)}
    return model.generate(**rows, attention_mask=mask.repeat_interleave(NUM_GENERATIONS, 0), **options)


def assert_same_tokens(model, ids, mask, **options):
    options = {"max_new_tokens": NEW_TOKENS, **options}
    sharing = {"share_cache": options.pop("share_cache", True)}
    stock = stock_generate(model, ids, mask, **options)
    after_stock = torch.get_rng_state()
    torch.manual_seed(0)
    shared = shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, **sharing, **options)
    assert torch.equal(shared, stock)
    assert torch.equal(torch.get_rng_state(), after_stock)
    return shared[:, ids.shape[1] :]


@pytest.mark.parametrize("share_cache", [True, False], ids=["", "repeated"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_match_stock(name, do_sample, share_cache):
    model = make_model(name, torch.float32).eval()
    ids, mask = make_prompts()
    completions = assert_same_tokens(model, ids, mask, do_sample=do_sample, share_cache=share_cache)
    if do_sample:  # greedy rows of random weights soon repeat one token
        assert len(set(completions.flatten().tolist())) > 10
        assert len({tuple(row) for row in completions.tolist()}) == len(completions)


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
@pytest.mark.parametrize("lengths", [(23,), (8, 8), (1,), (1, 1), (WINDOW, WINDOW + 1)], ids=str)
def test_tokens_match_stock_for_other_prompts(name, lengths):
    assert_same_tokens(make_model(name, torch.float32).eval(), *make_prompts(lengths), do_sample=True)


def test_tokens_match_stock_where_rows_end_early():
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts()
    settings = GenerationConfig(do_sample=True, max_new_tokens=30, pad_token_id=0, eos_token_id=[2, 5, 7, 11, 13, 17])
    completions = assert_same_tokens(model, ids, mask, generation_config=settings)
    assert (completions[:, -1] == 0).any()


def test_tokens_match_stock_with_lora_and_in_training_mode():
    model = get_peft_model(
        make_model("qwen3", torch.float32),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    assert_same_tokens(model.train(), *make_prompts(), do_sample=True)


def test_rows_in_parts_give_the_greedy_tokens_and_one_width():
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts()
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": [2, 5, 7, 11, 13, 17], "pad_token_id": 0}
    stock = stock_generate(model, ids, mask, **options)
    for max_rows in (1, 2, 5, 100):
        parts = shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, max_rows=max_rows, **options)
        assert torch.equal(parts, stock)


def test_the_prompt_is_prefilled_once_and_without_logits():
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts((40, 40))
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, max_new_tokens=2)
    assert seen == [(2, 39), (2 * NUM_GENERATIONS, 1), (2 * NUM_GENERATIONS, 1)]


def decoded_logits(model, generate) -> torch.Tensor:
    """Logits (steps, B, V) of the rows that `generate` sampled from, in the model's precision."""
    logits = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[:, -1:]))
    generate()
    hook.remove()
    return torch.cat([step for step in logits if step.shape[1]], 1).transpose(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_stock_in_float64(name):
    model = make_model(name, torch.float64).eval()
    eager = model.config._attn_implementation == "eager"  # its softmax is in float32, and nan on padding in float64
    ids, mask = make_prompts((23, 23) if eager else (9, 23, 1, 14))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    stock = decoded_logits(model, lambda: stock_generate(model, ids, mask, **options))
    shared = decoded_logits(model, lambda: shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, **options))
    assert shared.shape == stock.shape
    torch.testing.assert_close(shared, stock, rtol=0, atol=1e-5 if eager else 1e-12)


@pytest.mark.parametrize("share_cache, num_new", [(True, 64), (True, 65), (False, 64)], ids=str)
def test_the_cache_holds_every_prompt_once(share_cache, num_new):
    """P - 1 + k R tokens (the prompt's last token in place of the last that is sampled), R in blocks of 64."""
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts((70, 70))
    caches = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "share_cache": share_cache}
    shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, **options)
    num_tokens = 0
    for layer in caches[-1].layers:
        names = ("prompt_keys", "keys") if isinstance(layer, SharedPromptLayer) else ("keys",)
        num_tokens += sum(getattr(layer, name).shape[0] * getattr(layer, name).shape[2] for name in names)
    num_prompts = 2 if share_cache else 2 * NUM_GENERATIONS
    room = 128 if num_new > 64 else 64
    assert num_tokens == len(caches[-1].layers) * (num_prompts * 69 + 2 * NUM_GENERATIONS * room)


def test_a_model_that_attends_in_its_own_way_is_found_out(monkeypatch):
    model = make_model("qwen3", torch.float32).eval()
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *args: None)
    with pytest.raises(RuntimeError, match="did not see their prompts"):
        shared_prefix_generate(model, *make_prompts((23, 23)), NUM_GENERATIONS, max_new_tokens=2)
    shared_prefix_generate(model, *make_prompts((23, 23)), NUM_GENERATIONS, max_new_tokens=2, share_cache=False)


def test_the_models_own_attention_is_back_after_an_error(monkeypatch):
    model = make_model("qwen3", torch.float32).eval()
    monkeypatch.setattr(shared_prefix_decode, "_by_prompt", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared_prefix_generate(model, *make_prompts(), NUM_GENERATIONS, max_new_tokens=2)
    assert model.config._attn_implementation == "sdpa"


def test_peak_memory_is_below_stock():
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts((120,))
    peaks = []
    for generate in (stock_generate, lambda *args, **kw: shared_prefix_generate(*args[:3], NUM_GENERATIONS, **kw)):
        meter = LiveBytes()
        with meter:
            generate(model, ids, mask, max_new_tokens=2, do_sample=False)
        peaks.append(meter.peak_bytes)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2}, "num_return_sequences=2"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4"),
        ({"cache_implementation": "static"}, "static"),
        ({"use_cache": False}, "use_cache=False"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup"),
        ({"token_healing": True}, "token_healing"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"assistant_early_exit": 2}, "assistant_early_exit=2"),
        ({"use_mtp": True}, "use_mtp=True"),
        ({"token_type_ids": torch.zeros(4, 23)}, "token_type_ids"),
        ({"adapter_names": ["one"]}, "adapter_names"),
        ({"max_rows": 3, "max_time": 1.0}, "max_time .with max_rows."),
        ({"max_rows": 3, "prefix_allowed_tokens_fn": lambda *_: [1]}, "prefix_allowed_tokens_fn .with max_rows."),
        ({"max_rows": 3, "logits_processor": [lambda ids, scores: scores]}, "logits_processor .with max_rows."),
        ({"max_rows": 3, "stopping_criteria": [lambda *_: False]}, "stopping_criteria .with max_rows."),
        ({"inputs_embeds": torch.zeros(1, 1, 32)}, "inputs_embeds"),
    ],
    ids=str,
)
def test_refuses_settings_with_the_way_out(options, message):
    model = make_model("qwen3", torch.float32).eval()
    with pytest.raises(NotImplementedError, match=f"{message}.*Leave it out"):
        shared_prefix_generate(model, *make_prompts(), NUM_GENERATIONS, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("use_cache", False), ("num_beams", 2), ("cache_implementation", "static")], ids=str
)
def test_refuses_settings_of_the_models_own_that_a_given_configuration_leaves_open(name, value):
    model = make_model("qwen3", torch.float32).eval()
    setattr(model.generation_config, name, value)
    with pytest.raises(NotImplementedError, match=f"{name}={value!r}.*the model's own"):
        given = GenerationConfig(max_new_tokens=2)
        shared_prefix_generate(model, *make_prompts(), NUM_GENERATIONS, generation_config=given)


def test_rows_in_parts_are_padded_as_stock_pads_them():
    model = make_model("qwen3", torch.float32).eval()
    model.generation_config.pad_token_id = 1
    ids, mask = make_prompts()
    given = GenerationConfig(do_sample=False, max_new_tokens=30, eos_token_id=[2, 5, 7, 11, 13, 17])
    stock = stock_generate(model, ids, mask, generation_config=given)
    parts = shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, max_rows=3, generation_config=given)
    assert torch.equal(parts, stock) and (parts[:, -1] == 1).any()


@pytest.mark.parametrize(("max_rows", "sizes"), [(None, [12]), (4, [3] * 4), (7, [6, 6]), (2, [2, 1] * 4)], ids=str)
def test_parts_hold_whole_groups_or_one(max_rows, sizes):
    parts = shared_prefix_generation._parts(4, 3, max_rows, "cpu")
    assert [len(part) for part in parts] == sizes
    assert torch.cat(parts).tolist() == torch.arange(4).repeat_interleave(3).tolist()


def test_attention_sinks_match_stock():
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    assert_same_tokens(model, *make_prompts(), do_sample=True)


def test_half_precision_is_as_near_to_float64_as_fused_attention():
    model = make_model("qwen3", torch.float64).eval()
    ids, mask = make_prompts((40, 40))
    options = {"do_sample": False, "max_new_tokens": 1}
    exact = decoded_logits(model, lambda: stock_generate(model, ids, mask, **options))
    model = model.to(torch.bfloat16)
    stock = decoded_logits(model, lambda: stock_generate(model, ids, mask, **options))
    shared = decoded_logits(model, lambda: shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, **options))
    assert (shared - exact).norm() <= 1.1 * (stock - exact).norm()


def test_scores_under_autocast_are_as_precise_as_without():
    """Autocast would round the scores of sharp attention to half precision; fused attention keeps them in float32."""
    generator = torch.Generator().manual_seed(0)

    def states(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    layer = SharedPromptLayer(states(1, 2, 40, 16), states(1, 2, 40, 16))
    module = torch.nn.Linear(1, 1)
    module.layer_idx = 0
    cache = Cache(layers=[layer])
    query = states(3, 4, 1, 16, scale=6)
    inputs = query, *layer.update(states(3, 2, 1, 16), states(3, 2, 1, 16))
    token = shared_prefix_decode._decoding.set((cache, frozenset([module])))
    try:
        exact = shared_prefix_decode._attend(module, *inputs, None)[0]
        with torch.autocast("cpu", torch.bfloat16):
            ours = shared_prefix_decode._attend(module, *inputs, None)[0]
    finally:
        shared_prefix_decode._decoding.reset(token)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)


# Multi-head latent attention whose sizes all agree, so that unexpanded keys and values would fit without an error
LATENTS = {"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16}
LATENTS |= {"q_lora_rank": 16, "num_key_value_heads": 4, "first_k_dense_replace": 3}


@pytest.mark.parametrize(
    "model_type, changes",
    [("deepseek_v3", LATENTS), ("jetmoe", {"num_local_experts": 2}), ("doge", {}), ("hrm_text", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokens_match_stock_with_attention_that_repeats_its_cache(model_type, changes):
    model = make_model(model_type, torch.float32, **changes).eval()
    assert not can_share_cache(model)
    for do_sample in (False, True):
        assert_same_tokens(model, *make_prompts(), do_sample=do_sample)


def test_keys_changed_after_the_cache_are_found_out(monkeypatch):
    monkeypatch.setattr(shared_prefix_generation, "can_share_cache", lambda model: True)
    model = make_model("deepseek_v3", torch.float32, **LATENTS).eval()
    with pytest.raises(NotImplementedError, match="after it read them from the cache.*share_cache=False"):
        shared_prefix_generate(model, *make_prompts(), NUM_GENERATIONS, max_new_tokens=2)


@pytest.mark.parametrize("name", ["nearest_tokens", "sdpa", "eager"])
def test_attention_of_the_users_own_is_not_replaced(monkeypatch, name):
    def nearest_tokens(module, query, key, value, attention_mask, scaling=None, **kwargs):
        distance = torch.arange(key.shape[2]).flip(0)[None, None, None]
        mask = attention_mask.float().log() - 0.5 * distance  # as a bias would
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)

    masks = functools.partial(sdpa_mask, allow_is_causal_skip=False)
    monkeypatch.setitem(AttentionInterface._global_mapping, name, nearest_tokens)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, masks)
    model = make_model("llama", torch.float32, attn_implementation=name).eval()
    assert_same_tokens(model, *make_prompts(), do_sample=True)


def test_eager_attention_of_the_users_own_module_is_not_replaced():
    """Its function may read from the module what plain attention is not given."""
    for implementation, is_shared in (("eager", False), ("sdpa", True)):  # sdpa has a function that is known
        model = make_model("qwen3", torch.float32, attn_implementation=implementation).eval()
        assert can_share_cache(model)
        attention = model.model.layers[1].self_attn
        attention.__class__ = type("OwnAttention", (type(attention),), {"__module__": __name__})
        assert can_share_cache(model) == is_shared


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_an_adapter_under_autocast_of_the_outermost_module_alone(name):
    """As accelerate prepares a PEFT model: `generate` calls the forward inside, which is not under autocast."""
    base = make_model(name, torch.float32)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])).eval()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ids, mask = make_prompts()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    stock = decoded_logits(base, lambda: stock_generate(model, ids, mask, **options))
    shared = decoded_logits(base, lambda: shared_prefix_generate(model, ids, mask, NUM_GENERATIONS, **options))
    torch.testing.assert_close(shared, stock, rtol=0, atol=1e-4)


def test_rows_in_parts_that_rope_would_rotate_otherwise_are_refused():
    long = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
    long |= {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
    model = make_model("llama", torch.float32, rope_parameters=long).eval()
    with pytest.raises(NotImplementedError, match="longest position"):
        shared_prefix_generate(model, *make_prompts((9, 23)), NUM_GENERATIONS, max_rows=NUM_GENERATIONS)
    assert_same_tokens(model, *make_prompts((9, 23)), do_sample=True)


@pytest.mark.parametrize("options", [{"max_new_tokens": 8}, {"max_length": 31}, {}], ids=str)
def test_rows_in_parts_of_which_rope_would_rotate_one_otherwise_while_it_decodes_are_refused(options):
    """The long row passes position 30, and in one batch it would take the short one with it."""
    long = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
    long |= {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 30}
    model = make_model("llama", torch.float32, rope_parameters=long).eval()
    in_parts = {"num_generations": NUM_GENERATIONS, "max_rows": NUM_GENERATIONS}
    with pytest.raises(NotImplementedError, match="longest position"):
        shared_prefix_generate(model, *make_prompts((9, 23)), **in_parts, **options)
    shared_prefix_generate(model, *make_prompts((9, 23)), **in_parts, max_new_tokens=7)
    shared_prefix_generate(model, *make_prompts((23, 23)), **in_parts, **options)


def test_another_model_with_the_same_config_object_is_found_out():
    model = make_model("qwen3", torch.float32).eval()
    other = type(model)(model.config).eval()
    model.register_forward_hook(lambda *_: other(input_ids=torch.tensor([[3]])) and None)
    with pytest.raises(RuntimeError, match="share one config object"):
        shared_prefix_generate(model, *make_prompts(), NUM_GENERATIONS, max_new_tokens=3)


def test_refuses_models_that_are_not_exact():
    checkpointed = make_model("qwen3", torch.float32)
    checkpointed.activation_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="last token only"):
        shared_prefix_generate(checkpointed, *make_prompts(), NUM_GENERATIONS)
    dropped_out = make_model("qwen3", torch.float32, attention_dropout=0.1)
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        shared_prefix_generate(dropped_out, *make_prompts(), NUM_GENERATIONS)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = make_model("llama", torch.float32, rope_parameters=rope, max_position_embeddings=20).eval()
    with pytest.raises(NotImplementedError, match="longest position"):
        shared_prefix_generate(dynamic, *make_prompts(), NUM_GENERATIONS)


def test_refuses_prompts_that_are_not_left_padded():
    model = make_model("qwen3", torch.float32).eval()
    ids, mask = make_prompts()
    with pytest.raises(ValueError, match="left"):
        shared_prefix_generate(model, ids.flip(1), mask.flip(1), NUM_GENERATIONS)
    with pytest.raises(ValueError, match="ids and mask"):
        shared_prefix_generate(model, ids, mask[:, 1:], NUM_GENERATIONS)
    with pytest.raises(ValueError, match="at least 1"):
        shared_prefix_generate(model, ids, mask, 0)
