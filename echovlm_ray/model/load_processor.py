"""Loads what a request's text and pictures need of a checkpoint, with as little memory as its files allow."""

import logging
from pathlib import Path

from echovlm_ray.checkpoint.layout import BACKBONE_NAME
from echovlm_ray.model.picture_settings import SETTINGS_NAME, PictureSettings
from echovlm_ray.model.request_processor import RequestProcessor
from echovlm_ray.model.text_tokens import read_tokenizer, special_tokens

logger = logging.getLogger(__name__)


def load_request_processor(directory: Path) -> RequestProcessor:
    """Reads a checkpoint folder, released or a split one's; runs no code from it.

    Files like those of Qwen2-VL are read directly. With others transformers is loaded, which gives the same results and
    takes 250 MB more.

    Raises:
        ValueError: the folder lacks the files, or they belong to different checkpoints.
    """
    folder = directory
    if (directory / BACKBONE_NAME).is_dir() and not (directory / SETTINGS_NAME).exists():
        folder = directory / BACKBONE_NAME
    settings, tokenizer = PictureSettings.read(folder), read_tokenizer(folder)
    if settings is not None and tokenizer is not None:
        processor = RequestProcessor(settings, tokenizer, special_tokens(tokenizer))
        processor.check_config(folder / "config.json")
        return processor
    from echovlm_ray.model.processing import EchoVLMProcessor

    logger.info("the text files of %s are not quite those of Qwen2-VL, so transformers reads them", folder)
    return EchoVLMProcessor.from_pretrained(directory)
