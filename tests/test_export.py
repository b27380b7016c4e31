"""Adapted weights without this package: the plain net gives the method's logits, or the file says what is lacking."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open

import lightning_tta
from contract import SUPPORTED, build, case_id
from lightning_tta import ConfigError, DataError, DigitsData, TestTimeAdaptation
from lightning_tta.backbones import Backbone, load_weights
from lightning_tta.cli.main import main
from lightning_tta.exporting import export_run
from lightning_tta.methods import Source, Tent
from lightning_tta.run.resume import StateKeeper
from nets import make_images, make_net, make_stream, without_running_statistics
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
LEAVES_THE_NET = {
    *("source", "norm", "lame", "t3a", "memo", "view_averaging", "zero", "single_image_bn"),
}


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def adapted(case):
    method = build(*case)
    for images in make_stream(3):
        method(images)
    return method


def leaves_the_net(case):
    return case[0] in LEAVES_THE_NET or (case[0] == "meta_ttt" and case[1].get("episodic", True))


EXPORTED = [case for case in SUPPORTED if not leaves_the_net(case)]
REFUSED = [case for case in SUPPORTED if leaves_the_net(case) and case[2] in ("bn", "gn")]


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case_id(*case))
def test_plain_net_predicts_as_the_method(tmp_path, case):
    method = adapted(case)
    path = lightning_tta.export(method, tmp_path / "adapted.safetensors")
    net, images = make_net(case[2], seed=9), make_images(4, seed=77)
    load_weights(net, path)
    said = metadata(path)
    assert said["method"] == case[0]
    assert json.loads(said["options"]).items() >= case[1].items()
    assert said["lacks"] == method.lacks
    if case[0] == "meta_ttt":
        assert "mixes" in said["lacks"]
        return
    if case[0] == "cotta":  # sure enough for one pass
        assert "views" in said["lacks"]
        method.anchor_threshold = 0.0
    if "test batch" in said["lacks"]:
        assert case[2] in ("bn", "user")
        with torch.no_grad():
            assert not torch.allclose(net(images), method.predict(images), atol=1e-3)
        net = without_running_statistics(net)
    else:
        assert case[2] in ("gn", "ln")
    with torch.no_grad():
        assert torch.allclose(net(images), method.predict(images), atol=1e-5)
        assert not torch.allclose(make_net(case[2])(images), net(images), atol=1e-4)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case_id(*case))
def test_no_adapted_weights(tmp_path, case):
    with pytest.raises(ConfigError, match=f"'{case[0]}' has no adapted weights"):
        lightning_tta.export(adapted(case), tmp_path / "adapted.safetensors")
    assert not list(tmp_path.iterdir())


def test_half_precision_and_backbone(tmp_path):
    net = Backbone(make_net("gn"), mean=[0.4] * 3, std=[0.3] * 3)
    method = lightning_tta.adapt(net, "cotta", lr=1e-2, views=2).bfloat16()
    for images in make_stream(2):
        method(images)
    lightning_tta.export(method, tmp_path / "a.safetensors")
    method.anchor_threshold = 0.0
    other = Backbone(make_net("gn", seed=3), mean=[0.4] * 3, std=[0.3] * 3).bfloat16()
    load_weights(other, tmp_path / "a.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in other.state_dict().values())
    images = make_images(4, seed=5)
    with torch.no_grad():
        assert torch.equal(other(images.bfloat16()).float(), method.predict(images))


def test_program(tmp_path):
    method = adapted(("tent", {"lr": 1e-2}, "gn"))
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    path = lightning_tta.export(method, tmp_path / "a.pt2", format="torch_export", images=make_images(2))
    images = make_images(5, seed=3)
    assert torch.allclose(torch.export.load(path).module()(images), method.predict(images), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    method(images)  # still adapts
    assert not torch.equal(method.model.state_dict()["norm1.bias"], before["norm1.bias"])


def test_wrong_arguments(tmp_path):
    method = adapted(("tent", {}, "gn"))
    with pytest.raises(ConfigError, match="images"):
        lightning_tta.export(method, tmp_path / "a.pt2", format="torch_export")
    with pytest.raises(ConfigError, match="onnx"):
        lightning_tta.export(method, tmp_path / "a.onnx", format="onnx")
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        lightning_tta.export(method, tmp_path / "a.pth")


def predict(root, method, **options):
    module = TestTimeAdaptation(method, backbone=make_net("gn", num_classes=10))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": root}
    trainer = Trainer(**quiet, callbacks=[StateKeeper(**options)])
    trainer.predict(module, datamodule=DigitsData(domains=["contrast"], num_images=40, batch_size=16))
    return module


def test_one_of_several_processes(tmp_path, capsys):
    module = predict(tmp_path / "run", partial(Tent, lr=1e-2), save_every=100)
    place, output = module.run.directory.path, tmp_path / "adapted.safetensors"
    state = place / "final_state.pt"
    with pytest.raises(ConfigError, match=r"final_state.pt, last on 'contrast' \(without --process\)"):
        export_run(place, output, process=0)
    saved = torch.load(state)
    saved["position"] = [None, 0]
    torch.save(saved, state.with_name("final_state.rank1.pt"))
    state.rename(state.with_name("final_state.rank0.pt"))
    with pytest.raises(SystemExit):
        main(["export", str(place), f"--output={output}"])
    said = capsys.readouterr().err
    assert "rank0.pt, last on 'contrast' (--process 0); final_state.rank1.pt, as it began (--process 1)" in said
    main(["export", str(place), f"--output={output}", "--process=0"])
    net, images = make_net("gn", num_classes=10, seed=5), make_images(4)
    load_weights(net, output)
    with torch.no_grad():
        assert torch.allclose(net(images), module.method.predict(images), atol=1e-6)


def test_command(tmp_path, capsys):
    method = partial(Tent, lr=1e-2)
    module = predict(tmp_path / "run", method, save_every=100)
    output = tmp_path / "made" / "adapted.safetensors"
    main(["export", str(module.run.directory.path), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    net, images = make_net("gn", num_classes=10, seed=5), make_images(4)
    load_weights(net, output)
    with torch.no_grad():
        assert torch.allclose(net(images), module.method.predict(images), atol=1e-6)
    predict(tmp_path / "none", method)
    predict(tmp_path / "source", Source, save_every=1)
    for run, words in (("none", "--state.save_every"), ("source", "no adapted weights")):
        with pytest.raises(SystemExit):
            main(["export", str(directory_of(tmp_path / run)), f"--output={tmp_path / 'x.safetensors'}"])
        assert words in capsys.readouterr().err
    with pytest.raises(DataError, match="no saved state"):
        export_run(tmp_path / "nowhere", output)
    output.unlink()
    main(["export", str(tmp_path / "run"), "--output", str(output)])  # the only run in there
    assert output.is_file()
    predict(tmp_path / "run", partial(Tent, lr=2e-2), save_every=100)
    with pytest.raises(ConfigError, match=r"Say which run of .*tent-.*, tent-"):
        export_run(tmp_path / "run", output)
