"""The corpus: dataset → documents → sequences (windows) → rows packed in shards.

Home of tokenizer loading and of Hugging Face datasets; both are imported only by the functions that need them.
It yields values and knows no file of a store.
"""

from .chat import Chats
from .document import Document, DocumentsDigest
from .layout import CorpusBatch, DocumentRow, lay_out
from .message_tokens import Roles
from .reading import read_documents
from .tokenizer import TokenizerHandle, load_tokenizer
from .window import Window

__all__ = [
    "Chats",
    "CorpusBatch",
    "Document",
    "DocumentRow",
    "DocumentsDigest",
    "Roles",
    "TokenizerHandle",
    "Window",
    "lay_out",
    "load_tokenizer",
    "read_documents",
]
