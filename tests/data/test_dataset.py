"""Batches and augmentation."""

import pytest
import torch

from effkern.data import Split, load_digits, shift_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shift_moves_every_image_as_a_whole():
    images = torch.zeros(200, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 3] = 7
    moved = shift_and_flip(images, 2, False, generator())
    assert moved.dtype == torch.uint8 and (moved.flatten(1).sum(1) == 7).all()
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(2, 7) for x in range(1, 6)}


def test_flip_mirrors_about_half_of_them_left_to_right():
    images = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 3, 4).expand(400, 2, 3, 4)
    got = shift_and_flip(images, 0, True, generator())
    mirrored = (got == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (got == images).flatten(1).all(1)).all()
    assert 150 < int(mirrored.sum()) < 250


def test_what_is_moved_in_is_zero():
    moved = shift_and_flip(torch.full((100, 1, 4, 4), 9), 1, False, generator())
    assert set(moved.unique().tolist()) == {0, 9}


def test_no_shift_and_no_flip_is_the_same_image():
    images = torch.rand(3, 2, 5, 6, generator=generator())
    assert torch.equal(shift_and_flip(images, 0, False, generator()), images)


def test_ordered_batches_hold_every_image_once():
    data = load_digits()
    batches = list(data.batches(data.test, 100))
    assert [len(x) for x, _ in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([y for _, y in batches]), data.test.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), data.normalize(data.test.images))


def test_training_batches_are_shuffled_whole_and_repeatable():
    data = load_digits()
    first = list(data.batches(data.train, 100, generator=generator(3), augment=True))
    again = list(data.batches(data.train, 100, generator=generator(3), augment=True))
    other = list(data.batches(data.train, 100, generator=generator(4), augment=True))
    assert all(len(x) == 100 for x, _ in first) and len(first) == len(data.train) // 100
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_a_split_smaller_than_a_batch_is_one_batch():
    data = load_digits()
    (only,) = data.batches(data.val[:7], 100, generator=generator())
    assert len(only[0]) == 7


def test_wrong_use_is_refused():
    data = load_digits()
    with pytest.raises(ValueError, match="augment: needs a generator"):
        next(data.batches(data.train, 10, augment=True))
    with pytest.raises(ValueError, match=r"images: must be \[n, c, h, w\] uint8, got \(2, 28, 28\)"):
        Split(torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels: must be \[2\] int64, got \(3,\)"):
        Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
