"""SFX tuning: which CrystFEL parameters index most frames of a running experiment."""
