# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model that adapts to its prompts
#
# A small GPT learns to add. Then it answers sums whose results all begin with the same digit, and adapts on what it has
# written: entropy minimisation makes it surer of each token, whether right or wrong. With a rate that is too high, Tent
# ends in one string. This page shows where, and what ZeroSiam does at the same rate: it ends in one string less often, and
# most of its answers are wrong too. Training takes about three minutes on a CPU.

# %%
import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer

from lightning_tta import PromptData, SourceLanguageModel, adapt
from lightning_tta.data.text.checkers import is_correct

torch.set_num_threads(1)
torch.manual_seed(0)
EPOCHS = 35
STREAM = 240  # prompts
RATE = 1e-2

# %% [markdown]
# ## A source model
#
# Sums of two numbers, `12+7=` and the answer `19`, a character a token. 6,000 of the 10,000 sums are for the training.

# %%
source = SourceLanguageModel(
    backbone_options={"layers": 3, "width": 96, "heads": 4},
    prompt_weight=0.1,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98)),
    lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
quiet |= {"num_sanity_val_steps": 0, "limit_val_batches": 0}
trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", gradient_clip_val=1.0, **quiet)
trainer.fit(source, PromptData())
net = source.backbone.eval()

# %% [markdown]
# ## Answers
#
# `adapt` works on a copy of the net. `generate` continues prompts, and `method(batch)` makes one step on a batch: where
# the batch says which tokens the net has `generated`, the loss is on these.


# %%
def stream(name, **rates):
    """Answers along a stream of prompts whose answers all begin with 1, and how many were right."""
    data = PromptData(classes=["1"], domains=["source"], num_prompts=STREAM, batch_size=4)
    method, answers, right = adapt(net, name, **rates), [], 0
    for batch in data.predict_dataloader():
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        full = method.generate(prompts, max_new_tokens=5, stop=[data.tokenizer.eos_token_id])
        method(full)  # adapts
        rows = zip(full["input_ids"], full["generated"], strict=True)
        texts = [data.tokenizer.decode(ids[new], skip_special_tokens=True) for ids, new in rows]
        right += sum(map(is_correct, texts, batch["answer"]))
        answers += texts
    return answers, right / len(answers)


# %%
WINDOW = 40  # answers
figure, panel = plt.subplots(figsize=(6, 3))
for name, rates in {
    "source": {},
    "tent": {"lr": RATE},
    "zerosiam": {"lr": RATE, "predictor_lr": 4 * RATE},
}.items():
    answers, accuracy = stream(name, **rates)
    parts = [answers[end - WINDOW : end] for end in range(WINDOW, len(answers) + 1, 4)]
    shares = [max(part.count(text) for text in set(part)) / WINDOW for part in parts]
    panel.plot(range(WINDOW, len(answers) + 1, 4), shares, label=name)
    most = max(set(parts[-1]), key=parts[-1].count)
    print(f"{name:9s} right {accuracy:6.1%}   at the end {most!r} is {shares[-1]:.0%} of the answers")
panel.set(xlabel="prompts", ylabel="share of the most frequent answer", ylim=(0, 1.03))
panel.legend()
plt.show()

# %% [markdown]
# ## The same as a run
#
# From the command line a run writes its answers, a report and curves, and goes on where it was stopped:
#
# ```bash
# lightning-tta fit --config configs/language/source.yaml
# lightning-tta predict --config configs/language/predict.yaml --model.source_ckpt runs/language/source \
#     --model.method zerosiam
# ```
#
# With the 4-layer net of that configuration, three seeds and several rates: [results](../docs/results/language.md).
