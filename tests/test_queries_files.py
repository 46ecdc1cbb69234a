"""Query files: the comment is the documentation, parameters are declared and used, mistakes have a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actstore.api import Store
from actstore.errors import InvalidInput, QueryError
from actstore.index import TABLES
from actstore.named import Parameter, load_queries, parse_query

FOLDER = Path(__file__).parents[1] / "queries"
GOOD = "-- What is asked.\n--\n-- More about it.\n-- :k  integer = 3  how many\nSELECT $k"


def test_every_file_is_a_query_and_every_query_a_file() -> None:
    assert sorted(load_queries()) == sorted(path.stem for path in FOLDER.glob("*.sql"))


@pytest.mark.parametrize("name", sorted(load_queries()))
def test_a_query_is_documented_and_reads_what_there_is(name: str, opened: Store) -> None:
    query = load_queries()[name]
    assert query.summary.endswith(".") and len(query.summary) > 20 and query.text
    assert all(parameter.help for parameter in query.parameters)
    for table, remedy in query.needs:
        assert table in TABLES and remedy
    assert "{" not in query.sql and "%" not in query.sql.replace("'resid%'", "")  # bound, never formatted


def test_a_file_is_taken_apart() -> None:
    query = parse_query("asked.sql", GOOD)
    assert (query.name, query.summary, query.text, query.sql) == (
        "asked",
        "What is asked.",
        "More about it.",
        "SELECT $k",
    )
    assert query.parameters == (Parameter("k", "integer", 3, False, "how many"),)
    assert query.bind({}) == {"k": 3}
    assert query.bind({"k": "5"}) == {"k": 5}


def test_the_first_statement_that_holds_for_the_values_is_asked_with_what_it_uses() -> None:
    cases = "-- :up-to k=3 n=0\nSELECT $k;\n-- :up-to k=9\nSELECT $k, $n;\n-- :else\nSELECT $n"
    query = parse_query("q.sql", f"-- Asked.\n-- :k  integer  a\n-- :n  integer  b\n{cases}")
    asked = {(k, n): query.statement({"k": k, "n": n}) for k in (3, 9, 10) for n in (0, 1)}
    assert {values: (sql.strip(), used) for values, (sql, used) in asked.items()} == {
        (3, 0): ("SELECT $k;", {"k": 3}),
        (3, 1): ("SELECT $k, $n;", {"k": 3, "n": 1}),
        (9, 0): ("SELECT $k, $n;", {"k": 9, "n": 0}),
        (9, 1): ("SELECT $k, $n;", {"k": 9, "n": 1}),
        (10, 0): ("SELECT $n", {"n": 0}),
        (10, 1): ("SELECT $n", {"n": 1}),
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("SELECT 1", "q.sql:1: ", id="no documentation"),
        pytest.param(
            "-- Asked.\n-- :k  integer  a\n-- :up-to j=3\nSELECT $k;\n-- :else\nSELECT $k",
            "q.sql:3: the parameter 'j' is used and not declared",
            id="a limit of an undeclared parameter",
        ),
        pytest.param("-- Asked.\n", "q.sql:1: ", id="no SQL"),
        pytest.param("--\n-- Late.\nSELECT 1", "q.sql:1: ", id="the first line is empty"),
        pytest.param(
            "-- Asked.\n-- :k  integer  how many\nSELECT 1",
            "q.sql:2: the parameter 'k' is declared and not used",
            id="unused",
        ),
        pytest.param(
            "-- Asked.\nSELECT 1,\n$kk, $k",
            "q.sql:3: the parameter 'k' is used and not declared",
            id="undeclared, its name within another's",
        ),
        pytest.param(
            "-- Asked, of $k.\n-- :kind  text  which\n-- :k  text  what\nSELECT $kind",
            "q.sql:3: the parameter 'k'",
            id="unused, its name within another's",
        ),
        pytest.param(
            "-- Asked.\n-- :k  integer  a\n-- :k  text  b\nSELECT $k",
            "q.sql:3: the parameter 'k' is declared twice",
            id="twice",
        ),
        pytest.param("-- Asked.\n-- :k  whole  a\nSELECT $k", "q.sql:2: cannot read ':k  whole  a'", id="unknown type"),
        pytest.param("-- Asked.\n-- :k  integer\nSELECT $k", "q.sql:2: cannot read", id="no help"),
    ],
)
def test_a_mistake_has_a_file_and_a_line(source: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_query("q.sql", source)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        ("text", "a", "a"),
        ("integer", "-3", -3),
        ("integer", 2.0, 2),
        ("number", "1.5", 1.5),
        ("number", 2, 2.0),
        ("boolean", "TRUE", True),
        ("boolean", False, False),
        ("doc", "7", 7),
        ("count", "1", 1),
        ("amount", 0, 0),
    ],
)
def test_text_of_a_command_line_becomes_the_declared_type(kind: str, given: object, value: object) -> None:
    parsed = Parameter("p", kind, None, True, "help").parse(given)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        pytest.param("integers", "1-3, 8,2", [1, 2, 3, 8], id="ranges"),
        pytest.param("integers", 5, [5], id="one integer"),
        pytest.param("integers", np.array([4, 4, 2]), [4, 2], id="an array"),
        pytest.param("integers", range(3), [0, 1, 2], id="a range"),
        pytest.param("texts", " she| he", [" she", " he"], id="texts"),
        pytest.param("texts", ["|", "a", "a"], ["|", "a"], id="a list of texts"),
        pytest.param("documents", "1-2,7", [("doc", "1-2,7", [[1, 2], [7, 7]])], id="documents by number"),
        pytest.param("documents", 7, [("doc", "7", [[7, 7]])], id="one document"),
        pytest.param("documents", "doc=3 & a = b=c ", [("doc", "3", [[3, 3]]), ("a", "b=c", [])], id="conditions"),
        pytest.param("documents", {"a": " & ", "n": 3}, [("a", " & ", []), ("n", "3", [])], id="a mapping"),
        pytest.param("documents", {"b": True}, [("b", "true", [])], id="as JSON has it"),
    ],
)
def test_lists_are_read_from_text_or_python(kind: str, given: object, value: object) -> None:
    parsed = Parameter("p", kind, None, True, "help").parse(given)
    if kind == "documents":
        parsed = [(one["key"], one["value"], one["spans"]) for one in parsed]
    assert parsed == value


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("integers", ""),
        ("integers", "1-"),
        ("integers", "3-1"),
        ("integers", "-1"),
        ("integers", [1.5]),
        ("integers", [True]),
        ("integers", []),
        pytest.param("integers", "0-99999999999", id="more than memory holds"),
        ("texts", ""),
        ("texts", "a||b"),
        ("texts", [1]),
        ("texts", 3),
        ("documents", ""),
        ("documents", "list"),
        ("documents", "=list"),
        ("documents", "kind=list & short"),
        ("documents", "doc=one"),
        ("documents", {}),
        ("documents", {"kind": None}),
        ("documents", [-1]),
        ("documents", True),
        ("count", 0),
        ("count", "-3"),
        ("amount", -1),
    ],
)
def test_what_cannot_be_a_list_is_refused_with_how_it_is_spelled(kind: str, given: object) -> None:
    with pytest.raises(QueryError, match=rf"The parameter 'p' is .* Accepted: {kind} (as|with|from) .*: help"):
        Parameter("p", kind, None, True, "help").parse(given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("text", 3),
        ("integer", "1.5"),
        ("integer", 1.5),
        ("integer", float("nan")),
        ("integer", True),
        ("integer", None),
        ("integer", [1]),
        ("boolean", "yes"),
        ("boolean", 1),
        ("sae", None),
    ],
)
def test_another_type_is_refused_with_what_is_accepted(kind: str, given: object) -> None:
    with pytest.raises(QueryError, match=rf"The parameter 'p' is .* Accepted: {kind}: help"):
        Parameter("p", kind, None, True, "help").parse(given)


def test_what_a_query_needs_is_named(tmp_path: Path) -> None:
    from asking_support import MODEL

    import actstore

    actstore.extract(MODEL, ["A tea."], out=tmp_path / "x.act", sites=["z.0"], predictions=False, device="cpu")
    with actstore.open(tmp_path / "x.act") as store:
        with pytest.raises(QueryError, match=r"'lens_trajectory' reads lens_summary, .* --lens 5"):
            store.query("lens_trajectory", {"doc": 0})
        with pytest.raises(QueryError, match=r"predictions.* --no-predictions"):
            store.query("surprising_tokens")
        for table in TABLES:
            assert store.sql(f'SELECT * FROM "{table}"').arrow().schema.names == list(TABLES[table])
