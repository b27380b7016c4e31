"""Folders that hold an adapter of peft stand for its net with the adapter in the weights; what cannot is said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_tta
from lightning_tta.backbones.huggingface import load_causal_model
from lightning_tta.errors import WeightsError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(12).view(2, 6)


def tiny(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, initializer_range=0.3, **SIZES, **options)
    return transformers.LlamaForCausalLM(config)


def adapted(net, **options):
    """The net with a LoRA that is not the identity."""
    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    net = peft.get_peft_model(net, peft.LoraConfig(**given)).eval()
    for name, value in net.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    return net


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two folders, the net's and the adapter's; and the logits of both together."""
    root = tmp_path_factory.mktemp("peft")
    tiny().save_pretrained(root / "net")
    net = adapted(transformers.AutoModelForCausalLM.from_pretrained(root / "net"))
    net.save_pretrained(root / "adapter")
    with torch.no_grad():
        return root, net(IDS).logits


@pytest.fixture
def copied(saved, tmp_path):
    """Copies of both, whose adapter names its net by the name alone."""
    for name in ("net", "adapter"):
        shutil.copytree(saved[0] / name, tmp_path / name)
    configure(tmp_path, base_model_name_or_path="net")
    return tmp_path


def configure(root, **changes):
    path = root / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_adapter_is_added_to_the_weights(saved):
    root, logits = saved
    net = load_causal_model(str(root / "adapter"))
    assert type(net) is transformers.LlamaForCausalLM
    assert not any("lora" in name for name, _ in net.named_modules())
    torch.testing.assert_close(net(IDS).logits, logits)
    assert (tiny()(IDS).logits - logits).abs().max() > 0.1
    adapter, before = load_file(root / "adapter/adapter_model.safetensors"), tiny().state_dict()
    for name, value in net.state_dict().items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name].double()
        if f"{layer}.lora_A.weight" in adapter:  # W + alpha / r B A
            down, up = (adapter[f"{layer}.lora_{each}.weight"].double() for each in "AB")
            expected = expected + 6 / 4 * up @ down
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("select", [{"kind": "lora", "rank": 2, "targets": r".*\.(q_proj|v_proj)"}, "norm"])
def test_methods_adapt_it_as_any_other_net(saved, select):
    net = load_causal_model(str(saved[0] / "adapter"))
    before = net(IDS).logits.detach()
    method = lightning_tta.adapt(net, "tent", lr=0.05, select=select)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    torch.testing.assert_close(method(batch), before)
    assert (method.predict(batch) - before).abs().max() > 1e-3


def test_the_net_is_looked_for_beside_the_adapter_too(copied, saved):
    torch.testing.assert_close(load_causal_model(str(copied / "adapter"))(IDS).logits, saved[1])
    configure(copied, base_model_name_or_path="/elsewhere/on/another/machine/net")
    torch.testing.assert_close(load_causal_model(str(copied / "adapter"))(IDS).logits, saved[1])
    configure(copied, base_model_name_or_path="meta-llama/Llama")
    with pytest.raises(WeightsError, match="for the net 'meta-llama/Llama', and there is no such folder"):
        load_causal_model(str(copied / "adapter"))


def test_other_kinds_and_layers(copied):
    """A head that was trained as a whole, and another kind of adapter than LoRA."""
    whole = adapted(tiny(), modules_to_save=["lm_head"])
    torch.nn.init.normal_(whole.get_submodule("base_model.model.lm_head.modules_to_save.default").weight)
    torch.manual_seed(2)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False)
    for net in (whole, peft.get_peft_model(tiny(), config)):
        shutil.rmtree(copied / "adapter")
        net.eval().save_pretrained(copied / "adapter")
        configure(copied, base_model_name_or_path="net")
        torch.testing.assert_close(load_causal_model(str(copied / "adapter"))(IDS).logits, net(IDS).logits)


WRONG = {
    "peft_type": ({"peft_type": "NEW"}, "no kind of adapter of peft .peft_type: NEW"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "adds tokens to the prompt, and nothing to weights"),
    "task": ({"task_type": "SEQ_CLS"}, "its task is SEQ_CLS, and not CAUSAL_LM"),
    "code": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "for Megatron, which is other code"),
    "no base": ({"base_model_name_or_path": None}, "does not name its net"),
    "rank": ({"r": 2}, "cannot be added to the weights of its net"),
    "layers": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "has no weights for .*o_proj"),
    "fewer": ({"target_modules": ["q_proj"]}, "has weights for .*v_proj.* of another net"),
    "unknown": ({"target_modules": ["c_attn"]}, "cannot be added to the weights of its net, a LlamaForCausalLM"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_said(copied, changes, words):
    configure(copied, **changes)
    with pytest.raises(WeightsError, match=words):
        load_causal_model(str(copied / "adapter"))


def test_files_that_are_damaged_or_of_two_nets(copied):
    adapter = copied / "adapter"
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="has no weights for"):
        load_causal_model(str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(WeightsError, match="cannot be added"):
        load_causal_model(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"no adapter_model\.safetensors beside it"):
        load_causal_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_causal_model(str(adapter))
    shutil.copytree(copied / "net", adapter, dirs_exist_ok=True)
    shutil.copy(adapter / "config.json", adapter / "adapter_config.json")
    with pytest.raises(WeightsError, match="names no kind of adapter"):
        load_causal_model(str(adapter))


def test_a_folder_with_a_net_and_an_adapter_is_refused(copied):
    shutil.copytree(copied / "net", copied / "adapter", dirs_exist_ok=True)
    with pytest.raises(WeightsError, match="which one is meant is not clear"):
        load_causal_model(str(copied / "adapter"))
