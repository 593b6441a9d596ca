"""The learning: what learns on ``envs`` (torch, Ray)."""
