"""Two-strand training of large language models under PyTorch Lightning.

The public names load on first use, so that importing a light sub-package such as
`lightning_dhellam.plan` does not import torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dhellam.importing import uncollected

if TYPE_CHECKING:
    from lightning_dhellam.module import DualStrandMixin, LanguageModel
    from lightning_dhellam.strategy import DHellamStrategy

# Megatron-core says in every process, once for each of its modules, that extensions are missing
# which are optional here.
warnings.filterwarnings("ignore", r".*Apex (is|are) not installed", UserWarning, r"megatron\.core")

__version__ = "0.2.0"
__all__ = ["DHellamStrategy", "DualStrandMixin", "LanguageModel", "__version__"]

_HOME = {
    "DHellamStrategy": "lightning_dhellam.strategy",
    "DualStrandMixin": "lightning_dhellam.module",
    "LanguageModel": "lightning_dhellam.module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uncollected():
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
