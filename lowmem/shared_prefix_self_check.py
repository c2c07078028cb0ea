"""One group computed shared and plain before the shared prefix is first used, so that no wrong number is trained on.

The obvious check, one tolerance for all models, works in float32 and float64, where a fault is far above rounding. In
half precision rounding itself ranges over two orders of magnitude: in bfloat16 a correct Qwen3 shape of 28 layers
differs by 0.05 nats a token at an initializer range of 0.3, while positions off by one cost 0.005 in 8 layers at 0.02.
So there the tolerance is measured: the plain way runs once more with what every layer rounds rounded otherwise.

    figures = check_shared_prefix(model, PromptGroup(prompt_ids, completions))
"""

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.shared_prefix_checks import checkpointing_is_active, transformers_model
from lowmem.shared_prefix_distributed import gradients_stay_local, least_of_ranks, reshard, without_wrapper
from lowmem.shared_prefix_packing import can_pack
from lowmem.shared_prefix_prompt import BranchForward, SharedPrompt, score_logits

if TYPE_CHECKING:
    from lowmem.shared_prefix import PromptGroup

# Largest accepted error of (log-probability in nats, gradient relative to its norm), by machine epsilon: float64 and
# float32. A fault such as lost positions or a lost prompt gradient is above 0.5 in both.
TOLERANCES = {torch.finfo(torch.float64).eps: (1e-5, 1e-4), torch.finfo(torch.float32).eps: (1e-3, 1e-2)}
TF32_EPS = 2.0**-10
# In coarser arithmetic: this many times what one unit in the last place of what every layer rounds does. A correct
# computation is at 1.0 times that at most (2 to 28 layers, bfloat16, float16 and autocast, on a CPU).
# Log-probabilities are compared by their mean, because single tokens differ more between two plain layouts as well;
# of a few tokens the mean is left to chance, so rounding is repeated until it has met this many.
TOLERANCE_IN_ROUNDINGS = 3.0
ROUNDED_TOKENS = 32
# Accepted in any case where a router chooses experts: rounding may send a token to another one in one way and in no
# other, which is no fault and changes more than rounding does.
ROUTED_TOLERANCE = (0.05, 0.3)


IN_ONE_ROW = " with the completions in one row"  # in messages


class SharedPrefixMismatch(RuntimeError):
    """The shared and the plain computation of one group differ by more than rounding."""


def check_shared_prefix(
    model: nn.Module,
    group: "PromptGroup",
    *,
    branch_forward: BranchForward = score_logits,
    gradients: bool = True,
    max_completions: int = 2,
    max_completion_tokens: int = 64,
    share_rows: bool = True,
) -> dict[str, float]:
    """Runs part of a group shared and plain, and raises rather than lets training go on with wrong numbers.

    The plain way runs `[prompt, completion]` one at a time, with the same `branch_forward`; the shared way has a row
    for each completion, and once more one for all where the model can (a group of one then gets a second). The loss is
    the log-probabilities times fixed random weights. Leaves `.grad` and the random state as they were; holds two sets
    of gradients on the CPU. With FSDP2 all ranks call it with as many completions, and each looks at its shards.

    Returns:
        `logp_error_max`, `logp_error_mean` (nats) and `grad_error` (norm of the difference over the norm, of all
        parameters together; 0 without `gradients`), each the larger of both layouts, and what is accepted:
        `logp_tolerance` (of the maximum, in half precision of the mean) and `grad_tolerance`.

    Raises:
        SharedPrefixMismatch: if an error exceeds its tolerance or is not finite, or if a gradient is missing.
        NotImplementedError, RuntimeError: see `SharedPrompt`; also if rounding cannot be measured in half precision.
    """
    prompt_ids, device = group.prompt_ids, group.prompt_ids.device
    model = without_wrapper(model, gradients=gradients)
    completions = [ids[:max_completion_tokens] for ids in group.completions[:max_completions]]
    share_rows = share_rows and can_pack(model)
    if share_rows and len(completions) == 1:
        completions.append(completions[0].flip(0))  # another one: other groups may have more, and share rows
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(len(ids), generator=generator).to(device) for ids in completions]

    def backward(logps, weight):
        if gradients:
            (logps * weight).sum().backward()
        return logps.detach()

    def shared(num_rows):
        with SharedPrompt(model, prompt_ids) as prompt:
            logps, _, mask = prompt.score(completions, branch_forward, num_rows)
            return backward(logps[mask], torch.cat(weights)), _coarsest_eps(model, prompt.dtype, device)

    def plain():
        rows = []
        for ids, weight in zip(completions, weights, strict=True):
            row = torch.cat([prompt_ids, ids[:-1]])[None]
            positions = torch.arange(row.shape[1], device=row.device)[None]
            inputs = {"input_ids": row, "position_ids": positions, "use_cache": False}
            rows.append(backward(branch_forward(model, inputs, ids[None])[0][0], weight))
        return torch.cat(rows)

    reshard(model)
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        with torch.set_grad_enabled(gradients), gradients_stay_local(model):
            (logps, eps), grads = _with_gradients(model, functools.partial(shared, len(completions)))
            reference = _with_gradients(model, plain)
            found = {"": _differences((logps, grads), reference)}
            faults = ["no parameter received a gradient"] if gradients and not grads else []
            if one_sided := sorted(grads.keys() ^ reference[1].keys()):
                faults.append(f"only one of both has a gradient for {one_sided[:4]}")
            del grads  # two sets at a time
            if share_rows:
                (logps, _), grads = _with_gradients(model, functools.partial(shared, 1))
                found[IN_ONE_ROW] = _differences((logps, grads), reference)
                if one_sided := sorted(grads.keys() ^ reference[1].keys()):
                    faults.append(f"only one of both has a gradient for {one_sided[:4]}{IN_ONE_ROW}")
                del grads
            if eps in TOLERANCES:
                logp_tolerance, grad_tolerance = TOLERANCES[eps]
            else:
                num_tokens = least_of_ranks(model, sum(len(ids) for ids in completions), device)
                logp_tolerance, grad_tolerance = _measured_tolerances(model, plain, reference, eps, num_tokens)
    finally:
        reshard(model)
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
    decisive = "logp_error_max" if eps in TOLERANCES else "logp_error_mean"
    for layout, (errors, worst) in found.items():
        if not errors[decisive] <= logp_tolerance:
            faults.append(f"{decisive} exceeds {logp_tolerance:.2g}{layout}")
        if not errors["grad_error"] <= grad_tolerance:
            faults.append(f"grad_error exceeds {grad_tolerance:.2g}{layout}, most of it in {worst}")
    (figures, _), *others = found.values()
    for errors, _ in others:
        figures = {name: _larger(error, errors[name]) for name, error in figures.items()}
    figures |= {"logp_tolerance": logp_tolerance, "grad_tolerance": grad_tolerance}
    if faults:
        raise SharedPrefixMismatch(
            f"Shared prefix and plain computation differ: {'; '.join(faults)} ({figures}). Nothing was trained. Leave "
            "the shared prefix off for this model (`share_rows=False` where only completions in one row differ), and "
            "report the model's configuration."
        )
    return figures


def _measured_tolerances(model: nn.Module, plain, reference, eps: float, num_tokens: int) -> tuple[float, float]:
    """Accepted errors (mean log-probability, gradient): what rounding does to `reference`, several times over."""
    logp_tolerance, grad_tolerance = ROUTED_TOLERANCE if _has_experts(model) else (0.0, 0.0)
    for seed in range(math.ceil(ROUNDED_TOKENS / num_tokens)):
        with _layers_rounded_otherwise(model, eps, seed):
            rounding, _ = _differences(_with_gradients(model, plain), reference)
        logp_tolerance = max(logp_tolerance, TOLERANCE_IN_ROUNDINGS * rounding["logp_error_mean"])
        grad_tolerance = max(grad_tolerance, TOLERANCE_IN_ROUNDINGS * rounding["grad_error"])
    return logp_tolerance, grad_tolerance


def _coarsest_eps(model: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """Machine epsilon of the coarsest arithmetic in use, which the dtype of keys and values does not always show."""
    eps = torch.finfo(dtype).eps
    quantizer = getattr(transformers_model(model), "hf_quantizer", None)
    if quantizer is not None or not all(parameter.is_floating_point() for parameter in model.parameters()):
        eps = max(eps, torch.finfo(torch.bfloat16).eps)  # products in half precision, kept in the dtype of their input
    if device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        eps = max(eps, TF32_EPS)
    return eps


def _has_experts(model: nn.Module) -> bool:
    settings = transformers_model(model).config.get_text_config(decoder=True).to_dict()
    return any("experts" in name and isinstance(value, int) and value > 1 for name, value in settings.items())


def _with_gradients(model, run):
    model.zero_grad(set_to_none=True)
    result = run()
    reshard(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, {name: (g.to_local() if isinstance(g, DTensor) else g).to("cpu") for name, g in grads.items()}


@contextmanager
def _layers_rounded_otherwise(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    """Moves every number that a decoder layer rounds by a random -1, 0 or 1 times `eps`, the same in a replay.

    It rounds its output; under autocast, whose residual stream keeps float32, only what it adds to its input.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise NotImplementedError(
            "The self-check cannot tell rounding from a fault in half precision: no layer of the model is a "
            "`GradientCheckpointingLayer`. Check the model in float32 with `check_shared_prefix`, and pass "
            "`self_check=False` (in a trainer's config `shared_prefix_self_check=False`)."
        )

    def round_otherwise(number):
        def hook(layer, args, output):
            hidden, *others = output if isinstance(output, tuple) else (output,)
            rounded = hidden if torch.finfo(hidden.dtype).eps >= eps else hidden - args[0]
            generator = torch.Generator(hidden.device).manual_seed(seed * len(layers) + number)
            steps = torch.randint(-1, 2, hidden.shape, generator=generator, device=hidden.device, dtype=torch.int8)
            hidden = hidden + rounded * (eps * steps).to(hidden.dtype)
            return (hidden, *others) if isinstance(output, tuple) else hidden

        return hook

    handles = [layer.register_forward_hook(round_otherwise(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differences(found, reference) -> tuple[dict[str, float], str | None]:
    """Errors of (log-probabilities, gradients) against others, and the parameter that most of it is in."""
    (logps, grads), (reference_logps, reference_grads) = found, reference
    difference = (logps.cpu().double() - reference_logps.cpu().double()).abs()  # not every device has float64
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float64)
    errors = {n: norm(grads[n] - reference_grads[n]).item() for n in grads.keys() & reference_grads.keys()}
    whole = math.hypot(*(norm(grad).item() for grad in reference_grads.values()))
    figures = {
        "logp_error_max": difference.max().item(),
        "logp_error_mean": difference.mean().item(),
        "grad_error": math.hypot(*errors.values()) / whole if whole > 0 else 0.0,
    }
    return figures, max(errors, key=errors.get, default=None)


def _larger(a: float, b: float) -> float:
    """Like `max`, but nan if one is."""
    return a if a != a or a > b else b


_checked: weakref.WeakKeyDictionary[nn.Module, set] = weakref.WeakKeyDictionary()  # modes that passed, by model


def check_on_first_use(
    model: nn.Module,
    groups: Sequence["PromptGroup"],
    branch_forward: BranchForward,
    gradients: bool,
    share_rows: bool = True,
) -> None:
    """`check_shared_prefix` on one group, once per model and mode.

    The mode: attention, training, checkpointing, gradients, shared rows, types and the adapter that is trained, and
    what `branch_forward` runs.
    """
    function = getattr(branch_forward, "func", branch_forward)  # of a partial
    mode = (
        transformers_model(model).config._attn_implementation,
        model.training,
        checkpointing_is_active(model),
        gradients,
        share_rows,
        tuple((p.requires_grad, p.dtype) for p in model.parameters()),  # says which adapter is active
        getattr(function, "__code__", type(function)),  # the same for a function that is made anew in every step
    )
    passed = _checked.setdefault(model, set())
    shared = [group for group in groups if len(group.prompt_ids) > 1]  # one token leaves nothing to share
    if not groups or mode in passed:
        return
    num = min(2, len(shared[0].completions)) if shared else 0
    num = least_of_ranks(model, num, groups[0].prompt_ids.device)
    if num:
        options = {"gradients": gradients, "max_completions": num, "share_rows": share_rows}
        check_shared_prefix(model, shared[0], branch_forward=branch_forward, **options)
        passed.add(mode)
