"""Builds a v0.20.0 PPOTrainer for rloo_probe.py from an `ExperimentConfig`: the same task as the RLOO probe's, with a
value model. The unpatched trainer takes no reward function, so there it is put into a module that answers like one."""

import copy
from types import SimpleNamespace

import torch
from transformers import AutoModelForSequenceClassification

import trainers
from rewards import load_reward


class FunctionAsRewardModel(torch.nn.Module):
    """A reward function of texts behind the two calls that `get_reward` makes of a reward model."""

    base_model_prefix = "backbone"

    def __init__(self, reward, tokenizer):
        super().__init__()
        self.reward, self.tokenizer = reward, tokenizer

    def backbone(self, input_ids, **kwargs):
        return SimpleNamespace(hidden_states=[input_ids])  # padding has become token 0, the padding token here

    def score(self, input_ids):
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return torch.tensor(self.reward(texts), dtype=torch.float)[:, None, None].expand(-1, input_ids.shape[1], 1)


def build(config, tokenizer, prompts, stage_name, callbacks, reward_as_module):
    from peft import get_peft_model

    from trl import PPOConfig, PPOTrainer

    stage = int(stage_name)
    policy = trainers.load_policy(config, tokenizer)
    ref_model = None if config.lora_rank else copy.deepcopy(policy)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank:
        policy = get_peft_model(policy, trainers.lora_config(config))
    torch.manual_seed(7)  # of the value head
    value_model = AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=1, dtype=getattr(torch, config.dtype)
    )
    value_model.score.weight.data.normal_()
    reward = load_reward(config.reward)
    args = trainers.training_arguments(config) | dict(
        response_length=config.response_tokens,
        total_episodes=config.steps * config.rows_per_step,
        num_ppo_epochs=config.epochs_per_batch,
        kl_coef=config.kl_coef,
        local_rollout_forward_batch_size=config.rows_per_rollout or config.rows_per_step,
        num_sample_generations=0,
        **({"logprob_chunk_size": config.logprob_chunk_tokens} if stage >= 9 else {}),
    )
    dataset = trainers.as_dataset(prompts, tokenizer, as_text=False)
    trainer = PPOTrainer(
        args=PPOConfig(**args),
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_model,
        reward_model=FunctionAsRewardModel(reward, tokenizer) if reward_as_module else reward,
        train_dataset=dataset,
        eval_dataset=dataset,
        value_model=value_model,
        callbacks=callbacks,
    )
    return trainer, policy, ref_model
