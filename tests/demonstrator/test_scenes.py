"""Scenes, their pictures and their files."""

import io

import av
import numpy as np
import pytest
from demonstrator.scene_facts import seen_direction
from demonstrator.scenes import (
    COLORS,
    KINDS,
    MAX_SIDE,
    MIN_SIDE,
    Encoding,
    Look,
    Motion,
    Scene,
    Shape,
    random_clip,
    random_encoding,
    random_picture,
    write_clip,
    write_picture,
)

BLACK = Look(background=(0, 0, 0), smooth=False)


def scene_of(*shapes, width=120, height=84, rate=10, num_frames=40, look=BLACK):
    return Scene(width, height, rate, num_frames, tuple(shapes), look)


def shape_of(kind="square", motion=None, **fields):
    return Shape(kind=kind, color="red", rgb=(255, 0, 0), size=20, motion=motion or Motion(60, 42), **fields)


@pytest.mark.parametrize(
    ("direction", "expected"), [("left", (30, 42)), ("right", (90, 42)), ("up", (60, 12)), ("down", (60, 72))]
)
def test_a_motion_ends_where_it_should(direction, expected):
    motion = Motion(60, 42, direction, distance=30, begin_seconds=1, end_seconds=3)
    assert motion.at(0.5) == (60, 42)
    assert motion.at(3) == motion.at(9) == expected


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_drawn_where_it_is(kind, smooth):
    scene = scene_of(shape_of(kind, Motion(40, 30)), look=Look((0, 0, 0), smooth=smooth))
    (picture,) = scene.pictures([0])
    rows, columns = np.nonzero(picture[..., 0] > 128)
    assert abs(rows.mean() - 30) < 4, "a triangle's mass lies below its centre"
    assert abs(columns.mean() - 40) < 1
    assert abs(np.ptp(columns) + 1 - 20) <= 2
    assert not picture[..., 1:].any()


def test_shapes_differ():
    pictures = [next(scene_of(shape_of(kind)).pictures([0]))[..., 0] > 0 for kind in KINDS]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (one != other).sum() > 60, "of a square's 400 pixels"


def test_shapes_appear_and_vanish():
    scene = scene_of(shape_of(first_frame=7, last_frame=12))
    shown = [bool(picture.any()) for picture in scene.pictures()]
    assert shown == [7 <= frame <= 12 for frame in range(40)]


def test_sampled_frames_follow_the_training_rule():
    assert scene_of(rate=10, num_frames=35).sampled_frames() == [9, 19, 29]
    assert scene_of(rate=12, num_frames=60).sampled_frames() == [11, 23, 35, 47, 59]
    assert scene_of(rate=25).label(49) == 1.0
    assert scene_of(rate=25).label(50) == 2.0


def test_sampled_frames_are_those_of_the_processor(tmp_path):
    from videollama3.processing.video_processing_videollama3 import VideoLlama3VideoProcessor

    for number in range(4):
        scene = random_clip(np.random.default_rng([3, number]))
        path = tmp_path / f"{number}.mp4"
        write_clip(scene, path, random_encoding(np.random.default_rng(number)))
        metadata = VideoLlama3VideoProcessor(fps=1)(str(path), return_metadata=True)["video_metadata"][0]
        assert metadata.frames_indices == scene.sampled_frames()
        assert [scene.label(frame) for frame in scene.sampled_frames()] == metadata.timestamps


def test_noise_that_stands_and_noise_that_moves():
    still, moving = (
        list(scene_of(look=Look((40, 40, 40), noise=3.0, noise_moves=moves)).pictures([0, 1]))
        for moves in (False, True)
    )
    assert (still[0] == still[1]).all()
    assert (moving[0] != moving[1]).any()
    assert 2.5 < still[0].std() < 3.5


def test_random_scenes_stay_in_range_and_are_reproducible():
    seen_colors, seen_kinds, seen_directions = set(), set(), set()
    for number in range(150):
        scene = random_clip(np.random.default_rng([1, number]))
        assert MIN_SIDE <= scene.width <= MAX_SIDE
        assert MIN_SIDE <= scene.height <= MAX_SIDE
        assert 3 <= scene.seconds <= 10 + 1 / scene.rate
        assert scene == random_clip(np.random.default_rng([1, number]))
        for shape in scene.shapes:
            seen_colors.add(shape.color)
            seen_kinds.add(shape.kind)
            seen_directions.add(seen_direction(scene, shape))
    assert seen_colors == set(COLORS)
    assert seen_kinds == set(KINDS)
    assert seen_directions >= {"left", "right", "up", "down", "none"}


def test_shapes_do_not_overlap():
    for number in range(30):
        scene = random_clip(np.random.default_rng([2, number]), "several")
        for frame in scene.sampled_frames():
            centers = [shape.motion.at(frame / scene.rate) for shape in scene.shapes]
            for i, one in enumerate(centers):
                for k, other in enumerate(centers[:i]):
                    reach = (scene.shapes[i].size + scene.shapes[k].size) / 2
                    assert max(abs(one[0] - other[0]), abs(one[1] - other[1])) > reach


@pytest.mark.parametrize("encoding", [Encoding(), Encoding("mpeg4", "yuv420p", (("qscale", "3"),))])
def test_a_clip_is_encoded_frame_by_frame(encoding):
    scene = scene_of(shape_of(motion=Motion(20, 42, "right", 70, 0, 4)), look=Look((20, 20, 20)))
    file = io.BytesIO()
    write_clip(scene, file, encoding)
    with av.open(io.BytesIO(file.getvalue())) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 40
    for frame, picture in zip(decoded, scene.pictures(), strict=True):
        # Measured worst 6.1 on red edges (half the colour resolution); another frame's picture differs by more.
        assert np.abs(frame.astype(int) - picture).mean() < 10


def test_a_picture_is_written_without_loss():
    scene = random_picture(np.random.default_rng(5))
    file = io.BytesIO()
    write_picture(scene, file)
    from PIL import Image

    assert (np.asarray(Image.open(file)) == next(scene.pictures())).all()
