"""A training recipe: everything that determines what a run computes, except its data and its start.

Each field has a comment in the form "when this, do that". `echovlm_ray.training.recipe_file` reads a file; ready
recipes are in `echovlm_ray/training/recipes/`.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from echovlm_ray.config import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from echovlm_ray.config_checks import ContradictionError
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.tasks import TaskName, phantom_tasks

# The parts of the model that a stage can train; `echovlm_ray.training.parts` has their tensors.
Part = Literal[
    "vision",
    "projector",
    "embeddings",
    "attention",
    "dense_mlp",
    "norms",
    "head",
    "gates",
    "experts",
    "shared_expert",
    "coefficient",
]
PARTS: tuple[Part, ...] = get_args(Part)
# Parts with linear layers, which can get adapters.
AdaptedPart = Literal["vision", "projector", "attention", "dense_mlp"]
Share = Annotated[float, Field(ge=0, le=1)]


class PhantomSection(Section):
    """Synthetic images with true answers, drawn at the start of the run and stored in its folder.

    Questions, wordings and displays differ in every epoch.
    """

    # When you want other images, change it; use another seed than for your evaluation.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # When two runs should see different pictures of one seed, begin the second where the first ends.
    first: Annotated[int, Field(ge=0)] = 0
    # When the model learns the pictures by heart, raise it: still pictures, 50 KB each.
    pictures: PositiveInt = 20_000
    # When cine loops are to be read too, raise it: loops of eight frames.
    loops: Annotated[int, Field(ge=0)] = 0
    # When pictures cost more than steps, raise it: examples that an epoch has about each picture.
    examples_each: PositiveInt = 1
    # When only some organs should be trained, name them.
    organs: tuple[Organ, ...] = ()
    # When a class should be held out, name it like breast/simple_cyst.
    exclude: tuple[str, ...] = ()
    # When the answers of one task stay poor, raise its weight: the frequency of each task.
    tasks: Annotated[dict[TaskName, PositiveFloat], Field(min_length=1)] = Field(
        default={"report": 5.0, "diagnosis": 2.0, "vqa": 2.0, "findings": 0.4, "impression": 0.4, "caption": 0.2}
    )
    # When pictures of other machines are to be read, leave it true: gain, sharpness, compression and, where the anatomy
    # allows it, left and right vary.
    vary: bool = True

    @field_validator("tasks")
    @classmethod
    def _are_asked_about_phantoms(cls, tasks: dict[TaskName, float]) -> dict[TaskName, float]:
        if others := sorted(set(tasks) - set(phantom_tasks())):
            raise ValueError(f"{', '.join(others)} cannot be asked about phantoms: name {', '.join(phantom_tasks())}")
        return tasks

    @property
    def picture_indices(self) -> range:
        """The phantoms that are drawn as still pictures."""
        return range(self.first, self.first + self.pictures)

    @property
    def loop_indices(self) -> range:
        """The phantoms that are drawn as loops."""
        return range(self.first + self.pictures, self.first + self.pictures + self.loops)


class DataSection(Section):
    """How examples become batches."""

    # When an example has more tokens, visual ones included, it cannot be used; it is never cut.
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    # When an image, or two frames of a cine loop, would take more visual tokens, they are scaled down to fit; keep it
    # equal to gateway.max_visual_tokens of the deployment.
    max_visual_tokens: Annotated[int, Field(ge=16)] = 196
    # When an example cannot be used (too long, its image missing or broken), "stop" ends the run clearly and "skip"
    # takes the next example of the file in its place.
    unusable: Literal["stop", "skip"] = "stop"
    # When the processor waits for images, raise it: worker processes that read them. The order does not depend on it.
    workers: Annotated[int, Field(ge=0)] = 0
    # When you have no records, or want more images than a disk can store, draw phantoms instead of reading files.
    phantoms: PhantomSection | None = None
    # When you want to hold out data for validation, set the share; a separate file (--validation) overrides it.
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0


class LossSection(Section):
    """What is minimised."""

    # When experts die (see dead_experts in the log), raise it; when answers stay poor while the load is even, lower it.
    # The load-balancing loss of every sequence and layer is multiplied with it.
    balancing: NonNegativeFloat = 0.001
    # When answers are fluent but wrong in the words that matter, raise it: tokens of an example's emphasised words
    # count this often.
    emphasis_weight: PositiveFloat = 1.0
    # When the picture has little effect on answers, raise it: the weight of the finding heads in a stage that learns
    # from both.
    findings: NonNegativeFloat = 0.3


class UpcyclingSection(Section):
    """What becomes of a dense Qwen2-VL when it gets experts; without effect on a model that has them."""

    # When tokens differ much (several organs, languages), use more experts; memory grows with them.
    num_experts: PositiveInt = 4
    # When quality is more important than speed, raise it: experts per token.
    num_experts_per_tok: PositiveInt = 2
    # When memory is short, lower it: the inner size of a routed expert.
    expert_size: PositiveInt = 1408
    # When memory is short, lower it: the inner size of the shared expert.
    shared_expert_size: PositiveInt = 5632
    # When 0, experts begin with rows of the dense MLP; when 1, at random; between, that share of their rows is drawn
    # again (Drop-Upcycling, arXiv 2502.19261, which finds 0.5 best), so that experts differ from the beginning.
    redrawn: Share = 0.5
    # When true, the mixture starts at zero and step 0 computes what the dense model does; when false, experts start
    # with their full output and the model is disturbed at first.
    preserve: bool = True


class AdapterSection(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) of frozen linear layers, merged when the stage ends."""

    # When a part needs small and cheap changes, name it here instead of under `train`.
    parts: tuple[AdaptedPart, ...]
    # When the adapted parts learn too little, raise it: the rank.
    rank: PositiveInt = 8
    # When you change the rank, change it in proportion: adapters are scaled by alpha / rank.
    alpha: PositiveInt = 16


class Stage(Section):
    """One stage: the trained parts, the learning rate and the duration. The next stage starts from its result."""

    # When a recipe has several stages, names tell them apart; also the name of the stage's folder.
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = "all"
    # When a part should be trained, name it; parts that are neither here nor under `adapters` are frozen.
    train: tuple[Part, ...] = PARTS
    # When the vision tower is untrained, start with a stage of "findings": heads on the visual tokens predict tissue,
    # class and attributes, and are discarded at the end. "both" trains the answers and the heads.
    learn: Literal["answers", "findings", "both"] = "answers"
    # When set, the named parts learn through adapters.
    adapters: AdapterSection | None = None
    # When the data set is small, give several; a part of an epoch is possible.
    epochs: PositiveFloat = 1.0
    # When set, the stage has this many optimizer steps, and `epochs` is ignored.
    steps: PositiveInt | None = None
    # When gradients are noisy, raise it: examples an optimizer step, over all workers and micro-batches together.
    batch_size: PositiveInt = 16
    # When a whole batch does not fit in memory, lower it: examples in one forward pass of one worker. The result is the
    # same up to rounding.
    micro_batch_size: PositiveInt = 4
    # When the loss jumps or is not a number, lower it; when it falls slowly, raise it.
    learning_rate: PositiveFloat = 1e-4
    # When a run is short, "linear" or "cosine" end it well; "constant" suits one that will be continued.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # When the first steps damage earlier training, raise it: the share of steps of the learning rate's warm-up.
    warmup_share: Share = 0.03
    # When the model learns the data by heart, raise it; norms and biases are left out.
    weight_decay: NonNegativeFloat = 0.05
    # When the loss has spikes, lower the second: how long the optimizer remembers gradients and their squares.
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    # When single batches throw the model off, lower it: longer gradients are shortened to this norm.
    max_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ContradictionError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}: change one",
                "micro_batch_size",
            )
        adapted = set(self.adapters.parts) if self.adapters is not None else set()
        if both := sorted(adapted & set(self.train)):
            raise ContradictionError(
                f"{', '.join(both)} cannot both be trained and have adapters: name it in one place", "train"
            )
        others = sorted((adapted | set(self.train)) - {"vision", "projector"})
        if self.learn == "findings" and others:
            raise ContradictionError(
                f"finding heads teach vision and projector only: leave {', '.join(others)} out", "train"
            )
        if not adapted and not self.train:
            raise ContradictionError("a stage must train something: name parts under train or adapters", "train")
        return self


class Recipe(Section):
    """Everything that determines what a run computes, except its data and its start."""

    # When a result should be seen with other random draws, change it; the same seed gives the same bytes on the same
    # machine with the same number of workers and threads.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    upcycling: UpcyclingSection = UpcyclingSection()
    # When parts should be trained one after the other, list several; each starts from the previous one's result.
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (Stage(),)
    # When the processor has no bfloat16, or rounding is suspected, choose "float32"; weights and optimizer are float32
    # in any case.
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    # When the result should be half as large, choose "bfloat16": the type of the finished weights.
    weights: Literal["float32", "bfloat16"] = "float32"
    # When a micro-batch of one does not fit in memory, set it to true: a third more work, far less memory.
    activation_checkpointing: bool = False
    # When the model does not fit one GPU, set it to true: weights, gradients and optimizer are divided among the
    # workers (FSDP2). Never run here: this project's tests have no machine with several GPUs.
    shard: bool = False
    # When a lost hour would hurt, lower it: optimizer steps between two checkpoints.
    save_every: PositiveInt = 500
    # When the disk is small, lower it: the number of stored checkpoints.
    keep: PositiveInt = 2
    # When curves should be finer, lower it: optimizer steps between two lines of the log.
    log_every: PositiveInt = 10
    # When set, the validation loss is measured every this many steps; it is always measured at the end.
    validate_every: PositiveInt | None = None
    # When you want the curves in another tool, name it; it must be installed, and is configured by its environment
    # (MLFLOW_TRACKING_URI). TensorBoard's files are in the stage's folder. Log and PNG are always written.
    tracker: Literal["none", "tensorboard", "mlflow"] = "none"

    @model_validator(mode="after")
    def _stages_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ContradictionError("two stages have the same name: rename one", "stages")
        if self.upcycling.num_experts_per_tok > self.upcycling.num_experts:
            raise ContradictionError(
                "upcycling.num_experts_per_tok is more than upcycling.num_experts: change one",
                "upcycling.num_experts_per_tok",
            )
        return self
