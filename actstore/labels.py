"""Names of features from a file: our own fields, or the explanations that Neuronpedia exports."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InvalidInput, MissingInput, explain, unknown_name

__all__ = ["Labels", "read_labels"]

ACCEPTED = "a .csv, .jsonl or .json of sae, feature, label, or of Neuronpedia's modelId, layer, index, description"

Row = Mapping[str, Any]


@dataclass
class Labels:
    """What a file names: by SAE and feature, the later row where there are several; and what it names elsewhere."""

    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)  # explanations by Neuronpedia's id of an SAE not stored
    n_empty: int = 0  # explanations without a description


COLUMNS = frozenset({"sae", "feature", "label"})


def read_labels(file: Path, saes: list[dict[str, Any]]) -> Labels:
    """Return the labels of a `.csv`, `.jsonl`, `.jsonl.gz` or `.json` for stored SAEs (rows of the table `saes`).

    A Neuronpedia explanation is of the SAE that has its `neuronpedia_id`, or, without one, the source as its id.
    Raises MissingInput, InvalidInput with the line for a row that does not fit, UnknownName for an SAE that is not
    stored; explanations of SAEs that are not stored are counted.
    """
    widths = {row["sae"]: int(row["width"]) for row in saes}
    sources = {row["neuronpedia_id"]: row["sae"] for row in saes if row["neuronpedia_id"]}
    found = Labels()
    number = 0
    for number, row in _rows(file):
        where = f"{file}:{number}"
        if "modelId" in row:
            _explanation(row, where, sources, widths, found)
        else:
            sae, feature, text = _label(row, where)
            if sae not in widths:
                raise unknown_name("stored SAE", sae, widths, next_step=f"correct {where}")
            found.texts[sae, _feature(feature, sae, widths, where)] = text
    if not number:
        raise InvalidInput(explain(f"{file} has no row", accepted=ACCEPTED))
    return found


def _explanation(row: Row, where: str, sources: Mapping[str, str], widths: Mapping[str, int], found: Labels) -> None:
    """Add what one of Neuronpedia's explanations says, or count it."""
    try:
        model, source = row["modelId"], row.get("layer") or row["sourceId"]
        index, text = int(str(row["index"])), row["description"]
        if not all(isinstance(one, str) for one in (model, source, text or "")):
            raise TypeError
        (text or "").encode()  # a lone surrogate is no text
    except (KeyError, TypeError, ValueError):
        accepted = "fields modelId, layer or sourceId, index, description"
        raise InvalidInput(explain(f"{where}: {dict(row)} is not an explanation", accepted=accepted)) from None
    name = f"{model}/{source}"
    sae = sources.get(name) or (source if source in widths and source not in sources.values() else None)
    if sae is None:
        found.unknown[name] += 1
    elif not text:
        found.n_empty += 1
    else:
        found.texts[sae, _feature(index, sae, widths, where)] = text


def _label(row: Row, where: str) -> tuple[str, int, str]:
    try:
        sae, feature, text = row["sae"], int(str(row["feature"])), row["label"]
        if not (isinstance(sae, str) and isinstance(text, str)):
            raise TypeError
        text.encode()  # a lone surrogate is no text
    except (KeyError, TypeError, ValueError):
        raise InvalidInput(explain(f"{where}: {dict(row)} is not a label", accepted=ACCEPTED)) from None
    return sae, feature, text


def _feature(feature: int, sae: str, widths: Mapping[str, int], where: str) -> int:
    if not 0 <= feature < widths[sae]:
        raise InvalidInput(explain(f"{where}: {sae} has no feature {feature}", accepted=f"0 to {widths[sae] - 1}"))
    return feature


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file with their number: the line, or in one JSON list the place from 1 on."""
    if not file.is_file():
        raise MissingInput(explain(f"There is no file {file}", accepted=ACCEPTED))
    try:
        with _text(file) as lines:
            yield from _parsed(lines, file.name.removesuffix(".gz"))
    except UnicodeDecodeError as error:
        raise InvalidInput(explain(f"{file} is not UTF-8 ({error.reason})", next_step="convert it to UTF-8")) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InvalidInput(explain(f"{file} is not whole gzip", next_step="download it again")) from None


def _text(file: Path) -> io.TextIOWrapper:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _parsed(lines: io.TextIOWrapper, name: str) -> Iterator[tuple[int, Row]]:
    if name.endswith(".csv"):
        yield from _csv_rows(csv.DictReader(lines), name)
    elif name.endswith(".json"):
        yield from ((number, _row(one)) for number, one in enumerate(_listed(lines.read(), name), start=1))
    else:
        yield from ((number, _row(_json(line))) for number, line in enumerate(lines, start=1) if line.strip())


def _csv_rows(reader: csv.DictReader[str], name: str) -> Iterator[tuple[int, Row]]:
    try:
        header = reader.fieldnames or ()
        if header and not COLUMNS.issubset(header) and "modelId" not in header:
            raise InvalidInput(explain(f"{name}:1: the columns are {', '.join(header)}", accepted=ACCEPTED))
        yield from ((reader.line_num, dict(row)) for row in reader)
    except csv.Error as error:
        what = f"{name}:{reader.reader.line_num}: this is no CSV ({error})"
        raise InvalidInput(explain(what, accepted=f"fields of at most {csv.field_size_limit():,} characters")) from None


def _listed(text: str, name: str) -> list[Any]:
    """Return the rows of a JSON file: a list, or an object with the list under "explanations"."""
    value = _json(text)
    value = value.get("explanations") if isinstance(value, dict) else value
    if not isinstance(value, list):
        accepted = 'a list of rows, or an object with the list under "explanations"'
        raise InvalidInput(explain(f"{name} is not a list of labels", accepted=accepted))
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _row(value: Any) -> Row:
    return value if isinstance(value, dict) else {}
