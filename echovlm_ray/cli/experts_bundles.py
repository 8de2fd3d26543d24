"""`echoray experts pack`, `verify`, `sign`, `show` and `diff`: commands on one or two bundles."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.control import with_named_control
from echovlm_ray.cli.experts_targets import (
    DEFAULT_REGISTRY,
    EXIT_INVALID,
    AsJSON,
    PublicKeys,
    RegistryOptions,
    RegistryURL,
    Target,
    source_of,
)
from echovlm_ray.cli.gate_format import evaluation_as_dict, print_evaluations
from echovlm_ray.cli.terminal import say, say_json
from echovlm_ray.cli.work import byte_progress, clear_errors, fail, finite, parse_size
from echovlm_ray.client.control import ExpertControlClient

if TYPE_CHECKING:
    from echovlm_ray.checkpoint.bundle_card import BundleCard
    from experts.checks.check import BackboneSizes

_DTYPES = ("float32", "bfloat16", "float16")

DEFAULT_CHECKPOINT = Path("checkpoints/demo")
Password = Annotated[
    str | None,
    typer.Option(envvar="ECHORAY_KEY_PASSWORD", help="The private key's password; better in the environment."),
]
PackSource = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="A split or released checkpoint, or a training's file or folder."),
]
PackCheckpoint = Annotated[
    Path | None,
    typer.Option(
        help="The split checkpoint for whose backbone it is. [default: SRC, if it is one, else checkpoints/demo]"
    ),
]
Card = Annotated[Path | None, typer.Option(help="A YAML file with any of the manifest's fields; options win over it.")]
FromOrgan = Annotated[str | None, typer.Option(help="Of a split SRC, take this organ's experts. [default: --organ]")]
ExpertIndices = Annotated[
    str | None, typer.Option(help="Of SRC's experts only these, in this order, like 0,2. [default: all]")
]
PackDtype = Annotated[str | None, typer.Option(help="Convert to float32, bfloat16 or float16. [default: as they are]")]
Prototype = Annotated[
    Path | None, typer.Option(help="A safetensors file with `prototype`, the organ's mean vision feature.")
]
Metrics = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A result of evaluation. Repeatable.")]


def pack(
    source: PackSource,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The bundle's folder to make.")],
    organ: Annotated[str, typer.Option(help="Whose experts these are.")],
    version: Annotated[str | None, typer.Option(help="The semantic version, like 1.1.0.")] = None,
    checkpoint: PackCheckpoint = None,
    card: Card = None,
    from_organ: FromOrgan = None,
    experts: ExpertIndices = None,
    dtype: PackDtype = None,
    prototype: Prototype = None,
    name: Annotated[str | None, typer.Option(help="The bundle's name.")] = None,
    description: Annotated[str | None, typer.Option(help="A sentence about it.")] = None,
    authors: Annotated[str | None, typer.Option(help="Who made the weights.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="An SPDX identifier, like Apache-2.0.")] = None,
    copyright_: Annotated[str | None, typer.Option("--copyright", help="Who holds the rights.")] = None,
    intended_use: Annotated[str | None, typer.Option(help="What it is meant for, and what not.")] = None,
    data_source: Annotated[str | None, typer.Option(help="Where the training data come from.")] = None,
    training_data: Annotated[str | None, typer.Option(help="What they are, in words and numbers.")] = None,
    changelog: Annotated[str | None, typer.Option(help="What changed in this version.")] = None,
    metric: Metrics = None,
    reference: Annotated[list[str] | None, typer.Option(help="A URL or citation. Repeatable.")] = None,
    synonym: Annotated[list[str] | None, typer.Option(help="Another word for the organ. Repeatable.")] = None,
    max_file_size: Annotated[str, typer.Option(help="The most bytes of weights in one file.")] = "5GB",
    sign_with: Annotated[Path | None, typer.Option(help="Sign it with this PEM private key.")] = None,
    password: Password = None,
) -> None:
    """Packs one organ's experts as a bundle.

    SRC is a split checkpoint, a released one whose backbone is the same, or what a training wrote: safetensors with
    nothing but `model.layers.{i}.moe.experts.{e}.…` and `model.layers.{i}.moe.gate.weight`. Such files do not
    say which backbone they belong to: give its split checkpoint with `--checkpoint`, as for a released one.

    What SRC says about itself is taken over; `--card` and the options say the rest. Inputs and outputs of every layer
    are recorded, for `verify`.

    One tensor at a time is in memory. DST appears only when it is complete.

    Example: `echoray experts pack trained/ breast-1.1.0 --organ breast --version 1.1.0 --checkpoint checkpoints/split`
    """
    with clear_errors():
        from echovlm_ray.checkpoint.bundle_card import BundleCard, read_card
        from echovlm_ray.checkpoint.pack import PackOptions
        from echovlm_ray.checkpoint.pack import pack as pack_bundle
        from experts.bundles.signing import sign_bundle

        said = BundleCard(
            name=name,
            version=version,
            description=description,
            authors=authors,
            license=license_,
            copyright=copyright_,
            intended_use=intended_use,
            data_source=data_source,
            training_data=training_data,
            eval_metrics=_metrics(metric),
            references=tuple(reference) if reference else None,
            organ_synonyms=tuple(synonym) if synonym else None,
        )
        if card is not None:
            said = said.over(read_card(card))
        said = _with_changelog(said, changelog)
        options = PackOptions(
            organ=organ,
            checkpoint=_checkpoint_for(source) if checkpoint is None else checkpoint,
            from_organ=from_organ,
            experts=None if experts is None else _indices(experts),
            dtype=_dtype(dtype),  # type: ignore[arg-type]
            prototype=prototype,
            max_file_bytes=parse_size(max_file_size, "--max-file-size"),
        )
        with byte_progress("packing") as (start, advance):
            manifest = pack_bundle(source, destination, said, options, start=start, progress=advance)
        if sign_with is not None:
            sign_bundle(destination, sign_with, password=password)
    signed = ", signed" if sign_with is not None else ""
    say(f"Packed {manifest.organ}@{manifest.version} into {destination}{signed}: {manifest.digest}")
    say(f"Next: echoray experts verify {destination}")


def verify(
    target: Target,
    registry: RegistryURL = DEFAULT_REGISTRY,
    registry_option: RegistryOptions = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A split checkpoint: the bundle must be for its backbone, and fit it.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Replay the self-test through this kernel.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Compute in float32, bfloat16 or float16. [default: as --checkpoint's backbone; without it, as the "
            "bundle]"
        ),
    ] = None,
    other_dtype: Annotated[
        str,
        typer.Option(
            help="convert a bundle of another dtype, or refuse it: what experts.other_dtype is configured to."
        ),
    ] = "convert",
    key: PublicKeys = None,
    unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="With --key: a bundle without any signature passes too.")
    ] = False,
    memory: Annotated[
        str, typer.Option(help="The most memory that checking may take beyond the bundle's own files.")
    ] = "8GiB",
    timeout: Annotated[float, typer.Option(min=0.1, callback=finite, help="Give up after this many seconds.")] = 600.0,
    as_json: AsJSON = False,
) -> None:
    """Checks everything about a bundle: manifest, files, digests, shapes, finite weights, gates, signature, self-test.

    The self-test replays the inputs that were recorded when the bundle was packed, through the kernel that will serve.
    All of it runs in a process of its own, so that a bundle that crashes the kernel ends nothing else.

    Exit status: 0 the bundle is good; 1 it is not, and why is printed; 2 wrong options.

    Example: `echoray experts verify breast-1.1.0 --checkpoint checkpoints/echovlm`

    Example: `echoray experts verify breast@1.1.0 --registry s3://models/experts --key release.pub`
    """
    with clear_errors():
        from echovlm_ray.cli.experts_tables import print_check
        from experts.bundles.signing import SignaturePolicy
        from experts.checks.check import CheckRequest
        from experts.checks.isolated_check import check_in_subprocess

        if device not in ("cpu", "cuda"):
            fail(f"--device {device!r} must be cpu or cuda", EXIT_INVALID)
        if other_dtype not in ("convert", "refuse"):
            fail(f"--other-dtype {other_dtype!r} must be convert or refuse", EXIT_INVALID)
        required = bool(key) and not unsigned
        request = CheckRequest(
            source=source_of(target, registry, registry_option),
            backbone=None if checkpoint is None else _backbone(checkpoint),
            policy=SignaturePolicy(signatures="required" if required else "optional", public_keys=tuple(key or ())),
            kernel=kernel,
            device=device,  # type: ignore[arg-type]
            dtype=_dtype(dtype) or _backbone_dtype(checkpoint),  # type: ignore[arg-type]
            other_dtype=other_dtype,  # type: ignore[arg-type]
            memory_bytes=parse_size(memory, "--memory"),
        )
        result = check_in_subprocess(request, timeout_s=timeout)
    if as_json:
        say_json(result.model_dump_json(indent=2))
    elif result.ok:
        print_check(result)
    else:
        fail(f"{target}: {' '.join((result.reason or '').split())}")
    if not result.ok:
        raise typer.Exit(1)


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    key: Annotated[Path, typer.Option(help="A PEM private key on the curve P-256, P-384 or P-521.")],
    password: Password = None,
) -> None:
    """Signs a bundle: puts `model.sig` beside its manifest, in the format of OpenSSF model signing.

    Push it again after signing, and the registry has the signature too.

    Example: `echoray experts sign breast-1.1.0 --key release.pem`
    """
    with clear_errors():
        from experts.bundles.signing import sign_bundle

        path = sign_bundle(bundle, key, password=password)
    say(f"Signed: {path}")


@with_named_control
def show(
    control: ExpertControlClient | None,
    target: Target,
    registry: RegistryURL = DEFAULT_REGISTRY,
    registry_option: RegistryOptions = None,
    as_json: AsJSON = False,
) -> None:
    """Shows what a bundle says about itself, and with `--control` also what evaluations found about it.

    Example: `echoray experts show breast@1.0.0 --registry checkpoints/echovlm`

    Example: `echoray experts show breast@1.1.0 --control 127.0.0.1:50052`
    """
    with clear_errors():
        from echovlm_ray.cli.experts_tables import print_bundle

        bundle = source_of(target, registry, registry_option).open()
    found = None
    if control is not None:
        known = control.list(bundle.manifest.organ).evaluations
        found = [evaluation for evaluation in known if evaluation.digest == bundle.digest]
    if as_json:
        content = bundle.manifest.model_dump(mode="json")
        facts = {"digest": bundle.digest, "size_bytes": bundle.manifest.size_bytes, "signed": bool(bundle.signature)}
        # Without Control nothing is known of any evaluation, which is another thing than that there is none.
        evaluated = {} if found is None else {"evaluations": [evaluation_as_dict(each) for each in found]}
        say_json({**facts, **content, **evaluated}, indent=2)
        return
    print_bundle(bundle)
    if found is not None:
        print_evaluations(found)


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A bundle's folder, or ORGAN@VERSION.")],
    after: Annotated[str, typer.Argument(metavar="B", help="A bundle's folder, or ORGAN@VERSION.")],
    registry: RegistryURL = DEFAULT_REGISTRY,
    registry_option: RegistryOptions = None,
    as_json: AsJSON = False,
) -> None:
    """Shows what changed from one bundle to another: fields, experts, and how far every layer moved.

    How far is the norm of the difference as a share of the norm before. Experts that are equal in every bit are found
    wherever they are; the others are compared under the same index.

    Example: `echoray experts diff breast@1.0.0 breast-1.1.0`
    """
    with clear_errors():
        from echovlm_ray.cli.experts_tables import print_diff
        from experts.bundles.diff import diff_bundles

        first, second = (source_of(target, registry, registry_option).open() for target in (before, after))
        for bundle in (first, second):
            bundle.verify(digests=False)
        found = diff_bundles(first, second)
    if as_json:
        say_json({**asdict(found), "same_weights": found.same_weights}, indent=2)
    else:
        print_diff(found)


def _backbone(checkpoint: Path) -> "BackboneSizes":
    from echovlm_ray.checkpoint.split_folder import open_split
    from experts.checks.check import BackboneSizes

    opened = open_split(checkpoint)
    shape = opened.backbone.known_shape()
    return BackboneSizes(
        digest=opened.index.backbone_digest, num_layers=shape.num_hidden_layers, hidden_size=shape.hidden_size
    )


def _checkpoint_for(source: Path) -> Path:
    """The split checkpoint for whose backbone a SRC is, where none is named."""
    from echovlm_ray.checkpoint.layout import is_split_folder

    found = next((folder for folder in (source, DEFAULT_CHECKPOINT) if is_split_folder(folder)), None)
    if found is None:
        fail(
            f"{source} does not say for which backbone it is: give the split checkpoint with --checkpoint", EXIT_INVALID
        )
    return found


def _backbone_dtype(checkpoint: Path | None) -> str | None:
    from echovlm_ray.checkpoint.backbone_dtype import compute_dtype

    return None if checkpoint is None else compute_dtype(checkpoint)


def _with_changelog(card: "BundleCard", text: str | None) -> "BundleCard":
    if text is None or card.version is None:
        return card
    return card.model_copy(update={"changelog": {**(card.changelog or {}), card.version: text}})


def _metrics(options: list[str] | None) -> dict[str, float] | None:
    metrics = {}
    for option in options or []:
        name, _, value = option.rpartition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            fail(f"--metric {option!r} must be NAME=VALUE, like bleu1=0.31", EXIT_INVALID)
    return metrics or None


def _indices(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        fail(f"--experts {text!r} must be numbers from 0, separated by commas, like 0,2", EXIT_INVALID)
    return [int(part) for part in parts]


def _dtype(name: str | None) -> str | None:
    if name is not None and name not in _DTYPES:
        fail(f"--dtype {name!r} must be one of {', '.join(_DTYPES)}", EXIT_INVALID)
    return name
