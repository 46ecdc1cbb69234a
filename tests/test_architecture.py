"""The house stands: imports point down, foreign libraries have one home, files are short, nothing read is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "actstore").rglob("*.py"), *(ROOT / "cli").rglob("*.py"), *(ROOT / "queries").rglob("*.py")])

# Each knows earlier ones.
GROUND = (
    *("errors", "progress", "settings", "health", "sealed", "sites", "blocks", "recipe", "tensors", "quantised"),
    *("run_report", "on_demand", "hub", "plain_arrow"),
)
ROOMS = ("models", "saes", "corpus", "store", "index")
FLOORS: dict[str, int] = {
    **dict.fromkeys(GROUND, 0),
    **dict.fromkeys(ROOMS, 1),
    "plots": 1,  # pictures of Arrow tables; knows no room
    **dict.fromkeys(("extraction", "lenses"), 2),
    **dict.fromkeys(("named", "results", "exports", "row_order"), 2),  # values of the facade
    **dict.fromkeys(("api", "loader", "matrices"), 3),
    # Around the facade.
    **dict.fromkeys(("advice", "info", "maintenance", "repair", "labels", "pictures"), 4),
    **dict.fromkeys(("lens_fitting", "lens_saving"), 4),
    **dict.fromkeys(("service", "notebook", "demo", "testing"), 5),
    "": 6,  # actstore/__init__.py
    "cli": 7,
    "queries": 0,
}

# Where a foreign library may be imported at run time. `zarr` stands in annotations of lenses and matrices as well: a
# raw array is part of what they give back.
HOMES: dict[str, set[str]] = {
    "transformers": {"models", "corpus", "extraction"},
    "tokenizers": {"corpus"},
    "datasets": {"corpus"},
    "duckdb": {"index"},
    "zarr": {"store", "exports"},
    "numcodecs": {"store"},
    "google_crc32c": {"store"},
    "fsspec": {"store"},
    "safetensors": {"saes", "lenses"},
    "zipfile": {"saes", "store"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"plots"},
    "click": {"cli"},
    "rich": {"cli"},
    "ray": set(),
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
    "joblib": set(),
    "dill": set(),
}
ENVIRONMENT = ("os.environ", "os.getenv", "os.environb")
READS_TYPES = {"zarr": {"matrices", "lenses"}, "duckdb": {"api"}, "transformers": {"models"}, "tokenizers": {"corpus"}}


def room_of(path: Path) -> str:
    """Return the room that a file belongs to: its package below actstore, or its module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("cli", "queries"):
        return parts[0]
    return "" if parts[1] == "__init__" else parts[1]


def imports_of(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Yield every module that a file imports, by its full name; whether only for types; and the line."""
    package = (
        ["actstore", *path.relative_to(ROOT / "actstore").parts[:-1]]
        if path.is_relative_to(ROOT / "actstore")
        else [
            "actstore",
            *path.relative_to(ROOT).parts[:-1],
        ]
    )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in typing_only, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "actstore":
                for alias in node.names:
                    yield f"actstore.{alias.name}", node in typing_only, node.lineno
            else:
                yield name, node in typing_only, node.lineno


def own_room(module: str) -> str | None:
    """Return the room of a module of ours, None for a foreign one; a name of the package itself is its facade."""
    head, _, rest = module.partition(".")
    if head != "actstore":
        return None
    room = rest.partition(".")[0]
    return room if room in FLOORS else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    here = room_of(path)
    assert here in FLOORS, f"{here} has no floor yet: add it to FLOORS"
    for module, _, line in imports_of(path):
        there = own_room(module)
        if there is None or there == here:
            continue
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        if here == "":
            continue  # the package's door leads everywhere, and late
        assert FLOORS[there] < FLOORS[here] or _neighbours(here, there), where
        assert not (here in ROOMS and there in ROOMS), f"{where}: rooms of one floor do not know each other"


def _neighbours(here: str, there: str) -> bool:
    """On the ground each value knows those before it; around the facade and among the doors all are one room."""
    if here in GROUND and there in GROUND:
        return GROUND.index(there) < GROUND.index(here)
    return FLOORS["api"] <= FLOORS[there] <= FLOORS[here]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_foreign_library_has_one_home(path: Path) -> None:
    here = room_of(path)
    for module, for_types, line in imports_of(path):
        library = module.partition(".")[0]
        if library in HOMES:
            allowed = HOMES[library] | (READS_TYPES.get(library, set()) if for_types else set())
            assert here in allowed, f"{path.relative_to(ROOT)}:{line} imports {library}, at home in {HOMES[library]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), where
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            called = f"{node.func.value.id}.{node.func.attr}"
            tensors_only = any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            )
            assert called != "torch.load" or (path.name == "pickled.py" and tensors_only), where
            assert called not in ("np.load", "os.system", "pickle.loads"), where
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)), "a file begins with what it is"
    assert "TODO" not in text and "FIXME" not in text and "XXX" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_public_name_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = {
        constant.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant)
    }
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            assert ast.get_docstring(node), f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has no docstring"
    defined = {name for node in ast.walk(tree) for name in _names_of(node)}
    assert public <= defined, f"{public - defined} is exported and not there"


def _names_of(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def test_only_settings_read_the_environment() -> None:
    for path in FILES:
        if path.name != "settings.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read = [
                node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) in ENVIRONMENT
            ]
            assert not read, path
