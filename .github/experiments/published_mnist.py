"""The published MNIST runs, rebuilt: what do their rows say?

    PYTHONPATH=. python .github/experiments/published_mnist.py --cycles 0 --n-seeds 10
    PYTHONPATH=. python .github/experiments/published_mnist.py --targets own published
    PYTHONPATH=. python .github/experiments/published_mnist.py --select

The recipe is that of https://github.com/Alex-Bishka/SAE-ception at 4005130 (main.py, sae_train.py,
gen_targets.py, cluster_metrics.py): an MLP 784-16-16-10; an SAE that trains beside it on each
batch's first hidden layer; in each cycle the first weights again, now with a cosine loss towards
targets from the cycle before; of 20 epochs the one with the best validation accuracy. Only the
metrics, the data and the choice of features per class are those of saeception.py.

--pixels: 255 leaves them as they are in the files, which fits the published rows; 1 divides by 255.
--targets: "own", an image's target is decoded from its own features; "published", from those of
another image, as gen_targets.py does it, which reads features in shuffled and labels in unshuffled
order. --select: 30 models with targets, of weights .01 to .30, and 30 without, of 30 seeds.
Rows go to runs/published_mnist.jsonl, from which a run that was stopped goes on.
"""

import argparse
import copy

import numpy as np
import report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saeception as S

PATH = "runs/published_mnist.jsonl"
EPOCHS, BATCH, LR, L1, D_SAE = 20, 64, 1e-3, 0.75, 256
PUBLISHED = {  # the paper's table for MNIST, cycles 0 to 3
    "silhouette": [0.258, 0.265, 0.287, 0.258],
    "davies_bouldin": [1.371, 1.302, 1.324, 1.404],
    "calinski_harabasz": [1819, 1667, 1752, 1558],
    "adjusted_rand": [0.259, 0.372, 0.434, 0.281],
}
FIELDS = {
    "accuracy": ("accuracy", 4), "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 3),
    "calinski_harabasz": ("CH z", 0), "adjusted_rand": ("ARI", 3), "uncertainty": ("U z", 3),
    "class_selectivity": ("sel. z", 3), "h_silhouette": ("silhouette h", 3),
}  # fmt: skip


class PublishedSAE(nn.Module):
    """Two linear layers with torch's default start: no centring, no norms."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, D_SAE), nn.Linear(D_SAE, 16)

    def encode(self, h: Tensor) -> Tensor:
        return F.relu(self.encoder(h))


def first_weights(seed: int) -> tuple[nn.Sequential, PublishedSAE]:
    torch.manual_seed(seed)
    layers = [nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers), PublishedSAE()


def load(data_dir: str, pixels: int) -> dict:
    """50,000, 10,000 and 10,000 images [N, 784], with pixels from 0 to 255 or to 1."""
    splits, _ = S.load_data("mnist", data_dir)
    return {
        name: (images.flatten(1).float() * (pixels / 255), y)
        for name, (images, y) in splits.items()
    }


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train(splits: dict, seed: int, targets: Tensor | None = None, weight: float = 0.0) -> tuple:
    """Model, SAE and validation accuracy of the best epoch; the start is that of the seed."""
    x, y = splits["train"]
    model, sae = first_weights(seed)
    update = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    update_sae = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    best = (None, None, -1.0)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            h = model[:2](x[index])
            loss = F.cross_entropy(model[2:](h), y[index])
            if targets is not None:
                loss = loss + weight * (1 - F.cosine_similarity(h, targets[index])).mean()
            update.zero_grad()
            loss.backward()
            update.step()
            h = h.detach()
            z = sae.encode(h)
            loss = F.mse_loss(sae.decoder(z), h) + L1 * z.abs().mean()
            update_sae.zero_grad()
            loss.backward()
            update_sae.step()
        val_accuracy = accuracy(model, *splits["val"])
        if val_accuracy > best[2]:
            best = (copy.deepcopy(model), copy.deepcopy(sae), val_accuracy)
    return best


@torch.no_grad()
def make_targets(model, sae, splits: dict, kind: str, top_k: int, seed: int) -> Tensor:
    x, y = splits["train"]
    z = sae.encode(model[:2](x))
    if kind == "published":  # from here on, row i is another image's; y is not shuffled
        z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))]
    mask = S.class_top_k(z, y, 10, top_k)
    return sae.decoder(S.sharpen(z, y, mask))


@torch.no_grad()
def measure(model, sae, splits: dict) -> dict:
    x, y = splits["test"]
    h = model[:2](x)
    z = sae.encode(h)
    return {
        "accuracy": accuracy(model, x, y),
        "silhouette": S.silhouette_score(z, y),
        "davies_bouldin": S.davies_bouldin_score(z, y),
        "calinski_harabasz": S.calinski_harabasz_score(z, y),
        "adjusted_rand": S.adjusted_rand_score(z.argmax(1), y),
        "uncertainty": S.uncertainty_coefficient(z, y),
        "class_selectivity": S.class_selectivity_index(z, y),
        "h_silhouette": S.silhouette_score(h, y),
        "h_davies_bouldin": S.davies_bouldin_score(h, y),
    }


def keep(model, sae, val_accuracy, splits, about: dict) -> None:
    row = about | {"val_accuracy": val_accuracy} | measure(model, sae, splits)
    report.keep(PATH, row)
    print(about, f"accuracy {row['accuracy']:.4f}, silhouette {row['silhouette']:.3f}", flush=True)


def run(splits: dict, pixels: int, seed: int, jobs: list, cycles: int) -> None:
    """A baseline and, for each job (kind of targets, top_k, weight), its cycles."""
    about = {"seed": seed, "pixels": pixels}
    done = {
        (row["targets"], row["top_k"], row["weight"], row["cycle"])
        for row in report.rows_of(PATH)
        if (row["seed"], row["pixels"]) == (seed, pixels)
    }
    jobs = [job for job in jobs if (*job, cycles) not in done]
    if ("none", 0, 0.0, 0) in done and (not jobs or cycles == 0):
        return
    baseline = train(splits, seed)
    if ("none", 0, 0.0, 0) not in done:
        none = {"targets": "none", "top_k": 0, "weight": 0.0, "cycle": 0}
        keep(*baseline, splits, about | none)
    for kind, top_k, weight in jobs:
        model, sae, _ = baseline
        for cycle in range(1, cycles + 1):
            targets = make_targets(model, sae, splits, kind, top_k, seed)
            model, sae, val_accuracy = train(splits, seed, targets, weight)
            if (kind, top_k, weight, cycle) not in done:
                job = {"targets": kind, "top_k": top_k, "weight": weight, "cycle": cycle}
                keep(model, sae, val_accuracy, splits, about | job)


def print_selection(rows: list[dict], weights: list[float]) -> None:
    """Best, mean, and validation's choice of models with targets and of models without."""
    rows = [row for row in rows if row["pixels"] == 255]
    groups = {
        "with targets, seed 0, weights .01 to .30": [
            row for row in rows
            if row["targets"] == "own" and row["top_k"] == 25 and row["cycle"] == 1
            and row["seed"] == 0 and row["weight"] in weights
        ],
        "without, seeds 0 to 29": [
            row for row in rows if row["targets"] == "none" and row["seed"] < len(weights)
        ],
    }  # fmt: skip
    print("| test accuracy of | models | mean | std | best by test | chosen by validation |")
    print("|---|---|---|---|---|---|")
    for name, group in groups.items():
        test = np.array([row["accuracy"] for row in group])
        chosen = max(group, key=lambda row: row["val_accuracy"])["accuracy"]
        print(
            f"| {name} | {len(group)} | {test.mean():.4f} | {test.std(ddof=1):.4f} "
            f"| {test.max():.4f} | {chosen:.4f} |"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pixels", type=int, choices=[255, 1], default=255)
    parser.add_argument("--targets", choices=["own", "published"], nargs="+", default=["own"])
    parser.add_argument("--top-k", type=int, nargs="+", default=[25])
    parser.add_argument("--weight", type=float, default=0.14)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--n-seeds", type=int, help="seeds 0 to N - 1, in the place of --seeds")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--select", action="store_true")
    args = parser.parse_args()
    if args.n_seeds:
        args.seeds = list(range(args.n_seeds))
    torch.set_num_threads(1)  # for networks as small as these more only wait for each other
    splits = load(args.data_dir, args.pixels)
    if args.select:
        weights = [i / 100 for i in range(1, 31)]
        run(splits, 255, 0, [("own", 25, weight) for weight in weights], cycles=1)
        for seed in range(1, len(weights)):
            run(splits, 255, seed, [], cycles=0)
        print_selection(report.rows_of(PATH), weights)
        return
    jobs = [(kind, top_k, args.weight) for kind in args.targets for top_k in args.top_k]
    for seed in args.seeds:
        run(splits, args.pixels, seed, jobs, args.cycles)
    rows = []
    for row in report.rows_of(PATH):
        job = (row["targets"], row["top_k"], row["weight"])
        if row["seed"] in args.seeds and row["pixels"] == args.pixels:
            if row["cycle"] <= args.cycles and (row["cycle"] == 0 or job in jobs):
                rows.append(row)
    rows.sort(
        key=lambda row: (row["targets"] != "none", row["targets"], row["top_k"], row["cycle"])
    )
    names = [name for name, _ in FIELDS.values()]
    print("| targets | top_k | cycle | seeds | " + " | ".join(names) + " |")
    print("|" + "---|" * (4 + len(names)))
    for cycle in range(min(args.cycles, 3) + 1):
        cells = []
        for key, (_, digits) in FIELDS.items():
            if key in PUBLISHED:
                cells.append(f"{PUBLISHED[key][cycle]:.{digits}f}")
            else:
                cells.append("")
        print(f"| in the paper | 25 | {cycle} | 1 | " + " | ".join(cells) + " |")
    report.markdown(rows, ["targets", "top_k", "cycle"], FIELDS, heading=False)


if __name__ == "__main__":
    main()
