"""Which weight, how many features for each class, which SAE, which loss? Chosen on validation
images; the test images are not looked at.

    export PYTHONPATH=. OMP_NUM_THREADS=1
    python .github/experiments/choices.py relu1    # the paper's MLP on MNIST
    python .github/experiments/choices.py digits

Each choice changes one thing in the defaults of the network and goes on from the same baseline.
`points`: the accuracy minus the control's, in percentage points. Results go to runs/choices.jsonl,
from which a run that was stopped goes on.
"""

import argparse

import report

import saeception as S

PATH = "runs/choices.jsonl"
SETTINGS = {
    "digits": "--dataset digits",
    "mnist": "--dataset mnist --arch cnn",
    "relu1": "--dataset mnist --layer relu1",
    "relu2": "--dataset mnist --layer relu2",
}
CHOICES = {  # the control first: the others are compared with it
    "control": "--arms control",
    "weight 0.25": "--aux-weight 0.25",
    "weight 0.5": "--aux-weight 0.5",
    "weight 1": "--aux-weight 1",
    "weight 2": "--aux-weight 2",
    "top-k 10": "--top-k 10",
    "top-k 50": "--top-k 50",
    "top-k 100": "--top-k 100",
    "all features": "--arms unsharpened",
    "cosine": "--aux-loss cosine",
    "TopK SAE: control": "--sae topk --arms control",
    "TopK SAE": "--sae topk",
}

FIELDS = {
    "accuracy": ("accuracy", 4), "points": ("points", 2), "h_silhouette": ("silhouette h", 3),
    "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 2),
    "h_uncertainty": ("U h", 3), "uncertainty": ("U z", 3), "l0": ("L0", 1), "fvu": ("FVU", 3),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    done = {(row["setting"], row["choice"], row["seed"]) for row in report.rows_of(PATH)}
    baselines = {}  # by seed and kind of SAE
    for name, flags in CHOICES.items():
        flags = f"--arms sae-ception --data-dir {args.data_dir} {SETTINGS[args.setting]} {flags}"
        splits, make_model, layer, options = report.program(flags)
        for seed in args.seeds:
            if (args.setting, name, seed) in done:
                continue
            here = (make_model(seed), layer, splits["train"], splits["val"])
            key = seed, options["sae_k"]
            if key not in baselines:
                baselines[key] = next(S.saeception(*here, **options, seed=seed))
            *_, state = S.saeception(*here, **options, seed=seed, state=baselines[key])
            row = state["rows"][-1] | {"setting": args.setting, "choice": name}
            report.keep(PATH, row)
            print(name, seed, f"{row['h_silhouette']:.3f}", flush=True)
    rows = [row for row in report.rows_of(PATH) if row["setting"] == args.setting]
    controls = {row["seed"]: row for row in rows if row["choice"] == "control"}
    for row in rows:
        row["points"] = 100 * (row["accuracy"] - controls[row["seed"]]["accuracy"])
    rows.sort(key=lambda row: list(CHOICES).index(row["choice"]))
    report.markdown(rows, ["choice"], FIELDS)


if __name__ == "__main__":
    main()
