"""Short generated scenes for the streaming tests: a textured background on which a few pixels change."""

import numpy as np


def scene(num_frames, height=96, width=128, seed=0, still=()):
    """uint8 (height, width, 3) pictures; frames whose number is in `still` repeat the one before."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = []
    for number in range(num_frames):
        picture = base.copy()
        top = (number * 7) % (height - 14)
        picture[top : top + 14, 4 : 4 + 20] = (number * 9) % 256
        frames.append(frames[-1] if number in still and frames else picture)
    return frames
