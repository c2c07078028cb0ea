"""What a training of the recipe shows while it runs, and keeps for its curve: one entry per generated batch."""

import math

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from sentiment.config import SentimentConfig
from sentiment.reward import Reward, check_rewards, word_finder

EPOCHS_PER_REPORT = 10
COUNTS = {"kl": ("objective/kl", "kl"), "entropy": ("objective/entropy", "entropy")}  # by what the trainers call them


class Progress(TrainerCallback):
    """Sits between the trainer and the reward function, where every algorithm passes by.

    Attributes:
        history: one dict per batch: step, epoch, samples, positives, reward_mean, kl and entropy (as the trainer logs
            them, None where it does not), distinct (different completions in the batch).
        discovered: how often each target word was found.
    """

    def __init__(self, config: SentimentConfig, reward: Reward, reward_name: str):
        self.config, self.reward, self.reward_name = config, reward, reward_name
        self.find = word_finder(config.target_words)
        self.history: list[dict] = []
        self.discovered: dict[str, int] = {}
        self.bar = tqdm(total=config.batches, unit="batch", dynamic_ncols=True)

    def resume(self, seen: dict) -> None:
        self.history, self.discovered = seen["history"], seen["discovered"]
        self.bar.update(len(self.history))

    @property
    def seen(self) -> dict:
        return {"history": self.history, "discovered": self.discovered}

    def score(self, completions: list[str]) -> list[float]:
        """The reward of one generated batch, checked and counted."""
        rewards = check_rewards(self.reward(completions), completions, self.reward_name)
        found = [self.find(text) for text in completions]
        step, batch = len(self.history) + 1, len(completions)
        epoch = math.ceil(step * batch / len(self.config.prompts))
        for text, words in zip(completions, found):
            for word in words:
                if word not in self.discovered:
                    self.bar.write(f"[epoch {epoch}/{self.config.epochs}] discovered {word!r}: {text.strip()!r}")
                self.discovered[word] = self.discovered.get(word, 0) + 1
        self.history.append(
            {
                "step": step,
                "epoch": epoch,
                "samples": batch,
                "positives": sum(map(bool, found)),
                "reward_mean": sum(rewards) / batch,
                "kl": None,
                "entropy": None,
                "distinct": len(set(completions)),
            }
        )
        self.bar.set_postfix_str(f"epoch {epoch}/{self.config.epochs}, step {step}, positive {found_share(found):.0%}")
        self.bar.update()
        self._report(epoch)
        return rewards

    def _report(self, epoch: int) -> None:
        before = self.history[-2]["epoch"] if len(self.history) > 1 else 0
        if epoch // EPOCHS_PER_REPORT == before // EPOCHS_PER_REPORT:
            return
        recent = [entry for entry in self.history if entry["epoch"] > epoch - EPOCHS_PER_REPORT]
        positives, samples = (sum(entry[key] for entry in recent) for key in ("positives", "samples"))
        total, of = (sum(entry[key] for entry in self.history) for key in ("positives", "samples"))
        words = ", ".join(f"{word} {count}" for word, count in sorted(self.discovered.items(), key=lambda i: -i[1]))
        self.bar.write(
            f"[progress] epoch {epoch}/{self.config.epochs}, step {len(self.history)}: {positives} of the last "
            f"{samples} positive ({positives / samples:.1%}), {total} of {of} so far ({total / of:.1%}); "
            f"words: {words or 'none'}"
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.history:  # several optimizer steps on one batch: the last one's
            for key, names in COUNTS.items():
                for name in names:
                    if name in (logs or {}):
                        self.history[-1][key] = float(logs[name])


def found_share(found: list[list[str]]) -> float:
    return sum(map(bool, found)) / len(found)


@torch.no_grad()
def judge(policy, reference, tokenizer, config: SentimentConfig, seed: int = 12345) -> dict:
    """Samples `samples_per_prompt` completions of every prompt and judges them.

    Args:
        reference: the same call as the policy, without what was trained; None where it is the policy itself.

    Returns:
        `success_rate`; `kl`, the mean over completions of sum(log p - log p_ref) in nats (a sample estimate, so it can
        be a little below 0 for equal models), and its standard error `kl_se`; `entropy_per_token` in nats;
        `distinct`, how many of the `samples` completions differ; `words`, counts of the target words;
        `top_word_share`, of the most frequent one among them; `examples`, three per prompt.
    """
    find, texts, kls, entropies, examples = word_finder(config.target_words), [], [], [], {}
    training = policy.training
    policy.eval()
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for prompt in config.prompts:
            inputs = tokenizer([prompt] * config.samples_per_prompt, return_tensors="pt").to(policy.device)
            start = inputs["input_ids"].shape[1]
            sequences = policy.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=config.max_new_tokens,
                do_sample=True,
                temperature=config.temperature,
                top_k=0,
                top_p=1.0,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            responses = sequences[:, start:]  # (B, R)
            ended = (responses == tokenizer.eos_token_id).int().cumsum(1)
            counted = (ended == 0) | ((responses == tokenizer.eos_token_id) & (ended == 1))  # up to the first end
            log_p = _log_probabilities(policy, sequences, start, config.temperature)  # (B, R, V)
            entropies.append(-(log_p.exp() * log_p).sum(-1)[counted])
            logps = log_p.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
            if reference is None:
                kls.append(torch.zeros(len(responses)))
            else:
                reference_log_p = _log_probabilities(reference, sequences, start, config.temperature)
                reference_logps = reference_log_p.gather(-1, responses.unsqueeze(-1)).squeeze(-1)
                kls.append(((logps - reference_logps) * counted).sum(1).cpu())
            answers = tokenizer.batch_decode(responses, skip_special_tokens=True)
            texts += [prompt + answer for answer in answers]
            examples[prompt] = answers[:3]
    policy.train(training)
    completions = [text[len(prompt) :] for prompt in config.prompts for text in texts if text.startswith(prompt)]
    found = [find(text) for text in completions]
    words: dict[str, int] = {}
    for word in (word for each in found for word in each):
        words[word] = words.get(word, 0) + 1
    kl = torch.cat(kls).double()
    return {
        "samples": len(texts),
        "success_rate": found_share(found),
        "kl": kl.mean().item(),
        "kl_se": (kl.std() / len(kl) ** 0.5).item(),
        "entropy_per_token": torch.cat(entropies).double().mean().item(),
        "distinct": len(set(texts)),
        "words": words,
        "top_word_share": max(words.values()) / sum(words.values()) if words else None,
        "examples": examples,
    }


def _log_probabilities(model, sequences: torch.Tensor, start: int, temperature: float) -> torch.Tensor:
    logits = model(input_ids=sequences, use_cache=False).logits[:, start - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1)
