"""Write the README's session from a demo store: what the commands print, cut to the page.

actstore demo demo.act && python tools/make_session.py demo.act
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from actstore.demo import assets
from actstore.demo.run import PROMPT_DOC

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- session: python tools/make_session.py -->", "<!-- end of session -->"
COLUMNS = 118


def session(store: str) -> str:
    """Return the commands of the session, each with what it prints."""
    shown = assets().guide["features"][0]
    sae, feature = assets().sae_id(shown["sae"]), shown["feature"]
    statement = (
        "SELECT l.site, v.token, exp(l.logprob) AS probability FROM lens_tokens l JOIN vocabulary v USING (token_id) "
        f"JOIN tokens t USING (row) WHERE t.doc = {PROMPT_DOC} AND t.pos = 9 AND l.rank = 1 ORDER BY site"
    )
    commands = [
        f"actstore lens {store} --doc {PROMPT_DOC} --first 4",
        f"actstore top {store} {sae} {feature} -k 5 --per-document 1",
        f"actstore stats {store} {sae} -k 3",
        f"actstore query {store} surprising_tokens -p k=3",
        f"actstore sql {store} {shlex.quote(statement)}",
    ]
    return "\n".join(f"$ {command}\n{run(command)}\n" for command in commands)


def run(command: str) -> str:
    """Return what a command prints."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    program = [str(Path(sys.executable).parent / "actstore"), *shlex.split(command)[1:]]
    return subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout.rstrip()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n```text\n{session(sys.argv[1])}```\n{END}{after}", encoding="utf-8")
    print(README)
