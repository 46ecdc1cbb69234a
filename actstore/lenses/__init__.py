"""What is computed offline from store and kit: lenses, snippets, and the functions that SQL calls. No torch."""

from typing import TYPE_CHECKING

from actstore.on_demand import on_demand

from .functions import Functions
from .snippets import snippets

if TYPE_CHECKING:
    from .unembed import TopTokens, Unembed

__all__ = ["Functions", "TopTokens", "Unembed", "snippets"]

__getattr__ = on_demand(__name__, {"TopTokens": "unembed", "Unembed": "unembed"})
