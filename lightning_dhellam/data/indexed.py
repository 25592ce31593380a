"""Megatron indexed datasets: opening them, and Megatron-core's GPTDataset over their splits."""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizerBase

from lightning_dhellam.data.prepared import CACHE, PreparedData, is_prepared, prepare_hint
from lightning_dhellam.data.shared import make_once
from lightning_dhellam.data.tokenizer import BareVocabulary, Tokenizer
from lightning_dhellam.parallel.stand_in import is_emulated

_CHECKED_TOKENS = 2**20
_DIGESTED_BYTES = 2**20
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type of the tokens, number of sequences, number of document ends."""
USUAL_SPLIT = "98,1,1"
TRAINING_ALONE = "1,0,0"
_FEW_DOCUMENTS = ("90,5,5", "80,10,10", "60,20,20")
SPLITS = (USUAL_SPLIT, *_FEW_DOCUMENTS, TRAINING_ALONE)
"""What `working_split` finds: from the usual one to the last resort."""
_NAMES = {Split.train: "training", Split.valid: "validation", Split.test: "test"}


@dataclass(frozen=True)
class IndexedData:
    """A dataset on disk: Megatron's prefix, its vocabulary, and where its index cache may lie."""

    prefix: Path
    vocabulary: Tokenizer | BareVocabulary
    cache: Path

    @property
    def identity(self) -> list[object]:
        """Changes when the files do; Megatron's own cache key only holds their path."""
        stats = [self.prefix.with_name(self.prefix.name + end).stat() for end in (".bin", ".idx")]
        return [str(self.prefix), *[(stat.st_size, stat.st_mtime_ns) for stat in stats]]

    @property
    def digest(self) -> str:
        """Digest of the number of tokens and the lengths of documents, wherever the files lie."""
        found = hashlib.sha256(str(Path(f"{self.prefix}.bin").stat().st_size).encode())
        index = Path(f"{self.prefix}.idx")
        found.update(str(index.stat().st_size).encode())
        with index.open("rb") as file:
            found.update(file.read(_DIGESTED_BYTES))
        return found.hexdigest()[:12]


def open_indexed(
    path: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> IndexedData:
    """Open a prepared directory, or the prefix of a .bin and .idx pair made by Megatron-LM.

    Raises ValueError if nothing is there, if a prefix comes without `tokenizer` or `vocab_size`,
    or if these contradict each other or the data.
    """
    vocabulary: Tokenizer | BareVocabulary | None = Tokenizer.load(tokenizer) if tokenizer else None
    if is_prepared(path):
        prepared = PreparedData.load(path)
        prefix, home = prepared.prefix, prepared.path
        vocabulary = _same_tokenizer(prepared, vocabulary, tokenizer)
    else:
        prefix = _megatron_prefix(path)
        home = prefix.parent
        if vocabulary is None:
            if vocab_size is None:
                raise ValueError(
                    f"path={path} is a Megatron dataset, which does not name its vocabulary."
                    " Give tokenizer=<tokenizer.model> or vocab_size=<number of ids>."
                )
            vocabulary = BareVocabulary(vocab_size)
    if vocab_size not in (None, vocabulary.vocab_size):
        raise ValueError(
            f"vocab_size={vocab_size}, but the tokenizer of path={path} has"
            f" {vocabulary.vocab_size} ids. Leave out vocab_size."
        )
    _check_ids(path, prefix, vocabulary.vocab_size)
    _check_documents(path, prefix)
    cache = Path(cache_dir).absolute() if cache_dir else home / CACHE
    return IndexedData(prefix, vocabulary, cache)


def _same_tokenizer(
    prepared: PreparedData, given: Tokenizer | BareVocabulary | None, name: object
) -> Tokenizer:
    own = prepared.tokenizer
    if given is not None and given.unique_identifiers != own.unique_identifiers:
        raise ValueError(
            f"tokenizer={name} is not the one that path={prepared.path} was prepared with."
            " Leave out tokenizer; a prepared dataset brings its own."
        )
    return own


def _megatron_prefix(path: str | Path) -> Path:
    text = str(Path(path).absolute())
    prefix = text.removesuffix(".bin").removesuffix(".idx")
    missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
    if len(missing) == 2:
        raise ValueError(
            f"path={path} holds no dataset: it is neither a prepared directory nor the prefix of"
            f" a .bin and .idx pair. Make one with: {prepare_hint(path)}"
        )
    if missing:
        raise ValueError(f"path={path} is half a Megatron dataset: {missing[0]} is missing.")
    return Path(prefix)


def _check_ids(path: str | Path, prefix: Path, vocab_size: int) -> None:
    # On a GPU an id out of range is an asynchronous assert far from its cause, so look at the
    # start of the data; reading all of a large dataset would take too long.
    damage = _damage(prefix)
    if damage:
        raise ValueError(f"path={path} is not a whole Megatron dataset: {damage}. Make it again.")
    dataset = IndexedDataset(str(prefix))
    total = int(dataset.sequence_lengths.sum(dtype=numpy.int64))
    found = Path(f"{prefix}.bin").stat().st_size
    if found < total * dataset.index.dtype_size:
        raise ValueError(
            f"path={path} is not a whole Megatron dataset: {prefix}.bin has {found} bytes, its"
            f" index says {total * dataset.index.dtype_size}. Make it again."
        )
    largest = int(first_tokens(prefix).max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f"path={path} holds token id {largest}, but the vocabulary has {vocab_size} ids."
            " Give the tokenizer or the vocab_size that the data was made with."
        )


def first_tokens(prefix: Path) -> numpy.ndarray:
    """The first tokens of a dataset, as many as can be looked at in no time."""
    dataset = IndexedDataset(str(prefix))
    total = int(dataset.sequence_lengths.sum(dtype=numpy.int64))
    return numpy.fromfile(f"{prefix}.bin", dataset.index.dtype, min(total, _CHECKED_TOKENS))


def _check_documents(path: str | Path, prefix: Path) -> None:
    # Megatron-core splits and shuffles sequences: parts of one document would be in training and
    # validation, and follow each other in any order.
    dataset = IndexedDataset(str(prefix))
    sequences, documents = len(dataset.sequence_lengths), len(dataset.document_indices) - 1
    if sequences != documents:
        raise ValueError(
            f"path={path} has {sequences} sequences in {documents} documents, and every document"
            " must be one sequence, or its parts would be shuffled and split. Make it again"
            " without --split-sentences, or with `dhellam data prepare`."
        )


def _damage(prefix: Path) -> str | None:
    """What is wrong with the two files, so that Megatron's reader cannot even open them."""
    if Path(f"{prefix}.bin").stat().st_size == 0:
        return f"{prefix}.bin is empty"
    index = Path(f"{prefix}.idx")
    with index.open("rb") as file:
        header = file.read(_INDEX_HEADER.size)
    if not header.startswith(_INDEX_MAGIC):
        return f"{index} is not an index"
    if len(header) < _INDEX_HEADER.size:
        return f"{index} is cut off"
    _, version, _, sequences, documents = _INDEX_HEADER.unpack(header)
    if version != 1:
        return f"{index} has version {version}, but Megatron-core reads version 1"
    # Per sequence an int32 length and an int64 offset, per document an int64 end.
    if index.stat().st_size < _INDEX_HEADER.size + 12 * sequences + 8 * documents:
        return f"{index} is cut off"
    return None


def parse_split(split: str) -> tuple[float, float, float]:
    """Parse the shares of training, validation and test, like "98,1,1". Raises ValueError."""
    words = [word.strip() for word in split.split(",")]
    valid = 1 <= len(words) <= 3 and all(re.fullmatch(r"\d+\.?\d*|\.\d+", word) for word in words)
    shares = [float(word) for word in words] if valid else []
    if not sum(shares):
        raise ValueError(
            f"split={split!r} is not up to three shares of which one is positive."
            ' Write training, validation and test like "98,1,1".'
        )
    train, valid_share, test = shares + [0.0] * (3 - len(shares))
    return train, valid_share, test


def working_split(data: IndexedData, sequence_length: int, path: str | Path) -> str:
    """The usual split, or another one if the documents are too few for it.

    Raises ValueError if not even training alone has a sample.
    """
    for split in SPLITS[:-1]:
        try:
            count_samples(data, sequence_length, split, path)
        except ValueError:
            continue
        return split
    return TRAINING_ALONE


def split_config(
    data: IndexedData,
    sequence_length: int,
    split: str,
    seed: int,
    cache: Path,
    *,
    resets: bool = False,
    eod_mask_loss: bool = False,
) -> GPTDatasetConfig:
    """Megatron-core's configuration of one dataset: no attention masks, [S, S] for each sample.

    With `resets` positions begin anew in each document.
    """
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([str(data.prefix)], None),
        split=",".join(f"{share:.12f}" for share in parse_split(split)),
        path_to_cache=str(cache),
        # Megatron only reads the attributes that our classes have.
        tokenizer=cast(MegatronTokenizerBase, data.vocabulary),
        reset_position_ids=resets,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )


def split_ranges(config: GPTDatasetConfig, documents: int) -> dict[Split, tuple[int, int]]:
    """The documents of each split with a positive share, as Megatron's builder divides them."""
    matrix = config.split_matrix
    assert matrix is not None
    return {
        split: (
            round(matrix[split.value][0] * documents),
            round(matrix[split.value][1] * documents),
        )
        for split in Split
        if matrix[split.value] is not None
    }


def count_samples(
    data: IndexedData, sequence_length: int, split: str, path: str | Path
) -> dict[Split, int]:
    """Whole samples in one pass over each split with a positive share.

    Raises ValueError if such a split does not hold a single one.
    """
    # Closing the dataset unmaps its arrays, so it must live as long as `lengths`.
    dataset = IndexedDataset(str(data.prefix))
    lengths = dataset.sequence_lengths
    config = split_config(data, sequence_length, split, 0, data.cache)
    samples = {}
    for part, (start, stop) in split_ranges(config, len(lengths)).items():
        tokens = int(lengths[start:stop].sum(dtype=numpy.int64))
        # A sample reads one token more than it has positions: the last label.
        samples[part] = max(tokens - 1, 0) // sequence_length
        if samples[part] == 0:
            raise ValueError(
                f"split={split!r} leaves {stop - start} of the {len(lengths)} document(s) of"
                f" path={path}, {tokens} tokens, for {_NAMES[part]}, but one sample of"
                f" sequence_length={sequence_length} reads {sequence_length + 1}."
                " Give a larger share, a share of 0, a shorter sequence_length, more text, or cut"
                " long documents with `dhellam data prepare --max_document_tokens`."
            )
    return samples


def build_splits(
    data: IndexedData, sequence_length: int, split: str, seed: int, **options: bool
) -> dict[Split, GPTDataset]:
    """Megatron-core's datasets of the splits with a positive share, one pass shuffled by `seed`.

    `options` are those of `split_config`. Collective when torch.distributed
    is initialised: rank 0 builds the index cache, the others wait and read it, so the directory
    must be visible to all. Raises RuntimeError on these if rank 0 failed. A rank that is alone,
    since its cluster is emulated, builds it whatever its number.
    """
    key = [*data.identity, sequence_length, split, seed]
    key.append(data.vocabulary.unique_identifiers)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    cache = data.cache / name
    config = split_config(data, sequence_length, split, seed, cache, **options)
    if is_emulated() and torch.distributed.get_rank() and not cache.is_dir():
        # Megatron writes on rank 0 only; without a path it keeps what it builds in memory.
        config.path_to_cache = ""
    else:
        _build_cache_once(data, cache, config)
    one_pass: list[int | None] = [None] * len(Split)
    builder = BlendedMegatronDatasetBuilder(GPTDataset, one_pass, lambda: True, config)
    datasets = builder.build()
    return {part: datasets[part.value] for part in Split if datasets[part.value] is not None}


def _build_cache_once(data: IndexedData, cache: Path, config: GPTDatasetConfig) -> None:
    # Megatron writes the cache file by file and trusts whatever is there, even what an interrupted
    # run left behind; so it writes into a staged directory.
    def write(folder: Path) -> None:
        config.path_to_cache = str(folder)
        _write_cache(data, config)

    try:
        make_once(cache, write, what="index cache")
    finally:
        config.path_to_cache = str(cache)


def _write_cache(data: IndexedData, config: GPTDatasetConfig) -> None:
    low_level = GPTDataset.build_low_level_dataset(str(data.prefix), config)
    for part, (start, stop) in split_ranges(config, len(low_level)).items():
        documents = numpy.arange(start, stop, dtype=numpy.int32)
        GPTDataset(low_level, str(data.prefix), documents, None, part, config)
