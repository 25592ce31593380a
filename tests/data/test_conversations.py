"""Conversations: what counts of them, how they are packed, and that they are trained on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_dhellam.commands.main import main
from lightning_dhellam.data import ConversationDataModule
from lightning_dhellam.data.chat import ChatTemplate
from lightning_dhellam.data.conversations import packed
from tests.models.llama import SMALL, hugging_face_llama
from tests.runner.test_context_parallel import Case, started

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}"
    "<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
Write = Callable[[Sequence[Any]], Path]


def talk(*turns: str) -> dict[str, Any]:
    """The user and the assistant in turns, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


TALKS = [talk(f"what is {n} and {n}?", f"it is {2 * n}, so ü") for n in range(12)]
TALKS += [talk("hello", "hi", f"and {n}?", f"no, {n * 7}") for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one that was made here, with a template without marks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps(one) for one in TALKS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.chat_template = PLAIN
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(lines: Sequence[Any]) -> Path:
        path = tmp_path / "train.jsonl"
        path.write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
        return path

    return file


def _said(template: ChatTemplate, messages: Any) -> str:
    ids, counts = template.encode(messages, "here")
    return template._tokenizer.decode([i for i, one in zip(ids, counts, strict=True) if one])


def test_what_the_assistant_says_counts_by_marks_or_without(tokenizer: Path) -> None:
    plain, marked = ChatTemplate(tokenizer), ChatTemplate(tokenizer, MARKED)
    assert (plain.marks, marked.marks) == (False, True)
    for one in TALKS:
        found = plain.encode(one["messages"], "here")
        assert found == marked.encode(one["messages"], "here")
        turns = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
        assert _said(plain, one["messages"]) == "".join(f"{turn}<|im_end|>" for turn in turns)
    assert _said(plain, talk("only a question")["messages"]) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, r"here: the chat template does not begin .* first 2 messages"),
        (REFUSING, "here: the chat template refuses it: roles must alternate"),
    ],
)
def test_a_template_that_hides_what_is_said_is_refused(
    tokenizer: Path, template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(tokenizer, template).encode(talk("a", "b", "c", "d")["messages"], "here")


def test_every_document_is_in_one_row_where_it_fits() -> None:
    draw = random.Random(3)
    for room in (1, 7, 64):
        lengths = [draw.randint(1, room) for _ in range(200)]
        rows = packed(lengths, room)
        assert sorted(number for row in rows for number in row) == list(range(200))
        filled = [sum(lengths[number] for number in row) for row in rows]
        assert max(filled) <= room
        # No two rows fit into one, so at least half of all room but one row's is filled.
        assert sum(sorted(filled)[:2]) > room
    assert packed([], 8) == [] and packed([5, 3, 4, 4], 8) == [[0, 1], [2, 3]]


def _module(path: Path, tokenizer: Path, **options: Any) -> ConversationDataModule:
    given: dict[str, Any] = {"sequence_length": 64, "batch_size": 2, **options}
    return ConversationDataModule(path, tokenizer, **given)


def test_packed_conversations_are_trained_as_if_alone(tokenizer: Path, write: Write) -> None:
    data = _module(write(TALKS[5:14]), tokenizer, batch_size=3)
    template = ChatTemplate(tokenizer)
    (batch, *_) = data.train_dataloader()
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "position_ids"), ((3, 64), torch.int64)
    )
    case = Case({}, config=SMALL.__class__(**{**vars(SMALL), "vocab_size": data.vocab_size}))
    reference, losses = hugging_face_llama(case.config), []
    in_batch = 0
    for row, positions in zip(batch["tokens"].tolist(), batch["position_ids"], strict=True):
        begins = [*(positions == 0).nonzero().flatten().tolist(), 64]
        for one in TALKS[5:14]:
            ids, counts = template.encode(one["messages"], "here")
            for begin in begins[:-1]:
                if row[begin : begin + len(ids)] == ids:
                    in_batch += 1
                    labels = torch.where(torch.tensor(counts), torch.tensor(ids), -100)[None]
                    logits = reference(torch.tensor([ids])).logits[0, :-1]
                    losses.append(
                        torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")[
                            labels[0, 1:] != -100
                        ]
                    )
    assert in_batch >= 4
    expected: Tensor = torch.cat(losses).mean()
    with started(case) as runner:
        assert abs(runner.train(batch) - expected) <= 1e-6 * expected


def _lines(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_what_is_left_out_is_counted_and_said(
    tokenizer: Path, write: Write, caplog: pytest.LogCaptureFixture, too_long: str
) -> None:
    long = talk("short", "a long answer " * 30)
    late = talk("a long question " * 30, "yes")
    silent = talk("nobody answers")
    path = write([{"messages": []}, silent, TALKS[0], "\n", long, late, TALKS[1]])
    with caplog.at_level("INFO"):
        _module(path, tokenizer, too_long=too_long).setup()
    said = {
        "truncate": "3 of 6 conversations in 2 samples; left out: 1 empty, 2 without what the"
        " assistant says; 2 truncated",
        "drop": "2 of 6 conversations in 1 samples; left out: 1 empty, 1 without what the assistant"
        " says, 2 too long",
    }
    assert f"{path}: {said[too_long]}" in _lines(caplog)
    with caplog.at_level("INFO"):  # the second time from the cache
        caplog.clear()
        _module(path, tokenizer, too_long=too_long).setup()
    assert said[too_long] in _lines(caplog)
    assert len(list((path.parent / ".conversations-cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nothing\n", "train.jsonl:2 is not JSON"),
        ({"text": "a"}, "train.jsonl:2 is no conversation"),
        ({"messages": [{"content": "a"}]}, "train.jsonl:2 is no conversation"),
        ({"messages": "hello"}, "train.jsonl:2 is no conversation"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(
    tokenizer: Path, write: Write, line: Any, message: str
) -> None:
    path = write([TALKS[0], line])
    with pytest.raises(ValueError, match=message):
        _module(path, tokenizer).setup()
    assert not list(path.parent.rglob("*.npy"))


def test_arguments_that_cannot_work_are_refused(
    tokenizer: Path, write: Write, tmp_path: Path
) -> None:
    path = write(TALKS)
    bare = tmp_path / "bare"
    PreTrainedTokenizerFast.from_pretrained(tokenizer, chat_template=None).save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    for changes, message in (
        ({"too_long": "cut"}, "too_long='cut' must be 'truncate' or 'drop'"),
        ({"path": tmp_path / "none.jsonl"}, r"path=\S+none.jsonl is no file"),
        ({"validation_path": tmp_path / "x"}, r"validation_path=\S+x is no file"),
        ({"tokenizer": tmp_path / "nowhere"}, r"tokenizer=\S+nowhere is no folder"),
        ({"tokenizer": tmp_path}, r"tokenizer=\S+ cannot be read"),
        ({"tokenizer": bare}, r"tokenizer=\S+bare has no chat template"),
        ({"chat_template": tmp_path / "t.jinja"}, r"chat_template=\S+ cannot be read"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
    ):
        given: dict[str, Any] = {"path": path, "tokenizer": tokenizer, **changes}
        with pytest.raises(ValueError, match=message):
            _module(**given)
    only_questions = write([talk("nobody answers")])
    with pytest.raises(ValueError, match="has no conversation in which the assistant says"):
        _module(only_questions, tokenizer).setup()


def test_training_goes_on_in_the_middle(tokenizer: Path, write: Write) -> None:
    path = write(TALKS)

    def rest(state: dict[str, Any] | None, batches: int) -> tuple[list[Any], dict[str, Any]]:
        data = _module(path, tokenizer, batch_size=1)
        if state is not None:
            data.load_state_dict(state)
        loader = data.train_dataloader()
        seen: list[Any] = []
        while len(seen) < batches:
            for batch in loader:
                seen.append(batch["tokens"].tolist())
                if len(seen) == batches:
                    return seen, data.state_dict()
        raise AssertionError

    straight, _ = rest(None, 20)
    first, state = rest(None, 9)
    assert first + rest(state, 11)[0] == straight
    other = _module(path, tokenizer, seed=9)
    with pytest.raises(ValueError, match="trained on data with seed=1234, this run has seed=9"):
        other.load_state_dict(state)


def test_the_recipe_learns(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "tokenizer").symlink_to(tokenizer)
    lines = "".join(json.dumps(one) + "\n" for one in TALKS)
    (tmp_path / "chat" / "train.jsonl").write_text(lines)
    words = ["fit", "--config", "sft-tiny-2cpu", "--trainer.devices", "1"]
    words += ["--trainer.strategy.init_args.tensor_parallel_size", "1", "--trainer.max_steps", "8"]
    words += ["--trainer.log_every_n_steps", "1", "--model.overrides.num_layers", "1"]
    words += ["--data.init_args.validation_path", "chat/train.jsonl"]
    words += ["--trainer.strategy.init_args.plan", "interleaved"]
    small = [*words, "--model.overrides.vocab_size", "64"]
    assert main(small) == 2
    error = capsys.readouterr().err
    assert "the data's tokenizer has 300 tokens, but the model has vocab_size=64" in error
    caplog.set_level("INFO")
    assert main([*words, "--model.overrides.vocab_size", "300"]) == 0
    assert re.search(r"24 of 24 conversations in \d+ samples", _lines(caplog))
    steps = re.findall(r"step (\d) of 8: train_loss ([\d.]+)", capsys.readouterr().out)
    losses = [float(loss) for _, loss in steps]
    assert len(losses) == 8 and losses[-1] < 0.95 * losses[0]


def test_text_is_prepared_by_the_folder_of_a_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    texts = ["hello\n  and hi ü", "what is 1 and 1?"]
    source, output = tmp_path / "texts.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["data", "prepare", "--source", str(source), "--output", str(output)]
    assert main([*words, "--tokenizer", str(tokenizer)]) == 0
    ids = numpy.fromfile(output / "data.bin", numpy.uint16).tolist()
    own = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids == [token for one in own for token in (*one, theirs.eos_token_id)]
    assert main([*words, "--vocab_size", "299", "--tokenizer", str(tokenizer)]) == 2
