"""Mending a store: what is damaged is given up, to be made again by what made it; the index is made from the rest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import CorruptStore
from .index import forget_damaged
from .maintenance import clear_old_parts, index, local, verify
from .progress import Report, silent
from .store import GivenUp, Journal, Verification, exclusive, give_up_damaged, no_claims

__all__ = ["Repair", "repair"]


@dataclass(frozen=True)
class Repair:
    """What was given up, and what a verification says of the store since."""

    given_up: list[GivenUp]
    left: Verification


def repair(store: Path, report: Report = silent) -> Repair:
    """Give up the damaged shards of a local store, make damaged parts of its index anew, and verify it.

    The commands of the passes make the shards again, byte for byte. What cannot be mended is told by the verification,
    and the index is left as it is where its making needs that. Raises CorruptStore where what names the files cannot
    be read, StoreBusy while somebody extracts.
    """
    root = local(store)
    with exclusive(root), no_claims(root):
        given_up = give_up_damaged(root, lambda done, total: report("proving shards", done, total, "shards"))
        if given_up:
            Journal(root).write("given_up", passes=[asdict(one) for one in given_up])
    directory = root / "index"
    if directory.is_dir():
        with exclusive(root, "index.lock"):
            forget_damaged(directory)
        with suppress(CorruptStore):
            index(root, report, prove=True)
        clear_old_parts(root)
    return Repair(given_up, verify(root, report))
