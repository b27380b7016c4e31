# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CR-MEMO on one image, view by view
#
# MEMO adapts to a single image. It makes random views of it, asks the net about each, and takes a step that makes the mean
# answer surer; CR-MEMO also makes the views agree. Then it predicts the image and forgets the step. This page does it by
# hand, with every intermediate value in sight. Runs in half a minute on a CPU.

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import nn

from lightning_tta import DigitsData, adapt
from lightning_tta.losses import consistency, entropy, marginal_entropy
from lightning_tta.views.augmix import make_views

torch.set_num_threads(1)
torch.manual_seed(0)
EPOCHS = 12


# %% [markdown]
# ## A source model
#
# A small GroupNorm net, trained on clean digits.

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
# ## An image that the net gets wrong
#
# 256 test digits with low contrast. We take the first that the net gets wrong and CR-MEMO right: it is picked because the
# step repairs it. How often that happens is counted at the end.

# %%
def test_images(domain):
    batch = next(iter(DigitsData(domains=[domain], batch_size=256, num_images=256).predict_dataloader()))
    return batch["image"], batch["label"]


VIEWS, LR, KL_WEIGHT = 16, 2e-2, 0.5
method = adapt(net, "memo", views=VIEWS, augment="augmix_only", lr=LR, kl_weight=KL_WEIGHT)

images, labels = test_images("contrast@3")
repaired = (method.predict(images).argmax(1) != labels) & (method(images).argmax(1) == labels)
number = int(repaired.nonzero()[0])
image, label = images[number : number + 1], int(labels[number])

views = make_views(image, VIEWS, "augmix_only", seeds=method.seeds(image))[0]  # the seed the method takes from pixels
figure, axes = plt.subplots(2, 9, figsize=(9, 2.4), layout="constrained")
shown = {(0, 0): ("image", image[0])}
shown |= {(n // 8, 1 + n % 8): (f"view {n + 1}", view) for n, view in enumerate(views)}
for axis in axes.flat:
    axis.axis("off")
for place, (title, picture) in shown.items():
    axes[place].imshow(picture.permute(1, 2, 0).clamp(0, 1))
    axes[place].set_title(title, fontsize=9)
plt.show()

# %% [markdown]
# The views are AugMix of the image itself: rotated, sheared, moved or recoloured copies, mixed with each other and with
# the image. No flips and no crops: they would change a digit's class, or cut it.
#
# ## What the net says of each view
#
# A row is a view, a bright cell a large probability. pbar is the mean of the rows.

# %%
with torch.no_grad():
    before = net(image).softmax(1)
    view_logits = net(views)
pbar = view_logits.softmax(1).mean(0, keepdim=True)

heights = {"image": (before, 2), "16 views": (view_logits.softmax(1), 9), "pbar": (pbar, 2)}
figure, axes = plt.subplots(
    3, 1, figsize=(6, 3.8), height_ratios=[height for _, height in heights.values()], layout="constrained"
)
for axis, (title, (values, _)) in zip(axes, heights.items(), strict=True):
    picture = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_ylabel(title, rotation=0, ha="right", va="center")
axes[-1].set(xticks=range(10), xlabel=f"class (truth: {label})")
figure.colorbar(picture, ax=axes, label="probability")
plt.show()

print(f"truth {label}; image alone {int(before.argmax())}; pbar {int(pbar.argmax())}")
print(f"votes of the views for 0 to 9: {torch.bincount(view_logits.argmax(1), minlength=10).tolist()}")

# %% [markdown]
# The image alone looks like a 3 to the net, barely. The views with more contrast are 7s to it, and sure ones; so is pbar.
#
# ## The loss
#
# The marginal entropy H(pbar) is the mean entropy of a view plus the consistency term, the mean of KL(p_k || pbar). So
# MEMO asks for sure views and for equal ones; CR-MEMO adds the consistency term once more, here with weight 0.5.

# %%
print(f"H(pbar)                 {marginal_entropy(view_logits):.4f}")
print(f"mean entropy of a view  {entropy(view_logits).mean():.4f}")
print(f"mean KL(p_k || pbar)    {consistency(view_logits):.4f}")
print(f"sum of the last two     {entropy(view_logits).mean() + consistency(view_logits):.4f}")


# %% [markdown]
# ## One step, and the image again
#
# All weights move, once, by plain SGD.

# %%
def cr_memo_loss(logits):
    return marginal_entropy(logits) + KL_WEIGHT * consistency(logits)


adapted = copy.deepcopy(net)
loss = cr_memo_loss(adapted(views))
gradients = torch.autograd.grad(loss, list(adapted.parameters()))
with torch.no_grad():
    for parameter, gradient in zip(adapted.parameters(), gradients, strict=True):
        parameter -= LR * gradient
    after = adapted(image).softmax(1)
    print(f"loss {loss:.4f} -> {cr_memo_loss(adapted(views)):.4f}")

figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
bars = {"image, before": (before, "#9aa5b1"), "pbar": (pbar, "#f6ae2d"), "image, after": (after, "#33658a")}
for place, (name, (values, colour)) in enumerate(bars.items()):
    axis.bar(torch.arange(10) + 0.27 * place - 0.27, values[0], width=0.26, label=name, color=colour)
axis.set(xticks=range(10), xlabel=f"class (truth: {label})", ylabel="probability", ylim=(0, 1))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# One step is enough: the image moves to where the sure views were, further than pbar itself. That is the strength of the
# method and its danger, for nothing in the loss knows the truth.
#
# ## The same by the method
#
# `adapt` does this for every image of a batch, with the same views and the same numbers, and puts the net back.

# %%
difference = (method(image).softmax(1) - after).abs().max()
print(f"largest difference from the step by hand: {difference:.1e}")
print(
    "net as before:", all(torch.equal(a, b) for a, b in zip(method.model.parameters(), net.parameters(), strict=True))
)

# %% [markdown]
# ## Many images
#
# Each image is an episode of its own, also in a batch. View averaging predicts pbar and learns nothing.

# %%
options = {"views": VIEWS, "augment": "augmix_only"}
methods = {
    "source": adapt(net, "source"),
    "view averaging": adapt(net, "view_averaging", **options),
    "MEMO": adapt(net, "memo", lr=LR, **options),
    "CR-MEMO": method,
}
for domain in ("contrast@3", "rotate@4"):
    images, labels = test_images(domain)
    right = {name: each(images).argmax(1) == labels for name, each in methods.items()}
    print(f"{domain:16}{'accuracy':>10}{'repaired':>10}{'broken':>10}")
    for name, own in right.items():
        good, bad = (own & ~right["source"]).sum(), (~own & right["source"]).sum()
        print(f"{name:16}{100 * own.double().mean():10.1f}{int(good):10}{int(bad):10}")

# %% [markdown]
# Low contrast suits it: AugMix stretches contrast in some views, so some views undo the shift. Most of the gain is there
# without learning, in the average of the views. Rotation by a large angle is not undone by small ones, and nothing helps
# there; the differences are within chance. Which views one makes decides more than which loss one minimises.
