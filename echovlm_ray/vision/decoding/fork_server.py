"""Starts decoder processes by forking itself: `python -m echovlm_ray.vision.decoding.fork_server FD SETTINGS`.

Importing the decoders takes a third of a second; a process that is forked has them after a few milliseconds, and shares
their memory with the others. All processes end with this one, and it ends with the gateway.
"""

import io
import socket
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, UltrasoundImageStorage

from echovlm_ray.vision.decoding import worker
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import ImageLimits, decode_image_file
from experts.checks.fork_server import serve
from router.gating import anatomy

# Jobs, inbox, outbox and reports.
NUM_DESCRIPTORS = 4
# Of the samples.
_SIDE = 64
_LIMITS = ImageLimits(max_image_bytes=10**6, max_image_pixels=_SIDE**2, max_frames=2)


def main() -> int:
    """Serves until the other end closes; see the module."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    settings = DecoderSettings.from_json(sys.argv[2])
    _decode_samples()

    def run(descriptors: Sequence[int]) -> int:
        return worker.run(settings, descriptors)

    serve(connection, NUM_DESCRIPTORS, run, end_together=True)
    return 0


def _decode_samples() -> None:
    """Decodes a file of each usual kind, so that all that is imported on demand is there before the first fork."""
    grey = np.arange(_SIDE * _SIDE, dtype=np.uint16).reshape(_SIDE, _SIDE)
    image = Image.fromarray((grey >> 4).astype(np.uint8))
    files = []
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files.append(buffer.getvalue())
    files += [_dicom(image.tobytes(), ExplicitVRLittleEndian), _dicom(encapsulate([files[1]]), JPEGBaseline8Bit)]
    for kind in ("JPEG2000", "WebP", "TIFF", "BMP"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files.append(buffer.getvalue())
    for file in files:
        decode_image_file(file, limits=_LIMITS, field="sample")
    # Reads the table.
    anatomy.is_known("")


def _dicom(pixel_data: bytes, transfer_syntax: UID) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    dataset.Rows = dataset.Columns = _SIDE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = pixel_data
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
