# SPDX-License-Identifier: MIT-0
"""SAE-ception: a sparse autoencoder (SAE) as a training signal for a classifier, in one file.

    python saeception.py                                   # rendered digits, no download
    python saeception.py --dataset mnist                   # MLP
    python saeception.py --dataset cifar10 --cycles 3      # ViT-H/14
    python saeception.py --dataset imagenet --data-dir DIR # ConvNeXt-V2, DIR/train and DIR/val

Data flows one way, and everything after the trunk is plain tensors:

    images --trunk (frozen, run once, cached)--> x --model (trained)--> logits
                                                     |
                                                  layer --> h --SAE--> z --sharpen, decode--> target

h is the output of one layer. (With --tune all the trunk is a part of the model.) One cycle:

    SAE       a sparse autoencoder that was trained on h                       sections 1 and 2
    sharpen   per class keep the k features with the largest mean, decode      section 3
    train     cross_entropy + weight * (1 - t) * aux(h, decoded target)        section 7
    measure   how well the next cycle's SAE, on the new h, separates classes   sections 4 and 8

These sections are the method, and can be read alone; the others are networks (5), data (6), output
files (9) and the command line (10).

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
import platform
import re
import signal
import sys
import textwrap
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

# Digits and MNIST: chosen on validation rows, never on the test set (README, "Ablations").
# ViT-H and ConvNeXt-V2: k, SAE size and epochs of the paper, the rest not tuned; nor is vit_tiny.
# fmt: off
COMMON = dict(cycles=3, top_k=25, aux_loss="mse", sae="l1", weights="auto")
MLP = COMMON | dict(arch="mlp", image_size=28, tune="all", layer="relu1", batch_size=128, lr=2e-3,
                    d_sae=256, l1=0.1, sae_k=8)
CONVNEXT = COMMON | dict(arch="convnextv2_large", image_size=384, tune="last", layer="norm",
                         batch_size=64, aux_weight=0.3, d_sae=6144, l1=1.0, sae_k=32)
DEFAULTS = {
    "digits": MLP | dict(epochs=20, aux_weight=0.01, sae_epochs=30),
    "mnist": MLP | dict(epochs=8, aux_weight=1.0, sae_epochs=10),
    "cifar10": COMMON | dict(arch="vit_h_14", image_size=384, tune="last", layer="ln", epochs=3,
                             batch_size=64, lr=1e-4, aux_weight=0.3, d_sae=5120, l1=1.0, sae_k=32,
                             sae_epochs=5),
    "vit_tiny": COMMON | dict(arch="vit_tiny", image_size=32, tune="all", layer="ln", epochs=3,
                              batch_size=64, lr=1e-3, aux_weight=0.3, d_sae=512, l1=0.3, sae_k=16,
                              sae_epochs=20),
    "imagenet": CONVNEXT | dict(epochs=1, lr=1e-4, sae_epochs=1),
    # Other classes, a new head. Few photos need many epochs of an SAE: as many as make 1000 steps.
    "folders": CONVNEXT | dict(epochs=20, lr=1e-3, sae_epochs=None),
}
ARCHS = {
    "digits": ["mlp"], "mnist": ["mlp"],
    "cifar10": ["vit_h_14", "vit_l_16", "vit_b_16", "vit_b_32", "vit_tiny"],
    "imagenet": [f"convnextv2_{size}" for size in
                 ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")],
}
# fmt: on


# === Batches and rows =============================================================================


def batches(n: int, batch_size: int, epochs: int, seed: int) -> list[Tensor]:
    """Shuffled index batches, epoch after epoch. The short batch at the end of each is dropped.
    ValueError if n is 0."""
    if n == 0:
        raise ValueError("no rows to train on")
    generator = torch.Generator().manual_seed(seed)
    size = min(n, batch_size)
    orders = [torch.randperm(n, generator=generator) for _ in range(epochs)]
    return [batch for order in orders for batch in order[: n // size * size].split(size)]


# ImageNet's activations are 8 GB in float32, and the targets are as large. Through `take` and
# `LazyRows` all stages read them in batches, and keep them only where they are small.


def take(x: "Tensor | LazyRows", index, device) -> Tensor:
    """x[index] on `device`, whose memory may be too small for x; any floats become float32."""
    rows = x[index].to(device)
    return rows.float() if rows.is_floating_point() else rows


class LazyRows:
    """n rows that `read(index)` computes when they are asked for, where memory is too small. An
    index is a slice or a tensor of row numbers."""

    def __init__(self, n: int, read: Callable):
        self.n, self.read = n, read

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index) -> Tensor:
        return self.read(index)

    def in_memory(self, max_bytes: int = 2**29) -> "Tensor | LazyRows":
        """All rows as one tensor where that takes at most `max_bytes`, else self."""
        if self.n * self[:1].nbytes > max_bytes:
            return self
        return torch.cat([self[i : i + 512] for i in range(0, self.n, 512)])


# === 1. Sparse autoencoder ========================================================================
# z = ReLU((h - b_dec) W_enc + b_enc)      h_hat = z W_dec + b_dec
# loss = |h - h_hat|^2 + l1 * |z|_1        rows of W_dec have unit norm


class SparseAutoencoder(nn.Module):
    """Sparse autoencoder: ReLU (Bricken et al. 2023, "Towards Monosemanticity") or, where `k` is
    given, TopK, the k largest features of each example (Gao et al. 2024, arXiv:2406.04093).

    sae(h) gives (h_hat, z). Names and shapes are those of SAELens: W_enc [d_in, d_sae],
    b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; `generator` draws the directions to start
    with. Raises ValueError unless 1 <= k <= d_sae.
    """

    def __init__(self, d_in: int, d_sae: int, k: int | None = None, generator=None):
        super().__init__()
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"k = {k} is not between 1 and d_sae = {d_sae}")
        self.k = k
        directions = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.contiguous())  # tied at the start, free afterwards
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, h: Tensor) -> Tensor:  # (..., d_in) -> (..., d_sae)
        # b_dec gets no gradient here: b_enc can learn the same, and a large product is saved.
        z = F.relu((h - self.b_dec.detach()) @ self.W_enc + self.b_enc)
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
    h: "Tensor | LazyRows",  # activations [N, d_in], on any device
    d_sae: int,  # number of features
    k: int | None = None,  # active features per example: a TopK SAE. None: ReLU and L1
    l1: float = 0.1,  # weight of the L1 norm of z; a TopK SAE does without
    epochs: int = 10,
    batch_size: int = 256,
    lr: float | None = None,  # None: 0.003 for 256 features, less for more (Gao et al. 2024)
    seed: int = 0,
    device: torch.device | str | None = None,  # where the SAE trains. None: where h is
    bfloat16: bool = False,  # products in bfloat16, as good and, on many machines, much faster
    progress: Callable = iter,  # shows the steps that it iterates over, as tqdm.tqdm does
) -> SparseAutoencoder:
    """Train a fresh SAE on activations. It comes back frozen and takes h as it is.

    Inside, h is scaled to a mean squared norm of d_in, so that one `l1` suits layers of any scale;
    in the end the scale is folded into the biases, and z is in units of h. (From an h whose mean is
    many times its spread, take the mean away first: the scale is that of both.) Raises
    FloatingPointError if h is constant or the loss stops being finite.
    """
    n, device = len(h), device or h[:1].device
    lr = 0.003 * math.sqrt(256 / d_sae) if lr is None else lr
    some = take(h, batches(n, 4096, 1, seed)[0], device)  # enough to know mean and scale by
    if (some == some[0]).all():
        raise FloatingPointError("the layer is dead: one output for all examples; lower --lr")
    scale = 1 / some.square().mean().sqrt().item()
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(some.shape[1], d_sae, k, generator).to(device)
    sae.b_dec.data = some.mean(0) * scale
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    order = batches(n, batch_size, epochs, seed)
    # As in Bricken et al., dead features are revived four times in the first half of training.
    window = max(1, len(order) // 8)
    usage = torch.zeros(d_sae, device=device)
    for step, index in enumerate(progress(order), 1):
        # The last fifth of the steps takes the learning rate to zero: less noise, lower error.
        optimizer.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / len(order)))
        batch = take(h, index, device) * scale  # (B, d_in)
        # Under an autocast of the caller's, its cache would keep the weights of the first step.
        with torch.autocast(batch.device.type, torch.bfloat16, bfloat16, cache_enabled=False):
            h_hat, z = sae(batch)
        error = (h_hat - batch).square().sum(1)  # (B,)
        used = z.sum(0)  # (d_sae,); as z >= 0, their sum is the L1 norm of the whole batch
        loss = error.mean()
        if k is None:
            loss = loss + l1 * used.sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            # Without unit rows, a small z and a large W_dec would get around the L1 term.
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            usage += used
            if step % window == 0 or step == len(order):
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss of the SAE is not finite in step {step}")
                if step <= 4 * window:
                    resample(sae, optimizer, usage == 0, batch, error, generator)
                usage.zero_()
    sae.b_enc.data /= scale
    sae.b_dec.data /= scale
    return sae.requires_grad_(False)


@torch.no_grad()
def resample(sae, optimizer, dead, batch, error, generator) -> None:
    """Point dead features (bool [d_sae]) at badly reconstructed examples of a batch [B, d_in], one
    being chosen in proportion to the square of its squared error [B] (Bricken et al. 2023)."""
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
            kind = type(module).__name__
            raise ValueError(f"the output of {kind} is none of [B, D], [B, T, D], [B, C, H, W]")
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
def activations(model: nn.Module, layer: str, x: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """h [N, d_in] and logits [N, n_classes] of x, in chunks. Leaves the model in eval mode."""
    device, parts = next(model.parameters()).device, []
    model.eval()
    with capture(find_layer(model, layer)) as seen:
        for part in x.split(chunk):
            logits = model(take(part, ..., device))
            if seen.h is None:
                raise ValueError(f"the model has a layer {layer!r} but does not call it")
            parts.append((seen.h, logits))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def layer_output(model: nn.Module, layer: str, x: Tensor) -> Tensor | LazyRows:
    """h for every row of x: a tensor, or, where it is large, computed again whenever it is read."""
    return LazyRows(len(x), lambda index: activations(model, layer, x[index])[0]).in_memory()


# === 3. Feature sharpening ========================================================================
# mask[c] = top-k over features of mean(z | class c)      target = decode(z * mask[y])


@torch.no_grad()
def class_mean(v: Tensor, y: Tensor, n_classes: int, transform: Callable | None = None) -> Tensor:
    """Mean of v [N, D], or of transform(v), over each class; zeros for a class without examples.

    y [N] class numbers; gives [n_classes, D]. In chunks: the codes of all examples may not fit.
    ValueError if v and y differ in length.
    """
    if len(v) != len(y):
        raise ValueError(f"{len(v)} rows but {len(y)} classes of rows")
    total, count = 0, y.bincount(minlength=n_classes)[:, None]
    for i in range(0, len(v), 2048):
        part, labels = v[i : i + 2048], y[i : i + 2048]
        part = transform(part) if transform else part
        total = total + F.one_hot(labels, n_classes).to(part.dtype).T @ part
    return total / count.clamp_min(1)


def class_top_k(z: Tensor, y: Tensor, n_classes: int, k: int, encode=None) -> Tensor:
    """Which features each class keeps, bool [n_classes, d_sae]: the k with the largest class mean.
    One that the class never uses is not kept, so a class without examples keeps none.

    z [N, d_sae], or what `encode` makes it from; y [N] class numbers; k features per class, which
    has nothing to do with the k of a TopK SAE. Raises ValueError unless 1 <= k <= d_sae.
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
def sharpened_targets(sae, h: Tensor, y: Tensor, n_classes: int, k: int) -> Tensor | LazyRows:
    """The method's targets [N, d_in]: row i belongs to h[i] and y[i]. Raises like `class_top_k`."""
    mask = class_top_k(h, y, n_classes, k, sae.encode)  # z of all examples may not fit into memory
    return LazyRows(len(h), lambda i: sae.decode(sharpen(sae.encode(h[i]), y[i], mask))).in_memory()


# === 4. Metrics ===================================================================================
# silhouette of a point = (b - a) / max(a, b)     a, b: mean distance to its own and the next class
# Davies-Bouldin = mean over i of max over j of (spread_i + spread_j) / distance(centre_i, centre_j)
# U of a feature = I(fires; class) / H(fires) = 1 - H(fires | class) / H(fires)


def _clusters(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points x [N, D], checked, as float32 or float64; labels as 0..C-1 [N]; cluster sizes [C]."""
    x = torch.as_tensor(x)
    x = x if x.dtype == torch.float64 else x.float()
    x = x.cpu() if x.device.type == "mps" else x  # Apple's mps has no float64
    labels = torch.as_tensor(labels, device=x.device)
    _, labels, count = labels.unique(return_inverse=True, return_counts=True)
    if x.ndim != 2 or labels.shape != x.shape[:1] or not 2 <= len(count) <= len(x) - 1:
        raise ValueError(f"[N, D] points need as many labels, from 2 to N - 1 different; here are "
                         f"{list(x.shape)}, {len(labels)}, {len(count)} different")  # fmt: skip
    if not all(extreme.isfinite() for extreme in x.aminmax()):
        raise ValueError("some points are not finite")
    return x, labels, count


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j| [n, m] of points a [n, D] and b [m, D], to a relative 1e-4 or better down to 1e-7
    of the largest norm; 0 between equal points."""
    centre = b.mean(0)
    p, q = a - centre, b - centre
    pp, qq = p.norm(dim=1, keepdim=True).square(), q.norm(dim=1).square()
    square = torch.addmm(qq, p, q.T, alpha=-2).add_(pp)
    if a.dtype == torch.float64:  # between equal points only rounding is left
        return square.where(square > 4e-15 * (pp + qq), 0).sqrt_()
    # |p|^2 + |q|^2 - 2 p.q has no digits left in float32 for points that are closer to each other
    # than to the centre, nor where products are TF32 or bfloat16, as some pairs show that are
    # computed without one: there it takes float64.
    if a is b:
        square.fill_diagonal_(torch.inf)
    far = square.amin(1, keepdim=True) > 1e-3 * (pp + qq.max())  # not so for 0, inf and nan
    shift = int(a is b)
    some = square.diagonal(-shift)
    direct = (p[shift : shift + len(some)] - q[: len(some)]).norm(dim=1).square()
    exact = (some - direct).abs() <= 2e-6 * (pp.max() + qq.max())
    if not (far.all() and exact.all()):
        return _distances(a.double(), b.double())
    return (square.fill_diagonal_(0) if a is b else square).sqrt_()


def silhouette_score(x: Tensor, labels: Tensor, chunk: int = 1024) -> float:
    """Mean silhouette (Rousseeuw 1987), Euclidean and exact: -1 to 1, high is well separated.

    x [N, D], labels [N]; memory O(chunk * D + N * C). A cluster of one point counts 0. Raises
    ValueError for fewer than 2 or more than N - 1 different labels, as the next two scores do.
    """
    x, labels, count = _clusters(x, labels)
    sums = count.new_zeros(len(x), len(count), dtype=torch.float64)  # of distances to each cluster
    for i in range(0, len(x), chunk):
        at, a = slice(i, i + chunk), x[i : i + chunk]
        for j in range(i, len(x), chunk):
            to, b = slice(j, j + chunk), a if i == j else x[j : j + chunk]
            distance = _distances(a, b)
            sums[at] += distance @ F.one_hot(labels[to], len(count)).to(distance.dtype)
            if i != j:  # by symmetry, half the work
                sums[to] += distance.T @ F.one_hot(labels[at], len(count)).to(distance.dtype)
    own = labels[:, None]
    a = sums.gather(1, own)[:, 0] / (count[labels] - 1).clamp_min(1)
    b = sums.div_(count).scatter_(1, own, torch.inf).amin(1)
    s = ((b - a) / torch.maximum(a, b)).nan_to_num(0)  # 0/0: all the points are one
    return s.where(count[labels] > 1, 0).mean().item()


def _centroids(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Centroids [C, D]; each point's distance to its own [N]; labels [N]; cluster sizes [C]."""
    x, labels, count = _clusters(x, labels)
    centroids = class_mean(x, labels, len(count), Tensor.double)
    parts = zip(x.split(2048), labels.split(2048), strict=True)
    distance = [(part - centroids[own]).norm(dim=1) for part, own in parts]
    return centroids, torch.cat(distance), labels, count


def davies_bouldin_score(x: Tensor, labels: Tensor) -> float:
    """Davies-Bouldin index (1979): from 0 up, low is well separated. x [N, D], labels [N]. Where no
    spread, or no distance between centroids, is over 1e-8 it is 0, as in scikit-learn."""
    centroids, distance, labels, count = _centroids(x, labels)
    spread = labels.bincount(weights=distance) / count
    between = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    if spread.max() < 1e-8 or between.max() < 1e-8:
        return 0.0
    ratio = (spread[:, None] + spread) / between.masked_fill(between == 0, torch.inf)
    return ratio.amax(1).mean().item()


def calinski_harabasz_score(x: Tensor, labels: Tensor) -> float:
    """Variance between over variance within clusters, each per degree of freedom (Calinski and
    Harabasz 1974): from 0 up, high is well separated; 1 if nothing varies within."""
    centroids, distance, labels, count = _centroids(x, labels)
    n, c, within = len(labels), len(count), distance.square().sum()
    mean = count.double() @ centroids / n
    between = (count[:, None] * (centroids - mean).square()).sum()
    if within <= 1e-24 * (between + n * mean.square().sum()):  # equal but for rounding
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
        return torch.special.entr(p) + torch.special.entr(1 - p)

    z, labels = torch.as_tensor(z).cpu(), torch.as_tensor(labels).cpu()
    labels = labels.unique(return_inverse=True)[1]
    p_class = labels.bincount().double() / len(labels)  # (C,)
    p_fires = class_mean(z, labels, len(p_class), lambda z: (z > 0).double())  # (C, d_sae)
    total = entropy(p_class @ p_fires)  # (d_sae,)
    u = 1 - p_class @ entropy(p_fires) / total
    some = total > 1e-9
    return u[some].mean().item() if some.any() else 0.0


# === 5. Models ====================================================================================
# images --trunk (frozen, run once)--> x --model (trained)--> logits
# Each builder gives the trunk, the model and the name of the layer that the paper takes.


class Pixels(nn.Module):
    """uint8 images [B, C, H, W] to floats: 0..1, resized to size x size, minus mean, over std."""

    def __init__(self, size: int | None = None, mean=(0.0,), std=(1.0,)):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if self.size and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic").clamp(0, 1)
        return (x - self.mean) / self.std


IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def mnist_mlp(n_classes: int = 10) -> tuple[nn.Module, nn.Module, str]:
    """The paper's MLP 784-16-16-10; its layer is the first hidden one, after the ReLU."""
    layers = {"fc1": nn.Linear(784, 16), "relu1": nn.ReLU(), "fc2": nn.Linear(16, 16)}
    layers |= {"relu2": nn.ReLU(), "head": nn.Linear(16, n_classes)}
    return nn.Sequential(Pixels(), nn.Flatten()), nn.Sequential(OrderedDict(layers)), "relu1"


class ViTTrunk(nn.Module):
    """torchvision's VisionTransformer up to the class token behind the last block's attention.

    Nothing behind that point mixes tokens: the last MLP, LayerNorm and head act on one vector.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        *blocks, last = vit.encoder.layers
        self.conv_proj, self.class_token = vit.conv_proj, vit.class_token
        self.pos_embedding, self.blocks = vit.encoder.pos_embedding, nn.Sequential(*blocks)
        self.last_ln, self.last_attention = last.ln_1, last.self_attention

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, D)
        x = self.conv_proj(x).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        x = self.blocks(x)  # (B, T, D)
        y = self.last_ln(x)
        return x[:, 0] + self.last_attention(y[:, :1], y, y, need_weights=False)[0][:, 0]


class ResidualMLP(nn.Module):
    """x + MLP(LayerNorm(x)), the second half of a transformer block."""

    def __init__(self, ln_2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.ln_2, self.mlp = ln_2, mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


def cifar10_vit(
    arch: str = "vit_h_14",  # or vit_l_16, vit_b_16, vit_b_32, or vit_tiny: 4 blocks, 128 wide
    image_size: int = 384,  # rounded down to whole patches, 378 for vit_h_14
    n_classes: int = 10,
    weights: str = "auto",  # torchvision's (SWAG E2E where there are any), "none", or a path
) -> tuple[nn.Module, nn.Module, str]:
    """A ViT (Dosovitskiy et al. 2021) with a new head, split so that model(trunk(images)) is the
    whole network; its layer is the final LayerNorm. Raises what `load_weights` raises."""
    patch = 4 if arch == "vit_tiny" else int(arch[-2:])
    size = image_size // patch * patch
    if size == 0:
        raise ValueError(f"--image-size {image_size} is less than a patch of {arch}, {patch}")
    weights = "none" if (arch, weights) == ("vit_tiny", "auto") else weights
    # On "meta", where weights will be loaded: no time is lost on random ones.
    with contextlib.nullcontext() if weights == "none" else torch.device("meta"):
        if arch == "vit_tiny":
            shape = {"num_layers": 4, "num_heads": 4, "hidden_dim": 128, "mlp_dim": 512}
            vit = VisionTransformer(size, patch, **shape, num_classes=n_classes)
        else:
            vit = torchvision.models.get_model(arch, image_size=size)
    vit.heads = nn.Identity()
    if weights != "none":
        kind = "IMAGENET1K_V1" if arch == "vit_b_32" else "IMAGENET1K_SWAG_E2E_V1"
        url = "" if arch == "vit_tiny" else torchvision.models.get_model_weights(arch)[kind].url

        def translate(state):  # without its head, for this image size
            state = {key: value for key, value in state.items() if not key.startswith("heads.")}
            if "encoder.pos_embedding" in state:
                state = interpolate_embeddings(size, patch, state)
            return state

        load_weights(vit, weights, url, translate)
    last, head = vit.encoder.layers[-1], nn.Linear(vit.hidden_dim, n_classes)
    nn.init.zeros_(head.weight)  # all classes are equal at the start
    nn.init.zeros_(head.bias)
    layers = {"mlp": ResidualMLP(last.ln_2, last.mlp), "ln": vit.encoder.ln, "head": head}
    trunk = nn.Sequential(Pixels(size, **IMAGENET_PIXELS), ViTTrunk(vit))
    return trunk, nn.Sequential(OrderedDict(layers)), "ln"


class GRN(nn.Module):
    """Global response normalization (Woo et al. 2023, arXiv:2301.00808), channels last."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        return x + self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta


class ConvNeXtV2Block(nn.Module):
    """torchvision's ConvNeXt block with GRN behind the GELU and without layer scale."""

    def __init__(self, dim: int, *layer_scale_and_stochastic_depth):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.grn = nn.Linear(dim, 4 * dim), GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(self.grn(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)


def imagenet_convnext(
    arch: str = "convnextv2_large",  # atto, femto, pico, nano, tiny, base, large, huge
    n_classes: int | None = None,  # None: keep the checkpoint's own head, ImageNet's 1000 classes
    weights: str = "auto",  # the official ones (licence CC-BY-NC), "none", or a path to them
) -> tuple[nn.Module, nn.Module, str]:
    """ConvNeXt V2 (Woo et al. 2023): the trunk ends with the pooling, the model is LayerNorm and
    linear, its layer the LayerNorm. Raises what `load_weights` raises."""
    width, depth = {
        "atto": (40, 6), "femto": (48, 6), "pico": (64, 6), "nano": (80, 8), "tiny": (96, 9),
        "base": (128, 27), "large": (192, 27), "huge": (352, 27),
    }[arch.removeprefix("convnextv2_")]  # fmt: skip
    n_blocks = (3, 3, depth, 3) if depth % 9 == 0 else (2, 2, depth, 2)
    dims = [width, 2 * width, 4 * width, 8 * width, None]
    stages = [CNBlockConfig(dims[i], dims[i + 1], n_blocks[i]) for i in range(4)]
    with contextlib.nullcontext() if weights == "none" else torch.device("meta"):
        net = ConvNeXt(stages, block=ConvNeXtV2Block, num_classes=1000)
    head = net.classifier[2]
    if n_classes:
        net.classifier[2], head = nn.Identity(), nn.Linear(dims[3], n_classes)
    if weights != "none":
        kind = f"im1k/{arch}_1k_224_ema" if depth == 6 else f"im22k/{arch}_22k_384_ema"
        url = f"https://dl.fbaipublicfiles.com/convnext/convnextv2/{kind}.pt"

        def translate(state):  # with or without its head
            return {torchvision_name(key): v for key, v in state.items()
                    if not (n_classes and key.startswith("head."))}  # fmt: skip

        load_weights(net, weights, url, translate)
    net = net.to(memory_format=torch.channels_last)
    norm = nn.LayerNorm(dims[3], eps=1e-6)  # torchvision's, which wants maps, on vectors
    norm.load_state_dict(net.classifier[0].state_dict())
    trunk = nn.Sequential(Pixels(**IMAGENET_PIXELS), net.features, net.avgpool, nn.Flatten())
    return trunk, nn.Sequential(OrderedDict(norm=norm, head=head)), "norm"


def torchvision_name(name: str) -> str:
    """An entry of an official ConvNeXt-V2 checkpoint as torchvision's ConvNeXt calls it."""
    name = re.sub(r"^downsample_layers\.(\d)", lambda m: f"features.{2 * int(m[1])}", name)
    name = re.sub(r"^stages\.(\d)", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    return re.sub("^norm", "classifier.0", re.sub("^head", "classifier.2", name))


def load_weights(net: nn.Module, weights: str, url: str, translate: Callable) -> None:
    """Fill `net` from the file `weights`, or, for "auto", from the one at `url`, which torch.hub
    keeps. `translate` makes a state dict of `net` from the file's. Raises OSError if it cannot be
    downloaded, ValueError, with the first key or shape that does not fit, if it cannot be used."""
    path = Path(weights)
    try:
        if weights == "auto":
            path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = re.search(r"-([0-9a-f]{8})\.", path.name)  # torchvision's names have one
                live = sys.stderr.isatty()
                torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=live)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot download {url} ({error}): put the file at {path}, or name it with "
                      "--weights PATH; --weights none does without") from error  # fmt: skip
    try:
        # Memory-mapped: a cached trunk pass needs a few layers of the 2.5 GB of a ViT-H only.
        state = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        net.load_state_dict(translate(state.get("model", state)), assign=True)
        net.float()
    except FileNotFoundError as error:
        raise ValueError(f"--weights {weights}: there is no such file") from error
    except Exception as error:  # each kind of damage raises a type of its own
        kinds = "Missing key|Unexpected key|size mismatch"
        found = re.search(rf'({kinds}).*?(?=, "|$)', str(error), re.M)
        reason = found[0] if found else f"no state dict can be read ({type(error).__name__})"
        reason += "; remove it, and it is downloaded again" if weights == "auto" else ""
        raise ValueError(f"{path} is no checkpoint of this network: {reason}") from error


# === 6. Data ======================================================================================
# a split is a pair: uint8 images [N, C, H, W], or paths [N] of photos, and class numbers [N]


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


def decode_photo(path: bytes, size: int) -> np.ndarray:
    """An image file as RGB, uint8 [size, size, 3]; OSError names a bad one. As for the official
    ConvNeXt-V2 checkpoints: below 384 pixels the middle 7/8 of the shorter side is taken, from
    there on the whole image is warped; no EXIF orientation is applied."""
    try:
        with Image.open(os.fsdecode(path)) as file:
            if file.mode[0] in "IF":
                raise ValueError("its values do not fit into 8 bits")
            image = file.convert("RGB")
    except Exception as error:  # each kind of damage raises a type of its own
        name, reason = os.fsdecode(path), textwrap.shorten(str(error), 60)
        raise OSError(f"cannot read the image {name} ({reason}): mend or remove it") from error
    if size < 384:
        return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, bleed=1 / 16))
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def decoded(images: Tensor | np.ndarray, size: int = 384) -> Tensor:
    """uint8 [B, C, H, W]: of photos, which are kept as paths, decoded; what is pixels stays so."""
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(np.stack([decode_photo(p, size) for p in images])).permute(0, 3, 1, 2)


def fingerprint(images: Tensor | np.ndarray, y: Tensor) -> int:
    """Checksum of a split: class numbers and pixels, or the files' names, sizes and times."""
    checksum = zlib.crc32(y.numpy())
    if isinstance(images, Tensor):
        return zlib.crc32(images.numpy(), checksum)
    for path in images:
        name, status = os.path.basename(path), os.stat(path)
        about = b"%s %d %d" % (name, status.st_size, status.st_mtime_ns)
        checksum = zlib.crc32(about, checksum)
    return checksum


def load_torchvision(dataset: str, root: str | Path, train: bool) -> tuple[Tensor, Tensor, list]:
    """MNIST or CIFAR-10 as torchvision lays it out below root, downloaded if it is not there:
    images, class numbers and class names. OSError, with what to do, if neither is possible."""
    kind = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10}[dataset]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            data = kind(str(root), train=train, download=True)
        images, y = torch.as_tensor(data.data), torch.as_tensor(data.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        shape = (1, 28, 28) if dataset == "mnist" else (3, 32, 32)
        if not 0 < len(y) == len(images) or images.shape[1:] != shape:
            there, wanted = list(images.shape), [len(y), *shape]
            raise ValueError(f"{len(y)} labels and images {there}, not {wanted}")
    except Exception as error:  # each kind of damage, and no network, raises a type of its own
        part, reason = "train" if train else "t10k", textwrap.shorten(str(error), 100)
        files = f"cifar-10-python.tar.gz into {root}"
        if dataset == "mnist":
            files = f"{part}-images-idx3-ubyte and {part}-labels-idx1-ubyte into {root}/MNIST/raw"
        raise OSError(f"cannot read or download {dataset} ({reason}): put whole {files}, or give "
                      "their place with --data-dir, or use --dataset digits, which needs no files"
                      ) from error  # fmt: skip
    names = data.classes if dataset == "cifar10" else map(str, range(max(10, int(y.max()) + 1)))
    return images, y, list(names)


def load_folders(root: str | Path, split: str) -> tuple[np.ndarray, Tensor, list[str]]:
    """Photos in root/split/<class>/, of any kind that Pillow reads, as paths; class numbers and
    names. OSError if there are none."""
    folder, known = os.path.join(root, split), Image.registered_extensions()
    known = tuple(ending for ending, kind in known.items() if kind in Image.OPEN)
    try:
        data = torchvision.datasets.DatasetFolder(folder, None, known)
    except OSError as error:
        reason = textwrap.shorten(str(error), 200)
        raise OSError(f"no images in {folder}/<class>/ ({reason}): say with --data-dir where the "
                      "folders train/<class>/ and val/<class>/ are") from error  # fmt: skip
    paths = np.array([os.fsencode(path) for path, _ in data.samples])  # bytes: no object per file
    return paths, torch.tensor(data.targets), data.classes


def is_imagenet(names: list[str]) -> bool:
    """Whether these are ImageNet's 1000 folders, which, sorted, are in a checkpoint's order."""
    return len(names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)


def balanced(y: Tensor, limit: int) -> Tensor:
    """Indices, in order, of `limit` examples with as equal numbers per class as there can be."""
    rank = torch.empty_like(y)  # 0 for the first example of its class, 1 for the second, ...
    for label in y.unique():
        rank[y == label] = torch.arange(int((y == label).sum()))
    return rank.argsort(stable=True)[:limit].sort().values


def load_data(dataset: str, data_dir: str | Path, limit: int | None = None) -> SimpleNamespace:
    """The splits `train`, `val` and `test`, with at most `limit` examples each, balanced over the
    classes; `checksums` of all three; and the classes' `names`. `val` is taken from the
    training files, the same for all seeds: a sixth of digits and MNIST, a tenth of the others, but
    at most 25,000. `test`: the official test or validation files. Raises ValueError and what the
    loaders raise."""
    if dataset == "digits":
        images, y = render_digits(14_000)
        train, test = (images[:12_000], y[:12_000]), (images[12_000:], y[12_000:])
        names = [str(i) for i in range(10)]
    elif dataset == "imagenet":
        *train, names = load_folders(data_dir, "train")
        *test, others = load_folders(data_dir, "val")
        if names != others:
            odd = min(set(names) ^ set(others))
            raise ValueError(f"{data_dir}: train and val need the same classes; one lacks {odd}")
    else:
        *train, names = load_torchvision(dataset, data_dir, train=True)
        *test, _ = load_torchvision(dataset, data_dir, train=False)
    if limit and limit <= len(names):
        raise ValueError(f"--limit {limit}: the metrics need more than one example per class, "
                         f"and there are {len(names)} classes")  # fmt: skip
    n = len(train[1])
    if n < 3:
        raise ValueError(f"{n} training images are too few: three at least")
    n_val = max(1, n // 6 if dataset in ("digits", "mnist") else min(25_000, n // 10))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    parts = [(*train, order[n_val:]), (*train, order[:n_val]), (*test, torch.arange(len(test[1])))]
    if limit:
        parts = [(images, y, i[balanced(y[i], limit)]) for images, y, i in parts]
    train, val, test = ((images[index.numpy()], y[index]) for images, y, index in parts)
    checksums = [fingerprint(*split) for split in (train, val, test)]
    return SimpleNamespace(train=train, val=val, test=test, names=names, checksums=checksums)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSError, with what to do, if what is within cannot write `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write {path} ({why}): make room, or name another folder") from error


def write_whole(path: Path, write: Callable) -> None:
    """Let write(file) fill a file beside `path`, then move it there. OSError if that fails."""
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_at(path: Path, place: int, data) -> None:
    """Write bytes into an existing file. OSError if that fails."""
    with writing(path), open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


@torch.no_grad()
def trunk_features(
    trunk: nn.Module,  # frozen, on `device`
    images: Tensor | np.ndarray,  # uint8 [N, C, H, W], or paths [N] of photos
    path: Path,  # of the .npy file that keeps the features
    key: int = 0,  # a number for all that changes them; a file made with another one is not used
    dtype: str = "float32",  # or "float16"
    device: str = "cpu",
    bfloat16: bool = False,  # the trunk's products in bfloat16: on many machines much faster
    batch_size: int = 64,
    size: int = 384,  # side of the decoded photos
    workers: int = 0,  # processes that decode them
    share: tuple[int, int] = (0, 1),  # (i, n): the i-th of every n blocks; others may be missing
    progress: Callable = iter,
) -> Tensor:
    """trunk(images) [N, d], memory-mapped: read from `path`, or computed and left there.

    A .crc file beside it holds a checksum for each block of 64 rows. What does not fit its checksum
    is computed, be it missing, half written or damaged. So a pass may be killed at any time, and
    processes may share one; blocks begin at fixed places, so that with the same `batch_size` the
    result is the same to the bit. Raises OSError for a full disk or a bad photo, FloatingPointError
    for features that are not finite, ValueError if the file is of a trunk with more or fewer.
    """
    n, sums_path = len(images), path.with_suffix(".crc")
    blocks = [slice(i, i + 64) for i in range(0, n, 64)]
    for _ in range(4):  # made, filled, read; once more if another process made it at that time
        try:
            x, sums = np.load(path, mmap_mode="c"), np.fromfile(sums_path, np.uint32)
            if (len(x), x.dtype, len(sums)) != (n, dtype, len(blocks)):
                raise ValueError(f"{x.shape} {x.dtype}")
        except (OSError, ValueError, EOFError) as error:
            if path.exists():
                print(f"{path} is not the file of this run ({error}): made again", file=sys.stderr)
            shape = n, trunk(decoded(images[:1], size).to(device)).shape[1]
            write_whole(sums_path, lambda file: file.write(bytes(4 * len(blocks))))
            write_whole(path, lambda file, shape=shape: np.lib.format.open_memmap(
                file.name, "w+", dtype, shape))  # fmt: skip
            continue
        todo = [i for i, rows in enumerate(blocks) if zlib.crc32(x[rows], key) != sums[i]]
        if sums[todo].any():
            print(f"{path} has damaged or foreign blocks: they are made again", file=sys.stderr)
        todo = [i for i in todo if i % share[1] == share[0]]
        if not todo:
            return torch.from_numpy(x)
        loader = torch.utils.data.DataLoader(
            images, sampler=[blocks[i] for i in todo], batch_size=None,
            collate_fn=partial(decoded, size=size),
            num_workers=0 if isinstance(images, Tensor) else workers, pin_memory=device == "cuda",
        )  # fmt: skip
        for i, photos in zip(todo, progress(loader), strict=True):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
                h = [trunk(part.to(device, non_blocking=True)) for part in photos.split(batch_size)]
            h = torch.cat(h).float().cpu().to(getattr(torch, dtype)).numpy()
            if h.shape[1:] != x.shape[1:]:
                raise ValueError(f"{path} is of a trunk with {x.shape[1]} features: remove it")
            if not np.isfinite(h).all():
                raise FloatingPointError(f"features not finite in {dtype}: are the weights whole?")
            write_at(path, x.offset + blocks[i].start * x.strides[0], h)
            write_at(sums_path, 4 * i, np.uint32(zlib.crc32(h, key)))
    raise OSError(f"{path} does not keep what is written to it: use another --cache-dir")


# === 7. Training ==================================================================================
# loss = cross_entropy(logits, y) + weight * (1 - t) * aux(h, target)
# t: the share of the steps done, from 0 to 1
# aux = mean squared error / variance of h,  or  1 - cosine similarity


def flip_and_shift(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Images [B, C, H, W], each mirrored or not and moved by up to `most` pixels, at random."""
    n, _, height, width = images.shape
    down, right = torch.randint(2 * most + 1, (2, n), generator=generator).tolist()
    mirrored = (torch.rand(n, 1, 1, 1, generator=generator) < 0.5).to(images.device)
    places = zip(F.pad(images, [most] * 4), down, right, strict=True)
    moved = torch.stack([image[:, i : i + height, j : j + width] for image, i, j in places])
    return torch.where(mirrored, moved.flip(3), moved)


def fit(
    model: nn.Module,  # trained in place, on the device where it is
    layer: str,  # name of the layer whose output is h
    x: Tensor,  # inputs [N, ...], on any device
    y: Tensor,  # class numbers [N]
    targets: "Tensor | LazyRows | None" = None,  # constants [N, d_in]. None: the task alone
    weight: float = 0.0,  # of the auxiliary loss at the start; it falls to zero
    aux_loss: str = "mse",  # or "cosine", which leaves the scale of h free
    epochs: int = 1,
    batch_size: int = 64,
    lr: float = 1e-3,  # of Adam
    augment: Callable | None = None,  # (batch, generator) -> batch, as `flip_and_shift`
    seed: int = 0,  # of the order of the batches
    progress: Callable = iter,  # shows the steps that it iterates over, as tqdm.tqdm does
) -> None:
    """Train, or train on, with the combined loss. The variance of h, averaged over its units, is
    taken once at the start, from up to 4096 examples: one `weight` then suits layers of any scale.
    Seeds torch's generator, so that dropout repeats as well. Where torch.distributed is initialized
    each process takes its share of every batch. Raises FloatingPointError, with the epoch, on
    divergence, and ValueError for an unknown `aux_loss`, for y or targets that do not fit x and h,
    and if nothing is trained on which h depends."""
    if len(y) != len(x) or (targets is not None and len(targets) != len(x)):
        raise ValueError("x, y and targets need the same number of rows")
    if aux_loss not in ("mse", "cosine"):
        raise ValueError(f"aux_loss = {aux_loss!r} is neither mse nor cosine")
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    order = batches(len(x), batch_size, epochs, seed)
    if targets is not None:
        some = batches(len(x), 4096, 1, seed)[0]
        h = activations(model, layer, x[some])[0]
        variance = h.var(0).mean()
        if targets[:1].shape[1:] != h.shape[1:]:
            raise ValueError(f"targets have to be [N, {h.shape[1]}], as h is")
    model.train()
    net, rank, world = model, 0, 1
    if dist.is_initialized():
        net = nn.parallel.DistributedDataParallel(model)  # averages the gradients
        rank, world = dist.get_rank(), dist.get_world_size()
    with capture(find_layer(model, layer)) as seen:
        for step, index in enumerate(progress(order), 1):
            batch = take(x, index, device)
            if augment:
                batch = augment(batch, generator)  # the targets stay those of the clean images
            logits, mine = net(batch[rank::world]), index[rank::world]
            loss = task_loss = F.cross_entropy(logits, take(y, mine, device), reduction="none")
            if targets is not None:
                if not seen.h.requires_grad:
                    raise ValueError(f"nothing that is trained is below layer {layer!r}")
                target = take(targets, mine, device)
                if aux_loss == "mse":
                    aux = (seen.h - target).square().mean(1) / variance
                else:
                    aux = 1 - F.cosine_similarity(seen.h, target)
                # The targets are of the model at the start: as it moves on, they say less and less.
                loss = loss + weight * (1 - (step - 1) / len(order)) * aux
            loss = loss.sum() * world / len(index)  # the mean over the batch, averaged over shares
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch, rest = divmod(step * epochs, len(order))
            if rest == 0:
                finite = loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
                # Dead ReLUs can hold a diverged network at a finite loss.
                if not finite or task_loss.sum() > 1e6 * len(index):
                    raise FloatingPointError(f"the loss diverged in epoch {epoch}; lower lr")
    model.eval()


# === 8. Cycles ====================================================================================
# For each cycle and arm, from the model and SAE of the cycle before:
#     targets = rule(sae, h, y)    fit(net, targets)    sae = train_sae(new h)    measure(net, sae)


def arm_rules(n_classes: int, top_k: int) -> dict[str, Callable | None]:
    """An arm is a rule (sae, h [N, d_in], y [N]) -> targets [N, d_in], or None: no targets."""

    def class_means(sae, h, y):  # the mean h of each example's class: no SAE in it
        mean = class_mean(h, y, n_classes)
        return LazyRows(len(h), lambda i: mean[y[i]]).in_memory()

    return {
        "sae-ception": lambda sae, h, y: sharpened_targets(sae, h, y, n_classes, top_k),
        "control": None,
        "class-mean": class_means,
    }


def codes(sae, h: Tensor) -> Tensor:
    """z [N, d_sae] of all rows of h, encoded in chunks: what arises on the way is larger still."""
    return LazyRows(len(h), lambda index: sae.encode(h[index])).in_memory(max_bytes=math.inf)


@torch.no_grad()
def measure(model, layer: str, sae, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy of the model, separation by class of the SAE's features z and of h itself, and
    quality of the SAE. A score that is not defined is nan."""
    h, logits = activations(model, layer, x)
    z, y = codes(sae, h), y.to(h.device)

    def score(metric, points):  # undefined where, say, each point has a class of its own
        return metric(points, y) if 2 <= len(y.unique()) < len(y) else math.nan

    parts = zip(h.split(2048), z.split(2048), strict=True)
    unexplained = sum((part - sae.decode(code)).square().sum().item() for part, code in parts)
    return {
        "accuracy": (logits.argmax(1) == y).sum().item() / len(y),
        "silhouette": score(silhouette_score, z),
        "davies_bouldin": score(davies_bouldin_score, z),
        "calinski_harabasz": score(calinski_harabasz_score, z),
        "adjusted_rand": adjusted_rand_score(z.argmax(1), y),  # of the strongest feature
        "uncertainty": uncertainty_coefficient(z, y),
        "l0": ((z > 0).sum() / len(z)).item(),  # features that fire, per example
        "dead": 1 - (z > 0).any(0).float().mean().item(),  # share of features that never fire
        "fvu": unexplained / max(h.var(0, correction=0).sum().item() * len(h), 1e-12),
        "h_silhouette": score(silhouette_score, h),
        "h_davies_bouldin": score(davies_bouldin_score, h),
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
    weight: float = 1.0,  # of the auxiliary loss at the start of each cycle; it falls to zero
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
    `saes`, the latest state_dict of each arm and of the "baseline", and `k`, for `restore`. Each
    arm trains its own copy of the model on, with the same batches in the same order. Raises what
    `fit` and `train_sae` raise.
    """
    x, y = train[0], train[1].to(next(model.parameters()).device).long()
    if arms is None:
        rules = arm_rules(int(max(y.max(), test[1].max())) + 1, top_k)
        arms = {name: rules[name] for name in ("sae-ception", "control")}
    state = state or {"rows": [], "cycle": -1, "k": k, "models": {}, "saes": {}}
    for cycle in range(state["cycle"] + 1, cycles + 1):
        rows, models, saes = list(state["rows"]), dict(state["models"]), dict(state["saes"])
        for arm, rule in arms.items() if cycle else [("baseline", None)]:
            what, seconds = f"seed {seed} cycle {cycle} {arm}", [time.perf_counter()]
            batch_seed = 1000 * seed + cycle  # the same batches in every arm
            before = model
            if cycle > 0:
                before, sae = restore(model, state, arm if cycle > 1 else "baseline")
            targets = rule(sae, layer_output(before, layer, x), y) if rule else None
            net = copy.deepcopy(before)  # lazy targets are read from `before` while this one trains
            try:
                if cycle > 0 or not pretrained:
                    bar = partial(progress, desc=f"{what}: train")
                    options = {"seed": batch_seed, "progress": bar} | (fit_options or {})
                    fit(net, layer, x, y, targets, weight, **options)
                seconds.append(time.perf_counter())
                bar = partial(progress, desc=f"{what}: SAE")
                options = {"seed": batch_seed, "progress": bar} | (sae_options or {})
                sae = train_sae(layer_output(net, layer, x), d_sae, k, **options)
                seconds.append(time.perf_counter())
            except FloatingPointError as error:
                raise FloatingPointError(f"{what}: {error}") from error
            row = {"seed": seed, "cycle": cycle, "arm": arm} | measure(net, layer, sae, *test)
            if val:
                row |= {f"val_{key}": v for key, v in measure(net, layer, sae, *val).items()}
            stages = np.diff([*seconds, time.perf_counter()]).tolist()
            row |= zip(("seconds_train", "seconds_sae", "seconds_measure"), stages, strict=True)
            rows.append(row | {"seconds": sum(stages)})
            models[arm], saes[arm] = net.state_dict(), sae.state_dict()
        state = {"rows": rows, "cycle": cycle, "k": k, "models": models, "saes": saes}
        yield state


# === 9. Results ===================================================================================
# results.json, clusters.png, features.png and checkpoint.pt are written whole or not at all


# Set by torchrun. With --tune last each process makes its share of the trunk's features; rank 0
# does all the rest, which is small. With --tune all each process repeats everything, except that in
# `fit` it computes its share of each batch. Rank 0 alone prints and writes.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    by class y [N], and a legend of at most 20 classes."""
    side, font, colours = 480, ImageFont.load_default(size=18), palette(len(names))
    image = Image.new("RGB", (side * len(panels), side + 80), "white")
    draw = ImageDraw.Draw(image)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))  # none lies on top
    for left, (title, z) in zip(range(0, image.width, side), panels.items(), strict=True):
        z = z.float().cpu()
        torch.manual_seed(0)  # pca_lowrank draws at random; the picture should not
        axes = torch.pca_lowrank(z, q=min(6, *z.shape), niter=4)[2][:, :2]
        points = (z - z.mean(0)) @ axes
        low, high = points.quantile(torch.tensor([0.002, 0.998]), dim=0)  # no single far point
        points = ((points - low) / (high - low).clamp_min(1e-9)).clamp(0, 1) * (side - 40)
        points += torch.tensor([left + 20, 60])
        draw.text((left + 20, 10), title, fill="black", font=font)
        for (u, v), label in zip(points[order].tolist(), y[order].tolist(), strict=True):
            draw.ellipse((u - 2, v - 2, u + 2, v + 2), fill=colours[label])
    left = 20
    for name, colour in zip(names[:20], colours, strict=False):
        draw.text((left, side + 50), name, fill=colour, font=font)
        left += 25 + draw.textlength(name, font=font)
    return image


def draw_features(z: Tensor, images, y: Tensor, mean: Tensor, names, size: int) -> Image.Image:
    """A line for each of the first 20 classes: its three features with the largest class mean
    (mean [n_classes, d_sae]), each as the eight images [N, C, H, W] with the largest z [N, d_sae],
    framed in the colour of their own class y [N]."""
    side, font, colours = 52, ImageFont.load_default(size=15), palette(len(names))
    mean, n_best = mean[:20], min(8, len(z))
    canvas = Image.new("RGB", (10 + 3 * (8 * side + 20), 10 + len(mean) * (side + 46)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, features in enumerate(mean.topk(min(3, mean.shape[1])).indices.tolist()):
        top = 5 + c * (side + 46)
        draw.text((10, top), f"class {names[c]}", fill=colours[c], font=font)
        for left, feature in zip(range(10, canvas.width, 8 * side + 20), features, strict=False):
            if mean[c, feature] == 0:  # the class does not use it
                continue
            text = f"feature {feature}, mean {mean[c, feature]:.2f}"
            draw.text((left, top + 20), text, fill="black", font=font)
            best = z[:, feature].topk(n_best).indices.cpu()
            photos = decoded(images[best.numpy()], size)
            for n, (i, photo) in enumerate(zip(best.tolist(), photos, strict=True)):
                x0, y0 = left + n * side, top + 41
                draw.rectangle((x0, y0, x0 + side - 3, y0 + side - 3), fill=colours[int(y[i])])
                photo = torchvision.transforms.functional.to_pil_image(photo).convert("RGB")
                canvas.paste(photo.resize((side - 8, side - 8)), (x0 + 3, y0 + 3))
    return canvas


def save_run(folder: Path, config: dict, saved: dict) -> None:
    """checkpoint.pt, from which --resume goes on, and results.json, where nan is null."""
    write_whole(folder / "checkpoint.pt", lambda file: torch.save({"config": config} | saved, file))
    environment = {m.__name__: str(m.__version__) for m in (torch, torchvision, np)}
    environment |= {"python": platform.python_version(), "machine": platform.platform()}
    environment["threads"] = torch.get_num_threads()
    environment["gpu"] = torch.cuda.get_device_name() if config["device"] == "cuda" else None
    rows = [{k: v if v == v else None for k, v in row.items()} for row in saved["rows"]]
    results = {"config": config, "environment": environment, "rows": rows}
    text = json.dumps(results, indent=1, allow_nan=False)
    write_whole(folder / "results.json", lambda file: file.write(text.encode()))


def show_progress(steps, desc: str, size: int = 1, unit: str = "steps") -> Iterator:
    """Rate and time left on stderr; where that is no terminal, one line when it is done. A step is
    `size` units."""
    start = shown = time.perf_counter()
    live = sys.stderr.isatty()
    for done, step in enumerate(steps, 1):
        yield step
        now, left = time.perf_counter(), len(steps) - done
        if not RANK and (left == 0 or (live and now - shown > 0.2)):
            shown, rate = now, done / (now - start)
            text = f"{desc}: {done}/{len(steps)}, {rate * size:.3g} {unit}/s, "
            text += f"{left / rate:.0f} s left" if left else "done"
            text = f"\r{text:<79}" if live else text
            print(text, end="" if left else "\n", file=sys.stderr, flush=True)


# === 10. Command line =============================================================================


def make_parser() -> argparse.ArgumentParser:
    """Every option of the command line."""

    def number(kind, low, text):  # partial(number, int, 1) is an argparse type
        with contextlib.suppress(ValueError):
            if low <= kind(text) < 2**31:
                return kind(text)
        name = {int: "whole number", float: "number"}[kind]
        raise argparse.ArgumentTypeError(f"{text} is not a {name} from {low} up to 2 billion")

    def error(message):  # `main` prints it on one line; argparse would print its usage first
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS,  # what is not given is not there
        description=__doc__.partition("\n")[0],
        epilog="\n".join(["defaults:"] + [f"  {name}: {d}" for name, d in DEFAULTS.items()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error, flag, count = error, parser.add_argument, partial(number, int, 1)
    place = os.path.expanduser
    flag("--dataset", choices=list(ARCHS), help="digits (the default) are rendered, not downloaded")
    flag("--cycles", type=partial(number, int, 0), help="rounds of SAE, sharpen, train, measure")
    flag("--data-dir", type=place, help="where data sets lie or are downloaded to (default: data)")
    flag("--out-dir", type=place, help="where each run makes its folder (default: runs)")
    flag("--cache-dir", type=place, help="for features of the trunk (default: DATA_DIR/features)")
    archs = "; ".join(f"{name}: {', '.join(archs)}" for name, archs in ARCHS.items())
    flag("--arch", choices=sum(ARCHS.values(), []), metavar="ARCH", help=archs)
    flag("--image-size", type=count, help="side to which images are resized, for ViT and ConvNeXt")
    flag("--weights", type=place, metavar="{auto,none,PATH}", help="pretrained; auto: downloaded")
    flag("--tune", choices=["last", "all"], help="train what is behind the trunk, or the trunk too")
    flag("--layer", help="name of the layer whose output is h")
    flag("--top-k", type=count, help="features that each class keeps")
    flag("--aux-weight", type=partial(number, float, 0), help="weight of the auxiliary loss at the "
         "start of each cycle; it falls to zero")  # fmt: skip
    flag("--aux-loss", choices=["mse", "cosine"], help="distance between h and its target")
    flag("--sae", choices=["l1", "topk"], help="what makes the SAE sparse")
    flag("--d-sae", type=partial(number, int, 2), help="number of features of the SAE")
    flag("--l1", type=partial(number, float, 0), help="weight of the L1 norm, for --sae l1")
    flag("--sae-k", type=count, help="active features per example, for --sae topk")
    flag("--epochs", type=count, help="of the classifier: for the baseline, and in every cycle")
    flag("--sae-epochs", type=count, help="of each SAE; None in the defaults: 1000 steps at least")
    flag("--batch-size", type=count, help="of the classifier and of the trunk")
    flag("--lr", type=partial(number, float, 1e-12), help="learning rate of the classifier")
    flag("--seeds", type=partial(number, int, 0), nargs="+", help="one run each (default: 0)")
    flag("--arms", choices=list(arm_rules(1, 1)), nargs="+", help="default: sae-ception control")
    flag("--limit", type=count, help="examples per split, balanced over the classes (default: all)")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], help="auto (the default): cuda or cpu")
    flag("--workers", type=partial(number, int, 0), help="decode photos (default: one per core)")
    flag("--resume", type=place, metavar="RUN", help="go on with the run in this folder")
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[dict, Path, dict]:
    """The settings, the folder of the run, and what it has done so far: see `run`. ValueError if
    the settings are wrong or do not go together."""
    parser = make_parser()
    error, given = parser.error, vars(parser.parse_args(argv))
    dataset, train = given.get("dataset", "digits"), Path(given.get("data_dir", "data"), "train")
    row = "vit_tiny" if given.get("arch") == "vit_tiny" else dataset
    if row == "imagenet" and not is_imagenet([p.name for p in train.glob("*") if p.is_dir()]):
        row = "folders"
    workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    movable = dict(data_dir="data", out_dir="runs", cache_dir=None, workers=workers, device="auto")
    defaults = {"dataset": dataset, "seeds": [0], "arms": ["sae-ception", "control"], "limit": None}
    defaults |= movable | DEFAULTS[row]
    if "resume" in given:
        folder = Path(given.pop("resume"))
        try:
            saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            config, parts = saved.pop("config"), {"rows", "seed", "state", "data"}
            if (config.keys(), saved.keys()) != (defaults.keys(), parts):
                raise KeyError("of another version")
        except Exception:  # each kind of damage raises a type of its own
            error(f"--resume: {folder} is no run folder: it has no readable checkpoint.pt")
        for key in given.keys() - movable.keys():
            if given[key] != config[key]:
                name = "--" + key.replace("_", "-")
                error(f"--resume: {folder} was run with {name} {config[key]}; leave {name} out")
        config |= given
    else:
        config = defaults | given
        config["seeds"] = list(dict.fromkeys(config["seeds"]))  # each once
        now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]  # to the millisecond: always a new one
        folder = Path(config["out_dir"], f"{config['dataset']}-{now}")
        saved = {"rows": [], "seed": config["seeds"][0], "state": None, "data": None}
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config["device"] == "auto":
        config["device"] = "cuda" if found["cuda"] else "cpu"
    if not found.get(config["device"], True):
        error(f"--device {config['device']}: torch finds none on this machine; use --device cpu")
    for key in ["top_k", "sae_k"] if config["sae"] == "topk" else ["top_k"]:
        if config[key] > config["d_sae"]:
            name = key.replace("_", "-")
            error(f"--{name} {config[key]} is over the number of features, {config['d_sae']}")
    if config["arch"] == "mlp" and given.keys() & {"weights", "image_size"}:
        error("--weights and --image-size are for ViT and ConvNeXt, not for the MLP")
    if config["arch"] not in ARCHS[config["dataset"]]:
        names = ", ".join(ARCHS[config["dataset"]])
        error(f"--arch {config['arch']} is not for --dataset {config['dataset']}; choose {names}")
    if config["dataset"] == "imagenet" and config["image_size"] < 32:
        error("--image-size must be at least 32 for ConvNeXt")
    if config["dataset"] == "imagenet" and config["tune"] == "all":
        error("--tune all keeps all images in memory: it is for digits, mnist and cifar10")
    return config, folder, saved


def build(config: dict, names: list[str], seed: int) -> tuple:
    """Trunk, model, and whether the model can classify before any training. With --tune all the
    trunk is a part of the model."""
    arch, weights, kept_head = config["arch"], config["weights"], is_imagenet(names)
    # Cached features serve all seeds: these differ, then, in the batches and the SAEs alone.
    torch.manual_seed(seed if config["tune"] == "all" else 0)
    if arch == "mlp":
        trunk, model, _ = mnist_mlp(len(names))
    elif arch.startswith("vit"):
        trunk, model, _ = cifar10_vit(arch, config["image_size"], len(names), weights)
    else:
        trunk, model, _ = imagenet_convnext(arch, None if kept_head else len(names), weights)
    if config["tune"] == "all":
        model = nn.Sequential(OrderedDict(trunk=trunk, **dict(model.named_children())))
    find_layer(model, config["layer"])
    return trunk, model, kept_head and weights != "none"


def bfloat16_is_fast(device: str) -> bool:
    """Whether the device has matrix units for bfloat16: CUDA, and CPUs with AMX."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not tell
    return device == "cuda" or (device == "cpu" and capabilities.get("amx_bf16", False))


def cached_splits(config: dict, trunk, data: SimpleNamespace, share=(0, 1)) -> list[tuple]:
    """The three splits with the trunk's features for images, from --cache-dir or computed."""
    device, weights = config["device"], config["weights"]
    about = {name: config[name] for name in ("dataset", "arch", "image_size", "weights")}
    if weights not in ("auto", "none"):
        status = os.stat(weights)
        about["weights"] = [str(Path(weights).resolve()), status.st_size, status.st_mtime_ns]
    about["bfloat16"] = bfloat16_is_fast(device)
    folder = Path(config["cache_dir"] or Path(config["data_dir"], "features"))
    dtype = "float16" if len(data.train[1]) > 200_000 else "float32"  # ImageNet: 4 GB, not 8
    trunk, splits = trunk.to(device).eval().requires_grad_(False), []
    for split, checksum in zip(("train", "val", "test"), data.checksums, strict=True):
        images, y = getattr(data, split)
        key = zlib.crc32(json.dumps(about | {"split": split, "images": checksum}).encode())
        path = folder / f"{config['dataset']}-{config['arch']}-{split}-{key:08x}.npy"
        bar = partial(show_progress, desc=f"trunk, {split} split", size=64, unit="images")
        options = {name: config[name] for name in ("device", "batch_size", "workers")}
        options |= {"size": config["image_size"], "share": share, "progress": bar}
        options["bfloat16"] = about["bfloat16"]
        splits.append((trunk_features(trunk, images, path, key, dtype, **options), y))
    return splits


def run(config: dict, data: SimpleNamespace, network: tuple, folder: Path, saved: dict) -> None:
    """Every seed, from where `saved` stands: prints the table, fills the folder. `saved` holds the
    `rows` of all seeds, the `seed` at work and its `state`, and the checksums of the `data`."""
    trunk, model, pretrained = network
    device, tune_all = config["device"], config["tune"] == "all"
    if not tune_all and WORLD > 1:
        cached_splits(config, trunk, data, share=(RANK, WORLD))
        dist.barrier()
        dist.destroy_process_group()  # `fit` would share its batches with those that leave here
        if RANK:
            return
    splits = [data.train, data.val, data.test] if tune_all else cached_splits(config, trunk, data)
    too_large = device == "cuda" and splits[0][0].nbytes > torch.cuda.mem_get_info()[0] / 2
    train, val, test = ((x if too_large else x.to(device), y.to(device)) for x, y in splits)
    activations(model.to(device), config["layer"], train[0][:2])  # a bad layer shows here
    rules = arm_rules(len(data.names), config["top_k"])
    options = {name: config[name] for name in ("d_sae", "cycles")}
    options |= {"weight": config["aux_weight"], "pretrained": pretrained, "progress": show_progress}
    options["k"] = config["sae_k"] if config["sae"] == "topk" else None
    options["arms"] = {arm: rules[arm] for arm in config["arms"]}
    epochs = config["sae_epochs"] or math.ceil(1000 / max(1, len(train[0]) // 256))  # its batch
    rough = not tune_all and bfloat16_is_fast(device)  # small networks' SAEs would not gain by it
    options["sae_options"] = {"l1": config["l1"], "epochs": epochs, "bfloat16": rough}
    options["fit_options"] = {k: config[k] for k in ("aux_loss", "epochs", "batch_size", "lr")}
    if tune_all and config["dataset"] == "cifar10":
        options["fit_options"]["augment"] = flip_and_shift
    print(table(saved["rows"]), flush=True)
    if not RANK and test[1].bincount().max() < 2:
        print("one test image per class: nan where silhouette and others are not defined",
              file=sys.stderr)  # fmt: skip
    for seed in config["seeds"][config["seeds"].index(saved["seed"]) :]:
        if tune_all and seed != saved["seed"]:
            _, model, _ = build(config, data.names, seed)
        setting = (model.to(device), config["layer"], train, test)
        for state in saeception(*setting, val=val, seed=seed, state=saved["state"], **options):
            new = [row for row in state["rows"] if row["cycle"] == state["cycle"]]
            saved |= {"rows": saved["rows"] + new, "seed": seed, "state": state}
            if not RANK:
                save_run(folder, config, saved)
            print(table(new, heading=False), flush=True)
        if seed == config["seeds"][0] and not RANK:
            draw_run(folder, *setting, data, saved["state"], config["image_size"])
        saved["state"] = None
    print(summary(saved["rows"]), end="")
    if not RANK:
        print(f"results.json, clusters.png and features.png are in {folder}", file=sys.stderr)


def draw_run(folder: Path, model, layer: str, train, test, data, state: dict, size: int) -> None:
    """Both pictures: clusters of the baseline and of each arm, features of the first arm."""
    panels, arms, shown = {}, list(state["models"]), balanced(data.test[1], 5000)
    for arm in arms:
        net, sae = restore(model, state, arm)
        h = activations(net, layer, test[0])[0]
        score = [row["silhouette"] for row in state["rows"] if row["arm"] == arm][-1]
        panels[f"{arm}: silhouette {score:.3f}"] = sae.encode(h[shown])
        if arm == arms[:2][-1]:  # the first behind the baseline
            h_train = layer_output(net, layer, train[0])
            mean = class_mean(h_train, train[1], len(data.names), sae.encode).cpu()
            features = draw_features(codes(sae, h), *data.test, mean, data.names, size)
    clusters = draw_clusters(panels, data.test[1][shown], data.names)
    write_whole(folder / "clusters.png", lambda file: clusters.save(file, "PNG"))
    write_whole(folder / "features.png", lambda file: features.save(file, "PNG"))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a bad argument, 1 any other error, 130 interrupted."""
    folder, local = None, int(os.environ.get("LOCAL_RANK", 0))
    try:
        config, folder, saved = parse_arguments(argv)
        if config["device"] == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
            torch.cuda.set_device(local)
        if WORLD > 1:  # one may wait for another for as long as a trunk pass takes
            backend = "nccl" if config["device"] == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))
        if local:
            dist.barrier()  # until the first process of this machine has downloaded everything
        data = load_data(config["dataset"], config["data_dir"], config["limit"])
        network = build(config, data.names, saved["seed"])
        if WORLD > 1 and not local:
            dist.barrier()
        if saved["data"] not in (None, data.checksums):
            place = config["data_dir"]
            raise ValueError(f"--resume: the images in {place} are not those of the run")
        saved["data"] = data.checksums
        if RANK == 0:
            save_run(folder, config, saved)  # --resume works from here on; results.json is whole
        with contextlib.redirect_stdout(open(os.devnull, "w") if RANK else sys.stdout):
            run(config, data, network, folder, saved)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK"):  # for who changes this file
            raise
        status = 2 if isinstance(error, ValueError) else 1
        lines = str(error).strip().split("\n")
        last = lines[0].startswith("Caught")  # by a DataLoader's worker, whose traceback follows
        reason = lines[-last].removeprefix("OSError: ")
        reason = reason or type(error).__name__
        resume = f"go on with: python saeception.py --resume {folder}"
        hint = f"what is finished is in {folder}"  # to go on would come to the same error
        if isinstance(error, KeyboardInterrupt):
            reason, status, hint = "interrupted", 130, resume
        elif isinstance(error, OSError):
            hint = resume
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            smaller = max(1, config["batch_size"] // 2)
            reason = f"the GPU has too little memory; try --batch-size {smaller}"
        elif isinstance(error, RuntimeError) and WORLD > 1:
            reason, hint = f"this or another process of the run failed ({reason})", resume
        elif not isinstance(error, ValueError | FloatingPointError):
            reason = f"{type(error).__name__}: {reason} (set TRACEBACK=1 to see where)"
        if not RANK or status == 1:  # a bad argument is the same for all
            hint = f"; {hint}" if folder and folder.exists() else ""
            start = "\n" if sys.stderr.isatty() else ""  # behind the progress
            print(f"{start}saeception.py: error: {reason}{hint}", file=sys.stderr)
        return status


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have the ±
    sys.exit(main())
