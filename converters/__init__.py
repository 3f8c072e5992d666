"""Foreign checkpoints in, `Adapter` values out: one file per family. May import gora_serve, never the reverse."""
