"""`echoray eval`: evaluates a model on a dataset, compares two evaluations, exports. Imports little until it runs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from echovlm_ray.cli.credentials import Authority, Certificate, Key, TokenFile, tls_of, token_of
from echovlm_ray.cli.data_sets import usable
from echovlm_ray.cli.terminal import console_of, say, say_json
from echovlm_ray.cli.work import fail, finite

if TYPE_CHECKING:
    from echovlm_ray.evaluation.result import EvaluationResult

EXIT_INCOMPLETE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class _RunsByDefault(TyperGroup):
    """Makes `echoray eval FILE …` an alias of `echoray eval run FILE …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunsByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Evaluate a model on a dataset, against three baselines.

    Example: `echoray eval test.jsonl --server 127.0.0.1:50051 --output results/`

    Every evaluation also asks about a **blank image** and about **another record's images**, and answers with the
    **commonest report**: a model is worth what it is above these. Scores of words (BLEU, ROUGE, METEOR) are shown only
    beside what was right, because a wrong report in the usual words scores about 80.

    Answers are kept as they come: after Ctrl-C, or a crash, the same command goes on where it was.
    """,
)

Dataset = Annotated[Path, typer.Argument(metavar="FILE", help="A JSON or JSON Lines file of records.")]
Images = Annotated[Path | None, typer.Option(help="The folder that the images' paths start from. [default: FILE's]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Limit = Annotated[int | None, typer.Option(min=2, help="Only this many records, from the first one on.")]
BertModel = Annotated[
    Path | None, typer.Option(help="Also BERTScore, with the BERT in this folder (needs the extra bertscore).")
]
RetryS = Annotated[
    float, typer.Option(min=0.0, callback=finite, help="How many seconds to wait for an unavailable service.")
]
Draws = Annotated[int, typer.Option(min=100, help="Resamples of the bootstrap.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resamples and of the exchanged images.")]


@app.command("run")
def run_command(
    dataset: Dataset,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for answers and results.")],
    server: Annotated[str | None, typer.Option(help="host:port of a running gateway.", envvar="ECHORAY_SERVER")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A split checkpoint to run in this process instead.")] = None,
    images: Images = None,
    limit: Limit = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    organs: Annotated[
        str,
        typer.Option(
            help="found: the model determines the organ. given: each record's organ is sent with the request."
        ),
    ] = "found",
    bertscore_model: BertModel = None,
    draws: Draws = 1000,
    seed: Seed = 0,
    examples: Annotated[int, typer.Option(min=0, help="Records on the report page.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="With --checkpoint: torch threads.")] = 1,
    patience: RetryS = 600.0,
    token_file: TokenFile = None,
    ca: Authority = None,
    certificate: Certificate = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Sends a dataset's questions to a model and scores the answers.

    Writes `answers.jsonl` (all answers), `result.json`, `scores.png`, and `report.html`, a page with example images, to
    DIR. The files contain data of the dataset: keep them as private.

    **What is right**: attribute F1, all attributes right, diagnosis accuracy and macro-F1, VQA accuracy and macro-F1,
    sensitivity and specificity for normal or not, and the organ gate. Per organ, task, language and class, with
    intervals of 95 % from resampled patients.

    **Words**: BLEU-1 to 4, ROUGE-1, 2 and L, METEOR; in Chinese by characters and by jieba's words.

    The exit status is 0 if every question has an answer, 1 if some have none, 2 for invalid options or files, 3 if no
    service answers, 5 for credentials, 130 after Ctrl-C.

    Example: `echoray eval test.jsonl --server 127.0.0.1:50051 --output results/`

    Example: `echoray eval test.jsonl --checkpoint checkpoints/demo -o results/ --limit 50`
    """

    if organs not in ("found", "given"):
        fail(f"--organs {organs!r} is neither found nor given", code=EXIT_USAGE)
    if checkpoint is not None:
        server = None
    console = console_of(stderr=True)
    # gRPC's messages about ended connections; the client's errors report their effects.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with usable():
        from echovlm_ray.cli.evaluation_run import answers_of, plan_of, write_result
        from echovlm_ray.evaluation.run import load
        from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, ScoreSettings

        given: Literal["found", "given"] = "given" if organs == "given" else "found"
        plan = plan_of(
            dataset,
            output,
            images,
            AskSettings(max_new_tokens=max_new_tokens, organs=given),
            ScoreSettings(draws=draws, seed=seed),
            RequestLimits(concurrency=concurrency, retry_s=max(patience, 0.001)),
            limit=limit,
            examples=examples,
            bert_model=bertscore_model,
        )
        loaded = load(plan)
        connection = {"token": token_of(token_file), "tls": tls_of(ca, certificate, key)} if checkpoint is None else {}
    target, outcome = answers_of(plan, loaded, server, checkpoint, threads, connection, console)
    with usable(), console.status("scoring …"):
        try:
            result = write_result(plan, loaded, target, outcome)
        except KeyboardInterrupt:
            fail("interrupted while scoring; all answers are kept: run the same command again", code=EXIT_INTERRUPTED)
    _report(result, output, as_json=as_json)


def _report(result: "EvaluationResult", output: Path, *, as_json: bool) -> None:
    """Prints the result; exits with a separate status if questions have no answer."""
    if as_json:
        say_json(result.model_dump_json(indent=2, exclude={"examples"}))
    else:
        from echovlm_ray.cli.evaluation_output import print_result

        print_result(result, console_of())
        written = f"written: {output}/report.html, result.json, scores.png, answers.jsonl"
        console_of(stderr=True).print(written, markup=False)
    if result.failed:
        reasons = ", ".join(f"{name} {count}" for name, count in result.failed.items())
        fail(f"some questions have no answer ({reasons}): the same command sends them again", code=EXIT_INCOMPLETE)


@app.command("compare")
def compare_command(
    dataset: Dataset,
    first: Annotated[Path, typer.Argument(metavar="DIR1", help="The folder of one evaluation.")],
    second: Annotated[Path, typer.Argument(metavar="DIR2", help="The folder of another one, of the same dataset.")],
    limit: Limit = None,
    draws: Draws = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Tests whether two versions differ on the same questions, with a paired test for every metric.

    The p-value is from approximate randomisation over patients (over records, if the patient is unknown); the interval
    is from a paired bootstrap.

    Example: `echoray eval compare test.jsonl results-1.0.0/ results-1.1.0/`
    """

    with usable():
        from echovlm_ray.data.dataset import RecordDataset
        from echovlm_ray.evaluation.comparing import compare_runs
        from echovlm_ray.evaluation.items import load_items

        with RecordDataset(dataset) as records:
            loaded = load_items(records, limit)
        comparison = compare_runs(loaded.items, first, second, draws=draws, seed=seed)
    if as_json:
        say_json(comparison.model_dump_json(indent=2))
    else:
        from echovlm_ray.cli.evaluation_output import print_comparison

        print_comparison(comparison, console_of())


@app.command("export")
def export_command(
    dataset: Dataset,
    evaluation: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished evaluation.")],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write to. It must not exist, or must be empty.")
    ],
    name: Annotated[str, typer.Option(help="The dataset's name in the kit.")] = "echovlm",
    model: Annotated[str | None, typer.Option(help="The model's name in the kit. [default: the model's name]")] = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Writes predictions and references in the format of U2-BENCH's evaluation kit.

    Reports are written to `report/NAME/MODEL/`, diagnoses and questions with options to `cla/NAME/MODEL/`, and the
    references to `references/*.tsv`: set the kit's TSV_PATH to these.

    Example: `echoray eval export test.jsonl results/ u2/ --name 39`
    """
    with usable():
        from echovlm_ray.data.dataset import RecordDataset
        from echovlm_ray.evaluation.comparing import read_result, stored_answers
        from echovlm_ray.evaluation.export import export_u2_bench
        from echovlm_ray.evaluation.items import load_items
        from echovlm_ray.evaluation.run import variants_of

        with RecordDataset(dataset) as records:
            items = load_items(records, limit).items
        result = read_result(evaluation)
        texts = variants_of(items, stored_answers(evaluation, result, items))[0].texts
        written = export_u2_bench(items, texts, destination, dataset=name, model=model or result.target.name)
    if as_json:
        found = [
            {"task": each.task, "predictions": str(each.predictions), "references": str(each.references)}
            | {"records": each.records}
            for each in written
        ]
        say_json(found)
        return
    for each in written:
        say(f"{each.task}: {each.records} records, {each.predictions} and {each.references}")
