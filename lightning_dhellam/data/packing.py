"""What training is told of the documents that lie one behind the other in a sample.

The options have the names and the meaning that they have in Megatron-core's GPTDatasetConfig. Where
a document ends its end-of-document id says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import default_collate

from lightning_dhellam.data.indexed import IndexedData, first_tokens
from lightning_dhellam.data.ordered import TokenBatch

_KEYS = ("tokens", "labels", "loss_mask")


@dataclass(frozen=True)
class Packing:
    """Makes batches of samples.

    Attributes:
        reset_position_ids: positions begin at 0 in each document.
        reset_attention_mask: no document attends to another.
        eod_mask_loss: what follows a document's end does not count in the loss.
    """

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    @property
    def resets(self) -> bool:
        """Whether it matters where documents begin."""
        return self.reset_position_ids or self.reset_attention_mask

    def check(self, data: IndexedData, path: str | Path) -> None:
        """Refuse data in which documents do not end with an id of their own.

        Raises:
            ValueError: names the first option that is asked for.
        """
        asked = [name for name, value in vars(self).items() if value]
        eod = data.vocabulary.eod
        if asked and (eod < 0 or not bool((first_tokens(data.prefix) == eod).any())):
            raise ValueError(
                f"{asked[0]}=True needs documents that end with an end-of-document id, and path="
                f"{path} has none{'' if eod < 0 else f' ({eod})'}: prepare the data with"
                " --append_eod, or give the tokenizer of a Megatron-LM dataset"
            )

    def collate(self, samples: Sequence[TokenBatch]) -> TokenBatch:
        """Stack what training reads; plain positions are implied.

        `position_ids` are where tokens stand in their documents. They alone say that documents do
        not attend to each other; where the one is asked for without the other, `document_ids` say
        what does.
        """
        batch: TokenBatch = default_collate(
            [{key: sample[key] for key in _KEYS} for sample in samples]
        )
        if not self.resets:
            return batch
        positions = torch.stack([sample["position_ids"] for sample in samples])
        if self.reset_position_ids and self.reset_attention_mask:
            return batch | {"position_ids": positions}
        if self.reset_position_ids:
            return batch | {
                "position_ids": positions,
                "document_ids": torch.zeros_like(positions),
            }
        length = positions.shape[1]
        return batch | {
            "position_ids": torch.arange(length).repeat(len(positions), 1),
            "document_ids": (positions == 0).long().cumsum(dim=1) - 1,
        }
