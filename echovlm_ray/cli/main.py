"""`echoray`, the command.

Commands that call a running system need only the client's packages; the others import what they need when they run.
"""

from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from echovlm_ray.cli import checkpoint, data, evaluation, experts, train
from echovlm_ray.cli.generate import generate, info
from echovlm_ray.cli.serve import serve
from echovlm_ray.cli.status import status
from echovlm_ray.cli.stop import stop
from echovlm_ray.cli.terminal import say

EXIT_FAILED = 1
# The extras with a command's packages, if not `serve`.
_EXTRAS = {"data": "data", "eval": "eval", "train": "train"}
OWN_PACKAGES = ("echovlm_ray", "experts", "router", "protos")


class _Commands(TyperGroup):
    """Reports what to install if a command's packages are missing."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not package or package in OWN_PACKAGES:
                raise
            extra = _EXTRAS.get(ctx.invoked_subcommand or "", "serve")
            say(
                f"error: `echoray {ctx.invoked_subcommand}` needs {package}, which is not installed: "
                f"pip install 'echovlm-ray[{extra}]'",
                err=True,
            )
            raise typer.Exit(EXIT_FAILED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(status)
app.command()(stop)
app.command()(generate)
app.command()(info)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(experts.app, name="experts")
app.add_typer(data.app, name="data")
app.add_typer(evaluation.app, name="eval")
app.add_typer(train.app, name="train")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"echoray {metadata.version('echovlm-ray')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serves EchoVLM, a vision-language model for ultrasound, and sends requests to it. Not a medical device."""
