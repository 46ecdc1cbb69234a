"""How likely a test statistic is by chance: what DuckDB has no function for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["t_test_p"]


def t_test_p(t: pa.Array, df: pa.Array) -> pa.Array:
    """Return the two-sided p of a statistic t by Student's distribution with df degrees of freedom, to all digits.

    From the incomplete beta function (SciPy's `stdtr`); df need not be whole.
    """
    from scipy.special import stdtr  # costs more to import than all else that a store needs to open

    return pa.array(2 * stdtr(np.asarray(df), -np.abs(np.asarray(t))))
