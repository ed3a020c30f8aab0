"""Behaviour that users of saeception.py rely on. Makes its own data; needs no network, no GPU."""

import ast
import contextlib
import hashlib
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
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import saeception as S

HERE = Path(__file__).parent
SMALL = ["--limit", "400", "--epochs", "2", "--sae-epochs", "3"]


def blobs(n=400, d=6, classes=4, seed=0):
    """Points around one centre per class, all positive, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 3 * torch.rand(classes, d, generator=generator)
    return (centres[y] + 0.3 * torch.randn(n, d, generator=generator)).relu(), y


def small_net(d=6, classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, classes))


def write_mnist(root, n_train=600, n_test=200):
    """Rendered digits as the four IDX files of MNIST."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, y = S.render_digits(n_train + n_test)
    for name, part in (("train", slice(n_train)), ("t10k", slice(n_train, None))):
        pixels, labels = images[part].numpy(), y[part].numpy().astype(np.uint8)
        head = struct.pack(">4i", 0x803, len(pixels), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">2i", 0x801, len(labels))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return raw


def untimed(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def rows_of(folder):
    return untimed(json.loads((folder / "results.json").read_text())["rows"])


def run(capsys, out, *arguments):
    """main() in this process: exit status, stdout, stderr and the new run folder, if any."""
    before = set(out.glob("*"))
    try:
        status = S.main([*map(str, arguments), "--out-dir", str(out)])
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr()
    return status, text.out, text.err, next(iter(set(out.glob("*")) - before), None)


# === 1. Sparse autoencoder ===


@pytest.mark.parametrize("k", [None, 5])
def test_sae_is_its_formula(k):
    sae = S.SparseAutoencoder(6, 20, k)
    with torch.no_grad():
        sae.b_dec += 0.3
        sae.b_enc -= 0.1
    h = blobs()[0]
    h_hat, z = sae(h)
    weights = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in sae.named_parameters()}
    assert shapes == {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    expected = (h.numpy() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = np.maximum(expected, 0)
    if k:
        expected[expected < np.sort(expected, axis=1)[:, -k][:, None]] = 0
    np.testing.assert_allclose(z.detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(
        h_hat.detach().numpy(), expected @ weights["W_dec"] + weights["b_dec"], atol=1e-5
    )


def test_train_sae_reconstructs_with_unit_rows_and_is_repeatable():
    h, _ = blobs(2000)
    before = torch.get_rng_state()
    a, b = (S.train_sae(h, 32, l1=0.02, epochs=20, batch_size=64, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers are left alone
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(32))
    h_hat, z = a(h)
    assert (h - h_hat).square().sum() < 0.05 * (h - h.mean(0)).square().sum()
    assert (z > 0).float().mean() < 0.8


@pytest.mark.parametrize("k", [None, 3])
def test_an_sae_is_as_good_when_trained_in_bfloat16(k):
    h, _ = blobs(2000)
    saes = [S.train_sae(h, 32, k, l1=0.02, epochs=20, bfloat16=b) for b in (False, True)]
    exact, rough = [(h - sae(h)[0]).square().sum().item() for sae in saes]
    assert saes[1].W_dec.dtype == torch.float32 and not torch.equal(saes[0].W_dec, saes[1].W_dec)
    assert rough < 1.1 * exact
    with torch.autocast("cpu", torch.bfloat16):  # of a caller, who may have one around everything
        again = S.train_sae(h, 32, k, l1=0.02, epochs=20, bfloat16=True)
    assert torch.equal(again.W_dec, saes[1].W_dec)


def test_train_sae_folds_its_scale_back():
    h, _ = blobs(1000)
    small = S.train_sae(h, 16, epochs=5, batch_size=100)
    large = S.train_sae(1000 * h, 16, epochs=5, batch_size=100)
    torch.testing.assert_close(large.encode(1000 * h), 1000 * small.encode(h), rtol=1e-2, atol=2)


def test_topk_sae_has_k_active_features():
    h, _ = blobs(1000)
    z = S.train_sae(h, 32, k=3, epochs=10, batch_size=100).encode(h)
    assert (z > 0).sum(1).max() == 3
    with pytest.raises(ValueError, match="k = 33"):
        S.SparseAutoencoder(6, 32, k=33)


def test_dead_features_are_resampled():
    h, _ = blobs(1000)
    sae = S.SparseAutoencoder(6, 16)
    optimizer = torch.optim.Adam(sae.parameters())
    h_hat, _ = sae(h)
    (h_hat - h).square().mean().backward()
    optimizer.step()
    dead = torch.arange(16) < 4
    error = torch.zeros(1000)
    error[7] = 1.0  # the one badly reconstructed example
    with torch.no_grad():
        sae.b_enc[dead] = -100
        kept = sae.W_dec[~dead].clone()
        S.resample(sae, optimizer, dead, h, error, torch.Generator())
        direction = nn.functional.normalize(h[7] - sae.b_dec, dim=0)
        torch.testing.assert_close(sae.W_dec[dead], direction.expand(4, 6))
        assert torch.equal(sae.W_dec[~dead], kept)
        assert (sae.encode(h[7:8])[:, dead] > 0).all()
    assert (optimizer.state[sae.W_enc]["exp_avg"][:, dead] == 0).all()
    assert (optimizer.state[sae.W_enc]["exp_avg"][:, ~dead] != 0).any()


def test_train_sae_refuses_a_dead_layer():
    for h, reason in ((torch.zeros(99, 4), "dead"), (torch.ones(99, 4), "dead"),
                      (torch.full((99, 4), math.nan), "not finite")):  # fmt: skip
        with pytest.raises(FloatingPointError, match=reason):
            S.train_sae(h, 8)


# === 2. Hook capture ===


def test_capture_vectors_tokens_maps():
    identity = nn.Identity()
    for shape, expected in (
        ((5, 3), lambda t: t),
        ((5, 7, 3), lambda t: t[:, 0]),
        ((5, 3, 4, 4), lambda t: t.mean((2, 3))),
    ):
        t = torch.randn(shape, requires_grad=True)
        with S.capture(identity) as seen:
            identity(t)
        torch.testing.assert_close(seen.h, expected(t))
        assert seen.h.requires_grad


def test_capture_leaves_no_hook_behind():
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), S.capture(layer):
        layer(torch.randn(2, 4))
    lstm = nn.LSTM(3, 3)
    with pytest.raises(ValueError, match="none of"), S.capture(lstm) as seen:
        lstm(torch.randn(2, 5, 3))
    assert not layer._forward_hooks and not lstm._forward_hooks and seen.h is None


def test_capture_is_safe_from_work_in_place():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with S.capture(model[0]) as seen:
        x = torch.randn(50, 3)
        model(x)
    torch.testing.assert_close(seen.h, model[0](x))
    assert (seen.h < 0).any()


def test_activations_in_chunks_and_unknown_layer():
    x, _ = blobs(101)
    model = small_net()
    h, logits = S.activations(model, "1", x, chunk=10)
    torch.testing.assert_close(h, model[:2](x))
    torch.testing.assert_close(logits, model(x))
    with pytest.raises(ValueError, match="no layer 'nosuch'; the layers are 0, 1, 2"):
        S.activations(model, "nosuch", x)


# === 3. Feature sharpening ===


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="2048 rows but 4096 classes"):
        S.class_mean(torch.ones(2048, 1), torch.zeros(4096).long(), 1)
    for train in (lambda: S.train_sae(torch.ones(0, 3), 8), lambda: S.batches(0, 5, 1, 0)):
        with pytest.raises(ValueError, match="no rows"):
            train()


def test_class_top_k_and_sharpen_by_hand():
    z = torch.tensor([[5.0, 0, 1, 0], [1, 0, 3, 0], [0, 2, 0, 0], [0, 4, 1, 1]])
    y = torch.tensor([0, 0, 2, 2])  # class 1 has no examples
    mask = S.class_top_k(z, y, 3, 1)
    assert mask.tolist() == [[True, False, False, False], [False] * 4, [False, True, False, False]]
    assert S.sharpen(z, y, mask).tolist() == [
        [5, 0, 0, 0],
        [1, 0, 0, 0],
        [0, 2, 0, 0],
        [0, 4, 0, 0],
    ]
    # A class never keeps what it never uses, even where k leaves room.
    assert S.class_top_k(z, y, 3, 4).tolist()[0] == [True, False, True, False]
    for k in (0, 5):
        with pytest.raises(ValueError, match="top-k"):
            S.class_top_k(z, y, 3, k)


def test_targets_stream_and_belong_to_their_images():
    h, y = blobs(9000)  # more than one chunk
    sae = S.train_sae(h, 24, epochs=1)
    targets = S.sharpened_targets(sae, h, y, 4, 5)
    z = sae.encode(h)
    mask = torch.zeros(4, 24, dtype=torch.bool)
    for c in range(4):
        mask[c, z[y == c].mean(0).argsort(descending=True)[:5]] = True
    torch.testing.assert_close(targets, sae.decode(torch.where(mask[y], z, 0)))
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(S.sharpened_targets(sae, h[order], y[order], 4, 5), targets[order])


def test_keeping_every_feature_is_plain_reconstruction():
    h, y = blobs()
    sae = S.train_sae(h, 24, epochs=2)
    torch.testing.assert_close(S.sharpened_targets(sae, h, y, 5, 24), sae(h)[0])


# === 4. Metrics, against slow and plain definitions in float64 ===


def naive_silhouette(x, labels):
    distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    scores = []
    for i, own in enumerate(labels):
        if (labels == own).sum() == 1:
            scores.append(0.0)
            continue
        a = distance[i][labels == own].sum() / ((labels == own).sum() - 1)
        b = min(distance[i][labels == other].mean() for other in set(labels) - {own})
        scores.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return np.mean(scores)


def naive_davies_bouldin(x, labels):
    names = sorted(set(labels))
    centres = [x[labels == c].mean(0) for c in names]
    spread = [
        np.linalg.norm(x[labels == c] - m, axis=1).mean()
        for c, m in zip(names, centres, strict=True)
    ]
    n = range(len(names))
    return np.mean(
        [
            max(
                (spread[i] + spread[j]) / np.linalg.norm(centres[i] - centres[j])
                for j in n
                if j != i
            )
            for i in n
        ]
    )


def naive_calinski_harabasz(x, labels):
    within = between = 0.0
    for c in set(labels):
        part = x[labels == c]
        within += ((part - part.mean(0)) ** 2).sum()
        between += len(part) * ((part.mean(0) - x.mean(0)) ** 2).sum()
    c = len(set(labels))
    return between / within * (len(x) - c) / (c - 1)


def metric_cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 8, generator=generator)
    y = torch.randint(0, 5, (150,), generator=generator)
    single, twice, far_point = y.clone(), x.clone(), x.clone()
    single[0], single[1] = 77, -3
    twice[50:100] = twice[:50]
    far_point[0] = 1e6
    separate = x / 100 + torch.randn(5, 8, generator=generator)[y]
    return {
        "random": (x, y), "singletons": (x, single), "duplicates": (twice, y),
        "far": (x + 1000, y), "one far point": (far_point, y), "separate": (separate, y),
        "sparse": ((x - 1.5).relu(), y), "pairs": (x, torch.arange(150) // 2),
    }  # fmt: skip


@pytest.mark.parametrize("case", metric_cases())
def test_cluster_metrics(case):
    x, y = metric_cases()[case]
    plain = x.double().numpy(), y.numpy()
    assert S.silhouette_score(x, y, chunk=37) == pytest.approx(naive_silhouette(*plain), rel=1e-5)
    assert S.davies_bouldin_score(x, y) == pytest.approx(naive_davies_bouldin(*plain), rel=1e-5)
    expected = naive_calinski_harabasz(*plain)
    assert S.calinski_harabasz_score(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["high", "medium", "backend", "autocast"])
def test_silhouette_does_not_trust_rough_products(how):
    x, y = torch.randn(500, 300).relu(), torch.arange(500) % 5
    exact = naive_silhouette(x.double().numpy(), y.numpy())
    context = contextlib.nullcontext()  # TF32 or bfloat16, where the machine has them
    if how == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif how != "backend":
        torch.set_float32_matmul_precision(how)
    elif hasattr(torch.backends.mkldnn, "matmul"):  # the newer way to say "medium", torch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with context:
            assert S.silhouette_score(x, y) == pytest.approx(exact, rel=1e-5)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cluster_metrics_of_degenerate_points():
    y = torch.arange(10) // 5
    one_place, two_places = torch.full((10, 2), 0.1), torch.randn(2, 3)[y]
    assert S.silhouette_score(one_place, y) == S.davies_bouldin_score(one_place, y) == 0
    assert S.silhouette_score(two_places, y) == pytest.approx(1)
    assert S.davies_bouldin_score(two_places, y) == 0
    assert S.calinski_harabasz_score(two_places, y) == S.calinski_harabasz_score(one_place, y) == 1


@pytest.mark.parametrize("score", ["silhouette", "davies_bouldin", "calinski_harabasz"])
def test_cluster_metrics_refuse(score):
    score = getattr(S, f"{score}_score")
    x = torch.randn(10, 3)
    for labels in (torch.zeros(10), torch.arange(10), torch.arange(9) % 2):
        with pytest.raises(ValueError, match="points need as many labels"):
            score(x, labels)
    with pytest.raises(ValueError, match="not finite"):
        score(x / 0, torch.arange(10) % 2)


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e15, 1e20])
def test_silhouette_at_any_scale(scale):
    x, y = metric_cases()["random"]
    exact = S.silhouette_score(x.double(), y)
    assert S.silhouette_score(x * scale, y) == pytest.approx(exact, rel=1e-4)


def test_silhouette_of_close_clusters_and_one_far_point():
    y = torch.arange(300) % 3
    x = torch.tensor([[0.0, 0], [1e-3, 0], [0, 1e-3]])[y]
    x = x + 3e-4 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    x[0] = 1e4
    expected = naive_silhouette(x.double().numpy(), y.numpy())
    assert S.silhouette_score(x, y) == pytest.approx(expected, rel=1e-4)


def test_metrics_leave_their_input_alone():
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3 + 5
    before = x.clone()
    S.silhouette_score(x, y), S.davies_bouldin_score(x, y), S.calinski_harabasz_score(x, y)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "int"])
def test_metrics_of_points_of_other_types(kind):
    x, y = metric_cases()["random"]
    x = getattr(10 * x, kind)()
    for name in ("silhouette", "davies_bouldin", "calinski_harabasz"):
        score = getattr(S, f"{name}_score")
        assert score(x, y) == pytest.approx(score(x.double(), y), rel=1e-5)


def test_adjusted_rand():
    a = torch.tensor([0, 0, 1, 1, 2, 2, 2, 9])
    b = torch.tensor([5, 5, 5, 1, 1, 1, 3, 3])
    n = len(a)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    in_a, in_b = (np.array([v[i] == v[j] for i, j in pairs]) for v in (a.tolist(), b.tolist()))
    chance = in_a.sum() * in_b.sum() / len(pairs)
    expected = ((in_a & in_b).sum() - chance) / ((in_a.sum() + in_b.sum()) / 2 - chance)
    assert S.adjusted_rand_score(a, b) == pytest.approx(expected)
    assert S.adjusted_rand_score(a, 7 - a) == 1
    assert S.adjusted_rand_score(torch.zeros(6), torch.arange(6)) == 0
    for b in (a[:5], a[:0]):
        with pytest.raises(ValueError, match="two labels"):
            S.adjusted_rand_score(a if len(b) else b, b)


def test_uncertainty_coefficient():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=generator) * 4
    z = (torch.randn(300, 6, generator=generator) - 0.5).relu()
    z[:, 0], z[:, 1], z[:, 2] = 0, 1, (y == 4).float()  # never, always, exactly one class

    def entropy_bits(labels):
        p = np.unique(labels, return_counts=True)[1] / len(labels)
        return -(p * np.log2(p)).sum()

    values = []
    for feature in range(2, 6):
        fires = (z[:, feature] > 0).numpy()
        joint = entropy_bits(fires.astype(int) * 100 + y.numpy())
        information = entropy_bits(fires) + entropy_bits(y.numpy()) - joint
        values.append(information / entropy_bits(fires))
    assert values[0] == pytest.approx(1)
    assert S.uncertainty_coefficient(z, y) == pytest.approx(np.mean(values), rel=1e-5)
    assert S.uncertainty_coefficient(z[:, :2], y) == 0


# === 5, 6. Models and data ===


def test_rendered_digits():
    images, y = S.render_digits(500, seed=1)
    again, y_again = S.render_digits(500, seed=1)
    assert images.shape == (500, 1, 28, 28) and images.dtype == torch.uint8
    assert set(y.tolist()) == set(range(10))
    assert torch.equal(images, again) and torch.equal(y, y_again)
    assert not torch.equal(images, S.render_digits(500, seed=2)[0])


def test_mnist_files_are_read_and_split(tmp_path):
    write_mnist(tmp_path)
    data = S.load_data("mnist", tmp_path)
    assert [len(y) for _, y in (data.train, data.val, data.test)] == [500, 100, 200]
    images, y = S.render_digits(800)
    assert torch.equal(data.test[0], images[600:]) and torch.equal(data.test[1], y[600:])
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, y, strict=True)}
    for split in (data.train, data.val):  # an image keeps its label
        for image, label in zip(*split, strict=True):
            assert known[image.numpy().tobytes()] == label
    parts = [{image.numpy().tobytes() for image in split[0]} for split in (data.train, data.val)]
    assert not parts[0] & parts[1]
    trunk, model, layer = S.mnist_mlp()
    h, logits = S.activations(model, layer, trunk(data.test[0]))
    assert h.shape == (200, 16) and (h >= 0).all() and logits.shape == (200, 10)


def test_limit_is_balanced():
    y = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    counts = y[S.balanced(y, 30)].bincount().tolist()
    assert sum(counts) == 30 and counts[1] == 3 and abs(counts[0] - counts[2]) <= 1


def test_damaged_and_missing_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(OSError, match="train-images-idx3-ubyte.*--dataset digits"):
        S.load_torchvision("mnist", tmp_path / "none", train=True)
    raw = write_mnist(tmp_path)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">2i", 0x801, 3) + bytes(3))
    with pytest.raises(OSError, match=r"3 labels and images \[200, 1, 28"):
        S.load_torchvision("mnist", tmp_path, train=False)
    for size in (0, 5, 20, 500):
        images = raw / "train-images-idx3-ubyte"
        images.write_bytes(images.read_bytes()[:size])
        with pytest.raises(OSError, match="put whole train-images"):
            S.load_torchvision("mnist", tmp_path, train=True)


# === 5. Models: networks against torchvision's forward and against a plain construction ===


def random_images(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def normalized(images):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def jiggled(network):
    """With no parameter at its starting value of zero or one."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return network.eval()


def tiny_vit(size):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(size, 4, 4, 4, 128, 512, num_classes=7)
    return jiggled(vit)


def with_head(model, head):
    """The model with this classifier in place of the new one."""
    model.head.load_state_dict(head.state_dict())
    return model.eval()


def test_vit_split_is_torchvisions_forward(tmp_path):
    vit = tiny_vit(32)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    trunk, model, layer = S.cifar10_vit("vit_tiny", 33, 7, str(tmp_path / "vit.pt"))
    assert (model.head.weight == 0).all()
    images = random_images(5, 32)
    x = trunk.eval()(images)
    assert x.shape == (5, 128)
    torch.testing.assert_close(with_head(model, vit.heads.head)(x), vit(normalized(images)))
    with S.capture(vit.encoder.ln) as expected:
        vit(normalized(images))
    torch.testing.assert_close(S.activations(model, layer, x)[0], expected.h)


def test_vit_at_another_size(tmp_path):
    from torchvision.models.vision_transformer import interpolate_embeddings

    vit = tiny_vit(32)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    trunk, model, _ = S.cifar10_vit("vit_tiny", 48, 7, str(tmp_path / "vit.pt"))
    large = torchvision.models.VisionTransformer(48, 4, 4, 4, 128, 512, num_classes=7).eval()
    large.load_state_dict(interpolate_embeddings(48, 4, dict(vit.state_dict())))
    images = random_images(3, 32)
    resized = nn.functional.interpolate(images / 255, (48, 48), mode="bicubic").clamp(0, 1) * 255
    torch.testing.assert_close(
        with_head(model, vit.heads.head)(trunk.eval()(images)), large(normalized(resized))
    )


@pytest.mark.parametrize(
    "arch, layers, width, patch, official",
    [("vit_b_32", 12, 768, 32, 86_567_656 - 769_000), ("vit_h_14", 32, 1280, 14, None)],
)
def test_vit_sizes(arch, layers, width, patch, official):
    with torch.device("meta"):
        trunk, model, _ = S.cifar10_vit(arch, 224, 10, "none")
    assert len(trunk[1].blocks) == layers - 1 and model.ln.weight.shape == (width,)
    assert trunk[1].conv_proj.stride == (patch, patch)
    if official:  # torchvision documents 88,224,232 parameters of vit_b_32 with 1000 classes
        total = sum(p.numel() for m in (trunk, model) for p in m.parameters())
        assert total - 10 * (width + 1) == 88_224_232 - 1000 * (width + 1)


def official_convnext(width=40, blocks=(2, 2, 6, 2), classes=1000):
    """A random checkpoint under the official names, and its forward, written down plainly."""
    torch.manual_seed(0)
    w, d = {}, [width * 2**i for i in range(4)]

    def new(name, *shape):
        w[name] = 0.2 * torch.randn(shape)

    for i in range(4):
        shapes = [(d[0], 3, 4, 4), (d[0],)] if i == 0 else [(d[i - 1],), (d[i], d[i - 1], 2, 2)]
        for j, shape in enumerate(shapes):
            new(f"downsample_layers.{i}.{j}.weight", *shape)
            new(f"downsample_layers.{i}.{j}.bias", shape[0])
        for j in range(blocks[i]):
            for name, shape in {
                "dwconv": (d[i], 1, 7, 7), "norm": (d[i],), "pwconv1": (4 * d[i], d[i]),
                "pwconv2": (d[i], 4 * d[i]),
            }.items():  # fmt: skip
                new(f"stages.{i}.{j}.{name}.weight", *shape)
                new(f"stages.{i}.{j}.{name}.bias", shape[0])
            new(f"stages.{i}.{j}.grn.gamma", 1, 1, 1, 4 * d[i])
            new(f"stages.{i}.{j}.grn.beta", 1, 1, 1, 4 * d[i])
    new("norm.weight", d[3]), new("norm.bias", d[3])
    new("head.weight", classes, d[3]), new("head.bias", classes)

    def norm(x, name):  # over the channels of x (B, ..., C)
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x, name, **how):  # channels last
        x = nn.functional.conv2d(
            x.permute(0, 3, 1, 2), w[f"{name}.weight"], w[f"{name}.bias"], **how
        )
        return x.permute(0, 2, 3, 1)

    def forward(x):  # (B, 3, H, W)
        x = x.permute(0, 2, 3, 1)
        for i in range(4):
            at = f"downsample_layers.{i}"
            if i == 0:
                x = norm(conv(x, f"{at}.0", stride=4), f"{at}.1")
            else:
                x = conv(norm(x, f"{at}.0"), f"{at}.1", stride=2)
            for j in range(blocks[i]):
                at = f"stages.{i}.{j}"
                y = norm(conv(x, f"{at}.dwconv", padding=3, groups=d[i]), f"{at}.norm")
                y = nn.functional.gelu(y @ w[f"{at}.pwconv1.weight"].T + w[f"{at}.pwconv1.bias"])
                size = y.square().sum((1, 2), keepdim=True).sqrt()
                response = size / (size.mean(3, keepdim=True) + 1e-6)
                y = w[f"{at}.grn.gamma"] * (y * response) + w[f"{at}.grn.beta"] + y
                x = x + y @ w[f"{at}.pwconv2.weight"].T + w[f"{at}.pwconv2.bias"]
        return norm(x.mean((1, 2)), "norm")

    return w, forward


def test_convnext_is_the_official_network(tmp_path):
    weights, forward = official_convnext()
    torch.save({"model": weights}, tmp_path / "atto.pt")
    images = random_images(3, 64)
    expected = forward(normalized(images))
    for n_classes in (None, 5):
        trunk, model, layer = S.imagenet_convnext(
            "convnextv2_atto", n_classes, str(tmp_path / "atto.pt")
        )
        h, logits = S.activations(model, layer, trunk(images).detach())
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
    trunk, model, _ = S.imagenet_convnext("convnextv2_atto", None, str(tmp_path / "atto.pt"))
    with torch.no_grad():
        logits_all = model(trunk(images))
    torch.testing.assert_close(
        logits_all, expected @ weights["head.weight"].T + weights["head.bias"], rtol=1e-4, atol=1e-3
    )
    assert logits.shape == (3, 5)


@pytest.mark.filterwarnings("ignore:for (weight|bias). copying from a non-meta")
def test_convnext_sizes():
    """The counts that timm 1.0.31 gives for its convnextv2_* with 1000 classes."""
    counts = {
        "atto": 3_708_400, "femto": 5_233_240, "pico": 9_066_280, "nano": 15_623_800,
        "tiny": 28_635_496, "base": 88_717_800, "large": 197_956_840, "huge": 660_289_640,
    }  # fmt: skip
    for size, expected in counts.items():
        with torch.device("meta"):
            trunk, model, _ = S.imagenet_convnext(f"convnextv2_{size}", None, "none")
        assert sum(p.numel() for m in (trunk, model) for p in m.parameters()) == expected, size


def test_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "w.pt"
    weights, _ = official_convnext()

    def message(**changes):
        new = {k: v for k, v in (weights | changes).items() if v is not None}
        torch.save({"model": new}, path)
        with pytest.raises(ValueError) as caught:
            S.imagenet_convnext("convnextv2_atto", None, str(path))
        assert len(str(caught.value).splitlines()) == 1 and str(path) in str(caught.value)
        return str(caught.value)

    assert "features.0.1.bias" in message(**{"downsample_layers.0.1.bias": None})
    assert "more.weight" in message(**{"more.weight": torch.zeros(2)})
    assert "[7]) from checkpoint" in message(**{"norm.bias": torch.zeros(7)})
    torch.save(tiny_vit(32).state_dict(), path)
    with pytest.raises(ValueError, match='Missing key.*"features.0.0.weight"'):
        S.imagenet_convnext("convnextv2_atto", None, str(path))
    assert not S.is_imagenet([f"n{i:08}" for i in range(1000)] + ["background"])
    half = {name: value.half() for name, value in tiny_vit(32).state_dict().items()}
    torch.save(half, path)
    trunk, model, _ = S.cifar10_vit("vit_tiny", 32, 10, str(path))
    assert model(trunk(random_images(2, 32))).dtype == torch.float32
    for content in (b"", b"no weights", b"text\n", path.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint"):
            S.cifar10_vit("vit_tiny", 32, 10, str(path))
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="is no checkpoint"):
        S.cifar10_vit("vit_tiny", 32, 10, str(path))


@pytest.mark.parametrize(
    "build, url",
    [
        (lambda: S.cifar10_vit("vit_h_14"),
         "https://download.pytorch.org/models/vit_h_14_swag-80465313.pth"),
        (lambda: S.imagenet_convnext("convnextv2_large"), "https://dl.fbaipublicfiles.com/convnext/"
         "convnextv2/im22k/convnextv2_large_22k_384_ema.pt"),
        (lambda: S.imagenet_convnext("convnextv2_atto"), "https://dl.fbaipublicfiles.com/convnext/"
         "convnextv2/im1k/convnextv2_atto_1k_224_ema.pt"),
    ],
)  # fmt: skip
def test_weights_come_from_their_official_place(build, url, tmp_path, monkeypatch):
    asked = []

    def no_network(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match="--weights PATH") as caught:
        build()
    message = str(caught.value)
    assert asked == [url] and url in message and len(message.splitlines()) == 1
    place = tmp_path / "checkpoints" / url.rpartition("/")[2]
    assert str(place) in message
    place.write_bytes(b"PK" * 1000)  # a connection that broke
    with pytest.raises(ValueError, match="remove it, and it is downloaded again"):
        build()


# === 6. CIFAR-10, photos in folders, cached features ===


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with rendered digits in colour as the pickle files of CIFAR-10, with their md5."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, y = S.render_digits(360)
    colour = torch.linspace(0.2, 1, 30).view(10, 3)[y][:, :, None, None]
    images = (nn.functional.pad(images, [2] * 4) * colour).byte()
    files = {f"data_batch_{i}": slice(40 * i - 40, 40 * i) for i in range(1, 6)}
    content = {
        name: {"data": images[part].flatten(1).numpy(), "labels": y[part].tolist()}
        for name, part in (files | {"test_batch": slice(200, 360)}).items()
    }
    content["batches.meta"] = {"label_names": [f"name{i}" for i in range(10)]}
    md5 = {}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name in files])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5["batches.meta"]})
    return folder.parent


def test_cifar_files_are_read(cifar, monkeypatch):
    data = S.load_data("cifar10", cifar)
    assert [len(y) for _, y in (data.train, data.val, data.test)] == [180, 20, 160]
    assert data.names[3] == "name3" and data.train[0].shape == (180, 3, 32, 32)
    images, y = S.render_digits(360)
    assert torch.equal(data.test[1], y[200:])
    red = data.test[0][:, 0, 2:-2, 2:-2].float()
    assert torch.allclose(red, (images[200:, 0] * (0.2 + 0.8 * 3 * y[200:] / 29)[:, None, None]),
                          atol=1)  # fmt: skip
    (cifar / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(OSError, match="cifar-10-python.tar.gz into .*--dataset digits") as caught:
        S.load_data("cifar10", cifar)
    assert len(str(caught.value).splitlines()) == 1


def write_photos(root, classes=("cat", "dog"), n=12, seed=0):
    """Photos of one colour per class and brightness per image, in train and val, of many kinds."""
    generator = np.random.default_rng(seed)
    kinds = ["a.JPEG", "b.png", "c.bmp", "d.jpg", "e.webp", "f.PNG"]
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 60, (40 + i, 50, 3), dtype=np.uint8)
                pixels[..., c % 3] += np.uint8(100 + 8 * (i % 12))
                image = Image.fromarray(pixels)
                if i == 3:
                    image = image.convert("CMYK")
                if i == 1:
                    image = image.convert("P")
                image.save(root / split / name / f"{i:02}{kinds[i % 6]}")
            (root / split / name / "notes.txt").write_text("no image")
    return root


def test_photos_are_decoded_cropped_and_named(tmp_path):
    write_photos(tmp_path)
    data = S.load_data("imagenet", tmp_path)
    assert data.names == ["cat", "dog"]
    assert [len(y) for _, y in (data.train, data.val, data.test)] == [22, 2, 24]
    for photos, y in (data.train, data.val, data.test):
        images = S.decoded(photos, 32)
        assert images.shape == (len(y), 3, 32, 32) and images.dtype == torch.uint8
        assert torch.equal(images.float().mean((2, 3)).argmax(1), y)
    some = np.array([20, 3])
    assert torch.equal(S.decoded(data.test[0][some], 9), S.decoded(data.test[0], 9)[some])
    # A white frame, a 16th on each side, is cut off below 384 pixels, and not from there on.
    frame = np.full((160, 160, 3), 255, np.uint8)
    frame[10:-10, 10:-10] = 0
    Image.fromarray(frame).save(tmp_path / "frame.png")
    frame = os.fsencode(tmp_path / "frame.png")
    assert S.decode_photo(frame, 70).max() < 60 and S.decode_photo(frame, 384).max() == 255
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="deep.png .its values do not fit into 8 bits"):
        S.decode_photo(os.fsencode(tmp_path / "deep.png"), 32)
    bad = tmp_path / "train" / "dog" / "00a.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(OSError, match="cannot read the image .*00a.JPEG"):
        S.decoded(S.load_data("imagenet", tmp_path).train[0], 32)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(ValueError, match="need the same classes; one lacks dog"):
        S.load_data("imagenet", tmp_path)


def test_an_unreadable_photo_stops_the_run_in_one_line(tmp_path, capsys):
    write_photos(tmp_path / "data")
    bad = tmp_path / "data" / "val" / "dog" / "07b.png"
    bad.write_bytes(b"not an image")
    for workers in (0, 2):
        status, _, err, _ = run(
            capsys, tmp_path, *PHOTOS, "--data-dir", tmp_path / "data", "--workers", workers
        )
        last = err.strip().splitlines()[-1]
        assert status == 1 and f"cannot read the image {bad}" in last and "Traceback" not in err


PHOTOS = """--dataset imagenet --arch convnextv2_atto --weights none --image-size 32 --cycles 1
    --epochs 2 --sae-epochs 2 --d-sae 64 --workers 0""".split()


class Trunk(nn.Module):
    """A small trunk that counts the images that it sees, and can stop at one of its batches."""

    def __init__(self):
        super().__init__()
        self.linear, self.pixels = nn.Linear(48, 5), S.Pixels()
        self.seen, self.stop = 0, None

    def forward(self, images):
        self.seen += len(images)
        if self.stop is not None and self.seen > self.stop:
            raise KeyboardInterrupt
        return self.linear(self.pixels(images).flatten(1))


def test_cached_features(tmp_path, capsys):
    torch.manual_seed(0)
    images, trunk, path = random_images(1100, 4), Trunk(), tmp_path / "deep" / "f.npy"
    x = S.trunk_features(trunk, images, path).clone()  # the file is about to be damaged
    with torch.no_grad():
        torch.testing.assert_close(x, trunk.linear(images.flatten(1) / 255))
    whole, trunk.seen = path.read_bytes(), 0
    assert torch.equal(S.trunk_features(trunk, images, path), x) and trunk.seen == 0
    np.testing.assert_array_equal(np.load(path), x)
    assert capsys.readouterr().err == ""
    for start in (0, 300, 1099):  # a damaged block, and only that, is made again
        data = bytearray(whole)
        data[-(1100 - start) * 20] ^= 1
        path.write_bytes(data)
        trunk.seen = 0
        assert torch.equal(S.trunk_features(trunk, images, path), x)
        assert trunk.seen == (12 if start == 1099 else 64) and path.read_bytes() == whole
        assert "damaged" in capsys.readouterr().err
    for data in (whole[:-9], b"foreign", b""):
        path.write_bytes(data)
        assert torch.equal(S.trunk_features(trunk, images, path), x) and path.read_bytes() == whole
        assert "made again" in capsys.readouterr().err
    trunk.seen = 0
    S.trunk_features(trunk, images, path, key=5)
    assert trunk.seen == 1100 and "foreign" in capsys.readouterr().err
    assert torch.equal(S.trunk_features(trunk, images, tmp_path / "0.npy", device="cpu:0"), x)
    rough = S.trunk_features(trunk, images, tmp_path / "rough.npy", bfloat16=True)
    assert not torch.equal(rough, x) and torch.allclose(rough, x, rtol=0.01, atol=0.01)
    wider = nn.Sequential(trunk, nn.Linear(5, 7))
    with pytest.raises(ValueError, match=f"{path} is of a trunk with 5 features"):
        S.trunk_features(wider, images, path, key=6)
    half = S.trunk_features(trunk, images, tmp_path / "half.npy", dtype="float16")
    assert half.dtype == torch.float16 and torch.allclose(half.float(), x, atol=2e-3)
    with pytest.raises(FloatingPointError, match="not finite in float16"):
        trunk.linear.bias.data += 1e6
        S.trunk_features(trunk, images, tmp_path / "inf.npy", dtype="float16")


def test_interrupted_and_shared_trunk_pass(tmp_path):
    torch.manual_seed(0)
    images, trunk = random_images(1100, 4), Trunk()
    whole = S.trunk_features(trunk, images, tmp_path / "whole.npy")
    path = tmp_path / "f.npy"
    for stop in (100, 300, 700):
        trunk.seen, trunk.stop = 0, stop
        with pytest.raises(KeyboardInterrupt):
            S.trunk_features(trunk, images, path)
    trunk.seen, trunk.stop = 0, None
    x = S.trunk_features(trunk, images, path)
    assert trunk.seen == 1100 - (1 + 4 + 10) * 64 and torch.equal(x, whole)
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    path = tmp_path / "shared.npy"
    for rank in (1, 0):
        trunk.seen = 0
        S.trunk_features(trunk, images, path, share=(rank, 2))
        assert trunk.seen == (1 + 8 * 64 + 12 if rank else 9 * 64)  # one more gives the width
    trunk.seen = 0
    assert torch.equal(S.trunk_features(trunk, images, path), whole) and trunk.seen == 0


def test_a_cache_that_another_process_makes_anew_meanwhile(tmp_path):
    torch.manual_seed(0)
    images, path = random_images(1100, 4), tmp_path / "f.npy"
    whole = S.trunk_features(Trunk(), images, tmp_path / "whole.npy")
    torch.manual_seed(0)

    class Rival(Trunk):
        def forward(self, images):
            if self.seen == 1 + 300 // 64 * 64:
                np.save(path, np.zeros((1100, 5), np.float32))
                np.zeros(18, np.uint32).tofile(path.with_suffix(".crc"))
            return super().forward(images)

    assert torch.equal(S.trunk_features(Rival(), images, path), whole)


def test_a_full_disk_during_the_trunk_pass(tmp_path, monkeypatch):
    def full(path, place, data):
        raise OSError(f"cannot write {path} (No space left on device): make room, start again")

    monkeypatch.setattr(S, "write_at", full)
    with pytest.raises(OSError, match="make room"):
        S.trunk_features(Trunk(), random_images(9, 4), tmp_path / "f.npy")


def test_what_is_too_large_for_memory_is_read_in_rows(monkeypatch):
    data, model = blobs(700), small_net()
    S.fit(model, "1", *data, epochs=5)
    arms = ["sae-ception", "control", "class-mean"]
    rules = {name: S.arm_rules(4, 4)[name] for name in arms}
    expected = final(model, "1", data, data, **options(arms=rules))["rows"]
    in_memory = S.LazyRows.in_memory
    monkeypatch.setattr(
        S.LazyRows, "in_memory", lambda rows, max_bytes=0: in_memory(rows, max_bytes and math.inf)
    )
    h = S.layer_output(model, "1", data[0])
    assert isinstance(h, S.LazyRows) and isinstance(S.sharpened_targets(
        S.train_sae(h, 9, epochs=1), h, data[1], 4, 4), S.LazyRows)  # fmt: skip
    half = data[0].half(), data[1]
    for rows, tolerance in (
        (final(model, "1", data, data, **options(arms=rules))["rows"], 1e-4),
        (final(model, "1", half, data, **options(arms=rules))["rows"], 5e-2),
    ):
        for row, other in zip(rows, expected, strict=True):
            assert row["arm"] == other["arm"]
            for key in ("accuracy", "silhouette", "h_silhouette"):
                assert row[key] == pytest.approx(other[key], abs=tolerance)


# === 7. Training ===


@pytest.mark.parametrize("aux_loss", ["mse", "cosine"])
def test_auxiliary_loss_reaches_what_is_below_the_layer_and_nothing_above(aux_loss):
    x, y = blobs(64)
    targets = torch.rand(64, 8)
    grads = []
    for weight in (0.0, 1.0):
        model = small_net()
        S.fit(model, "1", x, y, targets, weight, aux_loss, batch_size=64, lr=1e-3)  # one step
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in ("0.weight", "0.bias"):
        assert not torch.allclose(grads[0][name], grads[1][name])
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_auxiliary_gradient_is_that_of_mse_over_variance():
    x, y = blobs(64)
    targets = torch.rand(64, 8)
    model, plain = small_net(), small_net()
    S.fit(model, "1", x, y, targets, 0.7, batch_size=64)
    h = plain[:2](x)
    variance = h.detach().var(0).mean()
    loss = nn.functional.cross_entropy(plain(x), y) + 0.7 * ((h - targets) ** 2).mean() / variance
    loss.backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_weight_of_the_auxiliary_loss_falls_to_zero():
    x, y = blobs(64)
    targets = torch.rand(64, 8)
    model, plain = small_net(), small_net()
    variance = plain[:2](x).var(0).mean().detach()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for step in range(5):  # the same training, written out
        h = plain[:2](x)
        aux = (h - targets).square().mean() / variance
        loss = nn.functional.cross_entropy(plain[2](h), y) + 0.8 * (1 - step / 5) * aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    S.fit(model, "1", x, y, targets, 0.8, epochs=5, batch_size=64, lr=1e-2)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_fit_pulls_each_example_to_its_own_target():
    x, y = blobs(256)
    model = small_net()
    targets = model[:2](x).detach().roll(1, 0) * 0.5 + 0.2
    away = [(model[:2](x) - targets).square().mean().item()]
    S.fit(model, "1", x, y, targets, weight=100.0, epochs=40, lr=3e-3)
    away.append((model[:2](x) - targets).square().mean().item())
    assert away[1] < 0.7 * away[0]


def test_fit_learns_and_names_the_epoch_of_a_divergence():
    x, y = blobs()
    model = small_net()
    S.fit(model, "1", x, y, epochs=20, lr=1e-2)
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    with pytest.raises(FloatingPointError, match="diverged in epoch 1; lower lr"):
        S.fit(small_net(), "1", x * torch.nan, y, epochs=2)
    with pytest.raises(ValueError, match="'l2' is neither mse nor cosine"):
        S.fit(model, "1", x, y, torch.rand(400, 8), 1.0, "l2")
    with pytest.raises(FloatingPointError, match="diverged in"):
        S.fit(small_net(), "1", x, y, batch_size=400, lr=1e38)


def test_fit_refuses_what_does_not_fit():
    x, y = blobs(64)
    for targets in (torch.rand(63, 8), torch.rand(65, 8)):
        with pytest.raises(ValueError, match="same number of rows"):
            S.fit(small_net(), "1", x, y, targets, 1.0)
    for targets in (torch.rand(64, 1), torch.rand(64)):
        with pytest.raises(ValueError, match="have to be .N, 8."):
            S.fit(small_net(), "1", x, y, targets, 1.0)
    with pytest.raises(FloatingPointError, match="diverged"):
        S.fit(small_net(), "1", x, y, torch.full((64, 8), torch.nan), 1.0)
    frozen = small_net()
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that is trained"):
        S.fit(frozen, "1", x, y, torch.rand(64, 8), 1.0)


def test_flip_and_shift():
    images = random_images(200, 6)
    moved = S.flip_and_shift(images, torch.Generator().manual_seed(0), most=2)
    padded = nn.functional.pad(images, [2] * 4)
    found = set()
    for image, result in zip(padded, moved, strict=True):
        places = [
            (y, x, flip)
            for y in range(5) for x in range(5) for flip in (False, True)
            if torch.equal(result, (lambda part, flip=flip: part.flip(2) if flip else part)(
                image[:, y : y + 6, x : x + 6]))
        ]  # fmt: skip
        assert len(places) == 1  # each image moved as a whole, by a step of its own
        found.add(places[0])
    assert len(found) > 40
    again = S.flip_and_shift(images, torch.Generator().manual_seed(0), most=2)
    assert torch.equal(again, moved)


def test_augmented_inputs_meet_the_targets_of_the_clean_ones():
    x, y = blobs(64)
    targets, seen = torch.rand(64, 8), []

    def augment(batch, generator):
        seen.append(batch)
        return batch + 1

    model, plain = small_net(), small_net()
    S.fit(model, "1", x, y, targets, 0.7, batch_size=64, augment=augment)
    assert len(seen) == 1 and torch.equal(seen[0].sort(0).values, x.sort(0).values)
    h = plain[:2](x + 1)
    variance = plain[:2](x).detach().var(0).mean()
    loss = nn.functional.cross_entropy(plain(x + 1), y)
    (loss + 0.7 * ((h - targets) ** 2).mean() / variance).backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=1e-4, atol=1e-6)


# === 8. Cycles ===


def final(*arguments, **options):
    *_, state = S.saeception(*arguments, **options)
    return state


def options(**more):
    return (
        dict(d_sae=16, top_k=4, cycles=2, sae_options={"epochs": 3}, fit_options={"epochs": 2})
        | more
    )


def test_saeception_keeps_arms_apart_and_the_model_as_it_was():
    data, model = blobs(), small_net()
    S.fit(model, "1", *data, epochs=5)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    both = final(model, "1", data, data, **options(val=data))
    alone = final(model, "1", data, data, **options(arms={"control": None}, val=data))
    assert [(r["cycle"], r["arm"]) for r in both["rows"]] == [
        (0, "baseline"), (1, "sae-ception"), (1, "control"), (2, "sae-ception"), (2, "control"),
    ]  # fmt: skip
    for row in both["rows"]:
        stages = sum(row[f"seconds_{stage}"] for stage in ("train", "sae", "measure"))
        assert stages == pytest.approx(row["seconds"])
        assert all(row[f"val_{k}"] == row[k] for k in ("accuracy", "silhouette", "davies_bouldin"))
    for row in untimed(alone["rows"]):
        assert row in untimed(both["rows"])  # the control does not feel the other arm
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(KeyError):
        S.restore(model, both, "sae_ception")
    net, sae = S.restore(model, both, "sae-ception")
    h, logits = S.activations(net, "1", data[0])
    last = both["rows"][-2]
    assert last["accuracy"] == pytest.approx((logits.argmax(1) == data[1]).double().mean().item())
    assert last["silhouette"] == pytest.approx(S.silhouette_score(sae.encode(h), data[1]))


def test_a_rule_of_ones_own_and_the_weight_of_its_targets():
    data, model, calls = blobs(), small_net(), []
    S.fit(model, "1", *data, epochs=5)

    def rule(sae, h, y):
        calls.append((h, y))
        return torch.zeros_like(h)

    arms = {"to zero": rule, "control": None}
    state = final(
        model,
        "1",
        data,
        data,
        **options(arms=arms, weight=5.0, cycles=1, fit_options={"epochs": 20}),
    )
    torch.testing.assert_close(calls[0][0], S.activations(model, "1", data[0])[0])
    assert torch.equal(calls[0][1], data[1]) and len(calls) == 1
    sizes = [S.activations(S.restore(model, state, arm)[0], "1", data[0])[0].norm() for arm in arms]
    assert sizes[0] < 0.8 * sizes[1]


def test_class_mean_targets():
    h, y = blobs()
    targets = S.arm_rules(4, 5)["class-mean"](None, h, y)
    for c in range(4):
        torch.testing.assert_close(targets[y == c], h[y == c].mean(0).expand(100, 6))


def test_class_missing_from_the_training_set():
    x, y = blobs()
    some = y != 2
    state = final(small_net(), "1", (x[some], y[some]), (x, y), **options(pretrained=False))
    assert all(math.isfinite(value) for row in state["rows"] for value in list(row.values())[3:])


def test_states_do_not_change_once_they_are_yielded():
    class Stop(Exception):
        pass

    def progress(steps, desc):
        if "cycle 2 control" in desc and not stopped:
            stopped.append(desc)
            raise Stop
        return steps

    data, model, stopped = blobs(), small_net(), []
    states = list(S.saeception(model, "1", data, data, **options()))
    assert [state["cycle"] for state in states] == [0, 1, 2]
    assert [len(state["rows"]) for state in states] == [1, 3, 5]
    reached = []
    with pytest.raises(Stop):
        for state in S.saeception(model, "1", data, data, **options(progress=progress)):
            reached.append(state)
    rows = final(model, "1", data, data, **options(state=reached[-1]))["rows"]
    assert untimed(rows) == untimed(states[-1]["rows"])


def test_dropout_is_the_same_in_each_arm():
    data = blobs()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    S.fit(model, "1", *data, epochs=5)
    both = final(model, "1", data, data, **options(arms={"a": None, "b": None}))["rows"]
    a, b = ([row[key] for key in ("accuracy", "h_silhouette")] for row in both[-2:])
    assert a == b


def test_state_is_plain_data_to_go_on_from(tmp_path):
    data, model = blobs(), small_net()
    whole = untimed(final(model, "1", data, data, **options())["rows"])
    torch.save(next(S.saeception(model, "1", data, data, **options())), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["cycle"] == 0
    rows = final(small_net(seed=0), "1", data, data, **options(state=state))["rows"]
    assert untimed(rows) == whole


# === 9, 10. Results and command line ===


def test_run_end_to_end_and_twice(tmp_path, capsys):
    write_mnist(tmp_path / "data")
    arguments = ["--dataset", "mnist", "--data-dir", tmp_path / "data", "--cycles", 2, *SMALL]
    status, out, err, folder = run(capsys, tmp_path / "runs", *arguments)
    assert status == 0 and folder.name.startswith("mnist-")
    assert len(out.splitlines()) == 1 + 5 + 1 + 1 + 2  # heading, rows, blank, heading, differences
    assert "sae-ception - control" in out and "seed 0 cycle 2 control: SAE" in err
    assert {p.name for p in folder.iterdir()} == {
        "results.json", "checkpoint.pt", "clusters.png", "features.png",
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["top_k"] == 25 and results["environment"]["torch"] == torch.__version__
    needed = """seed cycle arm accuracy silhouette davies_bouldin calinski_harabasz adjusted_rand
        uncertainty l0 dead fvu h_silhouette h_davies_bouldin val_accuracy val_silhouette
        val_davies_bouldin seconds""".split()
    assert all(list(row) and set(needed) <= set(row) for row in results["rows"])
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["dead"] <= 1 for row in results["rows"])
    for name in ("clusters.png", "features.png"):
        with Image.open(folder / name) as image:
            assert image.width > 900 and len(image.convert("RGB").getcolors(10**7)) > 10
    status, out_again, _, again = run(capsys, tmp_path / "runs", *arguments)
    assert status == 0 and again != folder and rows_of(again) == rows_of(folder)
    # A finished run can be resumed: the same table, nothing trained anew. Killed between the two
    # files, the checkpoint is ahead of results.json, which has to catch up.
    (folder / "results.json").write_text("{}")
    status, out_resumed, err, _ = run(capsys, tmp_path / "runs", "--resume", folder)
    assert status == 0 and out_resumed == out and "SAE" not in err
    assert rows_of(folder) == rows_of(again)


def test_settings_reach_what_they_set(tmp_path, capsys, monkeypatch):
    calls = {}
    for name in ("fit", "train_sae"):
        true = getattr(S, name)

        def spy(*args, _true=true, _name=name, **kwargs):
            calls.setdefault(_name, []).append((args, kwargs))
            return _true(*args, **kwargs)

        monkeypatch.setattr(S, name, spy)
    flags = """--limit 200 --cycles 1 --layer relu2 --top-k 7 --aux-weight 0.25 --aux-loss cosine
        --sae topk --d-sae 40 --sae-k 5 --epochs 2 --sae-epochs 4 --batch-size 50 --lr 0.01
        --arms class-mean"""
    status, out, _, folder = run(capsys, tmp_path, *flags.split())
    assert status == 0 and [row["arm"] for row in rows_of(folder)] == ["baseline", "class-mean"]
    args, kwargs = calls["fit"][1]
    assert args[1] == "relu2" and args[4].shape == (200, 16) and args[5] == 0.25
    shown = {key: kwargs[key] for key in ("aux_loss", "epochs", "batch_size", "lr")}
    assert shown == {"aux_loss": "cosine", "epochs": 2, "batch_size": 50, "lr": 0.01}
    args, kwargs = calls["train_sae"][1]
    assert args[1:3] == (40, 5) and kwargs["epochs"] == 4
    assert all(row["l0"] <= 5 for row in rows_of(folder))


def test_the_picture_shows_no_features_of_a_class_without_any():
    z, images, y = torch.rand(20, 4), torch.zeros(20, 1, 28, 28).byte(), torch.arange(20) % 2
    mean = torch.tensor([[0.5, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    picture = np.array(S.draw_features(z, images, y, mean, ["cat", "dog"], 28).convert("L"))
    black = [(row < 9).sum() // (44 * 44) for row in np.split(picture[10:], [98])]
    assert black == [16, 0]  # two features of eight black images each; none


def test_several_seeds_and_their_summary(tmp_path, capsys):
    status, out, _, folder = run(capsys, tmp_path, "--seeds", 3, 4, 3, "--cycles", 1, *SMALL)
    assert status == 0
    rows = rows_of(folder)
    assert [row["seed"] for row in rows] == [3, 3, 3, 4, 4, 4]
    value = {(row["seed"], row["arm"]): row["accuracy"] for row in rows}
    control = np.array([value[seed, "control"] for seed in (3, 4)])
    difference = np.array([value[seed, "sae-ception"] for seed in (3, 4)]) - control
    for name, numbers in (("control", control), ("sae-ception - control", difference)):
        cell = f"{numbers.mean():.4f} ± {numbers.std(ddof=1):.4f}"
        assert re.search(rf"^ +1  {name} +{re.escape(cell)}", out, re.M), (name, cell, out)
    # One seed of several is what the same seed gives alone.
    alone = run(capsys, tmp_path, "--seeds", 4, "--cycles", 1, *SMALL)[3]
    assert rows_of(alone) == rows[3:]


def start(tmp_path, *arguments):
    command = [sys.executable, HERE / "saeception.py", "--out-dir", tmp_path / "runs", *arguments]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path,
    )  # fmt: skip


def wait_for_cycle(tmp_path, process, cycle):
    """The run folder, as soon as that cycle is in results.json."""
    for _ in range(6000):
        for file in (tmp_path / "runs").glob("*/results.json"):
            if any(row["cycle"] == cycle for row in json.loads(file.read_text())["rows"]):
                return file.parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run does not get there")


def test_killed_and_resumed(tmp_path, capsys):
    flags = ["--limit", 1500, "--epochs", 20, "--sae-epochs", 10, "--cycles", 3, "--seeds", 1, 0]
    whole = run(capsys, tmp_path / "whole", *flags)
    process = start(tmp_path, *flags)
    folder = wait_for_cycle(tmp_path, process, 1)
    time.sleep(0.3)  # into cycle 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {(row["seed"], row["cycle"]) for row in rows_of(folder)}
    assert (1, 1) in done and (0, 3) not in done
    status, out, _, _ = run(capsys, tmp_path / "runs", "--resume", folder)
    assert status == 0 and rows_of(folder) == rows_of(whole[3])
    assert re.sub(r" +\d+\.\d\n", "\n", out) == re.sub(r" +\d+\.\d\n", "\n", whole[1])
    for name in ("clusters.png", "features.png"):
        with Image.open(folder / name) as a, Image.open(whole[3] / name) as b:
            assert a.size == b.size


def test_resume_notices_other_data(tmp_path, capsys):
    data = write_photos(tmp_path / "data")
    folder = run(capsys, tmp_path / "runs", *PHOTOS, "--data-dir", data)[3]
    assert run(capsys, tmp_path / "runs", "--resume", folder)[0] == 0
    photo = data / "train" / "cat" / "05f.PNG"
    photo.write_bytes((data / "train" / "cat" / "04e.webp").read_bytes())
    status, _, err, _ = run(capsys, tmp_path / "runs", "--resume", folder)
    assert status == 2 and "are not those of the run" in err and len(err.splitlines()) == 1


def test_any_model_can_have_its_trunk_cached(tmp_path, capsys):
    flags = ["--tune", "last", "--cycles", 1, *SMALL, "--cache-dir", tmp_path / "cache"]
    cached = run(capsys, tmp_path / "runs", *flags)
    whole = run(capsys, tmp_path / "runs", *flags, "--tune", "all")
    assert cached[0] == 0 and cached[2].count("trunk, ") == 3 and "damaged" not in cached[2]
    assert_close_rows(rows_of(cached[3]), rows_of(whole[3]))


def test_a_full_cache_folder_and_one_that_forgets(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*file"):
        S.trunk_features(Trunk(), random_images(9, 4), tmp_path / "file" / "f.npy")
    monkeypatch.setattr(S, "write_at", lambda *args: None)
    with pytest.raises(OSError, match="does not keep what is written"):
        S.trunk_features(Trunk(), random_images(9, 4), tmp_path / "f.npy")


VIT = """--dataset cifar10 --arch vit_tiny --cycles 1 --epochs 2 --sae-epochs 2 --d-sae 64
    --batch-size 40""".split()


def test_vit_on_cifar_end_to_end(cifar, tmp_path, capsys):
    flags = [*VIT, "--data-dir", cifar, "--layer", "trunk.1.blocks.1"]
    status, out, err, folder = run(capsys, tmp_path / "runs", *flags)
    assert status == 0 and "trunk, " not in err  # --tune all is the default here
    assert [row["arm"] for row in rows_of(folder)] == ["baseline", "sae-ception", "control"]
    assert not (cifar / "features").exists()
    with Image.open(folder / "features.png") as image:
        assert image.width > 900
    assert rows_of(run(capsys, tmp_path / "runs", *flags)[3]) == rows_of(folder)


def test_cached_trunk_serves_other_settings(cifar, tmp_path, capsys, monkeypatch):
    flags = [*VIT, "--data-dir", cifar, "--tune", "last", "--cache-dir", tmp_path / "cache"]
    status, _, err, folder = run(capsys, tmp_path / "runs", *flags)
    assert status == 0 and err.count("trunk, ") == 3
    files = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert [name.split("-")[:3] for name in files[::2]] == [
        ["cifar10", "vit_tiny", split] for split in ("test", "train", "val")
    ]
    x = np.load(next((tmp_path / "cache").glob("*train*.npy")), mmap_mode="r")
    assert x.shape == (180, 128) and x.dtype == np.float32
    status, _, err, other = run(capsys, tmp_path / "runs", *flags, "--aux-weight", 9)
    assert status == 0 and "trunk, " not in err
    assert rows_of(other)[0] == rows_of(folder)[0] and rows_of(other)[2] == rows_of(folder)[2]
    assert rows_of(other)[1] != rows_of(folder)[1]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == files
    # Several seeds share the features; another image size or other weights do not.
    status, _, err, both = run(capsys, tmp_path / "runs", *flags, "--seeds", 1, 0)
    assert status == 0 and "trunk, " not in err and rows_of(both)[3:] == rows_of(folder)
    assert run(capsys, tmp_path / "runs", *flags, "--image-size", 16)[2].count("trunk, ") == 3
    # A machine with the other arithmetic makes its own, and its SAEs by it.
    rough, trained, train_sae = not S.bfloat16_is_fast("cpu"), [], S.train_sae
    monkeypatch.setattr(S, "bfloat16_is_fast", lambda device: rough)
    monkeypatch.setattr(
        S, "train_sae", lambda *a, **o: trained.append(o["bfloat16"]) or train_sae(*a, **o)
    )
    assert run(capsys, tmp_path / "runs", *flags)[2].count("trunk, ") == 3
    assert set(trained) == {rough}
    torch.save(tiny_vit(32).state_dict(), tmp_path / "w.pt")
    weights = ["--weights", tmp_path / "w.pt"]
    assert run(capsys, tmp_path / "runs", *flags, *weights)[2].count("trunk, ") == 3
    assert run(capsys, tmp_path / "runs", *flags, *weights)[2].count("trunk, ") == 0


def test_photos_end_to_end(tmp_path, capsys):
    data = write_photos(tmp_path / "data")
    flags = [*PHOTOS, "--data-dir", data, "--workers", 2]
    status, out, err, folder = run(capsys, tmp_path / "runs", *flags)
    assert status == 0 and err.count("trunk, ") == 3
    rows = rows_of(folder)
    assert len(rows) == 3 and all(math.isfinite(row["silhouette"]) for row in rows)
    assert json.loads((folder / "results.json").read_text())["config"]["epochs"] == 2
    changed = data / "train" / "cat" / "05f.PNG"
    changed.write_bytes((data / "train" / "cat" / "04e.webp").read_bytes())
    err = run(capsys, tmp_path / "runs", *flags)[2]
    assert err.count("trunk, ") == 1 and "trunk, test" not in err
    for name in data.glob("val/*/*"):  # one photo of each class leaves the metrics undefined
        if name.name != "00a.JPEG":
            name.unlink()
    status, out, err, folder = run(capsys, tmp_path / "runs", *flags)
    assert status == 0 and "not defined" in err and rows_of(folder)[0]["silhouette"] is None


def test_few_photos_are_read_often(tmp_path, capsys, monkeypatch):
    data, epochs, train_sae = write_photos(tmp_path / "data"), set(), S.train_sae

    def quick(*args, **options):
        epochs.add(options.pop("epochs"))
        return train_sae(*args, epochs=2, **options)

    monkeypatch.setattr(S, "train_sae", quick)
    at = PHOTOS.index("--sae-epochs")
    assert run(capsys, tmp_path, *PHOTOS[:at], *PHOTOS[at + 2 :], "--data-dir", data)[0] == 0
    assert epochs == {1000}  # of one batch each


def test_the_head_of_the_checkpoint_is_kept_for_imagenet(tmp_path, capsys):
    weights, _ = official_convnext()
    torch.save({"model": weights}, tmp_path / "atto.pt")
    for c in range(1000):
        for split in ("train", "val"):
            (tmp_path / split / f"n{c:08}").mkdir(parents=True)
        image = Image.new("RGB", (32, 32), (c % 250, c // 4, 77))
        image.save(tmp_path / "train" / f"n{c:08}" / "a.png")
        image.save(tmp_path / "val" / f"n{c:08}" / "b.bmp")
    flags = """--dataset imagenet --arch convnextv2_atto --image-size 32 --cycles 0 --workers 0
        --d-sae 64""".split()
    flags += ["--data-dir", tmp_path, "--weights", tmp_path / "atto.pt"]
    status, _, err, folder = run(capsys, tmp_path / "runs", *flags)
    assert status == 0 and "baseline: train" not in err and "baseline: SAE" in err
    config = json.loads((folder / "results.json").read_text())["config"]
    assert config["epochs"] == S.DEFAULTS["imagenet"]["epochs"]
    trunk, model, _ = S.imagenet_convnext("convnextv2_atto", None, str(tmp_path / "atto.pt"))
    data = S.load_data("imagenet", tmp_path)
    images = S.decoded(data.test[0], 32)
    predicted = torch.cat([model(trunk(part)).argmax(1) for part in images.split(250)])
    expected = (predicted == data.test[1]).float().mean().item()
    assert rows_of(folder)[0]["accuracy"] == pytest.approx(expected, abs=2e-3)


def test_killed_during_the_trunk_pass(tmp_path, capsys):
    data = write_photos(tmp_path / "data", n=350)
    flags = [*PHOTOS, "--data-dir", data, "--batch-size", 16]
    whole = run(capsys, tmp_path / "whole", *flags, "--cache-dir", tmp_path / "cache")[3]
    process = start(tmp_path, *flags)
    for _ in range(3000):
        sums = [np.fromfile(f, np.uint32) for f in (data / "features").glob("*train*.crc")]
        if sums and sums[0].any() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not all(sums[0])
    folder = next((tmp_path / "runs").glob("*"))
    status, _, err, _ = run(capsys, tmp_path / "runs", "--resume", folder)
    assert status == 0 and rows_of(folder) == rows_of(whole)
    for file in (tmp_path / "cache").glob("*.npy"):
        assert file.read_bytes() == next((data / "features").glob(file.name)).read_bytes()


def torchrun(tmp_path, out, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2,
               "--master-port", 29000 + os.getpid() % 1000, HERE / "saeception.py",
               "--out-dir", tmp_path / out, "--device", "cpu", *flags]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def assert_close_rows(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row["arm"] == other["arm"]
        for key in ("accuracy", "silhouette", "davies_bouldin", "h_silhouette"):
            assert row[key] == pytest.approx(other[key], rel=1e-2, abs=1e-2)


def test_two_processes_train_like_one(tmp_path, capsys):
    flags = ["--cycles", 1, *SMALL, "--batch-size", 27]  # 14 and 13 each
    alone = run(capsys, tmp_path / "alone", *flags, "--device", "cpu")
    process = torchrun(tmp_path, "two", *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    folders = list((tmp_path / "two").iterdir())
    assert len(folders) == 1 and len(out.splitlines()) == len(alone[1].splitlines())
    assert err.count("baseline: train") == 1  # one of them prints
    assert_close_rows(rows_of(folders[0]), rows_of(alone[3]))


def test_two_processes_share_a_trunk_pass(tmp_path, capsys):
    data = write_photos(tmp_path / "data", n=300)
    flags, threads = [*PHOTOS, "--data-dir", data], torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does; bfloat16 products round by it
    alone = run(capsys, tmp_path / "alone", *flags, "--cache-dir", tmp_path / "cache")[3]
    torch.set_num_threads(threads)
    process = torchrun(tmp_path, "two", *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for file in (tmp_path / "cache").glob("*.npy"):
        np.testing.assert_allclose(np.load(file), np.load(data / "features" / file.name), atol=1e-5)
    assert_close_rows(rows_of(next((tmp_path / "two").iterdir())), rows_of(alone))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_process_that_dies_stops_the_others(tmp_path):
    process = torchrun(tmp_path, "two", "--epochs", 500, "--limit", 2000)
    for _ in range(3000):
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"PPid:\t{process.pid}\n" in (folder / "status").read_text():
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    found |= {e: int(folder.name) for e in environment if e.startswith(b"RANK=")}
        if (tmp_path / "two").exists() and b"RANK=1" in found:
            break
        time.sleep(0.01)
    time.sleep(2)  # into the training
    os.kill(found[b"RANK=1"], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process of the run failed" in err or "interrupted" in err
    assert 'saeception.py", line' not in err  # no traceback of ours


def test_out_of_gpu_memory_names_a_smaller_batch(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(S, "fit", full)
    status, _, err, _ = run(capsys, tmp_path, *SMALL)
    assert status == 1 and "try --batch-size 64" in err and len(err.splitlines()) == 1


def test_an_error_within_the_progress_of_a_terminal(tmp_path, capsys, monkeypatch):
    def broken(model, layer, x, y, *rest, progress, **options):
        for step in progress(range(3)):
            if step == 1:
                time.sleep(0.3)
            if step == 2:
                raise RuntimeError("CUDA error: assert triggered\nCompile with more to see more.\n")

    monkeypatch.setattr(S, "fit", broken)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, _, err, folder = run(capsys, tmp_path, "--limit", 200)
    bar, error = err.strip().split("\n")
    assert status == 1 and "2/3" in bar and "s left" in bar
    assert error.startswith("saeception.py: error: RuntimeError: CUDA error: assert triggered")
    assert str(folder) in error


def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = start(tmp_path, "--cycles", 50, *SMALL)
    folder = wait_for_cycle(tmp_path, process, 0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    hint = re.search(r"python saeception.py --resume (\S+)$", err.strip())
    assert hint and Path(hint[1]) == folder


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("--aux-loss huber", 2, "'huber'"),
        ("--dataset cifar100", 2, "'cifar100'"),
        ("--dataset imagenet --data-dir nosuch", 1, "no images in nosuch/train/<class>/"),
        ("--dataset imagenet --tune all", 2, "--tune all keeps all images in memory"),
        ("--dataset cifar10 --arch convnextv2_atto", 2, "is not for --dataset cifar10; choose vit"),
        ("--weights nosuch.pt --dataset cifar10 --data-dir DATA", 2, "there is no such file"),
        ("--dataset cifar10 --data-dir DATA --weights none --image-size 13", 2, "a patch of"),
        (
            "--dataset cifar10 --data-dir DATA --arch vit_tiny --layer trunk.1.last_attention",
            2,
            "the output of MultiheadAttention is none of",
        ),
        ("--nosuch 1", 2, "--nosuch"),
        ("--cycles -1", 2, "-1 is not a whole number from 0 up"),
        ("--lr nan", 2, "nan is not a number"),
        ("--epochs 1.5", 2, "1.5 is not a whole number"),
        ("--top-k 0", 2, "0 is not a whole number from 1 up"),
        ("--top-k 257", 2, "--top-k 257 is over the number of features, 256"),
        ("--sae topk --sae-k 300", 2, "--sae-k 300"),
        (
            "--layer nosuch",
            2,
            "the layers are trunk, trunk.0, trunk.1, fc1, relu1, fc2, relu2, head",
        ),
        ("--limit 10", 2, "--limit 10"),
        ("--weights nosuch.pt", 2, "not for the MLP"),
        ("--resume .", 2, "no run folder"),
        ("--lr 1e9 --limit 5000", 1, "cycle 0 baseline: the loss diverged in epoch"),
    ],
)
def test_bad_input_gets_one_line(arguments, status, message, tmp_path, capsys, cifar):
    got, out, err, _ = run(capsys, tmp_path, *arguments.replace("DATA", str(cifar)).split())
    assert got == status and message in err and len(err.strip().splitlines()) == 1, err
    assert err.startswith("saeception.py: error: ")


def test_a_layer_that_no_target_can_reach(tmp_path, capsys):
    status, _, err, _ = run(capsys, tmp_path, "--layer", "trunk.1", *SMALL)
    last = err.strip().splitlines()[-1]
    assert status == 2 and "nothing that is trained is below layer 'trunk.1'" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(tmp_path, capsys):
    status, _, err, _ = run(capsys, tmp_path, "--device", "cuda")
    assert status == 2 and "--device cpu" in err and len(err.splitlines()) == 1


def test_resume_with_other_settings_or_a_broken_checkpoint(tmp_path, capsys, monkeypatch):
    folder = run(capsys, tmp_path, "--cycles", 0, "--device", "cpu", *SMALL)[3]
    status, _, err, _ = run(capsys, tmp_path, "--resume", folder, "--top-k", 9)
    assert status == 2 and "was run with --top-k 25" in err and len(err.splitlines()) == 1
    assert run(capsys, tmp_path, "--resume", folder, "--top-k", 25)[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capsys, tmp_path, "--resume", f"~/{folder.name}")[0] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert S.parse_arguments(["--resume", str(folder)])[0]["device"] == "cpu"  # that of the run
    monkeypatch.undo()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"config": {"lr": 1.0}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"config": saved["config"]}, tmp_path / "part.pt")
    others = [(tmp_path / name).read_bytes() for name in ("other.pt", "list.pt", "part.pt")]
    for content in ((folder / "checkpoint.pt").read_bytes()[:100], b"", b"no checkpoint", *others):
        (folder / "checkpoint.pt").write_bytes(content)
        status, _, err, _ = run(capsys, tmp_path, "--resume", folder)
        assert status == 2 and "no run folder" in err and len(err.splitlines()) == 1


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    status = S.main(["--out-dir", str(tmp_path / "file"), *SMALL])
    err = capsys.readouterr().err
    assert status == 1 and str(tmp_path / "file") in err and len(err.splitlines()) == 1


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    S.write_whole(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write .*No space left"):
        S.write_whole(path, full)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        S.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name, values in S.DEFAULTS.items():
        assert f"{name}: {values}" in out
    assert all(f"--{key.replace('_', '-')}" in out for key in S.DEFAULTS["mnist"])


def copied(*names):
    """A namespace with the imports of saeception.py and these definitions of it, nothing else."""
    tree = ast.parse((HERE / "saeception.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(found) == len(names)
    namespace = {}
    exec(compile(ast.Module(imports + found, []), "copied", "exec"), namespace)
    return SimpleNamespace(**namespace)


def test_copied_pieces_work_without_the_rest(tmp_path):
    h, y = blobs(300)
    piece = copied("train_sae", "SparseAutoencoder", "resample", "batches", "take")
    sae = piece.train_sae(h, 12, epochs=3, batch_size=30)
    assert torch.equal(sae(h)[0], S.train_sae(h, 12, epochs=3, batch_size=30)(h)[0])
    piece = copied("sharpened_targets", "class_top_k", "class_mean", "sharpen", "LazyRows")
    targets = S.sharpened_targets(sae, h, y, 4, 5)
    assert torch.equal(piece.sharpened_targets(sae, h, y, 4, 5), targets)
    piece = copied("silhouette_score", "_clusters", "_distances")
    assert piece.silhouette_score(h, y) == S.silhouette_score(h, y)
    for name in ("davies_bouldin_score", "calinski_harabasz_score"):
        piece = copied(name, "_clusters", "_centroids", "class_mean")
        assert getattr(piece, name)(h, y) == getattr(S, name)(h, y)
    piece = copied("fit", "capture", "find_layer", "activations", "batches", "take")
    piece.fit(small_net(), "1", h, y, torch.rand(300, 8), 1.0)
    piece = copied("uncertainty_coefficient", "class_mean")
    assert piece.uncertainty_coefficient(h, y) == S.uncertainty_coefficient(h, y)
    names = ["decoded", "decode_photo", "writing", "write_whole", "write_at"]
    piece, images = copied("trunk_features", *names), random_images(70, 4)
    assert piece.trunk_features(Trunk(), images, tmp_path / "f.npy").shape == (70, 5)


def test_the_example_of_the_readme(capsys):
    text = (HERE / "README.md").read_text()
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.S)[1]
    exec(compile(example, "README.md", "exec"), {})
    rows = capsys.readouterr().out.strip().splitlines()
    assert "sae-ception" in rows[-2] and "control" in rows[-1]
