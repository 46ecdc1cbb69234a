"""The corpus: dataset → documents → sequences (windows) → rows packed in shards.

Home of tokenizer loading and of Hugging Face datasets; both are imported only by the functions that need them.
It yields values and knows no file of a store.
"""

from .document import Document, DocumentsDigest
from .layout import CorpusBatch, DocumentRow, lay_out
from .reading import read_documents
from .tokenizer import TokenizerHandle, load_tokenizer
from .window import Window

__all__ = [
    "CorpusBatch",
    "Document",
    "DocumentRow",
    "DocumentsDigest",
    "TokenizerHandle",
    "Window",
    "lay_out",
    "load_tokenizer",
    "read_documents",
]
