"""PERK through a real Trainer: it learns, it resets, its prompts, its checkpoints."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn

from lightning_tta import PERK, ConfigError, PromptData, RecallData, SourceLanguageModel, WeightsError
from lightning_tta.backbones.gpt import CharGPT, create_gpt
from lightning_tta.modules.perk import all_right, prompts
from nets import max_difference

pytestmark = pytest.mark.usefixtures("one_thread")
NET = {"layers": 1, "width": 16, "heads": 2}
INNER = {"steps": 2, "unrolled_steps": 2, "inner_optimizer": "sgd", "inner_lr": 0.5}


def module(seed=0, **options):
    torch.manual_seed(seed)
    return PERK(**{"backbone": NET, **INNER, **options})


def data(**options):
    given = {"pairs": [2, 4], "letters": "abcdefgh", "value_length": 1, "contexts": 8, "questions": 4}
    given |= {"test_pairs": [4, 8], "train_batches": 4, "val_batches": 1, "test_batches": 1}
    return RecallData(**{**given, **options})


def trainer(epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def optimizer(parameters):
    return torch.optim.Adam(parameters, lr=0.03)


@pytest.mark.parametrize("options", [{"learn_all": True, "token_weights": True}, {"reading": "prompt"}], ids=str)
def test_training_lowers_the_outer_loss(options):
    model, source = module(optimizer=optimizer, **options), data(pairs=4, train_batches=8)
    batch = source.batches("train")[0]
    before = model.answers(batch)[1]
    fit = trainer(6)
    fit.fit(model, source)
    assert model.answers(batch)[1] < 0.8 * before
    assert {"perk/train_loss", "perk/val_accuracy", "perk/val_without"} <= set(fit.callback_metrics)


def test_what_learns_and_what_stays():
    model = module(optimizer=optimizer, token_weights=True)
    with torch.no_grad():
        model.weights.second.weight.normal_()  # so that the layer before it gets a gradient at once
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer().fit(model, data())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"backbone.{name}" for name in model.names} | {
        "log_rates",
        *(f"weights.{name}" for name, _ in model.weights.named_parameters()),
    }


def test_memory_leaves_the_module_as_it_was():
    model = module().eval()
    batches = [data().batches("test", 4)[0], data(seed=1).batches("test", 4)[0]]
    before = copy.deepcopy(model.state_dict())
    fresh = model.memorize(batches[0]["segments"])
    model.memorize(batches[1]["segments"])
    again = model.memorize(batches[0]["segments"])
    assert all(torch.equal(fresh[name], again[name]) for name in model.names)
    with torch.inference_mode():
        inside = model.memorize(batches[0]["segments"])
    assert all(torch.equal(fresh[name], inside[name]) for name in model.names)
    questions = batches[0]["questions"]
    logits = model.answer_logits(fresh, questions)
    with model.reading_from(fresh, 3) as net:
        assert max_difference(net(questions[3]), logits[3]) < 1e-5
        assert max_difference(net(questions[2]), logits[2]) > 1e-4
    with pytest.raises(RuntimeError, match="stop"), model.reading_from(fresh):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_right_is_what_greedy_decoding_writes():
    model = module(backbone={**NET, "vocab_size": 99})
    batch = data(value_length=2, contexts=4).batches("test", 4)[0]
    memory = model.memorize(batch["segments"])
    questions = batch["questions"].clone()
    with model.reading_from(memory, 1) as net:
        text = questions[1, :, :2]
        for _ in range(2):
            text = torch.cat([text, net(text)[:, -1:].argmax(-1)], 1)
    written = text[:, 2:]
    questions[1, 0, 2:] = written[0]  # now the first answer is what it writes
    right = all_right(model.answer_logits(memory, questions), questions, batch["answer_mask"])
    assert right[1].tolist() == (written == questions[1, :, 2:]).all(1).tolist()
    assert right[1, 0]


def test_prompts():
    batch = data(contexts=2).batches("test", 4)[0]
    batch["segment_mask"][0, 1, 3:] = False  # one context is shorter
    decode = data().tokenizer.decode
    for together in (True, False):
        ids, answers, counts = prompts(batch, together)
        for row, (text, answer, count) in enumerate(zip(ids, answers, counts, strict=True)):
            d = row if together else row // 4
            asked = batch["questions"][d] if together else batch["questions"][d][row % 4][None]
            context = batch["segments"][d][batch["segment_mask"][d]]
            assert decode(text[count]) == decode(context) + "".join(map(decode, asked))
            assert decode(text[answer]) == "".join(decode(question[-1:]) for question in asked)
            assert not (answer & ~count).any()


def test_in_the_prompt_the_answer_has_the_loss_of_its_logits():
    model = module(reading="prompt")
    batch = data(contexts=2).batches("test", 4)[0]
    right, loss = model.answers(batch)
    losses = []
    for d in range(2):
        for q, question in enumerate(batch["questions"][d]):
            ids = torch.cat([batch["segments"][d].flatten(), question])
            row = model.backbone(ids[None])[0, -2].log_softmax(-1)
            losses.append(-row[question[-1]])
            assert right[d, q] == (row.argmax() == question[-1])
    assert abs(loss - torch.stack(losses).mean()) < 1e-5
    with pytest.raises(ConfigError, match="no memory"):
        model.memorize(batch["segments"])


def test_checkpoints(tmp_path):
    base = module(reading="prompt", seed=1)
    fit = trainer(max_steps=1)
    fit.fit(base, data())
    fit.save_checkpoint(tmp_path / "base.ckpt")
    model = PERK(source_ckpt=str(tmp_path / "base.ckpt"), **INNER)
    batch = data().batches("test", 4)[0]
    ids = batch["segments"][:, 0]
    assert torch.equal(model(ids), base(ids))
    fit = trainer(max_steps=2)
    fit.fit(model, data())
    fit.save_checkpoint(tmp_path / "perk.ckpt")
    (tmp_path / "base.ckpt").unlink()
    again = PERK.load_from_checkpoint(tmp_path / "perk.ckpt", weights_only=True)
    for name, value in model.memorize(batch["segments"]).items():
        assert torch.equal(value, again.memorize(batch["segments"])[name])
    with pytest.raises(WeightsError, match="does not have the weights"):
        PERK(source_ckpt=str(tmp_path / "perk.ckpt"))


@pytest.mark.parametrize("kind", ["SourceLanguageModel", "safetensors, arguments", "safetensors, module"])
def test_weights_of_another_make(tmp_path, kind):
    torch.manual_seed(1)
    options = {"layers": 1, "width": 16, "heads": 2}
    if kind == "SourceLanguageModel":
        source = SourceLanguageModel(backbone_options=options)
        fit = trainer(limit_train_batches=1, limit_val_batches=0)
        fit.fit(source, PromptData())
        fit.save_checkpoint(tmp_path / "source.ckpt")
        net, path, backbone = source.backbone, tmp_path / "source.ckpt", None
    else:
        net, path = create_gpt(**options), tmp_path / "weights.safetensors"
        save_file(net.state_dict(), path)
        backbone = options if kind.endswith("arguments") else create_gpt(**options)
    model = PERK(source_ckpt=str(path), backbone=backbone, **INNER)
    ids = data().batches("test", 4)[0]["segments"][:, 0]
    assert max_difference(model(ids), net.eval()(ids)) < 1e-5
    with pytest.raises(WeightsError, match="does not fit CharGPT") as raised:
        PERK(source_ckpt=str(path), backbone={**options, "layers": 2})
    assert ("leave backbone out" in str(raised.value)) == (kind == "SourceLanguageModel")


@pytest.mark.parametrize("entry", [None, 3], ids=str)
def test_weights_that_do_not_say_their_net(tmp_path, entry):
    torch.save({"state_dict": {}, "lightning_tta": entry}, tmp_path / "odd.ckpt")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    for name in ("odd.ckpt", "weights.safetensors"):
        with pytest.raises(WeightsError, match="does not say which language model"):
            PERK(source_ckpt=str(tmp_path / name))


def test_a_module_as_net_is_copied_and_logits_may_be_an_attribute():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = CharGPT(99, 1, 16, 2)

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.net(input_ids)})()

    net = Output()
    names = set(net.state_dict())
    model = module(backbone=net)
    assert model.memorize(data().batches("test", 4)[0]["segments"]).keys() == set(model.names)
    assert set(net.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": None}, "Which language model"),
        ({"reading": "book"}, "reading"),
        ({"adapter": "norm"}, "adapter"),
        ({"unrolled_steps": 3}, "unrolled_steps"),
        ({"rate_lr_factor": -1}, "rate_lr_factor"),
    ],
    ids=str,
)
def test_what_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        module(**options)
