"""A reward of a test's own (`--reward killing_reward:reward`): at the batch of the environment variable KILL_AT_BATCH
the process kills itself as the kernel would, without a chance to clean up."""

import os
import signal

batches = 0


def reward(completions: list[str]) -> list[float]:
    global batches
    batches += 1
    if str(batches) == os.environ.get("KILL_AT_BATCH"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [text.count("e") / (len(text) + 1) for text in completions]


def rank(completions: list[str]) -> list[float]:
    """Depends on the other texts that it is given with."""
    return [float(sum(other < text for other in completions)) for text in completions]


def too_few(completions: list[str]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_a_number(completions: list[str]) -> list[float]:
    return [float("nan")] * len(completions)


def words(completions: list[str]) -> list[str]:
    return ["good"] * len(completions)


def nothing(completions: list[str]) -> None:
    return None
