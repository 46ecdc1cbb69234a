"""Load a model so that its numbers are the ones the recipe names: safetensors only, eager attention, no TF32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, MissingInput, UnsupportedFormat, explain
from actstore.recipe import COMPUTE_DTYPES, ModelIdentity

from .description import ModelDescription, describe_folder, read_config
from .digests import digest_of_files
from .hub import ModelFolder, find_model
from .in_memory import adopt_model
from .loaded import LoadedModel
from .placement import DeviceMap, check_device_map, resident, weights_of
from .proof import prove
from .versions import check_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["choose_device", "load_model"]

DEVICES = "'auto', 'cpu', 'cuda' or 'cuda:N'"


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
) -> LoadedModel:
    """Return a model ready to be captured: a folder, a hub id, or a transformers model already in memory.

    dtype: "float32" or "bfloat16", by default the checkpoint's. device: "auto" is the GPU where there is one.
    device_map: "auto" spreads a model that is larger than one GPU over all of them, then memory, then the files that it
    came from; it changes no number. A mapping says for each module a GPU's number, "cpu" or "disk".
    A model in memory stays where it is and as it is, except that it is put into evaluation mode and eager attention.
    TF32 is switched off for the whole process.
    Raises MissingInput, InvalidInput, UnsupportedFormat or MissingDependency, as `describe_model`; InvalidInput for a
    dtype or device that cannot be used, and weights that do not fit or are not finite; MissingDependency for a device
    map without accelerate. An architecture that is not described is accepted where its structure tells its places and
    all identities hold; raises Unhealthy, naming those that do not.
    """
    check_transformers()
    _switch_off_tf32()
    if device_map is not None:
        check_device_map(device_map, device, source)
    if not isinstance(source, (str, Path)):
        return _proved(adopt_model(source, dtype=dtype, device=device))
    place = choose_device(device)
    folder = find_model(source, revision, weights=True)
    description = describe_folder(folder)
    causal_lm = _read_weights(folder, _choose_dtype(description, dtype), device_map).eval()
    _refuse_untied(causal_lm, description)
    model = LoadedModel(
        facts=description.facts,
        identity=_identity(folder, description),
        family=description.family,
        causal_lm=causal_lm.to(place) if device_map is None else causal_lm,
    )
    return _proved(model)


def _proved(model: LoadedModel) -> LoadedModel:
    """Return the model, its weights finite; one whose places were only guessed has to prove them first.

    Patterns are proved where they are asked for: weights that do not sum to one (sinks) are no fault of other sites.
    """
    _refuse_not_finite(model)
    if model.family.discovered:
        prove(model, [site for site in model.sites() if site.kind != "pattern"])
    return model


def _identity(folder: ModelFolder, description: ModelDescription) -> ModelIdentity:
    return ModelIdentity(
        name=folder.name,
        revision=folder.revision,
        architecture=description.facts.architecture,
        config_digest=description.config_digest,
        weights_digest=digest_of_files(_weight_files(folder)),
    )


def _switch_off_tf32() -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _choose_dtype(description: ModelDescription, dtype: str | None) -> str:
    chosen = dtype or description.facts.checkpoint_dtype
    if chosen in COMPUTE_DTYPES:
        return chosen
    why = ": the residual stream of some models exceeds its largest value, 65,504" if chosen == "float16" else ""
    whose = "The dtype" if dtype else f"The checkpoint of {description.facts.name} is {chosen}, and the compute dtype"
    raise InvalidInput(
        explain(
            f"{whose} {chosen!r} cannot be used{why}",
            accepted=" or ".join(COMPUTE_DTYPES),
            next_step="ask for dtype 'bfloat16', or 'float32' where memory allows",
        )
    )


def choose_device(device: str) -> torch.device:
    """Return the device that a name means: "auto" is the GPU where there is one.

    Raises InvalidInput for a device that is not known or not there.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InvalidInput(explain(f"The device {device!r} is not known", accepted=DEVICES)) from None
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and (place.index or 0) >= n_gpus):
        raise InvalidInput(
            explain(f"The device {device!r} is not available ({n_gpus} GPUs are visible)", accepted=DEVICES)
        )
    return place


def _weight_files(folder: ModelFolder) -> list[Path]:
    return sorted(folder.path.glob("*.safetensors"))


def _read_weights(folder: ModelFolder, dtype: str, device_map: DeviceMap | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not _weight_files(folder):
        raise _no_weights(folder)
    disable_progress_bar()  # one model's tensors are read in seconds; our own report says what is being done
    try:
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=read_config(folder),
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files surface as many kinds
        raise InvalidInput(
            explain(
                f"The weights of {folder.name} cannot be read: {error}",
                next_step="fetch the model again" if device_map is None else "check the device map and the files",
            )
        ) from error
    _refuse_misfits(folder, report)
    return causal_lm


def _refuse_misfits(folder: ModelFolder, report: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: it fills a missing tensor with random numbers."""
    faults = [
        f"{len(report[key])} {what} ({', '.join(sorted(map(str, report[key]))[:5])}…)"
        for key, what in (
            ("missing_keys", "tensors are missing"),
            ("unexpected_keys", "tensors have no place in the model"),
            ("mismatched_keys", "tensors have another shape"),
        )
        if report[key]
    ]
    if faults:
        raise InvalidInput(
            explain(
                f"The weights of {folder.name} do not fit its config.json: {'; '.join(faults)}",
                next_step="fetch the model again",
            )
        )


def _refuse_untied(causal_lm: PreTrainedModel, description: ModelDescription) -> None:
    """Refuse a head that the configuration ties to the embedding, and the files do not."""
    n_parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    if n_parameters != description.facts.n_parameters and not _is_tied_in_value(causal_lm):
        raise InvalidInput(
            explain(
                f"The config.json of {description.facts.name} ties the head to the embedding, and its weights have two "
                f"different tensors ({n_parameters:,} parameters, {description.facts.n_parameters:,} expected)",
                next_step="set tie_word_embeddings in config.json to what the model was trained with",
            )
        )


def _is_tied_in_value(causal_lm: PreTrainedModel) -> bool:
    """Return whether head and embedding hold the same numbers: in files, or on two devices, they may be two tensors."""
    import torch

    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    with resident(embedding), resident(head):
        return torch.equal(embedding.weight, head.weight.to(embedding.weight.device))


def _refuse_not_finite(model: LoadedModel) -> None:
    """Refuse NaN and infinity in any weight: the proof's tokens may not meet them, and those of a corpus will."""
    if faulty := [name for name, weight in weights_of(model.causal_lm) if not _is_finite(weight)]:
        raise InvalidInput(
            explain(
                f"{len(faulty)} weights of {model.facts.name} hold NaN or infinity: {', '.join(faulty[:5])}",
                accepted="finite numbers",
                next_step="fetch the model again, or save it anew: it was broken in training or in conversion",
            )
        )


def _is_finite(weight: torch.Tensor) -> bool:
    import torch

    extremes = torch.stack(torch.aminmax(weight.detach()))  # NaN wins both
    return bool(extremes.isfinite().all())


def _no_weights(folder: ModelFolder) -> Exception:
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.path.glob(pattern))
    if others:
        return UnsupportedFormat(
            explain(
                f"The weights of {folder.name} are in {', '.join(others[:3])}, which can run code when opened",
                accepted="*.safetensors",
                next_step="convert them: load the model where you trust it and `save_pretrained` it",
            )
        )
    return MissingInput(
        explain(f"The folder of {folder.name} has no weights", accepted="*.safetensors beside config.json")
    )
