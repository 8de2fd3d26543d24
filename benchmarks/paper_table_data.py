"""The data of the paper's comparison: phantoms, a vision tower, and reports."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from echovlm_ray.config import Section
from echovlm_ray.data.parse import parse_record
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.draws import draws
from echovlm_ray.data.phantom.phantom import attributes_at
from echovlm_ray.data.phantom.records import records
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.evaluation.items import Item, item_of
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.model.text_tokens import TURN_END
from echovlm_ray.tasks import Language
from echovlm_ray.training.batches import collate
from echovlm_ray.training.emphasis import emphasised
from echovlm_ray.training.encode import EncodedExample, ExampleEncoder
from echovlm_ray.training.example_cache import pooled_direction
from echovlm_ray.training.examples import Example
from echovlm_ray.training.phantom_pool import PhantomPool
from echovlm_ray.training.recipe import DataSection, PhantomSection, Recipe, Stage
from echovlm_ray.training.small_start import write_small_start
from echovlm_ray.training.sources import DataFiles
from echovlm_ray.training.stage import StageJob, train_stage
from echovlm_ray.training.start import Start

LANGUAGE: Language = "en"
TRAINING_SEED, HELD_OUT_SEED = 1000, 90_001
# Folders of a run: what all cells start from, and the pictures.
START_NAME, PICTURES_NAME, HELD_OUT_NAME, TOWER_NAME = "start", "phantoms", "held-out", "tower"
# The tensor in the file of what the tower made of all pictures.
_SEEN = "embeddings"
# Pictures that the vision tower looks at together.
_TOGETHER = 32


class Scale(Section):
    """How large the comparison is; every cell has the same.

    Attributes:
        organs: of the phantoms.
        pictures: to learn from.
        held_out: of another seed, for the test.
        look_steps: optimizer steps of the vision tower's warm-up, of 32 examples each.
        steps: optimizer steps of each variant.
        batch: examples of such a step.
        layers: of the language model.
        expert_size, shared_size: inner sizes of the experts.
        learning_rate: the largest of a cosine.
        balancing: weight of the load-balancing loss.
        emphasis: weight of the words that the picture decides.
    """

    organs: tuple[Organ, ...] = ("breast", "liver", "thyroid")
    pictures: int = 4000
    held_out: int = 340
    look_steps: int = 400
    steps: int = 250
    batch: int = 16
    layers: int = 2
    expert_size: int = 64
    shared_size: int = 128
    learning_rate: float = 2e-3
    balancing: float = 0.01
    emphasis: float = 5.0

    def phantoms(self, *, held_out: bool = False) -> PhantomSection:
        """What is drawn."""
        seed = HELD_OUT_SEED if held_out else TRAINING_SEED
        pictures = self.held_out if held_out else self.pictures
        return PhantomSection(seed=seed, pictures=pictures, organs=self.organs, tasks={"report": 1.0}, vary=False)

    def recipe(self) -> Recipe:
        """The warm-up of the vision tower."""
        look = Stage(
            name="look",
            learn="findings",
            train=("vision", "projector"),
            steps=self.look_steps,
            batch_size=32,
            micro_batch_size=32,
            learning_rate=1e-3,
            warmup_share=0.05,
        )
        sizes = {"expert_size": self.expert_size, "shared_expert_size": self.shared_size}
        # No checkpoint on the way: a warm-up takes minutes.
        return Recipe.model_validate(
            {
                "data": DataSection(phantoms=self.phantoms()),
                "upcycling": sizes,
                "stages": (look,),
                "save_every": self.look_steps + 1,
            }
        )


def open_phantoms(
    folder: Path, scale: Scale, *, held_out: bool = False, progress: Callable[[int], None] = lambda _: None
) -> PhantomPool:
    """The training or test pictures; generated if they do not exist yet."""
    section = scale.phantoms(held_out=held_out)
    return PhantomPool.open(folder / (HELD_OUT_NAME if held_out else PICTURES_NAME), section, progress=progress)


def prepare_start(folder: Path, scale: Scale) -> Path:
    """The folder with configuration, tokenizer and processor of all cells; made where it is not there yet."""
    start = folder / START_NAME
    if not start.is_dir():
        write_small_start(start, scale.recipe())
    return start


def warm_tower(folder: Path, scale: Scale, *, quiet: bool) -> Path:
    """The checkpoint with the vision tower of all cells; trained if it does not exist yet.

    Raises:
        TrainingInterrupted: Ctrl-C.
    """
    made = folder / TOWER_NAME
    if not made.is_dir():
        stage = folder / "look"
        stage.mkdir(exist_ok=True)
        job = StageJob(
            folder=stage.absolute(),
            model=made.absolute(),
            number=0,
            recipe=scale.recipe(),
            start=Start(kind="fresh", folder=(folder / START_NAME).absolute()),
            files=DataFiles(),
            device="cpu",
            threads=1,
            quiet=quiet,
            phantoms=(folder / PICTURES_NAME).absolute(),
        )
        train_stage(job)
    return made


@dataclass(frozen=True, slots=True, eq=False)
class ReportExample(EncodedExample):
    """An example with its organ.

    Attributes:
        organ: its place among the organs of the comparison.
    """

    organ: int = 0


def collate_reports(examples: Sequence[ReportExample]) -> dict[str, Any]:
    """A batch, with the organ of each example as `finding_organs`."""
    organs = torch.tensor([example.organ for example in examples])
    return {**collate(examples), "finding_organs": organs}


class Reports:
    """Pictures of phantoms with their reports; an `EncodedSource`. The tower has looked at each picture beforehand.

    The wording differs in every epoch.

    Attributes:
        embeddings: of each picture, visual tokens × hidden.
        end: the token that ends a report.
    """

    def __init__(self, pool: PhantomPool, start: Path, tower: Path, seen: Path, *, emphasis: float = 1.0) -> None:
        """Takes the pictures, and the checkpoints with the processor and with the vision tower.

        What the tower makes of the pictures is kept in the file `seen`.
        """
        self._pool = pool
        self._processor = EchoVLMProcessor.from_pretrained(start)
        self._encoder = ExampleEncoder(
            self._processor,
            EchoVLMConfig.from_pretrained(start),
            max_tokens=2048,
            max_visual_tokens=196,
            emphasis_weight=emphasis,
        )
        self._encoded: dict[tuple[int, int], ReportExample] = {}
        self.end = self._processor.tokenizer.get_vocab()[TURN_END]
        if not seen.is_file():
            partial = seen.with_suffix(f".{os.getpid()}")
            save_file({_SEEN: look_at(pool, self._processor, tower)}, partial)
            partial.replace(seen)
        self.embeddings = load_file(seen)[_SEEN]

    def __len__(self) -> int:
        """How many examples an epoch has."""
        return len(self.embeddings)

    def encoded(self, index: int, epoch: int) -> ReportExample:
        """See `EncodedSource.encoded`; kept, since every variant and seed asks for the same."""
        if (index, epoch) not in self._encoded:
            self._encoded[index, epoch] = self._encode(index, epoch)
        return self._encoded[index, epoch]

    def _encode(self, index: int, epoch: int) -> ReportExample:
        attributes = self.attributes(index)
        wording = int(draws(self._pool.section.seed, index, f"wording {epoch}").integers(2**31))
        system, human, answer = self._conversation(attributes, wording)
        example = Example(
            [
                {"role": "system", "content": [{"type": "text", "text": system}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": human}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            [Image.fromarray(self._pool.pictures_NHW[index])],
            emphasis=emphasised(attributes, LANGUAGE, answer),
        )
        encoded = self._encoder.encode(example)
        return ReportExample(
            encoded.input_ids_T,
            encoded.target_T,
            encoded.weight_T,
            encoded.position_3T,
            embeddings_VD=self.embeddings[index],
            organ=self.organ(index),
        )

    def place(self, index: int) -> str:
        return f"phantom {index}"

    def attributes(self, index: int) -> Attributes:
        """What a picture shows."""
        return attributes_at(self._pool.section.seed, index, self._pool.classes)

    def organ(self, index: int) -> int:
        """The place of a picture's organ among those of the comparison."""
        organ = self.attributes(index).organ
        assert organ is not None
        return self._pool.section.organs.index(organ)

    def prompt(self) -> torch.Tensor:
        """The tokens before the report, the same for every picture."""
        encoded = self.encoded(0, 0)
        first = int((encoded.weight_T > 0).nonzero()[0])
        return encoded.input_ids_T[: first + 1]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens to text."""
        return self._processor.decode(token_ids)

    def directions(self) -> torch.Tensor:
        """Of each picture the direction of its pooled embeddings: pictures × hidden."""
        return torch.stack([pooled_direction(embeddings_VD) for embeddings_VD in self.embeddings])

    def _conversation(self, attributes: Attributes, wording: int) -> tuple[str, str, str]:
        record = next(records(attributes, self._pool.section.seed, wording, path="-", languages=(LANGUAGE,)))
        system, human, answer = (turn["value"] for turn in record["conversations"])
        return system, human.removeprefix("<image>"), answer


@torch.no_grad()
def look_at(pool: PhantomPool, processor: EchoVLMProcessor, tower: Path) -> torch.Tensor:
    """What the vision tower makes of all pictures: pictures × visual tokens × hidden, float32."""
    visual = load_vision_tower(tower, dtype=torch.float32)
    found = []
    for begin in range(0, len(pool.pictures_NHW), _TOGETHER):
        shown = [
            processor.image_patches(Image.fromarray(each)) for each in pool.pictures_NHW[begin : begin + _TOGETHER]
        ]
        patches = torch.cat([torch.from_numpy(item.patches) for item in shown])
        embeddings = visual(patches, grid_thw=torch.tensor([item.grid for item in shown])).pooler_output
        found.append(embeddings.unflatten(0, (len(shown), -1)))
    return torch.cat(found)


def items_of(pool: PhantomPool) -> list[Item]:
    """The reports on all pictures, as an evaluation takes them."""
    section = pool.section
    found = []
    for index in section.picture_indices:
        attributes = attributes_at(section.seed, index, pool.classes)
        raw = next(records(attributes, section.seed, index, path=f"{index}.png", languages=(LANGUAGE,)))
        record, problems = parse_record(raw)
        assert record is not None, problems
        found.append(item_of(record, index))
    return found


def gated_organs(train: Reports, held_out: Reports) -> list[int]:
    """For each held-out picture the organ that the organ gate chooses, as the served system's does.

    Prototypes are the mean directions of the organs' pictures that were learnt from.
    """
    organs = torch.tensor([train.organ(index) for index in range(len(train))])
    directions = train.directions()
    prototypes = torch.stack([directions[organs == organ].mean(dim=0) for organ in range(int(organs.max()) + 1)])
    cosines = held_out.directions() @ torch.nn.functional.normalize(prototypes, dim=-1).T
    chosen: list[int] = cosines.argmax(dim=1).tolist()
    return chosen
