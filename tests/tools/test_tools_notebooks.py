"""A store in JupySQL and in marimo: `store.connect()` is all they need, and answers show as text and pictures."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking_support import RES, SmallStore

from actstore.api import Store

os.environ["PLOOMBER_STATS_ENABLED"] = "false"  # JupySQL otherwise reports its use over the network

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of their own imports
    pytest.importorskip("sql.magic")
    marimo: Any = pytest.importorskip("marimo")
    from IPython.core.interactiveshell import InteractiveShell

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

QUESTION = (
    "SELECT row, token, snippet(row, 2, 2) AS example, act('z.2', row)[1] AS first FROM tokens ORDER BY row LIMIT 7"
)

NOTEBOOK = """
import marimo

app = marimo.App()


@app.cell
def opening():
    import actstore

    store = actstore.open({path!r})
    connection = store.connect()
    return connection, store


@app.cell
def asking(connection):
    import marimo as mo

    answer = mo.sql("SELECT count(*) AS n FROM documents", engine=connection)
    return (answer,)
"""


@pytest.fixture(scope="module")
def shell(small: SmallStore) -> Iterator[Any]:
    """An IPython shell in which JupySQL is loaded and has a store's connection."""
    made = InteractiveShell.instance()
    with small.open() as store:
        made.user_ns["connection"] = store.connect()
        made.run_line_magic("load_ext", "sql")
        made.run_line_magic("sql", "connection")
        yield made
        made.user_ns["connection"].close()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("as_cell", [False, True], ids=["line", "cell"])
def test_jupysql_asks_tables_and_functions(shell: Any, opened: Store, as_cell: bool) -> None:
    found = shell.run_cell_magic("sql", "", QUESTION) if as_cell else shell.run_line_magic("sql", QUESTION)
    assert found.DataFrame().to_dict("records") == opened.sql(QUESTION).df().to_dict("records")


def test_jupysql_composes_snippets_over_views(shell: Any, opened: Store) -> None:
    shell.run_cell_magic("sql", "--save strong --no-execute", f"SELECT * FROM activations WHERE sae = '{RES}'")
    found = shell.run_cell_magic("sql", "--with strong", "SELECT count(*) AS n, max(activation) AS most FROM strong")
    expected = opened.sql(f"SELECT count(*) AS n, max(activation) AS most FROM activations WHERE sae = '{RES}'")
    assert found.DataFrame().to_dict("records") == expected.rows()


def test_marimo_asks_tables_and_functions(opened: Store) -> None:
    connection = opened.connect()
    found = marimo.sql(QUESTION, engine=connection, output=False)
    assert found.to_dicts() == opened.sql(QUESTION).rows()
    connection.close()


def test_a_marimo_notebook_runs(small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebook.py").write_text(NOTEBOOK.format(path=str(small.path)))
    monkeypatch.syspath_prepend(tmp_path)
    _, defined = importlib.import_module("notebook").app.run()
    assert defined["answer"]["n"].to_list() == [len(small.documents)]


def test_notebooks_show_answers_as_html_and_pictures(shell: Any, opened: Store) -> None:
    result = opened.query("feature_in_document", {"doc": 4, "sae": RES, "feature": 9})
    shown, _ = shell.display_formatter.format(result)
    assert shown["text/html"] == result._repr_html_()
    picture, _ = shell.display_formatter.format(result.plot())
    assert picture["image/png"].startswith(b"\x89PNG")
    assert "background:#" in marimo.as_html(result).text
    assert "image/png" in marimo.as_html(result.plot()).text
