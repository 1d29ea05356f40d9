import pytest

from videollama3.streaming.forgetting import frames_to_keep


def test_the_oldest_go_first():
    assert frames_to_keep({3: 10, 4: 10, 5: 10, 6: 10}, excess=15, policy="oldest") == [5, 6]


def test_thinning_takes_every_second_of_the_older_half_again_and_again():
    held = dict.fromkeys(range(16), 1)
    assert frames_to_keep(held, excess=4, policy="thin") == [0, 2, 4, 6, *range(8, 16)]
    # The older half of the twelve that are left is 0 2 4 6 8 9.
    assert frames_to_keep(held, excess=7, policy="thin") == [0, 4, 8, *range(10, 16)]


def test_never_keeps_all():
    assert frames_to_keep({0: 5, 1: 5}, excess=100, policy="never") == [0, 1]


@pytest.mark.parametrize("policy", ["oldest", "thin"])
def test_the_last_frame_stays(policy):
    assert frames_to_keep({0: 5, 1: 5, 2: 5}, excess=100, policy=policy) == [2]
