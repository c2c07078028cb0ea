"""Trains a few real RLOO or PPO steps in one fork tree and saves every quantity that has to stay the same.

    python tests/rloo_probe.py OUT.safetensors '{"adam_epsilon": 1e-4}' --variant string-level@3 --rloo_k 3 ...

One process, one tree: the parity tests start it once per tree and compare the files. Saved per step: prompts and
sampled tokens, log-probabilities, advantages, the loss that was backpropagated, every gradient at every optimizer step
and every parameter after it. The trainers keep most of these as locals of `train`, so they are read from the frame
that calls `accelerator.backward`. With `"algorithm": "ppo"` the trainer is the one of ppo_builder.py.
"""

import functools
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent / "experiments"),
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent),
]

import train as experiment  # noqa: E402

FRAME_TENSORS = ("query_responses", "logprobs", "ref_logprobs", "advantages", "padding_mask")
FRAME_TENSORS += ("values", "returns", "rewards", "scores")  # PPO's


def probe(out: str, extra: dict, argv: list[str]) -> None:
    config, stage = experiment.parse_config(argv)
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from transformers import TrainerCallback

    import trainers
    from data import load_prompts, load_tokenizer

    if extra.pop("token_ids", False):
        as_dataset = trainers.as_dataset
        trainers.as_dataset = lambda prompts, tokenizer, as_text: as_dataset(prompts, tokenizer, as_text=False)
    if extra.pop("algorithm", "rloo") == "ppo":
        import ppo_builder

        reward_as_module = extra.pop("reward_as_module", stage.name == "0")
        trainers.build_v020 = functools.partial(ppo_builder.build, reward_as_module=reward_as_module)
    plain_arguments = trainers.training_arguments
    trainers.training_arguments = lambda c: plain_arguments(c) | extra
    if config.dtype == "float64":
        use_float64_statistics()
        use_float64_scores(config)
    tokenizer = load_tokenizer(config)
    prompts = load_prompts(config, tokenizer)
    saved: dict[str, torch.Tensor] = {}
    losses, counts = defaultdict(float), defaultdict(int)

    class Metrics(TrainerCallback):
        """What the trainer logs, but for what depends on time."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            for name, value in logs.items():
                if isinstance(value, (int, float)) and not any(word in name for word in ("eps", "time", "per_second")):
                    saved[f"log{counts['log']}.{name}"] = torch.tensor(value, dtype=torch.float64).nan_to_num(-1.0)
            counts["log"] += 1

    trainer, policy, _ = trainers.build_trainer(config, stage, tokenizer, prompts, [Metrics()])
    generate, backward = policy.generate, trainer.accelerator.backward

    def watched_generate(*args, **kwargs):
        output = generate(*args, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        number = counts["generate"]
        saved[f"generate{number}.input_ids"] = kwargs["input_ids"] * kwargs["attention_mask"]
        saved[f"generate{number}.sequences"] = sequences
        counts["generate"] += 1
        return output

    def watched_backward(loss, *args, **kwargs):
        frame = sys._getframe(1)
        number = counts["optimizer"]
        losses[number] += loss.detach().double()
        for name in FRAME_TENSORS:
            if isinstance(frame.f_locals.get(name), torch.Tensor):
                saved[f"step{number}.{name}"] = frame.f_locals[name]
        return backward(loss, *args, **kwargs)

    def before_step(*_):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                saved[f"step{counts['optimizer']}.grad.{name}"] = parameter.grad.clone()

    def after_step(*_):
        number = counts["optimizer"]
        saved[f"step{number}.loss"] = torch.as_tensor(losses[number])  # 0 without `accelerator.backward`
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                saved[f"step{number}.param.{name}"] = parameter.detach().clone()
        counts["optimizer"] += 1

    policy.generate, trainer.accelerator.backward = watched_generate, watched_backward
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
    trainer.train()
    save_file({key: value.detach().clone().contiguous() for key, value in saved.items()}, out)


def use_float64_statistics() -> None:
    """transformers computes RMSNorm and RoPE in float32 even in a float64 model; a difference of one float64 rounding
    can then become one float32 rounding. For a comparison at 1e-12 both have to be float64."""
    from transformers.models.qwen3 import modeling_qwen3

    def rms_norm(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    modeling_qwen3.Qwen3RMSNorm.forward = rms_norm


def use_float64_scores(config) -> None:
    """`generate` returns its scores in float32 even for a float64 model, and stock v0.20.0 reads the old
    log-probabilities from them. Replaced by the logits of a plain forward pass over the sampled tokens, in float64."""
    from trl.trainer import utils

    stock = getattr(utils, "generate", None)
    if stock is None:  # v1.16.0 has no such function
        return

    def generate(model, queries, pad_token_id, generation_config, *args):
        query_responses, scores = stock(model, queries, pad_token_id, generation_config, *args)
        if scores is None:
            return query_responses, None
        mask = query_responses != pad_token_id
        positions = mask.cumsum(1) - mask.long()
        logits = model(query_responses.masked_fill(~mask, 0), attention_mask=mask, position_ids=positions).logits
        return query_responses, logits[:, queries.shape[1] - 1 : -1] / (config.temperature + 1e-7)

    utils.generate = generate


if __name__ == "__main__":
    torch.set_num_threads(1)
    probe(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
