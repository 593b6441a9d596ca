"""The embedded pipeline (simulator, peak finder, known-cell indexer) needs nothing installed."""
