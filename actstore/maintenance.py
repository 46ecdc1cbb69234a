"""What changes a store from outside: extract, encode, save a lens, index, verify, gc, drop, label."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ActstoreError, InvalidInput, MissingInput, explain, unknown_name
from .index import Catalog, build_index, find_orphans, gc_index, verify_index
from .labels import read_labels
from .progress import Report, silent
from .sealed import write_sealed
from .sites import Site, parse_site
from .store import LOCK_SECONDS, StoreReader, StoreWriter, Verification, exclusive, no_claims, sweep_store, verify_store

if TYPE_CHECKING:
    from .extraction import Outcome

__all__ = [
    "clear_old_parts",
    "collect_garbage",
    "drop",
    "encode_and_index",
    "extract_and_index",
    "index",
    "label",
    "local",
    "save_lens_and_index",
    "verify",
]


def extract_and_index(*, report: Report = silent, with_index: bool = True, **options: Any) -> Outcome:
    """Extract, then index what is done; another process that indexes already is left to it.

    `options` are the fields of `Request`. Raises ActstoreError for everything that a user can cause.
    """
    from .extraction import Request, extract

    request = Request(**_with_tuples(options))
    return _indexed(request.out, extract(request, report), report, with_index)


def encode_and_index(store: str | Path, *, report: Report = silent, with_index: bool = True, **options: Any) -> Outcome:
    """Encode stored sites with new SAEs, then index what is done, without the model.

    `options` are the fields of `EncodeRequest`. Raises ActstoreError for everything that a user can cause.
    """
    from .extraction import EncodeRequest, encode

    request = EncodeRequest(store=local(store), **_with_tuples(options))
    return _indexed(request.store, encode(request, report), report, with_index)


def save_lens_and_index(
    store: str | Path, *, report: Report = silent, with_index: bool = True, **options: Any
) -> Outcome:
    """Read stored residual streams through a lens and store what it says, then index it, without the model.

    `options` are those of `actstore.lens_saving.LensRequest`. Raises ActstoreError for everything that a user can
    cause.
    """
    from .lens_saving import LensRequest, save_lens

    request = LensRequest(store=local(store), **_with_tuples(options))
    return _indexed(request.store, save_lens(request, report), report, with_index)


def _with_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose lists are tuples; raises InvalidInput where a list is a text."""
    for name in ("sites", "saes", "lens_sites"):
        if isinstance(options.get(name), str):
            raise InvalidInput(
                explain(f"{name} is the text {options[name]!r}", accepted="a list", next_step=f"{name}=[…]")
            )
        if name in options:
            options[name] = tuple(options[name])
    return options


def _indexed(store: Path, outcome: Outcome, report: Report, with_index: bool) -> Outcome:
    if with_index and outcome.complete:
        # Whoever indexes at this moment may not see what we have just made: wait for it, then look again.
        index(store, report, wait_seconds=LOCK_SECONDS)
    return outcome


def index(
    store: Path,
    report: Report = silent,
    *,
    memory_bytes: int = 2 << 30,
    wait_seconds: float = 5.0,
    prove: bool = False,
) -> Catalog:
    """Build or extend the index of a local store from its truth; compacts where an SAE has too many parts.

    `prove` reads every part that is there, and makes anew what is damaged.

    Raises StoreBusy where another process published an index meanwhile.
    """
    directory = local(store) / "index"
    with exclusive(store, "index.lock", wait_seconds=wait_seconds):
        return build_index(
            StoreReader(store),
            directory,
            memory_bytes=memory_bytes,
            progress=lambda what, done, total: report("indexing", done, total, f"shards of {what}"),
            lock=exclusive(store, wait_seconds=LOCK_SECONDS),  # an appended corpus may be being tokenised
            compact=True,
            prove=prove,
        )


def local(store: str | Path) -> Path:
    """Return a local store's directory.

    Raises MissingInput where there is none, InvalidInput for a URL: only local stores are written.
    """
    if "://" in str(store):
        raise InvalidInput(
            explain(
                f"{store} is remote, and this changes the store", accepted="a local directory", next_step="copy it here"
            )
        )
    return StoreWriter.open(Path(store)).root


def verify(store: Path, report: Report = silent) -> Verification:
    """Prove every byte of a local store and of its index; all faults are named at once."""
    root = Path(store)
    if not root.is_dir():
        raise MissingInput(explain(f"There is no store at {root}", accepted="a local directory"))
    found = verify_store(root, lambda done, total: report("verifying", done, total, "files"))
    directory = root / "index"
    if directory.is_dir():
        found.faults += verify_index(directory)
        found.orphans += [f"index/{path.name}" for path in find_orphans(directory)]
    return found


def collect_garbage(store: Path) -> list[str]:
    """Remove what nothing names: unfinished files, dead claims, parts of old catalogs; return their names."""
    root = local(store)
    return sweep_store(root) + clear_old_parts(root)


def clear_old_parts(root: Path) -> list[str]:
    """Remove what the current catalog of a store's index does not name; return the names."""
    if not (root / "index").is_dir():
        return []
    with exclusive(root, "index.lock"):  # a build that has not published yet owns parts that nothing names
        return [f"index/{name}" for name in gc_index(root / "index", lock=exclusive(root))]


def drop(store: Path, artifact: str, report: Report = silent) -> str:
    """Remove a site, an SAE's firings and labels, predictions or a lens, free the space, index again; return its name.

    A pass that never ended, for want of disk say, can be dropped as well; resumed, it makes what is left of it.
    Nothing else is read or removed: gc does that. Raises UnknownName where the store does not have it, StoreBusy while
    somebody extracts; an error of the index says that the artifact is gone.
    """
    root = local(store)
    with exclusive(root), no_claims(root):
        writer = StoreWriter.open(root)
        name = _artifact(artifact, writer)
        n_labels = writer.drop(name)
    if n_labels:
        report(f"removed with {name}: {n_labels} labels of its features", 0, None, "")
    if (root / "index" / "CURRENT").exists():
        _index_without(root, name, report)
    return name


def _index_without(root: Path, name: str, report: Report) -> None:
    """Index what is left and free the space of what was indexed; an error says what has happened and what has not."""
    try:
        index(root, report, wait_seconds=LOCK_SECONDS)
        clear_old_parts(root)
    except ActstoreError as error:
        at = shlex.quote(str(root))
        what = f"{name} is gone, but the index is as it was or keeps old parts ({error})"
        next_step = f"mend or wait for that, then actstore index {at} and actstore gc {at}"
        raise type(error)(explain(what, next_step=next_step)) from error


def _artifact(text: str, writer: StoreWriter) -> str:
    known = [name for name in writer.layout.artifacts if not name.startswith("corpus/")]
    candidates = (text, f"sites/{text}", f"firings/{text}")
    lenses = [name for name in known if name.startswith("lens/") and name.endswith(f"/{text}")]
    found = [name for name in candidates if name in known] + lenses
    if not found and "." in text:
        found = [name for name in (f"sites/{_canonical(text)}",) if name in known]
    if not found:
        raise unknown_name("artifact", text, known, next_step="see what is stored: actstore info STORE")
    if len(found) > 1:
        raise InvalidInput(explain(f"{text!r} could be {' or '.join(found)}", next_step="give the whole name"))
    return found[0]


def _canonical(text: str) -> Site | str:
    try:
        return parse_site(text)
    except (InvalidInput, LookupError):
        return text


def label(store: Path, file: Path, report: Report = silent) -> int:
    """Name features from a file of sae, feature, label, or of Neuronpedia's explanations; return how many were named.

    Labels given before are kept unless the file names the same feature. Explanations of SAEs that are not stored are
    left out and reported. Raises InvalidInput, with the line, for rows that do not fit, UnknownName for an SAE that is
    not stored.
    """
    root = local(store)
    with exclusive(root):
        reader = StoreReader(root)  # not before: an SAE that is dropped meanwhile must not be labelled
        labels: dict[str, dict[str, str]] = {}
        for sae, feature, text in reader.labels():
            labels.setdefault(sae, {})[str(feature)] = text
        found = read_labels(file, reader.saes)
        for (sae, feature), text in found.texts.items():
            labels.setdefault(sae, {})[str(feature)] = text
        write_sealed(root / "labels.json", {"labels": labels})
    for source, n_explanations in found.unknown.most_common(20):
        report(f"left out: {n_explanations} explanations of {source}, which is not stored", 0, None, "")
    if found.n_empty:
        report(f"left out: {found.n_empty} explanations without a description", 0, None, "")
    return len(found.texts)
