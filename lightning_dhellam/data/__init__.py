"""Corpus → sentencepiece → Megatron indexed dataset → LightningDataModule.

The public names load on first use: the data module needs Lightning, the command's help does not.
The function that makes a dataset is `lightning_dhellam.data.prepare.prepare`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dhellam.data.config import PrepareConfig
    from lightning_dhellam.data.module import IndexedDataModule
    from lightning_dhellam.data.prepared import PreparedData
    from lightning_dhellam.data.tokenizer import Tokenizer
    from lightning_dhellam.data.tuning import ConversationDataModule

__all__ = [
    "ConversationDataModule",
    "IndexedDataModule",
    "PrepareConfig",
    "PreparedData",
    "Tokenizer",
]

_HOME = {
    "ConversationDataModule": "tuning",
    "IndexedDataModule": "module",
    "PrepareConfig": "config",
    "PreparedData": "prepared",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
