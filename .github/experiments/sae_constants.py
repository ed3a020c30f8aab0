"""What does each number in the L1 recipe of `train_sae` do? In the source of the function one piece
is replaced, and the changed function trains SAEs on the same activations.

    PYTHONPATH=. OMP_NUM_THREADS=1 python .github/experiments/sae_constants.py

Two layers of networks that are trained on 20,000 MNIST images from --data-dir: the LayerNorm of the
small CNN and the first hidden layer of the paper's MLP. On the test images: L0, the features that
fire per image; FVU, the squared error over the variance of h; dead, the share of features that fire
for no image. A lower FVU with a larger L0 may be better or worse, so the loss that is minimised,
squared error + l1 * |z|, is there too, as the change that comes of the replacement. Results go to
runs/sae-constants.jsonl, from which a run that was stopped goes on.
"""

import argparse
import itertools

import numpy as np
import report
import torch

import saeception as S

PATH = "runs/sae-constants.jsonl"
SEEDS = range(3)
EPOCHS = {5: 390, 26: 2028}  # of 20,000 rows, and what that is in steps of 256 rows
LAYERS = [  # name, arch, layer, d_sae, l1
    ("CNN `norm`, 64 to 512", "cnn", "norm", 512, 1.0),
    ("MLP `relu1`, 16 to 256", "mlp", "relu1", 256, 0.1),
]

# Pieces of the source of train_sae, each of which is there once.
START = "-1.28 * (sample"
RISE = "0.1 * lr * fall"
FALL = "fall = min(1, 5 * (1 - step / len(steps)))"
RATE = "lr = 0.006 * math"
TIED = "sae = SparseAutoencoder(d_in, d_sae, k).to(sample)"
UNTIED = TIED + "; sae.W_enc.data = SparseAutoencoder(d_in, d_sae, k).to(sample).W_enc.data"
BATCH = "batch_size: int = 256"
PROJECTION = "gradient.sub_((gradient * W_dec).sum(1, keepdim=True) * W_dec)"
VARIANTS = [  # name, piece of the source of train_sae, what comes in its place
    ("start 0 for 1.28", START, "0.0 * (sample"),
    ("start 0.64 for 1.28", START, "-0.64 * (sample"),
    ("start 2.56 for 1.28", START, "-2.56 * (sample"),
    ("rise 0 for 0.1", RISE, "0.0 * lr * fall"),
    ("rise 0.03 for 0.1", RISE, "0.03 * lr * fall"),
    ("rise 0.3 for 0.1", RISE, "0.3 * lr * fall"),
    ("no fall of the rate", FALL, "fall = 1"),
    ("fall over two fifths for one", FALL, FALL.replace("5 *", "2.5 *")),
    ("fall over all steps for one fifth", FALL, FALL.replace("5 *", "1 *")),
    ("rate 0.003 for 0.006", RATE, "lr = 0.003 * math"),
    ("rate 0.012 for 0.006", RATE, "lr = 0.012 * math"),
    ("batches of 128 for 256, twice the steps", BATCH, "batch_size: int = 128"),
    ("batches of 512 for 256, half the steps", BATCH, "batch_size: int = 512"),
    ("encoder not tied at the start", TIED, UNTIED),
    ("gradient along the rows stays", PROJECTION, "pass"),
]


def layer_activations(arch, layer, splits):
    """h of the training and of the test images, of a network trained on the task alone."""
    torch.manual_seed(0)
    (x, y), (x_test, _) = splits["train"], splits["test"]
    if arch == "cnn":
        _, model, _ = S.small_cnn()
        S.fit(model, layer, x, y, epochs=8, batch_size=64, lr=5e-4)
    else:
        _, model, _ = S.mnist_mlp()
        x, x_test = x.flatten(1), x_test.flatten(1)
        S.fit(model, layer, x, y, epochs=8, batch_size=128, lr=2e-3)
    return S.activations(model, layer, x)[0], S.activations(model, layer, x_test)[0]


@torch.no_grad()
def quality(sae, h_train, h, l1):
    """Of an SAE on the rows h [N, d_in] that it has not seen. The loss has the scale in which
    `train_sae` trains: a mean squared norm of d_in."""
    scale = 1 / h_train.square().mean().sqrt()
    z = sae.encode(h)
    error = (sae.decode(z) - h).square().sum()
    return {
        "l0": ((z > 0).sum() / len(z)).item(),
        "fvu": (error / (h - h.mean(0)).square().sum()).item(),
        "dead": (z == 0).all(0).float().mean().item(),
        "loss": (scale**2 * error / len(h) + l1 * scale * z.sum(1).mean()).item(),
    }


def table(rows):
    """A line for each layer and variant: means over the seeds. The loss is the change against
    `train_sae` as it is, seed by seed; the lowest of a layer is bold."""
    by_job = {(row["layer"], row["variant"], row["epochs"], row["seed"]): row for row in rows}
    variants = ["as it is", *(name for name, _, _ in VARIANTS)]

    def mean(layer, variant, epochs, key):
        return np.mean([by_job[layer, variant, epochs, seed][key] for seed in SEEDS])

    def change(layer, variant, epochs):
        changes = []
        for seed in SEEDS:
            as_it_is = by_job[layer, "as it is", epochs, seed]["loss"]
            changes.append(by_job[layer, variant, epochs, seed]["loss"] / as_it_is - 1)
        return np.mean(changes)

    columns = ["layer", "changed"]
    for steps in EPOCHS.values():
        columns += [f"{steps} steps: L0", "FVU", "dead", "loss"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for layer, *_ in LAYERS:
        for variant in variants:
            line = [layer, variant]
            for epochs in EPOCHS:
                for key, digits in (("l0", 1), ("fvu", 4), ("dead", 3)):
                    line.append(f"{mean(layer, variant, epochs, key):.{digits}f}")
                loss = f"{100 * change(layer, variant, epochs):+.1f}%"
                lowest = min(change(layer, name, epochs) for name in variants)
                if change(layer, variant, epochs) == lowest:
                    loss = f"**{loss}**"
                line.append(loss)
            print("| " + " | ".join(line) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    functions = {"as it is": S.train_sae}
    for variant, piece, replacement in VARIANTS:
        functions[variant] = report.changed(S.train_sae, piece, replacement)
    splits = report.inputs("mnist", args.data_dir)
    keys = ("layer", "variant", "epochs", "seed")
    done = [tuple(row[key] for key in keys) for row in report.rows_of(PATH)]
    for name, arch, layer, d_sae, l1 in LAYERS:
        h, h_test = layer_activations(arch, layer, splits)
        for epochs, seed, variant in itertools.product(EPOCHS, SEEDS, functions):
            job = (name, variant, epochs, seed)
            if job not in done:
                train_sae = functions[variant]
                sae = train_sae(h, d_sae, l1=l1, epochs=epochs, min_steps=0, seed=seed)
                row = dict(zip(keys, job, strict=True)) | quality(sae, h, h_test, l1)
                report.keep(PATH, row)
                print(*job, f"L0 {row['l0']:.1f}, FVU {row['fvu']:.4f}", flush=True)
    table(report.rows_of(PATH))


if __name__ == "__main__":
    main()
