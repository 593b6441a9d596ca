"""The science: what a microscope session or an SFX analysis does (no torch, no Ray)."""
