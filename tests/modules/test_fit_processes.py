"""Training on two processes is training on one with the joined batches."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tta import MetaTTT, SourceClassifier
from lightning_tta.meta.mixed_bn import convert_mixed_bn
from nets import make_images, make_net, max_difference
from processes import MARKS, Processes, trainer

pytestmark = [*MARKS, pytest.mark.slow]


class Data(LightningDataModule):
    """Batches of the given sizes; process r of W has the r-th part of each, which may be smaller than another's."""

    def __init__(self, train, val=()):
        super().__init__()
        self.train, self.val = train, val

    def _loader(self, sizes, seed):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [
            {
                "image": make_images(size, seed=seed + number, dtype=torch.float64).tensor_split(world)[rank],
                "label": (torch.arange(size) * 7 % 5).tensor_split(world)[rank],
            }
            for number, size in enumerate(sizes)
        ]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self._loader(self.train, 0)

    def val_dataloader(self):
        return self._loader(self.val, 50)


def quiet(world, root, epochs=1, **options):
    fixed = {"precision": "64-true", "num_sanity_val_steps": 0, "enable_model_summary": False}
    return trainer(root, world, max_epochs=epochs, **fixed, **{"enable_checkpointing": False, **options})


def on_one_and_two(work, root):
    """What ``work(world, directory)`` leaves in result.pt, on one process and on two."""
    for world in (1, 2):
        (root / str(world)).mkdir()
    work(1, root / "1")
    Processes(lambda _: work(2, root / "2"), root / "2").succeed()
    return [torch.load(root / world / "result.pt") for world in ("1", "2")]


def source():
    seed_everything(3, verbose=False)
    made = SourceClassifier(
        "cifar/resnet26_gn",
        5,
        backbone_options={"in_chans": 3},
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )
    return made.double()  # before a checkpoint is loaded into it


def train_source(world, directory):
    data = Data([8, 8, 8], [7, 4])
    keep = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1, monitor="source/val_loss")
    whole = quiet(world, directory, 2, callbacks=[keep], enable_checkpointing=True)
    whole.fit(source(), datamodule=data)
    measures = {name: float(value) for name, value in whole.callback_metrics.items() if "val" in name}
    resumed, model = quiet(world, directory, 2), source()
    resumed.fit(model, datamodule=data, ckpt_path=directory / "epoch=0.ckpt")
    seed_everything(3, verbose=False)
    measures |= quiet(world, directory).validate(MetaTTT(backbone=make_net("bn")), data, verbose=False)[0]
    assert whole.world_size == world
    if whole.is_global_zero:
        content = {"steps": resumed.global_step, "weights": model.backbone.state_dict(), "measures": measures}
        torch.save({**content, "whole": whole.lightning_module.backbone.state_dict()}, directory / "result.pt")


def test_source_training(tmp_path):
    """Weights, measures over shares of unequal size, and a run that goes on from its checkpoint."""
    one, two = results = on_one_and_two(train_source, tmp_path)
    assert one["steps"] == two["steps"] == 6
    assert one["measures"].keys() == two["measures"].keys() >= {"source/val_loss", "source/val_ece", "meta/val_after"}
    for name, value in one["measures"].items():
        if not name.startswith("meta/val"):  # its adaptation depends on the batch: see the counts below
            assert abs(two["measures"][name] - value) < 1e-6, name
    start = source().backbone.state_dict()
    for result in results:
        assert result["whole"].keys() == start.keys()
        for name, value in result["whole"].items():
            assert max_difference(value, one["whole"][name]) < 1e-12
            assert max_difference(value, result["weights"][name]) < 1e-12
            assert value.dtype == torch.float64
            if name.endswith("weight"):
                assert max_difference(value, start[name]) > 1e-4, name
    for when in ("before", "after"):  # eleven samples in all: the mean is a whole number of elevenths
        elevenths = two["measures"][f"meta/val_{when}"] * 11
        assert abs(elevenths - round(elevenths)) < 1e-5


@pytest.mark.parametrize("schedule", ["alternating", "chained"])
def test_meta_training(tmp_path, schedule):
    def train(world, directory):
        seed_everything(3, verbose=False)
        model = MetaTTT(
            backbone=make_net("bn"),
            schedule=schedule,
            threshold=0.4,
            max_layers=0.5,
            synthesis_probability=0.5,
            pseudo_domains=4 // world,  # four in all
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        )
        made = quiet(world, directory)
        made.fit(model, datamodule=Data([16] * 5))
        assert made.world_size == world
        if made.is_global_zero:
            torch.save({"steps": made.global_step, "weights": model.backbone.state_dict()}, directory / "result.pt")

    one, two = on_one_and_two(train, tmp_path)
    assert one["steps"] == two["steps"] == 5
    start = convert_mixed_bn(make_net("bn")).state_dict()
    for name, value in one["weights"].items():
        assert max_difference(value, two["weights"][name]) < 1e-12
        if name.endswith(".weight"):
            assert max_difference(value.float(), start[name]) > 1e-4
