"""The order of batches: one bucket each, exact shares, the same for any number of processes and after a resume."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from postgen.errors import UserError
from postgen.sft.batches import Batches
from postgen.sft.buckets import Bucket

VIDEO, WIDE, IMAGE = Bucket(32, 32, 9), Bucket(32, 64, 9), Bucket(32, 32, 1)
CLIPS = [VIDEO] * 5 + [WIDE] * 3 + [IMAGE] * 4


def counts(batches: Batches, number: int) -> Counter[int]:
    return Counter(clip for step in range(number) for clip in batches.at(step))


def test_buckets_never_mix_and_every_clip_is_seen_equally_often() -> None:
    batches = Batches(CLIPS, batch_size=4, seed=1)
    for step in range(60):
        assert len({CLIPS[clip] for clip in batches.at(step)}) == 1
    # A cycle of 12 batches of 4 has each of the 12 clips exactly 4 times, whatever the sizes of the buckets.
    for cycles in (1, 2, 5):
        assert counts(batches, 12 * cycles) == dict.fromkeys(range(12), 4 * cycles)
    assert batches.steps_per_epoch == 3


def test_passes_of_a_bucket_are_permutations() -> None:
    batches = Batches([VIDEO] * 6, batch_size=2, seed=0)
    passes = [[clip for step in range(3 * n, 3 * n + 3) for clip in batches.at(step)] for n in range(8)]
    assert all(sorted(each) == [*range(6)] for each in passes)
    assert len({tuple(each) for each in passes}) > 4, "each pass has its own order"
    assert passes[0] != [clip for step in range(3) for clip in Batches([VIDEO] * 6, batch_size=2, seed=5).at(step)]


def test_buckets_are_spread_evenly() -> None:
    """In any stretch of the run the number of batches of a bucket is near its share."""
    batches = Batches([VIDEO] * 90 + [WIDE] * 10, batch_size=1, seed=3)
    for start in range(0, 400, 20):
        wide = sum(batches.at(step)[0] >= 90 for step in range(start, start + 20))
        assert 0 <= wide <= 4
    assert sum(batches.at(step)[0] >= 90 for step in range(100)) == 10


def test_the_order_depends_on_position_only() -> None:
    """Any step can be asked first, and processes with the same product share the same batches."""
    one = Batches(CLIPS, batch_size=2, seed=7, accumulation=4)
    two = Batches(CLIPS, batch_size=2, seed=7, processes=2, accumulation=2)
    four = Batches(CLIPS, batch_size=2, seed=7, processes=4)
    for step in (50, 3, 999, 0, 51):
        expected = [one.at(step, micro) for micro in range(4)]
        assert [two.at(step, micro, rank) for micro in range(2) for rank in range(2)] == expected
        assert [four.at(step, 0, rank) for rank in range(4)] == expected
    again = Batches(CLIPS, batch_size=2, seed=7, accumulation=4)
    assert [again.at(step, 1) for step in range(40, 60)] == [one.at(step, 1) for step in range(40, 60)]


def test_weights_are_exact_in_the_mean() -> None:
    weights = torch.tensor([1, 2, 0.5, 0, 4, 1, 1, 1, 0.25, 0.25, 3, 0])
    batches = Batches(CLIPS, batch_size=2, seed=0, weights=weights)
    assert batches.clips == 10
    steps = 600
    found = counts(batches, steps)
    for clip, weight in enumerate((weights / weights.sum()).tolist()):
        assert found[clip] == pytest.approx(2 * steps * weight, abs=4)


def test_whole_weights_are_exact_in_each_pass() -> None:
    """Weights 1, 2, 3 of three clips: in two passes of three places the clips occur 1, 2 and 3 times."""
    batches = Batches([VIDEO] * 3, batch_size=3, seed=0, weights=torch.tensor([1.0, 2.0, 3.0]))
    assert all(1 in batches.at(step) for step in range(20))
    found = counts(batches, 600)
    assert found[1] == 600
    assert found[0] == pytest.approx(300, abs=3)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_image_share(share: float) -> None:
    batches = Batches(CLIPS, batch_size=2, seed=0, image_share=share)
    images = sum(CLIPS[batches.at(step)[0]] == IMAGE for step in range(400))
    assert images == pytest.approx(400 * share, abs=3)
    found = counts(batches, 400)
    assert max(found[clip] for clip in range(8)) - min(found[clip] for clip in range(8)) <= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"weights": torch.ones(3)}, r"weights have the shape \(3,\), but there are 12 clips"),
        ({"weights": -torch.ones(12)}, "finite numbers of at least 0"),
        ({"weights": torch.zeros(12)}, "sum above 0"),
        ({"weights": torch.full((12,), float("nan"))}, "finite"),
        ({"weights": torch.tensor([1.0] * 8 + [0.0] * 4), "image_share": 0.5}, "has no images"),
    ],
)
def test_bad_weights(words: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Batches(CLIPS, batch_size=1, seed=0, **words)  # type: ignore[arg-type]


def test_image_share_needs_both_kinds() -> None:
    with pytest.raises(UserError, match=r"image_share is 0.3, but the data set has no images"):
        Batches([VIDEO], batch_size=1, seed=0, image_share=0.3)
    with pytest.raises(UserError, match="has no videos"):
        Batches([IMAGE], batch_size=1, seed=0, image_share=0.3)
    assert Batches([IMAGE], batch_size=1, seed=0, image_share=1.0).at(0) == [0]
