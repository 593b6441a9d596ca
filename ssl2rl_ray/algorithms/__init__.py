"""Reinforcement learning: pure losses, networks that need torch alone, and DQN on RLlib."""
