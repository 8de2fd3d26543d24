"""`echoray experts`: expert bundles and their rollouts. Imports torch only inside a command."""

import typer

from echovlm_ray.cli.experts_backup import backup, restore
from echovlm_ray.cli.experts_bundles import diff, pack, show, sign, verify
from echovlm_ray.cli.experts_history import history
from echovlm_ray.cli.experts_registry import list_command, pull, push
from echovlm_ray.cli.experts_replay import replay
from echovlm_ray.cli.experts_rollouts import apply, canary, promote, retire, rollback, shadow, stage
from echovlm_ray.cli.experts_watch import watch

app = typer.Typer(
    no_args_is_help=True,
    help="Pack, verify, sign and store expert bundles, and roll them out in a running system.",
    rich_markup_mode="markdown",
)
BUNDLES = "Bundles"
app.command("pack", rich_help_panel=BUNDLES)(pack)
app.command("verify", rich_help_panel=BUNDLES)(verify)
app.command("sign", rich_help_panel=BUNDLES)(sign)
app.command("show", rich_help_panel=BUNDLES)(show)
app.command("diff", rich_help_panel=BUNDLES)(diff)
app.command("push", rich_help_panel=BUNDLES)(push)
app.command("pull", rich_help_panel=BUNDLES)(pull)
ROLLOUTS = "Rollouts in a running system"
app.command("list", rich_help_panel=ROLLOUTS)(list_command)
app.command("watch", rich_help_panel=ROLLOUTS)(watch)
app.command("stage", rich_help_panel=ROLLOUTS)(stage)
app.command("shadow", rich_help_panel=ROLLOUTS)(shadow)
app.command("canary", rich_help_panel=ROLLOUTS)(canary)
app.command("promote", rich_help_panel=ROLLOUTS)(promote)
app.command("rollback", rich_help_panel=ROLLOUTS)(rollback)
app.command("retire", rich_help_panel=ROLLOUTS)(retire)
app.command("apply", rich_help_panel=ROLLOUTS)(apply)
app.command("history", rich_help_panel=ROLLOUTS)(history)
app.command("replay", rich_help_panel=ROLLOUTS)(replay)
STATE = "State of the rollouts, on the machine of its database"
app.command("backup", rich_help_panel=STATE)(backup)
app.command("restore", rich_help_panel=STATE)(restore)
