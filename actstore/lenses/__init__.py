"""What is computed offline from store and kit: lenses, snippets, and the functions that SQL calls. No torch."""

from .functions import Functions
from .snippets import snippets
from .unembed import TopTokens, Unembed

__all__ = ["Functions", "TopTokens", "Unembed", "snippets"]
