"""Gathering of requests, without a net."""

import threading
import time

import pytest
import torch

from lightning_tta import ClosedError, InputError, QueueFullError
from lightning_tta.serving.requests import Requests, joined


def images(number, value=0.0, size=4):
    return torch.full((number, 3, size, size), float(value))


def values(requests):
    return [int(request.images.flatten()[0]) for request in requests]


def test_in_order_those_of_a_kind_together_and_none_is_split_or_overtaken():
    requests = Requests(4, 0.0, 100)
    for number, (count, size) in enumerate([(1, 4), (2, 4), (1, 8), (2, 4), (1, 4), (1, 8)]):
        requests.put(images(count, number, size))
    assert values(requests.take()) == [0, 1]  # 3 would make 5 images, and 4, which would fit, does not overtake it
    assert values(requests.take()) == [2, 5]
    assert values(requests.take()) == [3, 4]
    assert not requests
    assert requests.images == 0


def test_waits_for_others_but_no_longer_than_said():
    requests = Requests(4, 0.05, 100)
    requests.put(images(1))
    start = time.monotonic()
    assert len(requests.take()) == 1
    assert 0.03 < time.monotonic() - start < 5
    slow = Requests(3, 60.0, 100)
    later = threading.Timer(0.02, lambda: [slow.put(images(1, n)) for n in range(3)])
    later.start()
    slow.put(images(1, 9))
    assert values(slow.take()) == [9, 0, 1]  # at once when full
    later.join()
    slow.close()
    assert values(slow.take()) == [2]
    assert slow.take() == []


def test_full_closed_too_large():
    requests = Requests(2, 0.0, 3)
    first = requests.put(images(2))
    requests.put(images(1))
    with pytest.raises(QueueFullError, match=r"3 images wait .* max_queue is 3"):
        requests.put(images(1))
    with pytest.raises(InputError, match="max_batch=2"):
        requests.put(images(3))
    assert first.cancel()
    assert len(requests.take()) == 1  # the caller of the first has gone
    requests.put(images(1))
    requests.close()
    with pytest.raises(ClosedError):
        requests.put(images(1))
    assert len(requests.take()) == 1
    waiting = Requests(2, 0.0, 3)
    future = waiting.put(images(1))
    waiting.refuse(ClosedError("closed"))
    with pytest.raises(ClosedError):
        future.result(0)
    assert waiting.images == 0


def test_the_batch_is_a_copy():
    requests = Requests(2, 0.0, 3)
    mine = images(1)
    requests.put(mine)
    batch = joined(requests.take())
    mine.fill_(1)
    assert batch.sum() == 0
