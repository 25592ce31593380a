"""Conversations as token ids, by the chat template of a Hugging Face tokenizer.

What the assistant says counts: the tokens that the template marks by `{% generation %}`, or else
those of the text that each of its turns adds to what the template makes of the turns before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_INSTALL = "pip install 'lightning-dhellam[data]'"


class Encoded(NamedTuple):
    """A conversation.

    Attributes:
        ids: its tokens.
        counts: which of them the assistant has said, as many.
    """

    ids: list[int]
    counts: list[bool]


class ChatTemplate:
    """Makes token ids of conversations.

    Args:
        folder: of a Hugging Face model or tokenizer, with `tokenizer.json`.
        template: text of another chat template than the tokenizer's own.

    Raises:
        ValueError: there is no tokenizer, it has no chat template or is not one of the library
            tokenizers.
    """

    def __init__(self, folder: str | Path, template: str | None = None) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(f"chat templates need transformers: {_INSTALL}") from error
        if not Path(folder).is_dir():
            raise ValueError(f"tokenizer={folder} is no folder: give that of a Hugging Face model")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parts do
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer={folder} cannot be read: {reason}") from error
        if template is not None:
            self._tokenizer.chat_template = template
        found = self._tokenizer.chat_template
        if not isinstance(found, str):
            raise ValueError(
                f"tokenizer={folder} has no chat template: give chat_template=<a file of one>, or"
                " the tokenizer of a model that was tuned on conversations"
            )
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"tokenizer={folder} is none of the library tokenizers, and others do not say where"
                " in the text a token is: save its tokenizer.json with a newer transformers"
            )
        self.template = found
        self.marks = bool(_GENERATION.search(found))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return 1 + max(self._tokenizer.get_vocab().values())

    @property
    def identity(self) -> str:
        """What decides the tokens, as text."""
        return self._tokenizer.backend_tokenizer.to_str() + self.template

    def encode(self, messages: Sequence[Message], where: str) -> Encoded:
        """The tokens of a conversation; `where` it is, for messages.

        Raises:
            ValueError: the template refuses it, or does not say what a turn adds.
        """
        if self.marks:
            found = self._templated(
                messages,
                where,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            return Encoded(list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]])
        text = self._text(messages, where)
        spans = self._spans(messages, text, where)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        counts = [
            any(start <= begin < stop and end > begin for start, stop in spans)
            for begin, end in found["offset_mapping"]
        ]
        return Encoded(list(found["input_ids"]), counts)

    def _spans(self, messages: Sequence[Message], text: str, where: str) -> list[tuple[int, int]]:
        """Where in the text of all messages the assistant speaks: from and to."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = messages[:number]
            begin = self._text(before, where, add_generation_prompt=True) if before else ""
            end = self._text(messages[: number + 1], where)
            if not (end.startswith(begin) and text.startswith(end)):
                raise ValueError(
                    f"{where}: the chat template does not begin the conversation with what it makes"
                    f" of the first {number + 1} messages, so that it cannot be seen what the"
                    " assistant says: mark it in the template by {% generation %}, or give one"
                    " conversation for each answer"
                )
            spans.append((len(begin), len(end)))
        return spans

    def _text(self, messages: Sequence[Message], where: str, **options: bool) -> str:
        text: str = self._templated(messages, where, tokenize=False, **options)
        return text

    def _templated(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template([*map(dict, messages)], **options)
        except (TemplateError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{where}: the chat template refuses it: {reason}") from error
