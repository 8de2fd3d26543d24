"""Which words of an answer the picture decides; their tokens count more in the loss."""

import re

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.wording.render import stated_words
from echovlm_ray.tasks import Language


def emphasised(attributes: Attributes, language: Language, answers: str) -> tuple[str, ...]:
    """The words for attributes and diagnosis as the answers spell them, capital letters included."""
    found = (
        match.group()
        for word in stated_words(attributes, language)
        for match in re.finditer(re.escape(word), answers, re.IGNORECASE)
    )
    return tuple(dict.fromkeys(found))
