"""What a TopK SAE needs to start well: variants of `train_sae` on five layers, SAELens beside it.

    PYTHONPATH=. python .github/experiments/topk_start.py features.npz --data-dir data \
        --fashion-dir fashion

features.npz has x_train and x_test, as for sae_frontier.py; a MNIST/raw folder in fashion holds
the files of Fashion-MNIST. FVU: squared error on held-out rows / their variance. dead: share of
features that fire for no held-out row. Steps are rounded up to whole epochs: 234, 390 and 2,028.
Layers go to runs/topk-layers, results to runs/topk_start.jsonl, from which a run that was stopped
goes on.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import report
import torch
import torch.nn.functional as F
from sae_frontier import L as SAE_LENS
from sae_frontier import sae_lens

import saeception as S

LAYERS = {  # name: d_sae, k, seed of the network
    "EfficientNet": (2560, 32, None),
    "CNN": (512, 16, 0),
    "CNN, Fashion": (512, 16, 1),
    "relu1": (256, 8, 0),
    "relu2": (256, 8, 1),
}
STEPS = (200, 390, 2000)
SEEDS = (0, 1, 2)


def small(d_in):
    return min(0.5, 6 / math.sqrt(d_in))


# What each variant gives `train` below, which depends on d_in where the file's start does. Its own
# is share 0.5 and turn d_in / 2000. Gao et al. (arXiv:2406.04093): section 2.4, appendix A.
VARIANTS = {
    "as in the file": None,
    "ten constants, until now": lambda d_in: dict(
        share=small(d_in), turn=min(0.6, d_in / 2300), rates=True, slope=2.5, more_k=True
    ),
    "simple, turned": lambda d_in: dict(share=small(d_in), turn=min(0.6, d_in / 2300)),
    "simple": lambda d_in: dict(share=small(d_in), turn=0),
    "not turned": lambda d_in: dict(share=0.5, turn=0),
    "all turned by 0.5": lambda d_in: dict(share=0.5, turn=0.5),
    "turn d_in / 2300": lambda d_in: dict(share=0.5, turn=d_in / 2300),
    "tied, turned": lambda d_in: dict(share=1, turn=d_in / 2000),
    "tied": lambda d_in: dict(share=1, turn=0),
    "encoder of 0.1": lambda d_in: dict(share=0.1, turn=d_in / 2000),
    "mixtures of examples": lambda d_in: dict(share=0.5, turn=0, mixed=True),
    "no bias that rises": lambda d_in: dict(share=0.5, turn=d_in / 2000, rise=0),
    "Gao et al.: tied, AuxK": lambda d_in: dict(share=1, turn=0, rise=0, aux_k=True),
}
THEIRS = {"SAELens, 1e-3": 1e-3, "SAELens, 1e-2": 1e-2}  # learning rates


def aux_loss(sae, batch, h_hat, dead):
    """AuxK, Gao et al., appendix A.2: d_in / 2 dead features reconstruct what the others leave."""
    z = F.relu((batch - sae.b_dec) @ sae.W_enc + sae.b_enc) * dead
    top = z.topk(min(batch.shape[1] // 2, int(dead.sum())), dim=1)
    z = torch.zeros_like(z).scatter(1, top.indices, top.values)
    return ((batch - h_hat).detach() - z @ sae.W_dec).square().sum(1).mean() / 32


def train(
    h, d_sae, k, steps, seed, share, turn,
    mixed=False, rates=False, slope=5, more_k=False, rise=0.1, aux_k=False,
):  # fmt: skip
    """`train_sae` for TopK, with switches for what it had before, has or might have."""
    d_in = h.shape[1]
    lr = lr_enc = lr_dec = 0.006 * math.sqrt(256 / d_sae)
    if rates:
        lr_enc, lr_dec = min(0.8, 20 / math.sqrt(d_in)) * lr, 1.8 * lr
    rows = h[S.batches(len(h), 4096, 1, seed)[0]]
    scale = 1 / rows.square().mean().sqrt()
    torch.manual_seed(seed)
    sae = S.SparseAutoencoder(d_in, d_sae, k)
    sae.b_dec.data = rows.mean(0) * scale
    toward = F.normalize(rows[torch.randint(len(rows), (d_sae,))] - rows.mean(0), dim=1)
    sae.W_dec.data = F.normalize(sae.W_dec.data + turn * toward, dim=1)
    if mixed:  # random sums of all examples: directions in which h varies more come more often
        sums = torch.randn(d_sae, len(rows)) @ (rows - rows.mean(0))
        sae.W_dec.data = F.normalize(sums, dim=1)
    sae.W_enc.data = share * sae.W_dec.data.T.contiguous()
    groups = [{"params": [sae.W_enc, sae.b_enc]}, {"params": [sae.W_dec, sae.b_dec]}]
    optimizer = torch.optim.Adam(groups, fused=True)
    order = S.batches(len(h), 256, 1, seed, steps)
    silent = torch.zeros(d_sae)  # batches since each feature was used
    for step, index in enumerate(order):
        done = step / len(order)
        fall = min(1, slope * (1 - done))
        for group, rate in zip(optimizer.param_groups, (lr_enc, lr_dec), strict=True):
            group["lr"] = rate * fall
        if more_k:  # 2 k at the start, k after a fifth
            sae.k = int(k * 2 ** max(0, 1 - 5 * done))
        batch = h[index] * scale
        h_hat, z = sae(batch)
        loss = (h_hat - batch).square().sum(1).mean()
        dead = silent > 20  # few, as there are few steps; theirs are 10 million tokens
        if aux_k and dead.any():
            loss = loss + aux_loss(sae, batch, h_hat, dead)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec, gradient = sae.W_dec, sae.W_dec.grad
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
            optimizer.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            unused = z.sum(0) == 0
            silent = torch.where(unused, silent + 1, 0)
            sae.b_enc += rise * lr * fall * math.sqrt(d_in) * unused
    sae.k = k
    sae.requires_grad_(False)
    sae.b_enc /= scale
    sae.b_dec /= scale
    return sae


def layer_rows(name, args):
    """Training and held-out rows [N, d_in] of a layer; a network is trained for it once."""
    path = Path("runs/topk-layers") / f"{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    if name == "EfficientNet":
        arrays = np.load(args.features)
        x = [torch.from_numpy(arrays[part]).float() for part in ("x_train", "x_test")]
        rows = [F.layer_norm(part, part.shape[1:]) for part in x]
    else:
        splits = report.inputs("mnist", args.fashion_dir if "Fashion" in name else args.data_dir)
        torch.manual_seed(LAYERS[name][2])
        if name.startswith("CNN"):
            model, layer = report.small_network("cnn")
            settings = {"lr": 5e-4, "batch_size": 64}
        else:
            model, layer = S.mnist_mlp()[1], name
            splits = {split: (x.flatten(1), y) for split, (x, y) in splits.items()}
            settings = {"lr": 2e-3, "batch_size": 128}
        S.fit(model, layer, *splits["train"], epochs=8, **settings)
        rows = [S.activations(model, layer, splits[part][0])[0] for part in ("train", "test")]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rows, path)
    return rows


@torch.no_grad()
def score(sae, h):
    z = sae.encode(h)
    fvu = (sae.decode(z) - h).square().sum() / (h - h.mean(0)).square().sum()
    return {"fvu": fvu.item(), "dead": 1 - (z > 0).any(0).float().mean().item()}


def run(name, train_rows, d_sae, k, steps, seed):
    if name in THEIRS:
        epochs = math.ceil(steps / (len(train_rows) // 256))
        return sae_lens(train_rows, d_sae, k, 0.0, epochs, lr=THEIRS[name], seed=seed)
    if VARIANTS[name] is None:
        return S.train_sae(train_rows, d_sae, k, epochs=1, min_steps=steps, seed=seed)
    return train(train_rows, d_sae, k, steps, seed, **VARIANTS[name](train_rows.shape[1]))


def means(rows, layer, steps, name, seeds):
    """FVU and share of dead features, means over the seeds that are there, and their number."""
    found = [
        (row["fvu"], row["dead"])
        for row in rows
        if (row["layer"], row["steps"], row["name"]) == (layer, steps, name)
        and row["seed"] in seeds
    ]
    if not found:
        return None
    return (*np.mean(found, axis=0), len(found))


def table(rows, names, args, bold):
    """A line for each layer and number of steps, FVU / dead; with `bold` the least FVU is so."""
    print("| layer | steps | seeds | " + " | ".join(names) + " |")
    print("|" + "---|" * (3 + len(names)))
    for layer in args.layers:
        for steps in args.steps:
            cells = {name: means(rows, layer, steps, name, args.seeds) for name in names}
            cells = {name: cell for name, cell in cells.items() if cell}
            if not cells:
                continue
            best = min(cells, key=lambda name: cells[name][0])
            texts = []
            for name in names:
                text = ""
                if name in cells:
                    fvu, dead, _ = cells[name]
                    text = f"{fvu:.4f} / {dead:.2f}"
                    if bold and name == best:
                        text = f"**{fvu:.4f}** / {dead:.2f}"
                texts.append(text)
            n_seeds = max(cell[2] for cell in cells.values())
            n_rows = 10_000 if layer == "EfficientNet" else 20_000
            per_epoch = n_rows // 256
            taken = per_epoch * math.ceil(steps / per_epoch)
            print(f"| {layer} | {taken} | {n_seeds} | " + " | ".join(texts) + " |")
    print()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("features", help="npz with arrays x_train and x_test")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--fashion-dir", default="fashion")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--names", nargs="+", default=[*VARIANTS, *THEIRS])
    parser.add_argument("--out", default="runs/topk_start.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    key = ("layer", "steps", "name", "seed")
    done = {tuple(row[part] for part in key) for row in report.rows_of(args.out)}
    for layer in args.layers:
        train_rows, test_rows = layer_rows(layer, args)
        d_sae, k, _ = LAYERS[layer]
        for seed in args.seeds:
            for steps in args.steps:
                for name in args.names:
                    if (layer, steps, name, seed) in done:
                        continue
                    if name in THEIRS and SAE_LENS is None:
                        continue
                    sae = run(name, train_rows, d_sae, k, steps, seed)
                    row = dict(zip(key, (layer, steps, name, seed), strict=True))
                    report.keep(args.out, row | score(sae, test_rows))
    rows = report.rows_of(args.out)
    table(rows, [name for name in args.names if name in VARIANTS], args, bold=False)
    table(rows, ["as in the file", *THEIRS], args, bold=True)


if __name__ == "__main__":
    main()
