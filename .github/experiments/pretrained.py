"""A pretrained network: the last layers on features of EfficientNet-Lite0 (ImageNet weights) for
CIFAR-10 images, which see 10,000 of them for training and 2,000 for testing.

    PYTHONPATH=. python .github/experiments/pretrained.py features.npz

The file has x_train, x_test (pooled features [N, 1280]) and y_train, y_test. Two models: LayerNorm
and head, as in the ImageNet setting, and a residual MLP before them, as in the ViT setting. Results
go to runs/pretrained.jsonl, from which a run that was stopped goes on.
"""

import sys

import numpy as np
import report
import torch
from torch import nn

import saeception as S

SEEDS, CYCLES, D_SAE, L1, PATH = range(3), 1, 2560, 3.0, "runs/pretrained.jsonl"


class ResidualMLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
        )

    def forward(self, x):
        return x + self.layers(x)


def main():
    data = np.load(sys.argv[1])
    x, x_test = (torch.from_numpy(data[name]).float() for name in ("x_train", "x_test"))
    y, y_test = (torch.from_numpy(data[name]).long() for name in ("y_train", "y_test"))
    mean, std = x.mean(0), x.std()
    x, x_test = (x - mean) / std, (x_test - mean) / std
    done = {(row["model"], row["seed"], row["arm"]) for row in report.rows_of(PATH)}
    for seed in SEEDS:
        for kind in ("LayerNorm, head", "residual MLP, LayerNorm, head"):
            if (kind, seed, "class-mean") in done:
                continue
            torch.manual_seed(seed)
            layers = [nn.LayerNorm(1280), nn.Linear(1280, 10)]
            if kind.startswith("residual"):
                layers.insert(0, ResidualMLP(1280))
            model, layer = nn.Sequential(*layers), str(len(layers) - 2)
            *_, state = S.saeception(
                model, layer, (x, y), (x_test, y_test), D_SAE, cycles=CYCLES, arms=S.ARMS,
                seed=seed, baseline_epochs=5, fit_options={"epochs": 2, "lr": 3e-4},
                sae_options={"l1": L1, "min_steps": 0},
            )  # fmt: skip
            for row in state["rows"]:
                if row["cycle"] in (0, CYCLES):
                    report.keep(PATH, row | {"model": kind})
                    print(kind, seed, row["arm"], f"{row['silhouette']:.3f}", flush=True)
    report.markdown(report.rows_of(PATH), ["model", "arm"], compare=tuple(S.ARMS))


if __name__ == "__main__":
    main()
