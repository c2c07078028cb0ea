"""Reward functions: from the text of completions to one number each. `reward: vowel_share` in a config names one here;
`reward: my_module:my_function` imports another."""

import importlib
import math
from collections.abc import Callable

Reward = Callable[[list[str]], list[float]]


def vowel_share(completions: list[str]) -> list[float]:
    """Share of lower-case vowels among the characters; 0.0 for an empty completion."""
    return [sum(c in "aeiou" for c in text) / len(text) if text else 0.0 for text in completions]


def letter_e_share(completions: list[str]) -> list[float]:
    """Share of the letter e among the characters; 0.0 for an empty completion."""
    return [text.count("e") / len(text) if text else 0.0 for text in completions]


def load_reward(name: str) -> Reward:
    """The reward function `name`, which checks its own result.

    Raises:
        ValueError: at once for an unknown name; when called, for a result of the wrong length or with a value that is
            not a finite number.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name) if module_name else importlib.import_module(__name__)
        function = getattr(module, function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"unknown reward {name!r} ({error}); give a name of experiments/rewards.py or module:name"
        ) from error

    def checked(completions: list[str]) -> list[float]:
        values = function(completions)
        if len(values) != len(completions):
            raise ValueError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"reward {name!r} returned {value!r}, expected a finite number")
        return [float(value) for value in values]

    return checked
