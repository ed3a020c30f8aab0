"""How monosemantic are the units of h, by which measure, and how good are the SAEs?

    export PYTHONPATH=. OMP_NUM_THREADS=1
    python .github/experiments/units.py made            # units made by hand
    python .github/experiments/units.py features.npz    # targets, as pretrained.py's features
    python .github/experiments/units.py runs/NAME       # a run of a small network that is done

Of a run the last network and SAE of each arm are measured on the test images. `floor`: the smallest
class mean of a unit as a share of its largest. `shared`: the share of classes whose strongest
feature, by mean, is the strongest of another class, too.
"""

import argparse
from pathlib import Path

import numpy as np
import report
import torch

import saeception as S

CLASSES = 10
SAE_FIELDS = {
    "fvu": ("FVU", 3), "l0": ("L0", 1), "dead": ("dead", 3), "uncertainty": ("U z", 3),
    "class_selectivity": ("sel. z", 3), "shared": ("shared", 3),
}  # fmt: skip


def made_units():
    """Units that are for one to five of ten classes: in these 1 plus noise, else noise alone, which
    has a standard deviation of .1; and the same units, raised by a constant of .3."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat(1000)
    rows = []
    for n in range(1, 6):
        noise = 0.1 * torch.randn(len(y), 1, generator=generator)
        for floor in (0.0, 0.3):
            h = (y < n)[:, None] + noise + floor
            rows.append({"classes": n, "raised by": floor} | report.unit_scores(h, y))
    report.markdown(rows, ["classes", "raised by"], report.UNIT_FIELDS)


def targets_of(path):
    """Units of targets that are made of pooled features of EfficientNet, none of them negative."""
    data = np.load(path)
    h, y = torch.from_numpy(data["x_train"]).float(), torch.from_numpy(data["y_train"]).long()
    sae = S.train_sae(h, 4 * h.shape[1], min_steps=1000)
    targets = {"h itself": h, "unsharpened": S.reconstructed_targets(sae, h, y, CLASSES, 0)}
    for top_k in (1000, 100, 25, 5):
        targets[f"sharpened, k {top_k}"] = S.sharpened_targets(sae, h, y, CLASSES, top_k)
    targets["class mean"] = S.class_mean_targets(sae, h, y, CLASSES, 0)
    rows = [{"target": name} | report.unit_scores(units, y) for name, units in targets.items()]
    report.markdown(rows, ["target"], report.UNIT_FIELDS)


def shared(z, y):
    """The share of classes whose strongest feature is that of another class, too."""
    strongest = S.class_mean(z, y, CLASSES).argmax(1)  # (C,)
    return (strongest.bincount()[strongest] > 1).float().mean().item()


def of_run(folder):
    """A row for each arm and seed."""
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    args = argparse.Namespace(**checkpoint["config"])
    splits, names = S.load_data(args.dataset, args.data_dir, args.limit)
    x, y = splits["test"]
    rows = []
    for seed, state in checkpoint["states"].items():
        _, model = S.build(args, len(names), seed)
        for arm in ["baseline", *args.arms]:
            last = [row for row in state["rows"] if row["arm"] == arm][-1]
            net, sae = S.restore(model, state, arm)
            h, _ = S.activations(net, args.layer, x)
            scores = report.unit_scores(h, y) | {"shared": shared(sae.encode(h), y)}
            rows.append(last | scores)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", help="made, features.npz, or the folder of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "made":
        made_units()
        return
    if args.what.endswith(".npz"):
        targets_of(args.what)
        return
    rows = of_run(args.what)
    rows.sort(key=lambda row: row["cycle"])
    report.markdown(rows, ["cycle", "arm"], report.UNIT_FIELDS, tuple(S.ARMS))
    print()
    report.markdown(rows, ["cycle", "arm"], SAE_FIELDS, tuple(S.ARMS))


if __name__ == "__main__":
    main()
