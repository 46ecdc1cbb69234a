"""Of what runs batch by batch and tile by tile, nothing waits for the device: shown where waiting is impossible.

The device is torch's "meta", which knows shapes and no numbers. Whatever would need a number on the host, or a shape
that depends on one, raises there; and a copy to it is refused here unless it is one that CUDA would not wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers_support import CLT, write_coder
from layers_support import load as load_layers
from saes_support import random_arrays
from tiny_world import RESIDUAL_SAE, extract, tiny_world
from torch.utils._python_dispatch import TorchDispatchMode
from transcoder_support import D_IN, gemma_scope_2
from transcoder_support import load as load_transcoder

from actstore.blocks import TokenShard
from actstore.extraction.attention import AttentionKeeper
from actstore.extraction.readout import read_out_shard
from actstore.extraction.runner import ShardRunner
from actstore.extraction.tiles import encoded_tiles
from actstore.extraction.transfers import send
from actstore.models import load_model
from actstore.quantised import quantise
from actstore.recipe import SaeIdentity
from actstore.saes import Encoder, NeuronEncoder, SaeEncoder, SparseCoder
from actstore.sites import parse_site

META = torch.device("meta")
N_ROWS = 16


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses copies from the host that CUDA would wait for, and indexing whose shape depends on numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == META and args[0].device != META:
            assert kwargs.get("non_blocking"), f"{args[0].dtype} {tuple(args[0].shape)} is copied, and waited for"
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask is an index"
        return func(*args, **kwargs)


def no_waiting() -> NoWaiting:
    return NoWaiting()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "waits",
    [
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to("meta").sum().item(),
        lambda tensor: tensor.to("meta", non_blocking=True).cpu(),
        lambda tensor: (tensor.to("meta", non_blocking=True) > 0).nonzero(),
        lambda tensor: (there := tensor.to("meta", non_blocking=True))[there > 0],
        lambda tensor: bool(tensor.to("meta", non_blocking=True).any()),
    ],
    ids=["copying there", "a number", "copying back", "places", "a mask", "a condition"],
)
def test_what_waits_is_noticed(waits: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), no_waiting():
        waits(torch.ones(3))


class Stopped(Exception):
    """Ends an extraction whose parts are wanted."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardRunner, TokenShard]:
    """A runner of everything there is, as an extraction makes it, and its first shard; its model on the meta device."""
    found: list[tuple[ShardRunner, TokenShard]] = []

    def take(runner: ShardRunner, shard: TokenShard) -> Any:
        found.append((runner, shard))
        raise Stopped

    with pytest.MonkeyPatch.context() as patched, suppress(Stopped):
        patched.setattr(ShardRunner, "start", take)
        extract(tmp_path_factory.mktemp("waits") / "a.act", attention_top=3)
    runner, shard = found[0]
    model = load_model(tiny_world().model, device="cpu")
    model.causal_lm.to("meta")
    return replace(runner, model=model, encoders=[on_meta(runner, RESIDUAL_SAE)]), shard


def on_meta(runner: ShardRunner, sae: str) -> SaeEncoder:
    (encoder,) = (one for one in runner.encoders if one.identity.sae == sae)
    assert isinstance(encoder, SaeEncoder)
    return SaeEncoder(encoder.coder, META)


def test_every_batch_of_a_shard_with_its_attention(running: tuple[ShardRunner, TokenShard]) -> None:
    runner, shard = running
    sites = runner.captured()
    assert runner.device == META and {"pattern", "resid_post"} <= {site.kind for site in sites}
    with no_waiting():
        runner._attention = AttentionKeeper(shard, runner.recipe.attention_top, META)
        assert runner.capture(shard, sites) == []
    assert set(runner._attention.coming()) >= {f"attention/0/{name}" for name in ("weights", "offsets", "values")}
    for site in (site for site in sites if site.kind != "pattern"):
        assert runner.rows(site).shape == (len(shard.values), runner.model.site_width(site))


def test_storing_and_reading_out(running: tuple[ShardRunner, TokenShard]) -> None:
    runner, shard = running
    site = parse_site("resid_post.1")
    rows = torch.empty(len(shard.values), runner.model.site_width(site), device=META)
    with no_waiting():
        values, scales = quantise(rows)
        predictions, lenses = read_out_shard(runner.model.unembedding(), rows, {str(site): rows}, shard, 3)
    assert {one.device for one in (values, scales, predictions.values, lenses[str(site)].ids)} == {META}


def coder(**changes: Any) -> SparseCoder:
    identity = SaeIdentity(
        sae="tiny", site="resid_post.0", width=48, d_in=10, architecture="jumprelu", weights_digest="0" * 64
    )
    arrays: dict[str, Any] = {name.lower(): array for name, array in random_arrays().items()}
    return SparseCoder(identity, **arrays, **changes)


def neurons(n_kept: int | None) -> NeuronEncoder:
    identity = SaeIdentity(
        sae="n", site="mlp_act.0", width=10, d_in=10, architecture="neurons", weights_digest="0", truncated_to=n_kept
    )
    return NeuronEncoder(identity)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: SaeEncoder(coder(), META),
        lambda _: SaeEncoder(coder(subtracts_b_dec=True), META),
        lambda _: SaeEncoder(coder(k=5), META),
        lambda folder: SaeEncoder(load_transcoder(gemma_scope_2(folder).argument), META),
        lambda folder: SaeEncoder(load_layers(write_coder(folder, f"{CLT}_affine", skip=True))[1], META),
        lambda _: neurons(None),
        lambda _: neurons(3),
    ],
    ids=["jumprelu", "b_dec subtracted", "top k", "transcoder", "several layers", "neurons", "largest neurons"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_in_slots(make: Callable[[Path], Encoder], dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = make(tmp_path)
    identity = encoder.identity
    rows = torch.empty(N_ROWS, identity.d_in, dtype=dtype, device=META)
    targets = None
    if isinstance(encoder, SaeEncoder) and encoder.coder.transcodes:
        targets = torch.empty(N_ROWS, encoder.coder.d_out, device=META)
    with no_waiting():
        tile = encoder.encode(rows, send(torch.ones(N_ROWS, dtype=torch.bool).numpy(), META), targets, n_slots=100)
    assert tile.features.shape == tile.activations.shape == (100,)
    assert tile.reconstruction.shape == (N_ROWS, 3)


def test_several_saes_of_a_site_share_what_is_made_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    casts: list[int] = []
    encoders: list[Encoder] = [SaeEncoder(coder(), "cpu"), SaeEncoder(coder(subtracts_b_dec=True), "cpu"), neurons(3)]
    rows = torch.randn(2 * N_ROWS, D_IN, generator=torch.Generator().manual_seed(0)).bfloat16()
    listed = torch.ones(N_ROWS, dtype=torch.bool)
    cut = [(one, listed) for one in torch.split(rows, N_ROWS)]
    isfinite = torch.isfinite

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        casts.append(len(tensor))
        return isfinite(tensor)

    monkeypatch.setattr(torch, "isfinite", counted)
    together = encoded_tiles(encoders, cut)
    assert casts == [N_ROWS] * 2, "once a tile, not once an encoder"
    for encoder, tiles in zip(encoders, together, strict=True):
        for tile, (one, _) in zip(tiles, cut, strict=True):
            alone = encoder.encode(one, listed)
            for name in ("counts", "features", "activations", "reconstruction"):
                assert torch.equal(getattr(tile, name), getattr(alone, name))
