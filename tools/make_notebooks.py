"""Write examples/*.ipynb from examples/src/*.py, and run them: text, code and what the code shows.

python tools/make_notebooks.py [NAME …]     a test fails where a notebook is not what its source and a run of it give

A source is Python in which `# %% [markdown]` begins a cell of text and `# %%` one of code.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SOURCES = {path.stem: path for path in sorted((EXAMPLES / "src").glob("*.py"))}
MARK, TEXT_MARK = "# %%", "# %% [markdown]"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
SECONDS_PER_CELL = 300
COLOURS = 255  # of a picture


def page(name: str) -> Path:
    """Return where the notebook of a source lies."""
    return EXAMPLES / f"{name}.ipynb"


def unrun(name: str) -> NotebookNode:
    """Return the notebook of a source, without outputs."""
    cells = []
    for number, lines in enumerate(_pieces(SOURCES[name].read_text(encoding="utf-8").splitlines())):
        mark, body = lines[0], "\n".join(lines[1:]).strip("\n")
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        cell = new_markdown_cell(text) if mark == TEXT_MARK else new_code_cell(body)
        cell["id"] = f"cell-{number}"
        cells.append(cell)
    return new_notebook(cells=cells, metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})


def _pieces(lines: list[str]) -> list[list[str]]:
    """Return the lines of each cell, its mark first."""
    begins = [number for number, line in enumerate(lines) if line in (MARK, TEXT_MARK)]
    return [lines[first:last] for first, last in zip(begins, [*begins[1:], len(lines)], strict=True)]


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell of a notebook in a fresh kernel in a folder; raises CellExecutionError where one fails."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS_PER_CELL, resources=resources, record_timing=False)
    return tidied(client.execute())


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Return a run notebook of which only what a reader sees is kept: a table or picture without its plain text."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        seen = set(output.get("data", ())) & {"text/html", "image/png"}
        if seen:
            output.data = {kind: output.data[kind] for kind in sorted(seen)}
            output.metadata = {}
        if "image/png" in seen:
            output.data["image/png"] = _smaller(output.data["image/png"])
    return notebook


def _smaller(png: str) -> str:
    """Return a picture, base64, with few colours: a third of its size, and no difference to the eye."""
    made, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode("ascii")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or SOURCES:
        with tempfile.TemporaryDirectory() as made_in:
            done = run(unrun(chosen), Path(made_in))
        nbformat.write(done, page(chosen))
        print(f"{page(chosen).name}: {page(chosen).stat().st_size // 1000} kB")
