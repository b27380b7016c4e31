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
from lightning_tta.errors import DataError

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


@pytest.mark.parametrize("damage", ["bit", "replaced", "cut", "former"])
def test_a_file_that_was_changed_is_made_anew(tmp_path, damage, recwarn):
    first = on_disk(some(9), "key", tmp_path, "")
    content = bytearray(first.path.read_bytes())
    other = on_disk(some(9, seed=1), "another", tmp_path, "").path.read_bytes()
    content[200] ^= 1
    plain = content[: -(8 + len(cache._MARK) + 2)]  # without checksum and rows
    changed = {"bit": content, "replaced": other, "cut": content[:150], "former": plain}[damage]
    first.path.write_bytes(changed)
    again = on_disk(some(9), "key", tmp_path, "")
    assert torch.equal(again.images(torch.arange(9)), some(9).pixels)
    assert any("checksum does not fit" in str(w.message) for w in recwarn) == (damage in ("bit", "replaced"))


class Damaged(Made):
    """Images of which some cannot be read."""

    def __init__(self, count, bad):
        super().__init__(count)
        self.bad = set(bad)

    def image(self, position):
        if position in self.bad:
            raise DataError(f"image {position} is broken")
        return self.made.image(position)

    def file(self, position):
        return f"{position}.png"

    def try_images(self, positions):
        readable = torch.tensor([p not in self.bad for p in positions.tolist()])
        return self.made.images(positions) * readable[:, None, None, None], readable


def test_damaged_images_stay_damaged(tmp_path):
    made, every = Damaged(70, (3, 40)), torch.arange(70)
    for stored in (on_disk(made, "k", tmp_path, ""), on_disk(made, "k", tmp_path, ""), CACHE.in_memory(made, "k", "")):
        pixels, readable = stored.try_images(every)
        assert (~readable).nonzero()[:, 0].tolist() == [3, 40]
        assert torch.equal(pixels[readable], made.made.pixels[readable])
        assert stored.file(5) == "5.png"
        assert str(stored.problem(40)) == "image 40 is broken"
        with pytest.raises(DataError, match="image 3 is broken"):
            stored.images(every)
        assert torch.equal(stored.images(every[10:20]), made.made.pixels[10:20])


def test_a_folder_that_cannot_be_written_is_said_and_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep corrupted images .*made anew.*--data.cache_dir"):
        images = on_disk(some(9), "key", tmp_path / "file" / "below", "")
    assert torch.equal(images.images(torch.arange(9)), some(9).pixels)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.warns(UserWarning, match="No space left"):
        assert on_disk(given := some(9), "key", tmp_path, "") is given
    assert not list(tmp_path.glob("*.npy"))


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
