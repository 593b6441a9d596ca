"""Cryo-EM navigation: which hole to image next, against the clock."""
