"""Named queries: one question a file in `queries/`, its comment the documentation, its parameters declared and bound.

    -- The strongest firings of a feature, each in its context.
    --
    -- :sae      sae              the SAE's id
    -- :k        integer = 20     how many
    SELECT …  $sae … $k

A line `:name type [= default] text` declares a parameter; `:needs artifact text` what a store must have. Beside text,
number, boolean, integer, amount (an integer from 0), count (one from 1) and sae, site, doc, row, feature, layer, head
(one that is stored) there are lists:

    integers    [1, 2, 3, 8], or as text 1-3,8
    texts       [" she", " he"], or as text " she| he"
    documents   conditions that all hold: topic=sports & doc=0-99,200 & text=%goal%, or {"topic": "sports"}, or integers

A file may have several statements for the same question, each below a line that says up to which values it holds; the
first that does is asked, and the last holds always:

    -- :up-to k=100 per_document=0
    SELECT … ;
    -- :else
    SELECT …

`doc` is a document's number, `text` a pattern of LIKE; any other key is one of the metadata, or its JSON path if it
begins with $.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from .errors import InvalidInput, QueryError, explain, unknown_name

__all__ = ["NamedQuery", "Parameter", "load_queries", "named_query", "parse_query"]

_DECLARED = re.compile(r":(\w+)\s+(\w+)(?:\s*=\s*(\S+))?\s{2,}(.+)")
_USED = re.compile(r"\$(\w+)")
_CASE = re.compile(r"^-- :(?:up-to((?: \w+=\d+)+)|else)$", re.MULTILINE)
_MOST_INTEGERS = 100_000
_SPAN = re.compile(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?")
_PATH = re.compile(r'[^$*][^*]*|\$(\.("[^*"]+"|[^\s*".\[\]]+)|\[\d+\])*')
_SPANS = re.compile(r"[\d\s,-]+")
_TYPES: dict[str, type] = {
    "text": str,
    "integer": int,
    "amount": int,
    "count": int,
    "number": float,
    "boolean": bool,
    "sae": str,
    "site": str,
    "doc": int,
    "row": int,
    "feature": int,
    "layer": int,
    "head": int,
    "integers": list,
    "texts": list,
    "documents": list,
}


@dataclass(frozen=True)
class Parameter:
    """A declared parameter; without a default it must be given."""

    name: str
    kind: str  # a key of _TYPES, as the module's text explains them
    default: Any
    required: bool
    help: str

    def parse(self, value: Any) -> Any:
        """Return a value as the parameter's type; text is converted, as it comes from a command line.

        Raises QueryError for a value of another type.
        """
        if value is None and not self.required:
            return None
        try:
            read: Any = _LISTS[self.kind](value) if self.kind in _LISTS else _single(_TYPES[self.kind], value)
            if not _LEAST.get(self.kind, read) <= read <= _MOST.get(self.kind, read):
                raise ValueError
            return read
        except (ValueError, TypeError, KeyError):
            accepted = f"{self.kind}{_SPELLED.get(self.kind, '')}: {self.help}"
            raise QueryError(explain(f"The parameter {self.name!r} is {value!r}", accepted=accepted)) from None


def _single(wanted: type, value: Any) -> Any:
    if isinstance(value, bool) != (wanted is bool) and not isinstance(value, str):
        raise ValueError
    if wanted is bool and isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    if isinstance(value, float) and wanted is int and not value.is_integer():
        raise ValueError
    if wanted is str and not isinstance(value, str):
        raise ValueError
    return wanted(value)


def _texts(value: Any) -> list[str]:
    texts = value.split("|") if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    return list(dict.fromkeys(texts))


def _integers(value: Any) -> list[int]:
    """Return the integers of '1-3,8', each once; a few characters must not become more than memory holds."""
    spans = _spans(value)
    if not spans or sum(last - first + 1 for first, last in spans) > _MOST_INTEGERS:
        raise ValueError
    return list(dict.fromkeys(number for first, last in spans for number in range(first, last + 1)))


def _spans(value: Any) -> list[list[int]]:
    """Return pairs of the first and the last integer, from text such as '1-3,8', one integer or several."""
    if isinstance(value, str):
        found = [_SPAN.fullmatch(part) for part in value.split(",")]
        spans = [[int(one[1]), int(one[2] or one[1])] for one in found if one]
        if len(spans) < len(found) or any(first > last for first, last in spans):
            raise ValueError
        return spans
    numbers = list(value) if isinstance(value, Iterable) else [value]
    if any(isinstance(number, bool) or number < 0 for number in numbers):
        raise ValueError
    return [[operator.index(number)] * 2 for number in numbers]


def _documents(value: Any) -> list[dict[str, Any]]:
    """Return conditions with `key`, `value` and, of the key `doc`, `spans`: what queries bind."""
    if isinstance(value, str) and not _SPANS.fullmatch(value):
        pairs = [tuple(map(str.strip, part.split("=", 1))) for part in value.split(" & ")]
    else:
        pairs = list(value.items() if isinstance(value, Mapping) else [("doc", value)])
    if not pairs or any(len(pair) != 2 or not pair[0] for pair in pairs):
        raise ValueError
    return [_condition(*pair) for pair in pairs]


def _condition(key: str, value: Any) -> dict[str, Any]:
    spans = _spans(value) if key == "doc" else []
    if (key == "doc" and not spans) or value is None:
        raise ValueError
    # Metadata are compared as JSON's ->> shows them: without spaces, exponents without + and zeros.
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, float):
        shown = re.sub(r"e\+?(-?)0*", r"e\1", shown)
    return {"key": _path(key), "value": shown, "spans": spans}


def _path(key: str) -> str:
    """Return a key as ->> takes it; raises ValueError for what would end DuckDB instead of a query: wildcards."""
    if not _PATH.fullmatch(key):
        raise ValueError
    return f"$.{json.dumps(key, ensure_ascii=False)}" if key.startswith("/") else key


_LISTS: dict[str, Callable[[Any], list[Any]]] = {"integers": _integers, "texts": _texts, "documents": _documents}
_LEAST = {"amount": 0, "count": 1}
_MOST = {"amount": 1_000_000, "count": 1_000_000}  # DuckDB keeps no more of an ordered aggregate
_SPELLED = {
    "amount": f" from 0 to {_MOST['amount']}",
    "count": f" from 1 to {_MOST['count']}",
    **dict.fromkeys(("doc", "row", "feature", "layer", "head"), ", an integer"),
    "integers": f" as 1-3,8, at most {_MOST_INTEGERS}",
    "texts": " with | between",
    "documents": " as topic=sports & doc=0-99,200 & text=%goal%",
}


@dataclass(frozen=True)
class NamedQuery:
    """One file of `queries/`."""

    name: str
    summary: str
    text: str  # the rest of the documentation
    parameters: tuple[Parameter, ...]
    needs: tuple[tuple[str, str], ...]  # (table that must have rows, what to do)
    sql: str

    @cached_property
    def _cases(self) -> list[tuple[dict[str, int], str]]:
        """Statements, each with the largest values of parameters that it holds for."""
        marks = list(_CASE.finditer(self.sql))
        if not marks:
            return [({}, self.sql)]
        ends = [*(mark.start() for mark in marks[1:]), len(self.sql)]
        limits = [[one.split("=") for one in (mark[1] or "").split()] for mark in marks]
        return [
            ({name: int(most) for name, most in said}, self.sql[mark.end() : end])
            for said, mark, end in zip(limits, marks, ends, strict=True)
        ]

    def statement(self, bound: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the statement that answers for these values of parameters, and those of them that it uses."""
        sql = next(sql for limits, sql in self._cases if all(bound[name] <= most for name, most in limits.items()))
        return sql, {name: bound[name] for name in _USED.findall(sql)}

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of every parameter.

        Raises QueryError for one that is missing, unknown or of another type.
        """
        names = [parameter.name for parameter in self.parameters]
        for name in given:
            if name not in names:
                raise QueryError(str(unknown_name(f"parameter of {self.name!r}", name, names)))
        missing = [one for one in self.parameters if one.required and one.name not in given]
        if missing:
            wanted = "; ".join(f"{one.name} ({one.kind}: {one.help})" for one in missing)
            raise QueryError(
                explain(
                    f"The query {self.name!r} needs {wanted}",
                    next_step=f"actstore query STORE {self.name} " + " ".join(f"-p {one.name}=…" for one in missing),
                )
            )
        return {one.name: one.parse(given.get(one.name, one.default)) for one in self.parameters}


def named_query(name: str) -> NamedQuery:
    """Return the query with this name; raises UnknownName, offering the nearest, where there is none."""
    queries = load_queries()
    if name not in queries:
        raise unknown_name("query", name, queries, next_step="list them: actstore queries")
    return queries[name]


@cache
def load_queries() -> dict[str, NamedQuery]:
    """Return every query that is installed, by name."""
    found = sorted((file for file in files("actstore.queries").iterdir() if file.name.endswith(".sql")), key=str)
    return {file.name[:-4]: parse_query(file.name, file.read_text(encoding="utf-8")) for file in found}


def parse_query(file: str, source: str) -> NamedQuery:
    """Return the query that a file's text declares.

    Raises InvalidInput, naming file and line, for a parameter that is undeclared, unused or badly declared.
    """
    lines = source.splitlines()
    n_comments = next(
        (number for number, line in enumerate(lines) if not line.startswith("--") or _CASE.match(line)), len(lines)
    )
    comments = [line[2:].strip() for line in lines[:n_comments]]
    sql = "\n".join(lines[n_comments:]).strip()
    declared, needs, prose = _declarations(file, comments)
    if not prose or not prose[0] or not sql:
        raise InvalidInput(explain(f"{file}:1: a query needs a first line that says what it answers, and SQL"))
    _check_use(file, declared, sql, lines)
    text = "\n".join(prose[1:]).strip()
    return NamedQuery(file.removesuffix(".sql"), prose[0], text, tuple(declared), tuple(needs), sql)


def _declarations(file: str, comments: list[str]) -> tuple[list[Parameter], list[tuple[str, str]], list[str]]:
    declared: list[Parameter] = []
    needs: list[tuple[str, str]] = []
    prose: list[str] = []
    for number, comment in enumerate(comments, start=1):
        if not comment.startswith(":"):
            prose.append(comment)
            continue
        match = _DECLARED.fullmatch(comment)
        if match and match[1] == "needs":
            needs.append((match[2], match[4]))
        elif match and match[1] in {one.name for one in declared}:
            raise InvalidInput(explain(f"{file}:{number}: the parameter {match[1]!r} is declared twice"))
        elif match and match[2] in _TYPES:
            declared.append(_parameter(*match.groups()))
        else:
            accepted = f":name type [= default]  text, with a type of {', '.join(_TYPES)}"
            raise InvalidInput(explain(f"{file}:{number}: cannot read {comment!r}", accepted=accepted))
    return declared, needs, prose


def _parameter(name: str, kind: str, default: str | None, text: str) -> Parameter:
    bare = Parameter(name, kind, None, default is None, text)
    value = None if default in (None, "null") else bare.parse(default)
    return Parameter(name, kind, value, default is None, text)


def _check_use(file: str, declared: list[Parameter], sql: str, lines: list[str]) -> None:
    limited = set(re.findall(r"(\w+)=", " ".join(_CASE.findall(sql))))
    names, used = {one.name for one in declared}, set(_USED.findall(sql)) | limited
    for name in sorted(names ^ used):
        mark = re.compile(rf"\${name}\b|^-- :up-to.* {name}=" if name in used else rf"--\s*:{name}\b")
        number = next(n for n, line in enumerate(lines, start=1) if mark.search(line))
        what = "is used and not declared" if name in used else "is declared and not used"
        raise InvalidInput(explain(f"{file}:{number}: the parameter {name!r} {what}"))
