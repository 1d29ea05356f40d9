"""The processor in a dataloader: picklable, the same tensors from any worker, threads that do not multiply."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN
from tests.media import numbered_picture, write_clip
from videollama3 import VideoLlama3Processor, VideoLlama3VideoProcessor
from videollama3.processing import video_reading
from videollama3.processing.video_file import ReadingLimits, open_video

# Python 3.12 warns of every fork in a process that has threads; torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    options = {"preset": "ultrafast", "g": "10"}
    return [
        write_clip(
            folder / f"{i}.mp4",
            50 + 15 * i,
            25,
            pictures=[numbered_picture(9 * i + k) for k in range(95)],
            options=options,
        )
        for i in range(3)
    ]


class Conversations(torch.utils.data.Dataset):
    """One conversation for each clip, and what its worker would use of the machine."""

    def __init__(self, processor, clips, **options):
        self.processor, self.clips, self.options = processor, clips, options

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        path = self.clips[index]
        conversation = [
            {"role": "user", "content": [{"type": "video", "video": path, "fps": 2}, {"type": "text", "text": "?"}]}
        ]
        features = self.processor(conversation=conversation, return_tensors="pt", **self.options)
        worker = torch.utils.data.get_worker_info()
        with open_video(path, name=path, limits=ReadingLimits()) as (_, stream):
            codec_threads = stream.codec_context.thread_count
        return {
            "features": dict(features),
            "worker": None if worker is None else worker.id,
            "num_decoders": video_reading._num_decoders(path),
            "codec_threads": codec_threads,
        }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def test_pickles(processor, clips):
    again = pickle.loads(pickle.dumps(processor))
    assert isinstance(again, VideoLlama3Processor)
    assert_same(Conversations(processor, clips)[1]["features"], Conversations(again, clips)[1]["features"])
    videos = pickle.loads(pickle.dumps(VideoLlama3VideoProcessor(fps=3, max_frames=7, max_read_seconds=9)))
    assert (videos.fps, videos.max_frames, videos.max_read_seconds) == (3, 7, 9)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_what_the_main_process_gives(processor, clips, start, monkeypatch):
    dataset = Conversations(processor, clips)
    expected = [dataset[i] for i in range(len(clips))]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=multiprocessing.get_context(start)
    )
    got = list(loader)
    assert [item["worker"] for item in got] == [0, 1, 0]
    assert [item["worker"] for item in expected] == [None] * 3
    # Two workers on two processors: each decodes one group of pictures at a time, on one thread.
    assert {(item["num_decoders"], item["codec_threads"]) for item in got} == {(1, 1)}
    for item, other in zip(got, expected, strict=True):
        assert_same(item["features"], other["features"])


def test_every_reading_gives_the_same(processor, clips):
    first = Conversations(processor, clips)[2]["features"]
    for _ in range(3):
        assert_same(Conversations(processor, clips)[2]["features"], first)


def test_processors_of_the_machine_are_used_outside_a_worker(clips, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)), raising=False)
    assert video_reading._num_decoders(clips[0]) == 5
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert video_reading._num_decoders(clips[0]) == 8
    with open(clips[0], "rb") as stream:
        assert video_reading._num_decoders(stream) == 1


def test_raw_pixels_are_a_quarter_of_the_bytes_through_pickling(processor, clips):
    whole = Conversations(processor, clips)[0]["features"]["pixel_values_videos"]
    raw = Conversations(processor, clips, pixel_dtype="uint8")[0]["features"]["pixel_values_videos"]
    assert (raw.dtype, raw.shape) == (torch.uint8, whole.shape)
    assert raw.nbytes * 4 == whole.nbytes
    sizes = [len(pickle.dumps(tensor)) for tensor in (raw, whole)]
    assert sizes[0] == pytest.approx(sizes[1] / 4, abs=1000)
    # And nothing is lost: the same values after normalising.
    expected = (raw.numpy().astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(whole.numpy(), expected)


def test_a_processor_loaded_in_a_worker(clips):
    processor = VideoLlama3Processor.from_pretrained(GOLDEN / "ckpt")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (item,) = pool.map(Conversations(processor, clips).__getitem__, [0])
    assert_same(item["features"], Conversations(processor, clips)[0]["features"])
