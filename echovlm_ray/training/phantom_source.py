"""Phantoms as training examples: another question, wording and display of the same picture in every epoch."""

import numpy as np
from PIL import Image

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.draws import draws
from echovlm_ray.data.phantom.flips import flip_attributes
from echovlm_ray.data.phantom.phantom import attributes_at
from echovlm_ray.data.phantom.records import records
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.scores import category
from echovlm_ray.data.phantom.settings import Settings
from echovlm_ray.model.picture_patches import Picture
from echovlm_ray.prompts import Medium
from echovlm_ray.tasks import LANGUAGES, Language
from echovlm_ray.training.emphasis import emphasised
from echovlm_ray.training.examples import Example
from echovlm_ray.training.phantom_pool import LOOP_FRAMES, Bytes, PhantomPool

# How answers to questions begin.
_YES_OR_NO: dict[Language, tuple[str, ...]] = {"en": ("Yes,", "No,"), "zh": ("是，", "否，")}


class PhantomSource:
    """Examples about the pictures of a pool, an `ExampleSource`.

    An example is a function of the section's seed, its index and the epoch.
    """

    def __init__(self, pool: PhantomPool) -> None:
        self._pool = pool
        section = pool.section
        self._tasks = tuple(section.tasks)
        weights = np.array([section.tasks[task] for task in self._tasks])
        self._shares = weights / weights.sum()

    def __len__(self) -> int:
        """How many examples an epoch has."""
        section = self._pool.section
        return (section.pictures + section.loops) * section.examples_each

    def place(self, index: int) -> str:
        return f"phantom {self._pool.section.first + index // self._pool.section.examples_each}"

    def example(self, index: int, epoch: int) -> Example:
        section = self._pool.section
        number, repeat = divmod(index, section.examples_each)
        phantom_index = section.first + number
        rng = draws(section.seed, phantom_index, f"example {epoch} {repeat}")
        attributes = attributes_at(section.seed, phantom_index, self._pool.classes)
        task = self._tasks[rng.choice(len(self._tasks), p=self._shares)]
        language = tuple(LANGUAGES)[rng.integers(len(LANGUAGES))]
        picture, tissue, attributes = self._shown(number, attributes, rng)
        medium: Medium = "video" if isinstance(picture, list) else "image"
        # Questions, options and wording are drawn by it, so that they differ between epochs.
        wording = int(rng.integers(2**31))
        record = next(
            records(
                attributes,
                section.seed,
                wording,
                path="-",
                medium=medium,
                tasks=[task],
                languages=[language],
                questions_each=1,
            )
        )
        system, human, answer = (turn["value"] for turn in record["conversations"])
        return Example(
            [
                {"role": "system", "content": [{"type": "text", "text": system}]},
                {
                    "role": "user",
                    "content": [{"type": medium}, {"type": "text", "text": human.removeprefix(f"<{medium}>")}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            [picture],
            emphasis=_decided(attributes, language, answer),
            attributes=attributes,
            tissue=tissue,
        )

    def _shown(
        self, number: int, attributes: Attributes, rng: np.random.Generator
    ) -> tuple[Picture | list[Picture], Bytes | None, Attributes]:
        pool = self._pool
        settings = _settings(rng) if pool.section.vary else Settings()
        if number >= pool.section.pictures:
            # Another frame rate and length each time; a loop is read in pairs of frames.
            step = int(rng.integers(1, 3))
            count = 2 * int(rng.integers(1, LOOP_FRAMES // step // 2 + 1))
            first = int(rng.integers(LOOP_FRAMES - step * (count - 1)))
            frames = pool.loops_LFHW[number - pool.section.pictures]
            chosen = frames[first : first + step * count : step]
            return [Image.fromarray(settings.apply(frame)) for frame in chosen], None, attributes
        image, tissue = pool.pictures_NHW[number], pool.tissue_NRC[number]
        assert attributes.organ is not None
        if pool.section.vary and REGIONS[attributes.organ].mirrors and rng.random() < 0.5:
            image, tissue = image[:, ::-1], tissue[:, ::-1]
            attributes = flip_attributes(attributes)
        return Image.fromarray(settings.apply(image)), tissue, attributes


def _settings(rng: np.random.Generator) -> Settings:
    """A display other than the usual: half of all pictures are blurred, a third were compressed."""
    return Settings(
        gain=float(rng.uniform(0.85, 1.2)),
        blur=float(rng.uniform(0.0, 0.8)) if rng.random() < 0.5 else 0.0,
        jpeg_quality=int(rng.integers(70, 96)) if rng.random() < 1 / 3 else None,
    )


def _decided(attributes: Attributes, language: Language, answer: str) -> tuple[str, ...]:
    """What the picture decides: values and diagnosis, and the category, yes and no that follow from them."""
    found = category(attributes)
    following = [*_YES_OR_NO[language], *([] if found is None else [found.text(language)])]
    return (*emphasised(attributes, language, answer), *(word for word in following if word in answer))
