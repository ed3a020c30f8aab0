"""What the experiments share: inputs, one list of results in a file, and Markdown tables of it."""

import inspect
import json
from pathlib import Path

import numpy as np
import torch

import saeception as S

FIELDS = {
    "accuracy": ("accuracy", 4), "silhouette": ("silhouette z", 3), "davies_bouldin": ("DB z", 3),
    "h_silhouette": ("silhouette h", 3), "h_davies_bouldin": ("DB h", 3),
    "uncertainty": ("U z", 3), "h_uncertainty": ("U h", 3), "class_selectivity": ("sel. z", 2),
    "h_class_selectivity": ("sel. h", 2), "l0": ("L0", 1), "fvu": ("FVU", 3),
}  # fmt: skip

BETTER = {  # 1: the larger the better, -1: the smaller
    "accuracy": 1, "silhouette": 1, "davies_bouldin": -1, "h_silhouette": 1, "h_davies_bouldin": -1,
    "uncertainty": 1, "h_uncertainty": 1, "h_uncertainty_90": 1, "class_selectivity": 1,
    "h_class_selectivity": 1, "above_floor": 1,
}  # fmt: skip


def inputs(dataset, data_dir, n_train=20_000, n_test=5000):
    """The splits of a small data set as floats, at most so many examples of each."""
    splits, _ = S.load_data(dataset, data_dir)
    result = {split: (images.float() / 255, y) for split, (images, y) in splits.items()}
    for split, n in (("train", n_train), ("test", n_test)):
        result[split] = tuple(v[:n] for v in result[split])
    return result


def program(flags):
    """What `python saeception.py FLAGS` gives to S.saeception, for a small network: the splits, a
    function that makes the model of a seed, its layer, and the other arguments."""
    torch.set_num_threads(1)
    args, _ = S.parse_arguments(flags.split())
    splits, names = S.load_data(args.dataset, args.data_dir, args.limit)

    def make_model(seed):
        return S.build(args, len(names), seed)[1]

    return splits, make_model, args.layer, S.method_options(args)


def keep(path, row):
    """Append a row to a file of JSON lines, so that a run that was stopped goes on. A number that
    is not defined, such as the auxiliary loss of a baseline, becomes null."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    row = {key: S.finite_or_none(value) for key, value in row.items()}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(rows, by, fields=FIELDS, compare=()):
    """A line for each value of the keys `by`, in the order in which they come: mean ± standard
    deviation over the rows that share it. Of lines that differ only in their arm the best of the
    arms `compare` is bold."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    fields = {key: field for key, field in fields.items() if key in rows[0]}
    print("| " + " | ".join([*by, "seeds", *(name for name, _ in fields.values())]) + " |")
    print("|" + "---|" * (len(by) + 1 + len(fields)))
    means = {}  # by field, by what a line is apart from its arm, by arm
    for name, group in groups.items():
        about = dict(zip(by, name, strict=True))
        arm = about.pop("arm", None)
        for key in fields:
            if arm in compare and key in group[0]:
                same = means.setdefault((key, *about.values()), {})
                same[arm] = np.array([row[key] for row in group], dtype=float).mean()
    for name, group in groups.items():
        cells = [*map(str, name), str(len(group))]
        about = dict(zip(by, name, strict=True))
        arm = about.pop("arm", None)
        for key, (_, digits) in fields.items():
            if key not in group[0]:
                cells.append("")
                continue
            values = np.array([row[key] for row in group], dtype=float)  # null becomes nan
            text = f"{values.mean():.{digits}f}"
            if len(values) > 1:
                text += f" ± {values.std(ddof=1):.{digits}f}"
            same = means.get((key, *about.values()), {})
            if len(same) > 1 and arm in same and key in BETTER:
                best = max(BETTER[key] * value for value in same.values())
                if f"{BETTER[key] * same[arm]:.{digits}f}" == f"{best:.{digits}f}":
                    text = f"**{text}**"
            cells.append(text)
        print("| " + " | ".join(cells) + " |")


def changed(function, piece, replacement):
    """A function of saeception.py with one piece of its source replaced, which has to be there
    exactly once."""
    source = inspect.getsource(function)
    found = source.count(piece)
    if found != 1:
        raise SystemExit(f"{piece!r} is {found} times in {function.__name__}: adapt the experiment")
    names = dict(vars(S))
    exec(source.replace(piece, replacement), names)
    return names[function.__name__]


def unit_scores(h, y):
    """Scores of the units of h [N, d]: those of `measure`, and for the two measures of
    monosemanticity what they depend on. `floor` is the smallest class mean of a unit, as a share of
    its largest; `above_floor` is the class selectivity of what exceeds it."""
    mu = S.class_mean(h.relu(), y, int(y.max()) + 1)  # (C, d)
    low, high = mu.amin(0), mu.amax(0)
    mu_other = (mu.sum(0) - high) / (len(mu) - 1)
    above_floor = ((high - mu_other) / (high + mu_other - 2 * low))[high > low]
    scores = {
        "h_silhouette": S.silhouette_score(h, y),
        "h_davies_bouldin": S.davies_bouldin_score(h, y),
        "h_class_selectivity": S.class_selectivity_index(h, y),
        "floor": (low / high)[high > 0].mean().item(),
        "above_floor": above_floor.mean().item(),
    }
    for name, percent in (("h_uncertainty", 75), ("h_uncertainty_90", 90)):
        rank = int(percent / 100 * (len(h) - 1))
        above = h - h.kthvalue(rank + 1, dim=0).values  # a unit fires where this is above 0
        scores[name] = S.uncertainty_coefficient(above, y)
    return scores


UNIT_FIELDS = {
    "h_uncertainty": ("U h", 3), "h_uncertainty_90": ("U h, 90th percentile", 3),
    "h_class_selectivity": ("sel. h", 3), "floor": ("floor", 3),
    "above_floor": ("sel. above the floor", 3),
}  # fmt: skip


def digit_factors(n=14_000, seed=0):
    """The six numbers of the affine map of each rendered digit [n, 6]: the same draws as in
    `render_digits`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator)

    torch.randint(10, (n,), generator=generator)
    angle, shear, size = uniform(-0.35, 0.35), uniform(-0.2, 0.2), uniform(0.7, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [cos, sin + shear, uniform(-0.15, 0.15), -sin, cos, uniform(-0.15, 0.15)]
    return torch.stack(rows, dim=1) / size[:, None]


def factor_share(model, layer, splits):
    """What h still knows of a rendered digit besides its class: the share of the variance of the
    affine map, within a class, that a linear map of h explains; fitted on the training images,
    measured on the test images. The splits have to be all of `load_data("digits")`."""
    generator = torch.Generator().manual_seed(0)  # the order of load_data
    order = torch.randperm(12_000, generator=generator)[2000:]
    test_order = 12_000 + torch.randperm(2000, generator=generator)
    factors, images = digit_factors(), S.render_digits(14_000)[0]
    parts = []
    for split, index in (("train", order), ("test", test_order)):
        x, y = splits[split]
        assert torch.equal(x, images[index].float() / 255)
        h = S.activations(model, layer, x)[0]
        parts.append((h, factors[index], y))
    (h, m, y), (h_test, m_test, y_test) = parts
    mean_h, mean_m = S.class_mean(h, y, 10), S.class_mean(m, y, 10)
    linear = torch.linalg.lstsq(h - mean_h[y], m - mean_m[y]).solution
    left = m_test - mean_m[y_test] - (h_test - mean_h[y_test]) @ linear
    return 1 - (left.square().sum(0) / (m_test - mean_m[y_test]).square().sum(0)).mean().item()


def small_network(kind):
    """Networks that differ from `small_cnn` in one thing each, and MLPs, whose second hidden layer
    ends with a LayerNorm or a ReLU; with the name of the layer to take."""
    cnn = S.small_cnn()[1]
    if kind == "cnn":
        return cnn, "norm"
    if kind == "cnn, ReLU for LayerNorm":
        cnn.norm = torch.nn.ReLU()
        return cnn, "norm"
    if kind == "cnn, no LayerNorm":
        cnn.norm = torch.nn.Identity()
        return cnn, "norm"
    if kind == "cnn, 16 units":
        cnn.fc, cnn.norm = torch.nn.Linear(512, 16), torch.nn.LayerNorm(16)
        cnn.head = torch.nn.Linear(16, 10)
        return cnn, "norm"
    width, norm = {
        "mlp 784-64-64-10, LayerNorm": (64, torch.nn.LayerNorm(64)),
        "mlp 784-64-64-10, ReLU": (64, torch.nn.ReLU()),
        "mlp 784-16-16-10, LayerNorm": (16, torch.nn.LayerNorm(16)),
        "mlp 784-16-16-10, ReLU": (16, torch.nn.ReLU()),  # as the paper's
    }[kind]
    mlp = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, width), torch.nn.ReLU(),
        torch.nn.Linear(width, width), norm, torch.nn.Linear(width, 10),
    )  # fmt: skip
    return mlp, "4"
