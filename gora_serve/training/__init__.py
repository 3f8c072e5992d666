"""The edges that hold models: loading a base, reading data, probing, attaching LoRA layers, training."""
