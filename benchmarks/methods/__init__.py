"""GoRA against other ways to fine-tune, on seven tasks: one row per method, task, seed and learning rate."""
