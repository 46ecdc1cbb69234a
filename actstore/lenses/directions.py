"""What features write into the residual stream, from the kit: decoder rows, through what lies behind their site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, UnknownName, UnsupportedFormat, explain
from actstore.sites import Site, parse_site
from actstore.store import StoreReader

from .stored import must_have_sae

__all__ = ["AS_THEY_ARE", "Directions", "Output", "is_neurons"]

AS_THEY_ARE = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"})
PROJECTED = frozenset({"z", "attn_out_raw", "mlp_act", "mlp_out_raw"})
OUTPUTS_KEPT = 8  # widened to float32: W_O of Gemma 2 2B is 19 MB

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Output:
    """What lies between a site and the residual stream, float32: out = norm(x @ weight + bias) · gain.

    weight (input, d_model), bias, gain (d_model); each None where there is none; without a gain there is no norm.
    """

    weight: Array | None = None
    bias: Array | None = None
    gain: Array | None = None
    norm_epsilon: float = 0.0
    n_heads: int = 1


class Directions:
    """Directions of features over one snapshot of a store."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        self._output = lru_cache(OUTPUTS_KEPT)(self._read_output)

    def coder(self, sae: str) -> dict[str, Any]:
        """Return an SAE's row of the table `saes`; raises UnknownName for one that is not stored."""
        must_have_sae(self.reader, sae)
        return next(row for row in self.reader.saes if row["sae"] == sae)

    def written(self, sae: str) -> Site:
        """Return the site that an SAE reconstructs: the one it reads or, of a transcoder, the one it writes."""
        coder = self.coder(sae)
        return parse_site(coder["write_site"] or coder["site"])

    def output(self, site: Site, artifact: str) -> Output:
        """Return what lies between a site and the stream; `artifact` is what was made from the site.

        Raises InvalidInput for a site that is not on the way into the stream, MissingInput where the kit lacks it.
        """
        if site.kind in AS_THEY_ARE:
            return Output()
        if site.kind not in PROJECTED:
            accepted = f"{', '.join(sorted(AS_THEY_ARE | PROJECTED))}"
            raise InvalidInput(explain(f"{site} is not on the way into the residual stream", accepted=accepted))
        return self._output(self.reader.kit.digest(f"output/{site}", artifact))

    def _read_output(self, digest: str) -> Output:
        piece = self.reader.kit.piece(digest)
        if piece.attrs.get("norm", "rms") != "rms":
            raise UnsupportedFormat(explain(f"A norm behind heads is {piece.attrs['norm']!r}", accepted="rms"))
        names = ("weight", "bias", "gain")
        arrays = {name: np.asarray(piece[name]).astype(np.float32) for name in names if name in piece}
        epsilon, n_heads = piece.attrs.get("norm_epsilon", 0.0), piece.attrs["n_heads"]
        return Output(**arrays, norm_epsilon=float(str(epsilon)), n_heads=int(str(n_heads)))

    def decoder_rows(self, sae: str, features: npt.NDArray[np.int64]) -> Array:
        """Return decoder rows in the basis of the site that is written: float32 (feature, width of the site).

        A neuron's is its own dimension. Raises UnknownName for features that are not there, MissingInput where the
        SAE's weights were left out of the kit.
        """
        coder = self.coder(sae)
        self._check(coder, features)
        if is_neurons(coder):
            return np.equal.outer(features, np.arange(coder["width"])).astype(np.float32)
        return self.reader.kit.rows(self.weights(sae), "w_dec", features)

    def weights(self, sae: str) -> str:
        """Return the digest of the kit piece with an SAE's weights; raises MissingInput where they were left out."""
        return self.reader.kit.digest(f"sae/{sae}", f"firings/{sae}")

    def of_features(self, sae: str, features: npt.NDArray[np.int64]) -> Array:
        """Return what features write into the residual stream: float32 (feature, d_model).

        Decoder rows, through W_O or W_down where the site lies before it and times the gain of a norm that follows;
        the norm's scale is left out: it depends on the row. Raises as `output` and `decoder_rows`.
        """
        output = self.output(self.written(sae), f"firings/{sae}")
        if output.weight is not None and is_neurons(self.coder(sae)):
            self._check(self.coder(sae), features)
            rows = output.weight[features]
        else:
            rows = self.decoder_rows(sae, features)
            rows = rows if output.weight is None else rows @ output.weight
        return rows if output.gain is None else rows * output.gain

    def _check(self, coder: dict[str, Any], features: npt.NDArray[np.int64]) -> None:
        wrong = features[(features < 0) | (features >= coder["width"])]
        if len(wrong):
            what = f"There is no feature {wrong[0]} of {coder['sae']}"
            raise UnknownName(explain(what, accepted=f"0 to {coder['width'] - 1}"))


def is_neurons(coder: Mapping[str, Any]) -> bool:
    """Return whether an SAE, as its row of `saes`, is the identity over neurons."""
    from actstore.saes import NEURONS  # the room takes longer to import than most questions to answer

    return bool(coder["architecture"] == NEURONS)
