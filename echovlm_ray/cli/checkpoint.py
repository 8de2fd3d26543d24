"""`echoray checkpoint`: inspects, splits, merges and creates checkpoints. Imports torch only inside a command."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from echovlm_ray.cli.terminal import say, say_json
from echovlm_ray.cli.work import byte_progress, clear_errors, fail, parse_size

app = typer.Typer(
    no_args_is_help=True, help="Inspect, split, merge and create checkpoints.", rich_markup_mode="markdown"
)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint's folder.")]
Destination = Annotated[
    Path, typer.Argument(metavar="DST", help="The folder to create. It must not exist, or must be empty.")
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="The most bytes of weights in one file, like 5GB or 500MB.")
]
# The seven regions that EchoVLM was trained on, in set order.
_DEFAULT_ORGANS = "breast,gynaecology,heart,kidney,liver,thyroid,vessel"


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Any checkpoint's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Shows the kind of a checkpoint, the sizes of its parts, and its problems.

    Supports the released layout (one file or shards), split folders, their backbones, and a stock Qwen2-VL.
    Reads only headers, so it is fast for any size. The exit code is 1 if there are problems.

    Example: `echoray checkpoint inspect checkpoints/demo`
    """
    with clear_errors():
        from echovlm_ray.checkpoint.inspect import inspect
        from echovlm_ray.cli.checkpoint_report import print_report

        report = inspect(directory)
    if as_json:
        say_json(report.model_dump_json(indent=2))
    else:
        print_report(report)
    if report.problems:
        raise typer.Exit(1)


@app.command("split")
def split_command(
    source: Source,
    destination: Destination,
    organs: Annotated[
        str | None,
        typer.Option(help="The organs that get a copy of all experts each, separated by commas. [default: all seven]"),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(help="A YAML or JSON file that partitions the experts, with lines like `breast: [0, 1]`."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The checkpoint's name. [default: SRC's]")] = None,
    version: Annotated[str, typer.Option(help="The semantic version of the checkpoint and its bundles.")] = "1.0.0",
    description: Annotated[str, typer.Option(help="A sentence about it.")] = "",
    authors: Annotated[str | None, typer.Option(help="Who made the weights.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="An SPDX identifier, like Apache-2.0.")] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Splits a released checkpoint into a backbone and one bundle of experts per organ.

    By default every organ (breast, gynaecology, heart, kidney, liver, thyroid, vessel) gets a copy of all experts,
    which is stored once. The system then computes exactly what the released model does, and each organ's copy can be
    trained and replaced separately. With `--groups` the experts are partitioned among the organs instead, with one gate
    over all of them.

    Only one tensor at a time is in memory. DST appears only when it is complete.

    Example: `echoray checkpoint split EchoVLM/ checkpoints/echovlm`

    Example: `echoray checkpoint split EchoVLM/ checkpoints/divided --groups groups.yaml`
    """
    if organs is not None and groups is not None:
        fail("--organs copies the experts and --groups divides them; give one of the two", code=2)
    with clear_errors():
        from echovlm_ray.checkpoint.groups import clone_groups, partition_groups, read_groups
        from echovlm_ray.checkpoint.split import Labels, split

        defaults = Labels(name=name or source.resolve().name or "echovlm", version=version, description=description)
        labels = Labels(
            name=defaults.name,
            version=version,
            description=description,
            authors=authors or defaults.authors,
            license=license_ or defaults.license,
        )
        names = [organ.strip() for organ in (_DEFAULT_ORGANS if organs is None else organs).split(",") if organ.strip()]
        assign = partial(clone_groups, names) if groups is None else partial(partition_groups, read_groups(groups))
        with byte_progress("splitting") as (start, advance):
            result = split(
                source,
                destination,
                groups=assign,
                routing="organs" if groups is None else "flat",
                labels=labels,
                max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
                start=start,
                progress=advance,
            )
    if result.left_behind:
        say(f"Not copied, since nothing reads them: {', '.join(result.left_behind)}", err=True)
    say(f"Split into {destination}: {', '.join(entry.organ for entry in result.index.organs)}.")
    say(f"Next: echoray serve --checkpoint {destination}")


@app.command("merge")
def merge_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A split checkpoint's folder.")],
    destination: Destination,
    organ: Annotated[
        str | None, typer.Option(help="Write the model with this organ's experts; needed once the copies differ.")
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="The version of that organ's bundle. [default: the checkpoint's]")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Joins a split checkpoint into one in the released layout: the exact inverse of `split`.

    Every tensor is bitwise equal to the original. Copies that differ are refused with the first difference; `--organ`
    then writes one organ's model. Prototypes are not part of the released layout and are not written.

    Only one tensor at a time is in memory. DST appears only when it is complete.

    Example: `echoray checkpoint merge checkpoints/echovlm merged/`

    Example: `echoray checkpoint merge checkpoints/echovlm merged-breast/ --organ breast`
    """
    with clear_errors():
        from echovlm_ray.checkpoint.merge import merge

        with byte_progress("merging") as (start, advance):
            merge(
                source,
                destination,
                organ=organ,
                version=version,
                max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
                start=start,
                progress=advance,
            )
    say(f"Merged into {destination}.")


@app.command("demo")
def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
) -> None:
    """Creates a small demo EchoVLM, trained on synthetic phantoms and split for the seven organs.

    It has a tokenizer, a processor and a chat template, takes seconds, and has the same bytes on every machine. **It
    was never trained on a patient's images: what it writes about real images means nothing.** `echoray data phantom`
    draws pictures that it can read. The breast has two versions of experts, and the second is live. An existing demo is
    not changed.

    Example: `echoray checkpoint demo checkpoints/demo`
    """
    with clear_errors():
        from echovlm_ray.checkpoint.demo import make_demo

        index, made = make_demo(directory)
    if made:
        say(f"Made {index.name} {index.version} in {directory}. {index.description}")
    else:
        say(f"{directory} holds {index.name} {index.version} already; nothing to do.")
    say(f"Next: echoray serve --checkpoint {directory}")
