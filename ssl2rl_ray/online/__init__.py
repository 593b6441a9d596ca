"""A tuner beside a running pipeline, and what to do when nothing indexes (SFX)."""
