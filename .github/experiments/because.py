"""Because of what? The same cycles with other targets, on the small CNN.

    PYTHONPATH=. python .github/experiments/because.py mnist
    PYTHONPATH=. python .github/experiments/because.py digits

Each seed has one baseline; all targets start from it. For digits a column more says how much of an
image h still knows besides its class. Results go to runs/because-<dataset>.jsonl, from which a run
that was stopped goes on.
"""

import argparse

import report
import torch

import saeception as S

SEEDS, CYCLES = range(5), 3
SAE = {"l1": 1.0, "epochs": 1, "min_steps": 500}


def own_h(sae, h, y, n_classes, top_k):
    return h


def shrunk(sae, h, y, n_classes, top_k):
    """h pulled 10% towards its mean."""
    return h + 0.1 * (h.mean(0) - h)


def masked(sae, h, y, mask):
    return sae.decode(S.sharpen(sae.encode(h), y, mask))


def other_class(sae, h, y, n_classes, top_k):
    """Each class keeps the features of the next."""
    mask = S.class_top_k(sae.encode(h), y, n_classes, top_k).roll(-1, 0)
    return masked(sae, h, y, mask)


def random_features(sae, h, y, n_classes, top_k):
    """Each class keeps top_k features drawn at random."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(n_classes, len(sae.W_dec), generator=generator).argsort(1)
    return masked(sae, h, y, order < top_k)


def sharpened(top_k):
    return lambda sae, h, y, n_classes, _: S.sharpened_targets(sae, h, y, n_classes, top_k)


TARGETS = [  # name, rule, weight
    ("none (control)", None, 0.0),
    ("h itself", own_h, 1.0),
    ("h, 10% towards its mean", shrunk, 1.0),
    ("features of another class, k 25", other_class, 1.0),
    ("random features, k 25", random_features, 1.0),
    ("unsharpened", S.ARMS["unsharpened"], 1.0),
    ("sharpened, k 50", sharpened(50), 1.0),
    ("sharpened, k 25", sharpened(25), 1.0),
    ("sharpened, k 10", sharpened(10), 1.0),
    ("class mean", S.ARMS["class-mean"], 1.0),
    ("unsharpened, weight 0.3", S.ARMS["unsharpened"], 0.3),
    ("unsharpened, weight 3", S.ARMS["unsharpened"], 3.0),
    ("sharpened, k 25, weight 0.3", sharpened(25), 0.3),
    ("sharpened, k 25, weight 3", sharpened(25), 3.0),
    ("class mean, weight 0.03", S.ARMS["class-mean"], 0.03),
    ("class mean, weight 0.1", S.ARMS["class-mean"], 0.1),
    ("class mean, weight 0.3", S.ARMS["class-mean"], 0.3),
    ("class mean, weight 3", S.ARMS["class-mean"], 3.0),
    ("TopK SAE: none (control)", None, 0.0),
    ("TopK SAE: unsharpened", S.ARMS["unsharpened"], 1.0),
    ("TopK SAE: sharpened, k 25", sharpened(25), 1.0),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", choices=["mnist", "digits"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", default="", help="targets whose names start so, e.g. TopK")
    args = parser.parse_args()
    path = f"runs/because-{args.dataset}.jsonl"
    splits = report.inputs(args.dataset, args.data_dir)
    done = {(row["seed"], row["target"]) for row in report.rows_of(path)}
    for seed in args.seeds:
        baselines = {}
        for name, rule, weight in TARGETS:
            if (seed, name) in done or not name.startswith(args.only):
                continue
            sae_k = 16 if name.startswith("TopK") else None
            torch.manual_seed(seed)
            model, layer = report.small_network("cnn")
            settings = {
                "sae_k": sae_k, "seed": seed, "baseline_epochs": 8, "sae_options": SAE,
                "fit_options": {"epochs": 2, "lr": 5e-4},
            }  # fmt: skip
            here = (model, layer, splits["train"], splits["test"], 512)
            if sae_k not in baselines:
                baselines[sae_k] = next(S.saeception(*here, cycles=0, **settings))
            *_, state = S.saeception(
                *here, weight=weight, cycles=CYCLES, arms={name: rule}, state=baselines[sae_k],
                **settings,
            )  # fmt: skip
            row = state["rows"][-1] | {"target": name, "n": len(splits["train"][1])}
            if args.dataset == "digits":
                row["share"] = report.factor_share(S.restore(model, state, name)[0], layer, splits)
            report.keep(path, row)
            print(f"seed {seed}, {name}: {row['silhouette']:.3f}", flush=True)
    fields = report.FIELDS | {"share": ("share of the map", 3)}
    names = [name for name, _, _ in TARGETS]
    rows = sorted(report.rows_of(path), key=lambda row: names.index(row["target"]))
    report.markdown(rows, ["target"], fields)


if __name__ == "__main__":
    main()
