"""The hub: folders, files and listings of repositories through its cache; here its errors become ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import MissingInput, explain

__all__ = ["FetchedFile", "fetch_file", "fetch_folder", "is_cached", "list_release"]


@dataclass(frozen=True)
class FetchedFile:
    """A file on this machine, and the commit that it is of."""

    path: Path
    revision: str | None  # commit on the hub; None for a file of this machine


def fetch_folder(repository: str, patterns: Sequence[str], *, revision: str | None) -> Path:
    """Return the folder of a repository's files that fit `patterns`, called as its commit; downloads what is missing.

    Raises MissingInput where it cannot.
    """
    from huggingface_hub import snapshot_download

    with _translated(repository, "model", revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def fetch_file(repository: str, path: str) -> FetchedFile:
    """Return one file of a repository, downloaded unless it is in the cache; raises MissingInput where it cannot."""
    from huggingface_hub import hf_hub_download

    with _translated(repository, path):
        local = Path(hf_hub_download(repository, path))
    return FetchedFile(local, local.parents[path.count("/")].name)


def is_cached(repository: str, path: str) -> bool:
    """Return whether a file is in the cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    with _translated(repository, path):
        return isinstance(try_to_load_from_cache(repository, path), str)


def list_release(repository: str) -> list[str]:
    """Return the paths of all files of a repository; raises MissingInput where the hub cannot be asked."""
    from huggingface_hub import list_repo_files

    with _translated(repository, "its list of files"):
        return list(list_repo_files(repository))


@contextmanager
def _translated(repository: str, wanted: str, revision: str | None = None) -> Iterator[None]:
    """Raise MissingInput, with what to do, for whatever the hub refuses; wanted: what was asked for of it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise _missing(
            f"The repository {repository} is gated, and this machine is not allowed to read it",
            f"accept its terms on the page of {repository} on the hub, then run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise _missing(f"The repository {repository} has no revision {revision!r}", "check the spelling") from error
    except errors.RepositoryNotFoundError as error:
        raise _missing(
            f"There is neither a local path nor a hub repository {repository}",
            "check the spelling; for a private one run `hf auth login`",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _out_of_reach(repository, wanted, error) from error
    except errors.EntryNotFoundError as error:
        raise _missing(
            f"The repository {repository} has no {wanted}",
            "check the spelling, or end the path in 'canonical' to take the SAE whose average L0 is nearest 100",
        ) from error
    except ValueError as error:  # a name that no repository or file of the hub can have
        accepted = "owner/name, of a file owner/name/path"
        raise _missing(f"{repository} has no {wanted}: {error}", "check the spelling", accepted) from error
    except OSError as error:
        raise _out_of_reach(repository, wanted, error) from error
    except Exception as error:
        if not _is_of_the_wire(error):
            raise
        raise _out_of_reach(repository, wanted, error) from error


def _is_of_the_wire(error: Exception) -> bool:
    """Return whether the hub's HTTP library raised it: which one that is changes with huggingface_hub's version."""
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpx2", "requests") for kind in type(error).__mro__)


def _out_of_reach(repository: str, wanted: str, error: Exception) -> MissingInput:
    return _missing(
        f"{wanted} of {repository} is not in the hub's cache, the hub could not be asked "
        f"({type(error).__name__}), and there is no such local path",
        f"check the spelling of a local path; where there is a connection run `hf download {repository}` (of an SAE, "
        "with its path), or give a local folder; offline, 'canonical' and globs work on local folders only",
    )


def _missing(what: str, next_step: str, accepted: str | None = None) -> MissingInput:
    return MissingInput(explain(what, accepted=accepted, next_step=next_step))
