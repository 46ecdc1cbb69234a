"""The doors to a picture, and what cannot be drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from asking_support import ALWAYS, DEAD, RES, SmallStore
from click.testing import CliRunner
from PIL import Image
from plots_support import expression, strip_of

from actstore.api import Store
from actstore.cli import main
from actstore.errors import InvalidInput, MissingDependency, QueryError
from actstore.plots import Asked
from actstore.results import Result

# What cannot be drawn


@pytest.mark.parametrize(
    ("query", "given", "options", "message"),
    [
        (
            "document_features",
            {"doc": 4, "sae": RES},
            {},
            r"'document_features' has no picture. Accepted: .*logit_lens",
        ),
        ("logit_lens", {"doc": 3}, {"firts": 1}, r"does not know firts. Accepted: first, last"),
        ("max_activating", {"sae": RES, "feature": 9}, {"first": 1}, r"does not know first. Accepted: no options"),
        ("logit_lens", {"doc": 3}, {"first": 400}, r"none of those asked for"),
        ("feature_in_document", {"doc": 3, "sae": RES, "feature": 9}, {"first": 400}, r"none of those asked for"),
        ("max_activating", {"sae": RES, "feature": ALWAYS, "k": 101}, {}, r"101 examples. Accepted: at most 100"),
        ("feature_stats", {"sae": RES, "k": 200}, {}, r"features. Accepted: at most 100"),
        ("activation_histogram", {"sae": RES, "feature": DEAD}, {}, r"none of which ever fires"),
        ("logit_lens", {"doc": 3, "sites": "nosuch"}, {}, r"Nothing is stored that the lens"),
    ],
)
def test_what_has_no_picture_says_so(
    opened: Store, query: str, given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        opened.query(query, given).plot(**options)


def test_a_large_picture_is_refused_with_what_to_do(opened: Store) -> None:
    columns: dict[str, Any] = {"site": ["resid_post.0"] * 4001, "layer": [0] * 4001, "rank": [1] * 4001}
    columns |= {name: list(range(4001)) for name in ("row", "pos")} | {"seq": [0] * 4001}
    columns |= {"input": ["a"] * 4001, "token": ["b"] * 4001, "logprob": [-1.0] * 4001}
    with pytest.raises(InvalidInput, match=r"4,001 cells of text. Accepted: at most 4,000. Next: fewer positions"):
        Result(pa.table(columns), asked=Asked("logit_lens")).plot()
    with pytest.raises(InvalidInput, match=r"401 lines or features on a side"):
        expression(401, 12).plot()
    with pytest.raises(InvalidInput, match=r"2,001 tokens"):
        strip_of(["a"] * 2001).plot()


def test_an_answer_that_is_cut_or_is_not_named_has_no_picture(opened: Store, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"cut at 5 rows. Next: raise the limit"):
        opened.query("logit_lens", {"doc": 3}, limit=5).plot()
    with pytest.raises(QueryError, match="An answer to SQL has no picture"):
        opened.sql("SELECT 1").plot()
    with pytest.raises(InvalidInput, match=r"not written as 'x.doc'. Accepted: .png, .pdf, .svg"):
        opened.lens("logit", doc=3).plot(tmp_path / "x.doc")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_install_line_is_said(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'actstore\[plot\]'"):
        opened.lens("logit", doc=3).plot()


# Doors


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_pictures_can_be_printed(opened: Store, tmp_path: Path, ending: str) -> None:
    opened.lens("logit", doc=3).plot(tmp_path / f"x.{ending}")
    head = (tmp_path / f"x.{ending}").read_bytes()[:400]
    assert head.startswith(b"%PDF") if ending == "pdf" else b"<svg" in head


def test_a_notebook_shows_the_picture_by_itself(opened: Store) -> None:
    assert opened.lens("logit", doc=3).plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "logit_lens", "-p", "doc=3", "--last", "5"],
        ["query", "lens_trajectory", "-p", "doc=3"],
        ["lens", "--doc", "3", "--first", "1", "--last", "4"],
        ["top", RES, "9", "-k", "5"],
        ["stats", RES],
        ["stats", RES, "--feature", "9"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_draw(small: SmallStore, tmp_path: Path, arguments: list[str]) -> None:
    command, *rest = arguments
    out = tmp_path / "picture.png"
    result = CliRunner().invoke(main, [command, str(small.path), *rest, "--plot", str(out)])
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        assert f"{out}: {image.width} × {image.height} pixels" in result.stdout


def test_a_command_that_cannot_draw_says_why(small: SmallStore, tmp_path: Path) -> None:
    arguments = ["query", str(small.path), "token_features", "-p", f"sae={RES}", "-p", "row=3"]
    result = CliRunner().invoke(main, [*arguments, "--plot", str(tmp_path / "x.png")])
    assert result.exit_code == 1 and "'token_features' has no picture" in result.stderr


def test_asking_imports_no_matplotlib(small: SmallStore) -> None:
    program = (
        "import sys, actstore\n"
        f"store = actstore.open({str(small.path)!r})\n"
        "store.lens('logit', doc=3)._repr_html_()\n"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
