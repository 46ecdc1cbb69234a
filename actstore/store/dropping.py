"""What goes with an artifact: its directories, and the kit pieces and labels that only it had (docs/format.md §4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from actstore.blocks import scales_path
from actstore.errors import CorruptStore
from actstore.sealed import read_sealed, write_sealed

from .feature_files import LABELS_FILE, labels_of
from .files import ARRAYS, pass_file
from .kit import kit_file
from .layout import Layout, PassFile

__all__ = ["Labels", "forget_labels", "freed_pieces", "given_labels", "without"]

Labels = Mapping[str, Mapping[str, str]]  # SAE → feature → label


def without(layout: Layout, artifact: str) -> tuple[Layout, list[str]]:
    """Return the layout without an artifact, and the directories that go with it."""
    artifacts = {name: owner for name, owner in layout.artifacts.items() if name != artifact}
    # A pass of which nothing is left goes too: else the same recipe would be taken for done.
    passes = tuple(one for one in layout.passes if one in artifacts.values())
    homes = _homes(artifact) + [f"passes/{one}" for one in layout.passes if one not in passes]
    metadata = {
        path: digest
        for path, digest in layout.metadata.items()
        if not any(path.startswith(f"{home}/") for home in homes)
    }
    sealed = {one: segments for one, segments in layout.sealed.items() if one in passes}
    return replace(layout, passes=passes, artifacts=artifacts, metadata=metadata, sealed=sealed), homes


def _homes(artifact: str) -> list[str]:
    kind, _, name = artifact.partition("/")
    if kind == "firings":
        return [artifact, f"{ARRAYS}/reconstruction/{name}"]
    scales = [f"{ARRAYS}/{scales_path(artifact)}"] if kind == "sites" else []
    return [f"{ARRAYS}/{artifact}", artifact, *scales]


def freed_pieces(root: Path, vocabulary: str, before: Layout, after: Layout) -> list[str]:
    """Return the files of the kit pieces that one layout needs and the other, which has less, does not.

    None where a pass cannot be read: what it needs is not known then, and gc removes what is left over later.
    """
    try:
        freed = _pieces(root, before) - _pieces(root, after) - {vocabulary}
    except (CorruptStore, FileNotFoundError):
        return []
    return [kit_file(digest) for digest in sorted(freed)]


def _pieces(root: Path, layout: Layout) -> set[str]:
    made = {one: PassFile.from_json(read_sealed(root / pass_file(one))) for one in layout.passes}
    return {digest for one, file in made.items() for digest in layout.kit_of(one, file)}


def given_labels(root: Path) -> Labels:
    """Return the labels of all SAEs; raises CorruptStore where they are damaged."""
    path = root / LABELS_FILE
    return labels_of(read_sealed(path), str(path)) if path.exists() else {}


def forget_labels(root: Path, labels: Labels, saes: Iterable[str]) -> int:
    """Remove the labels of these SAEs; return how many there were. Call it with the lock held."""
    gone = {sae: labels[sae] for sae in saes if sae in labels}
    if gone:
        write_sealed(root / LABELS_FILE, {"labels": {sae: of for sae, of in labels.items() if sae not in gone}})
    return sum(map(len, gone.values()))
