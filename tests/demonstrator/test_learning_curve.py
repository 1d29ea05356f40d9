"""Checkpoints of a run in the order of training, and their curve."""

import json
import xml.etree.ElementTree as ElementTree

from demonstrator.learning_curve import checkpoints, draw


def _stage(folder, *, steps, num_updates, epoch, num_samples):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    record = {"num_updates": num_updates, "num_train_samples": num_samples}
    (folder / "training_record.json").write_text(json.dumps(record))
    (folder / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": num_updates}))
    return folder


def test_samples_are_counted_over_all_stages(tmp_path):
    first = _stage(tmp_path / "stage1", steps=[10, 2], num_updates=10, epoch=2.0, num_samples=40)
    second = _stage(tmp_path / "stage2", steps=[5], num_updates=8, epoch=1.0, num_samples=32)
    assert checkpoints([first, second], before=100) == [
        (116, first / "checkpoint-2"),
        (180, first),
        (200, second / "checkpoint-5"),
        (212, second),
    ]


def test_the_curve_is_a_picture():
    points = [{"samples": count, "color": 0.5, "shape": 0.25, "direction": count / 400} for count in (100, 200)]
    root = ElementTree.fromstring(draw({"pictures first": points, "clips only": points[:1]}))
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 6
    assert "200 samples" in "".join(root.itertext())
