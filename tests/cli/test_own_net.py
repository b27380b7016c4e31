"""A net of the user's own on the command line: trained, evaluated, adapted, and refused where it does not fit."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from lightning_tta import ConfigError, WeightsError, create_backbone
from lightning_tta.cli.main import main
from lightning_tta.modules.loading import load_source

CONFIGS = Path(__file__).parents[2] / "configs/digits"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.logger.init_args.save_dir=runs"]
FIT = ["fit", f"--config={CONFIGS}/source.yaml", *QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
PREDICT = ["predict", f"--config={CONFIGS}/predict.yaml", *QUIET, "--data.num_images=20", "--data.domains=[haze]"]
NET = """
import os
import torch
from torch import nn
from lightning.pytorch import LightningModule
from lightning_tta import Backbone


class MyNet(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, x):
        return self.layers(x)


def make_net(num_classes, width=4):
    return MyNet(num_classes, width)


def make_backbone():
    return Backbone(MyNet(), [0.4, 0.5, 0.6], [0.2])


def make_number(num_classes):
    return 3


class Lit(LightningModule):
    def __init__(self, width=4, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = MyNet(10, self.hparams.width)

    def forward(self, x):
        return self.net(x)


class Counted(Lit):
    def __init__(self, num_classes=3, width=4, lr=0.1):
        super().__init__(width, lr)


class Text:
    pass
"""
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*instantiate_classes", "ignore:.*LeafSpec", "ignore:.*many workers"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with a file of nets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != ""])
    (tmp_path / "my_net.py").write_text(NET)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def refused(capsys, args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def test_fit_validate_and_predict(folder, capsys, recwarn):
    main([*FIT, "--model.backbone=my_net.MyNet", "--model.backbone_options={width: 6, mean: [0.5], std: [0.25]}"])
    net = load_source("runs/source")
    assert (net.name, net.num_classes, net.net.layers[0].out_channels) == ("my_net.MyNet", 10, 6)
    assert net.preprocessing["mean"] == [0.5] * 3
    assert net.class_names == [str(digit) for digit in range(10)]
    validate = ["validate", *FIT[1:-1], "--ckpt_path=runs/source", "--model.backbone=my_net.MyNet"]
    main([*validate, "--model.backbone_options={width: 6, mean: [0.5], std: [0.25]}"])
    said = refused(capsys, [*validate, "--model.backbone_options={width: 6}"])
    assert re.search(r"checkpoint is of a net with .*'mean': \[0.5.*this one has .*'mean': \[0.0", said)
    main([*PREDICT, "--model.source_ckpt=runs/source", "--model.method=tent"])  # the checkpoint is enough
    assert len(list(folder.glob("runs/predict/*/report.json"))) == 1
    assert not [str(w.message) for w in recwarn if re.search("random|mean and std", str(w.message))]


@pytest.mark.parametrize("name", ["my_net:MyNet", "my_net.make_net", "my_net.py:MyNet", "nets/other.py:make_net"])
def test_forms_of_a_name(folder, name):
    (folder / "nets").mkdir()
    (folder / "nets/other.py").write_text(NET)
    net = create_backbone(name, 7, width=5)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    again = create_backbone(**net.config)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(torch.ones(1, 3, 32, 32)), net.eval()(torch.ones(1, 3, 32, 32)))


def test_a_class_with_its_arguments_as_in_a_configuration(folder):
    model = '{"class_path": "my_net.MyNet", "init_args": {"width": 6}}'
    main([*FIT, f"--model.backbone={model}"])
    assert load_source("runs/source").config["width"] == 6


def test_a_lightning_module_gives_the_logits():
    main([*FIT, "--model.backbone=my_net.Lit", "--model.backbone_options={width: 6}"])
    net = load_source("runs/source")
    assert net.net.hparams == {"width": 6, "lr": 0.1}
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_backbone_is_taken_as_it_is():
    net = create_backbone("my_net.make_backbone")
    assert net.preprocessing["mean"] == [0.4, 0.5, 0.6]
    assert create_backbone(**net.config).preprocessing == net.preprocessing


def test_a_checkpoint_without_its_class(capsys, folder):
    main([*FIT, "--model.backbone=my_net.MyNet"])
    (folder / "my_net.py").unlink()
    sys.modules.pop("my_net")
    said = refused(capsys, [*PREDICT, "--model.source_ckpt=runs/source", "--model.method=tent"])
    assert re.search("is of the net my_net.MyNet, which is missing.*No module named 'my_net'.*folder of the file", said)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_net.MyNte", "has no 'MyNte'. Did you mean MyNet"),
        ("my_nte.MyNet", "No module named 'my_nte'"),
        ("nowhere.py:MyNet", "nowhere.py is no file"),
        ("my_net.Text", "a class that is no torch.nn.Module"),
        ("my_net.make_number", "made a int"),
        ("my_net.os.system", "my_net.os.system"),
        ("os.system", "standard library"),
        ("subprocess.Popen", "standard library"),
        ("torch.hub.load", "a function of torch, some of which run text"),
        ("numpy.f2py.run_main", "Allowed: a subclass of torch.nn.Module"),
        ("builtins.exec", "standard library"),
    ],
)
def test_names_that_are_no_net(name, words):
    with pytest.raises(ConfigError, match=words):
        create_backbone(name, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])", "cannot be imported: SystemExit: 2"),
        ("from torch import nn\nclass Net(nn.Module):\n    def __init__(self): exit(4)", "cannot be built .* 4"),
        ("from torch import nn\nclass Nat(nn.Module): pass", "has no .Net.*Nets there: Nat[.]"),
        ("from .parts import Net", r"Name it as nets\.own:Net"),
    ],
)
def test_a_file_that_ends_the_program_or_has_no_such_net(folder, capsys, text, words):
    (folder / "nets").mkdir()
    (folder / "nets/own.py").write_text(text)
    net = ["--model.source_ckpt=none", "--model.backbone=nets/own.py:Net"]
    error = refused(capsys, [*PREDICT, *net, "--model.method=tent"])
    assert re.search(words, error)


def of_own_net(name, place, **options):
    net = create_backbone("my_net.MyNet")
    place.parent.mkdir(parents=True, exist_ok=True)
    state = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "lightning_tta": {"backbone": {"name": name, **options}}}, place)


@pytest.mark.parametrize("name", ["got/theirs.py:MyNet", "got.theirs.MyNet", "got/code/theirs.py:MyNet"])
def test_code_that_came_with_a_checkpoint_is_not_run(folder, name):
    of_own_net(name, folder / "got/runs/best.ckpt")
    for place in ("theirs.py", "code/theirs.py"):
        (folder / "got" / place).parent.mkdir(exist_ok=True)
        (folder / "got" / place).write_text("open('pwned', 'w')\nfrom my_net import MyNet")
    with pytest.raises(ConfigError, match=r"lies beside it .* --model.backbone got"):
        load_source("got/runs/best.ckpt")
    assert not (folder / "pwned").exists()
    with warnings.catch_warnings(action="ignore"):
        load_source("got/runs/best.ckpt", name)
    assert (folder / "pwned").exists()
    with warnings.catch_warnings(action="ignore"):
        of_own_net("my_net.py:MyNet", folder / "runs/best.ckpt")
        load_source("runs/best.ckpt")  # one's own net, in the folder where one works


def test_functions_of_torch_are_not_called(folder):
    code = {"body": {"_code": "def forward(self, x): return x\n"}, "import_block": "open('pwned', 'w')\n"}
    name = "torch.fx.graph_module.reduce_graph_module"
    of_own_net(name, folder / "best.ckpt", **code)
    with pytest.raises(WeightsError, match="is a function of torch"):
        load_source("best.ckpt")
    with pytest.raises(ConfigError, match="is a function of torch"):
        create_backbone(name, **code)
    assert not (folder / "pwned").exists()


def test_options_that_the_class_has_not(capsys):
    assert "has no 'MyNte'. Did you mean MyNet" in refused(capsys, [*FIT, "--model.backbone=my_net.MyNte"])
    said = refused(capsys, [*FIT, "--model.backbone=my_net.MyNet", "--model.backbone_options={widht: 3}"])
    assert "my_net.MyNet has no option 'widht'. Did you mean width" in said


def test_weights_of_ones_own_training(folder, capsys):
    """A checkpoint of a user's LightningModule: into the plain net by its prefix, or into the module itself."""
    sys.path.append(str(folder))
    from my_net import Lit

    lit = Lit(width=6)
    checkpoint = {"state_dict": lit.state_dict(), "hyper_parameters": dict(lit.hparams), "epoch": 3}
    torch.save(checkpoint, "theirs.ckpt")
    images = torch.rand(2, 3, 32, 32)
    with pytest.warns(
        UserWarning, match=r"With which mean and std was my_net.MyNet trained.*Backbone\(net, mean, std\)"
    ):
        plain = load_source("theirs.ckpt", "my_net.MyNet", 10, backbone_options={"width": 6})
    assert torch.equal(plain.eval()(images), lit.eval()(images))
    normalized = {"mean": [0.5], "std": [0.25]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load_source("theirs.ckpt", "my_net.Lit", backbone_options=normalized)  # its width is in the file
    assert torch.equal(whole.eval()(images), lit((images - 0.5) / 0.25))
    torch.save({**checkpoint, "hyper_parameters": {"num_classes": 10, **lit.hparams}}, "counted.ckpt")
    counted = load_source("counted.ckpt", "my_net.Counted", 10, backbone_options=normalized)
    assert torch.equal(counted.eval()(images), whole(images))
    torch.save({**checkpoint, "hyper_parameters": {"cls": Lit}}, "code.ckpt")
    said = refused(
        capsys, [*PREDICT, "--model.source_ckpt=code.ckpt", "--model.backbone=my_net.MyNet", "--model.method=tent"]
    )
    assert re.search("code would have to run.*save its state dict alone", said)


def test_a_plain_state_dict_of_torchvision(folder, recwarn):
    net = nn.DataParallel(resnet18(num_classes=10))
    torch.save(net.state_dict(), "w.pth")
    args = ["--model.backbone=torchvision/resnet18", "--model.source_ckpt=w.pth", "--model.num_classes=10"]
    main([*PREDICT, *args, "--model.method=norm"])
    loaded = load_source("w.pth", "torchvision/resnet18", 10)
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), net.module.parameters(), strict=True))


def test_numbers_of_classes(capsys):
    said = refused(capsys, [*FIT, "--model.backbone=my_net.MyNet", "--model.num_classes=7"])
    assert re.search("10 classes, 7 logits.*without a logit: 7, 8, 9. Set --model.num_classes 10", said)
    torch.save(create_backbone("my_net.MyNet", 7).net.state_dict(), "seven.pt")
    net = ["--model.backbone=my_net.MyNet", "--model.source_ckpt=seven.pt", "--model.num_classes=7"]
    said = refused(capsys, [*PREDICT, *net, "--model.method=tent", "--model.backbone_options={mean: [0], std: [1]}"])
    assert "10 classes, 7 logits" in said
    assert not list(Path("runs").glob("predict/*/predictions.csv"))
    with pytest.warns(UserWarning, match="10 classes, 12 logits"):
        main([*FIT, "--model.backbone=my_net.MyNet", "--model.num_classes=12"])


def test_random_weights_are_said(capsys):
    net = ["--model.backbone=my_net.MyNet"]
    for stage in ("validate", "test"):
        with pytest.warns(UserWarning, match=f"weights are random: {stage}.*--ckpt_path"):
            main([stage, *FIT[1:4], *net, "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"])
    assert "No source weights" in refused(capsys, [*PREDICT, *net, "--model.method=tent"])
    given = '--model.backbone={"class_path": "my_net.MyNet"}'
    assert "No source weights" in refused(capsys, [*PREDICT, given, "--model.method=tent"])
    with pytest.warns(UserWarning, match="randomly initialised"):
        main([*PREDICT, *net, "--model.source_ckpt=none", "--model.method=norm"])


def test_options_of_another_stage(capsys):
    said = refused(capsys, ["validate", *FIT[1:], "--model.source_ckpt=runs/source"])
    assert re.search("--model.source_ckpt is an option of TestTimeAdaptation.*--ckpt_path PATH", said)
    assert "--state.save_every is an option of lightning-tta predict" in refused(capsys, [*FIT, "--state.save_every=3"])
    said = refused(capsys, [*FIT, "--model.num_class=3"])
    assert "SourceClassifier has no option 'num_class'. Did you mean num_classes" in said
    assert "Did you mean state.save_every" in refused(capsys, [*PREDICT, "--state.sav_every=3"])
    Path("empty").mkdir()
    assert "--ckpt_path='empty' holds no best.ckpt" in refused(capsys, ["validate", *FIT[1:], "--ckpt_path=empty"])
    assert "no last.ckpt" in refused(capsys, [*FIT, "--ckpt_path=empty"])
