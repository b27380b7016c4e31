"""Pixels in memory and on disk: computed once, right in any order and process, and never half."""

import pickle

import numpy as np
import pytest
import torch

from lightning_tta import DigitsData
from lightning_tta.data import images
from lightning_tta.data.images import StackedImages
from lightning_tta.data.storage import cache
from lightning_tta.data.storage.cache import CACHE, ImageCache, MappedImages, default_folder

on_disk = CACHE.on_disk


def some(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return StackedImages(pixels, torch.arange(count))


class Made(images.Images):
    """Images that count how often their pixels are asked for."""

    def __init__(self, count, seed=0):
        self.made, self.labels, self.calls = some(count, seed), torch.arange(count), 0

    def image(self, position):
        return self.made.image(position)

    def images(self, positions):
        self.calls += 1
        return self.made.images(positions)


@pytest.mark.parametrize("count", [1, 8, 9, 40, 100])
@pytest.mark.parametrize("worth", [-1.0, 1e9], ids=["workers", "alone"])
def test_what_comes_back_is_what_was_there(tmp_path, monkeypatch, count, worth):
    monkeypatch.setattr(cache, "_WORTH_WORKERS", worth)
    made = Made(count)
    state = torch.get_rng_state()
    mapped = on_disk(made, "key", tmp_path, "")
    for stored in (mapped, ImageCache(2**20).in_memory(made, "key", "")):
        assert torch.equal(stored.images(torch.arange(count)), made.made.pixels)
        assert torch.equal(stored.image(count - 1), made.made.pixels[-1])
    assert torch.equal(torch.get_rng_state(), state)  # a method's random numbers do not depend on what was cached
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".lock"}
    assert np.array_equal(np.load(mapped.path), made.made.pixels)


def test_computed_once_and_oldest_dropped():
    store, made = ImageCache(limit=130), {name: Made(1, seed=ord(name)) for name in "abc"}  # 60 bytes each

    def get(name):
        return store.in_memory(made[name], name, "").pixels

    assert get("a") is get("a")
    get("b")
    get("a")  # used again: now b is the oldest
    get("c")
    assert (store.nbytes, [made[name].calls for name in "abc"]) == (120, [1, 1, 1])
    get("a")
    assert made["a"].calls == 1
    get("b")
    assert made["b"].calls == 2
    store.clear()
    assert store.nbytes == 0


def test_what_is_larger_than_the_limit_is_left_as_it_is_and_drops_nothing():
    store, small = ImageCache(limit=130), Made(1)
    kept = store.in_memory(small, "small", "").pixels
    for large, sets in ((Made(3), 1), (Made(1, seed=1), 3)):
        assert store.in_memory(large, ("large", sets), "", sets=sets) is large
    assert store.in_memory(small, "small", "").pixels is kept
    assert small.calls == 1


def test_several_runs_write_one_file(tmp_path, monkeypatch):
    """Another run has written the file while this one waited for the lock."""
    taken = []

    class Lock:
        def __init__(self, path):
            taken.append(path)

        def __enter__(self):
            monkeypatch.undo()
            on_disk(some(9), "key", tmp_path, "")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cache, "FileLock", Lock)
    late = Made(9)
    assert torch.equal(on_disk(late, "key", tmp_path, "").image(3), late.image(3))
    assert late.calls == 0
    (path,) = tmp_path.glob("*.npy")
    assert taken == [path.with_suffix(".lock")]


def test_equal_keys_share_a_file_and_others_do_not(tmp_path):
    first = on_disk(some(9), "key", tmp_path, "")
    assert on_disk(some(9, seed=1), "key", tmp_path, "").path == first.path
    other = on_disk(some(9, seed=1), "another", tmp_path, "")
    assert not torch.equal(other.image(0), first.image(0))


def test_a_run_that_was_cut_off_leaves_nothing_to_trip_over(tmp_path):
    class Failing(StackedImages):
        def images(self, positions):
            if int(positions[0]) >= 32:
                raise RuntimeError("power cut")
            return super().images(positions)

    given = some(40)
    with pytest.raises(RuntimeError, match="power cut"):
        on_disk(Failing(given.pixels, given.labels), "key", tmp_path, "")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert torch.equal(on_disk(given, "key", tmp_path, "").images(torch.arange(40)), given.pixels)


def test_workers_open_the_file_for_themselves(tmp_path):
    found = on_disk(some(9), "key", tmp_path, "")
    text = pickle.dumps(found)
    assert len(text) < 2000
    assert torch.equal(pickle.loads(text).image(3), found.image(3))
    assert isinstance(found, MappedImages)


def stream_of(**options):
    batches = DigitsData(domains=["contrast", "pixelate"], num_images=30, batch_size=16, **options).predict_dataloader()
    return torch.cat([batch["image"] for batch in batches])


def test_a_second_run_corrupts_nothing(tmp_path, monkeypatch):
    calls, corrupt = [], images.corrupt
    monkeypatch.setattr(images, "corrupt", lambda *args, **options: calls.append(1) or corrupt(*args, **options))
    place = {"cache_dir": str(tmp_path)}
    first = stream_of(**place)
    assert len(calls) == 60
    assert torch.equal(stream_of(**place), first)
    assert len(calls) == 60
    assert len(list(tmp_path.glob("*.npy"))) == 2
    assert torch.equal(stream_of(cache_dir="none"), first)
    for other in ({"severity": 4}, {"corruption_seed": 1}, {"image_size": 36}):
        before = len(calls)
        stream_of(**place, **other)
        assert len(calls) == before + 60


def test_too_much_for_the_disk(tmp_path):
    with pytest.warns(UserWarning, match="cache_limit_gb"):
        found = stream_of(cache_dir=str(tmp_path), cache_limit_gb=1e-6)
    assert torch.equal(found, stream_of(cache_dir=str(tmp_path)))


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_TTA_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("LIGHTNING_TTA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "lightning_tta"


def test_channels_last_and_first_row(tmp_path):
    rows = np.random.default_rng(0).integers(256, size=(6, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", rows)
    found = MappedImages(tmp_path / "a.npy", torch.arange(2), first=3, channels_last=True)
    assert torch.equal(found.image(1), torch.from_numpy(rows[4]).permute(2, 0, 1))
