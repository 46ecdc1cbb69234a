"""The folder of a tuned lens: `config.json` and `params.safetensors` or, where allowed, `params.pt`.

The layout is that of the published ones (Belrose et al. 2023): tensors `"{i}.weight"` (d_model, d_model) and
`"{i}.bias"` (d_model) for i from 0. A lens fitted here says in `config.json` under `actstore` which unembedding it was
fitted with and which sites; the published loader drops that key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, MissingInput, UnsupportedFormat, explain
from actstore.saes.faults import Unreadable
from actstore.saes.weights import Weights, open_weights
from actstore.sealed import write_durably

__all__ = ["LensConfig", "Translator", "find_translators", "read_config", "read_translators", "write_lens"]

CONFIG, SAFE, PICKLED = "config.json", "params.safetensors", "params.pt"
LENS_TYPE = "linear_tuned_lens"
OURS = "actstore"  # the key of `config.json` that only we write
_KEY = re.compile(r"(0|[1-9]\d{0,4})\.(weight|bias)")
_LARGEST_CONFIG_BYTES = 1 << 20
_KEYS = (
    "base_model_name_or_path",
    "base_model_revision",
    "bias",
    "d_model",
    "lens_type",
    "num_hidden_layers",
    "unembed_hash",
    OURS,
)


@dataclass(frozen=True)
class Translator:
    """The affine map of one layer, x + x @ weightᵀ + bias.

    weight float32 (d_model, d_model), bias float32 (d_model).
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def apply(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return translated residual rows: (row, d_model) of any float dtype → float32 (row, d_model)."""
        exact = rows.astype(np.float32)
        return np.asarray(exact + exact @ self.weight.T + self.bias, dtype=np.float32)


@dataclass(frozen=True)
class LensConfig:
    """What `config.json` says; `ours` is what a lens fitted here adds, empty in published ones."""

    d_model: int
    n_layers: int
    base_model: str
    revision: str | None = None
    unembed_hash: str | None = None
    has_bias: bool = True
    ours: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the body of `config.json`."""
        return {
            "base_model_name_or_path": self.base_model,
            "base_model_revision": self.revision,
            "bias": self.has_bias,
            "d_model": self.d_model,
            "lens_type": LENS_TYPE,
            "num_hidden_layers": self.n_layers,
            "unembed_hash": self.unembed_hash,
            OURS: dict(self.ours),
        }


def read_config(folder: Path) -> LensConfig:
    """Return what a lens' `config.json` says.

    Raises MissingInput where there is none, UnsupportedFormat for another kind of lens or keys that are not known.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingInput(
            explain(f"There is no tuned lens in {folder}", accepted=f"a folder with {CONFIG} and {SAFE} (or {PICKLED})")
        )
    if path.stat().st_size > _LARGEST_CONFIG_BYTES:
        raise _refused(path, ["it is larger than 1 MiB"])
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refused(path, ["it is not JSON"]) from error
    if faults := _config_faults(body):
        raise _refused(path, faults)
    return LensConfig(
        d_model=body["d_model"],
        n_layers=body["num_hidden_layers"],
        base_model=str(body.get("base_model_name_or_path", "")),
        revision=body.get("base_model_revision"),
        unembed_hash=body.get("unembed_hash"),
        has_bias=body.get("bias", True),
        ours=body.get(OURS, {}),
    )


def _config_faults(body: Any) -> list[str]:
    if not isinstance(body, dict):
        return ["it is not an object"]
    faults = [f"{key} is not known, and could change the equation" for key in sorted(set(body) - set(_KEYS))]
    if body.get("lens_type", LENS_TYPE) != LENS_TYPE:
        faults.append(f"lens_type is {body['lens_type']!r}, where {LENS_TYPE!r} is read")
    for key in ("d_model", "num_hidden_layers"):
        if type(body.get(key)) is not int or not 1 <= body[key] <= 1 << 20:
            faults.append(f"{key} is {body.get(key)!r}, not a number of them")
    for key, kind in (("bias", bool), ("unembed_hash", str | None), ("base_model_revision", str | None), (OURS, dict)):
        if key in body and not isinstance(body[key], kind):
            faults.append(f"{key} is {body[key]!r}")
    return faults


def find_translators(folder: Path, config: LensConfig, *, allow_pt: bool = False) -> tuple[Path, tuple[int, ...]]:
    """Return the file of the translators and their numbers, from headers alone.

    Raises MissingInput where there is none, UnsupportedFormat for a pickle that was not allowed or for what does not
    fit the configuration; all faults in one message.
    """
    path = folder / SAFE
    if not path.is_file() and (folder / PICKLED).is_file():
        if not allow_pt:
            raise UnsupportedFormat(
                explain(
                    f"{folder / PICKLED} is a pickle: a program that runs when it is opened",
                    accepted=SAFE,
                    next_step="where you trust its makers say --allow-pt (allow_pt=True): tensors alone are read of it",
                )
            )
        path = folder / PICKLED
    with _opened(path) as weights:
        shapes = {name: tuple(header.shape) for name, header in weights.headers.items()}
        if faults := _shape_faults(shapes, config):
            raise Unreadable(faults)
    return path, tuple(sorted(int(name.partition(".")[0]) for name in shapes if name.endswith("weight")))


def _shape_faults(shapes: Mapping[str, tuple[int, ...]], config: LensConfig) -> list[str]:
    d_model, faults = config.d_model, []
    expected = {"weight": (d_model, d_model), "bias": (d_model,)}
    for name, shape in shapes.items():
        key = _KEY.fullmatch(name)
        if key is None or int(key[1]) >= config.n_layers:
            faults.append(f"{name} is no translator of {config.n_layers} layers")
        elif shape != expected[key[2]]:
            faults.append(f"{name} is {shape}, where {expected[key[2]]} is read")
        elif key[2] == "bias" and not config.has_bias:
            faults.append(f"{name} is there, and the configuration says that there is none")
        else:
            other = f"{key[1]}.{'bias' if key[2] == 'weight' else 'weight'}"
            faults += [f"{other} is missing"] if other not in shapes and config.has_bias else []
    partial = config.ours.get("sites")  # a lens fitted here has the layers that were stored
    wanted = range(config.n_layers) if partial is None else ()
    missing = [number for number in wanted if f"{number}.weight" not in shapes]
    return faults + ([f"translators {missing} are missing"] if missing else [])


def read_translators(path: Path, config: LensConfig, numbers: Iterable[int]) -> Iterator[tuple[int, Translator]]:
    """Yield translators by their numbers, one in memory at a time; raises UnsupportedFormat for NaN or infinity."""
    with _opened(path) as weights:
        for number in numbers:
            names = [f"{number}.weight", *([f"{number}.bias"] if config.has_bias else [])]
            read = weights.read({name: weights.headers[name] for name in names})
            if faults := [f"{name} has NaN or infinity" for name in names if not np.isfinite(read[name]).all()]:
                raise Unreadable(faults)
            bias = read[names[1]] if config.has_bias else np.zeros(config.d_model, np.float32)
            yield number, Translator(read[names[0]], bias)


@contextmanager
def _opened(path: Path) -> Iterator[Weights[Any]]:
    try:
        with path.open("rb") as file, open_weights(file, path.suffix) as weights:
            yield weights
    except FileNotFoundError as error:
        raise MissingInput(explain(f"There is no {path}", accepted=f"{SAFE}, or {PICKLED} with --allow-pt")) from error
    except Unreadable as error:
        raise _refused(path, error.faults) from error


def _refused(path: Path, faults: list[str]) -> InvalidInput:
    accepted = '"{i}.weight" (d_model, d_model) and "{i}.bias" (d_model), and the configuration of a linear_tuned_lens'
    return UnsupportedFormat(explain(f"{path} cannot be used: {'; '.join(faults)}", accepted=accepted))


def write_lens(folder: Path, config: LensConfig, translators: Mapping[int, Translator]) -> None:
    """Write a lens' folder, the configuration last; raises NoSpace where the disk is full."""
    from safetensors.numpy import save as packed

    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for number, one in sorted(translators.items()):
        arrays |= {f"{number}.weight": np.ascontiguousarray(one.weight), f"{number}.bias": one.bias}
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / SAFE, packed(arrays))
    write_durably(folder / CONFIG, (json.dumps(config.to_json(), indent=1) + "\n").encode())
