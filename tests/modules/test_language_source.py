"""Training of a language model: loss by hand, accuracy beside written answers, checkpoints, what is refused."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_tta import ConfigError, PromptData, SourceLanguageModel, WeightsError
from lightning_tta.backbones.gpt import CharGPT, create_gpt
from lightning_tta.cli.main import main
from lightning_tta.modules.loading import load_source
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"layers": 1, "width": 16, "heads": 2}
CONFIG = Path(__file__).parents[2] / "configs/language/source.yaml"


def make_trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **{"max_epochs": 1, **quiet, **options})


def sums(**options):
    return PromptData(**{"digits": 1, "train_batch_size": 60, "domains": ["source"], **options})


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3, 1.0])
def test_one_step_by_hand(prompt_weight):
    module = SourceLanguageModel(
        backbone_options=SMALL, prompt_weight=prompt_weight, optimizer=partial(torch.optim.SGD, lr=0.1)
    ).double()
    batch = next(iter(sums(train_batch_size=5).train_dataloader()))
    net = module.backbone
    total, weight = 0.0, 0.0
    for ids, attention, answer in zip(*(batch[k] for k in ("input_ids", "attention_mask", "answer_mask")), strict=True):
        length = int(attention.sum())
        log_p = net(ids[None, :length])[0].log_softmax(-1)  # each row alone, without padding
        for t in range(length - 1):
            w = 1.0 if answer[t + 1] else prompt_weight
            total, weight = total - w * log_p[t, ids[t + 1]], weight + w
    loss = total / weight
    weights = dict(net.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    expected = {name: (p - 0.1 * g).detach() for (name, p), g in zip(weights.items(), gradients, strict=True)}
    trainer = make_trainer(precision="64-true")
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert abs(trainer.callback_metrics["source/train_loss"] - loss) < 1e-12
    for name, value in expected.items():
        assert max_difference(net.get_parameter(name).detach(), value) < 1e-12


@pytest.fixture(scope="module")
def trained():
    """A net that knows most of 35 sums by heart: those of the test."""
    torch.default_generator.manual_seed(0)
    data = sums(train_batch_size=35)
    options = {"layers": 1, "width": 32, "heads": 2}
    module = SourceLanguageModel(
        backbone_options=options, prompt_weight=0.1, optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    make_trainer(max_epochs=60).fit(module, train_dataloaders=data.test_dataloader())
    return module.eval()


def write_answer(net, prompt):
    """Token after token, each the most probable one, until the end."""
    ids = net.tokenizer.encode(prompt)
    while len(ids) < 12 and ids[-1] != net.tokenizer.eos_token_id:
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    return net.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt)


def test_accuracy_and_perplexity_are_those_of_written_answers(trained):
    data = sums(domains=["source", "zeros"], train_batch_size=20)
    trainer = make_trainer()
    (measured,) = trainer.test(trained, data, verbose=False)
    nats, tokens, right = 0.0, 0, []
    with torch.no_grad():
        for prompts in data.domain_prompts:
            right.append([write_answer(trained.backbone, p.prompt) == p.answer for p in prompts])
            for p in prompts:
                ids = torch.tensor([[*data.encoder.prompt_ids(p.prompt), *data.encoder.answer_ids(p.answer)]])
                log_p = trained.backbone(ids)[0, :-1].log_softmax(-1)
                nats -= log_p.gather(1, ids[0, 1:, None]).sum().item()
                tokens += ids.shape[1] - 1
    shares = [sum(row) / len(row) for row in right]
    assert shares[0] > 0.6 > 0.4 > shares[1]  # it has learned something, and the shift hurts
    assert measured["source/test_accuracy/source"] == pytest.approx(shares[0])
    assert measured["source/test_accuracy/zeros"] == pytest.approx(shares[1])
    assert measured["source/test_accuracy"] == pytest.approx(sum(shares) / 2)
    assert measured["source/test_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_checkpoint_rebuilds_net_and_tokenizer(trained, tmp_path):
    trainer = make_trainer()
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    net = load_source(str(tmp_path))
    assert isinstance(net, CharGPT)
    ids = torch.tensor([net.tokenizer.encode("3+4=")])
    assert torch.equal(net(ids), trained(ids))
    again = SourceLanguageModel(backbone_options=net_options(net), weights=str(tmp_path))
    assert torch.equal(again(ids), trained(ids))
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    content["state_dict"]["backbone.norm.weight"][0] += 1
    torch.save(content, tmp_path / "best.ckpt")
    with pytest.raises(WeightsError, match="not those that were saved"):
        load_source(str(tmp_path))
    with pytest.raises(ConfigError, match=r"of a net with \{'layers': 1, 'width': 32\}, but this one has"):
        make_trainer().test(
            SourceLanguageModel(backbone_options={"heads": 2}), sums(), ckpt_path=tmp_path / "best.ckpt"
        )


def net_options(net):
    return {name: value for name, value in net.config.items() if name != "vocab_size"}


def test_a_module_of_the_user_and_an_object_with_logits():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = create_gpt(**SMALL)

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": self.net(input_ids, attention_mask)})

    module = SourceLanguageModel(Wrapped())
    make_trainer().fit(module, sums())
    assert module.trainer.callback_metrics["source/train_loss"] < 6
    with pytest.raises(ConfigError, match="has options and weights of its own"):
        SourceLanguageModel(Wrapped(), SMALL)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_fit_then_validate_by_command_line(tmp_path, capsys):
    small = [
        "--model.backbone_options={layers: 1, width: 8, heads: 1}",
        "--data.digits=1",
        "--data.train_batch_size=50",
    ]
    args = [f"--config={CONFIG}", "--trainer.accelerator=cpu", *small]
    place = f"--trainer.logger.init_args.save_dir={tmp_path}"
    main(["fit", *args, place, "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"])
    assert "weights: " in capsys.readouterr().out
    main(["validate", *args, place, "--ckpt_path", str(tmp_path / "source"), "--data.val_domains=[source, words@2]"])
    out = capsys.readouterr().out
    assert "source/val_accuracy/words@2" in out
    assert load_source(str(tmp_path / "source")).config["width"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "gtp"}, "backbone must be one of 'gpt'; got 'gtp'"),
        ({"backbone_options": {"layer": 2}}, "gpt has no option 'layer'. Did you mean layers"),
        ({"backbone_options": {"width": 10, "heads": 4}}, "width must be a multiple of 2 x heads = 8"),
        ({"characters": "aa"}, "each character once"),
        ({"prompt_weight": 2.0}, "prompt_weight must be a number in"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SourceLanguageModel(**options)


def test_what_does_not_fit_is_said():
    module = SourceLanguageModel(backbone_options=SMALL, characters="0123456789+=")
    with pytest.raises(ConfigError, match="The net's tokens are the characters '0123456789"):
        make_trainer().fit(module, sums())
    with pytest.raises(ConfigError, match="LanguageAdaptation"):
        module.predict_step({}, 0)
    without = SourceLanguageModel(backbone_options=SMALL, prompt_weight=0.0)
    text = PromptData("text", domains=["zen"])
    with pytest.raises(ConfigError, match="the prompts have no answers to learn"):
        make_trainer().test(without, text, verbose=False)
    with pytest.warns(UserWarning, match="The weights are random: test measures chance"):
        (measured,) = make_trainer().test(SourceLanguageModel(backbone_options=SMALL), text, verbose=False)
    assert set(measured) == {"source/test_loss", "source/test_perplexity"}
    assert measured["source/test_perplexity"] == pytest.approx(99, rel=0.05)  # chance among 99 tokens
