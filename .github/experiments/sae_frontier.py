"""Our SAEs beside SAELens's, on wide features: L0, error and time at the same steps and batches.

    PYTHONPATH=. python .github/experiments/sae_frontier.py features.npz

The file has x_train and x_test. FVU: squared error on held-out rows / their variance. dead: share
of features that fire for no held-out row. Without SAELens (pip install sae-lens) its rows are left
out. Learning rates: 1e-3 for SAELens, the defaults of `train_sae` for ours.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F

import saeception as S

try:
    import sae_lens.saes as L
    from sae_lens.saes.sae import TrainStepInput
except ImportError:
    L = None


def sae_lens(h, d_sae, k, l1, epochs, lr=1e-3, batch_size=256, seed=0):
    """SAELens's own training SAE with its defaults, but better here than with its trainer's: b_dec
    starts at the mean, and gradients are not clipped (else most features die in so few steps)."""
    torch.manual_seed(seed)
    shape = dict(d_in=h.shape[1], d_sae=d_sae)
    if k is None:
        sae = L.StandardTrainingSAE(L.StandardTrainingSAEConfig(**shape, l1_coefficient=l1))
    else:
        sae = L.TopKTrainingSAE(L.TopKTrainingSAEConfig(**shape, k=k))
    sae.b_dec.data = h.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    order, silent = S.batches(len(h), batch_size, epochs, seed), torch.zeros(d_sae)
    for step, index in enumerate(order, 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, 5 * (1 - step / len(order)))
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=h[index],
                coefficients={"l1": l1},
                dead_neuron_mask=silent > 1000,  # its trainer's default window
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        silent = torch.where((out.feature_acts.detach() > 0).any(0), 0, silent + 1)
    return sae


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("features", help="npz with arrays x_train and x_test")
    parser.add_argument("--d-sae", type=int, default=2560)
    parser.add_argument("--l1", type=float, nargs="*", default=[1.5, 2])
    parser.add_argument("--k", type=int, nargs="*", default=[32])
    parser.add_argument("--sae-lens-l1", type=float, nargs="*", default=[3])
    parser.add_argument("--epochs", type=int, default=10)
    a = parser.parse_args()
    torch.set_num_threads(1)
    arrays = np.load(a.features)
    x = [torch.from_numpy(arrays[name]).float() for name in ("x_train", "x_test")]
    train, test = (F.layer_norm(rows, rows.shape[1:]) for rows in x)

    def ours(k, l1):
        return S.train_sae(train, a.d_sae, k, l1, epochs=a.epochs, min_steps=1)

    def theirs(k, l1):
        return sae_lens(train, a.d_sae, k, l1, a.epochs)

    runs = [("ours", ours, k, 0.0) for k in a.k] + [("ours", ours, None, l1) for l1 in a.l1]
    if L is not None:
        runs += [("SAELens", theirs, k, 0.0) for k in a.k]
        runs += [("SAELens", theirs, None, l1) for l1 in a.sae_lens_l1]
    else:
        print("sae_lens is not installed: its rows are skipped\n")
    print("| SAE | L0 | FVU | dead | CPU s |\n|---|---|---|---|---|")
    for name, run, k, l1 in runs:
        start = time.process_time()
        sae = run(k, l1)
        seconds = time.process_time() - start
        with torch.no_grad():
            z = sae.encode(test)
            fvu = (sae.decode(z) - test).square().sum() / (test - test.mean(0)).square().sum()
        fires = z > 0
        what = f"{name}, l1 {l1:g}" if k is None else f"{name}, TopK {k}"
        print(
            f"| {what} | {fires.float().sum(1).mean():.1f} | {fvu:.4f} "
            f"| {1 - fires.any(0).float().mean():.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
