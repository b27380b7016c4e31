"""FOA and its CMA-ES against plain loops in numpy; the tokens of real nets; what it survives, and what it refuses."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tta import ConfigError, DataError, NotPreparedError, UnsupportedModelError, adapt
from lightning_tta.backbones.tokens import find_tokens, watched_tokens
from lightning_tta.draws import random_normals
from lightning_tta.methods.components.cma_es import CMAES
from nets import TokenViT, make_images, make_net, make_stream, max_difference, same
from vits import hf_vit, mixer, relative_positions, swin, timm_vit, torchvision_vit

pytestmark = pytest.mark.usefixtures("one_thread")


# CMA-ES --------------------------------------------------------------------------------------------------------------


class PlainCMAES:
    """The tutorial's figure 6 in numpy, one vector after another; eigenvectors, and no root, in its steps."""

    def __init__(self, n, lam, sigma, diagonal):
        self.n, self.lam, self.sigma, self.diagonal, self.g = n, lam, sigma, diagonal, 0
        self.m, self.C, self.ps, self.pc = np.zeros(n), np.eye(n), np.zeros(n), np.zeros(n)
        raw = [math.log((lam + 1) / 2) - math.log(i + 1) for i in range(lam)]
        plus, minus = [w for w in raw if w > 0], [w for w in raw if w <= 0]
        self.mu = len(plus)
        self.mueff = sum(plus) ** 2 / sum(w * w for w in plus)
        self.cs = (self.mueff + 2) / (n + self.mueff + 5)
        self.ds = 1 + 2 * max(0, math.sqrt((self.mueff - 1) / (n + 1)) - 1) + self.cs
        self.cc = (4 + self.mueff / n) / (n + 4 + 2 * self.mueff / n)
        factor = (n + 2) / 3 if diagonal else 1
        self.c1 = factor * 2 / ((n + 1.3) ** 2 + self.mueff)
        self.cmu = min(1 - self.c1, factor * 2 * (0.25 + self.mueff + 1 / self.mueff - 2) / ((n + 2) ** 2 + self.mueff))
        sum_minus = -sum(minus)
        mueff_minus = sum(minus) ** 2 / sum(w * w for w in minus)
        alpha = min(
            1 + self.c1 / self.cmu, 1 + 2 * mueff_minus / (self.mueff + 2), (1 - self.c1 - self.cmu) / (n * self.cmu)
        )
        scale = 0 if diagonal else alpha / sum_minus
        self.w = [w / sum(plus) for w in plus] + [w * scale for w in minus]
        self.chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

    def power(self, exponent):
        values, vectors = np.linalg.eigh(self.C)
        return vectors @ np.diag(values**exponent) @ vectors.T

    def ask(self, z):
        root = self.power(0.5)
        return [self.m + self.sigma * root @ row for row in z]

    def tell(self, points, values):
        """More points than lambda: the last one comes from elsewhere."""
        n, inverse = self.n, self.power(-0.5)
        entries = []
        for number, (point, value) in enumerate(zip(points, values, strict=True)):
            y = (point - self.m) / self.sigma
            alien = number >= self.lam
            if alien:
                y = y * min(1, (math.sqrt(n) + 2 * n / (n + 2)) / np.linalg.norm(inverse @ y))
            entries.append((value if math.isfinite(value) else math.inf, number, y, alien))
        entries.sort(key=lambda entry: entry[:2])
        weights = self.w[: self.mu] + [0.0] * (len(points) - self.lam) + self.w[self.mu :]
        weights = [0.0 if alien and w < 0 else w for w, (*_, alien) in zip(weights, entries, strict=True)]
        yw = sum(w * y for w, (_, _, y, _) in zip(weights[: self.mu], entries, strict=False))
        self.m = self.m + self.sigma * yw
        self.ps = (1 - self.cs) * self.ps + math.sqrt(self.cs * (2 - self.cs) * self.mueff) * inverse @ yw
        self.g += 1
        length = np.linalg.norm(self.ps)
        h = length / math.sqrt(1 - (1 - self.cs) ** (2 * self.g)) < (1.4 + 2 / (n + 1)) * self.chi
        self.pc = (1 - self.cc) * self.pc + h * math.sqrt(self.cc * (2 - self.cc) * self.mueff) * yw
        delta = (1 - h) * self.cc * (2 - self.cc)
        C = (1 + self.c1 * delta - self.c1 - self.cmu * sum(weights)) * self.C + self.c1 * np.outer(self.pc, self.pc)
        for w, (_, _, y, _) in zip(weights, entries, strict=True):
            w = w if w >= 0 else w * n / np.linalg.norm(inverse @ y) ** 2
            C = C + self.cmu * w * np.outer(y, y)
        self.C = np.diag(np.diag(C)) if self.diagonal else C
        self.sigma *= math.exp(min(1, self.cs / self.ds * (length / self.chi - 1)))
        return h


def sphere(p):
    return (p**2).sum(-1)


def rosenbrock(p):
    return (100 * (p[..., 1:] - p[..., :-1] ** 2) ** 2 + (1 - p[..., :-1]) ** 2).sum(-1)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("n", "population"), [(2, 4), (5, 8), (12, 11)])
def test_each_update_is_the_plain_one(n, population, diagonal, elsewhere):
    search, plain = CMAES(n, population, diagonal=diagonal), PlainCMAES(n, population, 0.5, diagonal)
    state = search.start(0.5, torch.zeros(1, dtype=torch.float64))
    best, stalls, ranks = np.full(n, 3.0), [], []  # far away: it is moved nearer
    for generation in range(30):
        normals = random_normals(torch.tensor([7, generation]), population, n)
        roots = search.roots(state["covariance"])
        points = search.points(state, roots[0], normals)
        expected = plain.ask(normals.double().numpy())
        assert max_difference(points, torch.from_numpy(np.stack(expected))) < 1e-10
        if elsewhere:
            points = torch.cat([points, torch.from_numpy(best)[None]])
            expected = [*expected, best]
        values = rosenbrock(points) / 1e4 + sphere(points - 30)  # far away: the path gets long
        if generation % 5 == 0:
            values[1], values[2] = math.nan, math.inf
        ranks.append(int((values < values[-1]).sum()))
        choose = np.nanargmin if generation % 2 else np.nanargmax  # one of the worst, too
        best = expected[int(choose(values.nan_to_num(posinf=0.0).numpy()))].copy()
        before = copy.deepcopy(state)
        new = search.update(state, roots, points, values)
        assert same(state, before)  # not written to
        stalls.append(not plain.tell(expected, values.tolist()))
        state = new
        for name, other in (("mean", plain.m), ("path_sigma", plain.ps), ("path", plain.pc)):
            assert max_difference(state[name], torch.from_numpy(other)) < 1e-9
        covariance = torch.diag(state["covariance"]) if diagonal else state["covariance"]
        assert max_difference(covariance, torch.from_numpy(plain.C)) < 1e-9
        assert float(state["sigma"]) == pytest.approx(plain.sigma, rel=1e-10)
        assert int(state["generation"]) == plain.g == generation + 1
    assert set(stalls) == {True, False}  # and too long at times
    assert not elsewhere or min(ranks) < search.parents < max(ranks)


@pytest.mark.parametrize(
    ("function", "diagonal", "sigma", "most"),
    [(sphere, False, 1.0, 250), (sphere, True, 1.0, 250), (rosenbrock, False, 0.5, 1000)],
)
def test_it_converges(function, diagonal, sigma, most):
    """One run each took 145, 115 and 612 generations; of the package cma, 4.5.0: 145, 107 and 494."""
    n, population = 10, 10
    search = CMAES(n, population, diagonal=diagonal)
    state = search.start(sigma, torch.zeros(1, dtype=torch.float64))
    state["mean"] += 1.0 if function is sphere else 0.0
    for generation in range(most):
        roots = search.roots(state["covariance"])
        points = search.points(state, roots[0], random_normals(torch.tensor([0, generation]), population, n))
        values = function(points)
        if values.min() < 1e-9:
            break
        state = search.update(state, roots, points, values)
    assert generation > 50
    assert values.min() < 1e-9


def test_float32_and_a_singular_covariance():
    search = CMAES(4, 8)
    state = search.start(1.0, torch.zeros(1))
    state["covariance"] = torch.ones(4, 4)  # of rank 1
    roots = search.roots(state["covariance"])
    assert all(root.isfinite().all() for root in roots)
    points = search.points(state, roots[0], random_normals(torch.tensor([0, 0]), 8, 4))
    new = search.update(state, roots, points, sphere(points))
    assert all(value.isfinite().all() for value in new.values())
    assert all(value.dtype == torch.float32 for name, value in new.items() if name != "generation")


@pytest.mark.parametrize("options", [{"dimension": 1}, {"population": 3}])
def test_constants_out_of_range(options):
    with pytest.raises(ConfigError):
        CMAES(**{"dimension": 4, "population": 8, **options})


# FOA -----------------------------------------------------------------------------------------------------------------


class PlainFOA:
    """One image, one block, one candidate after another; the search is :class:`PlainCMAES`."""

    def __init__(self, net, source, *, prompts, best, population, sigma=1.0, lam=0.4, gamma=1.0, ema=0.9, diagonal):
        self.net, self.P, self.lam, self.gamma, self.ema = net, prompts, lam, gamma, ema
        self.width = net.token.shape[-1]
        self.best, self.center = best, None
        self.search = PlainCMAES(prompts * self.width, population, sigma, diagonal)
        activations = np.stack([self.passed(image, None)[0] for image in source])
        self.mean, self.std = activations.mean(0), activations.std(0, ddof=1)

    @torch.no_grad()
    def passed(self, image, prompt):
        """Activations and features of one image."""
        net = self.net
        tokens = list((net.patches(image[None]).flatten(2).transpose(1, 2) + net.positions[:, 1:])[0])
        tokens = [net.token[0, 0] + net.positions[0, 0], *tokens]
        if prompt is not None:
            tokens[1:1] = list(torch.from_numpy(prompt).view(self.P, self.width))
        x, activations = torch.stack(tokens)[None], []
        for number, block in enumerate(net.blocks):
            x = block(x)
            norm = net.blocks[number + 1].norm1 if number + 1 < len(net.blocks) else net.norm
            activations.append(norm(x[0, 0]))
        return torch.cat(activations).numpy(), activations[-1].numpy()

    def head(self, z):
        return self.net.head.weight.detach().numpy() @ z + self.net.head.bias.detach().numpy()

    def valued(self, images, prompt):
        passes = [self.passed(image, prompt) for image in images]
        a, z = (np.stack(values) for values in zip(*passes, strict=True))
        total = 0.0
        for row in z:
            p = np.exp(self.head(row) - self.head(row).max())
            p /= p.sum()
            total -= float((p * np.log(p)).sum())
        std = a.std(0, ddof=1) if len(a) > 1 else np.zeros(a.shape[1])
        apart = ((std - self.std) ** 2).sum() + ((a.mean(0) - self.mean) ** 2).sum()
        return total + self.lam * len(images) / 64 * apart, z

    def __call__(self, images, normals):
        points = [*self.search.ask(normals), self.best]
        values, features = zip(*(self.valued(images, point) for point in points), strict=True)
        number = int(np.argmin(values))
        shift = 0 if self.center is None else self.gamma * (self.mean[-self.width :] - self.center)
        logits = np.stack([self.head(z + shift) for z in features[number]])
        here = np.stack([z.mean(0) for z in features]).mean(0)
        self.center = here if self.center is None else self.ema * self.center + (1 - self.ema) * here
        self.best = points[number].copy()
        self.search.tell(points, values)
        return logits, values[number], number

    def predict(self, images):
        features = [self.passed(image, self.best)[1] for image in images]
        return np.stack([self.head(z + self.gamma * (self.mean[-self.width :] - self.center)) for z in features])


def foa(net=None, source=None, **options):
    method = adapt(make_net("vit").double() if net is None else net, "foa", **options)
    method.prepare([{"image": images} for images in (make_stream(2, 8, seed=9) if source is None else source)])
    return method


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"covariance": "diagonal", "chunk": 4, "seed": 3},
        {"prompts": 1, "population": 6, "sigma": 0.3, "discrepancy": 3.0, "shift": 0.5, "ema": 0.5, "chunk": 100},
        {"prompts": 2, "covariance": "diagonal", "discrepancy": 0.0, "shift": 0.0},
    ],
)
def test_seven_batches(options):
    net, source = make_net("vit").double(), make_stream(3, 5, seed=9, dtype=torch.float64)
    method = foa(net, source, **options)
    prompts = options.get("prompts", 3)
    population = options.get("population", 4 + int(3 * math.log(prompts * 8)))
    bound = math.sqrt(6 / (3 * 8 * 8 + 8))
    start = method.value("best").numpy().copy()
    assert start.shape == (prompts * 8,)
    assert bound / 2 < np.abs(start).max() < bound
    reference = PlainFOA(
        net,
        torch.cat(source),
        prompts=prompts,
        best=start,
        population=population,
        sigma=options.get("sigma", 1.0),
        lam=options.get("discrepancy", 0.4),
        gamma=options.get("shift", 1.0),
        ema=options.get("ema", 0.9),
        diagonal=options.get("covariance") == "diagonal",
    )
    assert max_difference(method.source_mean, torch.from_numpy(reference.mean)) < 1e-12
    assert max_difference(method.source_std, torch.from_numpy(reference.std)) < 1e-12
    winners = []
    for generation, size in enumerate((6, 1, 9, 4, 12, 3, 8)):
        images = make_images(size, seed=generation, dtype=torch.float64)
        key = torch.tensor([options.get("seed", 0), generation])
        logits, value, winner = reference(images, random_normals(key, population, prompts * 8).double().numpy())
        assert max_difference(method(images), torch.from_numpy(logits)) < 1e-8
        stats = method.stats
        assert stats["fitness"] == pytest.approx(value, rel=1e-9)
        assert stats["step_size"] == pytest.approx(reference.search.sigma, rel=1e-9)
        assert (stats["forwards"], stats["backwards"], stats["skipped_steps"]) == (population + 1, 0, 0)
        assert max_difference(method.value("best"), torch.from_numpy(reference.best)) < 1e-8
        assert max_difference(method.value("center"), torch.from_numpy(reference.center)) < 1e-9
        assert max_difference(method.value("search.mean"), torch.from_numpy(reference.search.m)) < 1e-8
        winners.append(winner)
    assert len(set(winners)) > 2
    probe = make_images(5, seed=77, dtype=torch.float64)
    assert max_difference(method.predict(probe), torch.from_numpy(reference.predict(probe))) < 1e-8
    assert max_difference(method.predict(probe[2:3]), method.predict(probe)[2:3]) < 1e-12  # each image for itself


def test_chunks_change_rounding_alone():
    stream = make_stream(4, dtype=torch.float64)
    results = [[method(images) for images in stream] for method in (foa(chunk=chunk) for chunk in (None, 1, 5, 99))]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert max_difference(one, two) < 1e-8


@pytest.mark.parametrize("options", [{}, {"covariance": "diagonal"}])
def test_a_saved_search_goes_on_bit_by_bit(options, tmp_path):
    stream = make_stream(6)
    method = foa(make_net("vit"), **options)
    whole = [method(images) for images in stream]
    method.reset()
    for images in stream[:3]:
        method(images)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    resumed = adapt(make_net("vit", seed=4), "foa", **options)
    with pytest.raises(NotPreparedError):
        resumed(stream[0])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same([resumed(images) for images in stream[3:]], whole[3:])


def test_nothing_of_the_net_changes_and_no_gradient_is_taken(monkeypatch):
    net = make_net("vit")
    before = copy.deepcopy(net.state_dict())
    method = adapt(net, "foa", in_place=True)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    method.prepare([{"image": make_images(8)}])
    for images in make_stream(3):
        method(images)
    assert same(net.state_dict(), before)
    assert not method.adaptable
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Fragile(nn.Module):
    """The identity, and not a number where a token is long, or always."""

    def __init__(self):
        super().__init__()
        self.bound, self.scale = math.inf, nn.Parameter(torch.ones(1))

    def forward(self, x):
        longest = x.abs().amax((1, 2), keepdim=True)
        return torch.where(longest < self.bound, x, math.nan) * self.scale


def fragile():
    net = make_net("vit").double()
    net.blocks[0] = nn.Sequential(Fragile(), net.blocks[0])
    return net


def test_a_candidate_that_overflows_ranks_last():
    plain, broken = (foa(fragile(), sigma=10.0) for _ in range(2))  # prompts are longer than tokens
    images = make_images(6, dtype=torch.float64)
    normals = random_normals(torch.tensor([0, 0]), plain.search.population, plain.search.dimension)
    longest = normals.abs().amax(1).sort().values
    broken.model.blocks[0][0].bound = 10 * float(longest[2:4].mean())  # three of the candidates are shorter
    logits = broken(images)
    assert logits.isfinite().all()
    assert math.isfinite(broken.stats["fitness"])
    assert broken.stats["skipped_steps"] == 0
    assert all(value.isfinite().all() for value in broken.rest.values())
    kept = broken.value("best").abs().max()
    assert kept < broken.model.blocks[0][0].bound
    plain(images)
    assert not same(plain.rest, broken.rest)


def test_where_all_overflow_nothing_is_learnt():
    method, stream = foa(fragile()), make_stream(4, dtype=torch.float64)
    method(stream[0])
    before = copy.deepcopy(method.rest)
    method.model.blocks[0][0].bound = 0.0
    method(stream[1])
    assert method.stats["skipped_steps"] == 1
    assert same(method.rest, before)
    method.model.blocks[0][0].bound = math.inf
    twin = foa(fragile())
    assert same(twin(stream[0]), twin(stream[0])) is False  # it does learn otherwise
    assert method(stream[2]).isfinite().all()


def test_a_broken_image_is_left_out():
    method, twin = foa(), foa()
    for images in make_stream(3, 6, dtype=torch.float64):
        broken = images.clone()
        broken[2] = math.nan
        good = [0, 1, 3, 4, 5]
        assert same(method(broken)[good], twin(images[good]))
    assert same(method.state_dict(), twin.state_dict())


def test_the_fitness_of_a_shifted_stream_falls():
    method = foa(covariance="diagonal", source=[make_images(64, seed=5)])
    shifted = [0.3 * images + 0.6 for images in make_stream(25, 32, dtype=torch.float64)]
    values = []
    for images in shifted:
        method(images)
        values.append(method.stats["fitness"])
    assert np.mean(values[-5:]) < 0.97 * np.mean(values[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 0},
        {"population": 3},
        {"sigma": 0.0},
        {"discrepancy": -1.0},
        {"shift": -0.1},
        {"ema": 1.1},
        {"covariance": "block"},
        {"chunk": 0},
        {"seed": -1},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        adapt(make_net("vit"), "foa", **options)


def test_source_data_that_say_nothing():
    for batches in ([], [{"image": make_images(1)}], [{"label": torch.zeros(3)}], [make_images(3)]):
        with pytest.raises(DataError, match="image"):
            adapt(make_net("vit"), "foa").prepare(batches)


def test_full_and_diagonal():
    wide = lambda **options: adapt(TokenViT(5, width=176).eval(), "foa", **options)  # noqa: E731  # 528 numbers
    assert wide().search.diagonal
    assert not wide(prompts=2).search.diagonal
    assert not wide(covariance="full").search.diagonal
    assert wide().step_on_host == "" != wide(prompts=2).step_on_host
    assert wide().value("search.covariance").shape == (528,)
    assert adapt(TokenViT(5, width=8).eval(), "foa").search.population == 4 + int(3 * math.log(24))


# Tokens of real nets -------------------------------------------------------------------------------------------------


REAL = {
    "timm": (timm_vit, "blocks.", "norm1", True),
    "timm, registers": (lambda: timm_vit(reg_tokens=2), "blocks.", "norm1", True),
    "timm, pooled": (lambda: timm_vit(class_token=False, global_pool="avg"), "blocks.", "norm1", False),
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_", "ln_1", True),
    "Hugging Face": (hf_vit, "vit.", "layernorm_before", True),
}


@pytest.mark.parametrize("kind", REAL)
def test_nets_with_tokens(kind):
    make, prefix, norm, has_class_token = REAL[kind]
    torch.manual_seed(0)
    net = make().eval()
    found = find_tokens(net, 3)
    assert len(found.blocks) in (2, 3)
    assert all(name.startswith(prefix) for name in found.blocks)
    assert all(name.endswith(f".{norm}") for name in found.norms)
    assert (found.width, found.features, found.has_class_token, found.patch_values) == (16, 16, has_class_token, 48)
    images, prompts = make_images(4), torch.randn(4, 3, 16)
    with torch.no_grad():
        plain = net(images)
        with watched_tokens(net, found) as seen:
            same_logits = net(images)
        with watched_tokens(net, found, prompts) as other:
            moved = net(images)
    plain, same_logits, moved = (getattr(output, "logits", output) for output in (plain, same_logits, moved))
    assert torch.equal(plain, same_logits)
    assert not torch.allclose(plain, moved)
    assert seen.activations.shape == other.activations.shape == (4, found.activations)
    head = net.get_submodule(found.head)
    assert torch.equal(head(seen.features), plain)
    method = foa(net)
    logits = [method(images) for images in make_stream(3)]
    assert all(u.isfinite().all() for u in logits)
    assert not torch.equal(method.predict(images), plain)


def test_prompts_stand_behind_the_class_token():
    """timm's ViT, written out: the class token, the prompts, the patches; only the patches have positions."""
    torch.manual_seed(0)
    net = timm_vit().eval()
    images, prompts = make_images(2), torch.randn(2, 3, 16)
    with torch.no_grad():
        x = net._pos_embed(net.patch_embed(images))
        expected = net.forward_head(net.norm(net.blocks(torch.cat([x[:, :1], prompts, x[:, 1:]], 1))))
        with watched_tokens(net, find_tokens(net), prompts):
            assert max_difference(net(images), expected) < 1e-6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_net("bn"), "no sequence of two or more blocks"),
        (lambda: make_net("ln"), "no sequence of two or more blocks"),
        (swin, "no sequence of two or more blocks"),
        (relative_positions, "take 17 tokens, and not 3 more"),
        (mixer, "take 16 tokens, and not 3 more"),
        (lambda: nn.Sequential(make_net("vit"), nn.Softmax(1)), "no single layer that gives the logits"),
    ],
)
def test_other_nets_are_refused_with_advice(make, words):
    with pytest.raises(UnsupportedModelError, match=f"(?s){words}.*'output_shift', 'neo'"):
        adapt(make().eval(), "foa")


def test_int8():
    """Dynamic quantisation: all linear layers, the head too."""
    net = timm_vit().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a successor for it, in a package of its own
        quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    method = foa(quantized)
    for images in make_stream(2):
        logits = method(images)
    assert logits.isfinite().all()
    assert method.stats["forwards"] == method.search.population + 1
    assert (logits.softmax(1) - net(images).softmax(1)).abs().max() < 0.5
