"""The `bfloat16` Zarr data type (docs/format.md §5).

Importing this module registers it. zarr 3.1 collects entry points of the group `zarr.data_type` but never loads them,
so a process that knows nothing of us finds it through the group `zarr.buffer`, loaded before a Zarr group is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.core.dtype import Float16
from zarr.core.dtype.common import DataTypeValidationError
from zarr.dtype import data_type_registry

__all__ = ["NAME", "BFloat16"]

NAME = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """Brain floating point: the upper half of a float32; numpy sees it through ml_dtypes.

    That is imported where there is such an array: most questions wait for none.
    """

    _zarr_v3_name = NAME
    _zarr_v2_names = ()  # type: ignore[assignment]

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if dtype.name == NAME:
            return cls()
        raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected bfloat16.")

    def to_native_dtype(self) -> Any:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
