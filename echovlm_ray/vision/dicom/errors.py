"""The errors of DICOM files that cannot be decoded."""


class InvalidDicomError(ValueError):
    """A DICOM file that cannot be shown. The text begins with a verb, its subject being the file."""


class FrameError(ValueError):
    """One frame that cannot be decoded; the others of its object may be sound. The text is as `InvalidDicomError`'s."""

    def __init__(
        self, text: str = "has frames that are damaged or cut off and cannot be decoded; export it again"
    ) -> None:
        super().__init__(text)
