"""Adapted nets without this package: the plain net predicts as the method does, or the export is refused."""

import json
import warnings
from functools import partial

import onnxruntime
import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from torch import nn

import lightning_tta
from contract import SUPPORTED, build, case_id
from lightning_tta import ConfigError, DataError, DigitsData, TestTimeAdaptation, UnsupportedModelError, adapt
from lightning_tta.backbones import Backbone, create_backbone
from lightning_tta.cli.main import main
from lightning_tta.exporting import export_run
from lightning_tta.methods import Source, Tent
from lightning_tta.run.resume import StateKeeper
from nets import make_images, make_net, make_stream, max_difference
from runs import directory_of

pytestmark = pytest.mark.usefixtures("one_thread")
NO_PLAIN_NET = {
    "lame",
    "adanpc",
    "memo",
    "view_averaging",
    "zero",
    "single_image_bn",
    "meta_ttt",
    "foa",
    "pea",
    "eco_tta",
    "rmt",
    "psmt",
    "itta",
}
REFUSED = [case for case in SUPPORTED if case[0] in NO_PLAIN_NET or (case[0] == "note" and case[2] in ("bn", "user"))]
EXPORTED = [case for case in SUPPORTED if case not in REFUSED]


def metadata(path):
    with safe_open(path, "pt") as file:
        return {
            name: value if name in ("method", "lightning_tta") else json.loads(value)
            for name, value in file.metadata().items()
        }


def adapted(case, **options):
    method = build(*case, **options)
    for images in make_stream(3):
        method(images)
    return method


# Every method, every net ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case_id(*case))
def test_plain_net_predicts_as_the_method(case):
    torch.manual_seed(0)
    frozen = (
        "conv1.weight" if case[2] in ("bn", "gn") else "patches.weight" if case[2] in ("ln", "vit") else "decide.bias"
    )
    net = make_net(case[2])
    net.get_parameter(frozen).requires_grad_(False)
    method = adapted(case, net=net)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items() if isinstance(tensor, torch.Tensor)}
    plain, images = method.export(), make_images(4, seed=77)
    assert type(plain) is type(net)
    assert plain.state_dict().keys() == make_net(case[2]).state_dict().keys()
    assert not any(module.training or module._forward_hooks for module in plain.modules())
    assert {name for name, p in plain.named_parameters() if not p.requires_grad} == {frozen}
    with torch.no_grad():
        assert max_difference(plain(images), method.predict(images)) < 1e-5
        alone = torch.cat([method.predict(image[None]) for image in images])
        assert max_difference(alone, method.predict(images)) < 1e-5
        if case[0] != "source":
            assert not torch.allclose(make_net(case[2])(images), plain(images), atol=1e-4)
    assert all(torch.equal(method.state_dict()[name], tensor) for name, tensor in before.items())


def test_cotta_says_that_its_views_are_lost():
    for threshold, number in ((0.5, 1), (0.0, 0)):
        method = adapted(("cotta", {"views": 2, "anchor_threshold": threshold}, "gn"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.export()
        assert ["views" in str(warning.message) for warning in caught] == [True] * number


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case_id(*case))
def test_no_plain_net(tmp_path, case):
    with pytest.raises(UnsupportedModelError, match=f"No plain net predicts as '{case[0]}' does: .*'(norm|neo|cotta)'"):
        lightning_tta.save(adapted(case), tmp_path / "adapted.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_nets_are_refused():
    method = adapt(make_net("bn"), "tent")
    with pytest.raises(ConfigError, match=r"seen no batch.*Stream some"):
        method.export()
    method(make_images(4))
    method.export()
    method.reset()
    with pytest.raises(ConfigError, match="seen no batch"):
        method.export()
    adapt(make_net("gn"), "tent").export()  # nothing of the stream is lacking

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1))
    method = adapt(nn.Sequential(net, nn.Flatten(), nn.Linear(4, 3)), "tent")
    for images in make_stream(2):
        method(images)
    assert max_difference(method.predict(images)[:1], method.predict(images[:1])) < 1e-6
    with pytest.raises(UnsupportedModelError, match=r"'0\.1' keeps no running statistics.*track_running_stats=True"):
        method.export()


class Tied(nn.Module):
    """Two linear layers with one weight, GroupNorm between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(12, 12), nn.GroupNorm(2, 12), nn.Linear(12, 12)
        self.head.weight = self.first.weight

    def forward(self, x):
        return self.head(self.norm(self.first(x.mean(3).flatten(1)[:, :12])))


def test_tied_weights(tmp_path):
    method = adapt(Tied().eval(), "cotta", lr=0.1, anchor_threshold=0.0)
    for images in make_stream(3):
        method(images)
    plain = method.export()
    assert plain.head.weight is plain.first.weight
    lightning_tta.save(method, tmp_path / "a.safetensors")
    other = Tied().eval()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert max_difference(other(images).detach(), method.predict(images)) < 1e-6
    with pytest.raises(UnsupportedModelError, match="last linear layer, whose weight is shared"):
        adapted(("t3a", {}, "gn"), net=Tied().eval()).export()


# Files ---------------------------------------------------------------------------------------------------------------


def test_weights_files(tmp_path):
    from torchvision.models import resnet18

    net = Backbone(resnet18(num_classes=7).eval(), mean=[0.4] * 3, std=[0.3] * 3)
    method, images = adapt(net, "tent", lr=0.01), make_images(6, size=32)
    for size in (6, 1, 5):
        method(make_images(size, seed=size, size=32))
    names = list("abcdefg")
    lightning_tta.save(method, tmp_path / "made" / "a.safetensors", class_names=names, stream={"camera": 3})
    lightning_tta.save(method, tmp_path / "a.pth")
    said = metadata(tmp_path / "made" / "a.safetensors")
    assert said["method"] == "tent"
    assert (said["options"]["lr"], said["class_names"], said["stream"]) == (0.01, names, {"camera": 3})
    assert said["mean"] == pytest.approx([0.4] * 3)
    expected = method.predict(images)
    for state in (
        safetensors.torch.load_file(tmp_path / "made" / "a.safetensors"),
        torch.load(tmp_path / "a.pth", weights_only=True),
    ):
        plain = resnet18(num_classes=7)
        plain.load_state_dict(state)  # strict
        assert max_difference(plain.eval()((images - 0.4) / 0.3).detach(), expected) < 1e-5
        assert plain.bn1.num_batches_tracked == 0


def test_half_precision(tmp_path):
    net = make_net("bn").bfloat16()
    method = adapt(net, "tent", lr=1e-2)
    for images in make_stream(3):
        method(images)
    lightning_tta.save(method, tmp_path / "a.safetensors")
    plain = make_net("bn", seed=3).bfloat16()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert max_difference(plain(images.bfloat16()).float().detach(), method.predict(images)) < 0.05
    assert all(value.dtype == torch.bfloat16 for value in plain.state_dict().values() if value.is_floating_point())
    lightning_tta.save(method, tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert max_difference(program(images), method.predict(images)) < 0.05


def test_programs(tmp_path):
    method = adapt(Backbone(make_net("bn"), mean=[0.4] * 3, std=[0.3] * 3), "zerosiam", lr=0.1)
    for images in make_stream(3):
        method(images)
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    program = torch.export.load(lightning_tta.save(method, tmp_path / "a.pt2")).module()
    path = lightning_tta.save(method, tmp_path / "a.onnx", images=make_images(2))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["options"])["lr"] == 0.1
    for number in (1, 2, 7):
        images = make_images(number, seed=number)
        expected = method.predict(images)
        assert max_difference(program(images), expected) < 1e-5
        (logits,) = session.run(None, {"images": images.numpy()})
        assert max_difference(torch.from_numpy(logits), expected) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    assert not torch.equal(method(images), expected)  # still adapts


class Branch(nn.Module):
    """A net that looks at its pixels."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.norm(x).mean((2, 3)) if x.mean() > 0.5 else x.mean((2, 3)))


def test_what_cannot_be_a_program(tmp_path):
    method = adapt(Branch(), "source")
    with pytest.raises(ConfigError, match=r"Give an example: images="):
        lightning_tta.save(method, tmp_path / "a.onnx")
    method(make_images(4))
    with pytest.raises(UnsupportedModelError, match=r"Branch cannot be written as pt2: \w+: .*\.safetensors"):
        lightning_tta.save(method, tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match=r"\.onnx; got .*a\.pkl"):
        lightning_tta.save(method, tmp_path / "a.pkl")
    with pytest.raises(ConfigError, match="torch_export"):
        lightning_tta.save(method, tmp_path / "a.pt2", format="torch_export")
    method.predict = lambda x: torch.zeros(len(x), 4)
    method.model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with pytest.raises(UnsupportedModelError, match=r"differ by .* of the largest one, allowed is 1e-04"):
        lightning_tta.save(method, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())


# Runs ----------------------------------------------------------------------------------------------------------------


TENT = partial(Tent, lr=1e-2)


def predict(root, method=TENT, *callbacks, **model):
    module = TestTimeAdaptation(method, **(model or {"backbone": make_net("gn", num_classes=10)}))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": root}
    trainer = Trainer(**quiet, callbacks=list(callbacks))
    trainer.predict(module, datamodule=DigitsData(domains=["contrast"], num_images=40, batch_size=16))
    return module


def weights_file(root):
    path = root / "source.safetensors"
    safetensors.torch.save_file(create_backbone("timm/test_resnet", 10).net.state_dict(), path)
    return str(path)


def test_any_finished_run(tmp_path, capsys):
    weights = {"source_ckpt": weights_file(tmp_path), "backbone": "timm/test_resnet", "num_classes": 10}
    module = predict(tmp_path / "run", **weights)
    place, output = module.run.directory.path, tmp_path / "made" / "adapted.safetensors"
    assert not list(place.glob("state*.pt"))
    main(["export", str(tmp_path / "run"), "--output", str(output)])  # the only run in there
    assert str(output) in capsys.readouterr().out
    plain, images = create_backbone("timm/test_resnet", 10), make_images(4, size=32)
    plain.net.load_state_dict(safetensors.torch.load_file(output))
    expected = module.method.predict(images)
    assert max_difference(plain.eval()(images).detach(), expected) < 1e-5
    said = metadata(output)
    assert (said["method"], said["options"]["lr"]) == ("tent", 1e-2)
    assert said["class_names"] == [str(digit) for digit in range(10)]
    assert said["stream"]["domains"] == ["contrast"]
    export_run(place, tmp_path / "a.pt2")  # the run knows the size of its images
    size = module.method.image_shape
    images = torch.rand(2, *size)
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert max_difference(program(images), module.method.predict(images)) < 1e-5
    predict(tmp_path / "run", partial(Tent, lr=2e-2), **weights)
    with pytest.raises(ConfigError, match=r"Say which run of .*tent-.*, .*tent-"):
        export_run(tmp_path / "run", output)
    with pytest.raises(ConfigError, match=r"Say which run of .*tent-.*, .*tent-"):
        export_run(tmp_path, output)  # further above
    weights_file(tmp_path)  # others
    with pytest.raises(DataError, match="no longer those"):
        export_run(place, output)


def test_what_a_run_cannot_export(tmp_path, capsys):
    module = predict(tmp_path / "own")
    output = tmp_path / "a.safetensors"
    place = directory_of(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"a net or a method of your own.*build="):
        export_run(place, output)
    export_run(place, output, build=lambda _: Tent(make_net("gn", num_classes=10)))
    plain, images = make_net("gn", num_classes=10, seed=4), make_images(4)
    plain.load_state_dict(safetensors.torch.load_file(output))
    assert max_difference(plain(images).detach(), module.method.predict(images)) < 1e-6
    with pytest.raises(DataError, match="no longer those"):
        export_run(place, output, build=lambda _: Tent(make_net("gn", num_classes=10, seed=1)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no saved state.*--state\.resume restart"):
        export_run(tmp_path / "empty", output)
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        export_run(tmp_path / "nowhere", output)


def test_one_of_several_processes(tmp_path, capsys):
    weights = {"source_ckpt": weights_file(tmp_path), "backbone": "timm/test_resnet", "num_classes": 10}
    module = predict(tmp_path / "run", **weights)
    place, output = module.run.directory.path, tmp_path / "adapted.pt"
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
    assert torch.load(output)["bn1.weight"].shape == module.method.model.net.bn1.weight.shape


def test_a_run_of_a_net_by_class(tmp_path):
    """The configuration of a run on the command line knows the net that the state cannot name."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    args = ["--data=DigitsData", "--data.domains=[contrast]", "--data.num_images=32", "--data.batch_size=16"]
    args += [f"--model.source_ckpt={tmp_path / 'w.safetensors'}", "--model.backbone=torchvision.models.ResNet"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    place = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    plain = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "w.safetensors")
    options = ["--model.backbone.block=torchvision.models.resnet.BasicBlock", "--model.backbone.layers=[1,1,1,1]"]
    options += ["--model.backbone.num_classes=10", "--trainer.logger=false"]
    main(["predict", "--model.method=norm", *args, *options, *quiet, place])
    main(["export", str(tmp_path / "runs"), f"--output={tmp_path / 'a.safetensors'}"])
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    source = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(plain.conv1.weight, source["conv1.weight"])
    assert not torch.equal(plain.bn1.running_mean, source["bn1.running_mean"])


def test_an_unfinished_run(tmp_path):
    """What was saved on the way has all that a run needs to go on; the net is in it as it was then."""
    weights = {"source_ckpt": weights_file(tmp_path), "backbone": "timm/test_resnet", "num_classes": 10}
    place = directory_of_states(tmp_path / "run", weights)
    export_run(place, tmp_path / "a.safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    saved = torch.load(place / "state.pt")["method"]
    assert torch.equal(found["bn1.weight"], saved["model.net.bn1.weight"])
    assert not torch.equal(found["bn1.running_mean"], saved["model.net.bn1.running_mean"])


def directory_of_states(root, weights):
    """A run that was stopped after two of its three batches."""

    class Stop(Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        predict(root, TENT, StateKeeper(save_every=2), Stop(), **weights)
    return directory_of(root)


def test_the_source_too(tmp_path):
    weights = {"source_ckpt": weights_file(tmp_path), "backbone": "timm/test_resnet", "num_classes": 10}
    predict(tmp_path / "run", Source, **weights)
    export_run(tmp_path / "run", tmp_path / "a.safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    source = safetensors.torch.load_file(weights["source_ckpt"])
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], value) for name, value in source.items())
