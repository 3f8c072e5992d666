"""Proof that files are what they claim to be: strict headers, tensor hashes, atomic outputs, adapter-to-base binding.

Standard library only. Nothing here computes with weights; it reads bytes, hashes them and writes folders whole or not
at all.
"""
