"""Folders of Hugging Face: read by each rank in slices, written whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_dhellam.commands.main import main
from lightning_dhellam.models import (
    CausalLM,
    config_of,
    import_huggingface,
    save_huggingface,
)
from lightning_dhellam.models.stored import Stored, stored_tensors
from lightning_dhellam.models.written import TensorFile
from lightning_dhellam.parallel import ParallelContext
from tests.full_disk import full_disk
from tests.models.folders import (
    SHAPES,
    families_without_shape,
    hugging_face,
    save_folder,
    save_tokenizer,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def test_every_family_is_tested_here() -> None:
    assert not families_without_shape()


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor[:] for name, tensor in stored_tensors(folder, "").items()}


def _blank(folder: Path, **sizes: int) -> CausalLM:
    context = ParallelContext.create(CPU, **sizes) if sizes else ParallelContext.single(CPU)
    model = CausalLM(config_of(folder), context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def _read(folder: Path, **sizes: int) -> CausalLM:
    model = _blank(folder, **sizes)
    import_huggingface(model, folder)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_comes_back_as_it_was_and_transformers_reads_it(name: str, tmp_path: Path) -> None:
    theirs = save_folder(SHAPES[name], tmp_path / "theirs")
    model = _read(tmp_path / "theirs")
    assert model.origin == tmp_path / "theirs"
    save_huggingface(model, tmp_path / "ours", max_shard_size="20KB")
    before, after = _tensors(tmp_path / "theirs"), _tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert [n for n, tensor in before.items() if not torch.equal(tensor, after[n])] == []
    carried = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for file in carried:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    _compare(theirs, tmp_path / "ours")
    # Of a model that no folder was the origin of, the configuration is made.
    model.origin = None
    save_huggingface(model, tmp_path / "made")
    assert sorted(os.listdir(tmp_path / "made")) == ["config.json", "model.safetensors"]
    assert config_of(tmp_path / "made") == config_of(tmp_path / "theirs")
    _compare(theirs, tmp_path / "made")


def _compare(theirs: PreTrainedModel, folder: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert ours.dtype == torch.float32
    if theirs.config.model_type not in ("llama",) and hasattr(ours, "set_experts_implementation"):
        ours.set_experts_implementation("eager")
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        greedy |= {"pad_token_id": 0, "eos_token_id": 3}
        mask = torch.ones_like(tokens)
        texts = [m.generate(tokens, attention_mask=mask, **greedy) for m in (ours, theirs)]
    assert torch.equal(*texts)


def _sizes_of(name: str) -> list[dict[str, int]]:
    """Parallel sizes that a model of this shape can be cut over, by two ranks."""
    config = SHAPES[name]
    found = [{"tensor_parallel_size": 2}]
    if config.num_layers >= 4:
        found.append({"pipeline_parallel_size": 2})
    if config.num_experts is not None:
        found.append({"expert_parallel_size": 2})
    return found


def _reads_and_writes(rank: int, root: str, names: list[str]) -> None:
    for name in names:
        folder = Path(root, name)
        for number, sizes in enumerate(_sizes_of(name)):
            model = _blank(folder, **sizes)
            with _recorded() as (reads, made):
                import_huggingface(model, folder)
            _check_reads(model, reads, folder, f"{name} {sizes}")
            largest = max(parameter.nbytes for parameter in model.parameters())
            assert made.most <= largest, f"{name} {sizes}"
            target = folder.with_name(f"{name}-{number}")
            save_huggingface(model, target, max_shard_size="20KB")
            assert Path(target, INDEX).is_file()
            before, after = _tensors(folder), _tensors(target)
            assert before.keys() == after.keys()
            for tensor in before:
                assert torch.equal(before[tensor], after[tensor]), f"{name} {sizes} {tensor}"
            model.context.destroy()


class _Reads:
    """What was read: how much in all, and how much lived at once."""

    def __init__(self) -> None:
        self.total = self.most = 0
        self.alive: list[tuple[weakref.ref[Tensor], int]] = []

    def add(self, tensor: Tensor) -> None:
        self.total += tensor.numel()
        self.alive = [pair for pair in self.alive if pair[0]() is not None]
        self.alive.append((weakref.ref(tensor), tensor.numel()))
        self.most = max(self.most, sum(size for _, size in self.alive))


class _Made(TorchDispatchMode):
    """Counts the memory that operations take, and how much of it there is at once.

    Attributes:
        most: bytes.
        reads: whether a file is being read, whose parts take no memory of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self.reads = 0, False
        self._alive: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.reads:
            return found
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors_in((args, kwargs))}
        for tensor in _tensors_in(found):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place in self._alive:
                self._alive[place][1].append(weakref.ref(tensor))
            elif place not in given:
                self._alive[place] = storage.nbytes(), [weakref.ref(tensor)]
        alive = self._alive.items()
        self._alive = {p: one for p, one in alive if any(ref() is not None for ref in one[1])}
        self.most = max(self.most, sum(size for size, _ in self._alive.values()))
        return found


def _tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _recorded:
    """Records every slice that is read of a file, and the memory that is taken meanwhile."""

    def __enter__(self) -> tuple[_Reads, _Made]:
        reads, made, self._before = _Reads(), _Made(), Stored.__getitem__

        def read(stored: Stored, slices: Any) -> Tensor:
            made.reads = True
            found = self._before(stored, slices)
            made.reads = False
            reads.add(found)
            return found

        Stored.__getitem__ = read  # type: ignore[method-assign]
        self._made = made
        made.__enter__()
        return reads, made

    def __exit__(self, *_: object) -> None:
        self._made.__exit__(None, None, None)
        Stored.__getitem__ = self._before  # type: ignore[method-assign]


def _check_reads(model: CausalLM, reads: _Reads, folder: Path, what: str) -> None:
    """A rank has read its share once, and held what one parameter is made of at a time."""
    share = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    whole = sum(tensor.numel() for tensor in _tensors(folder).values())
    padding = (model.padded_vocab_size - model.config.vocab_size) * model.config.hidden_size
    assert reads.total <= share < whole, what
    assert reads.total >= share - 2 * padding - 2 * model.padded_vocab_size, what
    assert reads.most <= largest, what


def test_several_ranks_read_their_shares_alone_and_write_the_same(tmp_path: Path) -> None:
    for name, config in SHAPES.items():
        # Written at once: what is saved without names of its own has nothing else to say.
        save_folder(config, tmp_path / name)
    run_ranks(2, _reads_and_writes, str(tmp_path), list(SHAPES))


def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    save_folder(SHAPES["llama"], tmp_path / "theirs")
    model = _read(tmp_path / "theirs")
    save_huggingface(model, tmp_path / "half", "bfloat16")
    half = _tensors(tmp_path / "half")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    fields = json.loads((tmp_path / "half" / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    again = CausalLM(model.config, ParallelContext.single(CPU), torch.bfloat16)
    import_huggingface(again, tmp_path / "half")
    save_huggingface(again, tmp_path / "again", max_shard_size=1)
    assert all(torch.equal(half[n], tensor) for n, tensor in _tensors(tmp_path / "again").items())
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == len(half)


def test_the_rotary_embedding_is_where_transformers_4_and_5_look_for_it(tmp_path: Path) -> None:
    config = replace(SHAPES["llama"], rope_scaling_factor=8.0)
    save_folder(config, tmp_path / "five")
    save_huggingface(_read(tmp_path / "five"), tmp_path / "both")
    fields = json.loads((tmp_path / "both" / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert fields["rope_theta"] == config.rotary_base
    assert fields["rope_scaling"] == scaling
    assert fields["rope_parameters"] == {**scaling, "rope_theta": config.rotary_base}
    for left in ("rope_parameters", "rope_scaling"):
        rest = {name: value for name, value in fields.items() if name != left}
        assert config_of(rest) == config_of(tmp_path / "five")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of several files."""
    save_folder(SHAPES["llama"], tmp_path / "theirs")
    return tmp_path / "theirs"


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def _lose(folder: Path) -> str:
    _shard(folder).unlink()
    return rf"theirs lacks {_shard_name(2)}, of the \d+ files that {INDEX} names: fetch or save"


def _shard_name(number: int) -> str:
    return rf"model-{number:05d}-of-\d+\.safetensors"


def _tear(folder: Path) -> str:
    content = _shard(folder).read_bytes()
    _shard(folder).write_bytes(content[:-5])
    return rf"{_shard_name(2)} cannot be read \(SafetensorError: .*not fully covered\): fetch or"


def _cut(folder: Path) -> str:
    _shard(folder).write_bytes(_shard(folder).read_bytes()[:4])
    return rf"{_shard_name(2)} cannot be read \(SafetensorError: .*\): fetch or save"


def _reshape(folder: Path) -> str:
    tensors = load_file(_shard(folder))
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, _shard(folder), metadata={"format": "pt"})
    return r"of another shape: model\.layers\.\d\.\S+\.weight \(\d+, \d+\) instead of"


def _quantise(folder: Path) -> str:
    tensors = load_file(_shard(folder))
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, _shard(folder), metadata={"format": "pt"})
    return r"of a type that is none of float64, .*: model\.layers\.\d\.\S+\.weight F8_E4M3"


def _rename(folder: Path) -> str:
    _edit(folder, model_type="mamba")
    return r"model_type='mamba' is not known here: llama, "


def _classify(folder: Path) -> str:
    _edit(folder, architectures=["LlamaForSequenceClassification"])
    return r"architectures=\['LlamaForSequenceClassification'\], and only 'LlamaForCausalLM' can"


def _enlarge(folder: Path) -> str:
    save_tokenizer(folder, 65)
    return r"tokenizer\.json in .*theirs has 65 tokens, and the model vocab_size=64: it would look"


def _untie(folder: Path) -> str:
    _edit(folder, tie_word_embeddings=True)
    return r"lm_head\.weight differs from model\.embed_tokens\.weight, but tie_embeddings=True"


def _scribble(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": 7}')
    return rf"{INDEX} has no weight_map of names of files: fetch or save the model again"


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [_lose, _tear, _cut, _reshape, _quantise, _rename, _classify, _enlarge, _untie, _scribble],
)
def test_a_folder_that_cannot_be_used_is_refused_in_a_line_and_nothing_is_read_of_it(
    folder: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    message = damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        model = CausalLM(config_of(folder), ParallelContext.single(CPU))
        before = {name: p.clone() for name, p in model.named_parameters()}
        try:
            import_huggingface(model, folder)
        finally:
            assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
            assert model.origin is None
    assert "\n" not in str(caught.value)
    assert main(["convert", str(folder), str(folder.parent / "kept")]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and "\n" not in said
    assert os.listdir(folder.parent) == [folder.name]


@pytest.fixture
def model() -> CausalLM:
    """A model whose weights are from nowhere."""
    return CausalLM(SHAPES["llama"], ParallelContext.single(CPU))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, r"dtype='int4' is no type of weights: use float64, float32"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 is no type of weights"),
        ({"max_shard_size": "5 boxes"}, r"max_shard_size='5 boxes' is no size of a file"),
        ({"max_shard_size": 0}, r"max_shard_size=0 is no size of a file"),
        ({"origin": "nowhere"}, r"origin=nowhere has no config\.json: give a folder"),
        ({"tokenizer": "nowhere"}, r"tokenizer='nowhere' is none: give a folder"),
        ({"tokenizer": 7}, r"tokenizer=7 is none: give a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_there(
    model: CausalLM, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_huggingface(model, tmp_path / "ours", **options)
    assert os.listdir(tmp_path) == []


def test_only_an_empty_folder_is_written_to(model: CausalLM, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    file.write_text("mine")
    (full / "mine").write_text("mine")
    for target, what in ((full, "is not empty"), (file, "is no folder")):
        with pytest.raises(ValueError, match=f"{target.name} {what}, and nothing is overwritten"):
            save_huggingface(model, target)
    (full / "mine").unlink()
    save_huggingface(model, full)
    assert (full / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_another_tokenizer_than_that_of_the_origin(folder: Path, tmp_path: Path) -> None:
    model, other = _read(folder), tmp_path / "other"
    other.mkdir()
    save_tokenizer(other, 5)
    save_huggingface(model, tmp_path / "ours", tokenizer=other)
    assert len(json.loads((tmp_path / "ours/tokenizer.json").read_text())["model"]["vocab"]) == 5
    assert (tmp_path / "ours/generation_config.json").is_file()
    save_tokenizer(other, 70)
    with pytest.raises(ValueError, match=r"tokenizer\.json in .* has 70 tokens, and the model voc"):
        save_huggingface(model, tmp_path / "large", tokenizer=other)
    assert not (tmp_path / "large").exists()


def test_a_full_disk_leaves_nothing_and_is_named(model: CausalLM, tmp_path: Path) -> None:
    with (
        full_disk(tmp_path, 30_000),
        pytest.raises(
            OSError, match=r"model-0000\d-of-.*: No space left on device: .* more are needed"
        ),
    ):
        save_huggingface(model, tmp_path / "ours", max_shard_size="10KB")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_export_leaves_nothing(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TensorFile, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(model, tmp_path / "ours")
    assert os.listdir(tmp_path) == []


def _killed(what: str, root: Path) -> None:
    """Convert until this process is killed: between two files, or when only the name lacks."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if what == "folder":
        put = TensorFile.put

        def putting(file: TensorFile, *tensor: Any) -> None:
            if "00003" in file.path.name:
                kill()
            put(file, *tensor)

        TensorFile.put = putting  # type: ignore[method-assign]
        save_huggingface(_read(root / "theirs"), root / what, max_shard_size="10KB")
    else:
        os.fsync = kill  # type: ignore[assignment]
        main(["convert", str(root / "theirs"), str(root / what)])


@pytest.mark.parametrize("what", ["folder", "checkpoint"])
def test_what_is_killed_while_it_writes_has_no_name_and_can_be_written_again(
    what: str, folder: Path
) -> None:
    root = folder.parent
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_killed, args=(what, root))
    process.start()
    process.join(300)
    process.kill()
    assert process.exitcode == -signal.SIGKILL
    (left,) = {*os.listdir(root)} - {folder.name}
    assert left.startswith(".") and ".partial" in left and os.listdir(root / left)
    to = "huggingface" if what == "folder" else what
    assert main(["convert", str(folder), str(root / what), f"--to={to}"]) == 0
    assert (root / what).is_dir()


def test_layers_of_ones_own_take_no_weights(folder: Path) -> None:
    model = CausalLM(config_of(folder), ParallelContext.single(CPU))
    model.layers[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"the model has no layers\.1\.\S+, .*: layers of"):
        import_huggingface(model, folder)


def test_a_model_of_transformers_is_read_as_its_folder_is(folder: Path) -> None:
    model = CausalLM(config_of(folder), ParallelContext.single(CPU))
    import_huggingface(model, hugging_face(SHAPES["llama"]))
    again = _read(folder)
    mine = dict(model.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in again.named_parameters())
    assert model.origin is None
