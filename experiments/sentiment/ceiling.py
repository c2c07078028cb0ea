"""The highest probability that a frozen head leaves to some words: what no adapter below it can pass.

    python experiments/sentiment/ceiling.py [hub name or folder]     # default: the default model

A Llama's last hidden state has, behind its norm, a fixed length. Where the rows of the head are short, or those of two
words nearly the same, no direction of it prefers one word by much, and a training with adapters stops at that. Found
when success would not pass 52 %: the default model's head, then started with a standard deviation of 0.02, left the
target words 0.405 at one position.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]


def highest_probability(model, token_ids: list[int], steps: int = 300) -> float:
    """max over unit directions u of sum(softmax(W (sqrt(H) w * u))[token_ids]), by gradient ascent from the mean of
    their rows; W the head, w the weight of the final RMSNorm. A lower bound, tight where the ascent has converged.

    Raises:
        ValueError: for a model without `model.norm` (an RMSNorm) and a head without bias.
    """
    norm = getattr(getattr(model, "model", None), "norm", None)
    head = model.get_output_embeddings()
    if norm is None or getattr(norm, "bias", None) is not None or head is None or head.bias is not None:
        raise ValueError(f"{type(model).__name__} has no RMSNorm at model.norm before a head without bias")
    rows = head.weight.detach().float() * norm.weight.detach().float()  # (V, H)
    direction = rows[token_ids].mean(0).clone().requires_grad_()
    optimizer = torch.optim.Adam([direction], lr=0.1 * direction.norm().item() / rows.shape[1] ** 0.5)
    best = 0.0
    for _ in range(steps):
        unit = direction / direction.norm()
        probability = (rows @ (unit * rows.shape[1] ** 0.5)).softmax(-1)[token_ids].sum()
        best = max(best, probability.item())
        optimizer.zero_grad()
        (-probability.log()).backward()
        optimizer.step()
    return best


def main(argv: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    from sentiment.config import TARGET_WORDS, SentimentConfig
    from sentiment.models import load_tokenizer, model_source

    source = model_source(SentimentConfig(model=argv[0] if argv else None))
    tokenizer = load_tokenizer(source)
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in TARGET_WORDS]
    highest = highest_probability(AutoModelForCausalLM.from_pretrained(source), ids)
    print(f"{source}: at most {highest:.3f} for the target words together at one position")


if __name__ == "__main__":
    main(sys.argv[1:])
