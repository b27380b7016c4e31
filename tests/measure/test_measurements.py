"""The scripts behind the README's figures run, on small nets and few images."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

import alarms
import auto_switch
import bn_statistics
import by_hand
import choices
import come_mass
import cost
import estimates
import export
import forward_only
import gpu
import gpu_checks
import guard
import int8
import language_claim
import loading
import memo_cifar
import memo_leak
import memo_speed
import memory
import meta_step
import overhead
import perk
import protected
import reasons
import startup
import stream_memory
import tokens
from cases import Account, Case
from gpu_bench import Bench
from lightning_tta import SourceClassifier, adapt, create_backbone
from nets import make_images, make_net

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def run(monkeypatch, capsys, script, *args):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    script.main()
    return capsys.readouterr().out


def test_meta_step(monkeypatch, capsys):
    pytest.importorskip("higher", reason="the oracle is a dev extra: pip install -e '.[dev]'")
    small = ["--net=cifar/resnet20", "--images=4", "--pixels=16", "--rounds=1", "--no-memory", "--device=cpu"]
    text = run(monkeypatch, capsys, meta_step, *small)
    differences = [float(value) for value in re.findall(r"differ by (\S+)", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-10
    kernels = {line.split(" | ")[0][2:]: int(line.split(" | ")[3]) for line in text.splitlines() if "0 |" in line}
    assert set(kernels) == {"plain", "ours", "ours_deep", "higher", "higher_deep"}
    assert kernels["plain"] < kernels["ours_deep"] < kernels["ours"] < kernels["higher"]


def test_perk(capsys, tmp_path):
    small = ["--seeds=1", "--width=8", "--heads=2", "--layers=1", "--batches=2", "--base-batches=2", "--contexts=2"]
    small += ["--pairs=4", "--test-pairs", "4", "8", "--test-batches=1", "--plain-steps", "1", "--steps=2"]
    rows = perk.main([*small, f"--keep={tmp_path}"])
    assert set(rows) == {
        "question alone",
        "context in the prompt",
        "LoRA, 1 steps",
        *(f"PERK, {unrolled} of 2 steps differentiated" for unrolled in (0, 1, 2)),
    }
    text = capsys.readouterr().out
    assert text.count("| PERK, ") == 6
    assert perk.main([*small, f"--keep={tmp_path}"]) == rows  # the nets in the folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory(capsys):
    small_ones = ["--nets", "resnet18", "--batch=8", "--pixels=32", "--scaled=32", "--rounds=2", "--no-resident"]
    results = memory.main(small_ones)
    (small, _), (large, peak) = results["resnet18", True]
    (_, _), (plain, plain_peak) = results["resnet18", False]
    assert 3 * small < large < 0.6 * plain
    assert 0.7 * (plain - large) < plain_peak - peak < 1.1 * (plain - large)
    assert capsys.readouterr().out.count("| resnet18 |") == 3
    memory.work("resnet18", "2", "32", "auto")  # what a new process does
    assert float(capsys.readouterr().out) >= 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_meta_step_peak_of_one_kind(monkeypatch):
    small = ["--net=cifar/resnet20", "--images=4", "--pixels=16", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["script", *small])
    assert meta_step.peak_megabytes("ours") > 0


def test_memo_speed(monkeypatch, capsys):
    small = ["--net=cifar/resnet20", "--views=2", "--images=1", "--rounds=1", "--bf16"]
    text = run(monkeypatch, capsys, memo_speed, *small)
    for name in ("ours, all", "ours, norm", "ours, all, bf16", "augmentation, ours", "restore, ours"):
        assert name in text


@pytest.fixture
def places(tmp_path):
    """A folder of ten classes with two images each, and the weights of a net."""
    for label in range(10):
        folder = tmp_path / "data" / "test" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (20 * label, 90, 9 + 100 * number)).save(folder / f"{number}.png")
    save_file(create_backbone("cifar/resnet20").net.state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "data", tmp_path / "net.safetensors"


def test_memo_cifar(monkeypatch, capsys, tmp_path, places):
    small = ["--net=cifar/resnet20", "--domains", "clean", "contrast", "--function-set=builtin", "--images=4"]
    place = [f"--root={places[0]}", f"--weights={places[1]}", "--device=cpu"]
    text = run(monkeypatch, capsys, memo_cifar, *small, *place, f"--output={tmp_path / 'out.json'}")
    assert text.count("|") == 5 * len(memo_cifar.METHODS)
    assert (tmp_path / "out.json").exists()


def test_int8(monkeypatch, capsys, places):
    """The kinds that need no torchao; images of the test and training folders differ, so a mixed up folder is seen."""
    train = places[0] / "train"
    shutil.copytree(places[0] / "test", train)
    for path in train.rglob("*.png"):
        Image.effect_noise((32, 32), 80).convert("RGB").save(path)
    seen = []
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    monkeypatch.setitem(
        int8.KINDS, "static, FX", lambda net, images: seen.append(images) or int8.static_fx(net, images)
    )
    sizes = ["--images=20", "--batch=10", "--calibration=4", "--source-images=5"]
    sizes += ["--methods", "source", "norm", "output_shift"]
    place = [f"--root={places[0]}", f"--weights={places[1]}"]
    found = int8.main([*place, *sizes, "--domains=clean", "--function-set=builtin"])

    read = lambda path: to_dtype(pil_to_tensor(Image.open(path)), scale=True)  # noqa: E731
    in_train = [read(path) for path in train.rglob("*.png")]
    assert all(any(torch.allclose(image, other, atol=1e-6) for other in in_train) for image in seen[0])
    assert len(seen[0]) == 4
    net, wrong = create_backbone("cifar/resnet20", weights=places[1]).eval(), 0
    for label, folder in enumerate(sorted((places[0] / "test").iterdir())):
        with torch.no_grad():
            wrong += sum(int(net(read(path)[None]).argmax()) != label for path in folder.iterdir())
    assert found["clean", "float32", "source"] == 100 * wrong / 20

    refused = {(kind, name) for (_, kind, name), error in found.items() if error is None}
    assert refused == {("static, FX", "norm")}
    assert {kind for _, kind, _ in found} == set(int8.KINDS) - set(int8.OF_TORCHAO)
    text = capsys.readouterr().out
    assert "torchao is not installed" in text
    assert text.count("|\n") == 2 + 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min:UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in int8.KINDS if kind != "float32"])
def test_int8_nets_are_near_the_net_and_quantised(kind):
    if kind in int8.OF_TORCHAO:
        pytest.importorskip("torchao", reason="an extra of its own: pip install -e '.[int8]'")
    torch.manual_seed(0)
    net, images = create_backbone("cifar/resnet20").eval(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        exact = net(images)
    small = int8.KINDS[kind](net, images)
    with torch.no_grad():
        assert 1e-6 < (small(images) - exact).abs().max() / exact.std() < 0.2


def test_reasons(capsys, places):
    small = ["--net=cifar/resnet20", "--domains", "clean", "contrast", "--function-set=builtin", "--batch-size=5"]
    doubt, bank = reasons.main([*small, f"--root={places[0]}", f"--source-ckpt={places[1]}"])
    assert [row["factor"] for row in doubt] == list(reasons.FACTORS)
    lengths = torch.tensor([row["length"] / row["factor"] for row in doubt])
    torch.testing.assert_close(lengths, lengths[:1].expand(3))
    assert len({row["source"] for row in doubt}) == 1  # the same predictions, surer and surer
    assert sorted(row["confidence"] for row in doubt) == [row["confidence"] for row in reversed(doubt)]

    clean, contrast, mean = bank
    assert clean["earlier"] == 0
    assert contrast["earlier"] == 50  # 20 images, of which none is dropped
    assert clean["mistakes"] == clean["source"]  # so the bank has what the source gets wrong
    assert contrast["mistakes"] == (clean["source"] + contrast["source"]) / 2
    assert mean["t3a"] == (clean["t3a"] + contrast["t3a"]) / 2
    assert capsys.readouterr().out.count("|\n") == (2 + 3) + (2 + 3)


def test_come_mass(places, capsys):
    small = ["--net=cifar/resnet20", "--domains", "clean", "contrast", "--function-set=builtin", "--batch-size=5"]
    rows = come_mass.main([*small, f"--root={places[0]}", f"--source-ckpt={places[1]}", "--masses", "1e-9", "1e9"])
    assert [(row["factor"], row["mass"]) for row in rows] == [(f, m) for f in (1, 0.5) for m in (1e-9, 1e9)]
    for sure, unsure in (rows[:2], rows[2:]):
        assert (sure["uncertain"], unsure["uncertain"]) == (0, 100)
        assert sure["surer"] == 100
        assert sure["error_alone"] == sure["error"]  # all of them count
        assert unsure["surer"] < 100
    assert capsys.readouterr().out.count("|\n") == 2 + 4


def test_the_bank_is_the_packages_t3a_and_has_no_mistakes_when_told_the_labels():
    stream = [(make_images(12, seed), torch.arange(12) % 5, 0) for seed in range(3)]
    method, told = adapt(make_net("gn"), "t3a", filter_k=3), reasons.Bank(make_net("gn"), told=True)
    bank = reasons.Bank(make_net("gn"), size=3)
    for images, labels, domain in stream:
        torch.testing.assert_close(bank(images, labels, domain), method(images))
        told(images, labels, domain)
    assert len(bank.rows) <= 5 * 3
    assert bank.composition(domain=0)[0] > 0
    assert told.composition(domain=0) == [0, 0]
    assert told.composition(domain=1) == [0, 100]


def test_memo_leak(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(SourceClassifier("cifar/resnet20", 10))
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    small = ["--images=6", "--views=2", "--domains", "haze"]
    text = run(monkeypatch, capsys, memo_leak, f"--source-ckpt={tmp_path}", *small)
    assert "class-sorted" in text
    assert "shuffled" in text


def test_loading(monkeypatch, capsys):
    text = run(monkeypatch, capsys, loading, "--images=6", "--batch=4", "--workers=0", "--rounds=1")
    assert "1.00x" in text
    assert "ours" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["source", "tent"])
def test_memory_stays_flat(capsys, method):
    """40,000 samples: what each would add, if anything of it were kept, is far more than what is allowed here."""
    found = stream_memory.main(["--samples=40000", "--batch=100", f"--method={method}"])
    assert len(found) == 20
    (first, _), (last, _) = found[10], found[-1]
    growth = found[-1][1] - found[10][1]
    assert growth * 1e6 < 100 * (last - first)  # one kept logits row of ten classes with its Python object


def test_guard_on_digits(capsys, tmp_path):
    net = create_backbone("cifar/resnet20", 10)
    save_file(net.net.state_dict(), tmp_path / "net.safetensors")
    found = guard.main([f"--source-ckpt={tmp_path / 'net.safetensors'}", "--net=cifar/resnet20", "--images=4"])
    assert set(found) >= {"source", "tent at 20x", "zerosiam"}
    assert all(0 <= accuracy <= 100 for accuracy, _ in found.values())
    assert {alarms is None for name, (_, alarms) in found.items() if "window" not in name} == {True}


def test_alarms(capsys, places, tmp_path):
    kept = tmp_path / "logits.pt"
    small = [f"--source-ckpt={places[1]}", "--net=cifar/resnet20", "--images=12", "--clean=60", f"--logits={kept}"]
    alarms.main([*small, "--streams=10", "--repeats=2", "--domains", "contrast"])
    text = capsys.readouterr().out
    assert kept.exists()
    for name in alarms.FORMS:
        assert text.count(f"\n| {name} |") == 3  # false alarms, shuffled and sorted, and microseconds
    assert text.count("| contrast |") == 1
    rates = [float(rate) for rate in re.findall(r"\| label drift \| (\S+) \|", text)]
    assert len(rates) == 3
    assert all(0 <= rate <= 100 for rate in rates[:2])


def test_protected(capsys, places):
    small = [f"--source-ckpt={places[1]}", "--net=cifar/resnet20", "--images=12", "--clean=20", "--batch=8"]
    found = protected.main([*small, "--domains", "contrast", "--methods", "source", "poem", "tent+gate"])
    assert set(found) == {"source", "poem", "tent+gate"}
    assert all(set(errors) == {"clean", "contrast"} for errors in found.values())
    assert found["poem"] == found["source"]  # 12 and 20 images are fewer than are watched at first
    assert "%)" in capsys.readouterr().out


def test_choices_on_digits(capsys, tmp_path):
    small = ["--settings=1", "--streams", "iid", "--nets", "gn", "--images=60", "--batch=10", "--epochs=1"]
    small += [f"--keep={tmp_path}", "--labels", "5", "--draws=2", "--trial=4", "--longer", "5"]
    (found,) = choices.main(small).values()
    assert found["always source"]["worse"] == 0
    assert found["always source"]["source"] == 100
    assert min(each["regret"] for each in found.values()) >= 0
    assert found["chooser, 5 labels"]["accuracy"] <= 100
    (kept,) = tmp_path.glob("digits-gn-iid-0.pt")
    written = kept.stat().st_mtime_ns
    assert choices.main([*small, "--replay"]) == {"digits": found}
    assert kept.stat().st_mtime_ns == written
    assert found["most right of the trial"]["regret"] <= found["random"]["regret"]
    text = capsys.readouterr().out
    assert "| chooser, no label |" in text
    judged = re.findall(r"\| (\d) \| 1 \| [\d.]+ \| ([\d.]+|) \|", text)
    assert [number for number, regret in judged[:5]] == ["1", "2", "3", "4", "5"]
    assert [bool(regret) for number, regret in judged[:5]] == [False, False, False, True, True]


def test_consensus_by_hand():
    """Expectation maximization in loops; and the accuracies of classifiers that err independently are found."""
    rng = np.random.default_rng(0)
    truth, accuracies = rng.integers(0, 4, 400), [0.9, 0.7, 0.5]
    answers = np.stack(
        [np.where(rng.random(400) < a, truth, (truth + rng.integers(1, 4, 400)) % 4) for a in accuracies]
    )
    found = choices.dawid_skene(torch.from_numpy(answers[:, :30]), 4, rounds=3)
    belief = [[sum(votes == k for votes in answers[:, n]) / 3 for k in range(4)] for n in range(30)]
    for _ in range(3):
        right = [(sum(belief[n][answers[c, n]] for n in range(30)) + 0.5) / 31 for c in range(3)]
        shares = [(sum(each[k] for each in belief) + 1) / 34 for k in range(4)]
        new = []
        for n in range(30):
            odds = [
                shares[k] * math.prod(right[c] if answers[c, n] == k else (1 - right[c]) / 3 for c in range(3))
                for k in range(4)
            ]
            new.append([each / sum(odds) for each in odds])
        belief = new
    assert found.tolist() == pytest.approx([sum(belief[n][answers[c, n]] for n in range(30)) / 30 for c in range(3)])
    estimates = choices.dawid_skene(torch.from_numpy(answers), 4)
    assert estimates.tolist() == pytest.approx([(each == truth).mean() for each in answers], abs=0.06)


def test_estimates(capsys, tmp_path, places):
    """A method, the source and a collapse; a second call replays the runs."""
    for path in (places[0] / "test").rglob("*.png"):  # all different, so that images for the source are left over
        Image.effect_noise((32, 32), 80).convert("RGB").save(path)
    small = ["--domains", "contrast", "--function-set=builtin", "--images=8", "--source-images=12", "--batch=4"]
    small += [
        f"--root={places[0]}",
        f"--bn={places[1]}",
        f"--keep={tmp_path / 'runs'}",
        "--window=2",
        "--streams",
        "iid",
    ]
    small += ["--methods", "source", "tent", "tent x30"]
    table = estimates.main([*small, "--fit"])
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {f"bn.{each}.pt" for each in ("source_images", "iid.source", "iid.tent", "iid.tent x30")}
    assert set(table) == {*estimates.ESTIMATORS, "constant"}
    assert list(table["aetta"]) == ["iid", "source", "tent", "BatchNorm", "collapses", "all", "worst run"]
    assert all(0 <= figure <= 100 for figures in table.values() for figure in figures.values())
    assert "Weights: source" in capsys.readouterr().out
    assert estimates.main([*small, "--replay"]) == table


def test_weights_of_estimates_are_those_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([0.5, 1.0, -1.0, 2.0]).double()
    weights = estimates.fitted(list(zip(x.tolist(), y.tolist(), strict=True)))
    assert list(weights.values()) == pytest.approx([0.5, 1.0, -1.0, 2.0], abs=0.01)


def test_export(capsys, places):
    place = [f"--source-ckpt={places[1]}", "--net=cifar/resnet20", "--device=cpu"]
    found = export.main([*place, "--methods", "tent", "lame", "--images=24", "--batch=6", "--source-images=8"])
    assert found["tent"]["predict"] == found["tent"]["single"] == found["tent"]["exported"]
    assert "No plain net" in found["lame"]["exported"]
    assert "| tent |" in capsys.readouterr().out


def test_cost(capsys):
    found = cost.main(
        ["--methods", "norm", "tent", "eata", "t3a", "--batch-size=8", "--batches=2", "--source-images=8"]
    )
    assert {name: passes[:2] for name, (_, *passes) in found.items() if name != "eata"} == {
        "source": [1, 0],
        "norm": [1, 0],
        "tent": [1, 1],
        "t3a": [1, 0],
    }
    assert found["eata"][1] == 1
    assert "| source |" in (text := capsys.readouterr().out)
    assert " 1.00 |" in text


def test_a_checkout_is_as_fast_as_itself(capsys, monkeypatch):
    monkeypatch.setenv("BATCHES", "16")
    this = f"--against={overhead.ROOT}"
    ratios = overhead.main([this, "--nets", "resnet18", "--methods", "tent", "--repeats=2"])
    for kind in ("bare/tent", "bare/by_hand"):  # what the processes call with --bare
        call, images = overhead.build(kind)
        assert call(images).shape == (16, 10)
    ratios |= overhead.main([this, "--trainer", "--repeats=2"])
    assert ratios["this checkout, forward"] < 1  # without a backward pass: about a third of the processor time
    assert all(0.05 < ratio < 20 for ratio in ratios.values())  # a sign of life: the machine may be busy
    assert capsys.readouterr().out.count("| resnet18, tent |") == 1


def test_startup(capsys):
    only = ["--repeats=1", "--only", "python -c pass", "import lightning_tta"]
    table = startup.main([f"--against={startup.ROOT}", *only])
    assert set(table) == {"python -c pass", "import lightning_tta"}
    assert all(0 < value < 10 for values in table.values() for value in values.values())
    assert "| processor seconds | this | the other |" in capsys.readouterr().out


def test_gpu_at_smoke_size(capsys, tmp_path):
    account = gpu.main(["--smoke", "--device=cpu", f"--output={tmp_path / 'gpu.json'}"])
    assert not account.errors
    assert {*account.rows} == {*gpu.SECTIONS} - {"digits", "compiled"}
    assert account.left_out["digits: benchmark"] == "needs CUDA"
    assert account.rows["correct"]["tent"]["bits: two runs"] == "2 of 2"
    text = capsys.readouterr().out
    again = gpu.main(["--smoke", "--device=cpu", "--go-on", "--section=tent", f"--output={tmp_path / 'gpu.json'}"])
    assert again.rows.keys() == account.rows.keys()
    for table in (text, capsys.readouterr().out):
        assert "needs CUDA" in table
        assert "| tiny BN exact b4 |" in table


def test_a_case_that_fails_and_one_without_time_are_named(tmp_path):
    account = Account({"torch": torch.__version__}, budget=100, path=tmp_path / "a.json")
    account.run(Case("s", "bad", 1, lambda: 1 // 0))
    account.run(Case("s", "slow", 1000, dict))
    account.run(Case("s", "good", 1, lambda: {"ms": 2.0}))
    again = Account({}, path=tmp_path / "a.json")
    again.go_on()
    for one in (account, again):
        assert one.rows == {"s": {"good": {"ms": 2.0}}}
        assert "ZeroDivisionError" in one.errors["s: bad"][-1]
    assert "it may take 1000" in account.left_out["s: slow"]
    text = account.text()
    assert all(word in text for word in ("| good | 2 |", "ZeroDivisionError", "s: slow"))


def test_the_branches_for_a_gpu(monkeypatch, tmp_path):
    """As on a GPU, with a recorder for CPUs in the place of CUDA graphs; what it gives is no measurement."""
    pytest.importorskip("replay").use_tape(monkeypatch)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(Bench, "cuda", True)
    monkeypatch.setattr(by_hand, "Recorded", lambda step, x: step)
    monkeypatch.setattr(gpu_checks, "kernels_of", lambda step: (1, 0.1))
    monkeypatch.setattr(gpu_checks, "alone_row", dict)
    sections = ["tent", "zerosiam", "rivals", "waits", "correct"]
    account = gpu.main(["--device=cpu", f"--output={tmp_path / 'gpu.json'}", "--section", *sections])
    assert not account.errors
    assert {"floor, ms", "captured, ms", "captured / floor"} <= account.rows["tent"]["tiny BN exact b4"].keys()
    assert account.rows["correct"]["tent"]["recorded"] == 6
    assert account.rows["correct"]["tent"]["captured - plain, fp32"] < 1e-6


def test_auto_switch(capsys, places):
    place = [f"--root={places[0]}", f"--source-ckpt={places[1]}", "--net=cifar/resnet20"]
    found = auto_switch.main(
        [*place, "--function-set=builtin", "--domains", "contrast", "--images=8", "--batch=4", "--every", "1"]
    )
    assert len(found) == 5  # the source, three candidates, auto
    assert {len(errors) for errors in found.values()} == {4}  # of the parts and of all
    assert found["auto, every=1"][:1] == found["source"][:1]  # which answers as long as little was seen
    assert "| 4.0 / 2.0 |" not in (text := capsys.readouterr().out)
    assert "| auto, every=1 | " in text
    assert "source 100" in text


LONG = (
    {"answers": ["a", "b"] * 32 + ["a"] * 16, "accuracy": [1, 0] * 32 + [1] * 16}
    | {"entropy": [0.25] * 80}
    | {"norm": [2.0] * 80}
)
"""Of a stream of 80 prompts."""


def test_language_claim(capsys, tmp_path):
    small = ["--prompts=24", "--batch-size=8", "--seeds=2", "--rates", "1e-1", f"--keep={tmp_path / 'keep'}"]
    small += ["--methods", "source", "tent", "random predictor"]
    language_claim.main(small)
    text = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["source", "-"], ["tent", "1e-1"], ["random predictor", "1e-1"]]
    assert rows[0][4] != rows[1][4]  # entropy: the source never learns
    assert len(list((tmp_path / "keep").iterdir())) == 6
    language_claim.main([*small, f"--figure={tmp_path / 'curves.png'}"])  # from the files
    assert capsys.readouterr().out == text
    results = [{"method": "tent", "rate": "1e-1", "curves": language_claim.curves(LONG)} for _ in range(2)]
    (tmp_path / "claim.json").write_text(json.dumps({"runs": results}))
    language_claim.main([f"--drawn-from={tmp_path / 'claim.json'}", f"--figure={tmp_path / 'drawn.png'}"])
    assert (tmp_path / "drawn.png").stat().st_size > 5000
    assert results[0]["curves"] == {
        "prompts": [64, 80],
        "accuracy": [0.5, 0.625],
        "share": [0.5, 0.625],
        **{"entropy": [0.25] * 2, "norm": [2.0] * 2},
    }
    each = [{"whole": value} for value in (0.1, 0.3, 0.5, 0.7)]
    assert language_claim.cell(each, [0, 0, 1, 1], "whole", 100, 1) == "40.0 ± 28.3"  # of the nets' means, 20 and 60
    assert language_claim.cell(each, [0] * 4, "whole", 100, 1) == "40.0 [10.0, 70.0]"
    account = {"answers": ["1", "2", "2", "2"] * 2, "accuracy": [1, 0, 0, 0] * 2, "entropy": [0.5] * 8}
    account |= {"norm": [1.0, 2.0] * 4, "after": [1, 1, 0, 0]}
    found = language_claim.summary(account | {"prompt": [9.0] * 6 + [1.0, 2.0]})
    last = {"accuracy": 0.0, "entropy": 0.5, "norm": 1.5, "share": 1.0, "prompt": 1.5}
    assert found == {"whole": 0.25, "after": 0.5, **last}
    capsys.readouterr()
    language_claim.main([*small[:3], "--rates", "0.0", "--methods", "slot", "em_inf", "--prompt-loss"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["slot", "em_inf"]
    assert float(rows[0][-1].split()[0]) > 0
    assert "nan" in rows[1][-1]


def test_bn_statistics(capsys):
    few = ["--nets", "resnet18", "--methods", "tent", "--kinds", "ema", "balanced", "--batch=4", "--rounds=2"]
    ratios = bn_statistics.main(few)
    assert ratios["resnet18", "tent", "batch"] == 1
    assert set(ratios) == {("resnet18", "tent", kind) for kind in ("batch", "ema", "balanced")}
    assert ratios["resnet18", "tent", "balanced"] > 1.1  # one more pass
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "resnet18" in line]
    assert [row[6] for row in rows] == ["1", "1", "2"]


def test_forward_only(capsys):
    results = forward_only.main(["--smoke", "--epochs=1", "--images=128", "--source-images=64", "--shifts", "noise"])
    assert list(results) == list(forward_only.METHODS)
    assert {name: (result.forward, result.backward) for name, result in results.items() if name != "foa"} == {
        **dict.fromkeys(results.keys() - {"foa"}, (1, 0)),
        "tent": (1, 1),
        "pea, views: 1": (2, 0),
    }
    assert results["foa"].forward > 10
    assert set(results["source"].ratios) == {1}
    assert max(results["foa"].ratios) > max(results["tent"].ratios) > 1
    assert results["source"].state == 0
    assert results["neo, center: source"].state == results["output_shift"].state == 4 * 2 * 16 + 8  # means, a count
    assert results["tent"].state == 4 * 3 * 2 * 5 * 16 + 4 * 10  # five LayerNorms' parameters, their moments, steps
    assert results["pea, views: 1"].state > 4 * 2 * 3 * 16**2  # three matrices of each block
    assert results["source"].peak < results["tent"].peak  # which keeps what the backward pass needs
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == list(results)
    for cells, result in zip(rows, results.values(), strict=True):
        clean, noise = result.accuracy.values()
        assert cells[1:4] == [f"{clean:.1f}", f"{noise:.1f}", f"{noise:.1f}"]  # the mean of one shift
    with pytest.raises(SystemExit, match="--mnist FILE"):
        forward_only.main([])


def test_the_shifts_of_forward_only():
    images = torch.rand(6, 1, 28, 28)
    shifted = forward_only.shifts(images, seed=0)
    assert shifted["clean"] is images
    torch.testing.assert_close(shifted["contrast"].std(), 0.3 * images.std())
    torch.testing.assert_close(shifted["brightness"].mean(), 0.4 + 0.6 * images.mean())
    assert shifted["blur"].std() < 0.3 * images.std()
    assert 0.1 < (shifted["noise"] - images).std() < 0.4  # clipped
    assert all(0 <= value.min() and value.max() <= 1 for value in shifted.values())


def test_what_forward_only_counts_is_what_is_right(monkeypatch):
    """A net that reads the class off one pixel: all of it is right, and half where half of the labels are wrong."""
    monkeypatch.setattr(forward_only, "METHODS", {"source": ("source", {})})
    labels = torch.arange(10).repeat(2)
    images = F.one_hot(labels, 10).float()[:, None, None]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10))
    net[1].weight.data, net[1].bias.data = 9 * torch.eye(10), torch.zeros(10)
    wrong = torch.where(torch.arange(20) < 10, labels, (labels + 1) % 10)
    for truth, percent in ((labels, 100), (wrong, 50)):
        results = forward_only.run(net, {"clean": images}, truth, images, batch=5)
        assert results["source"].accuracy == {"clean": percent}


def test_tokens(capsys):
    small = ["--vocabularies=3000", "--tokens=32", "--width=16", "--methods", "zerosiam", "tlm", "--chunks=4"]
    found = tokens.main([*small, "--rounds=1", "--device=cpu"])
    assert set(found) == {
        (3000, "plain", 0),
        *((3000, name, chunk) for name in ("zerosiam", "tlm") for chunk in (4, 0)),
    }
    for name in ("zerosiam", "tlm"):
        assert found[3000, name, 4][1] < 0.6 * found[3000, name, 0][1]  # MB
    assert capsys.readouterr().out.count("| zerosiam |") == 2


def test_tokens_of_transformers_and_ways_of_lora(capsys):
    pytest.importorskip("transformers")
    small = ["--vocabularies=300", "--tokens=16", "--width=64", "--methods", "slot", "--chunks=4", "--net=llama"]
    assert (300, "slot", 4) in tokens.main([*small, "--rounds=1", "--device=cpu"])
    found = tokens.main(["--lora=40", "--lora-width=64", "--rounds=1", "--device=cpu"])
    assert len(found) == 4
    assert found[40, "no LoRA", 0] == (1, 1)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "anew" in line]
    assert [row[1] for row in rows] == ["-"]
