# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What the inner step of Meta-TTT does
#
# A source model is trained on handwritten digits, then meta-trained: the loss is taken *after* the net has adapted to the
# batch without labels. This page looks inside: entropy before and after the max and the min step, the learned mixture of
# source and batch statistics, and accuracy by shift. Runs in about a minute on a CPU.

# %%
import copy
import logging
import warnings

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW

from lightning_tta import DigitsData, MetaTTT, SourceClassifier, adapt
from lightning_tta.losses import entropy
from lightning_tta.meta.inner_loop import adapt_inner
from lightning_tta.meta.mixed_bn import mixed_batch_norm_layers

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
torch.set_num_threads(1)
seed_everything(0, verbose=False)
SOURCE_EPOCHS = 5
META_EPOCHS = 4


def train(module, epochs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, limit_val_batches=0, **quiet)
    trainer.fit(module, datamodule=DigitsData(train_batch_size=64))
    return module.backbone.eval()


# %% [markdown]
# ## Source training, then meta-training
#
# Meta-training starts from the source weights. Its batches are split into four pseudo-domains, each with random scales
# and shifts of the first convolution's channels; each adapts on its own.

# %%
source = train(SourceClassifier("timm/test_resnet", 10, optimizer=lambda p: AdamW(p, lr=3e-3)), epochs=SOURCE_EPOCHS)

module = MetaTTT(
    backbone=copy.deepcopy(source),
    schedule="chained",
    source_weight=0.25,
    pseudo_domains=4,
    synthesis_probability=0.5,
    max_lr=0.3,
    scale_lr=0.3,
    shift_lr=0.3,
    head_lr_factor=1.0,
    optimizer=lambda p: AdamW(p, lr=3e-3),
)
net = train(module, epochs=META_EPOCHS)
settings = module.settings

# %% [markdown]
# ## One batch, step by step
#
# The max step moves the last layer's shifts so that the unsure samples become less sure; the min step moves all scales
# and the other shifts so that they become surer. Both push the confident samples further.

# %%
data = DigitsData(batch_size=64, domains=["gaussian_noise"], severity=4)
images = next(iter(data.predict_dataloader()))["image"]

entropies = {}
for name, phases in {"before": (), "after max": ("max",), "after max and min": ("max", "min")}.items():
    with torch.enable_grad():
        logits = adapt_inner(net, images, settings, phases=phases).after[0].detach()
    entropies[name] = entropy(logits)
    print(f"{name:18} mean entropy {entropies[name].mean():.4f} nats")

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharex=True, sharey=True, layout="constrained")
for axis, (name, values) in zip(axes, entropies.items(), strict=True):
    axis.hist(values.numpy(), bins=20, range=(0, 2.31), color="#33658a")
    axis.set(title=name, xlabel="entropy (nats)")
axes[0].set_ylabel("images")
plt.show()

change = {name: entropies[name] - entropies["before"] for name in ("after max", "after max and min")}
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for (name, values), colour, marker in zip(change.items(), ("#c44900", "#33658a"), ("^", "v"), strict=True):
    axis.scatter(entropies["before"], values, s=16, color=colour, marker=marker, label=name)
axis.axhline(0, color="0.6", linewidth=1)
axis.set(xlabel="entropy before (nats)", ylabel="change", title="Change of each image's entropy")
axis.legend()
plt.show()

# %% [markdown]
# ## The mixture of statistics, by depth
#
# Each channel of each BatchNorm layer has a weight on the source statistics: 1 is ordinary evaluation, 0 the batch's own
# statistics. It started at 0.25; the line is the mean of a layer, the band the middle half of its channels.

# %%
weights = [layer.mixing.detach() for layer in mixed_batch_norm_layers(net).values()]
depth = range(1, len(weights) + 1)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
low, high = ([w.quantile(q) for w in weights] for q in (0.25, 0.75))
axis.fill_between(depth, low, high, color="#f6ae2d", alpha=0.4)
axis.plot(depth, [w.mean() for w in weights], color="#33658a", marker="o", markersize=3)
axis.axhline(0.25, color="0.6", linewidth=1, linestyle="--")
axis.set(xlabel="layer, first to last", ylabel="weight on the source", title="Learned weight on the source statistics")
plt.show()

# %% [markdown]
# ## Accuracy by shift
#
# The source model as it is, with Tent, and the meta-trained net without and with its inner steps. Most of the gain is
# in what meta-training made of the weights and of the mixture; the steps themselves change few predictions of a batch.

# %%
shifts = ["clean", "gaussian_noise", "contrast", "haze", "motion_blur", "rotate"]
stream = DigitsData(batch_size=64, domains=shifts, severity=5, num_images=128)
methods = {
    "source": adapt(source, "source"),
    "source + Tent": adapt(source, "tent", optimizer="sgd", lr=2e-2),
    "meta-trained, no steps": adapt(net, "source"),
    "meta-trained + Meta-TTT": adapt(net, "meta_ttt"),
}
right = {name: torch.zeros(len(shifts)) for name in methods}
last = None
for batch in stream.predict_dataloader():
    domain = int(batch["domain"][0])
    for name, method in methods.items():
        if domain != last:
            method.reset()
        right[name][domain] += (method(batch["image"]).argmax(1) == batch["label"]).sum() / 128
    last = domain

colours = ("#9aa5b1", "#f6ae2d", "#86bbd8", "#33658a")
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for number, ((name, values), colour) in enumerate(zip(right.items(), colours, strict=True)):
    axis.bar(torch.arange(len(shifts)) + 0.2 * number - 0.3, 100 * values, width=0.19, label=name, color=colour)
    print(f"{name:24} mean {100 * values.mean():.1f} %")
axis.set_xticks(range(len(shifts)), [shift.replace("_", " ") for shift in shifts])
axis.set(ylabel="accuracy (%)", title="Digits, severity 5")
axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.32), frameon=False)
plt.show()
