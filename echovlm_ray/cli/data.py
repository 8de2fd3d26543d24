"""`echoray data`: datasets of ultrasound records."""

import typer

from echovlm_ray.cli import data_sets

app = typer.Typer(no_args_is_help=True, help="Check, count, split and convert datasets.", rich_markup_mode="markdown")
data_sets.register(app)
