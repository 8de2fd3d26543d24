"""`echoray data`: datasets of ultrasound records."""

import typer

from echovlm_ray.cli import data_sets
from echovlm_ray.cli.data_phantom import phantom_command

app = typer.Typer(
    no_args_is_help=True, help="Make, check, count, split and convert datasets.", rich_markup_mode="markdown"
)
app.command("phantom")(phantom_command)
data_sets.register(app)
