"""Behaviour that users of saeception.py rely on. Makes its own data; needs no network, no GPU."""

import builtins
import contextlib
import copy
import dis
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from types import CodeType, SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.transforms import v2

import saeception as S

HERE = Path(__file__).parent
S.render_digits = functools.cache(S.render_digits)  # each run renders 14,000: here, once will do

QUICK = """--limit 300 --epochs 1 --sae-epochs 3 --sae-min-steps 0 --top-k 8 --d-sae 32
    --device cpu --precision float32 --workers 1""".split()
MLP = ["--arch", "mlp", *QUICK]
PHOTOS = "--dataset imagenet --arch convnextv2_atto --weights none --image-size 32".split() + QUICK
OPTIONS = {"d_sae": 16, "top_k": 4, "cycles": 2, "fit_options": {"epochs": 2}}
OPTIONS["sae_options"] = {"epochs": 3, "min_steps": 0}


def blobs(n=400, d=6, classes=4, seed=0):
    """Points around one centre per class, all positive, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = 3 * torch.rand(classes, d, generator=generator)
    return (centres[y] + 0.3 * torch.randn(n, d, generator=generator)).relu(), y


X, Y = DATA = blobs()
TARGETS = torch.rand(400, 8)


def with_bad_rows(x):
    """A copy of x whose rows 3 and 7 hold a nan and an infinity."""
    x = x.clone()
    x[3, 1], x[7, 0] = math.nan, -math.inf
    return x


def small_net(trained_on=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    if trained_on is not None:
        S.fit(model, "1", *trained_on, epochs=5)
    return model


def dead_net():
    """Its layer "1" gives zeros for all."""
    model = small_net()
    model[0].bias.data -= 1e3
    return model


def jiggled(network):
    """With no parameter at its starting value of zero or one."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network.eval()


def random_images(n, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def fvu(sae, h):
    """Fraction of the variance of h that the SAE does not explain."""
    return ((h - sae(h)[0]).square().sum() / (h - h.mean(0)).square().sum()).item()


def final(model, train, test, layer="1", **more):
    """The last state of `saeception`."""
    *_, state = S.saeception(model, layer, train, test, **OPTIONS | more)
    return state


def untimed(rows):
    """Rows that can be compared: without their seconds, and None for nan, which equals nothing."""
    return [{k: S.finite_or_none(v) for k, v in row.items() if k != "seconds"} for row in rows]


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture
def run(tmp_path, capfd):
    """main() in this process: stdout, stderr and the newest run folder. An error is one line,
    behind the name of the folder and finished progress."""

    def call(*arguments, status=0):
        try:
            got = S.main(["--out-dir", str(tmp_path / "runs"), *map(str, arguments)])
        except SystemExit as stop:  # of argparse
            got = stop.code
        out, err = capfd.readouterr()
        assert got == status, err
        if status != 0:
            *progress, error = err.strip().splitlines()
            assert error.startswith("saeception.py: error: ")
            finished = " 0:00:00 left *$|^results go to "
            assert all(re.search(finished, line) for line in progress if line)
        folder = max(tmp_path.glob("runs/*"), default=None)  # their names tell the time
        return SimpleNamespace(out=out, err=err, folder=folder)

    return call


# === 1. Sparse autoencoder ===


@pytest.mark.parametrize("k", [None, 5])
def test_sae_is_its_formula(k):
    sae = jiggled(S.SparseAutoencoder(6, 20, k))
    shapes = {name: p.shape for name, p in sae.named_parameters()}
    assert shapes == {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    z = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc).clamp(min=0)
    if k:
        least = z.sort(dim=1, descending=True).values[:, k - 1 : k]
        z = z.where(z >= least, 0)
    assert_close(sae(X), (z @ sae.W_dec + sae.b_dec, z))


def sae_by_hand(h, d_sae, k, l1, batch_size, seed):
    """One epoch of `train_sae`, written out, and how many features no example of a batch used."""
    sample = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))[:4096]]
    scale = 1 / sample.square().mean().sqrt()  # the mean squared norm becomes d_in
    torch.manual_seed(seed)
    W_dec = F.normalize(torch.randn(d_sae, h.shape[1]), dim=1)
    W_enc, b_dec, b_enc = W_dec.T.clone(), sample.mean(0) * scale, torch.zeros(d_sae)
    if k is None:
        b_enc = -1.28 * (sample * scale @ W_enc).std(0)
    else:
        examples = sample[torch.randint(len(sample), (d_sae,))] - sample.mean(0)
        W_dec = F.normalize(W_dec + h.shape[1] / 2000 * F.normalize(examples, dim=1), dim=1)
        W_enc = W_dec.T / 2
    weights = [W_enc, b_enc, W_dec, b_dec]
    first = [torch.zeros_like(w) for w in weights]  # Adam's two moments
    second = [torch.zeros_like(w) for w in weights]
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed))
    n_steps, n_unused = len(h) // batch_size, 0
    for step in range(n_steps):
        x = h[order[step * batch_size : (step + 1) * batch_size]] * scale
        for w in weights:
            w.grad = None
            w.requires_grad_()
        z = ((x - b_dec) @ W_enc + b_enc).relu()
        if k is not None:
            z = z.where(z >= z.sort(dim=1).values[:, -k, None], 0)
        loss = ((z @ W_dec + b_dec - x) ** 2).sum(1).mean() + l1 * z.abs().sum(1).mean()
        gradients = list(torch.autograd.grad(loss, weights))
        for w in weights:
            w.requires_grad_(False)
        gradients[2] = gradients[2] - (gradients[2] * W_dec).sum(1, keepdim=True) * W_dec
        rate = 0.006 * math.sqrt(256 / d_sae) * min(1, 5 * (1 - step / n_steps))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            w -= rate * m_hat / (v_hat.sqrt() + 1e-8)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        unused = (z == 0).all(0)
        n_unused += unused.sum()
        b_enc += 0.1 * math.sqrt(h.shape[1]) * rate * unused
    return {
        "W_enc": W_enc,
        "b_enc": b_enc / scale,
        "W_dec": W_dec,
        "b_dec": b_dec / scale,
    }, n_unused


@pytest.mark.parametrize("k, l1", [(None, 0.3), (4, 0.0)])
def test_train_sae_is_its_recipe_step_by_step(k, l1):
    h = 3 * blobs(4200, d=48)[0]  # more than the sample of 4096, and wide enough to turn
    before = torch.get_rng_state()
    sae = S.train_sae(h, 60, k, l1, epochs=1, min_steps=0, batch_size=300, seed=3)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers go on
    expected, n_unused = sae_by_hand(h, 60, k, l1, 300, seed=3)
    assert n_unused > 0  # the rule that keeps features alive was needed
    for name, value in sae.state_dict().items():
        assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [None, 3])
def test_train_sae_reconstructs_repeatably(k):
    h = blobs(1000)[0]
    train = functools.partial(S.train_sae, h, 32, k, l1=0.02, batch_size=128, min_steps=150, seed=3)
    sae = train()
    assert same_parameters(sae, train())
    assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    fires = sae.encode(h) > 0
    assert fvu(sae, h) < 0.1 and fires.sum(1).float().mean() <= (k or 25)
    assert fires.any(0).float().mean() > (0.85 if k else 0.99)  # hardly a feature is dead
    with torch.autocast("cpu", torch.bfloat16):  # of a caller, who may have one around everything
        assert same_parameters(train(), sae)
    torch.set_default_dtype(torch.float64)
    try:
        assert train().W_dec.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_min_steps_adds_epochs_where_rows_are_few_and_too_few_steps_warn(capsys):
    for epochs, min_steps, expected in ((1, 50, 52), (1, 0, 4), (7, 3, 28)):  # 4 in an epoch
        progress = Mock(side_effect=iter)
        options = {"epochs": epochs, "min_steps": min_steps, "batch_size": 99}
        S.train_sae(X, 8, progress=progress, **options)
        assert len(progress.call_args.args[0]) == expected
    assert fvu(S.train_sae(X, 24), X) < 0.5  # by default few rows are enough
    S.train_sae(X, 4, k=4, epochs=1, min_steps=0)  # a TopK SAE may keep all
    capsys.readouterr()
    bad = fvu(S.train_sae(X, 256, epochs=1, min_steps=0), X)  # one step
    assert bad > 1 and f"(FVU {bad:.2f})" in capsys.readouterr().err


def test_train_sae_takes_activations_of_any_kind_and_scale():
    model = small_net()
    with S.capture(model[1]) as seen:
        model(X)
    h = seen.h.detach()
    for kind in (h.double(), h.half(), seen.h):  # the last has a gradient
        sae = S.train_sae(kind, 16, min_steps=20)
        plain = S.train_sae(kind.detach().float(), 16, min_steps=20)
        assert same_parameters(sae, plain) and torch.equal(sae(kind)[0], plain(kind)[0])
        assert not any(p.requires_grad for p in sae.parameters())
    assert all(p.grad is None for p in model.parameters())
    small, large = (S.train_sae(scale * h, 16, min_steps=50) for scale in (1, 1024))
    assert_close(large.encode(1024 * h), 1024 * small.encode(h), rtol=1e-2, atol=2)


@pytest.mark.parametrize("message, call", [
    ("the same for all", lambda: S.train_sae(torch.zeros(99, 4), 8)),
    ("the same for all", lambda: S.train_sae(torch.full((99, 4), 0.1), 8)),
    ("2 of 400 rows of h are not finite", lambda: S.train_sae(with_bad_rows(X), 8)),
    ("k = 33 active features of d_sae = 32", lambda: S.train_sae(X, 32, k=33)),
    ("k = 0 active", lambda: S.train_sae(X, 32, k=0)),
    (r"h is \[400, 2, 3\], not \[N, d_in\]", lambda: S.train_sae(X.view(400, 2, 3), 8)),
    ("d_sae = 0 features", lambda: S.train_sae(X, 0)),
    ("0 examples are too few", lambda: S.train_sae(X[:0], 8)),
    ("1 examples are too few", lambda: S.train_sae(X[:1], 8)),
    ("400 examples in batches of 0", lambda: S.train_sae(X, 8, batch_size=0)),
    ("not finite: lower its lr", lambda: S.train_sae(X, 8, lr=1e38, min_steps=5)),
])  # fmt: skip
def test_train_sae_refuses_what_makes_no_sae(message, call):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        call()


# === 2. Hook capture ===


def test_capture_of_vectors_tokens_maps_and_nothing_else():
    identity, lstm, norm = nn.Identity(), nn.LSTM(3, 3), nn.LayerNorm(3)
    shapes = ((5, 3), (5, 7, 3), (5, 3, 4, 4))
    vectors, tokens, maps = (torch.randn(shape, requires_grad=True) for shape in shapes)
    for t, h in ((vectors, vectors), (tokens, tokens[:, 0]), (maps, maps.mean((2, 3)))):
        with S.capture(identity) as seen:
            assert seen.h is None
            identity(t)
        assert_close(seen.h, h)
        assert seen.h.requires_grad
    for layer, shape, message in (
        (lstm, (2, 5, 3), "LSTM gives a tuple: take a layer inside"),
        (norm, (2, 4, 4, 3), r"channels last, \[2, 4, 4, 3\]: take a layer after the pooling"),
        (identity, (4,), r"Identity gives \[4\], not \[B, D\]"),
    ):
        with pytest.raises(ValueError, match=message), S.capture(layer) as seen:
            layer(torch.randn(shape))
        assert seen.h is None and not layer._forward_hooks  # no hook is left behind
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with S.capture(model[0]) as seen:
        model(vectors)
    assert_close(seen.h, model[0](vectors))  # before the work in place


@pytest.mark.parametrize("shape", [(5, 3), (5, 7, 3)])
def test_what_is_captured_is_from_before_work_in_place(shape):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(shape)
    with S.capture(model[0]) as seen:
        model(x)
    expected = model[0](x)
    if x.ndim == 3:
        expected = expected[:, 0]
    assert_close(seen.h, expected)


def test_a_linear_layer_on_maps_with_channels_last_is_refused():
    layer = nn.Linear(3, 5)
    with pytest.raises(ValueError, match="Linear gives a map with channels last"), S.capture(layer):
        layer(torch.randn(2, 4, 4, 3))


@pytest.mark.parametrize("layers, layer, message", [
    ([nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 2)), nn.Flatten(),
      nn.Linear(6, 4)], "1", "layer '1' gives 256 rows for 128 examples"),
    ([nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1)], "0",
     r"the model gives \[256, 4\], not \[128, n_classes\]"),
])  # fmt: skip
def test_rows_that_are_not_one_for_each_example_are_refused(layers, layer, message):
    with pytest.raises(ValueError, match=message):
        S.activations(nn.Sequential(*layers), layer, X)


def test_activations_in_chunks_of_named_layers_and_what_cannot_be_watched():
    model, unused, pair = small_net(), small_net(), small_net()
    model[1].alias = model[0]  # each name of a shared module is good
    for name, end in (("1", 2), ("1.alias", 1)):
        assert_close(S.activations(model, name, X, chunk=37), (model[:end](X), model(X)))
    dropping = nn.Sequential(model, nn.Dropout()).train()
    assert_close(S.activations(dropping, "1", X)[0], model(X))  # in eval mode
    unused[1].more = nn.ReLU()
    pair.register_forward_hook(lambda module, inputs, logits: (logits, 1))
    compiled = torch.compile(small_net().eval(), backend="eager")
    with torch.no_grad():
        compiled(X[:128])  # a chunk; from now on it does not look for new hooks
    for bad, layer, message in (
        (unused, "1.more", "'1.more' did not run for a batch .skipped, or compiled"),
        (compiled, "_orig_mod.1", "'_orig_mod.1' did not run"),
        (pair, "1", "the model gives a tuple: wrap it to give its logits"),
        (
            nn.Sequential(model, nn.Flatten(0)),
            "0",
            r"the model gives \[512\], not \[128, n_classes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            S.activations(bad, layer, X)


class EarlyExit(nn.Module):
    """Runs its second layer only for batches whose first number is positive."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        if x[0, 0] > 0:
            h = self.second(h)
        return h


def test_a_layer_that_is_skipped_for_a_batch_gives_no_rows_of_an_earlier_one():
    model, x = EarlyExit(), X.clone()
    x[256:, 0] = -1  # chunk 3 of 128
    with pytest.raises(ValueError, match="'second' did not run for a batch"):
        S.activations(model, "second", x)
    x[:, 0] = 1
    targets = S.activations(model, "second", x)[0]
    with pytest.raises(ValueError, match="'second' did not run for a batch"):
        S.fit(model, "second", x, Y, targets, augment=lambda row: -row)


def test_models_that_work_in_place_leave_the_callers_inputs_alone():
    model = nn.Sequential(v2.Normalize([0.5] * 3, [0.2] * 3, inplace=True), nn.ReLU(inplace=True))
    model.extend([nn.Flatten(), nn.Linear(12, 4)])
    x = torch.rand(400, 3, 2, 2)
    before = x.clone()
    options = {"cycles": 1, "arms": {"control": None, "class-mean": S.ARMS["class-mean"]}}
    final(model, (x, Y), (x, Y), layer="3", **options)
    assert torch.equal(x, before)


def test_models_without_parameters_have_activations():
    h, logits = S.activations(nn.Sequential(nn.Identity(), nn.Softmax(1)), "0", X)
    assert torch.equal(h, X) and torch.equal(logits, X.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", [DATA, (X.double(), Y), (X.half(), Y)])
def test_a_model_of_any_float_type_takes_inputs_of_any(dtype, data):
    model = small_net().to(dtype)
    S.fit(model, "1", *data, epochs=20, lr=1e-2)
    assert all(t.dtype == dtype for t in S.activations(model, "1", data[0]))
    for row in final(model, data, data, cycles=1)["rows"]:
        assert row["accuracy"] > 0.9 and all(math.isfinite(v) for v in list(row.values())[5:])


# === 3. Feature sharpening ===


LABEL_TYPES = [torch.int64, torch.int32, torch.uint8, torch.uint16, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("kind", LABEL_TYPES)
def test_class_top_k_and_sharpen_by_hand(kind):
    z = torch.tensor([[5.0, 0, 1, 0], [1, 0, 3, 0], [0, 2, 0, 0], [0, 4, 1, 1]])
    y = torch.tensor([0, 0, 2, 2]).to(kind)  # class 1 has no examples
    means = torch.tensor([[3, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0.5, 0.5]])
    assert torch.equal(S.class_mean(z, y, 3), means)
    assert torch.equal(S.ARMS["class-mean"](None, z, y, 3, 1), means[[0, 0, 2, 2]])
    mask = S.class_top_k(z, y, 3, 1)
    assert mask.tolist() == [[True, False, False, False], [False] * 4, [False, True, False, False]]
    sharp = [[5, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    assert S.sharpen(z, y, mask).tolist() == sharp
    assert S.class_mean(z, torch.tensor([0, 0, 0, 2]), 3)[2].tolist() == [0, 4, 1, 1]  # of one
    with pytest.raises(ValueError, match="4 rows, but 3 labels"):
        S.class_mean(z, y[:3], 3)
    # A class never keeps what it never uses, even where k leaves room.
    assert S.class_top_k(z, y, 3, 4).tolist()[0] == [True, False, True, False]
    many = torch.full((1_300_000, 1), 3.0).half()  # their sum does not fit into half precision
    assert S.class_mean(many, torch.zeros(len(many)).to(kind), 1).item() == 3


def test_labels_of_each_kind_are_the_same_numbers_and_others_are_refused():
    other = (Y + torch.arange(400) // 300) % 4
    expected = S.adjusted_rand_score(other, Y), S.silhouette_score(X, Y)
    for kind in LABEL_TYPES:
        y = Y.to(kind)
        assert torch.equal(S.class_numbers(y[:, None], 4), Y)
        assert (S.adjusted_rand_score(other, y), S.silhouette_score(X, y)) == expected
        assert untimed(final(small_net(), (X, y[:, None]), (X, y), cycles=0)["rows"]) == untimed(
            final(small_net(), DATA, DATA, cycles=0)["rows"]
        )
    for bad, message in ((Y + 0.5, "whole number"), (Y[:, None] + Y[:4], "one whole number")):
        with pytest.raises(ValueError, match=message):
            S.class_numbers(bad)
    for bad in (Y + 1, Y - 1):
        with pytest.raises(ValueError, match="labels from .* but 4 classes, from 0 on"):
            S.class_mean(X, bad, 4)


def test_rows_that_are_not_finite_make_no_targets_and_no_number_of_classes():
    sae, bad = S.train_sae(X, 16, min_steps=0, epochs=1), with_bad_rows(X)
    for arm in ("sae-ception", "unsharpened", "class-mean"):
        with pytest.raises(ValueError, match="2 of 400 rows of h are not finite"):
            S.ARMS[arm](sae, bad, Y, 4, 5)
    for top_k in (0, 17):
        with pytest.raises(ValueError, match=f"top_k = {top_k} of d_sae = 16 features"):
            S.sharpened_targets(sae, X, Y, 4, top_k)


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
    assert_close(S.ARMS["unsharpened"](sae, h, y, 4, 3), sae(h)[0])  # with all features


# === 4. Combined loss ===


@pytest.mark.parametrize("aux_loss, shift", [("mse", 0), ("mse", 1), ("cosine", 0)])
def test_fit_is_its_formula_with_a_constant_weight(aux_loss, shift):
    (x, y), targets = blobs(64), torch.rand(64, 8)
    model, plain = small_net(), small_net()
    variance = plain[:2](x).var(0).mean().detach()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(5):  # the same training, written out
        h = plain[:2](x + shift)  # augmented inputs meet the targets of the clean ones
        aux = (h - targets).square().mean() / variance  # it trains what is below h, and no head
        if aux_loss == "cosine":
            aux = (1 - (h * targets).sum(1) / h.norm(dim=1) / targets.norm(dim=1)).mean()
        task = F.cross_entropy(plain[2](h), y)
        loss = task + 0.8 * aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    augment = (lambda row: row + shift) if shift else None
    before = torch.get_rng_state()
    losses = S.fit(model, "1", x, y, targets, 0.8, aux_loss, epochs=5, lr=1e-2, augment=augment)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers go on
    assert_close([*model.parameters()], [*plain.parameters()], rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx((task.item(), aux.item()), rel=1e-4)  # of the last epoch


def test_fit_with_sgd_is_the_papers():
    (x, y), model, plain = blobs(64), small_net(), small_net()
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for _ in range(3):
        loss = F.cross_entropy(plain(100 * x), y)
        gradients = torch.autograd.grad(loss, [*plain.parameters()])
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 1  # it is clipped
        for p, g, v in zip(plain.parameters(), gradients, velocity, strict=True):
            v.mul_(0.9).add_(g / norm + 0.05 * p.detach())
            p.data -= 0.1 * v
    task, aux = S.fit(model, "1", 100 * x, y, epochs=3, lr=0.1, optimizer="sgd")
    assert_close([*model.parameters()], [*plain.parameters()], rtol=1e-4, atol=1e-4)
    assert task == pytest.approx(loss.item(), rel=1e-4) and math.isnan(aux)


def test_fit_returns_the_means_of_its_last_epoch():
    def fit(epochs, lr):
        return S.fit(small_net(DATA), "1", X, Y, TARGETS, epochs=epochs, lr=lr, batch_size=100)

    h, logits = S.activations(small_net(DATA), "1", X)
    variance = h.var(0).mean()
    expected = F.cross_entropy(logits, Y), (h - TARGETS).square().mean() / variance
    assert fit(2, 0.0) == pytest.approx([value.item() for value in expected], rel=1e-4)
    (_, aux), (_, later_aux) = fit(1, 1e-2), fit(5, 1e-2)
    assert later_aux < aux  # h follows its target


def test_what_is_frozen_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    S.fit(model, "1", 3 * X + 5, Y)
    assert torch.equal(model[0].running_mean, before[0].running_mean)
    assert not torch.equal(model[2].running_mean, before[2].running_mean)
    assert not model.training and not model[2].training


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_layer_in_a_reentrant_checkpoint_is_not_said_to_be_untrained():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.first, self.rest, self.reentrant = nn.Linear(6, 8), small_net()[1:], reentrant

        def forward(self, x):
            h = self.first(x)
            return checkpoint(self.rest, h, use_reentrant=self.reentrant)

    S.fit(Checkpointed(False), "rest.1", X, Y, TARGETS)
    with pytest.raises(ValueError, match="no gradient reaches h: .* or in a reentrant checkpoint"):
        S.fit(Checkpointed(True), "rest.1", X, Y, TARGETS)


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


def test_cluster_metrics():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 8, generator=generator)
    y = torch.randint(0, 5, (150,), generator=generator)
    separate = x / 100 + torch.randn(5, 8, generator=generator)[y]
    far = torch.full((1, 8), 1e6)
    cases = {
        "singletons": (x, torch.cat([torch.tensor([77, -3]), y[2:]])),
        "N - 1 clusters": (x, torch.arange(150).clamp(min=1)),
        "pairs": (x, torch.arange(150) // 2), "duplicates": (x[:75].repeat(2, 1), y),
        "far": (x + 1000, y), "one far point": (torch.cat([far, x[1:]]), y),
        "separate": (separate, y), "random": (x, y), "sparse": ((x - 1.5).relu(), y),
        "close clusters and one far point": (torch.cat([far, 10 * separate[1:]]), y),
        "half": (x.half(), y), "bfloat16": (x.bfloat16(), y), "double": (x.double(), y.int()),
        "times": ((100 * x).long() + 1_700_000_000, y),  # seconds since 1970, as whole numbers
        "one row times 1e10": (torch.cat([1e10 * x[:1], x[1:]]), y),
        "one row times 1e12, in double": (torch.cat([1e12 * x[:1], x[1:]]).double(), y),
        "tight classes far apart": (x / 100 + 1e6 * torch.randn(5, 8).round()[y], y),
        "the same in double": (x.double() + 1e9 * torch.randn(5, 8)[y], y),
    }  # fmt: skip
    for case, (points, labels) in cases.items():
        before = points.clone()
        for score, expected in zip(SCORES, naive_scores(points, labels), strict=True):
            chunk = {"chunk": 37} if score is S.silhouette_score else {}
            assert score(points, labels, **chunk) == pytest.approx(expected, rel=1e-5), case
        assert torch.equal(points, before)  # the caller's points are left alone


def test_silhouette_at_any_scale_and_in_spite_of_rough_products():
    x, y = torch.randn(500, 300).relu(), torch.arange(500) % 5
    found = [S.silhouette_score(x * scale, y) for scale in (1e-25, 1e-20, 1e15, 1e20)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(S.silhouette_score(x, y))
    for precision in ("high", "medium", "highest"):  # TF32, bfloat16, where the machine has them
        torch.set_float32_matmul_precision(precision)
        found.append(S.silhouette_score(x, y))
    if hasattr(torch.backends.mkldnn, "matmul"):  # the newer way to say "medium", torch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        found.append(S.silhouette_score(x, y))
        torch.set_float32_matmul_precision("highest")
    assert found == pytest.approx([naive_scores(x, y)[0]] * len(found), rel=1e-5)


def test_cluster_metrics_of_classes_that_are_one_point_each_or_all_the_same_one():
    y = torch.arange(10) // 5
    one_place, two_places = torch.full((10, 2), 0.1), torch.randn(2, 3)[y]
    assert [score(one_place, y) for score in SCORES] == [0, 0, 1]
    assert [score(two_places, y) for score in SCORES] == [pytest.approx(1), 0, 1]
    for bad in (math.nan, math.inf):
        two_places[3, 1] = bad
        assert all(math.isnan(score(two_places, y)) for score in SCORES)


def test_adjusted_rand():
    a, b = torch.tensor([0, 0, 1, 1, 2, 2, 2, 9]), torch.tensor([5, 5, 5, 1, 1, 1, 3, 3])
    pairs = torch.combinations(torch.arange(8))
    in_a, in_b = (v[pairs[:, 0]] == v[pairs[:, 1]] for v in (a, b))
    chance = in_a.sum() * in_b.sum() / len(pairs)
    expected = ((in_a & in_b).sum() - chance) / ((in_a.sum() + in_b.sum()) / 2 - chance)
    assert S.adjusted_rand_score(a, b) == pytest.approx(expected.item())
    assert S.adjusted_rand_score(a, 7 - a) == 1
    assert S.adjusted_rand_score(torch.zeros(6), torch.arange(6)) == 0


def entropy(*labels):
    """In bits, of labels or of pairs of them."""
    n = np.unique(np.stack(labels), axis=1, return_counts=True)[1]
    return -(n / n.sum() * np.log2(n / n.sum())).sum()


def naive_uncertainty(fires, y):
    """Mean of (H(fires) + H(y) - H(fires, y)) / H(fires) over features that fire on some."""
    some = [f for f in fires.int().T if 0 < f.sum() < len(f)]
    return np.mean([1 + (entropy(y) - entropy(f, y)) / entropy(f) for f in some])


def naive_selectivity(z, y):
    """Mean index (Morcos et al. 2018) of the features with a positive value."""
    means = torch.stack([z[y == c].relu().double().mean(0) for c in y.unique()])
    largest, *others = means.sort(dim=0, descending=True).values
    rest = sum(others) / len(others)
    return ((largest - rest) / (largest + rest)).nanmean().item()


def test_uncertainty_and_class_selectivity():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=generator) * 4
    z = torch.randn(300, 6, generator=generator) - 0.5
    z[:, 0], z[:, 1], z[:, 2] = -1, 1, (y == 4).float()  # never, always, exactly one class
    assert S.uncertainty_coefficient(z, y) == pytest.approx(naive_uncertainty(z > 0, y), rel=1e-5)
    assert S.class_selectivity_index(z, y) == pytest.approx(naive_selectivity(z, y), rel=1e-5)
    for score in (S.uncertainty_coefficient, S.class_selectivity_index):
        assert math.isnan(score(z[:, :1], y))  # of features that never fire nothing can be said
        for value in (math.inf, -math.inf):
            bad = z.clone()
            bad[7, 3] = value
            assert math.isnan(score(bad, y))
    assert math.isnan(S.uncertainty_coefficient(z[:, 1:2], y))  # fires always
    assert S.class_selectivity_index(z[:, :2], y) == 0
    assert S.uncertainty_coefficient(z[:, 2:3], y) == pytest.approx(1)
    assert S.class_selectivity_index(z[:, 2:3], y) == 1


# === 6. Cycles ===


def test_saeception_keeps_arms_apart_and_the_model_as_it_was():
    model = small_net(DATA)
    before = copy.deepcopy(model)
    both = final(model, DATA, DATA, baseline_epochs=1)["rows"]
    alone = final(model, DATA, DATA, baseline_epochs=1, arms={"control": None})["rows"]
    assert [row["arm"] for row in both] == ["baseline", *2 * ["sae-ception", "control"]]
    assert all(row in untimed(both) for row in untimed(alone))  # the other arm is not felt
    assert same_parameters(model, before)
    (other,) = final(model, DATA, DATA, baseline_epochs=1, cycles=0, seed=1)["rows"]
    assert other["fvu"] != both[0]["fvu"]
    few = {"epochs": 1, "min_steps": 0}
    rows = [
        final(model, DATA, DATA, cycles=0, sae_options=few | more)["rows"][0]
        for more in ({}, {"seed": 0}, {"seed": 5})
    ]
    assert rows[0]["fvu"] == rows[1]["fvu"] != rows[2]["fvu"]  # an own seed for the SAE
    # Dropout draws the same numbers in each arm.
    dropping = nn.Sequential(model[:2], nn.Dropout(0.5), model[2])
    _, *arms = final(dropping, DATA, DATA, "0", cycles=1, arms={"a": None, "b": None})["rows"]
    a, b = untimed(arms)
    assert a | {"arm": "b"} == b


def test_rows_are_what_the_restored_models_and_saes_give():
    test = blobs(203, seed=1)  # no whole number of quarters
    train = X[Y != 2], Y[Y != 2].int()  # without one of the classes
    model = small_net(train)
    state = final(model, train, test, cycles=1, val=DATA)
    before = torch.get_rng_state()
    row, (net, sae), y = state["rows"][1], S.restore(model.train(), state, "sae-ception"), test[1]
    assert not net.training and torch.equal(before, torch.get_rng_state())
    undefined = S.measure(net, "1", sae, with_bad_rows(test[0]), y)
    for name, value in undefined.items():
        assert math.isnan(value) or name in ("accuracy", "l0", "dead"), name
    final(model, DATA, DATA, top_k=99, cycles=1, arms={"class-mean": S.ARMS["class-mean"]})
    h, logits = S.activations(net, "1", test[0])
    z = sae.encode(h)
    # A unit of h fires above its own 75th percentile over the rows that are measured.
    level = np.percentile(h.numpy(), 75, axis=0, method="lower")
    expected = {"fvu": fvu(sae, h), "l0": (z > 0).sum(1).double().mean().item()}
    expected["val_fvu"] = fvu(sae, S.activations(net, "1", X)[0])
    expected["dead"] = sum(z[:, j].max() == 0 for j in range(16)).item() / 16
    largest = [z[i].tolist().index(z[i].max()) for i in range(len(z))]
    expected["adjusted_rand"] = S.adjusted_rand_score(torch.tensor(largest), y)
    expected["accuracy"] = (logits.argmax(1) == y).double().mean().item()
    for prefix, points, fires in (("", z, z > 0), ("h_", h, h > torch.tensor(level))):
        for score, value in zip(SCORES, naive_scores(points, y), strict=True):
            expected[prefix + score.__name__.removesuffix("_score")] = value
        expected[f"{prefix}uncertainty"] = naive_uncertainty(fires, y)
        expected[f"{prefix}class_selectivity"] = naive_selectivity(points, y)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_an_arm_of_ones_own_pulls_h_to_its_targets_from_cycle_to_cycle():
    model, rule = small_net(DATA), Mock(side_effect=lambda sae, h, *others: 0 * h)
    final(model, DATA, DATA, arms={"zero": rule}, weight=5.0, fit_options={"epochs": 20})
    (_, h, y, *numbers), (_, later_h, *_) = (call.args for call in rule.call_args_list)
    assert_close(h, S.activations(model, "1", X)[0])
    assert torch.equal(y, Y) and numbers == [4, 4]  # classes, top_k
    assert later_h.norm() < 0.8 * h.norm()


def test_states_do_not_change_and_are_saved_to_go_on(tmp_path):
    model = small_net(DATA)
    states = list(S.saeception(model, "1", DATA, DATA, **OPTIONS))
    assert [len(state["rows"]) for state in states] == [1, 2, 3, 4, 5]
    torch.save(states[3], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)  # it is plain data
    rows = final(small_net(), DATA, DATA, state=state)["rows"]
    seconds = [row["seconds"] for row in rows]
    assert seconds[:4] == [row["seconds"] for row in states[3]["rows"]]  # they are not done again
    assert untimed(rows) == untimed(states[-1]["rows"])
    rows = final(small_net(), DATA, DATA, state=state, sae_k=4, cycles=3)["rows"]
    assert all(row["l0"] <= 4 for row in rows[4:])  # each SAE keeps its own k
    assert final(small_net(), DATA, DATA, state=states[-1]) is states[-1]  # nothing is left to do


def test_training_works_under_no_grad_and_leaves_no_gradients():
    model, targets = small_net(), torch.rand(400, 8)
    with torch.no_grad():
        S.fit(model, "1", X, Y, targets)
        sae = S.train_sae(X, 16, epochs=2, min_steps=0)
    assert not same_parameters(model, small_net())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fvu(sae, X) < 1


def test_an_arm_gets_labels_of_any_kind_as_class_numbers():
    labels = Y[:, None].double()
    rule = Mock(side_effect=lambda sae, h, y, *others: S.class_mean(h, y, 4)[y])
    final(small_net(DATA), (X, labels), (X, labels), arms={"own": rule}, cycles=1)
    assert torch.equal(rule.call_args.args[2], Y)


def test_the_loss_of_a_bfloat16_h_is_computed_in_float32():
    x, y = blobs(64)
    model = small_net().bfloat16()
    h, _ = S.activations(model, "1", x)
    targets = h.float() * (1 + 2**-10)  # less than a step of bfloat16
    variance = h.float().var(0).mean()
    _, aux = S.fit(model, "1", x, y, targets, batch_size=64, lr=0.0)
    assert aux == pytest.approx(((h.float() - targets).square().mean() / variance).item(), rel=1e-3)


@pytest.mark.parametrize("aux_loss", ["mse", "cosine"])
def test_the_loss_of_a_bfloat16_h_and_targets_of_its_type(aux_loss):
    x, y = blobs(64)
    model = small_net().bfloat16()
    h, _ = S.activations(model, "1", x)
    targets = h * 1.02 + 0.01  # bfloat16, as an arm's are
    a, b = h.float(), targets.float()
    expected = (a - b).square().mean() / a.var(0).mean()
    if aux_loss == "cosine":
        expected = 1 - F.cosine_similarity(a, b).mean()
    options = {"aux_loss": aux_loss, "batch_size": 64, "lr": 0.0}
    _, aux = S.fit(model, "1", x, y, targets, **options)
    assert aux == pytest.approx(expected.item(), rel=1e-3)


def test_the_loss_of_a_float64_h_is_computed_in_float64():
    x, y = blobs(64)
    model = small_net().double()
    h, _ = S.activations(model, "1", x)
    _, aux = S.fit(model, "1", x, y, h + 1e-10, batch_size=64, lr=0.0)
    assert aux == pytest.approx(1e-20 / h.var(0).mean().item(), rel=1e-3, abs=0)


def test_targets_are_constants():
    decoder = torch.nn.Parameter(torch.rand(400, 8))
    S.fit(small_net(), "1", X, Y, decoder.square(), batch_size=100)  # four steps
    assert decoder.grad is None


def test_options_come_before_what_saeception_chooses(monkeypatch):
    model = small_net(DATA)
    for name in ("fit", "train_sae"):
        monkeypatch.setattr(S, name, Mock(wraps=getattr(S, name)))
    options = {"seed": 7, "variance": 0.5, "epochs": 1}
    final(model, DATA, DATA, cycles=1, restart=True, fit_options=options)
    for one in S.fit.call_args_list:
        assert one.kwargs["seed"] == 7 and one.kwargs["variance"] == 0.5
    assert options == {"seed": 7, "variance": 0.5, "epochs": 1}
    assert all(call.kwargs["seed"] == 7 for call in S.train_sae.call_args_list)


def test_saes_have_the_seed_of_their_cycle(monkeypatch):
    monkeypatch.setattr(S, "train_sae", Mock(wraps=S.train_sae))
    final(small_net(DATA), DATA, DATA, seed=3)
    seeds = [call.kwargs["seed"] for call in S.train_sae.call_args_list]
    assert seeds == [3000, 3001, 3001, 3002, 3002]


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_stays_in_its_mode(training):
    model = small_net().train(training)
    rows = final(model, DATA, DATA, cycles=1)["rows"]
    assert model.training == training and all(row["seconds"] > 0 for row in rows)


def test_arms_that_do_not_sharpen_take_any_top_k():
    arms = {name: S.ARMS[name] for name in ("control", "unsharpened", "class-mean")}
    assert len(final(small_net(DATA), DATA, DATA, top_k=99, cycles=1, arms=arms)["rows"]) == 4


def test_fvu_of_a_constant_h_is_not_defined():
    model = small_net(DATA)
    net, sae = S.restore(model, final(model, DATA, DATA, cycles=0), "baseline")
    assert math.isnan(S.measure(net, "1", sae, X[:1].expand(6, -1), Y[:6])["fvu"])


def never(*arguments, **options):
    raise AssertionError("this trains before it has looked at its arguments")


@pytest.mark.parametrize("message, call", [
    ("'l2' is neither", lambda: S.fit(small_net(), "1", X, Y, TARGETS, aux_loss="l2")),
    ("'lion' is neither", lambda: S.fit(small_net(), "1", X, Y, optimizer="lion")),
    ("have to be .400, 8., as h", lambda: S.fit(small_net(), "1", X, Y, TARGETS[:, :1])),
    ("400 inputs, but 399", lambda: S.fit(small_net(), "1", X, Y[1:])),
    ("no gradient", lambda: S.fit(small_net().requires_grad_(False), "1", X, Y, TARGETS)),
    ("diverged in epoch 1; lower lr", lambda: S.fit(small_net(), "1", X, Y, lr=1e38)),
    ("diverged in epoch 1; lower lr",  # in its only step
     lambda: S.fit(small_net(), "1", X, Y, lr=math.inf, batch_size=400)),
    ("labels from 0 to 4, but 4 classes",
     lambda: S.fit(small_net(), "1", X, Y + (torch.arange(400) == 3))),
    ("no layer 'nosuch'; the layers are 0, 1, 2", lambda: S.fit(small_net(), "nosuch", X, Y)),
    ("no layer 'nosuch'", lambda: final(small_net(), DATA, DATA, layer="nosuch")),
    ("train, test and val is empty", lambda: final(small_net(), DATA, (X[:0], Y[:0]))),
    ("the state is not of seed 1", lambda: final(small_net(), DATA, DATA, seed=1, state={
        "rows": [{"seed": 0, "cycle": 0, "arm": "baseline"}]})),
    ("diverged in epoch 1; lower lr", lambda: S.fit(small_net(), "1", X * math.nan, Y)),
    ("2 of 400 rows of the targets are not finite",
     lambda: S.fit(small_net(), "1", X, Y, with_bad_rows(TARGETS))),
    ("2 of 400 rows of h are not", lambda: S.fit(small_net(), "1", with_bad_rows(X), Y, TARGETS)),
    ("h of layer '1' is the same for all", lambda: S.fit(dead_net(), "1", X, Y, TARGETS)),
    ("cannot be called baseline", lambda: final(small_net(), DATA, DATA, arms={"baseline": None})),
    ("top_k = 25 of d_sae = 16", lambda: final(small_net(), DATA, DATA, top_k=25)),
    ("sae_k = 17 active", lambda: final(small_net(), DATA, DATA, sae_k=17)),
    ("top_k = 25 of d_sae = 16", lambda: final(
        small_net(), DATA, DATA, top_k=25, arms={"own": lambda sae, h, *others: h})),
    ("labels from 1 to 4, but 4", lambda: final(small_net(), (X, Y + 1), DATA)),
    ("labels from 1 to 4, but 4", lambda: final(small_net(), DATA, (X, Y + 1))),
    ("400 inputs, but 399", lambda: final(small_net(), DATA, (X, Y[1:]))),
    ("400 inputs, but 399", lambda: final(small_net(), DATA, DATA, val=(X, Y[1:]))),
    ("^labels from 1 to 4, but 4", lambda: final(small_net(), DATA, DATA, val=(X, Y + 1))),
    ("400 rows, but 1 labels", lambda: S.sharpen(X, Y[:1], torch.ones(4, X.shape[1]))),
    ("labels from -1 to 2, but 4", lambda: S.sharpen(X, Y - 1, torch.ones(4, X.shape[1]))),
    ("labelings of 400 and of 1 points", lambda: S.adjusted_rand_score(Y, Y[:1])),
    ("400 points with 1 different", lambda: S.silhouette_score(X, Y * 0)),
    ("400 points with 400 different", lambda: S.davies_bouldin_score(X, torch.arange(400))),
])  # fmt: skip
def test_what_does_not_fit_is_refused(message, call, monkeypatch):
    if "diverged" not in message:
        monkeypatch.setattr(torch.optim.Adam, "step", never)
    with pytest.raises((ValueError, FloatingPointError), match=message):
        call()


def test_an_error_names_its_stage():
    def rule(sae, h, *others):
        return with_bad_rows(h)

    model = small_net(DATA)
    with pytest.raises(ValueError, match="^seed 0 cycle 1 own: 2 of 400 rows of the targets"):
        final(model, DATA, DATA, arms={"own": rule})
    with pytest.raises(FloatingPointError, match="^seed 0 cycle 1 control: the loss diverged"):
        final(model, DATA, DATA, fit_options={"lr": 1e38}, arms={"control": None})


def test_the_method_separates_classes_more_than_the_same_training_without_it():
    x, y = blobs(1600)
    x = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
    )
    S.fit(model, "3", *train, epochs=10, lr=3e-3)
    options = {"d_sae": 128, "top_k": 10, "fit_options": {"epochs": 5, "lr": 3e-3}}
    options["sae_options"] = {"epochs": 1, "min_steps": 200}
    for seed in (0, 1):
        *_, ours, control = final(model, train, test, layer="3", seed=seed, **options)["rows"]
        assert (ours["arm"], control["arm"]) == ("sae-ception", "control")
        assert ours["h_silhouette"] > control["h_silhouette"] + 0.03  # found: .05
        assert ours["h_davies_bouldin"] < control["h_davies_bouldin"] - 0.07  # found: .11
        assert ours["accuracy"] > control["accuracy"] - 0.02  # 400 points: 8 of them
        assert ours["aux_loss"] > 0 and math.isnan(control["aux_loss"])


def test_restart_trains_the_first_weights_anew_towards_targets_of_the_trained_ones(monkeypatch):
    model, starts, targets, seeds = small_net(), [], [], []
    fit = S.fit

    def spy(net, layer, x, y, target, *others, **options):
        starts.append(copy.deepcopy(net))
        targets.append((target, options.get("variance")))
        seeds.append(options["seed"])
        return fit(net, layer, x, y, target, *others, **options)

    monkeypatch.setattr(S, "fit", spy)
    options = {"arms": {"sae-ception": S.ARMS["sae-ception"], "control": None}, "restart": True}
    options["seed"] = 3
    states = list(S.saeception(model, "1", DATA, DATA, **OPTIONS | options, baseline_epochs=3))
    assert all(same_parameters(start, model) for start in starts)
    assert seeds == [3000, 3001, 3001, 3002, 3002]  # the arms of a cycle see the same batches
    for before, (target, variance) in ((states[0], targets[1]), (states[1], targets[3])):
        arm = before["rows"][-1]["arm"]
        net, sae = S.restore(model, before, arm)
        h, _ = S.activations(net, "1", X)
        assert_close(target, S.sharpened_targets(sae, h, Y, 4, 4))
        assert variance == pytest.approx(h.var(0).mean().item())
    assert targets[2][0] is None and targets[4][0] is None
    state = states[2]
    rows = final(model, DATA, DATA, **options, baseline_epochs=3, state=state)["rows"]
    assert untimed(rows) == untimed(states[-1]["rows"])  # a resumed run restarts, too


# === 7. Networks, against torchvision's forward ===


def normalized(images):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return v2.functional.normalize(images / 255, mean, std)


def tiny_vit():
    return jiggled(VisionTransformer(32, 4, 4, 4, 128, 512, num_classes=7))


def test_vit_split_is_torchvisions_forward_at_its_own_size_and_another(tmp_path):
    vit, images, path = tiny_vit(), random_images(3, 32), str(tmp_path / "vit.pt")
    torch.save(vit.state_dict(), path)
    large = VisionTransformer(48, 4, 4, 4, 128, 512, num_classes=7).eval()
    large.load_state_dict(interpolate_embeddings(48, 4, dict(vit.state_dict())))
    resized = v2.Resize((48, 48), v2.InterpolationMode.BICUBIC)(images)
    for size, whole, pixels in ((33, vit, images), (49, large, resized)):  # to whole patches
        S.cifar10_vit("vit_tiny", size)  # there are no weights for it
        trunk, model, layer = S.cifar10_vit("vit_tiny", size, 7, path)
        assert (model.head.weight == 0).all()  # a new head
        model.head.load_state_dict(vit.heads.head.state_dict())
        found = S.activations(model, layer, trunk.eval()(images).detach())
        assert_close(found, S.activations(whole, "encoder.ln", normalized(pixels)))


def test_convnextv2_block_is_its_formula():
    block, x = jiggled(S.ConvNeXtV2Block(8)), torch.randn(2, 8, 5, 6)
    w = dict(block.named_parameters())
    y = F.gelu(block.pwconv1(block.norm(block.dwconv(x).permute(0, 2, 3, 1))))
    size = y.square().sum((1, 2), keepdim=True).sqrt()
    response = size / (size.mean(3, keepdim=True) + 1e-6)
    y = w["grn.gamma"] * (y * response) + w["grn.beta"] + y
    assert_close(block(x), x + block.pwconv2(y).permute(0, 3, 1, 2))


def official_convnext():
    """torchvision's ConvNeXt in the size of atto, and its weights as a checkpoint of V2, which has
    a GRN in place of the layer scale: here both do nothing."""
    sizes = ((40, 80, 2), (80, 160, 2), (160, 320, 6), (320, None, 2))
    network, state = jiggled(ConvNeXt([CNBlockConfig(*size) for size in sizes])), {}
    names = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.5": "pwconv2"}
    names |= {"layer_scale": "grn.gamma", "classifier.0": "norm", "classifier.2": "head"}
    for i in range(4):
        names[f"features.{2 * i}"] = f"downsample_layers.{i}"
        names[f"features.{2 * i + 1}"] = f"stages.{i}"
    for name, value in network.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
        if name.endswith("gamma"):
            value.fill_(1)
            state[name] = torch.zeros(1, 1, 1, 4 * len(value))
            state[name.replace("gamma", "beta")] = state[name]
    return network, {"model": state}


def test_convnext_is_the_official_network_and_keeps_its_head_for_imagenet(tmp_path, run):
    (official, checkpoint), images = official_convnext(), random_images(3, 64)
    weights = tmp_path / "w.pt"
    torch.save(checkpoint, weights)
    h, logits = S.activations(official, "classifier.0", normalized(images))
    for n_classes in (5, 1000):
        trunk, model, layer = S.imagenet_convnext("convnextv2_atto", n_classes, str(weights))
        found = S.activations(model, layer, trunk(images))
        assert_close(found[0], h, rtol=1e-4, atol=1e-4)
    assert_close(found[1], logits, rtol=1e-4, atol=1e-3)  # 1000: its own head
    for place in (f"{split}/n{1440764 + c:08}" for split in ("train", "val") for c in range(1000)):
        (tmp_path / place).mkdir(parents=True)
        photo = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), np.uint8))
        photo.save(tmp_path / place / "a.bmp")
    flags = [*PHOTOS, "--data-dir", tmp_path, "--weights", weights, "--limit", 60, "--cycles", 0]
    done = run(*flags)
    assert "baseline: train" not in done.err and "baseline: SAE" in done.err
    state = torch.load(done.folder / "checkpoint.pt")["states"][0]
    assert_close(S.restore(model, state, "baseline")[0](trunk(images)), found[1])


@pytest.mark.filterwarnings("ignore:for (weight|bias). copying from a non-meta")
@pytest.mark.parametrize("arch, size, url", [
    ("vit_b_32", 88_224_232, "vit_b_32-d86f8d99.pth"),
    ("vit_b_16", 86_567_656, "vit_b_16_swag-9ac1b537.pth"),
    ("vit_l_16", 304_326_632, "vit_l_16_swag-4f3808c9.pth"),
    ("vit_h_14", 632_045_800, "vit_h_14_swag-80465313.pth"),
    ("convnextv2_atto", 3_708_400, "im1k/convnextv2_atto_1k_224_ema.pt"),
    ("convnextv2_femto", 5_233_240, "im1k/convnextv2_femto_1k_224_ema.pt"),
    ("convnextv2_pico", 9_066_280, "im1k/convnextv2_pico_1k_224_ema.pt"),
    ("convnextv2_nano", 15_623_800, "im22k/convnextv2_nano_22k_384_ema.pt"),
    ("convnextv2_tiny", 28_635_496, "im22k/convnextv2_tiny_22k_384_ema.pt"),
    ("convnextv2_base", 88_717_800, "im22k/convnextv2_base_22k_384_ema.pt"),
    ("convnextv2_large", 197_956_840, "im22k/convnextv2_large_22k_384_ema.pt"),
    ("convnextv2_huge", 660_289_640, "im22k/convnextv2_huge_22k_384_ema.pt"),
])  # fmt: skip
def test_networks_have_the_official_size_and_weights(arch, size, url, tmp_path, monkeypatch):
    download = Mock(side_effect=OSError("no route"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    build = functools.partial(S.imagenet_convnext, arch, None)
    place = "https://dl.fbaipublicfiles.com/convnext/convnextv2/"
    if arch.startswith("vit"):
        build = functools.partial(S.cifar10_vit, arch, 224, 1000)
        place = "https://download.pytorch.org/models/"
    with torch.device("meta"):
        trunk, model, _ = build("none")
        with pytest.raises(OSError, match=f"{place}{url} .no route.* {tmp_path}"):
            build()
    options = {"map_location": "cpu", "check_hash": True, "weights_only": True}
    assert download.call_args == call(place + url, **options)
    assert sum(p.numel() for part in (trunk, model) for p in part.parameters()) == size


def test_checkpoints_that_do_not_fit_get_one_line(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(tiny_vit().state_dict() | {"encoder.ln.bias": torch.zeros(7)}, path)
    whole = path.read_bytes()
    for content in (whole, whole[:5000], b"text\n"):
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"weights {path} .*name another file") as caught:
            S.cifar10_vit("vit_tiny", 32, 10, str(path))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("saved", [
    lambda state: {"model": state, "args": Namespace(lr=1e-4, data_path="x"), "epoch": 3},
    lambda state: {"state_dict": state},
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    lambda state: {"model": {f"module._orig_mod.{key}": v for key, v in state.items()}},
])  # fmt: skip
def test_checkpoints_are_read_as_training_scripts_write_them(saved, tmp_path):
    state = official_convnext()[1]["model"]
    torch.save(saved(state), tmp_path / "w.pt")
    trunk, model, _ = S.imagenet_convnext("convnextv2_atto", None, str(tmp_path / "w.pt"))
    found = trunk.state_dict() | model.state_dict()
    assert torch.equal(found["head.weight"], state["head.weight"])
    assert torch.equal(found["2.0.0.weight"], state["downsample_layers.0.0.weight"])


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = tiny_vit().state_dict()
    state["encoder.ln.bias"][2] = math.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(OSError, match="w.pt .encoder.ln.bias has values that are not finite"):
        S.cifar10_vit("vit_tiny", 32, 10, str(tmp_path / "w.pt"))


class Intruder:
    """Pickled, it makes the folder, as soon as somebody loads it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_weights_file_cannot_run_code(tmp_path):
    torch.save({"model": Intruder(str(tmp_path / "folder"))}, tmp_path / "w.pt")
    with pytest.raises(OSError, match="cannot use the weights"):
        S.cifar10_vit("vit_tiny", 32, 10, str(tmp_path / "w.pt"))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("arch, patches", [("vit_h_14", 27**2), ("vit_b_16", 24**2)])
def test_vits_take_as_many_patches_as_fit_into_384_pixels(arch, patches):
    with torch.device("meta"):
        trunk, _, _ = S.cifar10_vit(arch, weights="none")
    assert trunk[-1].encoder.pos_embedding.shape[1] == patches + 1


def test_the_small_networks_take_pixels_from_0_to_1_to_a_named_layer():
    images = random_images(4, 28)[:, :1]
    pixels = images / 255
    trunk, mlp, layer = S.mnist_mlp(7)
    h, logits = S.activations(mlp, layer, trunk(images))
    assert_close(h, mlp.fc1(pixels.flatten(1)).relu())
    assert_close(logits, mlp.head(mlp.fc2(h).relu()))
    assert [mlp.fc1.out_features, mlp.fc2.out_features, mlp.head.out_features] == [16, 16, 7]
    trunk, cnn, layer = S.small_cnn(7)
    h, logits = S.activations(cnn, layer, trunk(images))
    maps = F.conv2d(pixels, cnn.conv1.weight, cnn.conv1.bias, stride=2).relu()
    maps = F.conv2d(maps, cnn.conv2.weight, cnn.conv2.bias, stride=2).relu()
    assert maps.shape == (4, 32, 4, 4)
    assert_close(h, F.layer_norm(cnn.fc(maps.flatten(1)), (64,)))
    assert_close(logits, cnn.head(h))


def test_mixed_precision_is_autocast_with_logits_in_float32():
    x, layers = torch.randn(5, 6), [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
    logits = S.MixedPrecision(*layers)(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.Sequential(*layers)(x)
    assert expected.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, expected.float())


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


def test_digits_are_glyphs_turned_sheared_resized_and_shifted_with_noise():
    images, y = S.render_digits(50, seed=3)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(y, torch.randint(10, (50,), generator=generator))
    uniform = torch.rand(5, 50, generator=generator)
    noise = 0.1 * torch.randn(50, 1, 28, 28, generator=generator)
    for n in (0, 1, 2):
        canvas = Image.new("L", (56, 56))
        ImageDraw.Draw(canvas).text((28, 28), str(y[n].item()), 255, font_size=52, anchor="mm")
        u = uniform[:, n].tolist()
        angle, shear, size = 0.7 * u[0] - 0.35, 0.4 * u[1] - 0.2, 0.7 + 0.3 * u[2]
        right, down = 14 * (0.3 * u[3] - 0.15), 14 * (0.3 * u[4] - 0.15)  # in pixels
        cos, sin = math.cos(angle), math.sin(angle)
        # Pillow's affine map: from the centre of a pixel to a place on the glyph, twice as large.
        a, b, d, e = (2 * k / size for k in (cos, sin + shear, -sin, cos))
        c = 28 + 2 * right / size - 14 * (a + b)
        f = 28 + 2 * down / size - 14 * (d + e)
        map_, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        ink = np.asarray(canvas.transform((28, 28), map_, (a, b, c, d, e, f), bilinear)) / 255
        expected = 255 * np.clip(ink + noise[n, 0].numpy(), 0, 1)
        assert abs(images[n, 0].numpy() - expected).mean() < 2  # of 255; they round differently


def test_splits_have_the_sizes_of_the_paper_and_the_same_images_for_all_seeds(monkeypatch):
    splits, names = S.load_data("digits", "nowhere")
    assert [len(splits[name][1]) for name in ("train", "val", "test")] == [10_000, 2000, 2000]
    assert names == list("0123456789")
    many = torch.arange(300_000), torch.zeros(300_000).long(), ["a"]
    monkeypatch.setattr(S, "load_files", lambda *_, train: many)
    splits, _ = S.load_data("imagenet", "nowhere", limit=None)
    order = torch.randperm(300_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(splits["val"][0], order[:25_000])
    assert torch.equal(splits["train"][0], order[25_000:])


def test_mnist_files_are_read_shuffled_and_split(tmp_path):
    write_mnist(tmp_path)
    (images, y), found = S.render_digits(800), {}
    assert torch.equal(S.render_digits.__wrapped__(800)[0], images)  # the same each time
    (splits, names), (few, _) = (S.load_data("mnist", tmp_path, limit) for limit in (None, 50))
    known = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    for split, (pixels, labels) in splits.items():
        found[split] = [known[image.numpy().tobytes()] for image in pixels]
        assert torch.equal(labels, y[found[split]])  # an image keeps its label
        assert found[split] != sorted(found[split])
        assert pixels.stride() == (784, 784, 28, 1)  # others would round differently
        assert_close(few[split], (pixels[:50], labels[:50]))
    assert names[3] == "3 - three" and sorted(found["test"]) == list(range(600, 800))
    assert len(found["val"]) == 100 and sorted(found["train"] + found["val"]) == list(range(600))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    for size in (500, 0):  # damaged
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(OSError, match=f"download mnist .*delete {file.parent}, .*start again"):
            S.load_data("mnist", tmp_path)


@pytest.mark.parametrize("dataset, kind", [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_data_that_are_not_there_are_downloaded(dataset, kind, tmp_path, monkeypatch):
    download = Mock(side_effect=OSError("no route"))
    monkeypatch.setattr(torchvision.datasets, kind, download)
    with pytest.raises(OSError, match=f"download {dataset} in {tmp_path} .no route."):
        S.load_data(dataset, tmp_path)
    assert download.call_args == call(tmp_path, train=True, download=True)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with rendered digits in colour as the pickle files of CIFAR-10, 60 in each."""
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, y = S.render_digits(360)
    images = (F.pad(images, [2] * 4) * torch.tensor([1, 0.5, 0.25])[:, None, None]).byte()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, pixels, labels in zip(names, images.split(60), y.split(60), strict=True):
        content = {"data": pixels.flatten(1).numpy(), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = {"label_names": [f"name{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(classes))
    # Their md5 is another one.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *file: True)
    return folder.parent


def test_cifar_files_are_read(cifar):
    splits, names = S.load_data("cifar10", cifar)
    assert [len(splits[name][1]) for name in ("train", "val", "test")] == [270, 30, 60]
    pixels, labels, _ = S.load_files("cifar10", cifar, train=False)
    images, y = S.render_digits(360)
    assert names[3] == "name3" and torch.equal(labels, y[300:])
    for channel, part in enumerate((1, 0.5, 0.25)):
        expected = (images[300:, 0] * part).byte()
        assert torch.equal(pixels[:, channel, 2:-2, 2:-2], expected)
    (cifar / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(OSError, match="download cifar10 .*delete .*cifar-10-batches-py, "):
        S.load_data("cifar10", cifar)


def write_photos(root):
    """Photos of one colour per class and brightness per image, in train and val, of many kinds."""
    generator, kinds = np.random.default_rng(0), "a.JPEG b.png c.bmp d.jpg e.webp f.PNG".split()
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(0, 60, (40 + i, 50, 3), dtype=np.uint8)
                pixels[..., c] += np.uint8(100 + 8 * i)
                image = Image.fromarray(pixels).convert({1: "P", 3: "CMYK"}.get(i, "RGB"))
                image.save(root / split / name / f"{i:02}{kinds[i % 6]}")
    return root


def test_photos_are_found_and_decoded(tmp_path):
    write_photos(tmp_path)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no photo")
    paths, y, names = S.load_files("imagenet", tmp_path, train=True)
    assert names == ["cat", "dog"] and len(paths) == 24
    images = torch.stack([S.read_photo(path, 32) for path in paths])
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images.float().mean((2, 3)).argmax(1), y)
    # A white frame, a 16th on each side, is cut off below 384 pixels, and not from there on.
    frame = tmp_path / "frame.png"
    ImageOps.expand(Image.new("RGB", (140, 140)), 10, "white").save(frame)
    assert S.read_photo(frame, 70).max() < 60 and S.read_photo(frame, 384).max() == 255
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="deep.png .its values do not fit into 8 bits"):
        S.read_photo(tmp_path / "deep.png", 32)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(ValueError, match="need folders of the same classes"):
        S.load_data("imagenet", tmp_path)
    for split in ("train", "val"):
        (tmp_path / "one" / split / "cat").mkdir(parents=True)
        (tmp_path / "one" / split / "cat" / "a.png").write_bytes(frame.read_bytes())
    with pytest.raises(ValueError, match="one image is not enough"):
        S.load_data("imagenet", tmp_path / "one")


def test_what_is_hidden_or_no_photo_does_not_count_and_the_latter_is_said(tmp_path, capsys):
    write_photos(tmp_path)
    train = tmp_path / "train"
    for folder in (".ipynb_checkpoints", "__MACOSX", "cat/.thumbs", "dog/__MACOSX"):
        (train / folder).mkdir()
        (train / folder / "a.png").write_bytes((train / "cat" / "01b.png").read_bytes())
    (train / "cat" / ".DS_Store").write_text("")
    (train / "cat" / "._01b.png").write_text("")
    for i in range(12):
        (train / "dog" / f"{i:02}.gif").write_text("")
    paths, _, names = S.load_files("imagenet", tmp_path, train=True)
    assert names == ["cat", "dog"] and len(paths) == 24
    text = f"{train}: 12 files left out, as {train}/dog/00.gif"
    assert sorted(capsys.readouterr().err.splitlines()) == [text]
    S.load_files("imagenet", tmp_path, train=False)
    assert capsys.readouterr().err == ""


def test_photos_stand_upright_by_their_exif_data_if_these_are_whole(tmp_path, recwarn):
    pixels = np.random.default_rng(0).integers(0, 255, (384, 384, 3), dtype=np.uint8)
    turned = {  # what the file holds, for each way in which a camera can have been held
        1: pixels,
        2: pixels[:, ::-1],
        3: np.rot90(pixels, 2),
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, 1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels, -1),
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
        found = S.read_photo(tmp_path / "a.png", 384).permute(1, 2, 0).numpy()
        assert np.array_equal(found, pixels), orientation
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 20
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=damaged)
    Image.fromarray(pixels).save(tmp_path / "b.jpg")
    recwarn.clear()
    read = [S.read_photo(tmp_path / name, 64) for name in ("a.jpg", "b.jpg")]
    assert torch.equal(*read) and not recwarn.list
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "c.jpg", exif=exif)
    data = (tmp_path / "c.jpg").read_bytes()
    (tmp_path / "c.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match="cannot read the image .*c.jpg .*truncated"):
        S.read_photo(tmp_path / "c.jpg", 64)  # a part of it is not a photo


# === 9. Trunk pass ===


def small_trunk():
    torch.manual_seed(0)
    return nn.Sequential(v2.ToDtype(torch.float32, scale=True), nn.Flatten(), nn.Linear(48, 5))


def trunk_pass(images, folder, stop=math.inf, **options):
    """How many images the trunk gets, at most `stop` batches, besides the single one that tells the
    time; and the features."""
    trunk, done = small_trunk(), []

    def count(module, batch):
        if len(done) > stop:
            raise KeyboardInterrupt
        done.append(len(batch[0]))

    trunk.register_forward_pre_hook(count)
    x = S.trunk_features(trunk, images, folder, **options)
    return sum(done[1:]), x


def test_features_are_kept_and_what_changed_is_made_again(tmp_path):
    images, folder = random_images(5000, 4), tmp_path / "deep" / "features"
    with pytest.raises(KeyboardInterrupt):
        trunk_pass(images, folder, stop=40)
    seen, x = trunk_pass(images, folder, workers=2)  # what was done before the stop is kept
    assert_close(x, small_trunk()(images).detach())
    assert seen == 5000 - 2048 and trunk_pass(images, folder)[0] == 0
    file = max(folder.iterdir(), key=os.path.getsize)  # one of the two with 2048 images
    seen, rough = trunk_pass(images, folder, bfloat16=True)  # kept apart
    assert seen == 5000
    assert not torch.equal(rough, x) and torch.allclose(rough, x, rtol=0.02, atol=0.02)
    data, damaged = file.read_bytes(), bytearray(file.read_bytes())
    damaged[len(data) // 2] ^= 1
    for content in (damaged, data[:-9], b""):  # that file, and only that
        file.write_bytes(content)
        seen, again = trunk_pass(images, folder)
        assert seen == 2048 and torch.equal(again, x) and file.read_bytes() == data
    changed = images.clone()
    changed[4500] += 1
    seen, again = trunk_pass(changed, folder)
    assert seen == 5000 - 4096 and (again != x).any(1).nonzero().tolist() == [[4500]]
    for rank, part in enumerate((2048, 2048, 904, 0)):  # four processes share it
        assert trunk_pass(images, tmp_path / "shared", rank=rank, world_size=4)[0] == part
    seen, again = trunk_pass(images, tmp_path / "shared")
    assert seen == 0 and torch.equal(again, x)


def test_features_belong_to_the_content_of_photos_not_to_their_names(tmp_path):
    paths = np.array([str(tmp_path / f"{i}.bmp") for i in range(3)], dtype=object)
    images = random_images(3, 4)
    for path, image in zip(paths, images, strict=True):
        v2.functional.to_pil_image(image).save(path)
    folder = tmp_path / "features"
    seen, x = trunk_pass(paths, folder, size=4, workers=0)
    assert seen == 3
    moved = np.array([shutil.copy(path, tmp_path / f"new{path[-5:]}") for path in paths])
    os.utime(paths[1])
    for same in (paths, moved):  # touched, and copied under other names
        seen, again = trunk_pass(same, folder, size=4, workers=0)
        assert seen == 0 and torch.equal(again, x)
    v2.functional.to_pil_image(255 - images[1]).save(paths[1])  # of the same size in bytes
    seen, again = trunk_pass(paths, folder, size=4, workers=0)
    assert seen == 3 and (again != x).any(1).tolist() == [False, True, False]
    for size, expected in ((4, 3), (5, 3), (5, 0)):  # a trunk may take other sizes, too
        assert trunk_pass(images, folder, size=size)[0] == expected
    paths[1] = str(tmp_path / "gone.bmp")
    with pytest.raises(OSError, match="cannot read the image .*gone.bmp .*No such file"):
        trunk_pass(paths, folder, size=4, workers=0)


def test_photos_are_decoded_by_any_number_of_processes(tmp_path):
    paths, _, _ = S.load_files("imagenet", write_photos(tmp_path), train=True)
    batches = [range(0, 10), range(10, 20), range(20, 24)]
    expected = torch.stack([S.read_photo(path, 32) for path in paths])
    for workers in (0, 1, 2):
        decoded = [*S.photo_batches(paths, 32, batches, workers)]
        assert [len(batch) for batch in decoded] == [10, 10, 4]
        assert torch.equal(torch.cat(decoded), expected)
    Path(paths[13]).write_bytes(b"no photo")
    for workers in (0, 2):
        with pytest.raises(OSError, match=f"cannot read the image {paths[13]} .* replace it"):
            for _ in S.photo_batches(paths, 32, batches, workers):
                pass
    assert multiprocessing.active_children() == []


def test_no_process_is_started_for_tensors_and_for_features_that_are_there(tmp_path, monkeypatch):
    loader = Mock(wraps=S.DataLoader)
    monkeypatch.setattr(S, "DataLoader", loader)
    trunk_pass(random_images(5, 4), tmp_path / "features", workers=2)
    assert not loader.called
    paths, _, _ = S.load_files("imagenet", write_photos(tmp_path), train=True)
    for expected in (1, 0):
        trunk_pass(paths, tmp_path / "features", size=4, workers=2)
        assert loader.call_args.kwargs["num_workers"] == expected  # for one batch, and for none


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_a_pass_over_photos_is_stopped(stop, tmp_path):
    script = f"""
import sys, time, torch
sys.path.insert(0, {str(HERE)!r})
import saeception as S
def slow(path, size):
    print("decoding", flush=True)
    time.sleep(0.05)
    return torch.zeros(3, size, size, dtype=torch.uint8)
S.read_photo = slow
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # how often workers look for their parent
sys.exit(S.main({[*PHOTOS, "--data-dir", str(write_photos(tmp_path)), "--workers", "2"]}
                + ["--batch-size", "2"]))
"""
    (tmp_path / "script.py").write_text(script)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if pytest was started by &
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], cwd=tmp_path, start_new_session=True, **pipes
    )
    next(line for line in process.stdout if line == "decoding\n")
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # Ctrl-C reaches all processes
    else:
        os.kill(process.pid, stop)
    out, _ = process.communicate(timeout=30)  # all that have the pipe, the workers too, have ended
    if stop == signal.SIGINT:
        assert process.returncode == 130 and out.endswith("error: interrupted\n")
        assert "Traceback" not in out


def test_a_folder_that_cannot_be_written_is_found_out_before_the_first_batch(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    done = []
    trunk = small_trunk()
    trunk.register_forward_pre_hook(lambda *_: done.append(1))
    with pytest.raises(OSError, match=f"cannot write to {tmp_path}/file/features .*--cache-dir"):
        S.trunk_features(trunk, random_images(3, 4), tmp_path / "file" / "features")
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=PermissionError("denied")))
    with pytest.raises(OSError, match=f"cannot write to {tmp_path} .denied.*--cache-dir"):
        S.trunk_features(trunk, random_images(3, 4), tmp_path)  # it is there, but not ours
    assert done == []


def test_features_are_those_of_eval_mode(tmp_path):
    images, trunk = random_images(3, 4), nn.Sequential(small_trunk(), nn.Dropout())
    assert_close(S.trunk_features(trunk, images, tmp_path), small_trunk()(images).detach())


def test_progress_tells_of_one_image_and_then_of_each_batch(tmp_path):
    images, told = random_images(150, 4), []
    tell = lambda *progress: told.append(progress)  # noqa: E731
    trunk_pass(images, tmp_path, progress=tell, images_per_file=100)
    assert told[:3] == [("compared", 0, 150), ("compared", 100, 150), ("compared", 150, 150)]
    assert told[3:] == [("done", n, 150) for n in (0, 1, 64, 100, 150)]
    told.clear()
    trunk_pass(images, tmp_path, progress=tell, images_per_file=100)
    assert told == [("compared", 0, 150), ("compared", 100, 150), ("compared", 150, 150)]


def test_a_compiled_trunk_gets_batches_of_one_size_and_fails_in_one_line(tmp_path, monkeypatch):
    images, shapes = random_images(150, 4), []

    def fake(trunk):
        def compiled(pixels):
            shapes.append(tuple(pixels.shape))
            return trunk(pixels)

        return compiled

    _, x = trunk_pass(images, tmp_path)
    monkeypatch.setattr(torch, "compile", fake)
    _, again = trunk_pass(images, tmp_path, compiled=True)  # they are kept apart
    assert torch.equal(again, x) and shapes == [(64, 3, 4, 4)] * 3
    assert trunk_pass(images, tmp_path, compiled=True)[0] == 0
    monkeypatch.setattr(torch, "compile", lambda trunk: Mock(side_effect=RuntimeError("no gcc")))
    with pytest.raises(OSError, match="run the compiled trunk .no gcc.: leave --compile out"):
        trunk_pass(255 - images, tmp_path, compiled=True)


def test_parts_of_files_have_random_names_and_are_swept_after_a_day(tmp_path):
    for name, hours in ((".a.0123.part", 25), (".b.4567.part", 23)):
        (tmp_path / name).write_text("left by a kill")
        then = time.time() - 3600 * hours
        os.utime(tmp_path / name, (then, then))
    parts = []

    def write(file):
        parts.append(Path(file.name).name)
        file.write(b"content")
        if len(parts) == 1:  # meanwhile another process writes the same file
            S.write_whole(tmp_path / "x", write)

    S.write_whole(tmp_path / "x", write)
    assert len({*parts}) == 2 and all(re.match(r"\.x\..{16}\.part$", part) for part in parts)
    assert sorted(os.listdir(tmp_path)) == [".b.4567.part", "x"]
    assert (tmp_path / "x").read_bytes() == b"content"


def test_a_full_disk_leaves_old_files_whole_and_no_new_ones(tmp_path):
    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    S.write_whole(tmp_path / "old", lambda file: file.write(b"old"))
    for name in ("old", "new"):
        with pytest.raises(OSError, match="cannot write .*No space left.*make room"):
            S.write_whole(tmp_path / name, full)
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


# === 10, 11. Results and command line ===


def test_distances_are_a_picture_sorted_by_class_dark_where_they_are_small(tmp_path):
    y, z = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([[9.0], [0], [8], [1], [9]])
    S.draw_clusters(tmp_path / "c.png", {"one": z, "ten": 10 * z}, y, ["a", "b"])
    picture = np.asarray(Image.open(tmp_path / "c.png"))
    points = np.array([0.0, 1, 9, 8, 9])  # of class 0, then of class 1, as they come
    distance = abs(points[:, None] - points)
    expected = (255 * np.minimum(1, 0.75 * distance / distance.mean())).astype(int)
    for left in (90, 115):  # the scale does not matter
        panel = picture[40:45, left : left + 5].astype(int)
        assert (abs(panel - expected[..., None]) <= 1).all()
    assert picture.shape == (55, 140, 3) and (picture[:40] < 99).any()  # the titles
    y = torch.arange(25).repeat_interleave(31)  # 30 examples each of the first 20 classes
    S.draw_clusters(tmp_path / "c.png", {"": torch.rand(775, 2)}, y, [f"name{i}" for i in y])
    assert Image.open(tmp_path / "c.png").size == (90 + 620, 650)


def test_pictures_name_what_they_show(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda _, place, text, **__: texts.append(text)
    )
    names, y = [f"the class {c}" for c in range(25)], torch.arange(25).repeat(2)
    z = F.one_hot(y) * torch.arange(1.0, 51)[:, None]
    S.draw_clusters(tmp_path / "c.png", {"left": z, "right": z}, y, names)
    assert texts == ["left", "right", *(name[:12] for name in names[:20])]
    texts.clear()
    S.draw_features(tmp_path / "f.png", "the title", z, y, names, random_images(50, 8), None)
    assert texts[0] == "the title" and len(texts) == 1 + 20 * 3  # three features of 20 classes
    assert texts[1::3] == [f"the class {c}: feature {c}, mean {c + 13.5:.2f}" for c in range(20)]
    assert Image.open(tmp_path / "f.png").size == (1318, 35 + 80 * 20)


def test_pictures_show_each_class_in_its_colour_and_the_strongest_images_first(tmp_path):
    y, colours = (torch.arange(40) < 10).long(), [(226, 18, 18), (12, 150, 150)]
    z = torch.eye(2)[y] * torch.linspace(1, 2, 40)[:, None]  # feature c is that of class c
    z[39, 1] = 3  # but an image of class 0 drives feature 1 most
    images = (6 * torch.arange(40)).byte()[:, None, None, None].expand(-1, 1, 9, 9)
    S.draw_features(tmp_path / "f.png", "the title", z, y, ["a", "b"], images, 9)
    picture = Image.open(tmp_path / "f.png")
    for c, strongest in enumerate((range(39, 31, -1), (39, *range(9, 2, -1)))):
        for i, n in enumerate(strongest):
            left, top = 10 + 52 * i, 56 + 80 * c
            assert abs(np.array(picture.getpixel((left, top))) - colours[y[n]]).max() < 3
            assert picture.getpixel((left + 25, top + 25)) == (6 * n,) * 3


def row_of(seed, cycle, arm, **values):
    row = {key: 0.0 for key, *_ in S.COLUMNS} | values
    return row | {"seed": seed, "cycle": cycle, "arm": arm}


def test_table_has_columns_that_stay_apart():
    values = dict(accuracy=0.98765, silhouette=-0.1234, davies_bouldin=12.3456, h_silhouette=0.5)
    values |= dict(h_uncertainty=-0.0214, l0=-10.26, fvu=-0.0185, seconds=12.6)
    rows = [row_of(10, 3, "sae-ception", **values), row_of("mean", 1, "difference", fvu=math.nan)]
    assert (
        S.table(rows)
        == """\
seed cycle         arm accuracy silh. z   DB z silh. h    U h     L0    FVU seconds
  10     3 sae-ception   0.9877  -0.123 12.346   0.500 -0.021  -10.3 -0.018      13
mean     1  difference   0.0000   0.000  0.000   0.000  0.000    0.0    nan       0"""
    )
    assert S.table(rows[:1], heading=False) == S.table(rows).splitlines()[1]


def test_summary_is_mean_and_deviation_over_seeds_and_the_difference_seed_by_seed(recwarn):
    accuracy = {("sae-ception", 0): 0.7, ("sae-ception", 1): 0.8, ("control", 0): 0.6}
    accuracy |= {("control", 1): 0.3, ("class-mean", 1): 0.9}
    rows = [row_of(seed, 2, arm, accuracy=value) for (arm, seed), value in accuracy.items()]
    expected = [
        ("mean", "sae-ception", 0.75), ("std", "sae-ception", math.sqrt(2 * 0.05**2)),
        ("mean", "control", 0.45), ("std", "control", math.sqrt(2 * 0.15**2)),
        ("mean", "difference", 0.3), ("std", "difference", math.sqrt(2 * 0.2**2)),
    ]  # fmt: skip
    for row, (name, arm, value) in zip(S.summary(rows), expected, strict=True):
        assert (row["seed"], row["cycle"], row["arm"]) == (name, 2, arm)
        assert row["accuracy"] == pytest.approx(value) and row["fvu"] == 0
    assert S.summary(rows[:1]) == []  # one seed, nothing to compare
    (alone,) = S.summary(rows[::2])
    assert alone["arm"] == "difference" and alone["accuracy"] == pytest.approx(0.1)
    for row in rows:
        row["davies_bouldin"] = math.inf  # two classes with one centre
    assert all(math.isnan(row["davies_bouldin"]) for row in S.summary(rows)[-2:])
    assert not recwarn.list


def test_results_are_json_that_other_programs_read(tmp_path):
    rows = [{"arm": "control", "a": 0.5, "b": math.nan, "c": -math.inf, "d": 3}]
    S.save_run(tmp_path, {"device": "cpu", "lr": 0.1}, {0: {"rows": rows}, 1: {"rows": rows}})
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["rows"] == 2 * [{"arm": "control", "a": 0.5, "b": None, "c": None, "d": 3}]
    assert found["config"] == {"device": "cpu", "lr": 0.1}
    environment = dict(torch=torch.__version__, numpy=np.__version__, python=sys.version.split()[0])
    environment["threads"] = torch.get_num_threads()
    assert found["environment"].items() >= environment.items()
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["config"] == found["config"] and [*saved["states"]] == [0, 1]


@pytest.fixture
def clock(monkeypatch, capsys):
    """What perf_counter tells is in clock.now; clock.text() is what came to stderr since."""
    clock = SimpleNamespace(now=100.0, text=lambda: capsys.readouterr().err)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def reported(clock, report, steps):
    """The lines that `report` writes: by seconds since the start, at (seconds, done, total)."""
    lines = {}
    for seconds, done, total in steps:
        clock.now = 100.0 + seconds
        report(done, total)
        lines[seconds] = clock.text()
    return {seconds: line for seconds, line in lines.items() if line}


def test_progress_in_a_pipe_is_a_first_line_and_then_one_a_minute(clock):
    report = S.progress_line("title", "steps", first=10)
    steps = [(0, 0, 800), (9.9, 99, 800), (11, 110, 800), (70, 700, 800), (71.5, 715, 800)]
    lines = reported(clock, report, [*steps, (72, 720, 800), (80, 800, 800)])
    assert [*lines] == [11, 71.5, 80]
    assert lines[11].rstrip(" \n") == "title: 110/800 steps, 10 a second, 0:01:09 left"
    assert lines[80].rstrip(" \n") == "title: 800/800 steps, 10 a second, 0:00:00 left"
    assert all(line.endswith(" \n") for line in lines.values())
    (line,) = reported(clock, S.progress_line("short", "steps", first=10), [(80.5, 5, 5)]).values()
    assert line.startswith("short: 5/5 steps, 10 a second")  # the end is always told


def test_progress_on_a_terminal_is_a_line_that_is_renewed(clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = S.progress_line("title", "images", first=0.3)
    steps = [(0.2, 1, 90), (0.4, 2, 90), (0.5, 3, 90), (0.7, 4, 90), (9, 90, 90)]
    lines = reported(clock, report, steps)
    assert [*lines] == [0.4, 0.7, 9]
    assert lines[0.4] == f"{'title: 2/90 images, 5 a second, 0:00:18 left':<99}\r"
    assert lines[9].endswith("\n")


def test_what_takes_days_is_said_once_with_advice(clock):
    report = S.progress_line("title", "images", first=0.3, advice="take less")
    lines = reported(clock, report, [(1, 1, 86_000), (100, 2, 10**6), (200, 3, 10**6)])
    assert "23:53:19 left" in lines[1] and "take less" not in lines[1]
    assert "days" in lines[100] and lines[100].endswith("\ntake less\n")
    assert "days" in lines[200] and "take less" not in lines[200]


def test_steps_are_shown_with_their_stage(clock):
    seen = []
    for step in S.show_progress(range(60), "stage"):
        seen.append(step)
        clock.now += 0.5
    assert seen == [*range(60)]
    first, last = clock.text().splitlines()
    assert first.rstrip() == "stage: 20/60 steps, 2 a second, 0:00:20 left"  # after 10 s
    assert last.rstrip() == "stage: 60/60 steps, 2 a second, 0:00:00 left"


def test_advice_about_days_is_for_a_cpu(monkeypatch):
    monkeypatch.setattr(S, "progress_line", Mock())
    run_trunk = Mock(side_effect=lambda *_, progress, **__: progress("done", 1, 2))
    monkeypatch.setattr(S, "trunk_features", run_trunk)
    args, _ = S.parse_arguments("--dataset cifar10 --arch vit_tiny --tune last".split())
    for device, named in (("cpu", True), ("cuda", False)):
        args.device = device
        S.cached_splits(args, None, {"train": (X, Y)})
        advice = S.progress_line.call_args.kwargs["advice"]
        assert all((text in advice) == named for text in ("days", "vit_tiny", "--limit"))
        assert S.progress_line.call_args.args == ("trunk, train split, done", "images")


def test_progress_of_nothing_says_nothing(capsys):
    S.progress_line("title", "images", first=0)(0, 0)  # all features are there
    assert capsys.readouterr().err == ""


def test_run_end_to_end(tmp_path, run):
    write_mnist(tmp_path / "data")
    flags = ["--dataset", "mnist", "--data-dir", tmp_path / "data", "--cycles", 2, *QUICK]
    first = run(*flags)
    folder = first.folder
    assert "seed 0 cycle 2 control: SAE" in first.err and str(folder) in first.err
    arms = [line.split()[2] for line in first.out.splitlines()]
    assert arms[1:6] == ["baseline", *2 * ["sae-ception", "control"]] and len(arms) == 9
    files = {"results.json", "checkpoint.pt", "clusters.png", "features.png"}
    assert {p.name for p in folder.iterdir()} == files
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["top_k"] == 8 and results["environment"]["torch"] == torch.__version__
    for name in ("clusters.png", "features.png"):
        with Image.open(folder / name) as image:
            assert image.width > 700 and len(image.convert("RGB").getcolors(10**7)) > 10
    # Killed between the two files, the checkpoint is ahead of results.json, which has to catch up.
    (folder / "results.json").write_text("{}")
    resumed = run("--resume", folder)
    assert resumed.out == first.out and "SAE" not in resumed.err  # nothing is trained anew
    assert rows_of(folder) == results["rows"]
    run("--resume", folder, *"--precision auto --device cpu --workers 0".split())
    assert "the run has top_k = 8" in run("--resume", folder, "--top-k", 9, status=2).err
    data = (folder / "checkpoint.pt").read_bytes()
    old = {"config": results["config"], "states": {0: {"rows": [], "models": {}}}}
    torch.save(old, folder / "checkpoint.pt")  # of another version
    assert "no run in" in run("--resume", folder, status=2).err
    (folder / "checkpoint.pt").write_bytes(data[:100])
    assert "no run in" in run("--resume", folder, status=2).err


def test_the_pictures_of_a_run_are_of_its_last_networks(run, monkeypatch):
    for name in ("draw_clusters", "draw_features"):
        monkeypatch.setattr(S, name, Mock(wraps=getattr(S, name)))
    folder = run(*MLP, "--cycles", 2, "--seeds", 1, 0, "--arms", "class-mean", "control").folder
    last = {row["arm"]: row for row in rows_of(folder) if row["seed"] == 1}
    titles = {
        arm: f"{arm}, cycle {row['cycle']}: silhouette of z {row['silhouette']:.3f}"
        for arm, row in last.items()
    }
    path, codes, y, names = S.draw_clusters.call_args.args
    assert path == folder / "clusters.png" and names == list("0123456789")
    assert [*codes] == [titles[arm] for arm in ("baseline", "class-mean", "control")]
    for title, row in zip(codes, last.values(), strict=True):
        assert_close(S.silhouette_score(codes[title], y), row["silhouette"])
    path, title, z, *_ = S.draw_features.call_args.args
    assert path == folder / "features.png" and title == f"seed 1, {titles['class-mean']}"
    assert torch.equal(z, codes[titles["class-mean"]])  # of the first of --arms


def test_settings_reach_what_they_set(run, monkeypatch):
    for name in ("fit", "train_sae"):
        monkeypatch.setattr(S, name, Mock(wraps=getattr(S, name)))
    flags = """--arch mlp --limit 200 --cycles 1 --layer relu2 --top-k 7 --aux-weight 0.25
        --aux-loss cosine --sae topk --d-sae 40 --sae-k 5 --epochs 2 --sae-epochs 4 --batch-size 50
        --sae-min-steps 9 --lr 0.01 --arms class-mean --baseline-epochs 0"""
    rows = rows_of(run(*flags.split()).folder)
    assert [row["arm"] for row in rows] == ["baseline", "class-mean"]
    assert all(row["l0"] <= 5 for row in rows)
    baseline, fit = S.fit.call_args_list
    assert baseline.kwargs["epochs"] == 0 and fit.args[1] == "relu2" and fit.args[5] == 0.25
    assert fit.args[4].shape == (200, 16)
    assert fit.kwargs.items() >= dict(aux_loss="cosine", epochs=2, batch_size=50, lr=0.01).items()
    sae = S.train_sae.call_args
    assert sae.args[1:3] == (40, 5)
    assert sae.kwargs.items() >= dict(epochs=4, min_steps=9).items()


def test_the_sae_is_sparse_by_its_l1_unless_told_otherwise(run, monkeypatch):
    monkeypatch.setattr(S, "train_sae", Mock(wraps=S.train_sae))
    for flags, k, l1 in (
        ([], None, 0.1), (["--l1", 2], None, 2.0), (["--sae", "topk"], 8, 0.1),
        (["--sae", "topk", "--sae-k", 4], 4, 0.1),
    ):  # fmt: skip
        run(*MLP, "--cycles", 0, *flags)
        assert S.train_sae.call_args.args[2] == k and S.train_sae.call_args.kwargs["l1"] == l1


def test_arms_that_do_not_sharpen_take_any_top_k_on_the_command_line_too(run):
    flags = [*MLP, "--top-k", 33, "--cycles", 1]
    assert "at most --d-sae, 32" in run(*flags, status=2).err
    assert len(rows_of(run(*flags, "--arms", "control", "class-mean").folder)) == 3


def test_a_run_may_be_resumed_on_another_device(run, monkeypatch):
    folder = run(*MLP, "--cycles", 0).folder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", Mock())  # what finds out whether the device works
    args, _ = S.parse_arguments(["--resume", str(folder), "--device", "cuda"])
    assert args.device == "cuda"


def test_a_gpu_is_taken_if_there_is_one_with_bfloat16_where_the_trunk_is_frozen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", Mock())  # what finds out whether the device works
    for flags, device, precision in (
        ("--tune last", "cuda", "bfloat16"),
        ("--tune all", "cuda", "float32"),
        ("--tune all --precision bfloat16", "cuda", "bfloat16"),
        ("--tune last --device cpu", "cpu", "float32"),
    ):
        args, _ = S.parse_arguments(["--dataset", "cifar10", *flags.split()])
        assert [args.device, args.precision] == [device, precision]
        assert torch.zeros.call_args == call(1, device=device)


def test_the_papers_choices_reach_what_they_set_and_a_resumed_run_keeps_them(run, monkeypatch):
    monkeypatch.setattr(S, "fit", Mock(wraps=S.fit))
    monkeypatch.setattr(S, "saeception", Mock(wraps=S.saeception))
    choices = "--restart --optimizer sgd --precision bfloat16 --aux-loss cosine --tune all".split()
    first = run("--arch", "mlp", *QUICK, *choices, "--cycles", 1)
    for flags in ([], ["--cycles", 2]):  # as at first, and resumed
        if flags:
            run("--resume", first.folder, *flags)
        assert S.saeception.call_args.kwargs["restart"] is True
        assert S.fit.call_args.kwargs["optimizer"] == "sgd"
        assert S.fit.call_args.kwargs["aux_loss"] == "cosine"
        assert type(S.fit.call_args.args[0]) is S.MixedPrecision
    assert len(rows_of(first.folder)) == 5
    again = run("--resume", first.folder, "--optimizer", "adam", status=2)
    assert "the run has optimizer = sgd; leave this option out" in again.err
    run("--arch", "mlp", *QUICK, "--cycles", 0)
    assert S.saeception.call_args.kwargs["restart"] is False
    assert S.fit.call_args.kwargs["optimizer"] == "adam"
    assert type(S.fit.call_args.args[0]) is nn.Sequential


def test_settings_of_the_trunk_pass_reach_it(cifar, tmp_path, run, monkeypatch):
    trunk_pass = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(S, "trunk_features", trunk_pass)
    flags = ["--dataset", "cifar10", "--arch", "vit_tiny", "--data-dir", cifar, "--tune", "last"]
    flags += "--image-size 48 --batch-size 7 --workers 3 --compile --precision bfloat16".split()
    assert "interrupted" in run(*flags, status=130).err
    trunk, images, folder = trunk_pass.call_args.args
    assert images.shape == (270, 3, 32, 32) and folder == cifar / "features" / "vit_tiny"
    expected = dict(device="cpu", batch_size=7, workers=3, compiled=True, bfloat16=True, size=48)
    assert trunk_pass.call_args.kwargs.items() >= (expected | dict(rank=0, world_size=1)).items()
    monkeypatch.setenv("HOME", str(tmp_path))
    run(*flags[:8], "--cache-dir=~/cache", status=130)
    assert trunk_pass.call_args.args[2] == tmp_path / "cache" / "vit_tiny"
    expected = dict(compiled=False, bfloat16=False, size=32, batch_size=64)  # the defaults
    assert trunk_pass.call_args.kwargs.items() >= expected.items()


def test_seeds_differ_in_their_first_weights_where_no_trunk_is_cached():
    for tune in ("all", "last"):
        args, _ = S.parse_arguments(f"--dataset cifar10 --arch vit_tiny --tune {tune}".split())
        (trunk, model), (_, again), (_, other) = (S.build(args, 10, seed) for seed in (0, 0, 1))
        assert same_parameters(model, again)
        assert same_parameters(model, other) == (tune == "last")
        assert hasattr(model, "trunk") == (tune == "all")


def test_augmented_digits_are_flipped_and_shifted_by_four_pixels_at_most(run, monkeypatch):
    monkeypatch.setattr(S, "fit", Mock(wraps=S.fit))
    run("--limit", 99, "--augment", "flip-crop", *QUICK[2:], "--cycles", 0)
    augment, images = S.fit.call_args.kwargs["augment"], S.fit.call_args.args[2]
    assert images.shape == (99, 1, 28, 28)
    ramp = torch.arange(1, 29)[:, None] * 100 + torch.arange(1, 29)  # row and column of each pixel
    shifts, flips = set(), 0
    for _ in range(300):
        changed = augment(ramp[None])[0]
        assert changed.shape == (28, 28)
        row, column = changed[14, 14].item() // 100, changed[14, 14].item() % 100
        flipped = bool(changed[14, 15] < changed[14, 14])
        flips += flipped
        shifts |= {(row - 15, "row"), (29 - column - 15 if flipped else column - 15, "column")}
    assert 100 < flips < 200
    assert shifts == {(n, name) for n in range(-4, 5) for name in ("row", "column")}


def test_arms_that_share_no_seed_have_no_difference(run):
    first = run(*MLP, "--cycles", 1, "--arms", "sae-ception")
    more = run("--resume", first.folder, "--seeds", 1, "--arms", "control")
    rows = [(row["seed"], row["arm"]) for row in rows_of(first.folder)]
    assert rows == [(0, "baseline"), (0, "sae-ception"), (1, "baseline"), (1, "control")]
    assert "difference" not in more.out and "mean     0    baseline" in more.out


def test_one_validation_image_is_no_reason_to_warn(tmp_path, run, recwarn):
    data = write_photos(tmp_path / "data")
    for file in data.glob("train/*/*"):
        if int(file.name[:2]) > 5:
            file.unlink()  # 12 are left: a tenth of them is one
    done = run(*PHOTOS, "--data-dir", data, "--cycles", 1, "--workers", 0)
    rows = rows_of(done.folder)
    assert rows[0]["val_silhouette"] is None and rows[0]["silhouette"] is not None
    assert "difference" in done.out and "Warning" not in done.err
    assert not [w for w in recwarn.list if issubclass(w.category, RuntimeWarning)]


def test_paths_may_start_at_home_and_are_good_from_other_folders(tmp_path, run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    flags = "--dataset cifar10 --data-dir=~/a --cache-dir=~/b --weights=~/c --out-dir=~/d"
    args, _ = S.parse_arguments(flags.split())
    found = [args.data_dir, args.cache_dir, args.weights, args.out_dir]
    assert found == [str(tmp_path / "home" / name) for name in "abcd"]
    args, _ = S.parse_arguments("--dataset cifar10 --data-dir a --weights c".split())
    assert [args.data_dir, args.weights] == [str(tmp_path / "a"), str(tmp_path / "c")]
    for word in ("auto", "none"):
        assert S.parse_arguments(["--dataset", "cifar10", "--weights", word])[0].weights == word
    write_mnist(tmp_path / "data")
    flags = ["--dataset", "mnist", "--data-dir", "data", "--cycles", 0, *QUICK, "--out-dir=~/runs"]
    run(*flags)
    (folder,) = tmp_path.glob("home/runs/*")
    assert not (tmp_path / "~").exists()
    monkeypatch.chdir("/")
    run(f"--resume=~/runs/{folder.name}", "--cycles", 1)
    assert len(rows_of(folder)) == 3


TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("values, place", [
    ({}, (0, 1)),
    ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),  # as some launchers leave them
    ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
    (dict(zip(TORCHRUN, ("3", "4", "host", "29500"), strict=True)), (3, 4)),
    (dict(zip(TORCHRUN, ("0", "4", "host", "29500"), strict=True)), (0, 4)),
    ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: start with torchrun"),
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set"),
    (dict(zip(TORCHRUN, ("0", "2", "host", ""), strict=True)), "error: MASTER_PORT not set"),
])  # fmt: skip
def test_variables_of_torchrun_are_all_set_or_none(values, place, run, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    if isinstance(place, str):
        assert place in run(status=2).err
    else:
        assert S.place_in_torchrun() == place


@pytest.mark.parametrize("error, status, message", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA"), 1, "start a new run with a smaller --batch-size"),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "why"), 2, "why"),  # a kind of ValueError
    (FloatingPointError("diverged"), 1, "diverged"),
    (FileNotFoundError("lost"), 1, "lost"),
])  # fmt: skip
def test_foreseen_errors_are_one_line_and_an_exit_status(error, status, message, run, monkeypatch):
    monkeypatch.setattr(S, "load_data", Mock(side_effect=error))
    assert run(status=status).err.rstrip().endswith(message)


def test_small_networks_use_one_thread_unless_told_otherwise(run, monkeypatch):
    threads = Mock()
    monkeypatch.setattr(torch, "set_num_threads", threads)
    monkeypatch.setattr(S, "load_data", Mock(side_effect=KeyboardInterrupt))
    for number, called in ((None, True), ("2", False)):
        threads.reset_mock()
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if number is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", number)
        run("--arch", "mlp", status=130)
        assert threads.call_args_list == [call(1)] * called
    run("--dataset", "cifar10", "--arch", "vit_tiny", status=130)
    assert not threads.called


def test_metrics_that_are_not_defined_are_null(run):
    row = rows_of(run(*MLP, "--limit", 2, "--cycles", 0).folder)[0]
    assert row["silhouette"] is None and row["accuracy"] is not None


def test_a_finished_run_takes_more_cycles_seeds_and_arms(run):
    folder = run(*MLP, "--cycles", 1, "--arms", "control").folder
    more = ["--cycles", 2, "--seeds", 3, 0, 3, "--arms", "sae-ception", "control"]
    before = rows_of(folder)
    run("--resume", folder, *more)
    assert rows_of(folder)[:2] == before  # their seconds, too: they are not done again
    at_once = run(*MLP, *more)
    rows = untimed(rows_of(at_once.folder))
    assert [row["seed"] for row in rows] == 5 * [3] + 5 * [0]
    grown = untimed(rows_of(folder))
    assert len(grown) == len(rows) and all(row in rows for row in grown)
    # The summary of the seeds, and of the difference, seed by seed.
    ours, control = (np.array([row["accuracy"] for row in rows[i::5]]) for i in (3, 4))
    for arm, values in (("control", control), ("difference", ours - control)):
        for name, number in (("mean", values.mean()), ("std", values.std(ddof=1))):
            assert re.search(rf"^ *{name} +2 +{arm} +{number:.4f} ", at_once.out, re.M)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_with_the_same_rows(stop, tmp_path, run):
    flags = [*MLP, *"--epochs 4 --cycles 3 --seeds 1 0".split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, HERE / "saeception.py", *flags]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if pytest was started by &
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    next(line for line in process.stdout if " control " in line)  # cycle 1 of 3, seed 1 of 2
    process.send_signal(stop)
    _, err = process.communicate()
    (folder,) = tmp_path.glob("runs/*")
    assert 1 < len(rows_of(folder)) < 14
    if stop == signal.SIGINT:  # Ctrl-C
        assert process.returncode == 130 and "Traceback" not in err
        assert f"--resume {folder.relative_to(tmp_path)} goes on" in err
        assert err.endswith("error: interrupted\n")
    run("--resume", folder)
    assert untimed(rows_of(folder)) == untimed(rows_of(run(*flags).folder))


def closed_pipe():
    """What a program writes to behind whose `|` nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("stream", [closed_pipe, lambda: open("/dev/full", "w"), lambda: None])
def test_a_run_that_nobody_listens_to_goes_on_to_its_end(stream, tmp_path, run, monkeypatch):
    for names in (["stdout"], ["stderr"], ["stdout", "stderr"]):
        with monkeypatch.context() as patch:
            one = stream()  # closed from the start (None), closed later, or on a full disk
            for name in names:
                patch.setattr(sys, name, one)
            done = run(*MLP, "--cycles", 1)
        assert len(rows_of(done.folder)) == 3 and (done.folder / "features.png").exists()
        told = one is not None and names == ["stdout"]
        assert done.err.count("stdout is gone") == told


def test_a_row_is_saved_before_it_is_printed(tmp_path, run, monkeypatch):
    saved = []

    class Terminal(io.StringIO):
        def write(self, text):
            if re.match(r" +0 +\d ", text):
                (folder,) = tmp_path.glob("runs/*")
                saved.append(rows_of(folder)[-1]["arm"] == text.split()[2])

    monkeypatch.setattr(sys, "stdout", Terminal())
    run(*MLP, "--cycles", 1)
    assert saved == [True] * 3


def test_vit_on_cifar_end_to_end(cifar, tmp_path, run, monkeypatch):
    monkeypatch.setattr(S, "fit", Mock(wraps=S.fit))
    flags = ["--dataset", "cifar10", "--arch", "vit_tiny", "--data-dir", cifar, *QUICK]
    flags += ["--limit", 20, "--baseline-epochs", 1]
    whole = run(*flags, "--cycles", 1)
    assert "trunk, " not in whole.err  # --tune all is the default here
    assert [row["arm"] for row in rows_of(whole.folder)] == ["baseline", "sae-ception", "control"]
    flip_crop = S.fit.call_args.kwargs["augment"]  # the default
    assert flip_crop(random_images(1, 32)[0]).shape == (3, 32, 32)
    # A cached trunk serves other settings and seeds, but no other image size or weights.
    flags += ["--tune", "last", "--cycles", 0, "--cache-dir", tmp_path / "cache"]
    weights = tmp_path / "w.pt"
    torch.save(tiny_vit().state_dict(), weights)
    monkeypatch.setattr(S, "write_whole", Mock(wraps=S.write_whole))
    passes = {"": 3, "--top-k 9 --seeds 1 0": 0, "--image-size 48": 3, f"--weights {weights}": 3}
    for more, expected in passes.items():
        S.write_whole.reset_mock()
        run(*flags, *more.split())
        written = [call.args[0].suffix for call in S.write_whole.call_args_list]
        assert written.count(".npz") == expected, more
    assert "augment" not in S.fit.call_args.kwargs


def test_photos_end_to_end(tmp_path, run):
    data = write_photos(tmp_path / "data")
    bad = data / "val" / "cat" / "07b.png"
    good = bad.read_bytes()
    bad.write_bytes(b"not an image")
    flags = [*PHOTOS, "--cycles", 1, "--data-dir", data, "--cache-dir", tmp_path / "cache"]
    stopped = run(*flags, "--workers", 2, status=1)
    folder = stopped.folder
    assert f"error: cannot read the image {bad} (" in stopped.err
    assert f"--resume {folder} goes on" in stopped.err
    bad.write_bytes(good)

    def kept():
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("cache/*/*")}

    before = kept()
    assert len(before) == 2  # train and val, from its files
    run("--resume", folder)
    rows, after = rows_of(folder), kept()
    assert len(after) == 3 and after.items() > before.items()
    assert len(rows) == 3 and all(math.isfinite(row["silhouette"]) for row in rows)
    for file in data.glob("*/*/*"):
        os.utime(file)  # a copy or a checkout does so; the photos are the same
    run("--resume", folder)
    assert kept() == after and rows_of(folder) == rows
    data = data.rename(tmp_path / "moved")
    run("--resume", folder, "--data-dir", data)
    assert kept() == after and rows_of(folder) == rows
    next(data.glob("train/dog/*")).unlink()
    assert "are not the run's" in run("--resume", folder, status=2).err


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
@pytest.mark.parametrize("network", [PHOTOS, MLP])  # with and without a trunk pass to share
def test_two_processes_come_to_the_same_as_one(network, tmp_path, run, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*network, "--cycles", "1", "--data-dir", str(write_photos(tmp_path / "data"))]
    script = [str(HERE / "saeception.py"), *flags, "--out-dir", str(tmp_path / "two")]
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", *script])  # torchrun
    err = capfd.readouterr().err
    assert err.count("baseline: train") == 1, err  # one prints
    (both,) = (tmp_path / "two").iterdir()
    alone = run(*flags, "--cache-dir", tmp_path / "one").folder
    for row, other in zip(rows_of(both), rows_of(alone), strict=True):
        for key in ("accuracy", "silhouette", "davies_bouldin", "h_silhouette"):
            assert row[key] == pytest.approx(other[key], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("arguments, status, message", [
    ("--dataset imagenet --data-dir nosuch", 1, "photos in .*/nosuch .*train/<class>"),
    ("--dataset imagenet --tune all", 2, "--tune all keeps all images in memory"),
    ("--dataset cifar10 --arch convnextv2_atto", 2, "for cifar10 choose vit_h_14, vit_l_16"),
    ("--weights no.pt --dataset cifar10 --arch vit_tiny --data-dir {cifar}", 1, "weights .*/no.pt"),
    ("--dataset imagenet --data-dir {photos} --image-size 31", 2, "--image-size: 31 .* least 32"),
    ("--nosuch 1", 2, "--nosuch"),
    ("--cycles few", 2, "--cycles: invalid int value: 'few'"),
    ("--arch mlp --layer trunk.1 --limit 99 --baseline-epochs 0 --sae-min-steps 0", 2,
     "nothing that is trained is in or below layer 'trunk.1'"),
    ("--cycles -1", 2, "--cycles: -1 has to be at least 0"),
    ("--lr nan", 2, "--lr: nan has to be at least 0"),
    ("--aux-weight inf", 2, "--aux-weight: inf has to be"),
    ("--l1 -0.1", 2, "--l1: -0.1 has to be at least 0"),
    ("--epochs 0", 2, "--epochs: 0 has to be at least 1"),
    ("--seeds 12345678901234567890", 2, "--seeds: 12345678901234567890 has to be"),
    ("--top-k 513", 2, "--top-k and --sae-k have to be at most --d-sae, 512"),
    ("--resume {file}", 2, "no run in .*/file .*name the folder of a run"),
    ("--dataset cifar10 --arch vit_tiny --data-dir {cifar} --tune last --cache-dir {file}/x", 1,
     "cannot write to .*/file/x/vit_tiny .*--cache-dir"),
    ("--limit -1", 2, "--limit: -1 has to be at least 1"),
    ("--sae topk --sae-k 600", 2, "--sae-k have to be at most --d-sae, 512"),
    ("--sae-k 8", 2, "--sae-k is for TopK SAEs: add --sae topk"),
    ("--sae topk --l1 0", 2, "--l1 is for L1 SAEs: leave it out"),
    ("--cycles 1000", 2, "--cycles: 1000 has to be at least 0 and at most 999"),
    ("--arch mlp --layer nosuch", 2, "the layers are trunk, trunk.0, trunk.1, fc1, relu1, fc2,"),
    ("--arch mlp --layer=", 2, "the layers are trunk"),
    ("--arch mlp --lr 1e9", 1, "seed 0 cycle 0 baseline: the loss diverged in epoch"),
    ("--arch mlp --out-dir {file}", 1, "cannot write .*/file/"),
    pytest.param("--device cuda", 2, "--device cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has CUDA")),
])  # fmt: skip
def test_bad_input_gets_one_line(arguments, status, message, tmp_path, run, cifar):
    (tmp_path / "file").write_text("in the way")
    photos = write_photos(tmp_path / "photos")
    arguments = arguments.format(cifar=cifar, file=tmp_path / "file", photos=photos)
    assert re.search(message, run(*arguments.split(), status=status).err)


def help_text(*arguments):
    """What --help says, by option."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        S.main([*arguments, "--help"])
    assert stop.value.code == 0
    texts = re.split(r"^  --", out.getvalue(), flags=re.M)[1:]
    return {text.split()[0]: " ".join(text.split()) for text in texts}


def test_imagenets_own_head_needs_all_thousand_classes(tmp_path):
    for c in range(999):
        (tmp_path / "train" / f"n{c}").mkdir(parents=True)
    (tmp_path / "train" / "cat").mkdir()
    for preset in ("convnext_new_head", "convnext"):
        found = S.preset_of("imagenet", "convnextv2_atto", str(tmp_path))
        assert found is S.PRESETS[preset]
        (tmp_path / "train" / "n999").mkdir(exist_ok=True)


@pytest.mark.parametrize("arguments, defaults", [
    ("", dict(d_sae=512, l1=1.0, sae_k=16, layer="norm", epochs=2, lr=0.0005, top_k=25, cycles=3,
              aux_weight=1.0, sae_epochs=10, sae_min_steps=1000, baseline_epochs=8, batch_size=64)),
    ("--arch mlp", dict(d_sae=256, l1=0.1, layer="relu1", epochs=8, batch_size=128, lr=0.002,
                        aux_weight=0.5, sae_epochs=10, baseline_epochs=8)),
    ("--dataset mnist", dict(arch="mlp", d_sae=256, layer="relu1", baseline_epochs=8, sae_k=8)),
    ("--dataset cifar10", dict(arch="vit_h_14", d_sae=5120, image_size=384, tune="last", sae_k=32,
                               sae_epochs=5, baseline_epochs=3, epochs=3, weights="auto")),
    ("--dataset cifar10 --arch vit_tiny", dict(d_sae=512, tune="all", image_size=32, l1=0.3,
                                               augment="flip-crop", aux_weight=0.15)),
    ("--dataset imagenet", dict(arch="convnextv2_large", d_sae=6144, baseline_epochs=20, lr=0.001)),
    ("--dataset imagenet --data-dir {imagenet}", dict(baseline_epochs=0, epochs=1, lr=0.0001)),
])  # fmt: skip
def test_help_shows_every_option_with_the_default_of_its_data_set(arguments, defaults, tmp_path):
    for c in range(1000):
        (tmp_path / "train" / f"n{1440764 + c:08}").mkdir(parents=True)
    texts = help_text(*arguments.format(imagenet=tmp_path).split())
    names = {name.replace("_", "-") for name in vars(S.make_parser({}).parse_args([]))}
    assert texts.keys() == names
    for name, text in texts.items():
        assert "(default: " in text, name
    for name, value in defaults.items():
        assert f"(default: {value})" in texts[name.replace("_", "-")]


def global_names(code):
    """The global names that a piece of code and all functions within it look up."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return names


def test_the_method_works_without_what_is_below_it_and_with_torch_alone():
    namespace, method = {}, (HERE / "saeception.py").read_text().split("# === 7. ")[0]
    others = r"^(import numpy|import torchvision|from PIL|from torchvision).*\n"
    code = compile(re.sub(others, "", method, flags=re.M), "method", "exec")
    exec(code, namespace)
    *_, alone = namespace["saeception"](small_net(), "1", DATA, DATA, **OPTIONS)
    assert untimed(alone["rows"]) == untimed(final(small_net(), DATA, DATA)["rows"])
    of_classes = {"__name__", "__module__", "__qualname__"}
    assert global_names(code) <= namespace.keys() | vars(builtins).keys() | of_classes


def test_the_examples_of_the_readme(capsys):
    text, namespace = (HERE / "README.md").read_text(), {}
    first, second, *others = re.findall(r"```python\n(.*?)```", text, re.S)
    for example, arms in ((first, ["sae-ception", "control"]), (second, ["next-class", "control"])):
        exec(compile(example, "README.md", "exec"), namespace)
        rows = capsys.readouterr().out.strip().splitlines()
        assert [row.split()[2] for row in rows[-2:]] == arms
    assert not others
