"""The benchmark end to end on two domains, and the numbers of its tables by hand."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

import published
from lightning_tta import ConfigError, DataError, TestTimeAdaptation, create_backbone
from lightning_tta.benchmark.config import NetConfig, StreamConfig
from lightning_tta.benchmark.runner import Benchmark
from lightning_tta.errors import Interrupted, LightningTTAError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.report.terminal import report
from processes import NEEDS_FORK

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {"method", "net", "stream", "seed", "accuracy", "domains", "protocol_hash", "forwards", "backwards"}
NO_TIMES = {"seconds_per_batch": 0, "milliseconds_per_image": 0}


def benchmark(root, methods=None, **options):
    return Benchmark(
        output=str(root),
        data={"class_path": "DigitsData", "init_args": {"domains": ["haze", "contrast"], "num_images": 20}},
        nets={
            "bn": NetConfig(source_ckpt="none", backbone="timm/test_resnet", num_classes=10),
            "gn": NetConfig(source_ckpt="none", backbone="timm/test_efficientnet_gn", num_classes=10),
        },
        streams={"iid": StreamConfig(kind="iid", data={"batch_size": 10})},
        methods=methods or {"source": {"class_path": "Source"}, "norm": {"class_path": "Norm"}},
        trainer={"accelerator": "cpu"},
        **options,
    )


def test_each_seed_may_take_images_of_its_own(tmp_path):
    made = benchmark(tmp_path, seeds=[0, 2], images_by_seed=True)
    data = {cell.seed: made._config(cell, "none")["predict"]["data"]["init_args"] for cell in made.cells}
    assert {seed: options["subset_seed"] for seed, options in data.items()} == {0: 0, 2: 2}
    assert "subset_seed" not in str(benchmark(tmp_path, seeds=[2])._config(made.cells[-1], "none"))
    made_of = {"source": {"class_path": "Source"}}
    with pytest.raises(ConfigError, match="images_by_seed needs data"):
        Benchmark("x", {"class_path": "DigitsData"}, made.nets, {"iid": StreamConfig()}, made_of, images_by_seed=True)


@pytest.fixture
def methods_before(monkeypatch):
    """How many methods were alive when each was made; no garbage is collected by chance."""
    alive, before, init = weakref.WeakSet(), [], TTAMethod.__init__

    def count(self, *args, **options):
        before.append(len(alive))
        init(self, *args, **options)
        alive.add(self)

    monkeypatch.setattr(TTAMethod, "__init__", count)
    gc.disable()
    yield before
    gc.enable()


def test_rows_files_and_no_second_run(tmp_path, capsys, methods_before):
    result = benchmark(tmp_path, seeds=[0, 1]).run()
    assert set(methods_before) == {0}  # those of finished cells are gone, with their nets
    assert not gc.get_freeze_count()
    rows = result["rows"]
    assert all(KEYS <= set(row) for row in rows)
    found = [(row["net"], row["method"], row["seed"]) for row in rows]
    assert found == [("bn", m, s) for m in ("source", "norm") for s in (0, 1)] + [("gn", "source", s) for s in (0, 1)]
    assert [entry["cell"] for entry in result["skipped"]] == [f"gn/iid/norm/seed{seed}" for seed in (0, 1)]
    assert all(entry["reason"].startswith("unsupported") for entry in result["skipped"])
    hashes = {(row["net"], row["seed"], row["method"]): row["protocol_hash"] for row in rows}
    assert hashes["bn", 0, "source"] == hashes["bn", 0, "norm"] != hashes["bn", 1, "norm"]
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"] == rows
    assert "bn-iid.png" in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "bn-iid.png").read_bytes().startswith(b"\x89PNG")
    reports = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("report.json")}
    assert len(reports) == 6
    assert {path.parent for path in tmp_path.rglob("final_state.pt")} == {path.parent for path in reports}
    assert benchmark(tmp_path, seeds=[0, 1]).run()["rows"] == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("report.json")} == reports

    changed = {"norm": {"class_path": "Norm", "init_args": {"source_weight": 0.5}, "nets": ["bn"]}}
    benchmark(tmp_path, changed, seeds=[0]).run()
    now = set(tmp_path.rglob("report.json"))
    assert set(reports) < now
    assert len(now) == 7

    first, second = (tmp_path / row["directory"] for row in rows[:2])
    with pytest.raises(ConfigError, match="order_seed: 0 != 1"):
        report([first, second], output=tmp_path / "compared")
    report([first, second], allow_different=True, output=tmp_path / "compared")
    assert "source" in capsys.readouterr().out
    content = json.loads((first / "report.json").read_text())
    assert (content["options"], content["window"]) == ({}, 8)
    assert "source_weight" in json.loads((tmp_path / rows[2]["directory"] / "report.json").read_text())["options"]
    assert all(domain["counted"] for domain in content["domains"].values())
    content["protocol"]["severity"] = 1
    (first / "report.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="changed"):
        report([first, second])


def test_a_method_has_its_own_arguments_of_the_module(tmp_path):
    methods = {
        "tent": {"class_path": "Tent", "run": {"input": {"channels_last": True}}},
        "rdumb": {"class_path": "ETA", "model": {"reset_every": 1}},
    }
    rows = benchmark(
        tmp_path, methods, model={"reset_every": 3}, run={"board": {"images": 0}}, seeds=[0], only=["all"]
    ).run()["rows"]
    assert len(rows) == 4
    for row in rows:
        given = yaml.safe_load((tmp_path / row["directory"] / "config.yaml").read_text())
        assert given["input"]["channels_last"] == (row["method"] == "tent")
        assert given["board"]["images"] == 0
        assert given["model"]["init_args"]["reset_every"] == (1 if row["method"] == "rdumb" else 3)
    for wrong, words in (
        ({"model": {"reset_evry": 1}}, "Did you mean reset_every"),
        ({"model": {"channels_last": True}}, r"methods\.tent\.model\.channels_last is now .*methods\.tent\.run"),
        ({"run": {"input": {"chanels_last": True}}}, "chanels_last"),
        ({"run": {"inputs": {}}}, r"methods\.tent\.run names parts \['inputs'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            benchmark(tmp_path, {"tent": {"class_path": "Tent", **wrong}})
    with pytest.raises(ConfigError, match=r"model\.measure_forgetting is now --report.measure_forgetting"):
        benchmark(tmp_path, model={"measure_forgetting": True})


def test_damaged_cells_are_run_again(tmp_path):
    def row():
        (row,) = benchmark(tmp_path, {"source": {"class_path": "Source", "nets": ["bn"]}}).run()["rows"]
        return {**row, **NO_TIMES}

    expected = row()
    (path,) = tmp_path.rglob("report.json")
    predictions = path.with_name("predictions.csv")
    whole, lines = path.read_bytes(), predictions.read_bytes()
    for damaged, file in ((b"", path), (whole[:99], path), (b"{}", path), (lines[:-30], predictions)):
        file.write_bytes(damaged)
        assert row() == expected
        assert json.loads(path.read_bytes())["domains"] == json.loads(whole)["domains"]
        assert predictions.read_bytes() == lines


def change_weights(folder):
    state = torch.load(folder / "net.pt")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "net.pt")


def add_an_image(folder):
    published.photos(folder / "photos", ["a"], 1, 32, stem="another")


@pytest.mark.parametrize("change", [change_weights, add_an_image])
def test_a_cell_whose_files_have_changed_is_run_again(change, tmp_path):
    """The configuration is the same, so its directory is too: the old result must not stand for the new files."""
    published.photos(tmp_path / "photos", ["a", "b"], 2, 32)
    torch.save(create_backbone("timm/test_resnet", 2).net.state_dict(), tmp_path / "net.pt")
    made = Benchmark(
        output=str(tmp_path / "runs"),
        data={"class_path": "FolderData", "init_args": {"root": str(tmp_path / "photos"), "image_size": 32}},
        nets={"net": NetConfig(source_ckpt=str(tmp_path / "net.pt"), backbone="timm/test_resnet", num_classes=2)},
        streams={"iid": StreamConfig()},
        methods={"source": {"class_path": "Source"}},
        trainer={"accelerator": "cpu"},
    )
    (first,) = made.run()["rows"]
    report = tmp_path / "runs" / first["directory"] / "report.json"
    written = report.stat().st_mtime_ns
    assert made.run()["rows"] == [first]
    assert report.stat().st_mtime_ns == written
    change(tmp_path)
    made._digests.clear()  # as in a new process
    (second,) = made.run()["rows"]
    assert second["directory"] == first["directory"]
    assert second["protocol_hash"] != first["protocol_hash"]


@pytest.mark.parametrize(("data", "functions"), [("lightning_tta.FolderData", "builtin"), ("CIFARData", "published")])
def test_data_that_are_not_there_are_said_before_a_net_is_trained(data, functions, tmp_path):
    made = Benchmark(
        output=str(tmp_path / "runs"),
        data={"class_path": data, "init_args": {"root": str(tmp_path / "nowhere"), "function_set": functions}},
        nets={"net": NetConfig(fit="configs/digits/source.yaml")},
        streams={"iid": StreamConfig(), "sorted": StreamConfig(kind="label_shift")},
        methods={"source": {"class_path": "Source"}},
        jobs=2,
    )
    with pytest.raises(DataError, match="nowhere"):
        made.run()
    assert not list((tmp_path / "runs").glob("sources/*"))


def test_two_benchmarks_do_not_share_a_directory(tmp_path):
    tmp_path.joinpath("sources").mkdir()
    with FileLock(tmp_path / "benchmark.lock"), pytest.raises(ConfigError, match="in use by another benchmark"):
        benchmark(tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.lock", "sources"]


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(tmp_path):
    one, two = (benchmark(tmp_path / str(jobs), jobs=jobs).run() for jobs in (1, 2))
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert {**first, **NO_TIMES} == {**second, **NO_TIMES}
    assert one["skipped"] == two["skipped"]


def test_a_failed_cell_does_not_lose_the_others(tmp_path, monkeypatch):
    def fail(self, images):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lightning_tta.methods.norm.Norm.step", fail)
    with pytest.raises(LightningTTAError, match="failed"):
        benchmark(tmp_path).run()
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["method"] for row in content["rows"]} == {"source"}
    assert "out of memory" in (tmp_path / "benchmark.md").read_text()


def test_a_killed_benchmark_goes_on_within_a_cell(tmp_path, monkeypatch):
    options = {"seeds": [0], "only": ["source"]}
    expected = benchmark(tmp_path / "whole", save_every=None, **options).run()["rows"]
    step, seen, killed = TestTimeAdaptation.predict_step, [], []

    def watched(self, batch, batch_idx):
        seen.append(batch["index"])
        if len(seen) == 4 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TestTimeAdaptation, "predict_step", watched)
    with pytest.raises(SystemExit):
        benchmark(tmp_path / "a", save_every=1, **options).run()
    seen.clear()
    rows = benchmark(tmp_path / "a", save_every=1, **options).run()["rows"]
    assert len(seen) == 1 + 4  # the last batch of the first cell, then the other cell
    assert [{**row, **NO_TIMES} for row in rows] == [{**row, **NO_TIMES} for row in expected]
    assert not list(tmp_path.rglob("state*.pt"))  # nothing is left to go on from


@pytest.mark.parametrize(
    ("methods", "options", "words"),
    [
        ({"tent": {"class_path": "Tent", "init_args": {"lr": -1}}}, {}, "lr"),
        ({"tent": {"class_path": "Tent", "init_args": {"rate": 1}}}, {}, "rate"),
        ({"tent": {"class_path": "Tent", "nets": ["vit"]}}, {}, "vit"),
        ({"tent": {"lr": 1}}, {}, "class_path"),
        (
            {"auto": {"class_path": "Tent", "model": {"statistics": "atuo"}}},
            {},
            "Method 'auto': Unknown --model.statistics 'atuo'. Did you mean auto",
        ),
        ({"lame": {"class_path": "Tent", "model": {"window": 8, "refine": "lame"}}}, {}, "Method 'lame': .*exclude"),
        (None, {"seeds": []}, "seeds"),
        (None, {"save_every": 0}, "save_every"),
        (None, {"only": ["tent"]}, "tent"),
    ],
)
def test_wrong_configuration_is_refused_before_anything_runs(tmp_path, methods, options, words):
    with pytest.raises(ConfigError, match=words):
        benchmark(tmp_path, methods, **options)
    assert not list(tmp_path.iterdir())


def test_missing_result_is_named(tmp_path):
    with pytest.raises(DataError, match=Path(tmp_path).name):
        report([tmp_path])


@pytest.mark.slow
def test_a_net_that_starts_from_another(tmp_path):
    short = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1}
    meta = {**short, "data.val_domains": ["clean"], "model.schedule": "chained"}
    nets = {
        "source": NetConfig(fit="configs/digits/source.yaml", options=short),
        "meta": NetConfig(fit="configs/digits/meta_ttt.yaml", options=meta, start="source"),
    }
    result = Benchmark(
        output=str(tmp_path),
        data={"class_path": "DigitsData", "init_args": {"domains": ["haze"], "num_images": 20}},
        nets=nets,
        streams={"iid": StreamConfig(kind="iid", data={"batch_size": 10}, nets=["meta"])},
        methods={"meta_ttt": {"class_path": "MetaTTT"}},
        trainer={"accelerator": "cpu"},
    ).run()
    (row,) = result["rows"]
    assert row["net"] == "meta"
    assert row["backwards"] == 4  # two batches: max and min
    config = yaml.safe_load(next(tmp_path.glob("sources/meta-*/fit/config.yaml")).read_text())
    (start,) = tmp_path.glob("sources/source-*")
    assert config["model"]["init_args"]["source_ckpt"] == str(start)
    assert config["model"]["init_args"]["schedule"] == "chained"


@pytest.mark.parametrize("start", ["nowhere", "meta", "second"])
def test_what_a_net_may_start_from(tmp_path, start):
    fit = "configs/digits/source.yaml"
    nets = {
        "first": NetConfig(fit=fit),
        "second": NetConfig(fit=fit, start="first"),
        "meta": NetConfig(fit=fit, start=start),
    }
    with pytest.raises(ConfigError, match=r"start"):
        Benchmark(
            output=str(tmp_path),
            data={"class_path": "DigitsData"},
            nets=nets,
            streams={"iid": StreamConfig()},
            methods={"source": {"class_path": "Source"}},
        )


PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from lightning_tta.benchmark.runner import _start_worker

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker, (1,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_benchmark(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # there
        parent.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_a_net_over_prompts_may_be_a_folder(tmp_path):
    stream, methods = {"iid": StreamConfig()}, {"tent": {"class_path": "tent", "init_args": {"lr": 0.1}}}
    made = Benchmark(str(tmp_path), {"class_path": "PromptData"}, {"a": NetConfig(net=str(tmp_path))}, stream, methods)
    model = made._config(made.cells[0], None)["predict"]["model"]
    assert (model["class_path"], model["init_args"]["net"]) == ("lightning_tta.LanguageAdaptation", str(tmp_path))
    assert model["init_args"]["source_ckpt"] is None
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        Benchmark(str(tmp_path), {"class_path": "PromptData"}, {"a": NetConfig(net="nowhere")}, stream, methods)


@NEEDS_FORK
def test_work_that_has_not_begun_leaves_no_traceback_when_a_benchmark_is_stopped(tmp_path, monkeypatch):
    made, failures, threads = benchmark(tmp_path, jobs=2), [], set(threading.enumerate())
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: forked)
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def stop_after_the_first():
        with made._workers() as run_all:
            for _ in run_all(time.sleep, [0.0, *[60.0] * 8]):
                raise Interrupted(signal.SIGTERM, "stopped")

    with pytest.raises(Interrupted):
        stop_after_the_first()
    for worker in (*multiprocessing.active_children(), *(set(threading.enumerate()) - threads)):
        worker.join(20)
    assert not multiprocessing.active_children()
    assert not [failure.exc_value for failure in failures]
