"""The trainer of each algorithm for the recipe, from one `SentimentConfig`. Import after `variants.activate`."""

import copy
import random
import tempfile

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, set_seed

from data import as_dataset
from sentiment.config import SentimentConfig
from sentiment.models import WithoutAdapters, load_policy, load_value_model
from sentiment.progress import Progress
from sentiment.reward import completion_of


def prompt_rows(config: SentimentConfig) -> list[str]:
    """The prompts in the order of the training: every epoch all of them, shuffled; one row per group of k."""
    rng, rows = random.Random(config.seed), []
    group = 1 if config.algorithm == "ppo" else config.k
    while len(rows) * group < config.samples:
        epoch = list(config.prompts)
        rng.shuffle(epoch)
        rows += epoch
    return rows[: config.samples // group]


def _shared_arguments(config: SentimentConfig) -> dict:
    return dict(
        output_dir=tempfile.mkdtemp(prefix="sentiment-"),
        per_device_train_batch_size=config.mini_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
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


def _on_policy_arguments(config: SentimentConfig, batches: int, stage_name: str) -> dict:
    """What v0.20.0's PPOConfig and RLOOConfig take by the same name."""
    chunked = stage_name.isdigit() and int(stage_name) >= (9 if config.algorithm == "ppo" else 4)
    return _shared_arguments(config) | dict(
        total_episodes=batches * config.batch_size,
        num_mini_batches=1,
        num_ppo_epochs=config.ppo_epochs,
        kl_coef=config.kl_coef,
        response_length=config.max_new_tokens,
        local_rollout_forward_batch_size=config.batch_size,
        num_sample_generations=0,
        stop_token="eos",
        **({"logprob_chunk_size": config.logprob_chunk_tokens} if chunked else {}),
    )


def build_trainer(config: SentimentConfig, stage, source: str, tokenizer, progress: Progress, batches_done: int = 0):
    """`(trainer, policy, reference, value_model, hash of the base weights)`.

    Args:
        batches_done: batches of an earlier part of this training, which are left out.
    """
    set_seed(config.seed)  # v0.20.0 shuffles its mini-batches with numpy's generator and seeds only torch's
    plain = None
    policy, base_sha256 = load_policy(config, source)
    if not config.lora_rank:
        plain = copy.deepcopy(policy)
    reference = plain if plain is not None else WithoutAdapters(policy)
    rows = prompt_rows(config)
    group = 1 if config.algorithm == "ppo" else config.k
    rows = rows[batches_done * config.batch_size // group :]
    if config.algorithm == "grpo":
        grpo = _build_grpo(config, policy, reference, tokenizer, rows, progress, config.batches - batches_done)
        return (*grpo, None, base_sha256)

    dataset = as_dataset(rows, tokenizer, as_text=False)
    arguments = _on_policy_arguments(config, config.batches - batches_done, stage.name)

    def reward_of_texts(texts: list[str]) -> list[float]:
        return progress.score([completion_of(text, config.prompts) for text in texts])

    value_model = None
    common = dict(processing_class=tokenizer, train_dataset=dataset, eval_dataset=dataset, callbacks=[progress])
    if config.algorithm == "ppo":
        from trl import PPOConfig, PPOTrainer

        value_model = load_value_model(config, source, tokenizer.pad_token_id)
        trainer = PPOTrainer(
            args=PPOConfig(**arguments, vf_coef=config.vf_coef),
            model=policy,
            ref_model=plain,  # None: the policy without its adapters
            reward_model=reward_of_texts,
            value_model=value_model,
            **common,
        )
    else:
        from trl import RLOOConfig, RLOOTrainer

        trainer = RLOOTrainer(
            config=RLOOConfig(**arguments, rloo_k=config.k),
            policy=policy,
            ref_policy=reference,
            reward_model=reward_of_texts,
            **common,
        )
    if trainer.accelerator.num_processes > 1:
        raise ValueError("the recipe runs in one process; start it without torchrun or accelerate launch")
    # Its own loader shuffles and is watched by accelerate, which ends every accumulation early in the last batch.
    # This one keeps the order, draws nothing from the global generator, and lets a training go on in the middle.
    trainer.dataloader = DataLoader(
        dataset,
        batch_size=config.batch_size // group,
        collate_fn=trainer.data_collator,
        drop_last=True,
        generator=torch.Generator().manual_seed(config.seed),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, policy, reference, value_model, base_sha256


def _build_grpo(config: SentimentConfig, policy, reference, tokenizer, rows: list[str], progress, batches: int):
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        **_shared_arguments(config),
        num_generations=config.k,
        max_completion_length=config.max_new_tokens,
        num_iterations=config.ppo_epochs,
        beta=config.kl_coef,
        max_steps=batches * config.ppo_epochs,
        shuffle_dataset=False,
        disable_dropout=True,
    )
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=lambda completions, **_: progress.score(completions),
        args=arguments,
        train_dataset=as_dataset(rows, tokenizer, as_text=True),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, policy, reference
