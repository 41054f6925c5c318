"""The GPS queue against Python's deque."""

from collections import deque

import pytest
import torch

from geoclip import earth
from geoclip.gps_queue import GPSQueue


def places(n, seed=0):
    return earth.sample_sphere(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("capacity", "batches"), [(10, [3] * 9), (10, [10, 10, 1]), (7, [1, 5, 7, 2, 6]), (1, [1, 1])]
)
def test_order_and_wrap_around(capacity, batches):
    queue, expected = GPSQueue(places(capacity)), deque(places(capacity).tolist(), maxlen=capacity)
    for step, size in enumerate(batches):
        batch = places(size, seed=step + 1)
        queue.push(batch)
        expected.extend(batch.tolist())
        assert queue.contents().tolist() == list(expected)


def test_it_is_kept_in_a_state_dict():
    queue = GPSQueue(places(5))
    queue.push(places(3, seed=1))
    other = GPSQueue(places(5, seed=9))
    other.load_state_dict(queue.state_dict())
    other.push(places(4, seed=2))
    queue.push(places(4, seed=2))
    assert torch.equal(other.contents(), queue.contents())


def test_none():
    queue = GPSQueue(places(0))
    queue.push(places(3))
    assert queue.contents().shape == (0, 2)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="batch of 6 does not fit a queue of 5"):
        GPSQueue(places(5)).push(places(6))
    with pytest.raises(ValueError, match="row 2"):
        GPSQueue(torch.tensor([[0.0, 0.0], [1.0, 1.0], [99.0, 1.0]]))
