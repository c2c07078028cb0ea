"""Two optimizer steps of a method on the real model class, with the real autograd and the real optimizer.

The code is the same in a dry run and in a real one: `simulate` runs it without memory, `execute` with, which is how
the predictions are checked. Two steps, because the optimizer's state exists from the second on.
"""

import contextlib
import time
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from lowmem.dry_run import DryRun
from lowmem.logprobs import add_logprob_head, causal_lm
from lowmem.plan_config import ROLLOUT_METHODS, PlanConfig
from lowmem.plan_cuda import like_cuda
from lowmem.plan_memory import MemoryTrace
from lowmem.plan_models import build_model, is_encoder_decoder, load_config
from lowmem.plan_rollout import branch_forward, distinct, generate, make_prompts, prompt_groups, response_logps, score
from lowmem.recompute import recompute_activations
from lowmem.shared_prefix import shared_prefix_backward

STEPS = 2
CLIP = 0.2


@dataclass
class StepMemory:
    """What a step keeps alive.

    Attributes:
        peak_bytes, peak_phase: largest live bytes, and where.
        by_phase: phase -> category -> bytes at that phase's own peak.
        timeline: `(phase, category -> bytes)` over both steps.
        segment_peaks: as in `MemoryTrace`.
        workspace_bytes: inside kernels on a CPU, in half precision (`MemoryTrace.half_scratch_bytes`); 0 for CUDA.
        parameters, trainable: how many.
        train_flops: of the matrix products and attention of one step's training, without its rollout; None where it
            was not run whole and rows differ (a shared prefix with many micro-batches).
        num_ops: operators run without data, None in a real run.
        wall_s: seconds that this took.
    """

    peak_bytes: int
    peak_phase: str
    by_phase: dict[str, dict[str, int]]
    timeline: list = field(repr=False)
    segment_peaks: dict[str, int] = field(default_factory=dict, repr=False)
    workspace_bytes: int = 0
    parameters: int = 0
    trainable: int = 0
    train_flops: int | None = None
    num_ops: int | None = None
    wall_s: float = 0.0

    @property
    def needed_bytes(self) -> int:
        """The peak with the workspace of kernels: what a verdict is about."""
        return self.peak_bytes + self.workspace_bytes


def model_config(plan: PlanConfig) -> PretrainedConfig:
    """The config of the plan's model, checked against its method.

    Raises:
        ValueError: see `load_config`; or if the method does not fit the model, or the sequence its positions.
    """
    if plan.model:
        config = load_config(plan.model)
    else:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "head_dim", "max_position_embeddings")
        shape = {name: getattr(plan, name) for name in names}
        config = AutoConfig.for_model("qwen3", **shape, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1)
    if is_encoder_decoder(config):
        if plan.method != "sft":
            raise ValueError(
                f"method {plan.method} needs a decoder-only model; {config.model_type} can be planned with sft"
            )
        if plan.lm_head != "full":
            raise ValueError(f"lm_head {plan.lm_head} needs a decoder-only model, and {config.model_type} is none")
        return config
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or 1
    if heads % groups:
        raise ValueError(f"{heads} attention heads are no multiple of {groups} key-value heads; no model can be built")
    limit = getattr(text, "max_position_embeddings", None)
    if limit and plan.prompt_tokens + plan.response_tokens > limit:
        raise ValueError(
            f"{plan.prompt_tokens} prompt and {plan.response_tokens} response tokens exceed "
            f"the model's {limit} positions"
        )
    return config


def simulate(plan: PlanConfig, config: PretrainedConfig | None = None, *, cuda: bool = False) -> StepMemory:
    """Runs the plan's step without its memory; on the kernels of CUDA if `cuda`.

    Raises:
        KernelWithoutFake: if a kernel's memory is not known.
        ValueError: if the plan and the model do not fit.
    """
    start = time.perf_counter()
    config = config or model_config(plan)
    with DryRun(sampled_token_id=2) as dry, like_cuda() if cuda else contextlib.nullcontext():
        result = _run(plan, config, whole=False)
    if cuda:
        result.workspace_bytes = 0
    result.num_ops, result.wall_s = dry.num_ops, time.perf_counter() - start
    return result


def execute(plan: PlanConfig, config: PretrainedConfig | None = None, *, device: str = "cpu") -> StepMemory:
    """Runs the plan's step really, generating every token."""
    start = time.perf_counter()
    with torch.device(device):
        result = _run(plan, config or model_config(plan), whole=True)
    result.wall_s = time.perf_counter() - start
    return result


def _run(plan: PlanConfig, config: PretrainedConfig, whole: bool) -> StepMemory:
    config._attn_implementation = plan.attention
    dtype = getattr(torch, plan.dtype)
    vocab_size = config.get_text_config(decoder=True).vocab_size
    model = build_model(config, dtype, initialise=whole)
    if plan.lm_head == "chunked" and plan.method != "mtp":
        add_logprob_head(model)
    reference = (
        build_model(config, dtype, initialise=whole).requires_grad_(False)
        if plan.needs_reference and not plan.lora_rank
        else None
    )
    if reference is not None and plan.lm_head == "chunked":
        add_logprob_head(reference)
    if plan.recomputed_share:
        recompute_activations(model, ratio=plan.recomputed_share, selective=plan.selective_checkpointing)
        if plan.lora_rank:
            model.enable_input_require_grads()
    if plan.lora_rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, target_modules="all-linear"),
            autocast_adapter_dtype=plan.dtype in ("float32", "float64"),
        )
    value = ValueModel(build_model(config, dtype, initialise=whole)) if plan.method == "ppo" else None
    model.train()
    trained = nn.ModuleList([model] if value is None else [model, value])
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = _optimizer(plan, parameters)

    trace = MemoryTrace(vocab_size)
    for module in filter(None, (trained, reference)):
        trace.track_as("weights", module.parameters())
        trace.track_as("weights", module.buffers())
    trace.hook_gradients(trained)
    rows_run = None
    with trace:
        for step in range(STEPS):
            trace.train_flops = 0
            if step == 0 and not whole:  # all that the first step leaves is the optimizer's state
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                trace.relabel("gradients", [parameter.grad for parameter in parameters])
            elif plan.method in ROLLOUT_METHODS:
                rows_run = _reinforce_step(plan, model, reference, value, trace, vocab_size, whole)
            else:
                rows_run = _supervised_step(plan, model, trace, vocab_size, is_encoder_decoder(config), whole)
            trace.phase = "optimizer"
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
                trace.relabel("optimizer", states)
                del states
            for parameter in parameters:
                parameter.grad = None
            trace.phase = "other"
    return StepMemory(
        trace.peak_bytes,
        trace.peak_phase,
        {phase: trace.categories_by_phase[phase] for phase in trace.peak_bytes_by_phase},
        trace.timeline,
        trace.segment_peaks,
        trace.half_scratch_bytes,
        sum(p.numel() for p in trained.parameters()),
        sum(p.numel() for p in parameters),
        trace.train_flops * plan.rows_per_step // rows_run if rows_run else None,
    )


def _optimizer(plan: PlanConfig, parameters):
    """None where the host steps (`offload_optimizer`)."""
    if plan.offload_optimizer:
        return None
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4, foreach=False)
    if plan.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-4, foreach=False)
    kind = {"adamw": {"fused": True}, "adamw_foreach": {"foreach": True}, "adamw_for_loop": {"foreach": False}}
    return torch.optim.AdamW(parameters, lr=1e-4, **kind[plan.optimizer])


class ValueModel(nn.Module):
    """PPO's critic: the policy's backbone with one number per position."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone = model.base_model
        hidden = model.config.get_text_config().hidden_size
        self.score = nn.Linear(hidden, 1, bias=False, dtype=next(model.parameters()).dtype)

    def forward(self, ids, mask):
        return self.score(self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)[..., 0]


def _backward(loss, trace) -> None:
    trace.phase = "train_backward"
    loss.backward()
    trace.phase = "other"


def _policy_loss(logps, old, advantages):
    """The clipped objective; by row for RLOO (`advantages` (m,)), by token for GRPO and PPO (m, R)."""
    if advantages.ndim == 1:
        logps, old = logps.sum(-1), old.sum(-1)
    ratio = (logps - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def _reinforce_step(plan, model, reference, value, trace, vocab_size, whole) -> int | None:
    ids, mask = make_prompts(plan, vocab_size)
    completions = generate(model, plan, ids, mask, trace, whole=whole)
    old = score(model, plan, ids, mask, completions, trace, whole=whole)
    if plan.needs_reference:
        with model.disable_adapter() if plan.lora_rank else contextlib.nullcontext():
            reference_logps = score(reference or model, plan, ids, mask, completions, trace, whole=whole)
    else:
        reference_logps = old
    num_rows, num_response = completions.shape
    rewards = torch.rand(num_rows, dtype=old.dtype) - plan.kl_coef * (old - reference_logps).sum(-1)
    full, full_mask = torch.cat([ids, completions], 1), torch.cat([mask, torch.ones_like(completions)], 1)
    if value is not None:
        with torch.no_grad():
            trace.phase = "score"
            parts = zip(full.split(plan.micro_batch_rows), full_mask.split(plan.micro_batch_rows))
            parts = list(parts)[: None if whole else 1]
            values = torch.cat([value(*part)[:, -num_response - 1 : -1] for part in parts])
            values = values if len(values) == num_rows else values.new_zeros(completions.shape)
            advantages = rewards[:, None] - values
            returns = advantages + values
    else:
        grouped = rewards.view(-1, plan.rloo_k)
        advantages = grouped - (grouped.sum(1, keepdim=True) - grouped) / (plan.rloo_k - 1)
        advantages = (advantages / grouped.std(1, keepdim=True) if plan.method == "grpo" else advantages).flatten()
    if plan.method == "grpo":
        advantages = advantages[:, None].expand(-1, num_response)

    if plan.shared_prefix:
        groups = prompt_groups(plan, ids, completions, whole)
        _shared_prefix_backward(plan, model, groups, old, advantages, num_rows, trace)
        held = sum(len(group.completions) for group in groups)
        return held if held == len(groups) * plan.rloo_k else None
    rows_run = 0
    for rows in distinct(torch.arange(num_rows).split(plan.micro_batch_rows), whole):
        parts = rows.split(plan.rows_per_forward if plan.lm_head == "chunked" else len(rows))
        for part in distinct(parts, whole):
            rows_run += len(part)
            trace.phase = "train_forward"
            logps = response_logps(model, plan, full[part], full_mask[part], num_response)
            loss = _policy_loss(logps, old[part], advantages[part])
            if plan.method == "grpo" and plan.needs_reference:
                difference = reference_logps[part] - logps
                loss = loss + plan.kl_coef * (difference.exp() - difference - 1)
            loss = loss.sum() / num_rows
            if value is not None:
                predicted = value(full[part], full_mask[part])[:, -num_response - 1 : -1]
                loss = loss + 0.1 * (predicted - returns[part]).square().mean()
                del predicted
            _backward(loss, trace)
            del logps, loss
    return rows_run


def _shared_prefix_backward(plan, model, groups, old, advantages, num_rows, trace) -> None:
    trace.phase = "train_forward"

    def loss_fn(scores):
        loss = _policy_loss(scores.logps, old[scores.rows], advantages[scores.rows]).sum() / num_rows
        trace.phase = "train_backward"
        return loss

    def backward(loss):
        loss.backward()
        trace.phase = "train_forward"

    def prompt_backward(tensors, gradients):
        trace.phase = "train_backward"
        torch.autograd.backward(tensors, gradients)

    shared_prefix_backward(
        model,
        groups,
        loss_fn,
        max_branches=plan.micro_batch_rows,
        max_branch_tokens=2**62,
        branch_forward=branch_forward(plan),
        backward=backward,
        prompt_backward=prompt_backward,
        self_check=False,
    )
    trace.phase = "other"


def _supervised_step(plan, model, trace, vocab_size, encoder_decoder, whole) -> int:
    ids, mask = make_prompts(plan, vocab_size)
    targets = torch.randint(2, max(vocab_size - 1, 3), (len(ids), plan.response_tokens))
    rows_run = 0
    for rows in distinct(torch.arange(len(ids)).split(plan.micro_batch_rows), whole):
        trace.phase = "train_forward"
        if encoder_decoder:
            loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=targets[rows]).loss
        else:
            full = torch.cat([ids, targets], 1)[rows]
            full_mask = torch.cat([mask, torch.ones_like(targets)], 1)[rows]
            loss = _token_loss(plan, model, full, full_mask)
        _backward(loss * (len(rows) / len(ids)), trace)
        rows_run += len(rows)
        del loss
    return rows_run


def _token_loss(plan, model, full, full_mask):
    if plan.method == "mtp":
        return _mtp_loss(plan, model, full, full_mask)
    if plan.lm_head == "full":
        return model(input_ids=full, attention_mask=full_mask, labels=full, use_cache=False).loss
    num_tokens = full.shape[1] - 1 if plan.lm_head == "chunked" else plan.response_tokens
    return -response_logps(model, plan, full, full_mask, num_tokens).mean()


def _mtp_loss(plan, model, full, full_mask):
    hidden = causal_lm(model).base_model(input_ids=full, attention_mask=full_mask, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    if plan.lm_head == "chunked":
        try:
            from lowmem.mtp_loss import mtp_ce_loss
        except ImportError:
            raise ValueError("method mtp with lm_head chunked needs lowmem.mtp_loss, which is not installed") from None
        losses = mtp_ce_loss(hidden, head.weight, full, full_mask, n_future=plan.num_future_tokens)
        return losses["unweighted_ce_loss"]
    losses = []
    for k in range(1, plan.num_future_tokens + 1):
        logits = head(hidden[:, :-k]).float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), full[:, k:].flatten()))
    return torch.stack(losses).mean()
