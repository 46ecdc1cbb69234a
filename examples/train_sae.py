"""Train a sparse autoencoder on a store's rows, and save it as a folder that SAELens and actstore read.

    actstore demo demo.act
    python examples/train_sae.py demo.act resid_post.3 --out my-sae
    actstore extract MODEL --into demo.act --sae my-sae

The coder is a TopK one (Gao et al. 2024): pre = (x - b_dec) @ W_enc + b_enc, the k largest of a row that are positive
are its features, x_hat = f @ W_dec + b_dec. Rows are scaled to a mean square of 1 while it learns; the scale is
multiplied into the weights at the end, so that the folder reads rows as the model has them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import actstore
from actstore.api import Store

HOOKS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post"}


class TopK(torch.nn.Module):
    """A TopK sparse autoencoder; parameters are named and laid out as SAELens has them."""

    def __init__(self, d_in: int, d_sae: int, k: int, seed: int) -> None:
        super().__init__()
        self.k = k
        directions = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = torch.nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.W_enc = torch.nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return features of rows: (row, d_in) → (row, d_sae), at most k of them above 0."""
        before = (rows - self.b_dec) @ self.W_enc + self.b_enc
        top = before.relu().topk(self.k, dim=1)
        return torch.zeros_like(before).scatter(1, top.indices, top.values)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return reconstructions of rows: (row, d_in)."""
        return self.encode(rows) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def scaled(self, scale: float) -> dict[str, torch.Tensor]:
        """Return the arrays of a coder that reads rows which are not multiplied by `scale` any more."""
        arrays = {"W_enc": self.W_enc * scale, "W_dec": self.W_dec / scale, "b_dec": self.b_dec / scale}
        return {name: array.contiguous() for name, array in (arrays | {"b_enc": self.b_enc.detach()}).items()}


def train(store: Store, site: str, *, d_sae: int, k: int, n_steps: int, batch_rows: int, seed: int) -> TopK:
    """Return a coder that was trained on so many batches of a site, with its arrays scaled back."""
    loader = store.loader(site, batch_rows, seed)
    first = next(iter(loader))
    scale = float(first.square().mean().rsqrt())
    coder = TopK(first.shape[1], d_sae, k, seed)
    with torch.no_grad():
        coder.b_dec.copy_(first.mean(0) * scale)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=n_steps)
    step = 0
    while step < n_steps:
        for rows in loader:  # an epoch; the next one has another order
            loss = (coder(rows * scale) - rows * scale).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # else features would shrink and the decoder grow
                coder.W_dec.div_(coder.W_dec.norm(dim=1, keepdim=True))
            step += 1
            if step % 100 == 0:
                print(f"step {step} of {n_steps}: loss {loss.item() / first.shape[1]:.4f}")
            if step == n_steps:
                break
    coder.load_state_dict(coder.scaled(scale))
    return coder


@torch.no_grad()
def unexplained(store: Store, site: str, coder: TopK) -> float:
    """Return the fraction of variance unexplained over all plain rows of a site."""
    n_rows, total, squares, errors = 0, torch.zeros(1), 0.0, 0.0
    for rows in store.loader(site):
        n_rows, total = n_rows + len(rows), total + rows.double().sum(0)
        squares += float(rows.double().square().sum())
        errors += float((coder(rows) - rows).double().square().sum())
    return errors / (squares - float(total.square().sum()) / n_rows)


def save(folder: Path, coder: TopK, store: Store, site: str) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, as SAELens 6 lays them out."""
    kind, _, layer = site.partition(".")
    config = {
        "architecture": "topk",
        "d_in": coder.W_enc.shape[0],
        "d_sae": coder.W_enc.shape[1],
        "k": coder.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "model_name": store.reader.store.model["identity"]["name"],
            "hook_name": f"blocks.{layer}.{HOOKS[kind]}",
            "context_size": store.reader.store.context,
            "prepend_bos": store.reader.store.tokenizer["bos_id"] is not None,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file({name: array.detach() for name, array in coder.state_dict().items()}, folder / "sae_weights.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("site", help="a stored site of the residual stream, such as resid_post.3")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("-k", type=int, default=16, help="features of a row")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.site.partition(".")[0] not in HOOKS:
        parser.error(f"{given.site} is not of the residual stream ({', '.join(HOOKS)})")
    with actstore.open(given.store) as store:
        sizes = {"d_sae": given.features, "k": given.k, "n_steps": given.steps, "batch_rows": given.batch_rows}
        coder = train(store, given.site, seed=given.seed, **sizes)
        print(f"fraction of variance unexplained: {unexplained(store, given.site, coder):.4f}")
        save(given.out, coder, store, given.site)
    print(f"written to {given.out}: actstore extract MODEL --into {given.store} --sae {given.out}")


if __name__ == "__main__":
    main()
