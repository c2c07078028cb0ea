"""`RLOOConfig(shared_prefix=True)` of the v1.16.0 series against the unpatched tree, over real optimizer steps.

Compared: prompts and sampled tokens of every generation, the loss, every gradient, every parameter, and all that the
trainer logs but times. Two prompts per step, ragged prompts and completions, a KL penalty, two optimizer steps or more
per generation.

On equal footing: upstream shuffles rows and the flag shuffles groups, which changes the rows of a micro-batch. Where
that can be seen (metrics of a micro-batch, several optimizer steps per generation), upstream's shuffle is replaced by
one that puts groups in the order in which the same row permutation meets them. For float64, three float32 steps are
replaced on both sides: the statistics of RMSNorm, the angles of RoPE, and TRL's fused head.

Run as a script, this file is one such training run, of RLOO or GRPO: `rloo_probe.py` on equal footing, with what the
trainer logs.
"""

import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GROUPS_STAGE, TRAINING_STAGE = 2, 3
NUM_PATCHES = len(list((ROOT / "trl/v1.16.0/patches").glob("*.patch")))
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
SETTINGS = {"rows_per_micro_batch": 3, "learning_rate": 3e-4, "epochs_per_batch": 2, "kl_coef": 0.1, "steps": 4}
ARGUMENTS = {"adam_epsilon": 1e-4}  # Adam at 1e-8 turns rounding of a near-zero gradient into a full step
ALSO_EXACT = ("own log-probabilities, flag off", "own rows", "training again")
TIMES = ("runtime", "per_second", "step_time", "profiling")


# --- one run, as a script --------------------------------------------------------------------------------------------


def run_on_equal_footing(out: str, extra: dict, argv: list[str]) -> None:
    """`rloo_probe.probe`, and what was logged in `out`.json. Names in `extra` that begin with `_` are ours:

    `_algorithm`: RLOO or GRPO; `_evaluate`: evaluate after every step; `_resume`: from this checkpoint; `_rollout`:
    see `use_rollout`; `_released_head`: see `use_released_head`; `_fault`: see `plant_fault`.
    """
    import rloo_probe
    from transformers import TrainerCallback

    import trainers

    ours = {name: extra.pop(name) for name in list(extra) if name.startswith("_")}
    algorithm = ours.get("_algorithm", "RLOO")
    history = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            history.append({name: n for name, n in numbers.items() if not any(time in name for time in TIMES)})

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = ours.get("_evaluate", False)

    def build_trainer(config, *args):
        if config.dtype == "float64":
            use_float64_angles_and_head()
        if config.variant == "upstream":
            shuffle_groups(algorithm, config.rloo_k)
        if "_released_head" in ours:
            use_released_head()
        trainer, policy, ref_policy = stock_build_trainer(config, *args)
        trainer.add_callback(Watch())
        trainer.eval_dataset = trainer.train_dataset
        if "_resume" in ours:
            trainer.train = functools.partial(trainer.train, resume_from_checkpoint=ours["_resume"])
        if "_rollout" in ours:
            use_rollout(trainer, policy, config, **ours["_rollout"])
        if "_fault" in ours:
            plant_fault(trainer, ours["_fault"])
        return trainer, policy, ref_policy

    trainers.build_v116 = functools.partial(trainers.build_v116, algorithm=algorithm)
    stock_build_trainer, trainers.build_trainer = trainers.build_trainer, build_trainer
    rloo_probe.probe(out, extra, argv)
    Path(f"{out}.json").write_text(json.dumps(history))


def trainer_module(algorithm: str):
    return importlib.import_module(f"trl.trainer.{algorithm.lower()}_trainer")


def shuffle_groups(algorithm: str, num_generations: int) -> None:
    """Upstream's shuffle of groups, from the same random numbers: in the order in which its permutation meets them."""

    def shuffle(batch: dict) -> dict:
        permutation = torch.randperm(len(batch["prompt_ids"])).tolist()
        groups = dict.fromkeys(row // num_generations for row in permutation)
        rows = [group * num_generations + i for group in groups for i in range(num_generations)]
        return {key: value[rows] if value.ndim else value for key, value in batch.items()}

    trainer_module(algorithm).shuffle_sequence_dict = shuffle


def use_released_head() -> None:
    """Takes the first patch back, which is for CPUs and behind no flag: the fused head scores every position again."""
    from trl.trainer import utils

    patched = inspect.getsource(utils.add_fused_lm_head)
    released = patched.replace(' or hidden_states.device.type == "cpu"', "")
    assert released != patched
    exec(released, vars(utils))


def use_rollout(trainer, policy, config, with_vllm: bool = False) -> None:
    """Completions from a rollout function of GRPO, with log-probabilities of another policy and with the tokens of a
    tool in some of them. With `with_vllm`, the trainer corrects for that policy as it does for vLLM, which does not
    run."""
    num_calls = 0

    def rollout(prompts, trainer):
        nonlocal num_calls
        tokenize = trainer.processing_class
        ids = [tokenize(prompt)["input_ids"] for prompt in prompts]
        generator = torch.Generator().manual_seed(1000 * trainer.accelerator.process_index + num_calls)
        num_calls += 1
        lengths = torch.randint(2, config.response_tokens + 1, (len(ids),), generator=generator).tolist()
        completions = [torch.randint(9, len(tokenize), (length,), generator=generator).tolist() for length in lengths]
        masks = [[0 if 2 <= i < 5 and row % 2 else 1 for i in range(length)] for row, length in enumerate(lengths)]
        with torch.no_grad():
            sampled = [
                policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                for prompt, completion in zip(ids, completions, strict=True)
            ]
        logps = [
            (s.gather(-1, torch.tensor(c)[:, None])[:, 0] + 0.1 * torch.randn(len(c), generator=generator)).tolist()
            for s, c in zip(sampled, completions, strict=True)
        ]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logps, "env_mask": masks}

    trainer.rollout_func = rollout
    if with_vllm:
        trainer.use_vllm = True
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1


def use_float64_angles_and_head() -> None:
    """RoPE and TRL's fused head compute in float32 even in a float64 model."""
    from transformers.models.qwen3 import modeling_qwen3
    from trl.trainer import utils

    def angles(self, x, position_ids):
        freqs = position_ids[:, :, None].double() * self.inv_freq.double()
        freqs = torch.cat([freqs, freqs], -1)
        return freqs.cos(), freqs.sin()

    class Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
            logps = (hidden @ weight.T / temperature).log_softmax(-1)
            entropy = -(logps.exp() * logps).sum(-1) if "entropy" in outputs else None
            return logps.gather(-1, targets[:, None])[:, 0], entropy, None, None, None

    modeling_qwen3.Qwen3RotaryEmbedding.forward = angles
    utils._ChunkedLogProbFunction = Head


def plant_fault(trainer, fault: str) -> None:
    """Breaks the trainer as a bug would, for the negative controls."""
    if fault == "loss not divided by the accumulation steps":
        backward = trainer._shared_prefix_backward

        def backward_of_one_step(model):
            steps = trainer.current_gradient_accumulation_steps
            trainer.current_gradient_accumulation_steps = 1
            backward(model)
            trainer.current_gradient_accumulation_steps = steps

        trainer._shared_prefix_backward = backward_of_one_step
    elif fault == "completions in another order":
        get_prompt_groups = trainer._get_prompt_groups

        def get_in_another_order(*args):
            groups, rows = get_prompt_groups(*args)
            return groups, rows.flip(0)

        trainer._get_prompt_groups = get_in_another_order
    elif fault == "weights of the optimizer step":
        get_loss_weights = trainer._get_loss_weights

        def get_weights_of_optimizer_step(inputs):
            steps = trainer._buffered_inputs
            whole = {**inputs, "completion_mask": torch.cat([step["completion_mask"] for step in steps])}
            weights = [value * len(steps) for value in get_loss_weights(whole)]
            number = next(i for i, step in enumerate(steps) if step is inputs)
            return tuple(value.chunk(len(steps))[number] for value in weights)

        trainer._get_loss_weights = get_weights_of_optimizer_step
    elif fault == "gradients not reduced":
        from lowmem import shared_prefix_distributed

        shared_prefix_distributed._average = lambda parameters, group: None
    else:
        raise ValueError(fault)


def run_experiment(algorithm: str, argv: list[str]) -> None:
    """experiments/train.py, which records live bytes, with RLOO or GRPO."""
    import train

    import trainers

    trainers.build_v116 = functools.partial(trainers.build_v116, algorithm=algorithm)
    sys.exit(train.main(argv))


def print_refusals(algorithm: str, folder: str) -> None:
    """Prints `{case: "<error>: <message>"}` of trainers that must not be built or must not train, None if one does."""
    import tempfile

    import variants

    variants.activate("shared-prefix")
    from datasets import Dataset, concatenate_datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin, Qwen3MoeConfig

    import trl

    module = trainer_module(algorithm)
    stock_trainer, stock_config = getattr(trl, f"{algorithm}Trainer"), getattr(trl, f"{algorithm}Config")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dataset = Dataset.from_dict({"prompt": ["one two three", "four"]})

    class OwnLoss(stock_trainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    class OwnLogps(stock_trainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            assert self.args.shared_prefix or "group_ids" not in kwargs, "upstream has no such argument"
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    class OwnTotal(stock_trainer):
        def _compute_loss_from_logps(self, per_token_logps, *args):
            return super()._compute_loss_from_logps(per_token_logps, *args) + 0.001 * per_token_logps.mean()

    class OwnStatistic(stock_trainer):
        """Divides the advantages by the largest at hand, whose sum is 0 for any rows of whole groups."""

    def divide_by_largest(self, *args):
        *args, inputs = args
        advantages = inputs["advantages"] / inputs["advantages"].abs().max()
        return getattr(super(OwnStatistic, self), own_loss)(*args, {**inputs, "advantages": advantages})

    class OwnGradient(stock_trainer):
        """A term of value 0."""

        def _compute_loss_from_logps(self, per_token_logps, entropies, *args):
            term = (entropies - entropies.detach()).mean()
            return super()._compute_loss_from_logps(per_token_logps, entropies, *args) + term

    class OwnWeights(stock_trainer):
        """Importance weights over their mean, which are 1 where the policy has sampled the rows at hand itself."""

    def weigh(self, logps, *args):
        loss, *rest = getattr(super(OwnWeights, self), own_loss)(logps, *args)
        weights = (logps - logps.detach()).sum(1, keepdim=loss.dim() == 2).exp()
        return loss * weights / weights.mean(), *rest

    class OwnRows(stock_trainer):
        """A weight for every completion, which travels with the batch."""

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return batch | {"row_weights": torch.arange(len(batch["completion_ids"])) + 1.0}

    def weigh_rows(self, *args):
        loss, *rest = getattr(super(OwnRows, self), own_loss)(*args)
        weights = args[-1]["row_weights"]
        return loss * (weights.unsqueeze(1) if loss.dim() == 2 else weights), *rest

    own_loss = {"RLOO": "_compute_per_sequence_loss", "GRPO": "_compute_per_token_loss"}[algorithm]
    setattr(OwnStatistic, own_loss, divide_by_largest)
    setattr(OwnWeights, own_loss, weigh)
    setattr(OwnRows, own_loss, weigh_rows)

    class OwnBatch(stock_trainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {name: value for name, value in batch.items() if name != "group_ids"}

    def train_patched(of_class, name):
        with pytest.MonkeyPatch.context() as patch:
            stock = getattr(of_class, name)
            patch.setattr(of_class, name, lambda *args, **kwargs: stock(*args, **kwargs))
            train()

    def hook_gradients(trainer):
        next(trainer.model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)

    def get_groups_with_another_mask(trainer):
        ids, prompt_mask = torch.ones(2, 6).long(), torch.ones(2, 6).long()
        prompt_mask[1, 0] = 0
        trainer._get_prompt_groups(ids, prompt_mask, ids, torch.ones(2, 6).long(), torch.tensor([0, 0]))

    def get_groups_with_a_hole(trainer):
        ids, completion_mask = torch.ones(2, 6).long(), torch.ones(2, 6).long()
        completion_mask[0, 2] = 0
        trainer._get_prompt_groups(ids, torch.ones(2, 6).long(), ids, completion_mask, torch.tensor([0, 0]))

    def train_on_padding_beyond_the_switch():
        """Groups of 8 and 10 tokens, padded to 14, and RoPE whose angles change at 12."""

        def get_groups(trainer):
            prompt_mask, completion_mask = torch.ones(4, 6).long(), torch.ones(4, 8).long()
            prompt_mask[2:, :4], completion_mask[:2, 2:] = 0, 0
            ids = torch.ones(4, 6).long(), torch.ones(4, 8).long()
            trainer._get_prompt_groups(ids[0], prompt_mask, ids[1], completion_mask, torch.tensor([0, 0, 1, 1]))

        rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
        model = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=rope, max_position_embeddings=12)
        train(model=model, change=get_groups)

    def get_padded_groups_by_position(trainer):
        trainer.model.config.model_type = "ctrl"
        ids, prompt_mask = torch.ones(2, 6).long(), torch.ones(2, 6).long()
        prompt_mask[:, :2] = 0
        trainer._get_prompt_groups(ids, prompt_mask, ids, torch.ones(2, 6).long(), torch.tensor([0, 0]))

    def replace(name):
        def change(trainer):
            setattr(trainer, name, functools.partial(getattr(trainer, name)))

        return change

    def add_token_types(trainer):
        tokenize = trainer._tokenize_prompts

        def with_token_types(prompts):
            ids, images, fields = tokenize(prompts)
            return ids, images, fields | {"token_type_ids": [[0] * len(row) for row in ids]}

        trainer._tokenize_prompts = with_token_types

    def fail_and_train_again():
        """What the failed step opened is closed, and the next training is whole."""
        trainers, backward = [], stock_trainer._shared_prefix_backward

        def fail(trainer, *args, **kwargs):
            trainers.append(trainer)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock_trainer, "_shared_prefix_backward", fail)
            with pytest.raises(KeyboardInterrupt):
                train()
        assert trainers[0]._shared_prefix_reduction is None and stock_trainer._shared_prefix_backward is backward
        trainers[0].train()

    def interrupt_within_an_optimizer_step(trainer):
        trainer._step = 1

    def change_accumulation(trainer):
        trainer.args.gradient_accumulation_steps = 1

    def train_out_of_step(misalign):
        """The optimizer steps have two training steps, which run together."""
        steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
        train(change=misalign, per_device_train_batch_size=2, **steps)

    def train_with_the_accumulation_of_the_accelerator():
        """It takes precedence when the trainer is made: optimizer steps of 2 training steps, generations of 3."""
        accelerator = {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}
        more_prompts = concatenate_datasets([dataset] * 3)
        steps = {"steps_per_generation": 3, "per_device_train_batch_size": 2, "max_steps": 2}
        train(train_dataset=more_prompts, **steps, **accelerator)

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    def train(
        trainer_class=stock_trainer,
        model=None,
        processing_class=tokenizer,
        peft_config=None,
        train_dataset=dataset,
        change=None,
        **arguments,
    ):
        defaults = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1}
        defaults |= {"output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": []}
        defaults |= {"shared_prefix": True, "save_strategy": "no"}
        trainer = trainer_class(
            model=model or AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=stock_config(**(defaults | arguments)),
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        if change is not None:
            change(trainer)
        trainer.train()

    def train_without_lowmem():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "is_lowmem_available", lambda: False)
            train()

    def train_sharded():
        """accelerate drops FSDP on CPUs, so what `Trainer.__init__` finds out is set by hand."""
        stock_init = module._BaseTrainer.__init__

        def init(self, *args, **kwargs):
            stock_init(self, *args, **kwargs)
            self.is_fsdp_enabled = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module._BaseTrainer, "__init__", init)
            train()

    def train_experts(**arguments):
        shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        with tempfile.TemporaryDirectory() as path:  # the reference model is loaded from there
            AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, head_dim=8)).save_pretrained(path)
            train(model=AutoModelForCausalLM.from_pretrained(path), **arguments)

    def train_with_observations():
        """Prompts that differ within a group, as with an environment whose `reset` returns something new each time."""
        tokenize = stock_trainer._tokenize_prompts

        def tokenize_with_observation(self, prompts):
            ids, images, fields = tokenize(self, prompts)
            return [[*row, number] for number, row in enumerate(ids)], images, fields

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock_trainer, "_tokenize_prompts", tokenize_with_observation)
            train()

    def train_with_a_check_that_fails(**arguments):
        from lowmem import shared_prefix_self_check

        def fail(*args, **kwargs):
            raise RuntimeError("the self-check found a difference")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_prefix_self_check, "check_shared_prefix", fail)
            train(**arguments)

    unscaled = {"scale_rewards": "none"} if algorithm == "GRPO" else {}
    # Micro-batches of two: the advantages of whole groups have the sum 0
    parts_of_groups = {"num_generations": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    cases = {
        "none": train,
        "experts": functools.partial(train_experts, router_aux_loss_coef=0.0),
        "adapter in mixed precision": functools.partial(train, peft_config=LoraConfig(), bf16=True),
        "own log-probabilities, flag off": functools.partial(train, trainer_class=OwnLogps, shared_prefix=False),
        "training again": fail_and_train_again,
        "own rows": functools.partial(train, trainer_class=OwnRows, **parts_of_groups),
        "torch_compile": functools.partial(train, torch_compile=True),
        "lomo": functools.partial(train, optim="lomo"),
        "layerwise": functools.partial(train, optim="galore_adamw_layerwise"),
        "longest position": train_on_padding_beyond_the_switch,
        "absolute positions": functools.partial(train, change=get_padded_groups_by_position),
        "num_generations": functools.partial(train, per_device_train_batch_size=1, steps_per_generation=4),
        "steps_per_generation": functools.partial(train, gradient_accumulation_steps=3, steps_per_generation=2),
        "vision-language": functools.partial(train, processing_class=Processor(tokenizer)),
        "auxiliary loss": train_experts,
        "_compute_loss": functools.partial(train, trainer_class=OwnLoss),
        "_get_per_token_logps_and_entropies": functools.partial(train, trainer_class=OwnLogps),
        "_prepare_inputs": functools.partial(train, change=replace("_prepare_inputs")),
        "compute_loss_context_manager": functools.partial(train, change=replace("compute_loss_context_manager")),
        "`_compute_loss` out of the backward pass": functools.partial(train_patched, stock_trainer, "_compute_loss"),
        "Trainer.training_step": functools.partial(train_patched, module._BaseTrainer, "training_step"),
        "losses whose gradients were accumulated": functools.partial(train, trainer_class=OwnTotal),
        "differ from those of the training step": functools.partial(train, trainer_class=OwnStatistic, **unscaled),
        "their gradients differ in 4 of 4 rows": functools.partial(train, trainer_class=OwnGradient),
        "and their gradients differ": functools.partial(train, trainer_class=OwnWeights, **parts_of_groups),
        "group_ids": functools.partial(train, trainer_class=OwnBatch),
        "hides tokens in between": functools.partial(train, change=get_groups_with_a_hole),
        "register_post_accumulate_grad_hook": functools.partial(train, change=hook_gradients),
        "split_batches": functools.partial(train, accelerator_config={"split_batches": True}),
        "their prompts differ": functools.partial(train, change=get_groups_with_another_mask),
        "token_type_ids": functools.partial(train, change=add_token_types),
        "optimizer step begins": functools.partial(train_out_of_step, interrupt_within_an_optimizer_step),
        "or ends within": functools.partial(train_out_of_step, change_accumulation),
        "accumulation was changed": train_with_the_accumulation_of_the_accelerator,
        "FSDP": train_sharded,
        "lora_dropout": functools.partial(train, peft_config=LoraConfig(lora_dropout=0.1)),
        "reentrant": functools.partial(train, **reentrant),
        "num_beams": functools.partial(train, generation_kwargs={"num_beams": 2}),
        "lowmem": train_without_lowmem,
        "self-check": train_with_a_check_that_fails,
        "no self-check": functools.partial(train_with_a_check_that_fails, shared_prefix_self_check=False),
    }
    if algorithm == "GRPO":
        cases["top_entropy_quantile"] = functools.partial(train, top_entropy_quantile=0.2)
        cases["observation"] = train_with_observations
    if algorithm == "RLOO":
        recovery = {"shared_prefix": False, "oom_recovery": True, "per_device_train_batch_size": 4}
        cases["recovery"] = functools.partial(train, **recovery)
        cases["recovery, own rows"] = functools.partial(train, trainer_class=OwnRows, **recovery)
        cases["With `oom_recovery=True`"] = functools.partial(train, trainer_class=OwnTotal, **recovery)
        cases["`oom_recovery=True`, the losses"] = functools.partial(train, trainer_class=OwnGradient, **recovery)
        cases["`oom_recovery=True` leaves"] = functools.partial(train, trainer_class=OwnLoss, **recovery)
    messages = {}
    for case, run in cases.items():
        try:
            run()
            messages[case] = None
        except Exception as error:
            messages[case] = f"{type(error).__name__}: {error}"
    print(json.dumps(messages))


# --- tests -----------------------------------------------------------------------------------------------------------


def run_script(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, __file__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def load_run(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    result = load_file(out)
    for number, logged in enumerate(json.loads(Path(f"{out}.json").read_text())):
        result |= {f"log{number}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in logged.items()}
    return result


@pytest.fixture(scope="session")
def run_equal(tmp_path_factory, probe_model):
    return equal_runs(tmp_path_factory.mktemp("equal-footing"), probe_model)


def equal_runs(folder: Path, probe_model: Path):
    """`run(variant, extra_arguments, processes=1, **settings)` -> dict of tensors of the (last) process; every
    distinct call runs once. Gradients, parameters and gradient norms have to be those of every process."""
    cache = {}
    defaults = {"model": probe_model, "prompts_per_step": 2, "prompt_tokens": 20, "prompt_tokens_min": 6}
    defaults |= {"response_tokens": 12, "rloo_k": 3, "temperature": 0.9} | SETTINGS

    def run(variant: str, extra: dict, processes: int = 1, **settings) -> dict:
        options = [f"--{key}={value}" for key, value in (defaults | settings).items()]
        key = json.dumps([variant, extra, options, processes])
        if key not in cache:
            out = folder / f"{len(cache)}-"
            launcher = () if processes == 1 else ("-m", "torch.distributed.run", "--standalone")
            launcher += () if processes == 1 else (f"--nproc_per_node={processes}",)
            arguments = [str(out), json.dumps(ARGUMENTS | extra), f"--variant={variant}", *options]
            run_script(*arguments, launcher=launcher)
            *others, cache[key] = (load_run(Path(f"{out}{rank}")) for rank in range(processes))
            # ZeRO-2 gathers parameters after the hook that saves them
            of_all = r"grad_norm" if "deepspeed" in extra else r"\.(grad|param)\.|grad_norm"
            for other in others:
                names = [name for name in cache[key] if re.search(of_all, name)]
                differing = [name for name in names if not same_bits(other[name], cache[key][name])]
                assert names and not differing, f"processes differ in {differing}"
        return cache[key]

    return run


def assert_same(ours: dict, reference: dict, tolerance: float) -> None:
    """Integer tensors equal, others within `tolerance`: absolute up to 1, relative above; the same keys in both.

    The logged losses are what transformers adds up in float32, whose last digit may differ whatever the tolerance is.
    """
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        found = ours[name]
        allowed = max(tolerance, 1e-6) if re.fullmatch(r"log\d+\.(train_)?loss", name) else tolerance
        assert found.shape == expected.shape, name
        if expected.dtype.is_floating_point:
            torch.testing.assert_close(
                found.double(),
                expected.double(),
                rtol=allowed,
                atol=allowed,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        else:
            assert torch.equal(found, expected), name


def assert_identical(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys()
    assert [name for name, expected in reference.items() if not same_bits(ours[name], expected)] == []


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


FLAG_OFF = [
    ({}, {}),
    *(
        pytest.param(extra, settings, marks=pytest.mark.slow)
        for extra, settings in (
            ({}, {"lora_rank": 4, "learning_rate": 3e-3, "gradient_checkpointing": True}),
            ({"steps_per_generation": 4}, {"steps": 8}),
            ({"_evaluate": True, "per_device_eval_batch_size": 3}, {}),
        )
    ),
]


def assert_is_a_test(reference: dict) -> None:
    """The comparison would mean little if nothing was learned, padded or clipped."""
    assert {"step0", "step1", "step2", "step3"} <= {name.split(".")[0] for name in reference}
    lengths = {name: reference[name] for name in reference if name.startswith("log") and "_length" in name}
    assert any(lengths[name] < lengths[name.replace("min", "max")] for name in lengths if "min_length" in name)
    assert any((ids == 0).any() for name, ids in reference.items() if name.endswith("input_ids")), "prompts not ragged"
    first, last = reference["step0.param.lm_head.weight"], reference["step3.param.lm_head.weight"]
    assert (first - last).abs().max() > 1e-5
    assert (reference["step1.loss"] - reference["step0.loss"]).abs() > 1e-6, "the ratio is still one"


def test_shared_prefix_matches_upstream_in_float32(run_probe):
    """Nothing of upstream replaced: a generation is one optimizer step, whose gradient no order of rows changes."""
    reference = run_probe("upstream", ARGUMENTS, **SETTINGS)
    assert_same(run_probe("shared-prefix", ARGUMENTS, **SETTINGS), reference, TOLERANCE["float32"])


@pytest.mark.parametrize("extra, settings", FLAG_OFF, ids=str)
def test_flag_off_is_bit_identical_to_the_release(run_equal, extra, settings):
    """The whole series against TRL as released; on a CPU without the first patch."""
    reference = run_equal("upstream@0", extra, **settings)
    ours = run_equal(f"upstream@{NUM_PATCHES}", extra | {"_released_head": True}, **settings)
    assert_identical(ours, reference)


def test_a_difference_of_a_millionth_in_the_loss_is_seen(run_equal):
    """Negative control of the comparison above."""
    ours, reference = run_equal("upstream@0", {}, kl_coef=0.1000001), run_equal("upstream@0", {})
    with pytest.raises(AssertionError):
        assert_identical(ours, reference)


def test_shuffled_groups_match_a_shuffle_of_groups_in_upstream(run_equal):
    """The first patch alone, with more than one optimizer step per generation."""
    extra, settings = {"steps_per_generation": 8}, {"steps": 8, "rows_per_micro_batch": 3, "prompts_per_step": 2}
    reference = run_equal("upstream", extra, **settings)
    ours = run_equal(f"upstream@{GROUPS_STAGE}", extra | {"shuffle_groups": True}, **settings)
    assert_same(ours, reference, TOLERANCE["float32"])


@pytest.mark.parametrize("variant", [f"shared-prefix@{TRAINING_STAGE}", "shared-prefix"])
def test_shared_prefix_matches_upstream_in_float64(run_equal, variant):
    reference = run_equal("upstream", {}, dtype="float64")
    assert_is_a_test(reference)
    assert_same(run_equal(variant, {}, dtype="float64"), reference, TOLERANCE["float64"])


def test_an_adapter_in_mixed_precision_is_sampled_from_as_upstream_does(run_equal):
    """accelerate's autocast is around PEFT's forward, which training calls, and not around what `generate` calls."""
    settings = {"lora_rank": 4, "learning_rate": 3e-3}
    reference, ours = (run_equal(variant, {"bf16": True}, **settings) for variant in ("upstream", "shared-prefix"))
    assert torch.equal(ours["generate0.sequences"], reference["generate0.sequences"])
    assert ours.keys() == reference.keys()
    for name in (name for name in reference if name.startswith("step0.grad")):
        error = (ours[name] - reference[name]).norm() / reference[name].norm().clamp(min=1e-6)
        assert error < 0.1, name  # bfloat16; a step of another sample would have another gradient


HARD = {"epsilon": 1e-3, "epsilon_high": 2e-3, "mask_truncated_completions": True, "max_grad_norm": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, settings",
    [
        ({}, {"rows_per_micro_batch": 1}),
        ({}, {"rows_per_micro_batch": 2}),
        ({}, {"rows_per_micro_batch": 6}),
        ({"steps_per_generation": 4}, {"steps": 8}),
        ({"steps_per_generation": 12}, {"rows_per_micro_batch": 1, "steps": 8}),
        ({"steps_per_generation": 1}, {}),  # two generations per optimizer step
        (HARD, {}),
        (HARD | {"steps_per_generation": 4}, {"steps": 8}),
        ({"mask_truncated_completions": True}, {"response_tokens": 1}),  # whole optimizer steps are masked
        (
            {"normalize_advantages": True},
            {"kl_coef": 0.0, "rloo_k": 2, "prompts_per_step": 3, "rows_per_micro_batch": 2},
        ),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1, "repetition_penalty": 1.2, "top_k": 50}, {}),
        ({"pad_to_multiple_of": 16}, {}),
        ({}, {"prompt_tokens": 2, "prompt_tokens_min": 1}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"lora_rank": 4, "learning_rate": 3e-3}),
        ({}, {"lora_rank": 4, "learning_rate": 3e-3, "gradient_checkpointing": True}),
        ({"_evaluate": True, "per_device_eval_batch_size": 3}, {}),
    ],
    ids=str,
)
def test_shared_prefix_matches_upstream_in_float64_with(run_equal, extra, settings):
    reference = run_equal("upstream", extra, dtype="float64", **settings)
    assert_same(run_equal("shared-prefix", extra, dtype="float64", **settings), reference, TOLERANCE["float64"])
    if extra.get("epsilon"):
        assert any(value > 0 for name, value in reference.items() if "clip_ratio/region" in name), "nothing is clipped"
    if extra.get("mask_truncated_completions"):
        ratios = [value for name, value in reference.items() if "completions/clipped_ratio" in name]
        assert any(value > 0 for value in ratios), "nothing is truncated"
    if extra.get("_evaluate"):
        assert any("eval_entropy" in name for name in reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 4, "learning_rate": 3e-3, "gradient_checkpointing": True}], ids=str
)
def test_shared_prefix_matches_upstream_in_two_processes(run_equal, settings):
    reference = run_equal("upstream", {}, processes=2, dtype="float64", **settings)
    ours = run_equal("shared-prefix", {}, processes=2, dtype="float64", **settings)
    assert_same(ours, reference, TOLERANCE["float64"])
    one_process = run_equal("upstream", {}, dtype="float64", **settings)
    assert any(not torch.equal(one_process[name], reference[name]) for name in one_process if ".param." in name)


ZERO2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "overlap_comm": False,
        "reduce_bucket_size": 5000,
    },
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, settings",
    [({}, {}), ({"steps_per_generation": 1}, {}), ({}, {"lora_rank": 4, "gradient_checkpointing": True})],
    ids=["", "two generations per optimizer step", "lora, checkpointing"],
)
def test_shared_prefix_with_deepspeed_zero2_matches_upstream(run_equal, extra, settings):
    """Upstream runs on DeepSpeed too; tests/test_shared_prefix_distributed.py compares its engine with one process."""
    pytest.importorskip("deepspeed")
    reference = run_equal("upstream", extra | {"deepspeed": ZERO2}, processes=2, **settings)
    ours = run_equal("shared-prefix", extra | {"deepspeed": ZERO2}, processes=2, **settings)
    ours = {name: value for name, value in ours.items() if not name.endswith(".loss")}  # no `accelerator.backward`
    assert_same(ours, {name: reference[name] for name in ours}, TOLERANCE["float32"])
    assert ours.keys() == {name for name in reference if not name.endswith(".loss")}
    steps = {name.partition(".")[0] for name in ours if ".param." in name}
    assert len(steps) >= 4, sorted(ours)
    assert any("grad_norm" in name for name in ours)


@pytest.mark.slow
def test_resumed_run_matches_upstream_and_the_run_that_was_not_interrupted(run_equal, tmp_path):
    runs = {}
    for variant in ("upstream", "shared-prefix"):
        saving = {"output_dir": str(tmp_path / variant), "save_strategy": "steps", "save_steps": 2}
        whole = run_equal(variant, saving, dtype="float64")
        rest = run_equal(variant, saving | {"_resume": str(tmp_path / variant / "checkpoint-2")}, dtype="float64")
        runs[variant] = rest
        for name in (name for name in rest if name.startswith("step1.param")):
            torch.testing.assert_close(rest[name], whole[name.replace("step1", "step3")], rtol=0, atol=0)
    assert_same(runs["shared-prefix"], runs["upstream"], TOLERANCE["float64"])


def training_peak(algorithm: str, variant: str, k: int, record: Path) -> int:
    """Peak of live bytes in training, one row per micro-batch, 512 + 48 tokens."""
    options = {"variant": variant, "rloo_k": k, "rows_per_micro_batch": 1, "steps": 2, "record": record}
    options |= {"prompt_tokens": 512, "response_tokens": 48, "vocab_size": 0, "hidden_size": 64, "head_dim": 16}
    options |= {"intermediate_size": 128, "num_hidden_layers": 4}
    options |= {"self_check": False}  # which holds more than a step does, at every k
    run_script("--train", algorithm, *(f"--{name}={value}" for name, value in options.items()))
    by_phase = json.loads(record.read_text())["summary"]["live_peak_bytes_by_phase"]
    return max(by_phase["train_forward"], by_phase["train_backward"])


def assert_peak_does_not_grow(algorithm: str, folder: Path) -> None:
    """k = 16 against k = 2; upstream's costs more than double."""
    runs = (("shared-prefix", 2), ("shared-prefix", 16), ("upstream", 16))
    peaks = {(variant, k): training_peak(algorithm, variant, k, folder / f"{variant}-{k}.json") for variant, k in runs}
    assert peaks["shared-prefix", 16] <= 1.05 * peaks["shared-prefix", 2]
    assert peaks["shared-prefix", 16] < 0.5 * peaks["upstream", 16]


@pytest.mark.slow
def test_training_peak_does_not_grow_with_the_completions(tmp_path):
    assert_peak_does_not_grow("RLOO", tmp_path)


@pytest.fixture(scope="session")
def refusals(probe_model) -> dict[str, str | None]:
    return json.loads(run_script("--refusals", "RLOO", str(probe_model)).splitlines()[-1])


@pytest.mark.parametrize(
    "case, error, way_out",
    [
        ("torch_compile", "NotImplementedError", "Set `torch_compile=False`"),
        ("lomo", "NotImplementedError", "Choose another `optim`"),
        ("layerwise", "NotImplementedError", "Choose another `optim`"),
        ("longest position", "NotImplementedError", "Keep all lengths on one side"),
        ("absolute positions", "NotImplementedError", "Give the prompts of a batch one length"),
        ("num_generations", "ValueError", "Raise gradient_accumulation_steps"),
        ("steps_per_generation", "ValueError", "divisible by the other"),
        ("vision-language", "NotImplementedError", "Pass a tokenizer and a text model"),
        ("auxiliary loss", "NotImplementedError", "`router_aux_loss_coef=0.0`"),
        ("_compute_loss", "NotImplementedError", "Override `_compute_per_sequence_loss`"),
        ("_get_per_token_logps_and_entropies", "NotImplementedError", "Override `_compute_per_sequence_loss`"),
        ("_prepare_inputs", "NotImplementedError", "Override `_generate_and_score_completions`"),
        ("compute_loss_context_manager", "NotImplementedError", "Override `_compute_per_sequence_loss`"),
        ("`_compute_loss` out of the backward pass", "NotImplementedError", "Override `_compute_per_sequence_loss`"),
        ("Trainer.training_step", "NotImplementedError", "Undo the change"),
        ("losses whose gradients were accumulated", "RuntimeError", "Change what overrides"),
        ("differ from those of the training step", "RuntimeError", "Change what overrides"),
        ("their gradients differ in 4 of 4 rows", "RuntimeError", "Change what overrides"),
        ("and their gradients differ", "RuntimeError", "Change what overrides"),
        ("group_ids", "NotImplementedError", "Keep what `super()._generate_and_score_completions` returns"),
        ("hides tokens in between", "NotImplementedError", "without holes"),
        ("With `oom_recovery=True`", "RuntimeError", "set `oom_recovery=False`"),
        ("`oom_recovery=True`, the losses", "RuntimeError", "Change what overrides"),
        ("`oom_recovery=True` leaves", "NotImplementedError", "Override `_compute_per_sequence_loss`"),
        ("register_post_accumulate_grad_hook", "NotImplementedError", "Remove the hook"),
        ("split_batches", "NotImplementedError", "Leave it out"),
        ("their prompts differ", "RuntimeError", "repeat every prompt"),
        ("token_type_ids", "NotImplementedError", "see `chat_template_kwargs`"),
        ("optimizer step begins", "RuntimeError", "Make a new trainer"),
        ("or ends within", "RuntimeError", "Make a new trainer"),
        ("accumulation was changed", "RuntimeError", "Make a new trainer"),
        ("FSDP", "NotImplementedError", "Use a single process, DDP or DeepSpeed ZeRO-2"),
        ("lora_dropout", "NotImplementedError", "`lora_dropout=0`"),
        ("reentrant", "NotImplementedError", '"use_reentrant": False'),
        ("num_beams", "NotImplementedError", "num_generations"),
        ("lowmem", "ImportError", "Put it on the path"),
        ("self-check", "RuntimeError", "found a difference"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_way_out(refusals, case, error, way_out):
    assert refusals[case] is not None, "it trains"
    assert refusals[case].startswith(f"{error}: ") and case in refusals[case] and way_out in refusals[case]


@pytest.mark.parametrize(
    "case",
    ["none", "experts", "no self-check", "adapter in mixed precision", "recovery", "recovery, own rows", *ALSO_EXACT],
)
def test_what_is_exact_is_not_refused(refusals, case):
    assert refusals[case] is None


def test_completions_in_another_order_are_seen(run_equal):
    """Negative control."""
    reference = run_equal("upstream", {}, dtype="float64")
    ours = run_equal("shared-prefix", {"_fault": "completions in another order"}, dtype="float64")
    with pytest.raises(AssertionError, match=r"^(generate|step)\d\."):
        assert_same(ours, reference, 1e-5)


def test_a_loss_that_is_not_divided_by_the_accumulation_steps_is_seen(run_equal):
    """Negative control: the trainer compares it with that of the training step."""
    with pytest.raises(AssertionError, match="losses whose gradients were accumulated differ"):
        run_equal("shared-prefix", {"_fault": "loss not divided by the accumulation steps"}, dtype="float64")


@pytest.mark.slow
def test_gradients_that_are_not_reduced_are_seen(run_equal):
    """Negative control."""
    with pytest.raises(AssertionError, match="processes differ in .*grad"):
        run_equal("shared-prefix", {"_fault": "gradients not reduced"}, processes=2, dtype="float64")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "experiments"), str(ROOT)]
    torch.set_num_threads(1)
    if sys.argv[1] == "--refusals":
        print_refusals(*sys.argv[2:])
    elif sys.argv[1] == "--train":
        run_experiment(sys.argv[2], sys.argv[3:])
    else:
        run_on_equal_footing(sys.argv[1] + os.environ.get("RANK", "0"), json.loads(sys.argv[2]), sys.argv[3:])
