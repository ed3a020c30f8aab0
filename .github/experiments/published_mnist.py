"""The published MNIST recipe, rebuilt: where do its figures lie among seeds?

    export PYTHONPATH=. OMP_NUM_THREADS=1
    python .github/experiments/published_mnist.py --targets none --seeds 0 1 2 3 4 5 6 7 8 9
    python .github/experiments/published_mnist.py --targets own published
    python .github/experiments/published_mnist.py --targets own published --top-k 256
    python .github/experiments/published_mnist.py --targets own published --select

The recipe is that of https://github.com/Alex-Bishka/SAE-ception at 4005130 (main.py, sae_train.py,
gen_targets.py, cluster_metrics.py), in a loop of its own; of saeception.py only the data, the
choice of a class's features and the metrics are used. A cycle: the seed's first networks again; a
cosine loss towards targets from the networks of the cycle before; an SAE that learns beside the
classifier; of 20 epochs the one with the best validation accuracy. Here the order of the batches
is the seed's too, so that a cycle differs from the baseline, which is cycle 0, in its targets
alone: the baseline is the control.

M networks train side by side, and none sees another: a step of ten takes three times as long as a
step of one. Only the rounding depends on M, but 20 epochs make .014 of silhouette of it (seed 0,
cycle 1). Rows go to runs/published_mnist.jsonl and networks to runs/published_mnist/, from which a
run that was stopped goes on.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saeception as S

PATH = "runs/published_mnist.jsonl"
FOLDER = "runs/published_mnist"  # of the trained networks

# Their recipe
HIDDEN = 16  # units of each hidden layer
D_SAE = 256
EPOCHS = 20
BATCH_SIZE = 64
LR = 1e-3  # of Adam, for the classifier and for the SAE
L1 = 0.75  # weight of the mean of |z| over batch and features
WEIGHTS = [percent / 100 for percent in range(1, 31)]  # of the auxiliary loss, that they tried
WEIGHT = 0.14  # ours: from the middle of those that they tried

# Their table for MNIST, cycles 0 to 3; with all 256 features kept there are silhouettes only.
PUBLISHED = {
    25: {
        "silhouette": [0.258, 0.265, 0.287, 0.258],
        "davies_bouldin": [1.371, 1.302, 1.324, 1.404],
        "calinski_harabasz": [1819, 1667, 1752, 1558],
        "adjusted_rand": [0.259, 0.372, 0.434, 0.281],
    },
    256: {"silhouette": [0.258, 0.202, 0.226, 0.216]},
}

FIELDS = {  # of a row: heading, digits
    "accuracy": ("accuracy", 4), "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 3),
    "calinski_harabasz": ("CH z", 0), "adjusted_rand": ("ARI z", 3),
    "class_selectivity": ("sel. z", 3), "uncertainty": ("U z", 3),
    "h_silhouette": ("silhouette h", 3),
}  # fmt: skip


# --- The recipe -----------------------------------------------------------------------------------


class SideBySide(nn.Module):
    """The same layer of each of M networks: [M, B, d_in] -> [M, B, d_out]."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        weights = [layer.weight.detach().T for layer in layers]
        biases = [layer.bias.detach() for layer in layers]
        self.weight = nn.Parameter(torch.stack(weights))  # (M, d_in, d_out)
        self.bias = nn.Parameter(torch.stack(biases)[:, None])  # (M, 1, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Networks(nn.Module):
    """For each seed a classifier 784-16-16-10 and the SAE of its first hidden layer h. All layers
    have torch's default start; the SAE centres nothing and has no norms. Sets torch's seed."""

    def __init__(self, seeds: list[int]):
        super().__init__()
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            classifier = [nn.Linear(784, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 10)]
            sae = [nn.Linear(HIDDEN, D_SAE), nn.Linear(D_SAE, HIDDEN)]
            networks.append(classifier + sae)
        layers = [SideBySide(layer) for layer in zip(*networks, strict=True)]
        self.fc1, self.fc2, self.fc3, self.encoder, self.decoder = layers

    def h(self, x: Tensor) -> Tensor:  # (M, B, 784) -> (M, B, 16)
        return F.relu(self.fc1(x))

    def logits(self, h: Tensor) -> Tensor:  # (M, B, 16) -> (M, B, 10)
        return self.fc3(F.relu(self.fc2(h)))

    def z(self, h: Tensor) -> Tensor:  # (M, B, 16) -> (M, B, 256)
        return F.relu(self.encoder(h))


def load(data_dir: str, pixels: int) -> dict:
    """50,000 images to train on, 10,000 for validation, 10,000 to test: [N, 784], y. Their pixels
    go from 0 to `pixels`: 255 leaves them as they are in the files."""
    splits, _ = S.load_data("mnist", data_dir)
    scale = pixels / 255
    return {split: (images.flatten(1) * scale, y) for split, (images, y) in splits.items()}


@torch.no_grad()
def accuracy(networks: Networks, x: Tensor, y: Tensor) -> Tensor:
    """Of each network, [M]."""
    m = len(networks.fc1.weight)
    logits = networks.logits(networks.h(x.expand(m, *x.shape)))
    return (logits.argmax(2) == y).double().mean(1)


def train(
    networks: Networks,  # trained in place
    splits: dict,
    seeds: list[int],  # of the order of each network's batches
    targets: Tensor | None = None,  # (M, N, 16). None: the task alone
    weights: Tensor | None = None,  # (M,), of the auxiliary loss
) -> list[int]:
    """Gives for each network the epoch with the best validation accuracy; in the end the network
    is what it was after this epoch."""
    x, y = splits["train"]
    m = len(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # Adam treats each number by itself, so that one optimiser does for all networks.
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR, fused=True)
    best_accuracy, best_epoch = torch.zeros(m, dtype=torch.double), torch.zeros(m, dtype=torch.long)
    best_state = copy.deepcopy(networks.state_dict())
    network = torch.arange(m)[:, None]  # (M, 1)
    for epoch in range(1, EPOCHS + 1):
        orders = [torch.randperm(len(x), generator=generator) for generator in generators]
        for index in torch.stack(orders).split(BATCH_SIZE, dim=1):  # (M, B)
            h = networks.h(x[index])  # (M, B, 16)
            logits = networks.logits(h)  # (M, B, 10)
            cross_entropy = F.cross_entropy(logits.flatten(0, 1), y[index].flatten())
            loss = m * cross_entropy  # m times the mean over all: the sum of the networks' losses
            if targets is not None:
                similarity = F.cosine_similarity(h, targets[network, index], dim=2)  # (M, B)
                aux = (1 - similarity).mean(1)  # (M,)
                loss = loss + (weights * aux).sum()
            h = h.detach()  # the SAE learns from h and does not change it
            z = networks.z(h)  # (M, B, 256), none below zero
            reconstruction = F.mse_loss(networks.decoder(z), h)
            sae_loss = m * (reconstruction + L1 * z.mean())
            optimizer.zero_grad()
            (loss + sae_loss).backward()
            optimizer.step()
        val_accuracy = accuracy(networks, *splits["val"])
        better = val_accuracy > best_accuracy  # (M,)
        best_accuracy[better] = val_accuracy[better]
        best_epoch[better] = epoch
        for name, value in networks.state_dict().items():
            best_state[name][better] = value[better]
    networks.load_state_dict(best_state)
    return best_epoch.tolist()


@torch.no_grad()
def make_targets(network: Networks, splits: dict, kind: str, top_k: int, seed: int) -> Tensor:
    """Targets [N, 16] of the training images, decoded from the features that their class keeps:
    from an image's own features or, as published, from those of another image. M is 1."""
    x, y = splits["train"]
    z = network.z(network.h(x[None]))[0]  # (N, 256)
    if kind == "published":
        # Their loader shuffles the images whose z it takes; the labels are in the file's order, and
        # in this order the targets are used. So z is another image's from here on.
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
        z = z[order]
    mask = S.class_top_k(z, y, 10, top_k)  # (10, 256)
    kept = z * mask[y]
    return network.decoder(kept[None])[0]


@torch.no_grad()
def measure(networks: Networks, splits: dict) -> list[dict]:
    """The scores of each network: of the features z and, with h_ in front, of h itself."""
    x, y = splits["test"]
    test_accuracy = accuracy(networks, x, y).tolist()
    val_accuracy = accuracy(networks, *splits["val"]).tolist()
    all_h = networks.h(x.expand(len(test_accuracy), *x.shape))  # (M, N, 16)
    all_z = networks.z(all_h)  # (M, N, 256)
    return [
        {
            "accuracy": test_accuracy[i],
            "val_accuracy": val_accuracy[i],
            "silhouette": S.silhouette_score(z, y),
            "davies_bouldin": S.davies_bouldin_score(z, y),
            "calinski_harabasz": S.calinski_harabasz_score(z, y),
            "adjusted_rand": S.adjusted_rand_score(z.argmax(1), y),
            "class_selectivity": S.class_selectivity_index(z, y),
            "uncertainty": S.uncertainty_coefficient(z, y),
            "h_silhouette": S.silhouette_score(h, y),
            "h_davies_bouldin": S.davies_bouldin_score(h, y),
        }
        for i, (h, z) in enumerate(zip(all_h, all_z, strict=True))
    ]


# --- Rows -----------------------------------------------------------------------------------------
# A row starts with what it is of, here called `about`: pixels, targets, top_k, weight, seed, cycle.


def baseline_of(pixels: int, seed: int) -> dict:
    return {
        "pixels": pixels, "targets": "none", "top_k": 0, "weight": 0.0, "seed": seed, "cycle": 0,
    }  # fmt: skip


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in baseline_of(0, 0))


def path_of(about: dict) -> Path:
    name = "-".join(map(str, key_of(about)))
    return Path(FOLDER, f"{name}.pt")


def network_before(about: dict) -> Networks:
    """The trained network of the cycle before."""
    before = about | {"cycle": about["cycle"] - 1}
    if about["cycle"] == 1:
        before = baseline_of(about["pixels"], about["seed"])
    network = Networks([about["seed"]])
    network.load_state_dict(torch.load(path_of(before), weights_only=True))
    return network


def add_rows(splits: dict, wanted: list[dict]) -> None:
    """Train side by side what the file of rows lacks; all of one cycle, later cycles after it."""
    done = {key_of(row) for row in report.rows_of(PATH)}
    wanted = [about for about in wanted if key_of(about) not in done]
    if not wanted:
        return
    seeds = [about["seed"] for about in wanted]
    targets = weights = None
    if wanted[0]["cycle"] > 0:
        weights = torch.tensor([about["weight"] for about in wanted])
        targets = []
        for about in wanted:
            kind = about["targets"], about["top_k"], about["seed"]
            targets.append(make_targets(network_before(about), splits, *kind))
        targets = torch.stack(targets)  # (M, N, 16)
    networks = Networks(seeds)
    best_epochs = train(networks, splits, seeds, targets, weights)
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    for i, scores in enumerate(measure(networks, splits)):
        state = {name: value[i : i + 1].clone() for name, value in networks.state_dict().items()}
        torch.save(state, path_of(wanted[i]))
        row = wanted[i] | {"epoch": best_epochs[i]} | scores
        report.keep(PATH, row)
        print(row, flush=True)


def rows_after(rows: list[dict], job: tuple, cycle: int) -> list[dict]:
    """The rows of a cycle, one for each seed."""
    return [
        row
        for row in rows
        if (row["targets"], row["top_k"], row["weight"]) == job and row["cycle"] == cycle
    ]


# --- Tables ---------------------------------------------------------------------------------------


def mean_and_deviation(values: list[float], digits: int, sign: str = "") -> str:
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def print_line(cells: list) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_heading(cells: list) -> None:
    print_line(cells)
    print("|" + "---|" * len(cells))


def print_cycles(rows: list[dict], jobs: list[tuple], cycles: int) -> None:
    """The published figures, and ours: of the baselines the mean and the range, of each kind of
    targets the mean in each cycle."""
    headings = [heading for heading, _ in FIELDS.values()]
    print_heading(["targets", "features kept", "cycle", "seeds", *headings])
    for top_k, published in PUBLISHED.items():
        for cycle in range(4):
            cells = ["**published: their table**", top_k, cycle, 1]
            for field, (_, digits) in FIELDS.items():
                if field in published:
                    cells.append(f"{published[field][cycle]:.{digits}f}")
                else:
                    cells.append("")
            print_line(cells)
    baselines = [row for row in rows if row["cycle"] == 0]
    mean, spread = ["none: baseline", "", 0, len(baselines)], ["none: least to most", "", 0, ""]
    for field, (_, digits) in FIELDS.items():
        values = [row[field] for row in baselines]
        mean.append(mean_and_deviation(values, digits))
        spread.append(f"{min(values):.{digits}f} to {max(values):.{digits}f}")
    print_line(mean)
    print_line(spread)
    for job in jobs:
        for cycle in range(1, cycles + 1):
            group = rows_after(rows, job, cycle)
            kind, top_k, _ = job
            cells = [kind, top_k, cycle, len(group)]
            for field, (_, digits) in FIELDS.items():
                cells.append(mean_and_deviation([row[field] for row in group], digits))
            print_line(cells)


def print_differences(rows: list[dict], jobs: list[tuple], cycles: int) -> None:
    """A cycle minus the baseline of its seed, and for how many seeds this is above zero."""
    headings = [heading for heading, _ in FIELDS.values()]
    print_heading(["minus its baseline", "features kept", "cycle", "seeds", *headings])
    baselines = {row["seed"]: row for row in rows if row["cycle"] == 0}
    for job in jobs:
        for cycle in range(1, cycles + 1):
            group = rows_after(rows, job, cycle)
            kind, top_k, _ = job
            cells = [kind, top_k, cycle, len(group)]
            for field, (_, digits) in FIELDS.items():
                gains = [row[field] - baselines[row["seed"]][field] for row in group]
                above = sum(gain > 0 for gain in gains)
                cells.append(f"{mean_and_deviation(gains, digits, '+')} ({above} > 0)")
            print_line(cells)


def print_selection(groups: dict[str, list[dict]]) -> None:
    """Of models that differ in one thing: all, the best by test accuracy, validation's choice."""
    headings = ["models", "mean", "least to most", "best by test", "chosen by validation"]
    print_heading(["test accuracy", *headings])
    for name, rows in groups.items():
        values = [row["accuracy"] for row in rows]
        chosen = max(rows, key=lambda row: row["val_accuracy"])
        spread = f"{min(values):.4f} to {max(values):.4f}"
        cells = [name, len(rows), mean_and_deviation(values, 4), spread]
        print_line([*cells, f"{max(values):.4f}", f"{chosen['accuracy']:.4f}"])


# --- Command line ---------------------------------------------------------------------------------


def select(splits: dict, pixels: int, kinds: list[tuple]) -> None:
    """30 models without targets, each of another seed; 30 with targets, each of another weight, all
    of the first seed; and 30 in which both change."""
    seeds = list(range(len(WEIGHTS)))
    first = [0] * len(WEIGHTS)
    baselines = [baseline_of(pixels, seed) for seed in seeds]
    add_rows(splits, baselines)
    groups = {"no targets, seeds 0 to 29": baselines}
    for kind, top_k in kinds:
        for which, of_seeds in (("seed 0", first), ("seeds 0 to 29", seeds)):
            wanted = []
            for seed, weight in zip(of_seeds, WEIGHTS, strict=True):
                job = {"targets": kind, "top_k": top_k, "weight": weight, "cycle": 1}
                wanted.append(baseline_of(pixels, seed) | job)
            add_rows(splits, wanted)
            groups[f"{kind} targets, {top_k} features, weights .01 to .30, {which}"] = wanted
    rows = {key_of(row): row for row in report.rows_of(PATH)}
    groups = {name: [rows[key_of(about)] for about in group] for name, group in groups.items()}
    print_selection(groups)


def main():
    parser = argparse.ArgumentParser()
    option = parser.add_argument
    option("--pixels", type=int, choices=[255, 1], default=255, help="the largest value")
    option("--targets", choices=["published", "own", "none"], nargs="+", default=["published"])
    option("--top-k", type=int, choices=[25, D_SAE], nargs="+", default=[25], help="features kept")
    option("--weight", type=float, default=WEIGHT, help="of the auxiliary loss")
    option("--cycles", type=int, default=3, help="behind the baseline")
    option("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    option("--data-dir", default="data")
    option("--select", action="store_true", help="30 weights against 30 seeds, in one cycle")
    args = parser.parse_args()
    torch.set_num_threads(1)  # in networks as small as these, threads mostly wait for each other
    splits = load(args.data_dir, args.pixels)
    kinds = [(kind, top_k) for top_k in args.top_k for kind in args.targets if kind != "none"]
    if args.select:
        select(splits, args.pixels, kinds)
        return
    add_rows(splits, [baseline_of(args.pixels, seed) for seed in args.seeds])
    jobs = [(kind, top_k, args.weight) for kind, top_k in kinds]
    for cycle in range(1, args.cycles + 1):
        wanted = []
        for kind, top_k, weight in jobs:
            job = {"targets": kind, "top_k": top_k, "weight": weight, "cycle": cycle}
            wanted += [baseline_of(args.pixels, seed) | job for seed in args.seeds]
        add_rows(splits, wanted)
    rows = [
        row
        for row in report.rows_of(PATH)
        if row["pixels"] == args.pixels and row["seed"] in args.seeds
    ]
    print_cycles(rows, jobs, args.cycles)
    if jobs:
        print()
        print_differences(rows, jobs, args.cycles)


if __name__ == "__main__":
    main()
