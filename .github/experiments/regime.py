"""Where does it work? The gain over the control for networks that know more or less, and for
networks that differ in one thing each.

    PYTHONPATH=. python .github/experiments/regime.py epochs     # 1 to 16 epochs of the baseline
    PYTHONPATH=. python .github/experiments/regime.py networks   # width, LayerNorm, convolutions

`epochs` takes MNIST from --data-dir and Fashion-MNIST, in MNIST's format, from --fashion-dir.
Results go to runs/regime-<what>.jsonl, from which a run that was stopped goes on.
"""

import argparse

import report
import torch
from PIL import Image, ImageDraw, ImageFont

import saeception as S

SEEDS, CYCLES = range(3), 2
EPOCHS = (1, 2, 4, 8, 16)
NETWORKS = [
    "cnn", "cnn, 16 units", "cnn, ReLU for LayerNorm", "cnn, no LayerNorm",
    "mlp 784-64-64-10, LayerNorm", "mlp 784-64-64-10, ReLU",
    "mlp 784-16-16-10, LayerNorm", "mlp 784-16-16-10, ReLU",
]  # fmt: skip


def one(splits, seed, about, path):
    """Cycles of one network; `about` says which, and is kept in the rows."""
    torch.manual_seed(seed)
    model, layer = report.small_network(about["network"])
    *_, state = S.saeception(
        model, layer, splits["train"], splits["test"], 512, cycles=CYCLES, seed=seed,
        baseline_epochs=about["epochs"], fit_options={"epochs": 2, "lr": 5e-4},
        sae_options={"l1": about["l1"], "epochs": 1, "min_steps": 500},
        arms={arm: S.ARMS[arm] for arm in ("sae-ception", "control")},
    )  # fmt: skip
    for row in state["rows"]:
        if row["cycle"] in (0, CYCLES):
            report.keep(path, row | about)
            print(about, row["arm"], f"{row['silhouette']:.3f}", flush=True)


def draw(rows, path):
    """The gain in the silhouette of h over the accuracy of the baseline, a dot for each seed."""
    side, font = 480, ImageFont.load_default(size=16)
    image = Image.new("RGB", (side + 90, side + 80), "white")
    draw = ImageDraw.Draw(image)
    value = {(r["data"], r["epochs"], r["seed"], r["arm"]): r for r in rows}
    points = []
    for data, epochs, seed, arm in value:
        if arm == "sae-ception":
            ours, control = (value[data, epochs, seed, a] for a in (arm, "control"))
            known = value[data, epochs, seed, "baseline"]["accuracy"]
            points.append((data, known, ours["h_silhouette"] - control["h_silhouette"]))
    low, high = min(p[1] for p in points) - 0.01, 1.0
    top = max(0.01, *(p[2] for p in points)) * 1.1
    bottom = min(0.0, *(p[2] for p in points)) * 1.1

    def place(accuracy, gain):
        x = 70 + (accuracy - low) / (high - low) * (side - 20)
        return x, 20 + (top - gain) / (top - bottom) * side

    draw.line((*place(low, 0), *place(high, 0)), fill="grey")
    draw.line((*place(low, top), *place(low, bottom)), fill="grey")
    for i in range(5):
        accuracy, gain = low + (high - low) * i / 4, bottom + (top - bottom) * i / 4
        draw.text((place(accuracy, 0)[0] - 20, side + 28), f"{accuracy:.2f}", "black", font)
        draw.text((15, place(low, gain)[1] - 10), f"{gain:.2f}", "black", font)
    for data, accuracy, gain in points:
        x, y = place(accuracy, gain)
        colour = "royalblue" if data == "MNIST" else "firebrick"
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    draw.text((90, side + 52), "accuracy of the baseline", "black", font)
    draw.text((320, side + 52), "MNIST", "royalblue", font)
    draw.text((390, side + 52), "Fashion-MNIST", "firebrick", font)
    draw.text((80, 0), "silhouette of h, sae-ception minus control", "black", font)
    image.save(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["epochs", "networks"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--fashion-dir", default="fashion")
    parser.add_argument("--l1", type=float, default=1.0, help="of the SAEs")
    parser.add_argument("--networks", default=NETWORKS, choices=NETWORKS, nargs="+")
    args = parser.parse_args()
    path = f"runs/regime-{args.what}.jsonl"
    if args.what == "epochs":
        places = {"MNIST": args.data_dir, "Fashion-MNIST": args.fashion_dir}
        jobs = [(data, "cnn", e, seed) for data in places for e in EPOCHS for seed in SEEDS]
    else:
        places = {"MNIST": args.data_dir}
        jobs = [("MNIST", network, 8, seed) for network in args.networks for seed in SEEDS]
    splits = {data: report.inputs("mnist", place) for data, place in places.items()}
    keys = ("data", "network", "epochs", "l1", "seed")
    done = [tuple(row[key] for key in keys) for row in report.rows_of(path)]
    for data, network, epochs, seed in jobs:
        if (data, network, epochs, args.l1, seed) not in done:
            about = {"data": data, "network": network, "epochs": epochs, "l1": args.l1}
            one(splits[data], seed, about, path)
    rows = [row for row in report.rows_of(path) if row["l1"] == args.l1]
    by = ["data", "epochs"] if args.what == "epochs" else ["network"]
    report.markdown(rows, [*by, "arm"], compare=("sae-ception", "control"))
    if args.what == "epochs":
        draw(rows, "runs/regime.png")


if __name__ == "__main__":
    main()
