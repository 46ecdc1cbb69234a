"""What a notebook shows of an answer: shaded tokens, everything escaped, nothing loaded, never large."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest
from asking_support import ALWAYS, RES, SmallStore
from hypothesis import given
from hypothesis import strategies as st

from actstore.api import Store
from actstore.plots import CELL_CHARACTERS, SHOWN_COLUMNS, SHOWN_ROWS, STRIP_TOKENS, css_colour
from actstore.results import Result

ALLOWED = {"table", "thead", "tbody", "tr", "th", "td", "mark", "span", "div", "p", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "<img src=http://example.com/x.png>",
    "</td></table><b>",
    "«<i>»",
    "&lt;b&gt;",
    "\u202eevil",
    "a\nb\x00c",
]


class Shown(HTMLParser):
    """The tags with their attributes, and the text that a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.spans: list[tuple[str, str | None]] = []
        self.feed(source)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("span", "mark"):
            self.spans.append((data, self.tags[-1][1].get("style")))


def shown(table: dict[str, Any], *, truncated: bool = False) -> Shown:
    """Return what a notebook makes of a table; it must be harmless."""
    source = Result(pa.table(table), truncated)._repr_html_()
    parsed = Shown(source)
    for tag, attributes in parsed.tags:
        assert tag in ALLOWED and set(attributes) <= {"style", "title"}
        assert not re.search(r"url\(|@import|expression|[<>\"]", attributes.get("style") or "")
    assert "://" not in "".join(value or "" for _, attributes in parsed.tags for value in attributes.values())
    return parsed


def running(tokens: list[str], activations: list[float | None], rows: list[int] | None = None) -> dict[str, Any]:
    return {
        "row": rows or list(range(len(tokens))),
        "token": tokens,
        "activation": pa.array(activations, pa.float32()),
    }


# Strips


def test_running_tokens_are_a_strip_shaded_by_activation() -> None:
    page = shown(running(["A", " cat", " sat", "\n"], [0.0, 2.0, 4.0, None]))
    assert page.text.startswith("A cat sat⏎")
    strip = dict(page.spans[:4])
    assert strip["A"] is None and strip["⏎"] is None
    assert css_colour(0.5) in (strip[" cat"] or "") and css_colour(1) in (strip[" sat"] or "")
    assert "darkest: activation 4" in page.text
    titles = [attributes["title"] for tag, attributes in page.tags if "title" in attributes]
    assert titles == ["2", "4"]


@pytest.mark.parametrize(
    ("rows", "seqs", "is_strip"),
    [
        pytest.param([5, 6, 7], [0, 0, 0], True, id="one sequence"),
        pytest.param([5, 6, 512], [0, 0, 1], True, id="the next sequence begins in another shard"),
        pytest.param([5, 6, 8], [0, 0, 0], False, id="a token is left out"),
        pytest.param([7, 6, 5], [0, 0, 0], False, id="by activation"),
        pytest.param([5, 5, 6], [0, 0, 0], False, id="a token twice"),
    ],
)
def test_only_running_text_is_a_strip(rows: list[int], seqs: list[int], is_strip: bool) -> None:
    page = shown({**running(["a", "b", "c"], [1.0, 2.0, 3.0], rows), "seq": seqs})
    assert ("div" in [tag for tag, _ in page.tags]) == is_strip


def test_a_feature_over_a_document_is_its_text(opened: Store, small: SmallStore) -> None:
    result = opened.query("feature_in_document", {"doc": 4, "sae": RES, "feature": ALWAYS})
    page = Shown(result._repr_html_())
    tokens = [row["token"].replace("\n", "⏎") for row in result.rows()]
    assert page.text.startswith("".join(tokens[:STRIP_TOKENS]))


def test_a_text_where_nothing_fires_says_so() -> None:
    page = shown(running(["a", "b"], [0.0, 0.0]))
    assert "no token fires" in page.text
    assert all(style is None for _, style in page.spans)


# Tables


def test_a_snippet_is_shaded_by_its_activation() -> None:
    page = shown({"activation": pa.array([4.0, 1.0], pa.float32()), "example": ["x «a» y", "p «b» q"]})
    assert [
        (text, css_colour(share) in (style or "")) for (text, style), share in zip(page.spans, (1, 0.25), strict=True)
    ] == [
        ("a", True),
        ("b", True),
    ]
    assert "«" not in page.text
    plain = shown({"example": ["x «a» y"], "other": ["an open « quote"]})
    assert plain.spans == [("a", None)] and "an open « quote" in plain.text


def test_a_token_by_itself_is_shaded() -> None:
    page = shown(running(["b", "a"], [2.0, 1.0], [9, 3]))
    assert [text for text, _ in page.spans] == ["b", "a"]
    assert css_colour(1) in (page.spans[0][1] or "")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_not_obeyed(text: str) -> None:
    page = shown({text: [text], **running([text], [1.0]), "example": [f"«{text}»"]})
    assert "script" not in [tag for tag, _ in page.tags]
    assert shown(running([text] * 3, [1.0, 2.0, 0.0])).text
    assert "\x00" not in page.text and "\u202e" not in page.text


@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32)),
        min_size=1,
        max_size=12,
    )
)
def test_any_answer_is_harmless_and_whole_html(rows: list[tuple[str, float | None]]) -> None:
    texts = [text.encode(errors="replace").decode() for text, _ in rows]
    activations = [activation for _, activation in rows]
    shown({**running(texts, activations), "example": texts})
    shown(running(texts, activations))


def test_size_is_capped_whatever_the_answer_holds() -> None:
    wide = {f"column {number}": ["x" * 10_000] * 500 for number in range(60)}
    page = shown(wide)
    assert "x" * (CELL_CHARACTERS + 1) not in page.text
    assert page.text.count("…") == SHOWN_ROWS * SHOWN_COLUMNS
    assert f"500 rows; the first {SHOWN_ROWS} are shown" in page.text
    assert f"60 columns; the first {SHOWN_COLUMNS} are shown" in page.text
    long = shown(running(["y" * 1000] * 5000, [1.0] * 5000))
    assert f"({5000 - STRIP_TOKENS} more tokens)" in long.text
    assert len(Result(pa.table(wide))._repr_html_()) < 1_000_000


def test_what_was_cut_is_said() -> None:
    assert "there are more" in shown({"a": [1]}, truncated=True).text
    assert "there are more" not in shown({"a": [1]}).text
    assert shown({"a": list(range(SHOWN_ROWS))}).text.endswith(str(SHOWN_ROWS - 1))


def test_numbers_stand_on_the_right_and_nothing_is_empty() -> None:
    page = shown({"n": [1, None], "text": ["a", None], "yes": [True, False], "list": [[1.5, 2.0], []]})
    styles = [attributes["style"] for tag, attributes in page.tags if tag == "td"]
    assert "right" in (styles[0] or "") and "left" in (styles[1] or "") and "left" in (styles[2] or "")
    assert "[1.5, 2]" in page.text
