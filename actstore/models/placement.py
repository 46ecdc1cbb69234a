"""Models that lie on several devices, spread by accelerate: where they compute, and how to get at their weights.

Weights that found no room on a GPU lie in memory or in the checkpoint's files, and are only fetched while their own
module runs: at all other times they have a shape and no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import InvalidInput, MissingDependency, explain

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["DeviceMap", "check_device_map", "main_device", "resident", "spread_of", "weights_of"]

DeviceMap = str | Mapping[str, int | str]
REMEDY = "fetch the model again; if it is whole, upgrade transformers, or use devices with more memory"


def check_device_map(device_map: DeviceMap, device: str, source: object) -> None:
    """Raise InvalidInput for a device map that cannot be, MissingDependency where accelerate is not installed."""
    from transformers.utils import is_accelerate_available

    if not isinstance(source, (str, Path)):
        raise InvalidInput(
            explain("A model in memory is never moved, and a device map was asked for", next_step="give its folder")
        )
    if device != "auto":
        raise InvalidInput(
            explain(
                f"The device {device!r} and a device map were asked for together, and each says where the model lies",
                accepted="one of --device and --device-map",
            )
        )
    if isinstance(device_map, str) and device_map != "auto":
        raise InvalidInput(
            explain(
                f"The device map {device_map!r} is not known",
                accepted="'auto', or from Python a place for each module: {'model.layers.0': 0, …}",
            )
        )
    if not is_accelerate_available():
        raise MissingDependency(
            explain("To spread a model over devices needs accelerate", next_step="pip install 'actstore[multi-gpu]'")
        )


def main_device(causal_lm: PreTrainedModel) -> torch.device:
    """Return the device that a model's token ids go to: its own, or of a model that is spread, its embedding's."""
    import torch

    hook = getattr(causal_lm.get_input_embeddings(), "_hf_hook", None)  # accelerate's
    place: torch.device = causal_lm.device if hook is None else torch.device(hook.execution_device)
    return place


@contextmanager
def resident(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, a module's own weights are there, wherever they are kept; on the device it computes on.

    Raises InvalidInput where the files that they are kept in do not have them.
    """
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with ExitStack() as fetched:
        try:
            fetched.enter_context(align_module_device(module))
        except Exception as error:  # a file that is gone, cut short or of other shapes surfaces as many kinds
            raise InvalidInput(
                explain(f"Weights that were left in their files cannot be read: {error}", next_step=REMEDY)
            ) from error
        yield


def weights_of(causal_lm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by its path, a module's at a time, tied ones under each of their paths.

    Valid until the next one: a weight that lies elsewhere is fetched for so long. Raises InvalidInput as `resident`.
    """
    for path, module in causal_lm.named_modules():
        with resident(module):
            for name, weight in module.named_parameters(path, recurse=False):
                if weight.is_meta:
                    raise InvalidInput(explain(f"The weight {name} was left in its file, for good", next_step=REMEDY))
                yield name, weight


def spread_of(causal_lm: PreTrainedModel) -> tuple[str, ...] | None:
    """Return where the parts of a model lie, such as "model.layers.3 to lm_head: cuda:1"; None on one device."""
    places = getattr(causal_lm, "hf_device_map", None)
    if places is None:
        return None
    runs = [(place, [name for name, _ in run]) for place, run in groupby(places.items(), key=lambda item: item[1])]
    return tuple(f"{_between(names)}: {_name_of(place)}" for place, names in runs)


def _between(names: list[str]) -> str:
    first, last = names[0] or "all", names[-1] or "all"
    return first if first == last else f"{first} to {last}"


def _name_of(place: object) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)
