"""Tuning an SFX analysis: training on simulated experiments, policies, comparisons."""
