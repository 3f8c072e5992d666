"""`python -m gora_serve`, which is how `accelerate launch -m gora_serve` starts the command line."""

from gora_serve.cli.main import run

run()
