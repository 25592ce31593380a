"""ConversationDataModule: batches of conversations for supervised fine-tuning."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lightning_dhellam.data.chat import ChatTemplate
from lightning_dhellam.data.conversations import (
    TOO_LONG,
    Conversations,
    Counts,
    PackedConversations,
    encode_file,
)
from lightning_dhellam.data.loader import ResumableDataLoader
from lightning_dhellam.data.ordered import OrderedDataModule, TokenBatch, at_least
from lightning_dhellam.data.shared import make_once
from lightning_dhellam.values import check_kinds

_CACHE = ".conversations-cache"


class ConversationDataModule(OrderedDataModule):
    """Batches of conversations, of which counts what the assistant says.

    A file has a conversation on each line, `{"messages": [{"role": …, "content": …}, …]}`. The chat
    template of a Hugging Face tokenizer makes text of it. Several conversations are packed into a
    sample, none of which attends to another, the longest first where they fit best; what is left is
    padding. A batch is a dict of `tokens`, `labels` (-100 where nothing counts) and `position_ids`,
    int64 [B, S], with B = batch_size, S = sequence_length.

    What the assistant says are the tokens that the template marks by `{% generation %}`; without
    such marks it is what each of its turns adds to the text of those before, its end included.
    Conversations without messages, or in which nothing counts, are left out. How many, and how many
    were too long, is said.

    Samples are in one order by `seed`, of which data-parallel ranks take turns. A checkpoint holds
    how many were seen, so that training goes on with the next one.

    Args:
        path: File of conversations, JSON lines.
        tokenizer: Folder of a Hugging Face tokenizer, or of a model with one.
        sequence_length: Positions per sample, S.
        batch_size: Samples per data-parallel rank and optimizer step, B.
        validation_path: File of conversations to validate on. Left out, validation is skipped.
        too_long: What becomes of a conversation of more tokens than a sample has: `truncate` cuts
            it off, `drop` leaves it out.
        chat_template: File of another chat template than the tokenizer's own.
        seed: Seed of the order.
        num_workers: Processes per DataLoader that read ahead; 0 reads in the training process.
        train_samples: Samples in a training epoch; left out, as many as there are.
        cache_dir: Where the tokens go (shared by all ranks); by default beside the file.

    Raises ValueError, when it is constructed, for a tokenizer or a template that cannot be read,
    and in `setup`, with file and line, for what is no conversation.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        sequence_length: int,
        batch_size: int,
        *,
        validation_path: str | Path | None = None,
        too_long: str = "truncate",
        chat_template: str | Path | None = None,
        seed: int = 1234,
        num_workers: int = 0,
        train_samples: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_kinds(ConversationDataModule.__init__, locals())
        super().__init__()
        at_least(2, sequence_length=sequence_length)
        at_least(1, batch_size=batch_size)
        at_least(0, seed=seed, num_workers=num_workers)
        if train_samples is not None:
            at_least(1, train_samples=train_samples)
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long='{too_long}' must be {' or '.join(map(repr, TOO_LONG))}")
        self.path = path
        self.validation_path = validation_path
        for name, given in (("path", path), ("validation_path", validation_path)):
            if given is not None and not Path(given).is_file():
                raise ValueError(
                    f"{name}={given} is no file: give one of conversations, JSON lines"
                )
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.too_long = too_long
        self.seed = seed
        self.num_workers = num_workers
        self.train_samples = train_samples
        self._cache_dir = cache_dir
        self._template = ChatTemplate(tokenizer, _text_of(chat_template))
        self._datasets: dict[str, PackedConversations] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids: what the model's vocabulary must be at least."""
        return self._template.vocab_size

    def setup(self, stage: str | None = None) -> None:
        """Make or read the tokens. Every rank must call this."""
        if self._datasets:
            return
        for given in (self.path, self.validation_path):
            if given is not None:
                self._datasets[str(given)] = self._open(given)

    def _open(self, path: str | Path) -> PackedConversations:
        home = Path(self._cache_dir) if self._cache_dir else Path(path).absolute().parent / _CACHE
        cache = home / self._digest(path)

        def write(folder: Path) -> None:
            encode_file(path, self._template, self.sequence_length, self.too_long).save(folder)

        make_once(cache, write, what="tokens")
        found = Conversations.load(cache)
        dataset = PackedConversations(found, self.sequence_length, self.seed)
        counts = Counts(*map(int, found.numbers))
        rank_zero_info(counts.said(path, self.too_long, len(found.ends), len(dataset)))
        if not len(dataset):
            raise ValueError(
                f"path={path} has no conversation in which the assistant says anything within"
                f" sequence_length={self.sequence_length} tokens, of {counts.read}: give others, or"
                " raise sequence_length"
            )
        return dataset

    def _digest(self, path: str | Path) -> str:
        stat = Path(path).stat()
        facts = [str(Path(path).absolute()), stat.st_size, stat.st_mtime_ns]
        key = json.dumps([*facts, self._template.identity, self.sequence_length, self.too_long])
        return hashlib.sha256(key.encode()).hexdigest()[:24]

    def train_dataloader(self) -> ResumableDataLoader[TokenBatch]:
        """Whole batches only, from where a checkpoint that was loaded has ended."""
        return self._training_loader(self._dataset(self.path))

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[DataLoader[TokenBatch]]:
        """The validation file; an empty list, which skips validation, without one."""
        if self.validation_path is None:
            return []
        return self._evaluation_loader(self._dataset(self.validation_path))

    def _dataset(self, path: str | Path) -> PackedConversations:
        self.setup()
        return self._datasets[str(path)]

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "path": f"{Path(self.path).name} ({_file_digest(Path(self.path))})",
            "template": hashlib.sha256(self._template.identity.encode()).hexdigest()[:12],
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "too_long": self.too_long,
        }


def _text_of(chat_template: str | Path | None) -> str | None:
    if chat_template is None:
        return None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template={chat_template} cannot be read ({error})") from error


def _file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            found.update(part)
    return found.hexdigest()[:12]
