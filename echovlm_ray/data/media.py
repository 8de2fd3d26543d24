"""Image files of records: located only within one folder, read and decoded within limits.

`echoray data check` and training decode with the same function, so both refuse the same files.
"""

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file
from echovlm_ray.vision.scaling import Scaling

MAX_PATH_CHARACTERS = 1024


class UnusableImageError(ValueError):
    """A path in a record does not exist, is outside the image root, or is not an image file."""

    def __init__(self, kind: str, text: str) -> None:
        """An error with a short name of its kind and a sentence with the fix."""
        super().__init__(text)
        self.kind = kind


class ImageRoot:
    """The folder that a dataset's paths are relative to; files outside it are never read."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """An existing folder as image root.

        Raises:
            ValueError: there is no such folder.
        """
        self.directory = Path(directory).resolve()
        if not self.directory.is_dir():
            raise ValueError(f"there is no folder {directory}: name the folder that the paths of the images start from")

    def locate(self, path: str) -> Path:
        """Resolves a record's path, following links.

        Raises:
            UnusableImageError: the path is absolute, leaves the root with `..` or a link, is a URL, or is not a regular
                file.
        """
        if path.lower().startswith(("http:", "https:", "file:", "ftp:", "s3:", "data:")):
            raise UnusableImageError("not a path", "is a URL; only files below the image root are read")
        pure = PurePosixPath(path)
        foreign = PureWindowsPath(path)
        if not path or len(path) > MAX_PATH_CHARACTERS or not path.isprintable():
            raise UnusableImageError("not a path", f"is empty, not printable, or over {MAX_PATH_CHARACTERS} characters")
        if pure.is_absolute() or foreign.drive or foreign.root or ".." in {*pure.parts, *foreign.parts}:
            raise UnusableImageError(
                "outside the root", "leads out of the image root: write it relative to that folder"
            )
        try:
            found = (self.directory / pure).resolve(strict=True)
        except FileNotFoundError:
            raise UnusableImageError("missing image", "does not exist below the image root") from None
        except (OSError, RuntimeError):
            raise UnusableImageError("unreadable image", "cannot be followed to a file") from None
        if not found.is_relative_to(self.directory):
            raise UnusableImageError("outside the root", "is a link that leads out of the image root")
        return found

    def read(self, path: str, max_bytes: int) -> bytes:
        """The content of a record's image file.

        Raises:
            UnusableImageError: see `locate`; or the file has more than `max_bytes`, or cannot be read.
        """
        found = self.locate(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would block until there is a writer.
            descriptor = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise UnusableImageError("unreadable image", "is not a regular file")
                if status.st_size > max_bytes:
                    text = f"has {status.st_size} bytes and the limit is {max_bytes}: compress or scale it"
                    raise UnusableImageError("unreadable image", text)
                return file.read(max_bytes + 1)
        except OSError as error:
            raise UnusableImageError("unreadable image", f"cannot be read: {error.strerror}") from None


def decode_media_file(content: bytes, limits: ImageLimits) -> DecodedImage:
    """Decodes a record's image or video for training.

    A service answers from the remaining frames of a truncated file; training needs the whole file.

    Raises:
        UnusableImageError: it cannot be decoded, exceeds a limit, or is truncated or damaged.
    """
    try:
        decoded = decode_image_file(content, limits=limits, field="")
    except InvalidRequestError as error:
        raise UnusableImageError("unreadable image", error.description) from None
    if decoded.is_partial:
        text = "is cut off or damaged: frames, or parts of them, are missing; export it again"
        raise UnusableImageError("truncated image", text)
    return decoded


def check_shape(decoded: DecodedImage, scaling: Scaling) -> None:
    """Checks that a picture of this shape can be scaled for the model, with the arithmetic of the patch preprocessing.

    Raises:
        UnusableImageError: it is too long and narrow.
    """
    height, width, _ = decoded.frames[0].shape
    try:
        scaling.size(height, width)
    except ValueError as error:
        raise UnusableImageError("too long and narrow", f"is {error}") from None
