"""Log-probabilities of chosen tokens from hidden states, without the (tokens, vocabulary) logits.

The obvious way projects every position onto the vocabulary and keeps the logits, their log-softmax and two gradients
for the backward. Here the projection runs in chunks of tokens and is done again in the backward: the peak holds two
tiles of (chunk, vocabulary), three with a soft cap, whatever the number of tokens.

Shapes: N tokens, H hidden size, V vocabulary, B rows, R response tokens.
"""

import functools
import types
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from lowmem.chunked_cross_entropy import refuse_second_derivative


def _tile(hidden, weight, bias, temperature, softcap, logit_scale):
    """Scaled logits (c, V) of one chunk in at least float32, and tanh of the soft cap where there is one."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits += bias
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logits *= logit_scale
    tanh = None
    if softcap is not None:
        tanh = logits.div_(softcap).tanh_()
        logits = tanh * softcap
    logits /= temperature
    return logits, tanh


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, softcap, logit_scale, chunk_tokens):
        if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # as PyTorch's operators
            compute_dtype = torch.get_autocast_dtype(hidden.device.type)
        else:
            compute_dtype = hidden.dtype
        cast_weight = weight.to(compute_dtype)
        cast_bias = None if bias is None else bias.to(compute_dtype)
        stat_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        logps = torch.empty(hidden.shape[0], dtype=stat_dtype, device=hidden.device)
        log_z, entropy = torch.empty_like(logps), torch.empty_like(logps)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = hidden[rows].to(compute_dtype)
            logits = _tile(chunk, cast_weight, cast_bias, temperature, softcap, logit_scale)[0]
            largest = logits.amax(-1)
            exp = (logits - largest.unsqueeze(-1)).exp_()
            total = exp.sum(-1)
            log_z[rows] = largest + total.log()
            logps[rows] = logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1) - log_z[rows]
            entropy[rows] = log_z[rows] - exp.mul_(logits).sum(-1) / total
            del logits, exp  # or they would be held while the next tiles are made
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.settings = (temperature, softcap, logit_scale)
        ctx.chunk_tokens, ctx.compute_dtype = chunk_tokens, compute_dtype
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        refuse_second_derivative()
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        temperature, softcap, logit_scale = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        cast_weight = weight.to(ctx.compute_dtype)
        cast_bias = None if bias is None else bias.to(ctx.compute_dtype)
        sum_dtype = log_z.dtype  # gradients of low precision inputs are summed in float32
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            chunk = hidden[rows].to(ctx.compute_dtype)
            logits, tanh = _tile(chunk, cast_weight, cast_bias, temperature, softcap, logit_scale)
            # d logp / d logit_j = 1[j = target] - p_j        d entropy / d logit_j = -p_j (log p_j + entropy)
            probs = (logits - log_z[rows].unsqueeze(-1)).exp_()
            if grad_entropy is None:
                grad = probs.mul_(-grad_logps[rows].unsqueeze(-1))
            else:
                grad = logits.add_((entropy[rows] - log_z[rows]).unsqueeze(-1)).mul_(-grad_entropy[rows].unsqueeze(-1))
                if grad_logps is not None:
                    grad -= grad_logps[rows].unsqueeze(-1)
                grad *= probs
            if grad_logps is not None:
                grad.scatter_add_(-1, targets[rows].unsqueeze(-1), grad_logps[rows].unsqueeze(-1))
            if tanh is not None:
                grad *= tanh.square_().neg_().add_(1)
            grad = grad.mul_(logit_scale / temperature).to(ctx.compute_dtype)
            if needs_hidden:
                grad_hidden[rows] = grad @ cast_weight
            if needs_weight:
                if grad.dtype == sum_dtype:
                    grad_weight.addmm_(grad.t(), chunk)
                else:
                    grad_weight += grad.t() @ chunk
            if needs_bias:
                grad_bias += grad.sum(0, dtype=sum_dtype)
            del logits, tanh, probs, grad
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if needs_weight else None,
            grad_bias.to(bias.dtype) if needs_bias else None,
            *(None,) * 5,
        )


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` and entropy of the distribution, per token. Equal to

    ```python
    logits = logit_scale * (hidden @ weight.T + bias)  # softcap * tanh(logits / softcap) where a soft cap is given
    log_p = (logits / temperature).log_softmax(-1)
    logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ```

    but allocates two tiles of `chunk_tokens * V` (three with a soft cap) instead of several of `N * V`. Both results
    carry gradients, once (no second derivative). bfloat16 and float16 inputs are projected in their type; statistics
    and sums are float32.

    Args:
        hidden: (N, H)
        weight: (V, H), the LM head.
        targets: (N,), int64.
        bias: (V,)
        chunk_tokens: tokens projected at once.

    Returns:
        `(logps, entropy)`, each (N,), in nats; float64 for float64 inputs, else float32.

    Raises:
        ValueError: if shapes do not fit, `chunk_tokens` < 1 or `temperature` <= 0.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (N, H) and weight (V, H) expected, got {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets (N,) expected with N = {hidden.shape[0]}, got {tuple(targets.shape)}")
    if chunk_tokens < 1 or not temperature > 0:
        raise ValueError(f"chunk_tokens >= 1 and temperature > 0 expected, got {chunk_tokens} and {temperature}")
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, softcap, logit_scale, chunk_tokens)


@dataclass
class LogprobOutput(ModelOutput):
    """`logps` and `entropy` of the response tokens, each (B, R)."""

    logps: torch.Tensor = None
    entropy: torch.Tensor = None


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def add_logprob_head(model: nn.Module) -> None:
    """Teaches a causal LM to answer `model(..., response_ids=ids)` with a `LogprobOutput` instead of logits.

    The call equals

    ```python
    logits = model(...).logits[:, -R - 1 : -1] / temperature
    logps = logits.log_softmax(-1).gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)
    ```

    for `response_ids` (B, R), the last R tokens of every row, and takes `temperature` and `chunk_tokens` as well.
    Without `response_ids` the model's own forward runs, untouched. The call goes through `forward`, so wrappers around
    the model (PEFT, DDP, autocast) keep working; call this before they are put on. Calling it twice changes nothing.

    Raises:
        ValueError: if the model's LM head is not a plain linear layer (an adapter on it would be ignored), or if the
            model does something to its logits that `chunked_logprobs` does not know. That is found by comparing both
            ways once, on a few tokens.
    """
    model = causal_lm(model)
    if getattr(model, "_has_logprob_head", False):
        return
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        raise ValueError(
            f"{type(model).__name__} has no plain linear LM head on a backbone (found {type(head).__name__}); its "
            "log-probabilities cannot be computed in chunks. Leave the chunk size unset, or adapt other layers."
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    logit_scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    plain_forward = getattr(model.forward, "__func__", None)
    if plain_forward is None:
        raise ValueError(
            "the model's forward was replaced by a plain function (accelerate does so with a model on several "
            "devices); call add_logprob_head before that, or leave the chunk size unset"
        )
    own_forward = vars(model).get("forward")

    # `wraps` keeps the signature: `generate` asks it for logits_to_keep, and without it the prefill would compute the
    # logits of the whole prompt. The function is unbound, so that a deep copy of the model calls its own weights.
    @functools.wraps(plain_forward)
    def forward(self, *args, response_ids=None, temperature=1.0, chunk_tokens=32, **kwargs):
        if response_ids is None:
            return plain_forward(self, *args, **kwargs)
        head = self.get_output_embeddings()
        if type(head) is not nn.Linear or hasattr(head.weight, "ds_id") or hasattr(head.weight, "full_tensor"):
            raise ValueError(
                f"the LM head became {type(head).__name__} with a {type(head.weight).__name__}; chunked "
                "log-probabilities need the whole weight of a plain linear layer: no adapter on it, no sharding."
            )
        num_tokens = response_ids.shape[1]
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        hidden = hidden[:, -num_tokens - 1 : -1]  # (B, R, H): position t predicts token t + 1
        logps, entropy = chunked_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            response_ids.reshape(-1),
            bias=head.bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_tokens=chunk_tokens,
        )
        return LogprobOutput(logps=logps.view(response_ids.shape), entropy=entropy.view(response_ids.shape))

    model.forward = types.MethodType(forward, model)
    model._has_logprob_head = True
    try:
        _verify_logprob_head(model)
    except Exception:
        del model.forward, model._has_logprob_head
        if own_forward is not None:
            model.forward = own_forward
        raise


@torch.no_grad()
def _verify_logprob_head(model: nn.Module) -> None:
    ids = torch.arange(1, 6, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()  # dropout off, and no random number is drawn
    try:
        logits = model(input_ids=ids).logits[:, :-1].float()
        plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        ours = model(input_ids=ids, response_ids=ids[:, 1:]).logps.float()
    finally:
        model.train(training)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.1
    worst = (plain - ours).abs().max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"{type(model).__name__} changes its logits in a way that is not known here: log-probabilities computed "
            f"in chunks are off by {worst:.3g}. Leave the chunk size unset for this model."
        )
