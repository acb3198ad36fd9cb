"""`qtool analyze`: studies of a float model."""

import click

from qtool.cli.analyze.attention import attention
from qtool.cli.analyze.heads import heads


@click.group("analyze")
def analyze() -> None:
    """Study a float model: what its attention tolerates, and which heads it can do without."""


analyze.add_command(attention)
analyze.add_command(heads)
