"""Builds the RLOO trainer of each fork tree from one `ExperimentConfig`. Import after `variants.activate`."""

import copy
import functools
import tempfile

import torch
from transformers import AutoModelForCausalLM, set_seed

import memory
from config import ExperimentConfig
from data import as_dataset, model_path
from rewards import load_reward


def load_policy(config: ExperimentConfig, tokenizer):
    return AutoModelForCausalLM.from_pretrained(
        model_path(config, tokenizer),
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    )


def lora_config(config: ExperimentConfig):
    from peft import LoraConfig

    return LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")


def training_arguments(config: ExperimentConfig) -> dict:
    """What both trees' configs take by the same name."""
    shared_prefix = config.variant.startswith("shared-prefix")
    rows = config.rows_per_micro_batch or (config.rows_per_forward if shared_prefix else config.rows_per_step)
    return dict(
        output_dir=tempfile.mkdtemp(prefix="rloo-"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=config.rows_per_step // rows,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        temperature=config.temperature,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        bf16=False,  # the weights' own type, no autocast
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def build_v020(config: ExperimentConfig, tokenizer, prompts: list[str], stage_name: str, callbacks: list):
    """`(trainer, policy, ref_policy)` on v0.20.0; from the first patch on, prompts stay text."""
    from trl import RLOOConfig, RLOOTrainer

    stage = int(stage_name) if stage_name.isdigit() else 0
    reward = load_reward(config.reward)

    def reward_of_text(texts: list[str]) -> list[float]:
        # this trainer hands over prompt and completion as one text; the reward is for the completion
        if stage_name == "as-published":  # its prompts are cut and match none
            return reward(texts)
        starts = [max((len(p) for p in prompts if text.startswith(p)), default=None) for text in texts]
        if None in starts:
            raise ValueError(
                f"the text {texts[starts.index(None)][:80]!r}... starts with no prompt of the data set: the tokenizer "
                "does not give prompts back as they were, so the reward cannot tell where the completion begins"
            )
        return reward([text[start:] for text, start in zip(texts, starts)])

    policy = load_policy(config, tokenizer)
    ref_policy = copy.deepcopy(policy)
    if config.gradient_checkpointing:  # this trainer does not enable it by itself
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        from peft import get_peft_model

        policy = get_peft_model(policy, lora_config(config))
    args = training_arguments(config) | dict(
        rloo_k=config.rloo_k,
        response_length=config.response_tokens,
        total_episodes=config.steps * config.rows_per_step,
        num_ppo_epochs=config.epochs_per_batch,
        kl_coef=config.kl_coef,
        local_rollout_forward_batch_size=config.rows_per_rollout or config.rows_per_step,
        num_sample_generations=0,
    )
    if stage >= 4:
        args["logprob_chunk_size"] = config.logprob_chunk_tokens
    if stage >= 5:
        args["forward_batch_size"] = config.rows_per_forward
    dataset = as_dataset(prompts, tokenizer, as_text=stage >= 1)
    trainer = RLOOTrainer(
        config=RLOOConfig(**args),
        processing_class=tokenizer,
        policy=policy,
        ref_policy=ref_policy,
        reward_model=reward_of_text,
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=callbacks,
    )
    return trainer, policy, ref_policy


def build_v116(
    config: ExperimentConfig,
    tokenizer,
    prompts: list[str],
    stage_name: str,
    callbacks: list,
    algorithm: str = "RLOO",
    choice=None,
):
    """`(trainer, policy, ref_policy)` on v1.16.0; `algorithm` is RLOO or GRPO, `choice` a `memory.decide`."""
    import trl

    reward = load_reward(config.reward)
    policy = load_policy(config, tokenizer)
    shared = {}  # unknown to stage 0
    if config.variant.startswith("shared-prefix"):
        shared = {"shared_prefix": True, "shared_prefix_self_check": config.self_check}
    args = getattr(trl, f"{algorithm}Config")(
        **(training_arguments(config) | memory.rloo_arguments(config, choice)),
        num_generations=config.rloo_k,
        max_completion_length=config.response_tokens,
        num_iterations=config.epochs_per_batch,
        beta=config.kl_coef,
        **shared,
        max_steps=config.steps,
    )
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=policy,
        reward_funcs=lambda completions, **_: reward(completions),
        args=args,
        train_dataset=as_dataset(prompts, tokenizer, as_text=True),
        processing_class=tokenizer,
        peft_config=lora_config(config) if config.lora_rank else None,
        callbacks=[*callbacks, *memory.callbacks(choice)],
    )
    if choice is not None:
        memory.check_world(trainer)
    trainer.memory_choice = choice
    return trainer, trainer.model, trainer.ref_model  # with adapters, the trainer wraps the model


def build_trainer(config: ExperimentConfig, stage, tokenizer, prompts: list[str], callbacks: list):
    set_seed(config.seed)  # v0.20.0 shuffles its mini-batches with numpy's generator and seeds only torch's
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) if config.dataset else None
    choice = memory.decide(config, stage, longest)
    build = {"v0.20.0": build_v020, "v1.16.0": functools.partial(build_v116, choice=choice)}[stage.pin]
    return build(config, tokenizer, prompts, stage.name, callbacks)
