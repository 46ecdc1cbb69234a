"""`actstore extract`: options to one request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from actstore.errors import InvalidInput, explain

from .output import progress
from .passes import print_outcome, print_plan, saying_what_stays

__all__ = ["extract"]

EXAMPLES = """\b
Examples:
  actstore extract google/gemma-2-2b texts.jsonl --out gemma.act --site 'resid_post.*'
  actstore extract google/gemma-2-2b texts.jsonl --out gemma.act \\
      --sae google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71
  actstore extract google/gemma-2-2b --into gemma.act --site z.5"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("dataset", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The store to make, or to resume.")
@click.option(
    "--into", type=click.Path(path_type=Path), help="Add a pass to this store: more sites or SAEs over its corpus."
)
@click.option("--append", metavar="DATASET", help="Add documents to the store in --out, as a new segment.")
@click.option("--site", "sites", multiple=True, metavar="SITE", help="Store a site: resid_post.20, z.0-5, 'mlp_out.*'.")
@click.option(
    "--sae", "saes", multiple=True, metavar="[ID=]SOURCE[@SITE]", help="Store an SAE's firings; globs allowed."
)
@click.option(
    "--lens", "lens_k", type=click.IntRange(min=1), metavar="K", help="Store the logit lens' K likeliest tokens."
)
@click.option("--lens-site", "lens_sites", multiple=True, metavar="SITE", help="Where the lens reads [resid_post.*].")
@click.option(
    "--attention-top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Store the K heaviest keys of every layer, head and row.",
)
@click.option(
    "--attention-min", type=float, default=0.005, show_default=True, help="Weight below which an edge is not indexed."
)
@click.option(
    "--neurons-top", type=int, default=64, show_default=True, help="Largest activations a row kept of --sae neurons:…"
)
@click.option(
    "--sae-weights/--no-sae-weights", default=True, help="Keep the SAEs' weights, for directions and attribution [yes]."
)
@click.option("--predictions/--no-predictions", default=None, help="Store the model's own next-token result [yes].")
@click.option("--context", type=int, help="Tokens of a window, BOS included [1024].")
@click.option("--stride", type=int, help="Tokens between the beginnings of windows [context - 1: no overlap].")
@click.option("--max-tokens", type=int, help="Stop after the document that reaches so many tokens.")
@click.option("--text-field", default="text", show_default=True, help="Field of the dataset that holds the text.")
@click.option("--chat-field", metavar="FIELD", help="Field that holds chat messages; the model's template is applied.")
@click.option("--config", "dataset_config", help="Configuration of a hub dataset.")
@click.option("--split", "dataset_split", help="Split of a hub dataset.")
@click.option("--revision", help="Commit, tag or branch of a hub model.")
@click.option("--tokenizer", help="Tokenizer's hub id or folder [the model's own].")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute dtype [the checkpoint's]."
)
@click.option(
    "--storage-dtype", type=click.Choice(["float32", "bfloat16", "int8"]), help="Dtype of stored sites [as computed]."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--device-map", type=click.Choice(["auto"]), help="Spread a model over several devices (accelerate).")
@click.option("--activation-bits", type=int, default=10, show_default=True, help="Mantissa bits kept of activations.")
@click.option(
    "--sae-precision",
    type=click.Choice(["float32", "screen"]),
    default="float32",
    show_default=True,
    help="How SAEs multiply: screen is exact at thresholds, and meant for GPUs.",
)
@click.option("--encode-special", is_flag=True, help="List firings of BOS and other special tokens too.")
@click.option("--shard-rows", type=int, help="Rows of a shard [16384].")
@click.option("--batch-tokens", type=int, help="Padded tokens of a forward pass at most [8192].")
@click.option("--mixed", is_flag=True, help="Allow resuming on another type of device; receipts say which.")
@click.option("--allow-unhealthy", is_flag=True, help="Store an SAE that fails its proof; recorded.")
@click.option("--allow-pt", is_flag=True, help="Read SAEs from .pt files too (torch.load, weights only).")
@click.option("--force", is_flag=True, help="Go on though the disk may not suffice.")
@click.option("--no-index", is_flag=True, help="Do not index when done.")
@click.option("--plan", "only_plan", is_flag=True, help="Only say what it would take; loads no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def extract(
    only_plan: bool, as_json: bool, no_index: bool, out: Path | None, into: Path | None, **options: Any
) -> None:
    """Run MODEL over DATASET once and store what is asked for; the same command resumes.

    MODEL is a hub id or folder; DATASET a .jsonl or .parquet file of documents, a .txt file (one document), a folder of
    them, a hub id, or - for standard input (.jsonl).
    """
    if (out is None) == (into is None):
        raise InvalidInput(
            explain(
                "Give one of --out and --into",
                accepted="--out STORE to make or resume a store, --into STORE to add a pass to one",
            )
        )
    given = {name: value for name, value in options.items() if value is not None}
    asked = {"out": out or into, "into": into is not None, **given}
    if only_plan:
        _plan(asked, as_json)
        return
    from actstore.maintenance import extract_and_index

    with saying_what_stays(asked["out"]), progress() as report:
        outcome = extract_and_index(report=report, with_index=not no_index, **asked)
    print_outcome(outcome, asked["out"], as_json, asked["model"])


def _plan(asked: dict[str, Any], as_json: bool) -> None:
    from actstore.extraction import Request, plan_extraction

    with progress() as report:
        plan = plan_extraction(Request(**asked), report)
    print_plan(plan, as_json, None if "append" in asked else asked["out"])
