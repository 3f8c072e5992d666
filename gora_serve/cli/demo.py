"""`demo`: the whole flow on a small real model."""

import click


@click.command()
def demo() -> None:
    """Placeholder."""
