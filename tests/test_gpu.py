"""What only a CUDA device can show. Skipped without one; experiments/run_gpu_checks.sh runs them."""

import pytest
import torch
import torch.nn.functional as F
from test_shared_prefix_models import make_model
from torchrun import largest_difference, probe

from lowmem.live_bytes import LiveBytes
from lowmem.logprobs import chunked_logprobs
from lowmem.mtp_backward import sequential_mtp_backward
from lowmem.mtp_logits import compute_mtp_ce_loss
from lowmem.mtp_loss import mtp_ce_loss
from lowmem.shared_prefix import PromptGroup
from lowmem.shared_prefix_generation import shared_prefix_generate
from lowmem.shared_prefix_self_check import check_shared_prefix
from lowmem.zero2 import zero2_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def problem(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(512, 256, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(151_936, 256, device="cuda") / 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 151_936, (512,), device="cuda")


def test_chunked_logprobs_match_plain_in_float32():
    hidden, weight, targets = problem(torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    reference = torch.autograd.grad(expected.sum(), (hidden, weight))
    found, _ = chunked_logprobs(hidden, weight, targets, chunk_tokens=64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), (hidden, weight)), reference):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_live_bytes_agree_with_the_caching_allocator():
    hidden, weight, targets = problem(torch.bfloat16)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    meter = LiveBytes(device="cuda")
    meter.track((hidden, weight, targets))  # `start` contains them, and operators return views of them
    held = meter.live_bytes
    with meter:
        chunked_logprobs(hidden, weight, targets, chunk_tokens=64)[0].sum().backward()
    torch.cuda.synchronize()
    peak, counted = torch.cuda.max_memory_allocated() - start, meter.peak_bytes - held
    assert counted <= peak * 1.01, "the meter counts memory that was never allocated"
    assert counted >= peak * 0.9 - 64 * 2**20, "the meter misses more than kernel workspaces"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_shared_prefix_matches_plain_rows(dtype, tolerance, checkpointing):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model("qwen3", dtype).to("cuda")
    if checkpointing:
        model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).to("cuda") for n in (200, 33, 64)]
    figures = check_shared_prefix(model, PromptGroup(ids[0], ids[1:]))
    assert figures["logp_error_mean"] <= tolerance and figures["grad_error"] <= tolerance


def test_self_check_allows_for_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    model = make_model("qwen3", torch.float32).to("cuda")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).to("cuda") for n in (200, 33, 64)]
    figures = check_shared_prefix(model, PromptGroup(ids[0], ids[1:]))
    assert figures["logp_error_mean"] <= 0.5 * figures["logp_tolerance"]


def test_shared_prefix_generates_the_greedy_tokens_of_stock():
    model = make_model("qwen3", torch.float32).to("cuda").eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1)).to("cuda")
    mask, options = torch.ones_like(ids), {"do_sample": False, "max_new_tokens": 16}
    stock = model.generate(ids.repeat_interleave(3, 0), attention_mask=mask.repeat_interleave(3, 0), **options)
    assert torch.equal(shared_prefix_generate(model, ids, mask, 3, **options), stock)


def mtp_problem(dtype):
    hidden, weight, targets = problem(dtype)
    hidden = hidden.detach().view(4, 32, 4, 256).requires_grad_()  # 4 rows of 32 positions, 4 heads
    return hidden, weight, targets[:128].view(4, 32)


def naive_mtp(hidden, weight, labels):
    logits = hidden @ weight.T
    heads = (
        F.cross_entropy(logits[:, :-k, k - 1].flatten(0, 1).float(), labels[:, k:].flatten()) for k in (1, 2, 3, 4)
    )
    return sum(heads) / 4


@pytest.mark.parametrize("form", ["hidden", "whole vocabulary", "logits in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multi_token_prediction_is_no_further_from_float32_than_naive(dtype, form):
    torch.backends.cuda.matmul.allow_tf32 = False

    def ours(hidden, weight, labels):
        if form == "hidden":
            return mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"]
        if form == "logits in place":
            return compute_mtp_ce_loss(hidden @ weight.T, labels, inplace_backward=True)["weighted_ce_loss"]
        heads = [lambda _, k=k: hidden[:, :, k] for k in range(4)]
        tile = dict(chunk_tokens=16, chunk_vocab=weight.shape[0])
        return sequential_mtp_backward(hidden.detach()[:, :, 0], heads, weight, labels, **tile)["weighted_ce_loss"]

    def gradients(loss_of, dtype):
        hidden, weight, labels = mtp_problem(dtype)
        loss = loss_of(hidden, weight, labels)
        if loss.requires_grad:
            loss.backward()
        return [loss.detach().float(), hidden.grad.float(), weight.grad.float()]

    wide = [x.float().detach().requires_grad_() if x.is_floating_point() else x for x in mtp_problem(dtype)]
    truth = [naive_mtp(*wide)]
    truth[0].backward()
    truth += [wide[0].grad, wide[1].grad]
    for mine, stock, exact in zip(gradients(ours, dtype), gradients(naive_mtp, dtype), truth):
        assert (mine - exact).norm() <= 1.05 * (stock - exact).norm() + 1e-5 * exact.norm()


def test_multi_token_prediction_holds_a_tile():
    hidden, weight, labels = mtp_problem(torch.bfloat16)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"].backward()
    torch.cuda.synchronize()
    held = 6 * weight.numel() + 64 * 2**20  # the head's gradient in float32 and in its own type; tiles and workspaces
    assert torch.cuda.max_memory_allocated() - start <= held


# --- memory strategies, in the trainer of memory_probe.py ------------------------------------------------------------

CUDA = {"use_cpu": False, "_prompt_tokens": 512, "_completion_tokens": 32}
CUDA |= {"_shape": {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}}
LAUNCHED = {"env": {}}  # by itself: a fork of the probe server cannot use CUDA if a library has touched it


def watch_device(trainer, result) -> None:
    """Hook of memory_probe: the most that training steps have on the device, and what the step before left there."""
    step = trainer.training_step

    def watched(*args, **kwargs):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = step(*args, **kwargs)
        result.setdefault("held_bytes", []).append(before)
        result.setdefault("peak_bytes", []).append(torch.cuda.max_memory_allocated() - before)
        return output

    trainer.training_step = watched


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    settings = CUDA | {"_hook": "test_gpu:watch_device"}
    return probe(tmp_path_factory.mktemp("plain"), settings, **LAUNCHED)[0]


@pytest.mark.parametrize(
    "strategy",
    [
        {"gradient_checkpointing": True, "selective_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_ratio": 0.5},
        {"activation_offloading": True},
    ],
    ids=str,
)
def test_activations_that_are_not_kept_change_nothing(tmp_path, plain, strategy):
    ours = probe(tmp_path, CUDA | strategy | {"_hook": "test_gpu:watch_device"}, **LAUNCHED)[0]
    assert largest_difference(ours["weights"], plain["weights"]) < 1e-5
    assert ours["peak_bytes"][-1] < 0.9 * plain["peak_bytes"][-1]


def engine_and_device(trainer, result) -> None:
    """Hook of memory_probe: `watch_device`, and where DeepSpeed keeps its parts."""
    from test_zero2 import watch
    from transformers import TrainerCallback

    from lowmem.zero2 import zero_optimizer

    watch_device(trainer, result)
    watch(trainer, result)

    class Places(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            zero = zero_optimizer(optimizer)
            parts = zero.single_partition_of_fp32_groups
            states = [t for part in parts for t in zero.optimizer.state[part].values() if t.ndim]
            result["places"] = sorted({t.device.type for t in [*parts, *states]})

    trainer.add_callback(Places())


def test_gradients_and_adamw_of_one_gpu_on_the_host_change_nothing(tmp_path, plain):
    """ZeRO-2 with a world of one: weights of AdamW on the device, and less of it taken between steps."""
    settings = CUDA | {"deepspeed": zero2_config(bucket_elements=100_000), "_hook": "test_gpu:engine_and_device"}
    ours = probe(tmp_path, settings, **LAUNCHED)[0]
    assert largest_difference(ours["weights"], plain["weights"]) < 1e-5
    full = ours["bytes"]["full_gradient_bytes"]
    assert ours["bytes"]["optimizer_bytes"] == 2 * full and ours["places"] == ["cpu"]
    assert ours["held_bytes"][-1] < plain["held_bytes"][-1] - 1.5 * full, "AdamW's moments are still on the device"


def limit_device(trainer, result) -> None:
    """Hook of memory_probe: after the first step, less memory than a whole micro-batch takes."""
    watch_device(trainer, result)
    step = trainer.training_step

    def limited(*args, **kwargs):
        output = step(*args, **kwargs)
        if len(result["peak_bytes"]) == 1:
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_reserved() + 0.7 * result["peak_bytes"][0]
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(allowed / total)
        result["events"] = [] if trainer._oom_recovery is None else trainer._oom_recovery.events
        return output

    trainer.training_step = limited


def test_a_cuda_out_of_memory_is_survived(tmp_path, plain):
    settings = CUDA | {"num_iterations": 4, "_hook": "test_gpu:limit_device"}  # no generation after the first step
    with pytest.raises(AssertionError, match="out of memory"):
        probe(tmp_path / "plain", settings, **LAUNCHED)
    ours = probe(tmp_path / "recovered", settings | {"oom_recovery": True}, **LAUNCHED)[0]
    assert ours["events"] and "CUDA out of memory" in ours["events"][0]["error"]
    reference = probe(tmp_path / "reference", CUDA | {"num_iterations": 4}, **LAUNCHED)[0]
    assert largest_difference(ours["weights"], reference["weights"]) < 1e-5
