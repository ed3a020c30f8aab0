"""How should a TopK SAE start? Variants of the recipe of `train_sae`, and SAELens's, side by side.

    PYTHONPATH=. python .github/experiments/topk_start.py variants --data-dir data \
        --fashion-dir fashion --features features.npz
    PYTHONPATH=. python .github/experiments/topk_start.py sae-lens ...

Five layers: features of EfficientNet (`--features`, as for sae_frontier.py), the LayerNorm of the
small CNN on MNIST and on Fashion-MNIST (`--fashion-dir`, in MNIST's format), and both hidden layers
of the paper's MLP on MNIST; the networks see 20,000 images for 8 epochs. FVU on held-out rows, and
the share of features that fire for none of them. Rows go to runs/topk_start.jsonl, from which a run
that was stopped goes on.
"""

import argparse
import math
from functools import partial

import numpy as np
import report
import torch
import torch.nn.functional as F
from sae_frontier import sae_lens

import saeception as S

PATH = "runs/topk_start.jsonl"


def variants(d_in: int) -> dict[str, dict]:
    """What each variant hands to `train`. Encoder: its size, in sizes of the decoder. Turn: how far
    directions start turned towards an example, in units of their own length."""
    narrow = min(0.5, 6 / math.sqrt(d_in))
    return {
        "ten constants, the recipe before": {
            "encoder": narrow, "turn": min(0.6, d_in / 2300), "slope": 2.5, "anneal": True,
            "lr_encoder": min(0.8, 20 / math.sqrt(d_in)), "lr_decoder": 1.8,
        },
        "encoder min(.5, 6/sqrt(d_in))": {"encoder": narrow},
        "the same, turn min(.6, d_in/2300)": {"encoder": narrow, "turn": min(0.6, d_in / 2300)},
        "encoder .5": {"encoder": 0.5},
        "encoder .5, turn d_in/2300: train_sae": {"encoder": 0.5, "turn": d_in / 2300},
        "encoder .5, turn d_in/1280": {"encoder": 0.5, "turn": d_in / 1280},
        "encoder .5, turn .5": {"encoder": 0.5, "turn": 0.5},
        "encoder 1": {"encoder": 1.0},
        "encoder 1, AuxK, no rising bias (Gao et al.)": {"encoder": 1.0, "aux_k": True},
    }  # fmt: skip


def train(
    h, d_sae, k, steps, seed, encoder, turn=0.0, slope=5, anneal=False, lr_encoder=1.0,
    lr_decoder=1.0, aux_k=False,
):  # fmt: skip
    """`train_sae`'s recipe for TopK with its parts exchangeable."""
    d_in, lr = h.shape[1], 0.006 * math.sqrt(256 / d_sae)
    sample = S.sample_rows(h, seed)
    scale = 1 / sample.square().mean().sqrt()
    torch.manual_seed(seed)
    sae = S.SparseAutoencoder(d_in, d_sae, k)
    examples = sample[torch.randint(len(sample), (d_sae,))]
    toward = F.normalize(examples - sample.mean(0), dim=1)
    sae.b_dec.data = sample.mean(0) * scale
    sae.W_dec.data = F.normalize(sae.W_dec.data + turn * toward, dim=1)
    sae.W_enc.data = encoder * sae.W_dec.data.T.contiguous()
    groups = [{"params": [sae.W_enc, sae.b_enc]}, {"params": [sae.W_dec, sae.b_dec]}]
    optimizer = torch.optim.Adam(groups, lr=lr, fused=True)
    silent = torch.zeros(d_sae)  # steps since a feature fired
    order = S.batches(len(h), 256, 1, seed, steps)
    for step, index in enumerate(order):
        fall = min(1, slope * (1 - step / len(order)))
        for group, factor in zip(optimizer.param_groups, (lr_encoder, lr_decoder), strict=True):
            group["lr"] = lr * factor * fall
        if anneal:
            sae.k = min(d_sae, int(k * 2 ** max(0, 1 - 5 * step / len(order))))
        batch = h[index] * scale
        h_hat, z = sae(batch)
        loss = (h_hat - batch).square().sum(1).mean()
        dead = silent > 20
        if aux_k and dead.any():
            # Gao et al., appendix A.2: the dead features with the largest values, half as many as
            # there are inputs, reconstruct what is left; 1/32 of that error.
            before = F.relu((batch - sae.b_dec) @ sae.W_enc + sae.b_enc) * dead
            top = before.topk(min(d_in // 2, int(dead.sum())), dim=1)
            aux_z = torch.zeros_like(before).scatter(1, top.indices, top.values)
            left = (batch - h_hat).detach()
            loss = loss + (aux_z @ sae.W_dec - left).square().sum(1).mean() / 32
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec, gradient = sae.W_dec, sae.W_dec.grad
            gradient -= (gradient * W_dec).sum(1, keepdim=True) * W_dec
            optimizer.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            unused = z.sum(0) == 0
            silent = torch.where(unused, silent + 1, 0)
            if not aux_k:
                sae.b_enc += 0.1 * lr * fall * math.sqrt(d_in) * unused
    sae.k = k
    sae.requires_grad_(False)
    sae.b_enc /= scale
    sae.b_dec /= scale
    return sae


def layer_of(args, name: str) -> tuple:
    """Training rows, held-out rows, d_sae and k of a layer."""
    if name == "EfficientNet":
        arrays = np.load(args.features)
        x = [torch.from_numpy(arrays[key]).float() for key in ("x_train", "x_test")]
        h, held_out = (F.layer_norm(rows, rows.shape[1:]) for rows in x)
        return h, held_out, 2560, 32
    root, seed = (args.fashion_dir, 1) if name == "CNN, Fashion-MNIST" else (args.data_dir, 0)
    splits = report.inputs("mnist", root)
    torch.manual_seed(seed)
    if name.startswith("CNN"):
        (model, layer), options = report.small_network("cnn"), {"lr": 5e-4}
        d_sae, k = 512, 16
    else:
        _, mlp, _ = S.mnist_mlp()
        model = torch.nn.Sequential(torch.nn.Flatten(), *mlp)
        layer, options = {"MLP relu1": "2", "MLP relu2": "4"}[name], {"lr": 2e-3, "batch_size": 128}
        d_sae, k = 256, 8
    S.fit(model, layer, *splits["train"], epochs=8, **options)
    h, held_out = (S.activations(model, layer, splits[key][0])[0] for key in ("train", "test"))
    return h, held_out, d_sae, k


def makers_of(what: str, h, d_sae: int, k: int) -> dict:
    """By name, functions of (steps, seed) that train an SAE on h."""
    if what == "variants":
        return {
            name: partial(train, h, d_sae, k, **options)
            for name, options in variants(h.shape[1]).items()
        }

    def lens(steps, seed, lr):
        return sae_lens(h, d_sae, k, 0.0, math.ceil(steps / (len(h) // 256)), lr=lr, seed=seed)

    def ours(steps, seed):
        return S.train_sae(h, d_sae, k, epochs=1, min_steps=steps, seed=seed)

    return {
        "SAELens, learning rate 1e-3": partial(lens, lr=1e-3),
        "SAELens, learning rate 1e-2": partial(lens, lr=1e-2),
        "train_sae": ours,
    }


def score(sae, h) -> dict:
    with torch.no_grad():
        z = sae.encode(h)
        fvu = (sae.decode(z) - h).square().sum() / (h - h.mean(0)).square().sum()
    return {"fvu": fvu.item(), "dead": 1 - (z > 0).any(0).float().mean().item()}


def print_table(rows: list[dict], layers: list[str], steps: list[int]) -> None:
    """A line for each variant, a cell for each layer and number of steps: FVU / dead."""
    places = [(layer, n) for layer in layers for n in steps]
    means = {}
    for row in rows:
        means.setdefault((row["variant"], row["layer"], row["steps"]), []).append(row)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    print("| | " + " | ".join(f"{layer}, {n}" for layer, n in places) + " |")
    print("|" + "---|" * (1 + len(places)))
    for name in names:
        cells = []
        for layer, n in places:
            group = means.get((name, layer, n), [])
            cells.append("")
            if group:
                fvu, dead = (np.mean([row[key] for row in group]) for key in ("fvu", "dead"))
                cells[-1] = f"{fvu:.4f} / {dead:.2f}"
        print(f"| {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["variants", "sae-lens"])
    layers = ["EfficientNet", "CNN, MNIST", "MLP relu1", "MLP relu2", "CNN, Fashion-MNIST"]
    parser.add_argument("--layers", nargs="+", default=layers, choices=layers)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--fashion-dir", default="fashion")
    parser.add_argument("--features", default="features.npz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {
        (row["variant"], row["layer"], row["steps"], row["seed"]) for row in report.rows_of(PATH)
    }
    shown = set()
    for name in args.layers:
        h, held_out, d_sae, k = layer_of(args, name)
        makers = makers_of(args.what, h, d_sae, k)
        shown |= makers.keys()
        for variant, make in makers.items():
            for steps in args.steps:
                for seed in args.seeds:
                    if (variant, name, steps, seed) not in done:
                        row = {"variant": variant, "layer": name, "steps": steps, "seed": seed}
                        sae = make(steps=steps, seed=seed)
                        report.keep(PATH, row | score(sae, held_out))
                        print(row, flush=True)
    rows = [row for row in report.rows_of(PATH) if row["variant"] in shown]
    rows = [row for row in rows if row["seed"] in args.seeds and row["layer"] in args.layers]
    print_table(rows, args.layers, args.steps)


if __name__ == "__main__":
    main()
