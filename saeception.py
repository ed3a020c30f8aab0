# SPDX-License-Identifier: MIT-0
"""SAE-ception: a sparse autoencoder (SAE) as a training signal for a classifier, in one file.

    python saeception.py                        # rendered digits, nothing to download
    python saeception.py --dataset mnist

The output of one layer of the classifier is its activation h. One cycle:

    SAE       train a fresh sparse autoencoder on h                            sections 1 and 2
    sharpen   per class keep the k features with the largest mean, decode      section 3
    train     cross_entropy + weight * aux(h, decoded target)                  section 7
    measure   how well the features of a fresh SAE separate the classes        section 4

The control arm gets the same extra training without targets. Supervised training alone pulls
classes together: only what goes beyond the control comes from sharpening.

Method: "SAE-ception: Iteratively Using Sparse Autoencoders as a Training Signal", Mechanistic
Interpretability Workshop at NeurIPS 2025, https://openreview.net/forum?id=TtV3UF7iKq
"""

import argparse
import contextlib
import copy
import json
import math
import os
import pickle
import platform
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

# Chosen on validation rows, never on the test set (README, "How the defaults were chosen").
# fmt: off
DEFAULTS = {
    "digits": dict(cycles=3, layer="relu1", epochs=20, batch_size=128, lr=2e-3, aux_weight=0.3,
                   aux_loss="mse", top_k=25, sae="l1", d_sae=256, l1=0.1, sae_k=8, sae_epochs=30),
    "mnist": dict(cycles=3, layer="relu1", epochs=8, batch_size=128, lr=2e-3, aux_weight=1.0,
                  aux_loss="mse", top_k=25, sae="l1", d_sae=256, l1=0.1, sae_k=8, sae_epochs=10),
}
# fmt: on


def batches(n: int, batch_size: int, epochs: int, seed: int, device=None) -> list[Tensor]:
    """Shuffled index batches, epoch after epoch. The short batch at the end of each is dropped."""
    generator = torch.Generator().manual_seed(seed)
    size = min(n, batch_size)
    orders = [torch.randperm(n, generator=generator).to(device) for _ in range(epochs)]
    return [batch for order in orders for batch in order[: n // size * size].split(size)]


# === 1. Sparse autoencoder ========================================================================
# z = ReLU((h - b_dec) W_enc + b_enc)      h_hat = z W_dec + b_dec
# loss = |h - h_hat|^2 + l1 * |z|_1        rows of W_dec have unit norm


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder: ReLU (Bricken et al. 2023, "Towards Monosemanticity") or, where `k` is
    given, TopK, the k largest features of each example (Gao et al. 2024, arXiv:2406.04093).

    Names and shapes are those of SAELens: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in],
    b_dec [d_in]. Raises ValueError unless 1 <= k <= d_sae.
    """

    def __init__(self, d_in: int, d_sae: int, k: int | None = None, generator=None):
        super().__init__()
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"k = {k} is not between 1 and d_sae = {d_sae}")
        self.k = k
        directions = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.clone())  # tied at the start, free afterwards
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, h: Tensor) -> Tensor:  # (..., d_in) -> (..., d_sae)
        z = F.relu((h - self.b_dec) @ self.W_enc + self.b_enc)
        if self.k is None:
            return z
        top = z.topk(self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, top.values)

    def decode(self, z: Tensor) -> Tensor:  # (..., d_sae) -> (..., d_in)
        return z @ self.W_dec + self.b_dec

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(h)
        return self.decode(z), z


def train_sae(
    h: Tensor,  # activations [N, d_in], on any device
    d_sae: int,  # number of features
    k: int | None = None,  # active features per example: a TopK SAE. None: ReLU and L1
    l1: float = 0.1,  # weight of the L1 norm of z; a TopK SAE does without
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str | None = None,  # where the SAE trains. None: where h is
    progress: Callable = iter,  # shows the steps that it iterates over, as tqdm.tqdm does
) -> SparseAutoencoder:
    """Train a fresh SAE on activations. It comes back frozen and takes h as it is.

    Inside, h is scaled to a mean squared norm of d_in, so that one `l1` suits layers of any scale;
    in the end the scale is folded into the biases, and z is in units of h. Raises
    FloatingPointError if h is constant or the loss stops being finite.
    """
    (n, d_in), h, device = h.shape, h.detach(), device or h.device
    if torch.equal(h, h[:1].expand_as(h)):
        raise FloatingPointError("the layer is dead: its output is the same for every example")
    scale = math.sqrt(n * d_in) / torch.linalg.vector_norm(h, dtype=torch.float32).item()
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_in, d_sae, k, generator).to(device)
    sae.b_dec.data = (h.mean(0, dtype=torch.float32) * scale).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    order = batches(n, batch_size, epochs, seed, h.device)
    # As in Bricken et al., dead features are revived four times in the first half of training.
    window = max(1, len(order) // 8)
    fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
    for step, index in enumerate(progress(order), 1):
        # The last fifth of the steps takes the learning rate to zero: less noise, lower error.
        optimizer.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / len(order)))
        batch = h[index].to(device).float() * scale  # (B, d_in)
        h_hat, z = sae(batch)
        error = (h_hat - batch).square().sum(1)  # (B,)
        loss = error.mean() + (l1 * z.sum(1).mean() if k is None else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            # Without unit rows, a small z and a large W_dec would get around the L1 term.
            sae.W_dec.data = F.normalize(sae.W_dec, dim=1)
            fired |= (z > 0).any(0)
            if step % window == 0 or step == len(order):
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss of the SAE is not finite at step {step}")
                if step <= 4 * window:
                    resample(sae, optimizer, ~fired, batch, error, generator)
                fired.zero_()
    sae.b_enc.data /= scale
    sae.b_dec.data /= scale
    return sae.requires_grad_(False)


def resample(sae, optimizer, dead, batch, error, generator) -> None:
    """Point dead features (bool [d_sae]) at badly reconstructed examples (Bricken et al. 2023)."""
    n_dead = int(dead.sum())
    if n_dead == 0:
        return
    chance = error.square().cpu() + 1e-12
    chosen = torch.multinomial(chance, n_dead, replacement=True, generator=generator)
    directions = F.normalize(batch[chosen.to(batch.device)] - sae.b_dec, dim=1)  # (n_dead, d_in)
    alive_norm = sae.W_enc[:, ~dead].norm(dim=0).mean() if n_dead < len(dead) else 1.0
    sae.W_dec[dead] = directions
    sae.W_enc[:, dead] = 0.2 * alive_norm * directions.T
    sae.b_enc[dead] = 0
    for parameter, where in ((sae.W_dec, dead), (sae.W_enc, (..., dead)), (sae.b_enc, dead)):
        for moment in ("exp_avg", "exp_avg_sq"):  # Adam has to forget the dead feature
            optimizer.state[parameter][moment][where] = 0


# === 2. Hook capture ==============================================================================
# h = output of one layer of the classifier, gradient attached


@contextlib.contextmanager
def capture(layer: nn.Module) -> Iterator[SimpleNamespace]:
    """Within `with capture(layer) as seen:`, `seen.h` is the layer's last output, [B, d_in].

    Tokens [B, T, D] give the class token, maps [B, C, H, W] their mean over H and W. The gradient
    is attached: a loss on `seen.h` trains what is below. Any other output raises ValueError.
    """
    seen = SimpleNamespace(h=None)

    def hook(module, inputs, output):
        ndim = output.ndim if isinstance(output, Tensor) else 0
        if ndim not in (2, 3, 4):
            raise ValueError(f"{module}: its output is none of [B, D], [B, T, D], [B, C, H, W]")
        h = output.mean((2, 3)) if ndim == 4 else output[:, 0] if ndim == 3 else output
        seen.h = h.clone()  # a later layer that works in place must not change it

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`; ValueError with the names that exist if there is none."""
    layers = dict(model.named_modules())
    if not name or name not in layers:
        raise ValueError(f"no layer {name!r}; the layers are {', '.join(filter(None, layers))}")
    return layers[name]


@torch.no_grad()
def activations(model: nn.Module, layer: str, x: Tensor, chunk: int = 4096) -> tuple:
    """One pass in evaluation mode over x [N, ...]: h [N, d_in] and logits [N, n_classes]."""
    device = next(model.parameters()).device
    model.eval()
    with capture(find_layer(model, layer)) as seen:
        for i in range(0, len(x), chunk):
            part = model(x[i : i + chunk].to(device))
            if i == 0:
                h, logits = (t.new_empty(len(x), t.shape[1]) for t in (seen.h, part))
            h[i : i + chunk], logits[i : i + chunk] = seen.h, part
    return h, logits


# === 3. Feature sharpening ========================================================================
# mask[c] = top-k over features of mean(z | class c)      target = decode(z * mask[y])


@torch.no_grad()
def class_mean(v: Tensor, y: Tensor, n_classes: int, encode: Callable | None = None) -> Tensor:
    """Mean of v [N, D], or of encode(v), over each class; zeros for a class without examples.

    y [N] class numbers; gives [n_classes, D]. In chunks: the codes of all examples may not fit.
    """
    total, count = 0, y.bincount(minlength=n_classes)[:, None]
    for part, labels in zip(v.split(8192), y.split(8192), strict=True):
        code = encode(part) if encode else part
        total = total + F.one_hot(labels, n_classes).to(code.dtype).T @ code
    return total / count.clamp_min(1)


def class_top_k(z: Tensor, y: Tensor, n_classes: int, k: int, encode=None) -> Tensor:
    """Which features each class keeps, bool [n_classes, d_sae]: the k with the largest class mean.
    One that the class never uses is not kept, so a class without examples keeps none.

    z [N, d_sae], or what `encode` makes it from; y [N] class numbers. Raises ValueError unless
    1 <= k <= d_sae.
    """
    mean = class_mean(z, y, n_classes, encode)
    if not 1 <= k <= mean.shape[1]:
        raise ValueError(f"top-k = {k} is not between 1 and d_sae = {mean.shape[1]}")
    top = mean.topk(k, dim=1)
    return torch.zeros_like(mean, dtype=torch.bool).scatter(1, top.indices, top.values > 0)


def sharpen(z: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """z [N, d_sae] without the features that the example's class, y [N], does not keep."""
    return z * mask[y]


@torch.no_grad()
def sharpened_targets(sae, h: Tensor, y: Tensor, n_classes: int, k: int) -> Tensor:
    """The method's targets [N, d_in]: row i belongs to h[i] and y[i]. Raises like `class_top_k`."""
    mask = class_top_k(h, y, n_classes, k, sae.encode)
    targets = torch.empty_like(h)
    for i in range(0, len(h), 8192):
        part = slice(i, i + 8192)
        targets[part] = sae.decode(sharpen(sae.encode(h[part]), y[part], mask))
    return targets


# === 4. Metrics ===================================================================================
# silhouette of a point = (b - a) / max(a, b)     a, b: mean distance to its own and the next class
# Davies-Bouldin = mean over i of max over j of (spread_i + spread_j) / distance(centre_i, centre_j)


def _clusters(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked and centred x [N, D] in float64, labels as 0..C-1, and their one-hot [N, C]."""
    # Distances come from |a|^2 + |b|^2 - 2 a.b. For points close together and far from the origin
    # float32 would have no digits left. Apple's mps has no float64: there the CPU does it.
    x = torch.as_tensor(x)
    x = x.to("cpu" if x.device.type == "mps" else x.device, torch.float64, copy=True)
    x -= x.mean(0)
    classes, labels = torch.as_tensor(labels, device=x.device).unique(return_inverse=True)
    if labels.shape != x.shape[:1] or not 2 <= len(classes) <= len(x) - 1:
        raise ValueError(f"{len(x)} points need as many labels, from 2 to {len(x) - 1} different; "
                         f"here are {labels.numel()}, {len(classes)} different")  # fmt: skip
    if not x.isfinite().all():
        raise ValueError("some points are not finite")
    return x, labels, F.one_hot(labels).double()


def silhouette_score(x: Tensor, labels: Tensor, chunk: int = 512) -> float:
    """Mean silhouette (Rousseeuw 1987), Euclidean and exact: -1 to 1, high is well separated.

    x [N, D], labels [N]; memory O(chunk * N). A cluster of one point counts 0. Raises ValueError
    for fewer than 2 or more than N - 1 different labels, as the next two scores do.
    """
    x, labels, one_hot = _clusters(x, labels)
    square = x.square().sum(1)
    to_cluster = torch.zeros_like(one_hot)  # (N, C): sum of distances to the points of a cluster
    for i in range(0, len(x), chunk):
        j = min(i + chunk, len(x))
        distance = torch.addmm(square[i:], x[i:j], x[i:].T, alpha=-2).add_(square[i:j, None])
        distance.clamp_min_(0).sqrt_().fill_diagonal_(0)  # (chunk, N - i)
        to_cluster[i:j] += distance @ one_hot[i:]
        to_cluster[j:] += distance[:, j - i :].T @ one_hot[i:j]  # by symmetry: half the work
    count, own = one_hot.sum(0), labels[:, None]
    a = to_cluster.gather(1, own)[:, 0] / (count[labels] - 1).clamp_min(1)
    b = (to_cluster / count).scatter(1, own, torch.inf).amin(1)
    s = ((b - a) / torch.maximum(a, b)).nan_to_num(0)  # 0/0: all the points are one
    return s.where(count[labels] > 1, 0).mean().item()


def _centroids(x: Tensor, labels: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids [C, D], and the distance of each point to its own, [N]."""
    centroids = one_hot.T @ x / one_hot.sum(0)[:, None]
    return centroids, (x - centroids[labels]).norm(dim=1)


def davies_bouldin_score(x: Tensor, labels: Tensor) -> float:
    """Davies-Bouldin index (1979): from 0 up, low is well separated. x [N, D], labels [N]."""
    x, labels, one_hot = _clusters(x, labels)
    centroids, distance = _centroids(x, labels, one_hot)
    spread = distance @ one_hot / one_hot.sum(0)
    between = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    if spread.max() < 1e-8 or between.max() < 1e-8:  # scikit-learn's convention
        return 0.0
    ratio = (spread[:, None] + spread) / between.masked_fill(between == 0, torch.inf)
    return ratio.fill_diagonal_(0).amax(1).mean().item()


def calinski_harabasz_score(x: Tensor, labels: Tensor) -> float:
    """Variance between over variance within clusters, each per degree of freedom (Calinski and
    Harabasz 1974): from 0 up, high is well separated; 1 if nothing varies within."""
    x, labels, one_hot = _clusters(x, labels)
    centroids, distance = _centroids(x, labels, one_hot)
    (n, c), within = one_hot.shape, distance.square().sum()
    between = (one_hot.sum(0)[:, None] * centroids.square()).sum()
    if within <= 1e-24 * between:  # equal but for rounding
        return 1.0
    return (between / within * (n - c) / (c - 1)).item()


def adjusted_rand_score(a: Tensor, b: Tensor) -> float:
    """Adjusted Rand index of two labelings [N] (Hubert and Arabie 1985): 1 same, 0 by chance.
    Raises ValueError if their lengths differ or are zero."""
    a, b = (torch.as_tensor(v).cpu().unique(return_inverse=True)[1] for v in (a, b))
    if a.shape != b.shape or len(a) == 0:
        raise ValueError(f"need two labels for each point, got {len(a)} and {len(b)}")
    counts = (v.unique(return_counts=True)[1] for v in (a, b, a * (b.max() + 1) + b))
    same_a, same_b, both = (int((n * (n - 1) // 2).sum()) for n in counts)  # pairs of points
    if same_a == same_b == both:
        return 1.0
    chance = same_a * same_b / (len(a) * (len(a) - 1) // 2)
    return (both - chance) / ((same_a + same_b) / 2 - chance)


def uncertainty_coefficient(z: Tensor, labels: Tensor) -> float:
    """Theil's U = I(feature fires; class) / H(feature fires): the share of a feature's firing,
    z > 0, that the class explains. Mean over the features that fire on some but not all examples,
    0 if there is none. z [N, d_sae], labels [N]; 0 to 1."""

    def entropy(p):  # of a coin, in nats; the ratio has no unit
        return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)

    z, labels = z.cpu(), labels.cpu().unique(return_inverse=True)[1]
    p_class = labels.bincount().double() / len(labels)  # (C,)
    fires = class_mean(z, labels, len(p_class), lambda z: (z > 0).float()).double()  # (C, d_sae)
    h_fires = entropy(p_class @ fires)  # (d_sae,)
    u = 1 - p_class @ entropy(fires) / h_fires
    some = h_fires > 1e-9
    return u[some].mean().item() if some.any() else 0.0


# === 5. Models ====================================================================================
# images --trunk (frozen, run once)--> x --model (trained)--> logits


def mnist_mlp(n_classes: int = 10) -> tuple[Callable, nn.Module, str]:
    """The paper's MLP 784-16-16-10: a trunk that only scales uint8 pixels to 0..1, the model, and
    the name of the layer that the paper takes, the first hidden one after its ReLU."""
    layers = {"flatten": nn.Flatten(), "fc1": nn.Linear(784, 16), "relu1": nn.ReLU()}
    layers |= {"fc2": nn.Linear(16, 16), "relu2": nn.ReLU(), "head": nn.Linear(16, n_classes)}
    model = nn.Sequential(OrderedDict(layers))
    return lambda images: images.float() / 255, model, "relu1"


# === 6. Data ======================================================================================
# a split is a pair: uint8 images [N, C, H, W] and class numbers [N]


def render_digits(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n digits in Pillow's own font under random affine maps and noise: uint8 [n, 1, 28, 28], y."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    font, glyphs = ImageFont.load_default(size=52), torch.zeros(10, 1, 56, 56)
    for digit in range(10):
        canvas = Image.new("L", (56, 56))
        ImageDraw.Draw(canvas).text((28, 28), str(digit), fill=255, font=font, anchor="mm")
        glyphs[digit, 0] = torch.from_numpy(np.array(canvas)) / 255
    y = torch.randint(10, (n,), generator=generator)
    angle, shear, size = uniform(-0.35, 0.35), uniform(-0.2, 0.2), uniform(0.7, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid takes the inverse map: from places in the image to places on the glyph.
    rows = [cos, sin + shear, uniform(-0.15, 0.15), -sin, cos, uniform(-0.15, 0.15)]
    theta = torch.stack(rows, dim=1).view(n, 2, 3) / size[:, None, None]
    grid = F.affine_grid(theta, (n, 1, 28, 28), align_corners=False)
    ink = F.grid_sample(glyphs[y], grid, align_corners=False)
    ink += 0.1 * torch.randn(ink.shape, generator=generator)
    return (ink.clamp(0, 1) * 255).byte(), y


def load_mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's training or test files in root/MNIST/raw, downloaded if they are not there. Raises
    OSError, with what to do, if they can be neither read nor downloaded."""
    raw, part = Path(root) / "MNIST" / "raw", "train" if train else "t10k"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            data = torchvision.datasets.MNIST(str(root), train=train, download=True)
        if not 0 < len(data.targets) == len(data.data) or data.data.shape[1:] != (28, 28):
            raise ValueError(f"images {list(data.data.shape)} but {len(data.targets)} labels")
    except Exception as error:  # each kind of damage, and no network, raises a type of its own
        raise OSError(
            f"cannot read or download MNIST ({' '.join(str(error).split())[:100]}): put whole "
            f"{part}-images-idx3-ubyte and {part}-labels-idx1-ubyte into {raw}, or say with "
            "--data-dir where MNIST/raw is, or use --dataset digits, which needs no files"
        ) from error
    return data.data[:, None], data.targets


def balanced(y: Tensor, limit: int) -> Tensor:
    """Indices, in order, of `limit` examples with as equal numbers per class as there can be."""
    rank = torch.empty_like(y)  # 0 for the first example of its class, 1 for the second, ...
    for label in y.unique():
        rank[y == label] = torch.arange(int((y == label).sum()))
    return rank.argsort(stable=True)[:limit].sort().values


def load_data(dataset: str, data_dir: str | Path, limit: int | None = None) -> SimpleNamespace:
    """The splits `train`, `val` and `test`, with at most `limit` examples each, balanced over the
    classes, and the classes' `names`. `val`: a sixth of the training files, the same for all seeds.
    """
    if dataset == "digits":
        images, y = render_digits(14_000)
        train, test = (images[:12_000], y[:12_000]), (images[12_000:], y[12_000:])
    else:
        train, test = load_mnist(data_dir, train=True), load_mnist(data_dir, train=False)
    names = [str(i) for i in range(int(max(train[1].max(), test[1].max())) + 1)]
    if limit and limit <= len(names):
        raise ValueError(f"--limit {limit}: the metrics need more than one example per class")
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    val, train = ([t[i] for t in train] for i in order.tensor_split([len(order) // 6]))
    cut = [[t[balanced(split[1], limit or len(t))] for t in split] for split in (train, val, test)]
    return SimpleNamespace(train=cut[0], val=cut[1], test=cut[2], names=names)


# === 7. Training ==================================================================================
# loss = cross_entropy(logits, y) + weight * aux(h, target)
# aux = mean squared error / variance of h,  or  1 - cosine similarity


def fit(
    model: nn.Module,  # trained in place, on the device where it is
    layer: str,  # name of the layer whose output is h
    x: Tensor,  # inputs [N, ...], on any device
    y: Tensor,  # class numbers [N]
    targets: Tensor | None = None,  # constants [N, d_in]. None: the task alone
    weight: float = 0.0,  # of the auxiliary loss
    aux_loss: str = "mse",  # or "cosine", which leaves the scale of h free
    epochs: int = 1,
    batch_size: int = 64,
    lr: float = 1e-3,  # of Adam
    seed: int = 0,  # of the order of the batches
    progress: Callable = iter,  # shows the steps that it iterates over, as tqdm.tqdm does
) -> None:
    """Train, or train on, with the combined loss. The variance of h, averaged over its units, is
    taken once at the start: one `weight` then suits layers of any scale. Seeds torch's generator,
    so that dropout repeats as well. Raises FloatingPointError, with the epoch, on divergence."""
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    order = batches(len(x), batch_size, epochs, seed, x.device)
    if targets is not None:
        variance = activations(model, layer, x)[0].var(0).mean()
    model.train()
    with capture(find_layer(model, layer)) as seen:
        for step, index in enumerate(progress(order), 1):
            loss = task_loss = F.cross_entropy(model(x[index].to(device)), y[index].to(device))
            if targets is not None:
                target = targets[index].to(device)
                if aux_loss == "mse":
                    loss = loss + weight * F.mse_loss(seen.h, target) / variance
                else:
                    loss = loss + weight * (1 - F.cosine_similarity(seen.h, target)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch, rest = divmod(step * epochs, len(order))
            if rest == 0 and not task_loss < 1e6:  # dead ReLUs can hold it at 1e9 for ever
                reason = f"{task_loss:.3g} is not finite or over 1e6; lower the learning rate"
                raise FloatingPointError(f"the loss diverged in epoch {epoch}: {reason}")
    model.eval()


# === 8. Cycles ====================================================================================
# for each cycle and arm:  targets = rule(sae, h, y)      fit      h      fresh SAE      measure


def arm_rules(n_classes: int, top_k: int) -> dict[str, Callable | None]:
    """An arm is a rule (sae, h [N, d_in], y [N]) -> targets [N, d_in], or None: no targets."""
    return {
        "sae-ception": lambda sae, h, y: sharpened_targets(sae, h, y, n_classes, top_k),
        "control": None,
        "class-mean": lambda sae, h, y: class_mean(h, y, n_classes)[y],
    }


@torch.no_grad()
def measure(model, layer: str, sae, x: Tensor, y: Tensor, full: bool = True) -> dict[str, float]:
    """Accuracy of the model and separation of the SAE's features z by class; where `full`, also
    the quality of the SAE and the separation of h itself."""
    h, logits = activations(model, layer, x)
    z = torch.cat([sae.encode(part) for part in h.split(8192)])
    row = {
        "accuracy": (logits.argmax(1) == y.to(logits.device)).double().mean().item(),
        "silhouette": silhouette_score(z, y),
        "davies_bouldin": davies_bouldin_score(z, y),
    }
    if not full:
        return row
    parts = zip(h.split(8192), z.split(8192), strict=True)
    unexplained = sum((part - sae.decode(code)).square().sum().item() for part, code in parts)
    return row | {
        "calinski_harabasz": calinski_harabasz_score(z, y),
        "adjusted_rand": adjusted_rand_score(z.argmax(1), y),  # of the strongest feature
        "uncertainty": uncertainty_coefficient(z, y),
        "l0": ((z > 0).sum() / len(z)).item(),  # features that fire, per example
        "dead": 1 - (z > 0).any(0).double().mean().item(),  # share of features that never fire
        "fvu": unexplained / max(h.var(0, correction=0).sum().item() * len(h), 1e-12),
        "h_silhouette": silhouette_score(h, y),
        "h_davies_bouldin": davies_bouldin_score(h, y),
    }


def restore(model: nn.Module, state: dict, arm: str) -> tuple[nn.Module, SparseAutoencoder]:
    """The latest model and SAE of an arm, or of the "baseline", from a state of `saeception`."""
    net, weights = copy.deepcopy(model), state["saes"][arm]
    net.load_state_dict(state["models"][arm])
    sae = SparseAutoencoder(*weights["W_enc"].shape, state["k"])
    sae.load_state_dict(weights)
    return net, sae.to(next(net.parameters()).device).requires_grad_(False)


def saeception(
    model: nn.Module,  # a classifier; it is not changed
    layer: str,  # name of the layer whose output is h
    train: tuple[Tensor, Tensor],  # inputs [N, ...] and class numbers [N]
    test: tuple[Tensor, Tensor],
    d_sae: int,  # number of features of the SAEs
    k: int | None = None,  # active features per example: TopK SAEs. None: ReLU and L1
    top_k: int = 25,  # features that each class keeps
    weight: float = 1.0,  # of the auxiliary loss
    cycles: int = 3,
    arms: dict[str, Callable | None] | None = None,  # None: sae-ception and control
    val: tuple[Tensor, Tensor] | None = None,  # measured too, to choose settings by
    pretrained: bool = True,  # False: cycle 0 begins with `fit` on the task alone
    fit_options: dict | None = None,  # more arguments of `fit`
    sae_options: dict | None = None,  # more arguments of `train_sae`
    seed: int = 0,
    state: dict | None = None,  # what an earlier call yielded last, to go on from there
    progress: Callable = lambda steps, desc: steps,  # called with desc=..., as tqdm.tqdm
) -> Iterator[dict]:
    """The method. Yields a state after the baseline, which is cycle 0, and after every cycle:

    `rows`, one dict of measurements per cycle and arm; `cycle`, the last one done; `models` and
    `saes`, the latest state_dict of each arm and of the "baseline" (see `restore`). Each arm trains
    its own copy of the model on, with the same batches in the same order. Raises what `fit` and
    `train_sae` raise.
    """
    x, y = train[0], train[1].to(next(model.parameters()).device)
    if arms is None:
        rules = arm_rules(int(max(y.max(), test[1].max())) + 1, top_k)
        arms = {name: rules[name] for name in ("sae-ception", "control")}
    state = state or {"rows": [], "cycle": -1, "k": k, "models": {}, "saes": {}}
    for cycle in range(state["cycle"] + 1, cycles + 1):
        rows, models, saes = list(state["rows"]), dict(state["models"]), dict(state["saes"])
        for arm, rule in arms.items() if cycle else [("baseline", None)]:
            start, what = time.perf_counter(), f"seed {seed} cycle {cycle} {arm}"
            bars = [partial(progress, desc=f"{what}: {stage}") for stage in ("train", "SAE")]
            same = {"seed": 1000 * seed + cycle}  # in every arm
            net, targets = copy.deepcopy(model), None
            if cycle > 0:
                net, sae = restore(model, state, arm if cycle > 1 else "baseline")
                targets = rule(sae, activations(net, layer, x)[0], y) if rule else None
            try:
                if cycle > 0 or not pretrained:
                    options = (fit_options or {}) | same | {"progress": bars[0]}
                    fit(net, layer, x, y, targets, weight, **options)
                options = (sae_options or {}) | same | {"progress": bars[1]}
                sae = train_sae(activations(net, layer, x)[0], d_sae, k, **options)
            except FloatingPointError as error:
                raise FloatingPointError(f"{what}: {error}") from error
            row = {"seed": seed, "cycle": cycle, "arm": arm} | measure(net, layer, sae, *test)
            if val:
                short = measure(net, layer, sae, *val, full=False)
                row |= {f"val_{key}": value for key, value in short.items()}
            rows.append(row | {"seconds": time.perf_counter() - start})
            models[arm], saes[arm] = net.state_dict(), sae.state_dict()
        state = {"rows": rows, "cycle": cycle, "k": k, "models": models, "saes": saes}
        yield state


# === 9. Results ===================================================================================
# results.json, clusters.png, features.png and checkpoint.pt are written whole or not at all


def table(rows: list[dict], heading: bool = True) -> str:
    """The rows of a state as text."""
    head = ("seed cycle         arm  accuracy  silhouette      DB    CH   ARI     U     L0   dead"
            "    FVU  h silh.    h DB      s")  # fmt: skip
    line = ("{seed:4} {cycle:5} {arm:>11} {accuracy:9.4f} {silhouette:11.3f} {davies_bouldin:7.3f}"
            " {calinski_harabasz:5.0f} {adjusted_rand:5.3f} {uncertainty:5.3f} {l0:6.1f}"
            " {dead:6.3f} {fvu:6.3f} {h_silhouette:8.3f} {h_davies_bouldin:7.3f} {seconds:6.1f}"
            )  # fmt: skip
    return "\n".join([head] * heading + [line.format(**row) for row in rows])


def summary(rows: list[dict]) -> str:
    """Per cycle, mean and standard deviation over the seeds: of each arm, if there are several
    seeds, and of the difference sae-ception minus control, taken seed by seed."""
    keys = ["accuracy", "silhouette", "davies_bouldin", "h_silhouette", "h_davies_bouldin"]
    groups = {}  # (cycle, arm): values (n_seeds, keys)
    for row in rows:
        groups.setdefault((row["cycle"], row["arm"]), []).append([row[key] for key in keys])
    lines = {name: values for name, values in groups.items() if len(values) > 1}
    for (cycle, arm), values in groups.items():
        if arm == "sae-ception" and (cycle, "control") in groups:
            lines[cycle, "sae-ception - control"] = np.subtract(values, groups[cycle, "control"])
    text = ["cycle  " + "mean ± std over seeds".ljust(22) + "".join(k.rjust(18) for k in keys)]
    for (cycle, name), values in lines.items():
        std = np.std(values, 0, ddof=1) if len(values) > 1 else [None] * len(keys)
        pairs = zip(np.mean(values, 0), std, strict=True)
        cells = [f"{m:.4f}" if s is None else f"{m:.4f} ± {s:.4f}" for m, s in pairs]
        text.append(f"{cycle:5}  {name:22}" + "".join(cell.rjust(18) for cell in cells))
    return "\n" + "\n".join(text) + "\n" if lines else ""


def palette(n: int) -> list[str]:
    """n colours around the wheel, every other one dark, so that neighbours differ."""
    return [f"hsl({360 * i // n}, 85%, {(48, 32)[i % 2]}%)" for i in range(n)]


def draw_clusters(panels: dict[str, Tensor], y: Tensor, names: list[str]) -> Image.Image:
    """A panel per title: features z [N, d_sae] on their first two principal components, coloured
    by class y [N]; at most 5000 points, and a legend of at most 20 classes."""
    side, font, colours = 480, ImageFont.load_default(size=18), palette(len(names))
    image = Image.new("RGB", (side * len(panels), side + 80), "white")
    draw, shown = ImageDraw.Draw(image), balanced(y, 5000)
    shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))]
    for left, (title, z) in zip(range(0, image.width, side), panels.items(), strict=True):
        z = z.float().cpu()
        torch.manual_seed(0)  # pca_lowrank draws at random; the picture should not
        axes = torch.pca_lowrank(z, q=min(6, *z.shape), niter=4)[2][:, :2]
        points = (z[shown] - z.mean(0)) @ axes
        low, high = points.quantile(torch.tensor([0.002, 0.998]), dim=0)  # no single far point
        points = ((points - low) / (high - low).clamp_min(1e-9)).clamp(0, 1) * (side - 40)
        draw.text((left + 20, 10), title, fill="black", font=font)
        for (u, v), label in zip(points.tolist(), y[shown].tolist(), strict=True):
            u, v = left + 20 + u, 60 + v
            draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill=colours[label])
    for i, name in enumerate(names[:20]):
        draw.text((20 + 60 * i, side + 50), name, fill=colours[i], font=font)
    return image


def draw_features(z: Tensor, images: Tensor, y: Tensor, mean: Tensor, names: list) -> Image.Image:
    """A line for each of the first 20 classes: its three features with the largest class mean
    (mean [n_classes, d_sae]), each as the eight images [N, C, H, W] with the largest z [N, d_sae],
    framed in the colour of their own class y [N]."""
    side, font, colours = 52, ImageFont.load_default(size=15), palette(len(names))
    mean = mean[:20]
    size = 90 + 3 * (8 * side + 20), 10 + len(mean) * (side + 26)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for c, features in enumerate(mean.topk(min(3, mean.shape[1])).indices.tolist()):
        top = 5 + c * (side + 26)
        draw.text((10, top + 34), f"class {names[c]}", fill=colours[c], font=font)
        for left, feature in zip(range(90, canvas.width, 8 * side + 20), features, strict=False):
            text = f"feature {feature}, mean {mean[c, feature]:.2f}"
            draw.text((left, top), text, fill="black", font=font)
            for n, i in enumerate(z[:, feature].topk(min(8, len(z))).indices.tolist()):
                x0, y0 = left + n * side, top + 21
                draw.rectangle((x0, y0, x0 + side - 3, y0 + side - 3), fill=colours[int(y[i])])
                photo = torchvision.transforms.functional.to_pil_image(images[i]).convert("RGB")
                canvas.paste(photo.resize((side - 8, side - 8)), (x0 + 3, y0 + 3))
    return canvas


def write_whole(path: Path, write: Callable) -> None:
    """Let write(file) fill a file beside `path`, then move it there. OSError if that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write {path} ({reason}): make room, then use --resume") from error
    finally:
        part.unlink(missing_ok=True)


def save_run(folder: Path, config: dict, finished: list, seed: int, state: dict | None) -> None:
    """checkpoint.pt, from which --resume goes on, and results.json."""
    checkpoint = {"config": config, "finished": finished, "seed": seed, "state": state}
    write_whole(folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    environment = {m.__name__: str(m.__version__) for m in (torch, torchvision, np)} | {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if config["device"] == "cuda" else None,
    }
    rows = finished + (state["rows"] if state else [])
    results = {"config": config, "environment": environment, "rows": rows}
    text = json.dumps(results, indent=1, allow_nan=False)
    write_whole(folder / "results.json", lambda file: file.write(text.encode()))


def show_progress(steps: list, desc: str) -> Iterator:
    """Rate and time left on stderr; where that is no terminal, one line when it is done."""
    start = shown = time.perf_counter()
    for done, step in enumerate(steps, 1):
        yield step
        now, live = time.perf_counter(), sys.stderr.isatty()
        if done == len(steps) or (live and now - shown > 0.2):
            shown, rate = now, done / (now - start)
            text = f"{desc}: {done}/{len(steps)} steps, {rate:.0f}/s, "
            text += f"{(len(steps) - done) / rate:.0f} s left" if done < len(steps) else "done"
            end = "\n" if done == len(steps) else ""
            print(f"\r{text:<79}" if live else text, end=end, file=sys.stderr, flush=True)


# === 10. Command line =============================================================================


def parse_arguments(argv: list[str] | None) -> tuple[dict, Path | None, dict | None]:
    """The settings, and with --resume the folder of the run and its checkpoint."""

    def number(kind, low, text):  # partial(number, int, 1) is an argparse type
        with contextlib.suppress(ValueError):
            if low <= kind(text) < math.inf:
                return kind(text)
        name = {int: "whole number", float: "number"}[kind]
        raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low} up")

    def error(message):  # one line, where argparse would print its usage first
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="\n".join(["defaults:"] + [f"  {name}: {d}" for name, d in DEFAULTS.items()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error, flag, count = error, parser.add_argument, partial(number, int, 1)
    datasets = ["digits", "mnist", "cifar10", "imagenet"]
    flag("--dataset", choices=datasets, help="digits (the default) are rendered, not downloaded")
    flag("--cycles", type=partial(number, int, 0), help="rounds of SAE, sharpen, train, measure")
    flag("--data-dir", help="where data sets lie or are downloaded to (default: data)")
    flag("--out-dir", help="where each run makes its folder (default: runs)")
    flag("--layer", help="name of the layer whose output is h")
    flag("--top-k", type=count, help="features that each class keeps")
    flag("--aux-weight", type=partial(number, float, 0), help="weight of the auxiliary loss")
    flag("--aux-loss", choices=["mse", "cosine"], help="distance between h and its target")
    flag("--sae", choices=["l1", "topk"], help="what makes the SAE sparse")
    flag("--d-sae", type=partial(number, int, 2), help="number of features of the SAE")
    flag("--l1", type=partial(number, float, 0), help="weight of the L1 norm, for --sae l1")
    flag("--sae-k", type=count, help="active features per example, for --sae topk")
    flag("--epochs", type=count, help="of the classifier: for the baseline, and in every cycle")
    flag("--sae-epochs", type=count, help="of each SAE")
    flag("--batch-size", type=count, help="of the classifier")
    flag("--lr", type=partial(number, float, 1e-12), help="learning rate of the classifier")
    flag("--seeds", type=partial(number, int, 0), nargs="+", help="one run each (default: 0)")
    flag("--arms", choices=list(arm_rules(1, 1)), nargs="+", help="default: sae-ception control")
    flag("--limit", type=count, help="examples per split, balanced over the classes (default: all)")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], help="auto (the default): cuda or cpu")
    flag("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    given = {key: v for key, v in vars(parser.parse_args(argv)).items() if v is not None}

    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not getattr(torch, device).is_available():
        error(f"--device {device}: torch finds none on this machine; use --device cpu")
    dataset, folder, saved = given.get("dataset", "digits"), given.pop("resume", None), None
    config = {"data_dir": "data", "out_dir": "runs", "device": device, "dataset": dataset}
    config |= {"seeds": [0], "arms": ["sae-ception", "control"], "limit": None}
    if folder:
        try:
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            old = saved.pop("config")
            if old.keys() != config.keys() | DEFAULTS["digits"].keys():
                raise KeyError("config")
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.PickleError):
            error(f"--resume: {folder} is no run folder: it has no readable checkpoint.pt")
        for key in given.keys() - {"device", "data_dir", "out_dir"}:
            if given[key] != old[key]:
                name = "--" + key.replace("_", "-")
                error(f"--resume: {folder} was run with {name} {old[key]}; leave {name} out")
        config = old
    elif dataset in DEFAULTS:
        config |= DEFAULTS[dataset]
    else:
        error(f"--dataset {dataset} arrives next; digits and mnist are here")
    config |= given | {"device": device}
    config["seeds"] = list(dict.fromkeys(config["seeds"]))  # each once
    for key in ["top_k", "sae_k"] if config["sae"] == "topk" else ["top_k"]:
        if config[key] > config["d_sae"]:
            name = key.replace("_", "-")
            error(f"--{name} {config[key]} is over the number of features, {config['d_sae']}")
    return config, folder, saved


def run(config: dict, data: SimpleNamespace, folder: Path, saved: dict) -> None:
    """Every seed, from where `saved` stands: prints the table, fills the folder."""
    rules, device = arm_rules(len(data.names), config["top_k"]), config["device"]
    options = {
        "d_sae": config["d_sae"],
        "k": config["sae_k"] if config["sae"] == "topk" else None,
        "weight": config["aux_weight"],
        "cycles": config["cycles"],
        "arms": {arm: rules[arm] for arm in config["arms"]},
        "pretrained": False,
        "fit_options": {key: config[key] for key in ("aux_loss", "epochs", "batch_size", "lr")},
        "sae_options": {"l1": config["l1"], "epochs": config["sae_epochs"]},
        "progress": show_progress,
    }
    finished, state, seeds = saved["finished"], saved["state"], config["seeds"]
    print(table(finished + (state["rows"] if state else [])), flush=True)
    for seed in seeds[seeds.index(saved["seed"]) :]:
        torch.manual_seed(seed)
        trunk, model, _ = mnist_mlp(len(data.names))
        splits = (data.train, data.val, data.test)
        train, val, test = ((trunk(images.to(device)), y.to(device)) for images, y in splits)
        setting = (model.to(device), config["layer"], train, test)
        for now in saeception(*setting, val=val, seed=seed, state=state, **options):
            state = now
            save_run(folder, config, finished, seed, state)
            new = [row for row in state["rows"] if row["cycle"] == state["cycle"]]
            print(table(new, heading=False), flush=True)
        if seed == seeds[0]:
            draw_run(folder, *setting, data, state)
        finished, state = finished + state["rows"], None
    print(summary(finished), end="")
    print(f"results.json, clusters.png and features.png are in {folder}", file=sys.stderr)


def draw_run(folder: Path, model, layer: str, train, test, data, state: dict) -> None:
    """Both pictures: clusters of the baseline and of each arm, features of the first arm."""
    panels, arms = {}, list(state["models"])
    for arm in arms:
        net, sae = restore(model, state, arm)
        z = sae.encode(activations(net, layer, test[0])[0]).cpu()
        score = [row["silhouette"] for row in state["rows"] if row["arm"] == arm][-1]
        panels[f"{arm}: silhouette {score:.3f}"] = z
        if arm in arms[:2]:  # the baseline is drawn only where there is nothing else
            h = activations(net, layer, train[0])[0]
            mean = class_mean(h, train[1], len(data.names), sae.encode).cpu()
            features = draw_features(z, *data.test, mean, data.names)
    clusters = draw_clusters(panels, data.test[1], data.names)
    write_whole(folder / "clusters.png", lambda file: clusters.save(file, "PNG"))
    write_whole(folder / "features.png", lambda file: features.save(file, "PNG"))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a bad argument, 1 any other error, 130 interrupted."""
    folder = None
    try:
        config, folder, saved = parse_arguments(argv)
        data = load_data(config["dataset"], config["data_dir"], config["limit"])
        find_layer(mnist_mlp()[1], config["layer"])
        if saved is None:
            saved = {"finished": [], "seed": config["seeds"][0], "state": None}
            now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]  # to the millisecond: always a new one
            folder = Path(config["out_dir"]) / f"{config['dataset']}-{now}"
            folder.mkdir(parents=True)
        save_run(folder, config, **saved)  # --resume works from here on, and results.json is whole
        run(config, data, folder, saved)
        return 0
    except KeyboardInterrupt:
        hint = f"; go on with: python saeception.py --resume {folder}" if folder else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        kept = f"; what is finished is in {folder}" if folder and folder.exists() else ""
        print(f"saeception.py: error: {error}{kept}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
