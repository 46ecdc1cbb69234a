"""Encode on bfloat16 matrix units, and decide every feature near its threshold again, so that none fires in error.

What fires is what the coder's equation says of its float32 numbers in exact arithmetic (up to float64's rounding). No
float32 sum can promise that: it depends on the order of its terms, and within its rounding error of a threshold two
orders disagree. Here the set depends on neither order, tile nor device. Where float32 encodes another set, its own
rounding error reaches the threshold.

A float32 number is the sum of three bfloat16 numbers, and a product of two bfloat16 numbers is exact in float32. So the
product of the parts is as good as a float32 product, several times as fast on a GPU's matrix units, and slower on a
CPU. Its error is below a bound; what lies within the bound of the threshold is computed again in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actstore.errors import InvalidInput, explain

from .coder import SparseCoder
from .encoder import SaeEncoder

if TYPE_CHECKING:
    import torch

__all__ = ["ENCODERS", "ScreenEncoder", "split"]

N_PARTS = 3  # of 8 significant bits: float32 has 24

# Higham (2002, §3.1): a sum of n products has an error below γ(n) · |x| · |w|, γ(n) = n · u / (1 − n · u), in any
# order. u is 2⁻²⁴ where every addition rounds to the nearest. A matrix unit adds several products at once, aligned to
# the largest and cut off: B of them add an error below (1 + 2 / B) · 2⁻²³ each (Blanchard et al. 2020; Fasi et al.
# 2021). Units that take bfloat16 have B = 8 and more; this is B = 4.
UNIT = 1.5 * 2.0**-23
FURTHER_TERMS = 64  # beyond d_in: small products, bias, sums of parts, the bound's own float32
# |x| · |w| is taken of their largest parts, each up to 2⁻⁸ too short, and added up as inexactly; all parts together are
# up to 2⁻⁷ too long; and 1 / (1 − n · u).
SAFETY = 1.08
UNDERFLOW = 2.0**-100  # what parts lose that are too small for a bfloat16, of numbers that no model has
LARGEST_INPUT = 1 << 16  # above it the last would be more than 1.02
NUMBERS_AT_ONCE = 1 << 25  # of pairs that are decided again: 0.8 GB


class ScreenEncoder(SaeEncoder):
    """A sparse coder on a device, encoding as `SaeEncoder` does, with the set of firings of exact arithmetic.

    Activations have float32's precision.
    """

    def __init__(self, coder: SparseCoder, device: str | torch.device) -> None:
        """Copy the weights to the device: 16 bytes for each pair of encoder and decoder weights, of float32's 8.

        Raises InvalidInput for a coder that keeps the k largest features: what is k-th has no threshold.
        """
        import torch

        if coder.k is not None or coder.d_in > LARGEST_INPUT:
            raise InvalidInput(
                explain(
                    f"The SAE {coder.identity.sae} keeps the {coder.k} largest features of a row"
                    if coder.k is not None
                    else f"The SAE {coder.identity.sae} reads vectors of width {coder.d_in}",
                    accepted=f"coders with a threshold per feature and a width up to {LARGEST_INPUT}",
                    next_step="leave out --sae-precision screen",
                )
            )
        super().__init__(coder, device)
        self._parts = torch.cat(split(self._w_enc))
        self._sizes = self._parts[: coder.d_in].abs()
        self._relative = SAFETY * UNIT * (coder.d_in + FURTHER_TERMS)
        self._slack = self._relative * self._b_enc.abs() + UNDERFLOW
        self._columns = self._w_enc.T.contiguous()
        del self._w_enc

    def screened(self, rows: torch.Tensor, is_narrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows @ w_enc + b_enc by the parts, and a bound of its error, both float32 (row, d_sae).

        rows float32 (row, d_in), normalised; is_narrow: bfloat16 would hold every number of them.
        """
        parts = [rows.bfloat16()] if is_narrow else split(rows)
        before = self._product(parts).add_(self._b_enc)
        return before, _multiply(parts[0].abs(), self._sizes).mul_(self._relative).add_(self._slack)

    def _before(self, rows: torch.Tensor, is_narrow: bool) -> torch.Tensor:
        before, bound = self.screened(rows, is_narrow)
        is_clear = (before - self._threshold).abs_() > bound
        row, feature = is_clear.logical_not_().nonzero(as_tuple=True)  # NaN is not clear
        size = max(1, NUMBERS_AT_ONCE // self.coder.d_in)
        for first in range(0, len(row), size):
            pairs = row[first : first + size], feature[first : first + size]
            before[pairs] = self._decided(rows, *pairs)
        return before

    def _product(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return float32 rows @ w_enc, rows in parts, largest first; products below float32's last bit are left out."""
        import torch

        d_in, (largest, *smaller) = self.coder.d_in, parts
        # What is small is added up apart, so that it adds no error of the size of what is large.
        rest = _multiply(torch.cat([largest] * (N_PARTS - 1), dim=1), self._parts[d_in:])
        for number, part in enumerate(smaller, start=1):
            repeated = torch.cat([part] * (N_PARTS - number), dim=1)
            rest += _multiply(repeated, self._parts[: (N_PARTS - number) * d_in])
        return _multiply(largest, self._parts[:d_in]).add_(rest)

    def _decided(self, rows: torch.Tensor, row: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Return float32 numbers for some pairs, each on the side of its threshold that float64 says."""
        import torch

        threshold = self._threshold[feature]
        exact = (rows[row].double() * self._columns[feature]).sum(dim=1) + self._b_enc[feature]
        above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        rounded = exact.float()  # never above a threshold that the exact number is not above
        return torch.where(exact > threshold, rounded.maximum(above), rounded)


ENCODERS: dict[str, type[SaeEncoder]] = {"float32": SaeEncoder, "screen": ScreenEncoder}
"""By the precision that a recipe names."""


def split(values: torch.Tensor) -> list[torch.Tensor]:
    """Return three bfloat16 tensors whose sum float32 values are, largest first; exact above the smallest numbers."""
    parts = []
    for _ in range(N_PARTS):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return parts


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the float32 product of bfloat16 matrices, added up in float32."""
    import torch

    if not left.is_cuda:
        return left.float() @ right.float()
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # parts of a long sum would be added up in bfloat16
    try:
        return torch.mm(left, right, out_dtype=torch.float32)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced
