"""From the published MNIST recipe to this file's default, one change a row: what does each cost or
bring?

    PYTHONPATH=. OMP_NUM_THREADS=1 python .github/experiments/bridge.py

The first hidden layer of the paper's MLP after three cycles, and its control, which differs in its
targets alone. The first three rows are trained by published_mnist.py, the last four by
saeception.py; the last row is `python saeception.py --dataset mnist`. Results go to
runs/bridge.jsonl, from which a run that was stopped goes on.
"""

import argparse

import published_mnist as published
import report
import torch

import saeception as S

PATH, CYCLES = "runs/bridge.jsonl", 3
ARMS = ["control", "sae-ception"]
SAE = {"l1": 0.1, "epochs": 10, "min_steps": 1000}  # as `--dataset mnist` has it
ROWS = [  # what changes against the row before
    "the published recipe",
    "targets of the image itself",
    "pixels from 0 to 1",
    "this file's SAE, after the training",
    "the last epoch's weights, not validation's choice",
    "mean squared error, weight .5, for cosine, weight .14",
    "training on, not starting anew",
    "the default's epochs, batches and rate",
]
# The flags of the rows that saeception.py trains.
LAST = "--baseline-epochs 20 --epochs 20 --batch-size 64 --lr 0.001"
COSINE = "--aux-loss cosine --aux-weight 0.14"
FLAGS = {
    ROWS[4]: f"{LAST} --restart {COSINE}",
    ROWS[5]: f"{LAST} --restart",
    ROWS[6]: LAST,
    ROWS[7]: "",
}
FIELDS = {
    "accuracy": ("accuracy", 4), "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 3),
    "h_silhouette": ("silhouette h", 3), "h_davies_bouldin": ("DB h", 3),
    "h_uncertainty": ("U h", 3),
}  # fmt: skip


def published_rows(data_dir, seeds):
    """The first three rows. With 255 ten baselines train side by side, and then both kinds of
    targets, as for the tables of published_mnist.py: the rounding depends on how many do."""
    for pixels, n_baselines, kinds in ((255, 10, ["own", "published"]), (1, len(seeds), ["own"])):
        splits = published.load(data_dir, pixels)
        baselines = [published.baseline_of(pixels, seed) for seed in range(n_baselines)]
        published.add_rows(splits, baselines)
        for cycle in range(1, CYCLES + 1):
            job = {"top_k": 25, "weight": published.WEIGHT, "cycle": cycle}
            wanted = []
            for kind in kinds:
                for seed in seeds:
                    about = published.baseline_of(pixels, seed) | job | {"targets": kind}
                    wanted.append(about)
            published.add_rows(splits, wanted)
        for about in wanted:  # of the last cycle
            name = ROWS[2]
            if pixels == 255:
                name = ROWS[0] if about["targets"] == "published" else ROWS[1]
            baseline = published.baseline_of(pixels, about["seed"])
            keep(name, "control", published_scores(baseline, splits))
            keep(name, "sae-ception", published_scores(about, splits))


def published_scores(about, splits):
    """The row of a trained network, and U of its h."""
    rows = {published.key_of(row): row for row in report.rows_of(published.PATH)}
    network = published.Networks([about["seed"]])
    network.load_state_dict(torch.load(published.path_of(about), weights_only=True))
    (h,), y = h_of(network, splits["test"]), splits["test"][1]
    return report.unit_scores(h, y) | rows[published.key_of(about)]


@torch.no_grad()
def h_of(networks, split):
    x, _ = split
    return networks.h(x.expand(len(networks.fc1.weight), *x.shape))  # (M, N, 16)


def row_with_own_sae(data_dir, seeds):
    """The published loop, with an SAE of saeception.py on the h of the trained networks. The one
    that learns beside the classifier is not used; the classifier does not depend on it."""
    splits = published.load(data_dir, 1)
    y, y_test = splits["train"][1], splits["test"][1]
    weights = torch.full((len(seeds),), published.WEIGHT)
    targets = None
    for cycle in range(CYCLES + 1):
        networks = published.Networks(seeds)
        published.train(networks, splits, seeds, targets, weights)
        targets = []
        for seed, h, h_test, row in zip(
            seeds, h_of(networks, splits["train"]), h_of(networks, splits["test"]),
            published.measure(networks, splits), strict=True,
        ):  # fmt: skip
            sae = S.train_sae(h, published.D_SAE, seed=1000 * seed + cycle, **SAE)
            targets.append(S.sharpened_targets(sae, h, y, 10, 25))
            z = sae.encode(h_test)
            row |= report.unit_scores(h_test, y_test) | {"seed": seed}
            row["silhouette"] = S.silhouette_score(z, y_test)
            row["davies_bouldin"] = S.davies_bouldin_score(z, y_test)
            if cycle == 0:  # the same weights and batches: the baseline is the control
                keep(ROWS[3], "control", row)
            elif cycle == CYCLES:
                keep(ROWS[3], "sae-ception", row)
        targets = torch.stack(targets)


def own_rows(data_dir, seeds):
    controls = {}  # the control does not depend on the loss
    for name, flags in FLAGS.items():
        splits, make_model, layer, options = report.program(
            f"--dataset mnist --data-dir {data_dir} --cycles {CYCLES} {flags}"
        )
        for seed in seeds:
            if is_done(name, [seed]):
                continue
            here = make_model(seed), layer, splits["train"], splits["test"]
            key = flags.replace(COSINE, "").strip(), seed
            if key not in controls:
                *_, controls[key] = S.saeception(
                    *here, **options | {"arms": {"control": None}}, seed=seed
                )
            *_, state = S.saeception(*here, **options, seed=seed, state=controls[key])
            for row in state["rows"]:
                if row["cycle"] == CYCLES:
                    keep(name, row["arm"], row)


def is_done(name, seeds):
    rows = report.rows_of(PATH)
    return all(
        any((row["row"], row["arm"], row["seed"]) == (name, arm, seed) for row in rows)
        for seed in seeds for arm in ARMS
    )  # fmt: skip


def keep(name, arm, row):
    """A row of the bridge, unless it is there."""
    row = {"row": name, "arm": arm, "seed": row["seed"]} | {key: row[key] for key in FIELDS}
    if row not in report.rows_of(PATH):
        report.keep(PATH, row)
        print(row, flush=True)


def table(rows):
    """Of each row of the bridge the two arms, the better one bold, and their difference, with the
    number of seeds for which it is above zero."""
    headings = [heading for heading, _ in FIELDS.values()]
    published.print_heading(["", "arm", *headings])
    for name in ROWS:
        of_arm = {
            arm: {row["seed"]: row for row in rows if (row["row"], row["arm"]) == (name, arm)}
            for arm in ARMS
        }
        for arm, by_seed in of_arm.items():
            cells = [name if arm == ARMS[0] else "", arm]
            other = of_arm[ARMS[1 - ARMS.index(arm)]]
            for key, (_, digits) in FIELDS.items():
                values = [row[key] for row in by_seed.values()]
                text = published.mean_and_deviation(values, digits)
                gain = sum(values) - sum(row[key] for row in other.values())
                if gain * report.BETTER[key] > 0:
                    text = f"**{text}**"
                cells.append(text)
            published.print_line(cells)
        cells = ["", "difference"]
        for key, (_, digits) in FIELDS.items():
            control, ours = (of_arm[arm] for arm in ARMS)
            gains = [ours[seed][key] - control[seed][key] for seed in control]
            text = published.mean_and_deviation(gains, digits, "+")
            cells.append(f"{text} ({sum(gain > 0 for gain in gains)} > 0)")
        published.print_line(cells)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not all(is_done(name, args.seeds) for name in ROWS[:3]):
        published_rows(args.data_dir, args.seeds)
    if not is_done(ROWS[3], args.seeds):
        row_with_own_sae(args.data_dir, args.seeds)
    own_rows(args.data_dir, args.seeds)
    table([row for row in report.rows_of(PATH) if row["seed"] in args.seeds])


if __name__ == "__main__":
    main()
