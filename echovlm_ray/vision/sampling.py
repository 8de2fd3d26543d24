"""Samples the frames of a cine loop for the model."""


def sample_frames(num_frames: int, max_frames: int) -> tuple[int, ...]:
    """Frame indices, ascending and evenly spread, the first and the last frame among them.

    The vision encoder looks at two frames at a time (`temporal_patch_size` 2), so their number is even: of an odd
    number of frames the last one is shown twice, and an odd `max_frames` is lowered by one. A single frame is a still
    image and stays alone.

    Args:
        num_frames: in the loop, at least 1.
        max_frames: at least 2.
    """
    if num_frames == 1:
        return (0,)
    if num_frames <= max_frames - max_frames % 2:
        return (*range(num_frames), *([num_frames - 1] * (num_frames % 2)))
    count = max_frames - max_frames % 2
    return tuple(round(index * (num_frames - 1) / (count - 1)) for index in range(count))
