"""The central value, `Adapter`, and its two faces on disk: PEFT's names and configuration, and safetensors."""
