"""Behaviour that users of saeception.py rely on. Makes its own data; needs no network, no GPU."""

import copy
import functools
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.transforms import v2

import saeception as S

HERE = Path(__file__).parent
S.render_digits = functools.cache(S.render_digits)  # each run renders 14,000: here, once will do


QUICK = """--limit 300 --baseline-epochs 2 --epochs 1 --sae-epochs 3 --sae-min-steps 0 --top-k 8
    --d-sae 32 --device cpu --precision float32""".split()
MLP = ["--arch", "mlp", *QUICK]
PHOTOS = "--dataset imagenet --arch convnextv2_atto --weights none --image-size 32".split() + QUICK


def blobs(n=400, d=6, classes=4, seed=0):
    """Points around one centre per class, all positive, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 3 * torch.rand(classes, d, generator=generator)
    return (centres[y] + 0.3 * torch.randn(n, d, generator=generator)).relu(), y


def small_net(trained_on=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    if trained_on is not None:
        S.fit(model, "1", *trained_on, epochs=5)
    return model


def random_images(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def untimed(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture
def run(tmp_path, capsys):
    """main() in this process: stdout, stderr and the new run folder, if any. An error is one line,
    behind finished progress."""

    def call(*arguments, status=0):
        before = set(tmp_path.glob("runs/*"))
        got = S.main(["--out-dir", str(tmp_path / "runs"), *map(str, arguments)])
        out, err = capsys.readouterr()
        assert got == status, err
        if status != 0:
            *progress, error = err.strip().splitlines()
            assert error.startswith("saeception.py: error: ")
            assert all(line.endswith(" 0 s left") for line in progress if line)
        folder = next(iter(set(tmp_path.glob("runs/*")) - before), None)
        return SimpleNamespace(out=out, err=err, folder=folder)

    return call


def start(tmp_path, *flags, **more):
    """A process of its own."""
    more = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True) | more
    return subprocess.Popen([sys.executable, HERE / "saeception.py", *flags], **more)


# === 1. Sparse autoencoder ===


@pytest.mark.parametrize("k", [None, 5])
def test_sae_is_its_formula(k):
    sae, h = S.SparseAutoencoder(6, 20, k), blobs()[0]
    sae.b_dec.data += 0.3
    sae.b_enc.data -= 0.1
    h_hat, z = (t.detach().numpy() for t in sae(h))
    w = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    shapes = {name: p.shape for name, p in w.items()}
    assert shapes == {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    expected = np.maximum((h.numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    if k:
        expected[expected < np.sort(expected, axis=1)[:, -k][:, None]] = 0
    np.testing.assert_allclose(z, expected, atol=1e-5)
    np.testing.assert_allclose(h_hat, expected @ w["W_dec"] + w["b_dec"], atol=1e-5)
    with pytest.raises(ValueError, match="k = 21"):
        S.SparseAutoencoder(6, 20, 21)


def fvu(sae, h):
    """Fraction of the variance of h that the SAE does not explain."""
    return ((h - sae(h)[0]).square().sum() / (h - h.mean(0)).square().sum()).item()


@pytest.mark.parametrize("k", [None, 3])
def test_train_sae_reconstructs_repeatably_and_as_well_in_bfloat16(k):
    h, how = blobs(1000)[0], dict(k=k, l1=0.02, batch_size=128, min_steps=150, seed=3)
    before = torch.get_rng_state()
    sae, again, rough = (S.train_sae(h, 32, bfloat16=b, **how) for b in (False, False, True))
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers are left alone
    assert same_parameters(sae, again) and not same_parameters(sae, rough)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert fvu(sae, h) < 0.1 and (sae.encode(h) > 0).sum(1).float().mean() <= (k or 25)
    assert fvu(rough, h) < 1.2 * fvu(sae, h) + 0.01 and rough.W_dec.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # of a caller, who may have one around everything
        assert fvu(S.train_sae(h, 32, bfloat16=True, **how), h) < 1.3 * fvu(rough, h) + 0.01


def test_min_steps_adds_epochs_where_rows_are_few(capsys):
    few, lengths = small_net()[:2](blobs(300)[0]), []
    for epochs, min_steps in ((1, 50), (1, 0), (7, 3)):
        progress = lambda steps: lengths.append(len(steps)) or steps  # noqa: E731
        S.train_sae(few, 8, epochs=epochs, min_steps=min_steps, progress=progress)
    assert lengths == [50, 1, 7]
    assert fvu(S.train_sae(few, 24), few) < 0.5  # by default few rows are enough
    capsys.readouterr()
    sae = S.train_sae(blobs(300)[0], 256, epochs=1, min_steps=0)  # one step
    warned = float(re.search(r"FVU ([\d.]+)", capsys.readouterr().err)[1])
    assert warned == pytest.approx(fvu(sae, blobs(300)[0]), abs=0.01) and warned > 1


def test_train_sae_takes_activations_of_any_kind_and_scale():
    model, (x, _) = small_net(), blobs()
    with S.capture(model[1]) as seen:
        model(x)
    h = seen.h.detach()
    view = h.repeat_interleave(2, 1)[:, ::2]
    for kind in (h.double(), h.half(), view, seen.h):  # the last has a gradient
        sae = S.train_sae(kind, 16, min_steps=20)
        plain = S.train_sae(kind.detach().float().contiguous(), 16, min_steps=20)
        assert same_parameters(sae, plain) and torch.equal(sae(kind)[0], plain(kind)[0])
        assert not any(p.requires_grad for p in sae.parameters())
    assert all(p.grad is None for p in model.parameters())
    small, large = (S.train_sae(scale * h, 16, min_steps=50) for scale in (1, 1024))
    assert_close(large.encode(1024 * h), 1024 * small.encode(h), rtol=1e-2, atol=2)
    for value in (0.0, 1.0, math.nan):
        with pytest.raises(FloatingPointError, match="not finite, or h is the same for all"):
            S.train_sae(torch.full((99, 4), value), 8, min_steps=5)


# === 2. Hook capture ===


def test_capture_of_vectors_tokens_maps_and_nothing_else():
    identity, shapes = nn.Identity(), ((5, 3), (5, 7, 3), (5, 3, 4, 4))
    vectors, tokens, maps = (torch.randn(shape, requires_grad=True) for shape in shapes)
    for t, h in ((vectors, vectors), (tokens, tokens[:, 0]), (maps, maps.mean((2, 3)))):
        with S.capture(identity) as seen:
            identity(t)
        assert_close(seen.h, h)
        assert seen.h.requires_grad
    lstm, norm = nn.LSTM(3, 3), nn.LayerNorm(3)
    for layer, shape in ((lstm, (2, 5, 3)), (norm, (2, 4, 4, 3))):  # the latter: channels last
        with pytest.raises(ValueError, match="none of"), S.capture(layer) as seen:
            layer(torch.randn(shape))
        assert seen.h is None and not layer._forward_hooks  # no hook is left behind
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with S.capture(model[0]) as seen:
        model(vectors)
    assert_close(seen.h, model[0](vectors))  # before the work in place


def test_activations_in_chunks_of_named_layers_and_what_cannot_be_watched():
    (x, _), model = blobs(101), small_net()
    model[1].alias = model[0]  # each name of a shared module is good
    for name, end in (("1", 2), ("1.alias", 1)):
        h, logits = S.activations(model, name, x, chunk=10)
        assert_close((h, logits), (model[:end](x), model(x)))
    with pytest.raises(ValueError, match="no layer 'nosuch'; the layers are 0, 1, 1.alias, 2"):
        S.activations(model, "nosuch", x)
    unused, pair, named = (small_net() for _ in range(3))
    compiled = torch.compile(small_net(), backend="eager")
    unused[1].more = nn.ReLU()
    pair.register_forward_hook(lambda module, inputs, logits: (logits, 1))  # returns no tensor
    named.register_forward_hook(lambda module, inputs, logits: {"logits": logits})
    with torch.no_grad():
        compiled.eval()(x)  # from now on it does not look for new hooks
    for model, layer in (
        (unused, "1.more"), (pair, "1"), (named, "1"), (compiled, "_orig_mod.1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"the model has to call '{layer}'"):
            S.activations(model, layer, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_precision(dtype):
    data, model = blobs(), small_net().to(dtype)
    data = data[0].to(dtype), data[1]
    S.fit(model, "1", *data, epochs=20, lr=1e-2)
    assert all(t.dtype == dtype for t in S.activations(model, "1", data[0]))
    for row in final(model, "1", data, data, **options())["rows"]:
        assert row["accuracy"] > 0.9 and all(math.isfinite(v) for v in list(row.values())[3:])


# === 3. Feature sharpening ===


@pytest.mark.parametrize("kind", ["long", "int", "byte"])
def test_class_top_k_and_sharpen_by_hand(kind):
    z = torch.tensor([[5.0, 0, 1, 0], [1, 0, 3, 0], [0, 2, 0, 0], [0, 4, 1, 1]])
    y = getattr(torch.tensor([0, 0, 2, 2]), kind)()  # class 1 has no examples
    means = torch.tensor([[3, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0.5, 0.5]])
    assert torch.equal(S.class_mean(z, y, 3), means)
    assert torch.equal(S.ARMS["class-mean"](None, z, y, 3, 1), means[[0, 0, 2, 2]])
    mask = S.class_top_k(z, y, 3, 1)
    assert mask.tolist() == [[True, False, False, False], [False] * 4, [False, True, False, False]]
    sharp = [[5, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    assert S.sharpen(z, y, mask).tolist() == sharp
    # A class never keeps what it never uses, even where k leaves room.
    assert S.class_top_k(z, y, 3, 4).tolist()[0] == [True, False, True, False]


def test_class_mean_does_not_overflow_and_what_does_not_fit_is_refused():
    n = 1_300_000  # their sum does not fit into half precision
    assert S.class_mean(torch.full((n, 1), 3.0).half(), torch.zeros(n).long(), 1).item() == 3
    with pytest.raises(ValueError, match="2048 rows but 4096 classes"):
        S.class_mean(torch.ones(2048, 1), torch.zeros(4096).long(), 1)
    with pytest.raises(ValueError, match="no rows"):
        S.train_sae(torch.ones(0, 3), 8)
    with pytest.raises(ValueError, match="top-k = 5"):
        S.class_top_k(torch.ones(2, 4), torch.tensor([0, 1]), 2, 5)


def test_targets_belong_to_their_images():
    h, y = blobs(5000)  # more than one chunk
    sae = S.train_sae(h, 24, epochs=1, min_steps=0)
    targets = S.sharpened_targets(sae, h, y, 4, 5)
    z = sae.encode(h)
    mask = torch.zeros(4, 24, dtype=torch.bool)
    for c in range(4):
        mask[c, z[y == c].mean(0).argsort(descending=True)[:5]] = True
    assert_close(targets, sae.decode(torch.where(mask[y], z, 0)))
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))
    assert_close(S.sharpened_targets(sae, h[order], y[order].int(), 4, 5), targets[order])
    # Keeping every feature is plain reconstruction.
    assert_close(S.sharpened_targets(sae, h, y, 4, 24), sae(h)[0])
    assert_close(S.ARMS["reconstruction"](sae, h, y, 4, 3), sae(h)[0])


# === 4. Combined loss ===


@pytest.mark.parametrize("aux_loss", ["mse", "cosine"])
def test_auxiliary_loss_reaches_what_is_below_the_layer_and_nothing_above(aux_loss):
    (x, y), targets, models = blobs(64), torch.rand(64, 8), (small_net(), small_net())
    for weight, model in enumerate(models):
        S.fit(model, "1", x, y, targets, float(weight), aux_loss)  # one step
    assert not torch.allclose(models[0][0].weight.grad, models[1][0].weight.grad)
    assert_close(models[0][2].weight.grad, models[1][2].weight.grad)


@pytest.mark.parametrize("aux_loss, shift", [("mse", 0), ("mse", 1), ("cosine", 0)])
def test_fit_is_its_formula_and_the_weight_falls_to_zero(aux_loss, shift):
    (x, y), targets = blobs(64), torch.rand(64, 8)
    model, plain = small_net(), small_net()
    variance = plain[:2](x).var(0).mean().detach()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for step in range(5):  # the same training, written out
        h = plain[:2](x + shift)  # augmented inputs meet the targets of the clean ones
        aux = (h - targets).square().mean() / variance
        if aux_loss == "cosine":
            aux = (1 - (h * targets).sum(1) / h.norm(dim=1) / targets.norm(dim=1)).mean()
        loss = F.cross_entropy(plain[2](h), y) + 0.8 * (1 - step / 5) * aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    augment = (lambda row: row + shift) if shift else None
    S.fit(model, "1", x, y.int(), targets, 0.8, aux_loss, epochs=5, lr=1e-2, augment=augment)
    assert_close([*model.parameters()], [*plain.parameters()], rtol=1e-4, atol=1e-5)


def test_fit_learns_and_refuses_what_does_not_fit():
    (x, y), model, frozen = blobs(), small_net(), small_net()
    S.fit(model, "1", x, y, epochs=20, lr=1e-2)
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    frozen[0].requires_grad_(False)
    good, diverged = torch.rand(400, 8), "diverged in epoch 1; lower lr"
    for net, inputs, targets, more, kind, reason in (
        (model, x * math.nan, None, {}, FloatingPointError, diverged),
        (model, x, None, {"lr": 1e38}, FloatingPointError, diverged),
        (model, x, good * math.nan, {}, FloatingPointError, diverged),
        (model, x, good, {"aux_loss": "l2"}, ValueError, "'l2' is neither mse nor cosine"),
        (model, x, good[1:], {}, ValueError, "same number of rows"),
        (frozen, x, good, {}, ValueError, "nothing that is trained"),
    ):
        with pytest.raises(kind, match=reason):
            S.fit(copy.deepcopy(net), "1", inputs, y, targets, 1.0, **more)


# === 5. Metrics, against slow and plain definitions in float64 ===

SCORES = S.silhouette_score, S.davies_bouldin_score, S.calinski_harabasz_score


def naive_scores(x, y):
    """Silhouette, Davies-Bouldin and Calinski-Harabasz."""
    x, y, silhouettes = x.double().numpy(), y.numpy(), []
    for point, own in zip(x, y, strict=True):
        distance = np.linalg.norm(point - x, axis=1)
        a = distance[y == own].sum() / max(1, (y == own).sum() - 1)
        b = min(distance[y == other].mean() for other in set(y.tolist()) - {own})
        silhouettes.append((b - a) / max(a, b) if (y == own).sum() > 1 and max(a, b) > 0 else 0)
    parts = [x[y == c] for c in np.unique(y)]
    m, n = [part.mean(0) for part in parts], range(len(parts))
    s = [np.linalg.norm(p - centre, axis=1).mean() for p, centre in zip(parts, m, strict=True)]
    worst = [max((s[i] + s[j]) / np.linalg.norm(m[i] - m[j]) for j in n if j != i) for i in n]
    within = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
    between = sum(len(part) * ((part.mean(0) - x.mean(0)) ** 2).sum() for part in parts)
    ratio = between / within * (len(x) - len(parts)) / (len(parts) - 1)
    return np.mean(silhouettes), np.mean(worst), ratio


def metric_cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 8, generator=generator)
    y = torch.randint(0, 5, (150,), generator=generator)
    single, twice, far_point = y.clone(), x.clone(), x.clone()
    single[0], single[1] = 77, -3
    twice[50:100] = twice[:50]
    far_point[0] = 1e6
    separate = x / 100 + torch.randn(5, 8, generator=generator)[y]
    close = torch.tensor([[0.0, 0], [1e-3, 0], [0, 1e-3]])[y % 3] + 3e-4 * x[:, :2]
    close[0] = 1e4
    return {
        "close clusters and one far point": (close, y % 3),
        "random": (x, y), "singletons": (x, single), "duplicates": (twice, y),
        "far": (x + 1000, y), "one far point": (far_point, y), "separate": (separate, y),
        "sparse": ((x - 1.5).relu(), y), "pairs": (x, torch.arange(150) // 2),
        "half": (x.half(), y), "bfloat16": (x.bfloat16(), y), "double": (x.double(), y.int()),
        "times": ((100 * x).long() + 1_700_000_000, y),  # seconds since 1970, as whole numbers
    }  # fmt: skip


@pytest.mark.parametrize("case", metric_cases())
def test_cluster_metrics(case):
    x, y = metric_cases()[case]
    before = x.clone()
    for score, expected in zip(SCORES, naive_scores(x, y), strict=True):
        chunk = {"chunk": 37} if score is S.silhouette_score else {}
        assert score(x, y, **chunk) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(x, before)  # the caller's points are left alone


def test_silhouette_at_any_scale_and_in_spite_of_rough_products():
    x, y = torch.randn(500, 300).relu(), torch.arange(500) % 5
    exact = pytest.approx(naive_scores(x, y)[0], rel=1e-5)
    for scale in (1e-25, 1e-20, 1e15, 1e20):
        assert S.silhouette_score(x * scale, y) == exact
    with torch.autocast("cpu", torch.bfloat16):
        assert S.silhouette_score(x, y) == exact
    try:
        for precision in ("high", "medium"):  # TF32 or bfloat16, where the machine has them
            torch.set_float32_matmul_precision(precision)
            assert S.silhouette_score(x, y) == exact
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.mkldnn, "matmul"):  # the newer way to say "medium", torch 2.9
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert S.silhouette_score(x, y) == exact
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cluster_metrics_of_degenerate_points_and_refusals():
    y, x = torch.arange(10) // 5, torch.randn(10, 3)
    one_place, two_places = torch.full((10, 2), 0.1), torch.randn(2, 3)[y]
    assert [score(one_place, y) for score in SCORES] == [0, 0, 1]
    assert [score(two_places, y) for score in SCORES] == [pytest.approx(1), 0, 1]
    for score in SCORES:
        for labels in (torch.zeros(10), torch.arange(10), torch.arange(9) % 2):
            with pytest.raises(ValueError, match="points need as many labels"):
                score(x, labels)
        with pytest.raises(ValueError, match="not finite"):
            score(x / 0, y)


def test_adjusted_rand():
    a, b = torch.tensor([0, 0, 1, 1, 2, 2, 2, 9]), torch.tensor([5, 5, 5, 1, 1, 1, 3, 3])
    pairs = [(i, j) for i in range(8) for j in range(i)]
    in_a, in_b = (np.array([v[i] == v[j] for i, j in pairs]) for v in (a.tolist(), b.tolist()))
    chance = in_a.sum() * in_b.sum() / len(pairs)
    expected = ((in_a & in_b).sum() - chance) / ((in_a.sum() + in_b.sum()) / 2 - chance)
    assert S.adjusted_rand_score(a, b) == pytest.approx(expected)
    assert S.adjusted_rand_score(a, 7 - a) == 1
    assert S.adjusted_rand_score(torch.zeros(6), torch.arange(6)) == 0
    with pytest.raises(ValueError, match="two labels"):
        S.adjusted_rand_score(a, a[:5])


def naive_uncertainty(fires, labels):
    """Mean U of the features that fire on some examples, from entropies in bits."""

    def entropy(values):
        p = np.unique(values, return_counts=True)[1] / len(values)
        return -(p * np.log2(p)).sum()

    fires, labels = fires.numpy().astype(int), labels.numpy()
    u = []
    for feature in fires.T[(fires.mean(0) > 0) & (fires.mean(0) < 1)]:
        mutual = entropy(feature) + entropy(labels) - entropy(100 * feature + labels)
        u.append(mutual / entropy(feature))
    return np.mean(u)


def naive_selectivity(z, labels):
    """Mean index (Morcos et al. 2018) of the features with a positive value."""
    z, labels, index = z.double().numpy(), labels.numpy(), []
    for feature in z.T[(z > 0).any(0)]:
        mu = sorted(np.maximum(feature[labels == c], 0).mean() for c in np.unique(labels))
        index.append((mu[-1] - np.mean(mu[:-1])) / (mu[-1] + np.mean(mu[:-1])))
    return np.mean(index)


def test_uncertainty_and_class_selectivity():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=generator) * 4
    z = torch.randn(300, 6, generator=generator) - 0.5
    z[:, 0], z[:, 1], z[:, 2] = -1, 1, (y == 4).float()  # never, always, exactly one class
    assert S.uncertainty_coefficient(z, y) == pytest.approx(naive_uncertainty(z > 0, y), rel=1e-5)
    assert S.class_selectivity_index(z, y) == pytest.approx(naive_selectivity(z, y), rel=1e-5)
    assert S.uncertainty_coefficient(z[:, :2], y) == S.class_selectivity_index(z[:, :2], y) == 0
    assert S.uncertainty_coefficient(z[:, 2:3], y) == pytest.approx(1)
    assert S.class_selectivity_index(z[:, 2:3], y) == 1


# === 6. Cycles ===


def final(*arguments, **options):
    *_, state = S.saeception(*arguments, **options)
    return state


def options(**more):
    quick = dict(d_sae=16, top_k=4, cycles=2, fit_options={"epochs": 2})
    return quick | {"sae_options": {"epochs": 3, "min_steps": 0}} | more


def test_saeception_keeps_arms_apart_and_the_model_as_it_was():
    data = blobs()
    model = small_net(data)
    before = copy.deepcopy(model)
    both = final(model, "1", data, data, **options(val=data))["rows"]
    alone = final(model, "1", data, data, **options(arms={"control": None}, val=data))["rows"]
    assert [f"{row['cycle']} {row['arm']}" for row in both] == [
        "0 baseline", "1 sae-ception", "1 control", "2 sae-ception", "2 control",
    ]  # fmt: skip
    assert all(row["val_silhouette"] == row["silhouette"] for row in both)
    assert all(row in untimed(both) for row in untimed(alone))  # the other arm is not felt
    assert same_parameters(model, before)
    # Dropout draws the same numbers in each arm.
    dropping = nn.Sequential(model[:2], nn.Dropout(0.5), model[2])
    *_, a, b = final(dropping, "0", data, data, **options(arms={"a": None, "b": None}))["rows"]
    assert (a["accuracy"], a["h_silhouette"]) == (b["accuracy"], b["h_silhouette"])


def test_rows_are_what_the_restored_models_and_saes_give():
    (x, y), test = blobs(), blobs(203, seed=1)  # no whole number of quarters
    train = x[y != 2], y[y != 2].int()  # without one of the classes
    model = small_net(train)
    state = final(model, "1", train, test, **options(cycles=1))
    row, (net, sae), y = state["rows"][1], S.restore(model, state, "sae-ception"), test[1]
    h, logits = S.activations(net, "1", test[0])
    z = sae.encode(h)
    # A unit of h fires above its own 75th percentile over the rows that are measured.
    level = np.percentile(h.numpy(), 75, axis=0, method="lower")
    expected = {
        "accuracy": (logits.argmax(1) == y).double().mean().item(), "fvu": fvu(sae, h),
        "l0": (z > 0).sum(1).double().mean().item(),
    }  # fmt: skip
    for prefix, points, fires in (("", z, z > 0), ("h_", h, h > torch.tensor(level))):
        for score, value in zip(SCORES, naive_scores(points, y), strict=True):
            expected[prefix + score.__name__.removesuffix("_score")] = value
        expected[f"{prefix}uncertainty"] = naive_uncertainty(fires, y)
        expected[f"{prefix}class_selectivity"] = naive_selectivity(points, y)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_a_rule_of_ones_own_and_the_weight_of_its_targets():
    data, calls, scale = blobs(), [], torch.zeros(1, requires_grad=True)
    model = small_net(data)

    def rule(sae, h, y, n_classes, top_k):
        calls.append((h, y, n_classes, top_k))
        return scale * h  # targets with a gradient are constants, too

    arms = {"to zero": rule, "control": None}
    more = options(arms=arms, weight=5.0, cycles=1, fit_options={"epochs": 20})
    state = final(model, "1", data, data, **more)
    ((h, y, *numbers),) = calls
    assert_close(h, S.activations(model, "1", data[0])[0])
    assert torch.equal(y, data[1]) and numbers == [4, 4]
    sizes = [S.activations(S.restore(model, state, arm)[0], "1", data[0])[0].norm() for arm in arms]
    assert sizes[0] < 0.8 * sizes[1] and scale.grad is None


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_labels_that_do_not_fit_are_refused_before_any_training(split):
    x, y = blobs()
    good = {name: (x, y) for name in ("train", "test", "val")}
    more = options(progress=lambda steps, desc: pytest.fail("it trains"))
    for bad in (y + 1, y.where(y != 3, -100), y.float(), y * math.nan):
        with pytest.raises(ValueError, match="class numbers have to be whole, from 0 to 3"):
            next(S.saeception(small_net(), "1", **good | {split: (x, bad)}, **more))


def test_states_do_not_change_and_a_stopped_call_goes_on(tmp_path):
    def progress(steps, desc):
        if "cycle 2 control" in desc:
            raise KeyboardInterrupt
        return steps

    data = blobs()
    model = small_net(data)
    states = list(S.saeception(model, "1", data, data, **options()))
    assert [len(state["rows"]) for state in states] == [1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt):
        for state in S.saeception(model, "1", data, data, **options(progress=progress)):
            torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)  # it is plain data
    assert len(state["rows"]) == 4
    rows = final(small_net(), "1", data, data, **options(state=state))["rows"]
    assert untimed(rows) == untimed(states[-1]["rows"])
    # One more arm is added to what there is, which is not done again.
    arms = {name: S.ARMS[name] for name in ("sae-ception", "control", "class-mean")}
    more = final(model, "1", data, data, **options(state=states[-1], arms=arms))["rows"]
    whole = untimed(final(model, "1", data, data, **options(arms=arms))["rows"])
    assert more[:5] == states[-1]["rows"] and len(more) == len(whole) == 7
    assert all(row in whole for row in untimed(more))


# === 7. Networks, against torchvision's forward and against a plain construction ===

FACEBOOK = "https://dl.fbaipublicfiles.com/convnext/convnextv2"


def normalized(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def jiggled(network):
    """With no parameter at its starting value of zero or one."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.eval()


def tiny_vit():
    return jiggled(VisionTransformer(32, 4, 4, 4, 128, 512, num_classes=7))


def test_vit_split_is_torchvisions_forward_at_its_own_size_and_another(tmp_path):
    vit, images, path = tiny_vit(), random_images(3, 32), str(tmp_path / "vit.pt")
    torch.save(vit.state_dict(), path)
    large = VisionTransformer(48, 4, 4, 4, 128, 512, num_classes=7).eval()
    large.load_state_dict(interpolate_embeddings(48, 4, dict(vit.state_dict())))
    bicubic = v2.InterpolationMode.BICUBIC
    resized = v2.functional.resize(images, [48, 48], bicubic, antialias=True)
    for size, whole, pixels in ((33, vit, images), (49, large, resized)):  # to whole patches
        trunk, model, layer = S.cifar10_vit("vit_tiny", size, 7, path)
        assert (model.head.weight == 0).all()  # a new head
        model.head.load_state_dict(vit.heads.head.state_dict())
        x = trunk.eval()(images).detach()
        with S.capture(whole.encoder.ln) as expected:
            assert_close(model.eval()(x), whole(normalized(pixels)))
        assert_close(S.activations(model, layer, x)[0], expected.h)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(d, d, 7, padding=3, groups=d), nn.LayerNorm(d, 1e-6)
        self.pwconv1, self.grn, self.pwconv2 = nn.Linear(d, 4 * d), nn.Module(), nn.Linear(4 * d, d)
        for name in ("gamma", "beta"):
            self.grn.register_parameter(name, nn.Parameter(torch.zeros(1, 1, 1, 4 * d)))

    def forward(self, x):
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        size = y.square().sum((1, 2), keepdim=True).sqrt()
        response = size / (size.mean(3, keepdim=True) + 1e-6)
        y = self.grn.gamma * (y * response) + self.grn.beta + y
        return x + self.pwconv2(y).permute(0, 3, 1, 2)


class OfficialConvNeXt(nn.Module):
    """ConvNeXt-V2 atto, written down plainly under the names of the official checkpoints."""

    def __init__(self):
        super().__init__()
        d = (40, 80, 160, 320)
        down = [nn.Sequential(LayerNorm2d(a, 1e-6), nn.Conv2d(a, 2 * a, 2, 2)) for a in d[:3]]
        first = nn.Sequential(nn.Conv2d(3, d[0], 4, 4), LayerNorm2d(d[0], 1e-6))
        self.downsample_layers = nn.ModuleList([first, *down])
        stages = [[Block(a) for _ in range(n)] for a, n in zip(d, (2, 2, 6, 2), strict=True)]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.norm, self.head = nn.LayerNorm(d[3], 1e-6), nn.Linear(d[3], 1000)

    def forward(self, x):
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        h = self.norm(x.mean((2, 3)))
        return h, self.head(h)


@torch.no_grad()
def test_convnext_is_the_official_network_and_keeps_its_head_for_imagenet(tmp_path, run):
    official, weights, images = jiggled(OfficialConvNeXt()), tmp_path / "w.pt", random_images(3, 64)
    torch.save({"model": official.state_dict()}, weights)
    h, logits = official(normalized(images))
    for n_classes in (5, None):
        trunk, model, layer = S.imagenet_convnext("convnextv2_atto", n_classes, str(weights))
        found = S.activations(model, layer, trunk(images))
        assert_close(found[0], h, rtol=1e-4, atol=1e-4)
    assert_close(found[1], logits, rtol=1e-4, atol=1e-3)  # None: its own head
    for place in (f"{split}/n{1440764 + c:08}" for split in ("train", "val") for c in range(1000)):
        (tmp_path / place).mkdir(parents=True)
        photo = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), np.uint8))
        photo.save(tmp_path / place / "a.bmp")
    flags = """--dataset imagenet --arch convnextv2_atto --image-size 32 --cycles 0 --workers 0
        --d-sae 64 --precision float32 --limit 60 --sae-min-steps 0""".split()
    with torch.enable_grad():
        done = run(*flags, "--data-dir", tmp_path, "--weights", weights)
    assert "baseline: train" not in done.err and "baseline: SAE" in done.err
    state = torch.load(done.folder / "checkpoint.pt")["states"][0]
    assert_close(S.restore(model, state, "baseline")[0](trunk(images)), found[1])


@pytest.mark.filterwarnings("ignore:for (weight|bias). copying from a non-meta")
def test_sizes_of_all_networks():
    """The counts that torchvision documents, and those that timm 1.0.31 gives."""
    counts = {
        "atto": 3_708_400, "femto": 5_233_240, "pico": 9_066_280, "nano": 15_623_800,
        "tiny": 28_635_496, "base": 88_717_800, "large": 197_956_840, "huge": 660_289_640,
        "vit_b_32": 88_224_232, "vit_b_16": 86_567_656, "vit_l_16": 304_326_632,
        "vit_h_14": 632_045_800,
    }  # fmt: skip
    for name, expected in counts.items():
        with torch.device("meta"):
            if name.startswith("vit"):
                trunk, model, _ = S.cifar10_vit(name, 224, 1000, "none")
            else:
                trunk, model, _ = S.imagenet_convnext(f"convnextv2_{name}", None, "none")
        assert sum(p.numel() for m in (trunk, model) for p in m.parameters()) == expected, name


def test_checkpoints_of_other_writers_and_those_that_do_not_fit(tmp_path):
    path, state, images = tmp_path / "w.pt", tiny_vit().state_dict(), random_images(2, 32)

    def features(content):
        torch.save(content, path)
        return S.cifar10_vit("vit_tiny", 32, 10, str(path))[0].eval()(images)

    expected = features(state)
    assert torch.equal(features({"model": state}), expected)
    assert features({name: v.half() for name, v in state.items()}).dtype == torch.float32
    damaged, narrow = path.read_bytes()[:5000], {"encoder.ln.bias": torch.zeros(7)}
    for bad in (state | narrow, state | {"more.bias": torch.zeros(2)}, [1, 2], damaged, b"text\n"):
        torch.save(bad, path)
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        with pytest.raises(OSError, match=f"weights {path} .*--weights PATH") as caught:
            S.cifar10_vit("vit_tiny", 32, 10, str(path))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:for (weight|bias). copying from a non-meta")
@pytest.mark.parametrize("arch, url", [
    ("vit_h_14", "https://download.pytorch.org/models/vit_h_14_swag-80465313.pth"),
    ("convnextv2_large", f"{FACEBOOK}/im22k/convnextv2_large_22k_384_ema.pt"),
    ("convnextv2_atto", f"{FACEBOOK}/im1k/convnextv2_atto_1k_224_ema.pt"),
])  # fmt: skip
def test_weights_come_from_their_official_place(arch, url, tmp_path, monkeypatch):
    def no_network(asked, **options):
        raise OSError(f"no route to {asked}")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    build = S.cifar10_vit if arch == "vit_h_14" else S.imagenet_convnext
    with pytest.raises(OSError, match=f"no route to {url}.* {tmp_path}"), torch.device("meta"):
        build(arch)


# === 8. Data ===


def write_mnist(root):
    """800 rendered digits as the four IDX files of MNIST."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, y = (t.numpy().astype(np.uint8) for t in S.render_digits(800))
    for name, part in (("train", slice(600)), ("t10k", slice(600, 800))):
        n = len(y[part])
        head, labels_head = struct.pack(">4i", 0x803, n, 28, 28), struct.pack(">2i", 0x801, n)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images[part].tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels_head + y[part].tobytes())
    return raw


def test_mnist_files_are_read_shuffled_and_split(tmp_path, monkeypatch):
    raw = write_mnist(tmp_path)
    (splits, names), few = (S.load_data("mnist", tmp_path, limit) for limit in (None, 50))
    (images, y), found = S.render_digits(800), {}
    for seed, same in ((0, True), (1, False)):
        assert torch.equal(S.render_digits.__wrapped__(800, seed)[0], images) == same
    assert images.dtype == torch.uint8 and set(y.tolist()) == set(range(10))
    known = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    for split, (pixels, labels) in splits.items():
        found[split] = [known[image.numpy().tobytes()] for image in pixels]
        assert torch.equal(labels, y[found[split]])  # an image keeps its label
        assert found[split] != sorted(found[split])
        assert torch.equal(few[0][split][0], pixels[:50]) and len(few[0][split][1]) == 50
    assert names == list("0123456789") and sorted(found["test"]) == list(range(600, 800))
    assert len(found["val"]) == 100 and sorted(found["train"] + found["val"]) == list(range(600))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    file = raw / "train-images-idx3-ubyte"
    for size in (500, 0):  # damaged
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(OSError, match="download mnist .*--data-dir, or use --dataset digits"):
            S.load_data("mnist", tmp_path)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with rendered digits in colour as the pickle files of CIFAR-10."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, y = S.render_digits(360)
    images = (F.pad(images, [2] * 4) * torch.tensor([1, 0.5, 0.25])[:, None, None]).byte()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        part = slice(40 * i, 360 if i == 5 else 40 * i + 40)
        content = {"data": images[part].flatten(1).numpy(), "labels": y[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = {"label_names": [f"name{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(classes))
    kind, files = torchvision.datasets.CIFAR10, [(name, None) for name in names]  # not their md5
    monkeypatch.setattr(kind, "train_list", files[:5])
    monkeypatch.setattr(kind, "test_list", files[5:])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    return folder.parent


def test_cifar_files_are_read(cifar):
    splits, names = S.load_data("cifar10", cifar)
    assert [len(splits[name][1]) for name in ("train", "val", "test")] == [180, 20, 160]
    pixels, labels, _ = S.load_torchvision("cifar10", cifar, train=False)
    images, y = S.render_digits(360)
    assert names[3] == "name3" and torch.equal(labels, y[200:])
    for channel, part in enumerate((1, 0.5, 0.25)):
        expected = (images[200:, 0] * part).byte()
        assert torch.equal(pixels[:, channel, 2:-2, 2:-2], expected)
    (cifar / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(OSError, match="download cifar10 .*--dataset digits"):
        S.load_data("cifar10", cifar)


def write_photos(root, classes=("cat", "dog"), n=12):
    """Photos of one colour per class and brightness per image, in train and val, of many kinds."""
    generator, kinds = np.random.default_rng(0), "a.JPEG b.png c.bmp d.jpg e.webp f.PNG".split()
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 60, (40 + i % 12, 50, 3), dtype=np.uint8)
                pixels[..., c % 3] += np.uint8(100 + 8 * (i % 12))
                image = Image.fromarray(pixels).convert({1: "P", 3: "CMYK"}.get(i, "RGB"))
                image.save(root / split / name / f"{i:02}{kinds[i % len(kinds)]}")
    return root


def test_photos_are_found_and_decoded(tmp_path):
    write_photos(tmp_path)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no photo")
    paths, y, names = S.load_folders(tmp_path, "train")
    assert names == ["cat", "dog"] and len(paths) == 24
    assert [names[c] for c in y] == [Path(path).parent.name for path in paths]
    images = S.decoded(paths, 32)
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images.float().mean((2, 3)).argmax(1), y)
    assert torch.equal(S.decoded(paths[[20, 3]], 32), images[[20, 3]])
    # A white frame, a 16th on each side, is cut off below 384 pixels, and not from there on.
    frame = np.full((160, 160, 3), 255, np.uint8)
    frame[10:-10, 10:-10] = 0
    Image.fromarray(frame).save(tmp_path / "frame.png")
    frame = [tmp_path / "frame.png"]
    assert S.decoded(frame, 70).max() < 60 and S.decoded(frame, 384).max() == 255
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="deep.png .its values do not fit into 8 bits"):
        S.decoded([tmp_path / "deep.png"], 32)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(ValueError, match="need the same classes; one lacks dog"):
        S.load_data("imagenet", tmp_path)


# === 9. Trunk pass ===


def small_trunk():
    torch.manual_seed(0)
    return nn.Sequential(v2.ToDtype(torch.float32, scale=True), nn.Flatten(), nn.Linear(48, 5))


def trunk_pass(images, folder, stop=math.inf, **options):
    """How many batches of 64 images the trunk gets, at most `stop`, and the features."""
    done = []

    def progress(steps):
        for step in steps:
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(len(step))
            yield step

    x = S.trunk_features(small_trunk(), images, folder, progress=progress, **options)
    return sum(done), x


def test_features_are_kept_and_what_changed_is_made_again(tmp_path):
    images, folder = random_images(5000, 4), tmp_path / "deep" / "features"
    with pytest.raises(KeyboardInterrupt):
        trunk_pass(images, folder, stop=40)
    seen, x = trunk_pass(images, folder)  # what was done before the stop is kept
    assert_close(x, small_trunk()(images).detach())
    assert seen == 5000 - 2048 and trunk_pass(images, folder)[0] == 0
    whole = next(f for f in folder.iterdir() if np.array_equal(np.load(f)["x"], x[:2048]))
    data, damaged = whole.read_bytes(), bytearray(whole.read_bytes())
    damaged[len(data) // 2] ^= 1
    for content in (damaged, data[:-9], b""):  # that file, and only that
        whole.write_bytes(content)
        seen, again = trunk_pass(images, folder)
        assert seen == 2048 and torch.equal(again, x) and whole.stat().st_size == len(data)
    changed = images.clone()
    changed[4500] += 1
    seen, again = trunk_pass(changed, folder)
    assert seen == 5000 - 4096 and (again != x).any(1).nonzero().tolist() == [[4500]]
    for rank, part in enumerate((2048, 2048, 904, 0)):  # four processes share it
        assert trunk_pass(images, tmp_path / "shared", share=(rank, 4))[0] == part
    seen, again = trunk_pass(images, tmp_path / "shared")
    assert seen == 0 and torch.equal(again, x)


def test_precision_of_features(tmp_path):
    images, trunk = random_images(300, 4), small_trunk()
    x = S.trunk_features(trunk, images, tmp_path / "x")
    rough = S.trunk_features(trunk, images, tmp_path / "rough", bfloat16=True)
    assert not torch.equal(rough, x) and torch.allclose(rough, x, rtol=0.02, atol=0.02)
    trunk[2].bias.data += math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        S.trunk_features(trunk, images, tmp_path / "inf")


def test_a_full_disk_leaves_old_files_whole_and_no_new_ones(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    S.write_whole(tmp_path / "old", lambda file: file.write(b"old"))
    monkeypatch.setattr(np, "savez", full)
    for write in (lambda: S.write_whole(tmp_path / "old", full),
                  lambda: trunk_pass(random_images(9, 4), tmp_path)):  # fmt: skip
        with pytest.raises(OSError, match="cannot write .*No space left.*make room"):
            write()
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


# === 10, 11. Results and command line ===


def test_run_end_to_end_and_twice(tmp_path, run):
    write_mnist(tmp_path / "data")
    flags = ["--dataset", "mnist", "--data-dir", tmp_path / "data", "--cycles", 2, *QUICK]
    first, again = run(*flags), run(*flags)
    folder = first.folder
    assert "seed 0 cycle 2 control: SAE" in first.err and str(folder) in first.err
    arms = [line.split()[2] for line in first.out.splitlines()]
    assert arms[1:6] == ["baseline", *2 * ["sae-ception", "control"]] and len(arms) == 9
    files = {"results.json", "checkpoint.pt", "clusters.png", "features.png"}
    assert {p.name for p in folder.iterdir()} == files
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["top_k"] == 8 and results["environment"]["torch"] == torch.__version__
    assert untimed(rows_of(again.folder)) == untimed(results["rows"])
    for name in ("clusters.png", "features.png"):
        with Image.open(folder / name) as image:
            assert image.width > 900 and len(image.convert("RGB").getcolors(10**7)) > 10
    # Killed between the two files, the checkpoint is ahead of results.json, which has to catch up.
    (folder / "results.json").write_text("{}")
    resumed = run("--resume", folder)
    assert resumed.out == first.out and "SAE" not in resumed.err  # nothing is trained anew
    assert rows_of(folder) == results["rows"]
    refused = run("--resume", folder, "--top-k", 9, status=2)
    assert "was run with --top-k 8" in refused.err
    for content in ((folder / "checkpoint.pt").read_bytes()[:100], b"no checkpoint"):
        (folder / "checkpoint.pt").write_bytes(content)
        assert "no run folder" in run("--resume", folder, status=2).err


def test_settings_reach_what_they_set(run, monkeypatch):
    calls = []

    def spy(true, *args, **kwargs):
        calls.append((args, kwargs))
        return true(*args, **kwargs)

    for name in ("fit", "train_sae"):
        monkeypatch.setattr(S, name, functools.partial(spy, getattr(S, name)))
    flags = """--arch mlp --limit 200 --cycles 1 --layer relu2 --top-k 7 --aux-weight 0.25
        --aux-loss cosine --sae topk --d-sae 40 --sae-k 5 --epochs 2 --sae-epochs 4 --batch-size 50
        --sae-min-steps 9 --lr 0.01 --arms class-mean --precision bfloat16 --baseline-epochs 0"""
    rows = rows_of(run(*flags.split()).folder)
    assert [row["arm"] for row in rows] == ["baseline", "class-mean"]
    assert all(row["l0"] <= 5 for row in rows)
    (_, baseline), _, (fit_args, fit), (sae_args, sae) = calls
    assert baseline["epochs"] == 0
    assert fit_args[1] == "relu2" and fit_args[4].shape == (200, 16) and fit_args[5] == 0.25
    assert fit.items() >= dict(aux_loss="cosine", epochs=2, batch_size=50, lr=0.01).items()
    assert sae_args[1:3] == (40, 5)
    assert sae.items() >= dict(epochs=4, min_steps=9, bfloat16=True).items()


def test_the_picture_shows_no_features_of_a_class_without_any():
    z, images, y = torch.rand(20, 4), torch.zeros(20, 1, 28, 28).byte(), torch.arange(20) % 2
    mean = torch.tensor([[0.5, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    picture = np.array(S.draw_features(z, images, y, mean, ["cat", "dog"], 28).convert("L"))
    black = [(row < 9).sum() // (44 * 44) for row in np.split(picture[10:], [98])]
    assert black == [16, 0]  # two features of eight black images each; none


def test_a_finished_run_takes_more_cycles_seeds_and_arms(run):
    folder = run(*MLP, "--cycles", 1, "--arms", "control").folder
    more = ["--cycles", 2, "--seeds", 3, 0, 3, "--arms", "sae-ception", "control"]
    before = rows_of(folder)
    run("--resume", folder, *more)
    assert rows_of(folder)[:2] == before  # their seconds, too: they are not done again
    at_once = run(*MLP, *more)
    rows = untimed(rows_of(at_once.folder))

    def order(row):
        return row["seed"], row["cycle"], row["arm"]

    assert sorted(untimed(rows_of(folder)), key=order) == sorted(rows, key=order)
    assert [row["seed"] for row in rows] == 5 * [3] + 5 * [0]
    # The summary of the seeds, and of the difference, seed by seed.
    value = {order(row): row["accuracy"] for row in rows}
    control, ours = ([value[seed, 2, arm] for seed in (3, 0)] for arm in ("control", "sae-ception"))
    for arm, values in (("control", control), ("difference", np.subtract(ours, control))):
        for name, number in (("mean", np.mean(values)), ("std", np.std(values, ddof=1))):
            assert re.search(rf"^ *{name} +2 +{arm} +{number:.4f} ", at_once.out, re.M)


def test_killed_and_resumed(tmp_path, run):
    flags = [*MLP, *"--epochs 4 --cycles 3 --seeds 1 0".split()]
    process = start(tmp_path, *flags)
    next(line for line in process.stdout if " control " in line)  # cycle 1 of 3, seed 1 of 2
    process.kill()
    process.communicate()
    (folder,) = tmp_path.glob("runs/*")
    assert 1 < len(rows_of(folder)) < 14
    run("--resume", folder)
    assert untimed(rows_of(folder)) == untimed(rows_of(run(*flags).folder))


def test_a_stop_during_the_trunk_pass_says_how_to_go_on(tmp_path, run):
    flags = """--tune last --cycles 0 --baseline-epochs 0 --sae-min-steps 0 --sae-epochs 1
        --limit 6000 --d-sae 32 --batch-size 2 --device cpu --cache-dir""".split()
    process = start(tmp_path, *flags, tmp_path)
    while not list(tmp_path.glob("digits-*/*.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # Ctrl-C
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    hint = re.search(r"interrupted; .* --resume (\S+) goes on from there$", err.strip())
    (cache,) = tmp_path.glob("digits-*")
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert 1 <= len(files) < 5 and all(file.suffix == ".npz" for file in files)
    run("--resume", tmp_path / hint[1])
    assert len(list(cache.iterdir())) == 5
    assert all(file.stat().st_mtime_ns == made for file, made in files.items())


def test_vit_on_cifar_end_to_end(cifar, tmp_path, run, monkeypatch):
    augments, fit = [], S.fit
    monkeypatch.setattr(S, "fit", lambda *a, **k: augments.append(k.get("augment")) or fit(*a, **k))
    flags = ["--dataset", "cifar10", "--arch", "vit_tiny", "--data-dir", cifar, *QUICK]
    flags += ["--cycles", 1, "--limit", 20, "--baseline-epochs", 1]
    whole = run(*flags)
    assert "trunk, " not in whole.err  # --tune all is the default here
    assert [row["arm"] for row in rows_of(whole.folder)] == ["baseline", "sae-ception", "control"]
    assert augments[0](random_images(1, 32)[0]).shape == (3, 32, 32)  # flip-crop is the default
    # A cached trunk serves other settings and seeds, but no other image size or weights.
    flags += ["--tune", "last", "--cycles", 0, "--cache-dir", tmp_path / "cache"]
    torch.save(tiny_vit().state_dict(), tmp_path / "w.pt")
    for more, passes in (
        ([], 3), (["--top-k", 9, "--seeds", 1, 0], 0), (["--image-size", 16], 3),
        (["--weights", tmp_path / "w.pt"], 3),
    ):  # fmt: skip
        assert run(*flags, *more).err.count("trunk, ") == passes, more
    assert augments[-1] is None


def test_photos_end_to_end(tmp_path, run):
    data = write_photos(tmp_path / "data")
    bad = data / "val" / "cat" / "07b.png"
    good = bad.read_bytes()
    bad.write_bytes(b"not an image")
    flags = [*PHOTOS, "--cycles", 1, "--data-dir", data, "--workers"]
    for workers in (2, 0):
        stopped = run(*flags, workers, status=1)
        assert f"cannot read the image {bad}" in stopped.err
        assert stopped.err.strip().endswith(f"--resume {stopped.folder} goes on from there")
    bad.write_bytes(good)
    folder = stopped.folder
    assert run("--resume", folder).err.count("trunk, ") == 1  # the other splits were done
    rows = rows_of(folder)
    assert len(rows) == 3 and all(math.isfinite(row["silhouette"]) for row in rows)
    for file in data.glob("*/*/*"):
        os.utime(file)  # a copy or a checkout does so; the photos are the same
    assert "trunk, " not in run("--resume", folder).err and rows_of(folder) == rows
    for file in data.glob("*/*/*"):  # one photo of each class leaves the metrics undefined
        if file.name not in ("00a.JPEG", *["01b.png", "02c.bmp"] * (file.parts[-3] == "train")):
            file.unlink()
    row = rows_of(run(*flags, 0).folder)[0]
    assert row["silhouette"] is None and row["val_fvu"] is None  # val is a single photo


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
def test_two_processes_come_to_the_same_as_one(tmp_path, run, monkeypatch):
    photos = [*PHOTOS, "--workers", 0, "--data-dir", write_photos(tmp_path / "data")]
    script = """import json, os, sys, saeception
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, flags in json.loads(sys.argv[1]).items():  # each on a port of its own
    os.environ["MASTER_PORT"] = port
    assert saeception.main(flags) == 0
"""
    (tmp_path / "both.py").write_text(script)
    port, runs, alone = 29000 + os.getpid() % 1000, {}, []
    # The first shares the trunk pass; the second has none, and one process does it all.
    for i, flags in enumerate((photos, MLP)):
        flags = [*map(str, flags), "--cycles", "1"]
        alone.append(run(*flags, "--cache-dir", tmp_path / "one").folder)
        runs[port + 1 + i] = [*flags, "--out-dir", str(tmp_path / f"two{i}")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    launch = f"--nproc-per-node 2 --master-port {port} --redirects 3 --log-dir {tmp_path}/logs"
    script = [str(tmp_path / "both.py"), json.dumps(runs)]
    torch.distributed.run.main([*launch.split(), *script])  # what torchrun calls
    err = "".join(file.read_text() for file in tmp_path.glob("logs/**/stderr.log"))
    assert err.count("baseline: train") == 2, err  # one prints
    for i, folder in enumerate(alone):
        (both,) = (tmp_path / f"two{i}").iterdir()
        for row, other in zip(rows_of(both), rows_of(folder), strict=True):
            for key in ("accuracy", "silhouette", "davies_bouldin", "h_silhouette"):
                assert row[key] == pytest.approx(other[key], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("arguments, status, message", [
    ("--dataset imagenet --data-dir nosuch", 1, "no images .*nosuch/train"),
    ("--dataset imagenet --tune all", 2, "--tune all keeps all images in memory"),
    ("--dataset cifar10 --arch convnextv2_atto", 2, "choose vit_h_14, vit_l_16"),
    ("--weights no.pt --dataset cifar10 --arch vit_tiny --data-dir DATA", 1, "weights no.pt"),
    ("--dataset cifar10 --data-dir DATA --weights none --image-size 13", 2, "a patch of"),
    ("--nosuch 1", 2, "--nosuch"),
    ("--cycles -1", 2, "--cycles: invalid int .from 0 up. value: '-1'"),
    ("--lr nan", 2, "--lr: invalid float"),
    ("--sae topk --sae-k 600", 2, "--sae-k have to be at most --d-sae, 512"),
    ("--arch mlp --layer nosuch", 2, "trunk.1, fc1, relu1, fc2, relu2, head"),
    ("--arch mlp --layer trunk.1 --limit 99 --baseline-epochs 0 --sae-min-steps 0", 2,
     "nothing that is trained is below layer 'trunk.1'"),
    ("--resume .", 2, "no run folder"),
    ("--arch mlp --lr 1e9", 1, "seed 0 cycle 0 baseline: the loss diverged in epoch"),
    ("--arch mlp --out-dir FILE", 1, "FILE"),
    pytest.param("--device cuda", 2, "--device cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has CUDA")),
])  # fmt: skip
def test_bad_input_gets_one_line(arguments, status, message, tmp_path, run, cifar):
    (tmp_path / "file").write_text("in the way")
    for word, place in (("DATA", cifar), ("FILE", tmp_path / "file")):
        arguments, message = arguments.replace(word, str(place)), message.replace(word, str(place))
    assert re.search(message, run(*arguments.split(), status=status).err)


def test_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        S.main(["--help"])
    out, names = " ".join(capsys.readouterr().out.split()), vars(S.make_parser("").parse_args([]))
    assert stop.value.code == 0 and all(f"--{name.replace('_', '-')} " in out for name in names)
    assert out.count("(default:") == len(names)


def test_the_method_works_without_what_is_below_it_and_with_torch_alone():
    data, namespace = blobs(), {}
    method = (HERE / "saeception.py").read_text().split("# === 7. ")[0]
    others = r"^(import numpy|import torchvision|from PIL|from torchvision).*\n"
    exec(compile(re.sub(others, "", method, flags=re.M), "method", "exec"), namespace)
    *_, alone = namespace["saeception"](small_net(), "1", data, data, **options())
    whole = final(small_net(), "1", data, data, **options())
    assert untimed(alone["rows"]) == untimed(whole["rows"])


def test_the_example_of_the_readme(capsys):
    text = (HERE / "README.md").read_text()
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.S)[1]
    exec(compile(example, "README.md", "exec"), {})
    rows = capsys.readouterr().out.strip().splitlines()
    assert "sae-ception" in rows[-2] and "control" in rows[-1]
