"""Encodes a small mp4: a red circle crosses the picture and stops.

python examples/make_clip.py clip.mp4
"""

import sys
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SECONDS, RATE, WIDTH, HEIGHT = 8, 25, 320, 240


def picture(seconds: float) -> Image.Image:
    """The picture shown at a time."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (25, 28, 35))
    draw = ImageDraw.Draw(image)
    x = 45 + (WIDTH - 90) * min(seconds, 5.0) / 5.0
    draw.ellipse((x - 40, 80, x + 40, 160), fill=(220, 40, 40))
    return image


def main(path: Path) -> None:
    """Writes the clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture(i / RATE)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    print(f"wrote {path}: {SECONDS} s, {WIDTH} x {HEIGHT}, {RATE} frames per second")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
