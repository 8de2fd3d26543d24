"""Display and storage settings of a picture, for robustness tests."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage


class Settings(BaseModel):
    """Changes to a finished picture; none by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Factor of every grey value: 1.12 is 12 % more gain.
    gain: float = Field(default=1.0, gt=0.0, le=4.0)
    # Standard deviation of a Gaussian blur in pixels; 0 for none.
    blur: float = Field(default=0.0, ge=0.0, le=10.0)
    # Encodes the picture as a JPEG of this quality and decodes it again; None: not.
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)

    def apply(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The picture (height × width, uint8) with these settings; gain first, then blur, then JPEG."""
        values: npt.NDArray[np.float32] = image.astype(np.float32) * np.float32(self.gain)
        if self.blur:
            values = ndimage.gaussian_filter(values, self.blur)
        changed: npt.NDArray[np.uint8] = np.rint(values.clip(0, 255)).astype(np.uint8)
        if self.jpeg_quality is None:
            return changed
        buffer = io.BytesIO()
        Image.fromarray(changed).save(buffer, "JPEG", quality=self.jpeg_quality)
        return np.array(Image.open(buffer), dtype=np.uint8)
