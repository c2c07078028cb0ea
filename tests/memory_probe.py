"""One training run of a trainer of the v1.16.0 series, alone or under torchrun, with what the memory tests compare.

    torchrun --standalone --nproc_per_node 2 tests/memory_probe.py OUT_PREFIX '{"sequence_parallel_size": 2}'

Every rank writes OUT_PREFIX<rank>.json (gradient norms, logged metrics, byte counts, events) and the weights as
OUT_PREFIX<rank>.safetensors. The JSON argument holds fields of the trainer's config; names that begin with `_` are
ours, see `DEFAULTS`.

So that runs with another number of processes or another micro-batch, and resumed ones, train on the same data,
completions are made from (optimizer step, global row) by a generator of their own instead of being sampled.
`"_sampled": true` samples.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "experiments"), str(ROOT)]

import variants  # noqa: E402

DEFAULTS = {
    "_trainer": "rloo",
    "_variant": "shared-prefix",
    "_model": "qwen3",
    "_shape": {},  # of the model
    "_dtype": "float32",
    "_tied": True,
    "_lora": 0,
    "_prompt_tokens": 12,
    "_completion_tokens": 9,
    "_prompts": 16,
    "_sampled": False,
    "_optimizer": None,  # "sgd" or None: the config's
    "_resume": None,  # a checkpoint
    "_fault": None,  # see plant_fault
    "_hook": None,  # "module:function", called with the trainer before it trains
    "_live": False,  # count live bytes by phase
    "_evaluate": False,
}


def main(out: str, settings: dict) -> None:
    ours = DEFAULTS | {name: settings.pop(name) for name in list(settings) if name.startswith("_")}
    if unknown := ours.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown: {sorted(unknown)}")
    variants.activate(ours["_variant"])
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

    import data
    from lowmem.live_bytes import LiveBytes
    from lowmem.zero2 import stand_alone
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    tokenizer = data.AutoTokenizer.from_pretrained(data.default_tokenizer_folder(512), padding_side="left")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 40_960} | ours["_shape"]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            tie_word_embeddings=ours["_tied"],
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    ).to(getattr(torch, ours["_dtype"]))
    folder = Path(out).parent / f"{Path(out).name}model{rank}"
    model.save_pretrained(folder)  # the reference model is loaded from there
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, ours["_dtype"]))
    prompts = data.text_prompts(
        tokenizer, ours["_prompts"], max(1, ours["_prompt_tokens"] // 2), ours["_prompt_tokens"], seed=0
    )
    arguments = {
        "output_dir": tempfile.mkdtemp(prefix="memory-probe-"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "learning_rate": 3e-4,
        "epsilon": 0.5,  # most ratios are inside
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,  # Adam at 1e-8 turns rounding of a near-zero gradient into a full step
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": ours["_completion_tokens"],
        "gradient_checkpointing": False,
        "beta": 0.1,
        "max_steps": 4,
        "max_grad_norm": 1.0,
        "seed": 3,
    } | settings
    peft_config = None
    if ours["_lora"]:
        from peft import LoraConfig

        peft_config = LoraConfig(r=ours["_lora"], lora_alpha=16, target_modules="all-linear")
    config_class, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[
        ours["_trainer"]
    ]
    result = {"rows_scored": 0, "grad_norms": [], "log": [], "events": []}

    def reward(completions, completion_ids, **_):
        result["rows_scored"] += len(completions)
        return [sum(ids) % 97 / 97 + 0.01 * len(ids) for ids in completion_ids]

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            result["log"].append({k: v for k, v in logs.items() if isinstance(v, (int, float))})

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = ours["_evaluate"]

    if "deepspeed" in arguments:
        stand_alone()
    dataset = Dataset.from_dict({"prompt": prompts})
    args = config_class(**arguments)
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)) if ours["_evaluate"] else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Watch()],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None)
        if ours["_optimizer"] == "sgd"
        else (None, None),
    )
    if not ours["_sampled"]:
        make_completions(trainer, ours["_completion_tokens"])

    def before_step(*_):
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        if grads:
            result["grad_norms"].append(torch.stack([g.double().norm() for g in grads]).norm().item())

    register_optimizer_step_pre_hook(before_step)
    if ours["_fault"]:
        plant_fault(trainer, ours["_fault"])
    if ours["_hook"]:
        import importlib

        module, _, name = ours["_hook"].partition(":")
        getattr(importlib.import_module(module), name)(trainer, result)
    if ours["_live"]:
        meter = LiveBytes()
        meter.track(model.parameters())
        watch_phases(trainer, meter)
        with meter:
            trainer.train(resume_from_checkpoint=ours["_resume"])
        result["live_peak_bytes_by_phase"] = meter.peak_bytes_by_phase
    else:
        trainer.train(resume_from_checkpoint=ours["_resume"])
    result["world_size"] = trainer.accelerator.num_processes
    weights = {n: p.detach().clone().contiguous() for n, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(weights, f"{out}{rank}.safetensors")
    Path(f"{out}{rank}.json").write_text(json.dumps(result))


def make_completions(trainer, longest: int) -> None:
    """Replaces what was generated: ragged, the same for every number of processes."""
    import torch

    num_evaluated = 0

    def generate(prompt_ids, *_, **__):
        nonlocal num_evaluated
        is_training = trainer.model.training
        call = trainer.state.global_step if is_training else num_evaluated
        num_evaluated += not is_training
        first_row = trainer.accelerator.process_index * len(prompt_ids)
        completions = []
        for row in range(first_row, first_row + len(prompt_ids)):
            generator = torch.Generator().manual_seed(10_000 * call + row + 5_000 * (not is_training))
            length = int(torch.randint(1, longest + 1, (1,), generator=generator))
            ids = torch.randint(2, 500, (length,), generator=generator).tolist()
            if length < longest:
                ids[-1] = trainer.eos_token_ids[0]
            completions.append(ids)
        return (completions, None) if type(trainer).__name__ == "GRPOTrainer" else completions

    trainer._generate_single_turn = generate


def watch_phases(trainer, meter) -> None:
    """Phases of the meter: `score` without gradients, `train_forward`, `train_backward`, `optimizer`."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    backward = trainer.accelerator.backward

    def watched_backward(*args, **kwargs):
        meter.phase = "train_backward"
        backward(*args, **kwargs)
        meter.phase = "other"

    def before_forward(*_):
        if meter.phase != "train_backward":  # a recomputation belongs to the backward
            meter.phase = "train_forward" if torch.is_grad_enabled() else "score"

    trainer.accelerator.backward = watched_backward
    trainer.model.base_model.register_forward_pre_hook(before_forward)
    register_optimizer_step_pre_hook(lambda *_: setattr(meter, "phase", "optimizer"))
    register_optimizer_step_post_hook(lambda *_: setattr(meter, "phase", "other"))


def plant_fault(trainer, fault: str) -> None:
    """Breaks the run as a bug would, for the negative controls."""
    import torch

    backward = trainer.accelerator.backward
    if fault == "half the loss":
        trainer.accelerator.backward = lambda loss, **kwargs: backward(loss / 2, **kwargs)
    elif fault == "other rows on the peers":
        peers = trainer._sequence_peers
        object.__setattr__(peers, "same_random_numbers", lambda seed: contextlib.nullcontext())
    elif fault == "gradient of the own part only":
        from lowmem.sequence_parallel import SequencePeers

        gather = SequencePeers.gather

        def gather_own(self, tensor, dim):
            parts = list(gather(self, tensor.detach(), dim).chunk(self.size, dim))
            parts[self.rank] = tensor
            return torch.cat(parts, dim)

        SequencePeers.gather = gather_own
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
