"""What a store is, on one page: corpus, passes, artifacts with their sizes, and the proofs that are not ok."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .api import INDEX, Store
from .blocks import artifact_of
from .health import check_text
from .run_report import RunReport
from .store import StoreReader, kit_file, last_runs, read_runs

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """A store described: rows of the small tables and bytes by artifact."""

    url: str
    store: Mapping[str, Any]
    corpus: Mapping[str, int]
    passes: list[Mapping[str, Any]]
    sites: list[Mapping[str, Any]]
    saes: list[Mapping[str, Any]]
    n_bytes: Mapping[str, int]
    index: Mapping[str, Any] | None
    health: list[Mapping[str, Any]]
    runs: Mapping[str, list[RunReport]]  # how the last run of a pass went, of each process that was at it at once

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {**vars(self), "runs": {name: [one.to_json() for one in run] for name, run in self.runs.items()}}

    def __str__(self) -> str:
        revision = f" @ {self.store['revision']}" if self.store["revision"] else ""
        lines = [f"{self.url}: {self.store['model']}{revision}, made {self.store['created']}"]
        lines.append("  " + ", ".join(f"{count} {name}" for name, count in self.corpus.items()))
        for one in self.passes:
            lines.append(f"pass {one['pass']}: {one['done']} of {one['total']} shards")
            lines += _run_lines(self.runs.get(one["pass"], []))
        lines += [f"  {name:<44} {count / 1e6:10.1f} MB" for name, count in self.n_bytes.items()]
        if self.index:
            lines.append(
                f"index {self.index['catalog']}: {self.index['n_parts']} parts, {self.index['n_shards']} shards"
            )
        else:
            lines.append(f"no index yet: actstore index {shlex.quote(self.url)}")
        return "\n".join([*lines, *self._health()])

    def _health(self) -> list[str]:
        failed = [check for check in self.health if check["ok"] is False]
        unproved = [check for check in self.health if check["ok"] is None]
        lines = [f"health: {len(self.health)} checks, {len(failed)} not ok, {len(unproved)} not proved"]
        for verdict, checks in (("NOT OK", failed), ("not proved", unproved)):
            lines += [f"  {verdict}: {check_text(one)}" for one in checks]
        return lines


def _run_lines(reports: list[RunReport]) -> list[str]:
    """Return how a pass's last run went: a line, or where several processes shared it, one more for each of them."""
    if len(reports) < 2:
        return [f"  last run: {report}" for report in reports]
    together = sum(report.n_rows for report in reports)
    first = f"  last run: {len(reports)} processes at once, {together} tokens together"
    return [first, *(f"    {report.n_rows} tokens of one: {report}" for report in reports)]


def describe(store: Store) -> Description:
    """Return what a store is; reads receipts and catalog, no array."""
    reader = store.reader
    tables = reader.tables()
    layout = reader.layout
    corpus = {
        "documents": layout.n_docs,
        "sequences": layout.n_seqs,
        "tokens": layout.n_rows,
        "segments": len(layout.segments),
        "shards": layout.n_shards,
    }
    indexed = reader.location.exists(f"{INDEX}/CURRENT")
    return Description(
        url=store.url,
        store=tables["store"][0],
        corpus=corpus,
        passes=[{key: row[key] for key in ("pass", "digest", "done", "total")} for row in tables["passes"]],
        sites=list(tables["sites"]),
        saes=list(tables["saes"]),
        n_bytes={
            **_artifact_bytes(reader),
            **_kit_bytes(reader),
            **({"index": _index_bytes(store)} if indexed else {}),
        },
        index=_index(store) if indexed else None,
        health=list(tables["health"]),
        runs=_runs(reader),
    )


def _runs(reader: StoreReader) -> dict[str, list[RunReport]]:
    """Return the reports of each pass's last run; a pass of which none is known is not there."""
    found = {
        one: [RunReport.from_json(run.report) for run in runs if run.report]
        for one, runs in last_runs(read_runs(reader.location)).items()
    }
    known = {one: [report for report in reports if report is not None] for one, reports in found.items()}
    return {one: reports for one, reports in known.items() if reports}


def _artifact_bytes(reader: StoreReader) -> dict[str, int]:
    """Return bytes on the disk by artifact, as manifests and receipts say."""
    sizes: dict[str, int] = {}
    for manifest in reader.corpus_manifests:
        sizes["corpus"] = sizes.get("corpus", 0) + sum(proof["bytes"] for proof in manifest["files"].values())
    for pass_id, receipts in reader.receipts.items():
        for receipt in receipts.values():
            for path, proof in receipt["files"].items():
                artifact = artifact_of(path.removeprefix("arrays/"))
                if reader.layout.artifacts.get(artifact) == pass_id:
                    sizes[artifact] = sizes.get(artifact, 0) + proof["bytes"]
    return dict(sorted(sizes.items()))


def _kit_bytes(reader: StoreReader) -> dict[str, int]:
    """Return the bytes of the kit, all of it, then piece by piece; what passes share is counted once."""
    names = {reader.store.vocabulary: "vocabulary"}
    for pass_id, made in reader.passes.items():
        needed = reader.layout.kit_of(pass_id, made)
        names |= {digest: name for name, digest in made.kit.items() if digest in needed}
    present = reader.location.names("kit")
    files = {name: kit_file(digest) for digest, name in names.items() if kit_file(digest).split("/")[1] in present}
    sizes = {f"kit/{name}": reader.location.size(file) for name, file in files.items()}
    return {"kit": sum(sizes.values()), **dict(sorted(sizes.items()))}


def _index_bytes(store: Store) -> int:
    return sum(part.n_bytes for part in store.catalog.parts)


def _index(store: Store) -> dict[str, Any]:
    shards = {shard for part in store.catalog.select("tokens") for shard in part.shards}
    return {"catalog": store.catalog.name, "n_parts": len(store.catalog.parts), "n_shards": len(shards)}
