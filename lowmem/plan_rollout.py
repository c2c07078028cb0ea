"""The part of a step without gradients: generation, and log-probabilities under the old and the reference policy.

A thousand decoding steps in a dry run take minutes. Only the cache grows between them, so the prefill and the last two
steps are run: the cache is put at its final length before them. A real run (`whole=True`) generates every token, which
is how the short cut is checked.

Shapes: m rows generated at once, P prompt tokens, R completion tokens, V vocabulary.
"""

from contextlib import nullcontext

import torch
from transformers.cache_utils import DynamicCache

from lowmem.plan_config import PlanConfig
from lowmem.shared_prefix import PromptGroup, score_logits, shared_prefix_scores
from lowmem.shared_prefix_decode import SharedPromptLayer, can_share_cache, prompts_kept_once
from lowmem.shared_prefix_generation import _select_rows, shared_prefix_generate
from lowmem.shared_prefix_prompt import score_chunks

TEMPERATURE = 0.7


def make_prompts(plan: PlanConfig, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (rows_per_step, P) of a step, left-padded to `prompt_tokens`, rows of a prompt side by side."""
    repeats = plan.rows_per_step // plan.prompts_per_step
    ids = torch.randint(2, max(vocab_size - 1, 3), (plan.prompts_per_step, plan.prompt_tokens))
    mask = torch.ones_like(ids)
    if plan.padded:
        mask[1::2, : plan.prompt_tokens - plan.prompt_tokens_min] = 0
        if plan.prompts_per_step == 1:
            mask[0, : plan.prompt_tokens - plan.prompt_tokens_min] = 0
    return ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)


def generate(model, plan: PlanConfig, ids, mask, trace, *, whole: bool) -> torch.Tensor:
    """Completions (rows, R); peaks go to phase `generate`."""
    trace.phase = "generate"
    was_training = model.training
    model.eval()
    outputs = []
    for rows in torch.arange(len(ids)).split(plan.rollout_rows):
        if whole:
            outputs.append(_generate_whole(model, plan, ids[rows], mask[rows]))
        else:
            _last_steps(model, plan, ids[rows], mask[rows], trace)
            outputs.append(torch.ones(len(rows), plan.response_tokens, dtype=torch.int64))
    model.train(was_training)
    trace.phase = "other"
    return torch.cat(outputs)


def _generate_whole(model, plan: PlanConfig, ids, mask):
    settings = {"max_new_tokens": plan.response_tokens, "min_new_tokens": plan.response_tokens, "do_sample": True}
    settings |= {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "eos_token_id": None}
    settings.pop("min_new_tokens")
    if plan.shared_prefix:
        first = ids[:: plan.rloo_k]
        out = shared_prefix_generate(model, first, mask[:: plan.rloo_k], plan.rloo_k, **settings)
    else:
        out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def _last_steps(model, plan: PlanConfig, ids, mask, trace) -> None:
    """The prefill, and the last two of R decoding steps as `generate` makes them."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    length, held = ids.shape[1], {}
    if plan.shared_prefix:
        groups = -(-len(ids) // plan.rloo_k)
        model(input_ids=ids[:groups, :-1], past_key_values=cache, use_cache=True, logits_to_keep=torch.empty(0).long())
        rows = torch.arange(groups).repeat_interleave(plan.rloo_k)[: len(ids)]
        prefilled, cache = cache, _select_rows(cache, rows, can_share_cache(model))
        trace.relabel("cache", _cache_tensors(prefilled) + _cache_tensors(cache))
        del prefilled
    else:
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        trace.relabel("cache", _cache_tensors(cache))
        _sample(out.logits, held)
        del out
    for step in range(max(1, plan.response_tokens - 2), plan.response_tokens):
        total = length + step - 1  # tokens in the cache before this step
        for layer in cache.layers:
            if getattr(layer, "is_sliding", False):
                continue
            if isinstance(layer, SharedPromptLayer):
                layer.hold(len(ids), total - layer.prompt_keys.shape[-2])
            elif layer.keys.shape[-2] < total:
                rows_, heads, _, size = layer.keys.shape
                layer.keys = layer.keys.new_empty(rows_, heads, total, size)
                layer.values = layer.values.new_empty(rows_, heads, total, size)
        trace.relabel("cache", _cache_tensors(cache))
        step_mask = torch.cat([mask, mask.new_ones(len(ids), step)], 1)
        positions = (step_mask.cumsum(-1) - 1)[:, -1:]
        shares = any(isinstance(layer, SharedPromptLayer) for layer in cache.layers)
        with prompts_kept_once(model, cache) if shares else nullcontext():
            out = model(
                input_ids=ids[:, -1:],
                attention_mask=step_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        trace.relabel("cache", _cache_tensors(cache))
        _sample(out.logits, held)
        del out


def _cache_tensors(cache) -> list[torch.Tensor]:
    names = ("keys", "values", "prompt_keys", "prompt_values")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return [tensor for tensor in held if tensor is not None]


def _sample(logits: torch.Tensor, held: dict[str, torch.Tensor]) -> None:
    """What `generate` does with the logits (m, 1, V) of a step; its variables live until the next step's replace
    them."""
    held["logits"] = logits[:, -1].to(copy=True, dtype=torch.float32)
    held["scores"] = held["logits"] / TEMPERATURE
    held["probs"] = held["scores"].softmax(-1)
    torch.multinomial(held["probs"], num_samples=1)


def response_logps(model, plan: PlanConfig, ids, mask, num_response: int):
    """Log-probabilities (m, R) of the last R tokens of every row, by the plan's `lm_head`."""
    if plan.lm_head == "chunked":
        return model(
            input_ids=ids,
            attention_mask=mask,
            response_ids=ids[:, -num_response:],
            temperature=TEMPERATURE,
            chunk_tokens=plan.logprob_chunk_tokens,
        ).logps
    if plan.lm_head == "completion":
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=num_response + 1).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = logits[:, -num_response - 1 : -1]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logits = logits / TEMPERATURE
    chosen = logits.gather(-1, ids[:, -num_response:].unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def branch_forward(plan: PlanConfig):
    """How branches of a shared prompt are scored."""
    if plan.lm_head != "chunked":
        return score_logits

    def score(model, inputs, labels):
        return score_chunks(model, inputs, labels, chunk_tokens=plan.logprob_chunk_tokens)

    return score


def prompt_groups(plan: PlanConfig, ids: torch.Tensor, completions: torch.Tensor, whole: bool) -> list[PromptGroup]:
    k = plan.rloo_k
    starts = distinct(list(range(0, len(ids), k)), whole)
    held = k if whole or k <= 4 * plan.micro_batch_rows else 2 * plan.micro_batch_rows
    return [PromptGroup(ids[i], list(completions[i : i + held])) for i in starts]


def distinct(parts: list, whole: bool) -> list:
    """The parts of a step that differ in memory: the first, and the second, which finds gradients. All if `whole`."""
    return parts if whole else parts[:2]


@torch.no_grad()
def score(model, plan: PlanConfig, ids, mask, completions, trace, *, whole: bool) -> torch.Tensor:
    """Log-probabilities (rows, R) without gradients, as many rows at once as a training forward holds."""
    trace.phase = "score"
    if plan.shared_prefix:
        groups = prompt_groups(plan, ids, completions, whole)
        logps = shared_prefix_scores(
            model,
            groups,
            max_branches=plan.micro_batch_rows,
            max_branch_tokens=2**62,
            branch_forward=branch_forward(plan),
            self_check=False,
        ).logps
    else:
        full, full_mask = torch.cat([ids, completions], 1), torch.cat([mask, torch.ones_like(completions)], 1)
        rows = plan.rows_per_forward if plan.lm_head == "chunked" else plan.micro_batch_rows
        parts = list(zip(full.split(rows), full_mask.split(rows)))[: None if whole else 1]
        logps = torch.cat([response_logps(model, plan, *part, completions.shape[1]) for part in parts])
    if len(logps) < len(completions):
        logps = logps.new_zeros(completions.shape)
    trace.phase = "other"
    return logps
