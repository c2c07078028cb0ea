"""The sentiment recipe: a small language model learns by PPO (or RLOO, GRPO) to continue a sentence happily."""
