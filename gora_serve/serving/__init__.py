"""Verified multi-adapter serving: vLLM as a child process, planned, checked and watched. Standard library only."""
