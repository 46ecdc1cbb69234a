"""Which of Google's SAEs Neuronpedia has: its ids, and the folders on the hub that they stand for.

Of Gemma Scope these are the canonical ones, whose average L0 is nearest 100, and one transcoder per layer, whose L0 is
often another; of Gemma Scope 2 the residual stream at four layers and a few transcoders. Other sparsities have no plain
id. The numbers are those of SAELens' registry, which a test holds against this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType

__all__ = ["SECOND_FOLDERS", "google_sources", "neuronpedia_id_of", "repositories_of"]

SECOND_FOLDERS = {"res": "resid_post", "att": "attn_out", "mlp": "mlp_out", "transcoders": "transcoder"}

# (release, width) → average L0 of every layer, or of the layers named.
_FIRST: dict[tuple[str, str], str | dict[int, int]] = {
    ("2b-pt-res", "16k"): ("105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116"),
    ("2b-pt-res", "65k"): (
        "73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 124 93"
    ),
    ("2b-pt-res", "32k"): {12: 76},
    ("2b-pt-res", "262k"): {12: 121},
    ("2b-pt-res", "524k"): {12: 115},
    ("2b-pt-res", "1m"): {5: 114, 12: 107, 19: 88},
    ("2b-pt-att", "16k"): ("104 79 93 117 116 135 61 99 129 127 70 80 85 92 71 98 71 79 72 122 62 65 106 73 96 77"),
    ("2b-pt-att", "65k"): ("75 98 125 83 87 99 112 96 112 107 67 75 79 87 66 90 129 70 123 106 102 118 112 140 77 63"),
    (
        "2b-pt-mlp",
        "16k",
    ): "119 105 95 95 85 114 133 60 136 88 110 98 108 112 97 80 72 68 106 109 109 113 121 128 73 126",
    ("2b-pt-mlp", "65k"): ("72 127 134 68 66 86 101 115 110 77 95 88 96 98 89 72 66 136 88 88 88 86 92 102 128 107"),
    ("2b-pt-transcoders", "16k"): "76 65 49 54 88 87 95 70 52 72 88 5 6 8 8 8 10 12 13 12 11 13 15 25 37 41",
    ("9b-pt-res", "16k"): (
        "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 114 116 118 "
        "119 119 120 114 111 114 114 120 120 124 128 131 125 113"
    ),
    ("9b-pt-res", "131k"): (
        "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 96 97 96 98 "
        "97 95 92 88 91 89 94 93 96 101 99 94 84"
    ),
    ("9b-pt-res", "32k"): {20: 57},
    ("9b-pt-res", "65k"): {20: 55},
    ("9b-pt-res", "524k"): {20: 48},
    ("9b-pt-res", "1m"): {9: 122, 20: 101, 31: 77},
    ("9b-pt-att", "16k"): (
        "61 77 69 102 126 125 108 70 65 71 132 67 68 77 81 79 81 110 80 86 76 86 70 80 79 73 75 136 71 76 73 "
        "73 74 78 91 77 69 82 81 77 91 129"
    ),
    ("9b-pt-att", "131k"): (
        "55 116 135 119 75 78 73 106 98 111 97 104 110 126 131 130 71 90 69 71 125 71 115 66 130 115 120 102 "
        "115 128 109 117 117 128 63 124 105 124 135 120 64 92"
    ),
    ("9b-pt-mlp", "16k"): (
        "50 128 81 126 66 93 96 101 124 83 114 76 96 94 97 107 91 104 89 98 108 88 85 73 73 72 142 126 115 "
        "111 116 94 98 107 107 108 109 119 98 90 74 126"
    ),
    ("9b-pt-mlp", "131k"): (
        "30 106 61 109 84 131 72 75 89 129 83 120 77 75 80 89 81 91 82 85 93 79 77 67 67 65 110 99 91 87 89 "
        "77 76 83 82 80 81 90 79 75 125 99"
    ),
    ("9b-it-res", "16k"): {9: 88, 20: 91, 31: 76},
    ("9b-it-res", "131k"): {9: 121, 20: 81, 31: 109},
    ("27b-pt-res", "131k"): {10: 106, 22: 82, 34: 72},
}
_LAYERS = {  # of Gemma Scope 2 with a sweep of sparsities
    "270m": (5, 9, 12, 15),
    "1b": (7, 13, 17, 22),
    "4b": (9, 17, 22, 29),
    "12b": (12, 24, 31, 41),
    "27b": (16, 31, 40, 53),
}
_SECOND_RESIDUAL = {  # model → widths, all of medium sparsity
    "270m-pt": "16k 65k 262k 1m",
    "270m-it": "16k 65k 262k",
    "1b-pt": "16k 65k 262k 1m",
    "1b-it": "16k 65k 262k",
    "4b-pt": "16k 65k 262k 1m",
    "4b-it": "16k 65k 262k",
    "12b-pt": "16k 65k 262k 1m",
    "27b-it": "16k 65k 262k 1m",
}
_SECOND_TRANSCODERS: dict[tuple[str, str], Sequence[int]] = {  # model, width → layers, all of small sparsity and affine
    ("4b-it", "16k"): (0, 1, 2, 3, 4, 6, 7, 9, 10, 12),
    ("4b-it", "262k"): range(34),
    ("27b-it", "262k"): range(62),
}


@cache
def google_sources() -> Mapping[str, str]:
    """Return `model/source` → `google/repository/folder` for everything of Google's that Neuronpedia has."""
    return MappingProxyType(dict([*_first_sources(), *_second_sources()]))


def neuronpedia_id_of(folder: str) -> str | None:
    """Return the `model/source` under which Neuronpedia has `google/repository/folder`, or None."""
    return _ids().get(folder)


def repositories_of(model: str) -> str | None:
    """Return how the repositories for a model of Neuronpedia begin: gemma-2-9b-it → google/gemma-scope-9b-it."""
    sizes = dict.fromkeys(release.rpartition("-")[0] for release, _ in _FIRST)
    return next((f"google/gemma-scope-{size}" for size in sizes if _model_of(size) == model), None)


@cache
def _ids() -> dict[str, str]:
    return {folder: source for source, folder in google_sources().items()}


def _model_of(size: str) -> str:
    """Return Neuronpedia's name of a model: "9b-it" → gemma-2-9b-it, "2-1b-pt" → gemma-3-1b."""
    plain = size.removesuffix("-pt")
    return f"gemma-3-{plain.removeprefix('2-')}" if size.startswith("2-") else f"gemma-2-{plain}"


def _kind(word: str) -> str:
    return "transcoder" if word == "transcoders" else word


def _first_sources() -> Iterator[tuple[str, str]]:
    for (release, width), said in _FIRST.items():
        size, _, kind = release.rpartition("-")
        l0s = dict(enumerate(map(int, said.split()))) if isinstance(said, str) else said
        for layer, l0 in l0s.items():
            source = f"{_model_of(size)}/{layer}-gemmascope-{_kind(kind)}-{width}"
            yield source, f"google/gemma-scope-{release}/layer_{layer}/width_{width}/average_l0_{l0}"


def _second_sources() -> Iterator[tuple[str, str]]:
    for model, widths in _SECOND_RESIDUAL.items():
        for width in widths.split():
            for layer in _LAYERS[model.partition("-")[0]]:
                yield _second(model, "res", layer, width, f"resid_post/layer_{layer}_width_{width}_l0_medium")
    for (model, width), layers in _SECOND_TRANSCODERS.items():
        for layer in layers:
            folder = f"transcoder_all/layer_{layer}_width_{width}_l0_small_affine"
            yield _second(model, "transcoder", layer, width, folder)


def _second(model: str, kind: str, layer: int, width: str, folder: str) -> tuple[str, str]:
    source = f"{_model_of(f'2-{model}')}/{layer}-gemmascope-2-{kind}-{width}"
    return source, f"google/gemma-scope-2-{model}/{folder}"
