"""Perception: from the image of a hole to the probability that it is low-CTF."""
