"""Recurring, Markov and polluted streams as runs: what the method sees, what counts, what the report says."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lightning_tta import ConfigError, DataError, DigitsData, TestTimeAdaptation
from lightning_tta.cli.main import main
from lightning_tta.cli.stream import list_stream
from lightning_tta.methods import Source, Tent
from nets import make_net
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
TENT = partial(Tent, lr=1e-2)


class Spy(Source):
    """Notes what it sees, and when it is reset."""

    def __init__(self, model):
        super().__init__(model)
        self.events = []

    def forward(self, images):
        self.events.append(images.clone())
        return super().forward(images)

    def reset(self):
        self.events.append("reset")
        super().reset()


def make_data(**options):
    return DigitsData(**{"domains": ["gaussian_noise", "contrast"], "num_images": 40, "batch_size": 16, **options})


def run(root, method=TENT, *, data, **options):
    module = TestTimeAdaptation(method, backbone=make_net("bn", num_classes=10), **options)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": root}
    outputs = Trainer(**quiet).predict(module, datamodule=data)
    directory = directory_of(root)
    with (directory / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return module, outputs, json.loads((directory / "report.json").read_text()), rows


def share(rows):
    known = [row for row in rows if row["label"] != "-1"]
    return sum(row["label"] == row["prediction"] for row in known) / len(known)


# Recurring -----------------------------------------------------------------------------------------------------------


def test_every_visit_has_the_same_images_and_numbers_of_its_own(tmp_path):
    _, outputs, report, rows = run(tmp_path, data=make_data(stream="recurring", visits=3))
    domains = [f"{name}:visit_{visit}" for visit in (1, 2, 3) for name in ("gaussian_noise", "contrast")]
    assert report["protocol"]["domains"] == domains
    assert list(report["domains"]) == domains
    assert report["protocol"]["visits"] == 3
    assert sorted(int(row["index"]) for row in rows) == list(range(240))
    assert list(report["visits"]) == ["visit_1", "visit_2", "visit_3"]
    for visit, numbers in report["visits"].items():
        here = [row for row in rows if row["domain"].endswith(f":{visit}")]
        assert numbers["images"] == len(here) == 80
        assert numbers["accuracy"] == pytest.approx(share(here))
        assert numbers["entropy"] == pytest.approx(sum(float(row["entropy"]) for row in here) / 80, abs=1e-4)
    assert len({numbers["entropy"] for numbers in report["visits"].values()}) == 3  # it went on adapting
    assert report["accuracy"] == pytest.approx(share(rows))
    assert report["resets"] == 0
    assert [int(output["domain"][0]) for output in outputs] == [d for d in range(6) for _ in range(3)]


def test_pixels_and_labels_are_those_of_the_first_visit():
    data = make_data(stream="recurring", visits=2, batch_size=7)
    images, labels = {}, {}
    for batch in data.predict_dataloader():
        for index, image, label in zip(batch["index"].tolist(), batch["image"], batch["label"].tolist(), strict=True):
            images[index], labels[index] = image, label
    assert sorted(images) == list(range(160))
    for index in range(80):
        assert torch.equal(images[index], images[index + 80])
        assert labels[index] == labels[index + 80]


def test_a_source_does_not_change_over_visits_and_the_policy_may_reset_at_each(tmp_path):
    _, _, report, _ = run(tmp_path, Source, data=make_data(stream="recurring", visits=2))
    first, second = report["visits"].values()
    assert first["accuracy"] == second["accuracy"]
    data = make_data(stream="recurring", visits=3, domains=["clean"])
    module, *_ = run(tmp_path / "b", Spy, data=data, reset="domain")
    assert sum(event == "reset" for event in module.method.events if isinstance(event, str)) == 2


def test_the_page_compares_visits(tmp_path, capsys):
    for name, method in (("source", Source), ("tent", TENT)):
        run(tmp_path / name, method, data=make_data(stream="recurring", visits=2))
    paths = [str(directory_of(tmp_path / name)) for name in ("source", "tent")]
    main(["report", *paths, "--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    reports = [json.loads((directory_of(tmp_path / name) / "report.json").read_text()) for name in ("source", "tent")]
    for part in ("visit_1", "visit_2"):
        cells = [f"{100 * report['visits'][part]['accuracy']:.1f}" for report in reports]
        assert f"| {part} | {' | '.join(cells)} |" in text
    noise = [
        sum(report["domains"][f"gaussian_noise:visit_{visit}"]["accuracy"] for visit in (1, 2)) / 2
        for report in reports
    ]
    assert f"| gaussian_noise | {' | '.join(f'{100 * accuracy:.1f}' for accuracy in noise)} |" in text
    assert "gaussian_noise:visit_1" not in text  # twenty visits of fifteen domains would be a wall
    assert "| domains | gaussian_noise, contrast |" in text
    difference = reports[1]["accuracy"] - reports[0]["accuracy"]
    assert f"| all | {100 * difference:+.1f} |" in text  # without an interval: an image comes twice
    assert "not over all visits, which show the same images" in text
    assert "visit_2" in capsys.readouterr().out


# Markov --------------------------------------------------------------------------------------------------------------


def test_a_markov_stream_says_what_it_has_used(tmp_path):
    data = make_data(stream="markov", num_images=200, class_imbalance=2.0)
    _, _, report, rows = run(tmp_path, data=data)
    used = [row["domain"] for row in rows]
    assert report["images"] == report["protocol"]["images"] == len(rows) < 400
    assert report["protocol"]["images_per_domain"] == [used.count(name) for name in ("gaussian_noise", "contrast")]
    assert report["protocol"]["class_imbalance"] == 2
    assert len({row["index"] for row in rows}) == len(rows)
    assert [int(row["index"]) for row in rows] == [p for batch in data.stream.batches for p in batch]
    with pytest.raises(ConfigError, match="no meaning on a markov stream"):
        run(tmp_path / "b", data=make_data(stream="markov", num_images=200), reset="domain")


def test_with_domain_correlation_one_domains_may_be_reset(tmp_path):
    data = make_data(stream="markov", num_images=200, domain_correlation=1.0)
    assert run(tmp_path, data=data, reset="domain")[2]["resets"] == 1


# Polluted ------------------------------------------------------------------------------------------------------------


def test_polluting_images_are_seen_and_not_scored(tmp_path):
    data = make_data(stream="polluted", pollution=0.5)
    module, outputs, report, rows = run(tmp_path, Spy, data=data)
    assert sum(len(event) for event in module.method.events if not isinstance(event, str)) == 160
    marked = [row for row in rows if row["domain"].endswith(":pollution")]
    real = [row for row in rows if row not in marked]
    assert (len(marked), len(real)) == (80, 80)
    assert {row["label"] for row in marked} == {"-1"}
    assert {row["prediction"] for row in marked} <= {str(k) for k in range(10)}
    assert report["accuracy"] == pytest.approx(share(real))
    assert (report["images"], report["labelled_images"], report["polluting_images"]) == (160, 80, 80)
    assert sum(report["reliability"][0]) == 80
    assert {name: row["counted"] for name, row in report["domains"].items()} == {
        "gaussian_noise": True,
        "contrast": True,
        "gaussian_noise:pollution": False,
        "contrast:pollution": False,
    }
    entropy = sum(float(row["entropy"]) for row in real[:40]) / 40
    assert report["domains"]["gaussian_noise"]["entropy"] == pytest.approx(entropy, abs=1e-4)
    assert module.method.events.index("reset") == 5  # 80 images, 16 a batch: at the next domain, and only there
    assert report["resets"] == 1
    batches = [json.loads(line) for line in (directory_of(tmp_path) / "batches.jsonl").read_text().splitlines()]
    assert [batch["domain"] for batch in batches] == ["gaussian_noise"] * 5 + ["contrast"] * 5
    for batch, output in zip(batches, outputs, strict=True):
        assert batch["labelled_images"] == int((output["label"] >= 0).sum())


def test_real_images_are_those_of_the_stream_without_pollution():
    polluted, plain = make_data(stream="polluted", pollution=0.3), make_data(stream="continual")
    kept = [batch["image"][batch["label"] >= 0] for batch in polluted.predict_dataloader()]
    expected = [batch["image"] for batch in plain.predict_dataloader()]
    assert torch.equal(torch.cat(kept), torch.cat(expected))


@pytest.mark.parametrize(("kind", "spread"), [("uniform", 12**-0.5), ("gaussian", 1 / 11)])
def test_noise_is_of_the_asked_kind_and_always_the_same(kind, spread):
    data = make_data(stream="polluted", polluters=kind)
    (_, real), _, (_, first), (_, second) = data.stream_images
    assert first.image(0).shape == real.image(0).shape
    pixels = torch.stack([images.image(n) for images in (first, second) for n in range(40)])
    assert len({image.numpy().tobytes() for image in pixels}) == 80
    values = (pixels.double() + 0.5) / 256
    assert float(values.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(values.std()) == pytest.approx(spread, rel=0.01)
    again = make_data(stream="polluted", polluters=kind, order_seed=5, corruption_seed=3)
    assert torch.equal(again.stream_images[2][1].image(7), first.image(7))
    words = torch.tensor([int(word) & 0xFFFF for word in np.random.PCG64([7, 1]).random_raw(2)])
    levels = words // 256
    if kind == "gaussian":
        levels = (255 * torch.special.ndtri((words + 0.5) / 65536) / 11 + 127.5).round()
    assert second.image(7).flatten()[[0, 4]].tolist() == levels.tolist()


def test_a_folder_of_other_images(tmp_path):
    folder = tmp_path / "others"
    for name, size, color in (("b/wide.png", (80, 40), (255, 0, 0)), ("tall.jpg", (20, 50), (0, 0, 255))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(folder / name)
    data = make_data(stream="polluted", polluters=str(folder), pollution=0.1)
    assert data.describe()["images_per_domain"] == [40, 40, 4, 4]
    identity = data.describe()["polluters"]
    assert identity.startswith("folder:")
    *_, (_, first), (_, second) = data.stream_images
    files = [images.file(n) for images in (first, second) for n in range(4)]
    assert {*files} == {"b/wide.png", "tall.jpg"}
    assert all({*files[n : n + 2]} == {"b/wide.png", "tall.jpg"} for n in range(0, 8, 2))  # each again after all
    red = first.image(files.index("b/wide.png"))
    assert red.shape == (3, 32, 32)
    assert red.flatten(1).float().mean(1).tolist() == [255, 0, 0]
    Image.new("RGB", (30, 30)).save(folder / "new.png")
    assert make_data(stream="polluted", polluters=str(folder)).describe()["polluters"] != identity
    rows = list_stream(data)
    assert sum(row["domains"].get("contrast:pollution", 0) for row in rows) == 4
    (folder / "tall.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"tall\.jpg"):
        run(tmp_path / "run", data=make_data(stream="polluted", polluters=str(folder)))


def test_polluters_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"'unifrom' is no kind of noise.*Did you mean uniform\?"):
        make_data(stream="polluted", polluters="unifrom")
    with pytest.raises(DataError, match="has no images"):
        make_data(stream="polluted", polluters=str(tmp_path)).describe()
