"""gora-serve: one untouched base model, many tasks, from training data to a verified multi-adapter server."""

__version__ = "0.1.0"
