"""Train the JumpReLU SAEs of the embedded model and write them in Gemma Scope's layout.

Run after train_model.py: python world/train_saes.py [SITE ...]
Straight-through gradients with a rectangle kernel move the thresholds; the penalty is (L0 / target - 1)^2 above the
target, which pulls the mean L0 there instead of leaving it to a coefficient. Activations are divided by one scalar C
while training (their root mean squared distance from the mean); C and the pre-encoder bias are folded into the saved
arrays, which then read raw activations.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

import capture
import grammar
import numpy as np
import torch
from numpy.typing import NDArray

LOGS = Path(__file__).parent / "logs"
SAE_SEED = grammar.TRAINING_SEED + 1
N_DOCUMENTS, WIDTH = 12_000, 1_024
STEPS, BATCH_ROWS = 4_000, 1_024
LEARNING_RATE, BANDWIDTH, START_THRESHOLD = 2e-3, 0.05, 0.05
L0_TARGET, L0_COEFFICIENT, L0_WARMUP_STEPS = 13.5, 0.3, 1_000
RESAMPLE_EVERY, RESAMPLE_UNTIL = 400, 2_600
KEPT_MANTISSA_BITS = 11


def gate_of(raw: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """1 where raw > threshold; its gradient is a rectangle of BANDWIDTH around the threshold, for both arguments."""
    distance = raw - threshold
    near = (distance.detach().abs() < BANDWIDTH / 2) / BANDWIDTH
    slope = distance * near
    return (distance.detach() > 0).float() + (slope - slope.detach())


class JumpReluSae(torch.nn.Module):
    """Pre-encoder bias, encoder, threshold, decoder; reads activations divided by C."""

    def __init__(self, width_in: int, mean: torch.Tensor) -> None:
        super().__init__()
        decoder = torch.nn.functional.normalize(torch.randn(WIDTH, width_in), dim=1)
        self.decoder = torch.nn.Parameter(decoder)
        self.encoder = torch.nn.Parameter(decoder.T.clone())
        self.encoder_bias = torch.nn.Parameter(torch.zeros(WIDTH))
        self.decoder_bias = torch.nn.Parameter(mean.clone())
        self.log_threshold = torch.nn.Parameter(torch.full((WIDTH,), math.log(START_THRESHOLD)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(reconstruction [rows, width_in], features [rows, WIDTH], differentiable mean L0)."""
        raw = torch.relu((x - self.decoder_bias) @ self.encoder + self.encoder_bias)
        gate = gate_of(raw, self.log_threshold.exp())
        features = raw * gate
        return features @ self.decoder + self.decoder_bias, features, gate.sum(dim=1).mean()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Decoder rows back to unit norm."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))


def rate(step: int) -> float:
    """Learning rate: short warm-up, constant, linear decay over the last third."""
    warm, cool = min(1.0, (step + 1) / 100), min(1.0, (STEPS - step) / (STEPS / 3))
    return LEARNING_RATE * warm * cool


@torch.no_grad()
def resample(sae: JumpReluSae, optimizer: torch.optim.Optimizer, dead: torch.Tensor, x: torch.Tensor) -> None:
    """Point dead features at what the SAE reconstructs worst, with fresh optimizer moments."""
    error = x - sae(x)[0]
    chosen = torch.multinomial(error.square().sum(dim=1), int(dead.sum()), replacement=False)
    directions = torch.nn.functional.normalize(error[chosen], dim=1)
    sae.decoder[dead] = directions
    sae.encoder[:, dead] = directions.T
    sae.encoder_bias[dead] = 0.0
    sae.log_threshold[dead] = math.log(START_THRESHOLD)
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[sae.decoder][moment][dead] = 0.0
        optimizer.state[sae.encoder][moment][:, dead] = 0.0
        optimizer.state[sae.encoder_bias][moment][dead] = 0.0


def train(x: torch.Tensor, log: TextIO) -> JumpReluSae:
    """An SAE of normalised activations `x` [rows, width]."""
    torch.manual_seed(0)
    sae = JumpReluSae(x.shape[1], x.mean(dim=0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, betas=(0.5, 0.999))
    fired = torch.zeros(WIDTH, dtype=torch.bool)
    started = time.monotonic()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        batch = x[torch.randint(len(x), (BATCH_ROWS,))]
        reconstruction, features, mean_l0 = sae(batch)
        error = (batch - reconstruction).square().sum(dim=1).mean()
        pressure = L0_COEFFICIENT * min(1.0, step / L0_WARMUP_STEPS)
        loss = error + pressure * torch.relu(mean_l0 / L0_TARGET - 1).square()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        sae.normalize_decoder()
        fired |= (features > 0).any(dim=0)
        if (step + 1) % RESAMPLE_EVERY == 0:
            dead_count = int((~fired).sum())
            seconds = time.monotonic() - started
            figures = f"error {error.item():.4f} l0 {mean_l0.item():.1f} dead {dead_count} seconds {seconds:.0f}"
            print(f"step {step + 1} {figures}", file=log, flush=True)
            if dead_count and step < RESAMPLE_UNTIL:
                resample(sae, optimizer, ~fired, x[torch.randint(len(x), (8 * BATCH_ROWS,))])
            fired[:] = False
    return sae


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest float32 with KEPT_MANTISSA_BITS of mantissa, so that the file compresses."""
    dropped = 23 - KEPT_MANTISSA_BITS
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << (dropped - 1))) >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)


def folded(sae: JumpReluSae, scale: float) -> dict[str, NDArray[np.float32]]:
    """Gemma Scope's arrays for raw activations: C and the pre-encoder bias are inside (its appendix A)."""
    with torch.no_grad():
        arrays = {
            "W_enc": sae.encoder,
            "W_dec": sae.decoder,
            "b_enc": scale * (sae.encoder_bias - sae.decoder_bias @ sae.encoder),
            "b_dec": scale * sae.decoder_bias,
            "threshold": scale * sae.log_threshold.exp(),
        }
        return {name: rounded(array.contiguous().numpy()) for name, array in arrays.items()}


def write(site: str, arrays: dict[str, NDArray[np.float32]], x: NDArray[np.float32]) -> str:
    """Write params.npz under its measured mean L0; returns a line with what was measured on `x`."""
    features = capture.encode(arrays, x)
    mean_l0 = float((features > 0).sum(axis=1).mean())
    fvu = capture.unexplained_variance(x, capture.decode(arrays, features))
    release = capture.ASSETS / f"gemma-scope-demo-{capture.SAE_SITES[site]}"
    layer_folder = release / f"layer_{site.split('.')[1]}"
    shutil.rmtree(layer_folder, ignore_errors=True)
    folder = layer_folder / "width_1k" / f"average_l0_{round(mean_l0)}"
    folder.mkdir(parents=True)
    np.savez_compressed(folder / "params.npz", allow_pickle=False, **arrays)
    dead = 1 - float((features > 0).any(axis=0).mean())
    return f"site {site} fvu {fvu:.4f} l0 {mean_l0:.2f} dead {dead:.4f} rows {len(x)}"


def main() -> None:
    """Cache activations once, then train one SAE per site named on the command line (default: all)."""
    sites = sys.argv[1:] or list(capture.SAE_SITES)
    model, tokenizer = capture.load()
    texts = [document.text for document in itertools.islice(grammar.documents(SAE_SEED), N_DOCUMENTS)]
    rows = capture.capture(model, tokenizer, texts, sites)
    LOGS.mkdir(exist_ok=True)
    for site in sites:
        x = rows.activations[site]
        scale = float(np.sqrt(np.square(x - x.mean(axis=0)).sum(axis=1).mean()))
        with (LOGS / f"train_sae_{site}.txt").open("w") as log:
            sae = train(torch.from_numpy(x / scale), log)
            print(write(site, folded(sae, scale), x[-100_000:]), file=log)


if __name__ == "__main__":
    main()
