"""Which layer? The method on each hidden layer of a small network, MNIST, and what it does to the
layers above.

    PYTHONPATH=. OMP_NUM_THREADS=1 python .github/experiments/layers.py cnn
    PYTHONPATH=. OMP_NUM_THREADS=1 python .github/experiments/layers.py mlp

All settings but the layer, and l1 at the convolutions, are those of `--dataset mnist --arch cnn` or
`mlp`. A row of the table is a layer after three cycles that had their targets at the layer `targets
at`; the SAE is of that layer. A convolution's h are its channels, averaged over the image. Results
go to runs/layers.jsonl, from which a run that was stopped goes on.
"""

import argparse

import report

import saeception as S

PATH = "runs/layers.jsonl"
# A convolution's channels have a mean that is large beside their spread; with the CNN's l1 of 1 too
# little is left of them (FVU above 1, two features for an image).
FLAGS = {"conv1": "--l1 0.1", "conv2": "--l1 0.1"}
LAYERS = {"cnn": ["conv1", "conv2", "fc", "norm"], "mlp": ["relu1", "relu2"]}
FIELDS = {
    "accuracy": ("accuracy", 4), "h_silhouette": ("silhouette h", 3),
    "h_davies_bouldin": ("DB h", 2), **report.UNIT_FIELDS,
    "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 2), "uncertainty": ("U z", 3),
    "l0": ("L0", 1), "fvu": ("FVU", 3),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", choices=LAYERS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    done = {(row["targets at"], row["seed"]) for row in report.rows_of(PATH)}
    layers = LAYERS[args.arch]
    for targets_at in layers:
        splits, make_model, layer, options = report.program(
            f"--dataset mnist --arch {args.arch} --layer {targets_at} --data-dir {args.data_dir} "
            + FLAGS.get(targets_at, "")
        )
        for seed in args.seeds:
            if (targets_at, seed) in done:
                continue
            model = make_model(seed)
            train, test = splits["train"], splits["test"]
            *_, state = S.saeception(model, layer, train, test, **options, seed=seed)
            for arm in ("baseline", "control", "sae-ception"):
                of_layer = [row for row in state["rows"] if row["arm"] == arm][-1]
                net, _ = S.restore(model, state, arm)
                for name in layers[layers.index(targets_at) :]:
                    h, _ = S.activations(net, name, test[0])
                    row = {"accuracy": of_layer["accuracy"]}
                    if name == targets_at:
                        row = of_layer
                    about = {"targets at": targets_at, "layer": name, "arm": arm, "seed": seed}
                    report.keep(PATH, row | report.unit_scores(h, test[1]) | about)
                print(targets_at, seed, arm, of_layer["h_silhouette"], flush=True)
    rows = [row for row in report.rows_of(PATH) if row["targets at"] in layers]
    rows.sort(key=lambda row: (layers.index(row["targets at"]), layers.index(row["layer"])))
    report.markdown(rows, ["targets at", "layer", "arm"], FIELDS, ("control", "sae-ception"))


if __name__ == "__main__":
    main()
