"""A head."""
