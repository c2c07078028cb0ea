"""The recipe's reward: +1 for a completion with one of the target words as a whole word, else -1."""

import math
import re
from collections.abc import Callable

Reward = Callable[[list[str]], list[float]]


def word_finder(words: list[str]) -> Callable[[str], list[str]]:
    """A function from a text to the target words in it, in lower case: whole words only ("gladly" is not "glad").

    Raises:
        ValueError: if the list is empty or an entry is not one word.
    """
    if not words:
        raise ValueError("the list of target words is empty; every completion would get the same reward")
    for word in words:
        if not isinstance(word, str) or not re.fullmatch(r"\w+", word):
            raise ValueError(f"the target word {word!r} is not one word of letters or digits")
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    return lambda text: [word.lower() for word in pattern.findall(text)]


def word_reward(words: list[str]) -> Reward:
    find = word_finder(words)
    return lambda completions: [1.0 if find(text) else -1.0 for text in completions]


def check_rewards(values, completions: list[str], name: str) -> list[float]:
    """`values` as a list of floats.

    Raises:
        ValueError: if there is not exactly one finite number for every completion.
    """
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"the reward {name} returned {values!r}, expected {len(completions)} numbers") from None
    if len(values) != len(completions):
        raise ValueError(f"the reward {name} returned {len(values)} values for {len(completions)} completions")
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"the reward {name} returned {value!r} for completion {position} ({completions[position][:60]!r}), "
                "expected a finite number"
            )
    return [float(value) for value in values]


def completion_of(text: str, prompts: list[str]) -> str:
    """What follows the longest of `prompts` that `text` starts with: v0.20.0 hands over prompt and completion as one.

    Raises:
        ValueError: if it starts with none; the tokenizer then does not give the prompts back as they were.
    """
    starts = [len(prompt) for prompt in prompts if text.startswith(prompt)]
    if not starts:
        raise ValueError(
            f"the text {text[:80]!r} starts with no prompt; the tokenizer does not give prompts back as they were, so "
            "the reward cannot tell where the completion begins"
        )
    return text[max(starts) :]
