from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.prepared import PreparedData

TEXTS = [f"Document {n}:\n" + "\tthe quick brown fox\n" * (n % 7 + 3) for n in range(100)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """A hundred small documents, prepared once; tests must not write into it."""
    root = tmp_path_factory.mktemp("prepared")
    source = root / "source"
    source.mkdir()
    for number, text in enumerate(TEXTS):
        (source / f"{number:03}.txt").write_text(text)
    return prepare(source, root / "output", vocab_size=300, workers=1)


@pytest.fixture
def megatron_prefix(tmp_path: Path) -> Callable[[Sequence[Sequence[int]]], Path]:
    """Writes documents of token ids with Megatron's builder, as Megatron-LM's own tool does."""

    def write(documents: Sequence[Sequence[int]]) -> Path:
        prefix = tmp_path / "megatron_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
        for document in documents:
            builder.add_document(numpy.array(document), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write
