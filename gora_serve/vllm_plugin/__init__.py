"""What runs inside the engine's processes: vLLM loads `register` through the entry point `vllm.general_plugins`."""
