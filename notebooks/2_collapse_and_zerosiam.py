# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why entropy minimisation collapses, and what ZeroSiam does
#
# Tent makes a net surer of its predictions on the unlabelled stream. The surest net of all gives every image the same
# class. This page watches a net on its way there, and ZeroSiam on the same net, batches and learning rate. Runs in half a
# minute on a CPU.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from lightning_tta import DigitsData, adapt

torch.set_num_threads(1)
torch.manual_seed(2)
EPOCHS = 12


# %% [markdown]
# ## A source model
#
# A small GroupNorm net, trained on clean digits. With GroupNorm there are no batch statistics to replace: whatever
# changes below, the steps did it.

# %%
def block(width_in, width_out, stride):
    return [
        nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, width_out),
        nn.SiLU(),
    ]


features = [*block(3, 16, 2), *block(16, 32, 2), *block(32, 64, 2), *block(64, 64, 1)]
net = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

loader = DigitsData(train_batch_size=32).train_dataloader()
optimizer = torch.optim.AdamW(net.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, epochs=EPOCHS, steps_per_epoch=len(loader))
for _ in range(EPOCHS):
    for batch in loader:
        loss = nn.functional.cross_entropy(net(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
net.eval();


# %% [markdown]
# ## Two streams, sorted by class
#
# 540 test images each, 16 in a batch, one class after the other, as a camera sees them that stays in one place for a
# while. In one stream the contrast is lower (severity 3), in the other there is haze (severity 4), which hurts the net
# more.

# %%
def sorted_stream(domain):
    data = DigitsData(domains=[domain], stream="label_shift", batch_size=16)
    return [(batch["image"], batch["label"]) for batch in data.predict_dataloader()]


streams = {"contrast": sorted_stream("contrast@3"), "haze": sorted_stream("haze@4")}
methods = {
    "source": adapt(net, "source"),
    "Tent": adapt(net, "tent", optimizer="sgd", lr=2e-2),
    "ZeroSiam": adapt(net, "zerosiam", lr=2e-2, predictor_lr=2e-2, lr_batch_size=None),
}


def run(method, stream):
    method.reset()
    logits, stats = [], []
    for images, _ in stream:
        logits.append(method(images))
        stats.append(method.stats)
    return torch.cat(logits), stats


results = {(name, kind): run(method, stream) for name, method in methods.items() for kind, stream in streams.items()}
labels = {kind: torch.cat([labels for _, labels in stream]) for kind, stream in streams.items()}
for kind in streams:
    row = {name: (results[name, kind][0].argmax(1) == labels[kind]).double().mean() for name in methods}
    print(f"{kind:10}" + "".join(f"{name} {100 * value:.1f} %   " for name, value in row.items()))

# %% [markdown]
# Where the shift is mild, being surer is being right, and both methods gain. In haze Tent falls far below the net that
# does nothing. Watch it there, batch by batch (each point is a mean over nine batches).

# %%
colours = {"source": "#9aa5b1", "Tent": "#f6ae2d", "ZeroSiam": "#33658a"}
lines = {"source": ":", "Tent": "-", "ZeroSiam": "--"}


def draw(axis, name, values):
    axis.plot(range(1, len(values) + 1), values, color=colours[name], linestyle=lines[name], linewidth=2, label=name)


def smooth(values, width=9):
    """Mean over the batches around each one."""
    values = torch.as_tensor(values, dtype=torch.double)
    ends = values[:1].expand(width // 2), values[-1:].expand(width // 2)
    return torch.cat([ends[0], values, ends[1]]).unfold(0, width, 1).mean(1)


figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True, layout="constrained")
for name in methods:
    logits, stats = results[name, "haze"]
    right = (logits.argmax(1) == labels["haze"]).double().split(16)
    draw(axes[0], name, smooth([s["entropy"] for s in stats]))
    draw(axes[1], name, smooth([100 * part.mean() for part in right]))
axes[0].set(xlabel="batch", ylabel="entropy (nats)", title="Haze: what the method sees", ylim=(0, None))
axes[1].set(xlabel="batch", ylabel="accuracy (%)", title="Haze: what it does not see", ylim=(0, 100))
axes[1].legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# ## Which classes are predicted
#
# Each column is a batch; the classes stand in the order in which they come, so that the truth is a staircase.

# %%
order = labels["haze"].unique_consecutive()


def shares(classes):
    counts = [torch.bincount(part, minlength=10).double() / len(part) for part in classes.split(16)]
    return torch.stack(counts, 1)[order]


rows = {"truth": labels["haze"], **{name: results[name, "haze"][0].argmax(1) for name in methods}}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True, layout="constrained")
for axis, (name, classes) in zip(axes, rows.items(), strict=True):
    picture = axis.imshow(shares(classes), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=name, xlabel="batch", yticks=range(10), yticklabels=order.tolist())
axes[0].set_ylabel("class")
figure.colorbar(picture, ax=axes, label="share of the batch")
plt.show()

# %% [markdown]
# Tent's entropy goes to zero and looks like success. It is one class that swallows the stream: once the steps have
# pushed many images towards it, every further step agrees. Each batch shows few classes, so nothing in it pushes back, and
# the norm layers' scales and shifts, which all images share, can serve it best by the same push for all.
#
# Two measures show this without labels. The logits get longer (confidence by length), and they all turn into one
# direction: the norm of the mean logit vector over the mean norm goes to 1. ZeroSiam stays close to the source in both.
# The last plot is the distance of ZeroSiam's predictor, explained below, from where it starts.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for name in methods:
    stats = results[name, "haze"][1]
    draw(axes[0], name, smooth([s["logit_norm"] for s in stats]))
    draw(axes[1], name, smooth([s["centre_dominance"] for s in stats]))
for kind, line in (("contrast", "-."), ("haze", "--")):
    distance = [s["predictor_distance"] for s in results["ZeroSiam", kind][1]]
    axes[2].plot(range(1, len(distance) + 1), distance, line, color=colours["ZeroSiam"], linewidth=2, label=kind)
axes[0].set(xlabel="batch", title="Length of the logits", ylim=(0, None))
axes[0].legend(frameon=False, loc="lower right")
axes[1].set(xlabel="batch", title="Share of the common direction", ylim=(0, 1))
axes[2].set(xlabel="batch", title="ZeroSiam: predictor from identity", ylim=(0, None))
axes[2].legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# ## What ZeroSiam changes
#
# With features z and the net's last layer g, Tent minimises the entropy of g(z). ZeroSiam puts a small linear map h
# between them, the identity at the start, and minimises
#
# H(g(h(z))) + KL(p || q) + KL(q || p), with p from g(z), taken as a constant, and q from g(h(z)).
#
# It predicts with g(z). The idea: the easy way to low entropy, a push that is the same for every image, can be taken by
# h, and what h takes is thrown away. To see what matters, each part is taken out in turn.

# %%
options = {"lr": 2e-2, "lr_batch_size": None}
variants = {
    "Tent": methods["Tent"],
    "ZeroSiam, h fixed: identity": adapt(net, "zerosiam", predictor="identity", **options),
    "ZeroSiam, h fixed: random": adapt(net, "zerosiam", predictor="random", **options),
    "ZeroSiam, no alignment": adapt(net, "zerosiam", predictor_lr=2e-2, alpha=0.0, **options),
    "ZeroSiam, h learns slowly": adapt(net, "zerosiam", predictor_lr=3e-3, **options),
    "ZeroSiam": methods["ZeroSiam"],
}
print(f"{'accuracy (%)':30}" + "".join(f"{kind:>10}" for kind in streams))
for name, method in variants.items():
    right = {kind: (run(method, stream)[0].argmax(1) == labels[kind]).double() for kind, stream in streams.items()}
    print(f"{name:30}" + "".join(f"{100 * values.mean():10.1f}" for values in right.values()))

# %% [markdown]
# With h fixed at the identity, ZeroSiam is Tent, to the digit. A random h harms. In haze it takes both parts: without the
# alignment, or with an h that learns slowly, the net still loses many points. It is not free: on the mild stream the two weaker variants gain a little more.
#
# The predictor moves on both streams, and more where ZeroSiam gains than in haze. Its distance says that it works, not
# that something is wrong.
#
# ## How much is the learning rate?
#
# The rate above is high, to have a collapse within 34 batches.

# %%
print(f"{'haze, accuracy (%)':20}{'Tent':>8}{'ZeroSiam':>10}")
for lr in (2.5e-3, 5e-3, 1e-2, 2e-2):
    pair = (
        adapt(net, "tent", optimizer="sgd", lr=lr),
        adapt(net, "zerosiam", lr=lr, predictor_lr=lr, lr_batch_size=None),
    )
    tent, zerosiam = (
        100 * (run(method, streams["haze"])[0].argmax(1) == labels["haze"]).double().mean() for method in pair
    )
    print(f"lr {lr:<17}{tent:8.1f}{zerosiam:10.1f}")

# %% [markdown]
# A lower rate delays Tent's collapse, but at none of the four is Tent level with the source. ZeroSiam ends within two
# points of it at each. So what it gives on this stream is not accuracy, it is tolerance: one does not know the
# right rate for a stream without labels.
#
# Two cautions. The seed was chosen to show a whole collapse: with seed 0 Tent ends at 31 %, not 19 %, beside 42 % for the
# source and 43 % for ZeroSiam. And ZeroSiam is no guarantee: put `contrast@4` in place of `haze@4`, and it ends in one
# class too.
