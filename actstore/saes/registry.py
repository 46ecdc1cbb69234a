"""SAELens' registry: which SAE on the hub `saelens:release/sae_id` and `neuronpedia:model/source` mean.

The home of sae_lens. Its registry, one YAML file, is read from the installed package, and the package is not imported.
What else the registry says of an SAE is part of its equation, and is honoured here or refused.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from actstore.errors import InvalidInput, MissingDependency, UnknownName, UnsupportedFormat, explain, unknown_name

from .aliases import NEURONPEDIA, SAELENS, google_folders, matching
from .config import Config
from .declaration import Arrays, Declaration
from .formats import FORMATS, Format
from .names import slug_of
from .patterns import by_numbers

__all__ = ["Listed", "meanings"]

_FORMATS = {  # the registry's conversion functions, by the format that they read
    None: "SAELens",
    "gemma_2": "Gemma Scope",
    "gemma_2_transcoder": "Gemma Scope",
    "gemma_3": "Gemma Scope 2",
    "dictionary_learning_1": "dictionary_learning",
    "llama_scope": "Llama Scope",
    "qwen_scope": "Qwen-Scope",
    "sparsify": "sparsify",
}
_DESCRIBES = frozenset({"model_name", "hook_name", "dataset_path", "model_from_pretrained_kwargs"})
_CHANGES_NOTHING = frozenset({"dataset_path"})
_SCALED = (True, "expected_average_only_in")  # of normalize_activations: what is read is multiplied by the scale
_TOLERANCE = 0.01  # relative, between two writings of one norm


@dataclass(frozen=True)
class Listed:
    """What the registry says of one SAE."""

    release: str
    sae_id: str
    repository: str
    path: str  # of its folder in the repository, or of its weights where folders hold several
    conversion: str | None
    neuronpedia_id: str | None = None
    scale: float | None = None  # norm_scaling_factor
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of its configuration
    l0: float | None = None  # as its makers measured it

    @property
    def format(self) -> Format:
        """Return its format; raises UnsupportedFormat where it has none that is read."""
        if self.conversion not in _FORMATS:
            read = ", ".join(f"{conversion or 'none'} ({format_})" for conversion, format_ in _FORMATS.items())
            raise UnsupportedFormat(
                explain(
                    f"{SAELENS}{self.release}/{self.sae_id} is in the format that SAELens converts with "
                    f"{self.conversion!r}, which is not read",
                    accepted=f"SAEs with the conversion {read}",
                    next_step="load it with SAELens' from_pretrained, save it with save_model, and give that folder",
                )
            )
        return next(format_ for format_ in FORMATS if format_.name == _FORMATS[self.conversion])

    @property
    def file(self) -> str:
        """Return the path of its weights on the hub."""
        path = f"{self.repository}/{self.path}"
        return path if self.format.names(path) else f"{path}/{self.format.weights}"

    @property
    def id(self) -> str:
        """Return the id in a store: Neuronpedia's source, else its names in the registry."""
        if self.neuronpedia_id:
            return self.neuronpedia_id.partition("/")[2]
        return slug_of(f"{self.release}-{self.sae_id}")[:128]

    def declare(self, config: Config, folder: str) -> Declaration:
        """Return what its configuration says after what the registry says; what cannot be honoured is a fault."""
        declaration = self._declare(config, folder)
        return declaration if declaration.declared_l0 else replace(declaration, declared_l0=self.l0)

    def _declare(self, config: Config, folder: str) -> Declaration:
        if self.format.name != "SAELens":
            self._check(config)
            return self.format.declare(config, folder)
        body = _overridden(config.body, self.overrides)
        scale = self.scale if body.get("normalize_activations") in _SCALED else None  # as from_pretrained does
        if scale is not None:
            body["normalize_activations"] = "none"
        declaration = self.format.declare(Config(body, config.faults), folder)
        return declaration if scale is None else _scaled(declaration, scale)

    def _check(self, config: Config) -> None:
        """Make it a fault where the registry changes the equation of another format than SAELens' own."""
        config.faults += [
            f"the registry overrides {name}, which is not read with this format"
            for name in self.overrides
            if name not in _CHANGES_NOTHING
        ]
        if self.scale is None:
            return
        norm, width = config.inner("dataset_average_activation_norm").number("in"), config.count("d_model")
        said = math.sqrt(width) / norm if norm and width else None  # Llama Scope's own writing of the same scale
        if said is None or not math.isclose(said, self.scale, rel_tol=_TOLERANCE):
            config.faults.append(f"norm_scaling_factor is {self.scale} in the registry, and {said} by its own norms")


def meanings(source: str) -> list[tuple[str, Listed | None]]:
    """Return the paths that a source stands for, by their numbers, with what the registry says of each.

    A path stands for itself, and names of Gemma Scope need no registry. A pattern may stand in the sae_id or source.
    Raises MissingDependency without sae-lens, UnknownName for a name that is not there, InvalidInput for one that is
    not complete, UnsupportedFormat for SAEs in a format that is not read.
    """
    if not source.startswith((SAELENS, NEURONPEDIA)):
        return [(source, None)]
    if (google := google_folders(source)) is not None:
        return [(path, None) for path in google]
    # What is Google's is recorded as itself, whatever name it was found by.
    return [(one.file, None if one.repository.startswith("google/") else one) for one in _find(source)]


def _find(source: str) -> list[Listed]:
    scheme = SAELENS if source.startswith(SAELENS) else NEURONPEDIA
    name = source.removeprefix(scheme)
    group, _, inner = name.partition("/")
    if not inner:
        accepted = f"{SAELENS}release/sae_id, {NEURONPEDIA}model/source"
        raise InvalidInput(explain(f"{source} is not complete", accepted=accepted))
    registry = _registry(source)
    if scheme == SAELENS and group not in registry:
        raise unknown_name("release of SAELens", group, registry)
    entries = _of_release(group, registry[group]) if scheme == SAELENS else _on_neuronpedia(registry)
    by_name = {entry.sae_id if scheme == SAELENS else entry.neuronpedia_id or "": entry for entry in entries}
    found = matching(inner if scheme == SAELENS else name, by_name)
    if not found:
        raise _nothing(source, group, by_name)
    return [by_name[one] for one in sorted(found, key=by_numbers)]


def _nothing(source: str, group: str, known: Mapping[str, Listed]) -> UnknownName:
    near = [name for name in known if name.startswith(f"{group}/")] if source.startswith(NEURONPEDIA) else list(known)
    return unknown_name("SAE", source, near or known, next_step="choose one that SAELens lists")


def _on_neuronpedia(registry: Mapping[str, Any]) -> Iterator[Listed]:
    for release, body in registry.items():
        yield from (entry for entry in _of_release(release, body) if entry.neuronpedia_id)


def _of_release(release: str, body: Mapping[str, Any]) -> Iterator[Listed]:
    for one in body["saes"]:
        yield Listed(
            release,
            str(one["id"]),
            body["repo_id"],
            str(one["path"]),
            body.get("conversion_func"),
            one.get("neuronpedia"),
            one.get("norm_scaling_factor"),
            body.get("config_overrides") or {},
            Config(one).number("l0"),
        )


def _registry(wanted: str) -> Mapping[str, Any]:
    found = importlib.util.find_spec("sae_lens")
    folders = found.submodule_search_locations if found else None
    if not folders:
        raise MissingDependency(
            explain(
                f"{wanted} is looked up in SAELens' registry, and sae-lens is not installed",
                accepted="without it Gemma Scope's names, such as saelens:gemma-scope-2b-pt-res-canonical/layer_20/"
                "width_16k/canonical and neuronpedia:gemma-2-2b/20-gemmascope-res-16k",
                next_step="pip install 'actstore[saelens]', or give its path on the hub: owner/repo/path",
            )
        )
    return _read(Path(folders[0]) / "pretrained_saes.yaml")


@cache
def _read(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]  # comes with sae-lens

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # both build plain values alone
    registry: Mapping[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return registry


def _overridden(body: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration after overrides; what describes the model stands in `metadata` where there is one."""
    described = {key: value for key, value in overrides.items() if key in _DESCRIBES}
    rest = {key: value for key, value in overrides.items() if key not in _DESCRIBES}
    if isinstance(metadata := body.get("metadata"), dict):
        return {**body, **rest, "metadata": metadata | described}
    return {**body, **rest, **described}


def _scaled(declaration: Declaration, scale: float) -> Declaration:
    """Return a declaration of an SAE that reads scale · x and whose reconstruction is divided by the scale."""

    def fold(arrays: Arrays) -> Arrays:
        changed = {"w_enc": arrays["w_enc"] * scale, "w_dec": arrays["w_dec"] / scale, "b_dec": arrays["b_dec"] / scale}
        return declaration.fold(arrays | changed)

    return replace(declaration, architecture=f"{declaration.architecture} scale={scale}", fold=fold)
