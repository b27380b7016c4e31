import time

import torch

from lightning_tta.data.storage import memo
from lightning_tta.data.storage.memo import TensorMemo, with_progress


def kilobyte():
    return torch.zeros(1024, dtype=torch.uint8)


def test_built_once_and_oldest_dropped():
    store, built = TensorMemo(limit=3000), []

    def get(key):
        return store.get(key, lambda: built.append(key) or kilobyte())

    assert get("a") is get("a")
    get("b")
    get("a")  # used again: now b is the oldest
    get("c")
    assert (store.nbytes, built) == (2048, ["a", "b", "c"])
    get("a")
    assert built == ["a", "b", "c"]
    get("b")
    assert built == ["a", "b", "c", "b"]


def test_what_is_larger_than_the_limit_is_handed_out_and_drops_nothing():
    store = TensorMemo(limit=1500)
    small = store.get("small", kilobyte)
    assert store.get("large", lambda: torch.zeros(9000)).shape == (9000,)
    assert store.get("small", lambda: 1 / 0) is small
    store.clear()
    assert store.nbytes == 0


def test_progress_shows_slow_work_only(capsys, monkeypatch):
    assert list(with_progress(3, "Working")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memo, "PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for _ in with_progress(3, "Working"):
        time.sleep(0.01)
    assert "Working" in capsys.readouterr().err
