import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch.utils.data import DataLoader

from lightning_dhellam.data.module import IndexedDataModule, TokenBatch
from lightning_dhellam.data.prepared import PreparedData
from lightning_dhellam.parallel import Cluster

from .conftest import TEXTS

Write = Callable[[Sequence[Sequence[int]]], Path]
COUNTING = [list(range(10 * n, 10 * n + 10)) for n in range(100)]


@pytest.fixture
def module(prepared: PreparedData, tmp_path: Path) -> Callable[..., IndexedDataModule]:
    def make(path: str | Path = prepared.path, **options: Any) -> IndexedDataModule:
        given: dict[str, Any] = {"sequence_length": 16, "num_workers": 0, "split": "8,1,1"}
        given |= {"cache_dir": tmp_path / "cache", **options}
        return IndexedDataModule(path, batch_size=4, **given)

    return make


def batches(loader: DataLoader[TokenBatch]) -> list[TokenBatch]:
    return list(loader)


def tokens(loader: DataLoader[TokenBatch]) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in batches(loader)])


def test_batches_have_the_promised_shape_type_and_shift(
    module: Callable[..., IndexedDataModule],
) -> None:
    loader = module().train_dataloader()
    assert len(batches(loader)) == len(loader) > 5
    for batch in loader:
        assert list(batch) == ["tokens", "labels", "loss_mask"]
        for name, dtype in [("tokens", torch.int64), ("labels", torch.int64)]:
            assert (batch[name].shape, batch[name].dtype) == ((4, 16), dtype)
        assert torch.equal(batch["loss_mask"], torch.ones(4, 16, dtype=torch.float32))
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_samples_are_pieces_of_the_corpus(module: Callable[..., IndexedDataModule]) -> None:
    data = module(split="1,0,0", sequence_length=8)
    tokenizer = data.tokenizer
    assert tokenizer is not None
    checked = 0
    for batch in data.train_dataloader():
        for row, label in zip(batch["tokens"].tolist(), batch["labels"][:, -1:], strict=True):
            row += label.tolist()
            if tokenizer.eod not in row and 0 not in row:
                piece = tokenizer.decode(row)
                assert any(piece in text for text in TEXTS)
                checked += 1
    assert checked > 50


def test_a_megatron_dataset_is_read_in_any_spelling(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    prefix = megatron_prefix(COUNTING)
    read = []
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx", os.path.relpath(prefix)):
        data = module(path, vocab_size=1000, split="1,0,0", sequence_length=9)
        assert (data.vocab_size, data.tokenizer) == (1000, None)
        read.append(tokens(data.train_dataloader()))
    assert all(torch.equal(read[0], other) for other in read[1:])
    # 1000 tokens make 111 samples of 9, of which 27 whole batches of 4.
    assert read[0].shape == (108, 9)
    assert len(set(read[0].flatten().tolist())) == 108 * 9


def test_a_split_divides_the_documents(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    data = module(megatron_prefix(COUNTING), vocab_size=1000, split="80,15,5", sequence_length=4)
    test = set(tokens(data.test_dataloader()).flatten().tolist())
    validation_loader = data.val_dataloader()
    assert isinstance(validation_loader, DataLoader)
    validation = set(tokens(validation_loader).flatten().tolist())
    train = set(tokens(data.train_dataloader()).flatten().tolist())
    assert max(train) < 800 <= min(validation) < max(validation) < 950 <= min(test)
    # 50 tokens make 12 samples of 4: evaluation keeps every one.
    assert len(test) == 48
    assert torch.equal(tokens(data.predict_dataloader()), tokens(data.test_dataloader()))


def test_evaluation_keeps_the_smaller_last_batch(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    data = module(megatron_prefix(COUNTING), vocab_size=1000, split="93,7", sequence_length=10)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    assert [len(batch["tokens"]) for batch in loader] == [4, 2]


def test_the_seed_alone_decides_the_order(module: Callable[..., IndexedDataModule]) -> None:
    first, same, other = (tokens(module(seed=seed).train_dataloader()) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first, tokens(module(seed=1, num_workers=2).train_dataloader()))


def test_every_epoch_goes_through_all_samples_in_an_order_of_its_own(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    options: dict[str, Any] = {"vocab_size": 1000, "split": "1", "sequence_length": 83}
    loaders = [module(megatron_prefix(COUNTING), **options).train_dataloader() for _ in range(2)]
    epochs, again = ([tokens(loader)[:, 0].tolist() for _ in range(3)] for loader in loaders)
    assert epochs == again
    first, *others = epochs
    assert len(first) == 12  # 1000 tokens
    assert all(sorted(other) == sorted(first) and other != first for other in others)
    assert others[0] != others[1]


def test_train_samples_goes_pass_by_pass(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    prefix = megatron_prefix(COUNTING)
    options: dict[str, Any] = {"vocab_size": 1000, "split": "1", "sequence_length": 9}
    few = module(prefix, train_samples=8, **options).train_dataloader()
    many = module(prefix, train_samples=400, **options).train_dataloader()
    drawn = tokens(many)
    assert len(drawn) == 400
    passes = [part.flatten().tolist() for part in drawn[:333].split(111)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len(set(passes[0])) == 999 and passes[1] != passes[0]
    # A short epoch is followed by the next samples of the same order.
    assert torch.equal(torch.cat([tokens(few) for _ in range(5)]), drawn[:40])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_an_emulated_cluster_builds_the_index_itself(
    module: Callable[..., IndexedDataModule], tmp_path: Path, rank: int
) -> None:
    expected = tokens(module().train_dataloader())
    Cluster(world_size=4, links={}, rank=rank).join()
    try:
        built = module(cache_dir=tmp_path / "empty").train_dataloader()
        found = module().train_dataloader()
        assert torch.equal(tokens(built), expected) and torch.equal(tokens(found), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_the_index_cache_is_built_once(
    module: Callable[..., IndexedDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(module().train_dataloader())
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("megatron.core.datasets.gpt_dataset._build_document_index", refuse)
    assert torch.equal(tokens(module().train_dataloader()), expected)
    with pytest.raises(AssertionError, match="built again"):
        module(seed=99).setup()


def test_an_interrupted_index_cache_is_not_trusted(
    module: Callable[..., IndexedDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = 0
    save = numpy.save

    def interrupt(*args: Any, **options: Any) -> None:
        nonlocal saved
        saved += 1
        save(*args, **options)
        if saved == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("numpy.save", interrupt)
        module().setup()
    assert list((tmp_path / "cache").iterdir()) == []
    module().setup()


def test_new_data_under_an_old_name_gets_a_new_index(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write
) -> None:
    options: dict[str, Any] = {"vocab_size": 2000, "split": "1", "sequence_length": 9}
    tokens(module(megatron_prefix(COUNTING), **options).train_dataloader())
    prefix = megatron_prefix([[1000 + token for token in text] for text in COUNTING[:50]])
    drawn = tokens(module(prefix, **options).train_dataloader())
    assert drawn.min() >= 1000
    assert len(drawn) == 52


def test_the_cache_is_beside_the_data_unless_told(prepared: PreparedData, tmp_path: Path) -> None:
    copy = shutil.copytree(prepared.path, tmp_path / "copy")
    IndexedDataModule(copy, 16, 4, num_workers=0, split="8,1,1").setup()
    assert len(list((copy / "index-cache").iterdir())) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy"]


def test_what_megatron_asks_of_the_tokenizer(
    module: Callable[..., IndexedDataModule], recwarn: pytest.WarningsRecorder
) -> None:
    data = module()
    data.setup("fit")
    assert data.vocab_size == data.tokenizer.vocab_size == 300  # type: ignore[union-attr]
    assert not [warning for warning in recwarn if "pad token" in str(warning.message)]
    assert all(isinstance(one, GPTDataset) for sets in data._datasets.values() for one in sets)


def test_no_share_no_loader(module: Callable[..., IndexedDataModule]) -> None:
    data = module(split="1,0,0")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"split='1,0,0' has no share for test\. Give one"):
        data.test_dataloader()
    with pytest.raises(ValueError, match=r"split='0,1,1' has no share for training"):
        module(split="0,1,1").train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "a,b"}, "split='a,b' is not up to three shares"),
        ({"split": "0,0,0"}, "of which one is positive"),
        ({"split": "1,1,1,1"}, "is not up to three shares"),
        ({"split": "-1,1"}, "is not up to three shares"),
        ({"split": "999,1,0"}, "leaves 0 of the 100 document(s)"),
        ({"sequence_length": 10**6}, "but one sample of sequence_length=1000000 reads 1000001"),
        ({"sequence_length": 0}, "sequence_length=0 is too small"),
        ({"num_workers": -1}, "num_workers=-1 is too small"),
        ({"train_samples": 0}, "train_samples=0 is too small"),
        ({"vocab_size": 77}, "vocab_size=77, but the tokenizer of path="),
        ({"path": "nowhere"}, "path=nowhere holds no dataset"),
        ({"path": "nowhere"}, "dhellam data prepare --source"),
    ],
)
def test_mistakes_are_refused_when_constructed(
    module: Callable[..., IndexedDataModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        module(**options)


def test_mistakes_with_megatron_datasets(
    module: Callable[..., IndexedDataModule], megatron_prefix: Write, tmp_path: Path
) -> None:
    prefix = megatron_prefix(COUNTING)
    with pytest.raises(ValueError, match=r"does not name its vocabulary\. Give tokenizer="):
        module(prefix)
    with pytest.raises(ValueError, match=r"holds token id 999, but the vocabulary has 999 ids"):
        module(prefix, vocab_size=999)
    index = Path(f"{prefix}.idx")
    content = index.read_bytes()
    version_2 = content[:9] + b"\2" + content[10:]
    for damaged, damage in [
        (b"not an index", r"\.idx is not an index"),
        (content[:20], r"\.idx is cut off"),
        (content[:200], r"\.idx is cut off"),
        (version_2, r"\.idx has version 2, but"),
    ]:
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a whole Megatron dataset: .*" + damage):
            module(prefix, vocab_size=1000)
    index.write_bytes(content)
    for size, damage in [(0, "is empty"), (3996, "has 3996 bytes, its index says 4000")]:
        os.truncate(f"{prefix}.bin", size)
        with pytest.raises(ValueError, match=r"is not a whole Megatron dataset: .*" + damage):
            module(prefix, vocab_size=1000)
        Path(f"{prefix}.bin").write_bytes(bytes(4000))
    index.unlink()
    with pytest.raises(ValueError, match=r"is half a Megatron dataset: .*\.idx is missing"):
        module(prefix, vocab_size=1000)


def test_another_tokenizer_than_the_datas_is_refused(
    module: Callable[..., IndexedDataModule], prepared: PreparedData, tmp_path: Path
) -> None:
    from lightning_dhellam.data.tokenizer import train_tokenizer

    train_tokenizer(["other text " * 50], 270).save(tmp_path / "other.model")
    with pytest.raises(ValueError, match=r"other\.model is not the one that path="):
        module(tokenizer=tmp_path / "other.model")
    assert module(tokenizer=prepared.path / "tokenizer.model").vocab_size == 300


def test_less_than_one_batch_is_refused(module: Callable[..., IndexedDataModule]) -> None:
    data = module(train_samples=3)
    with pytest.raises(ValueError, match=r"has 3 training sample\(s\).*takes 4\. Give a smaller"):
        data.train_dataloader()


def test_a_cache_that_cannot_be_written_is_named(
    module: Callable[..., IndexedDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)\. Give cache_d"):
        module().setup()


@pytest.mark.parametrize(
    ("documents", "split"),
    [(100, "98,1,1"), (30, "90,5,5"), (12, "80,10,10"), (5, "60,20,20"), (1, "1,0,0")],
)
def test_few_documents_get_a_split_that_works(
    megatron_prefix: Write, tmp_path: Path, documents: int, split: str
) -> None:
    prefix = megatron_prefix(COUNTING[:documents])
    options: dict[str, Any] = {"vocab_size": 1000, "num_workers": 0, "cache_dir": tmp_path / "c"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = IndexedDataModule(prefix, sequence_length=4, batch_size=1, **options)
    assert data.split == split
    # Megatron-core 0.19 warns of its own ranks, which a user sees only with this filter.
    ours = [w for w in said if "megatron" not in w.filename]
    assert [f"split='{split}' is used" in str(w.message) for w in ours] == [True] * (
        split != "98,1,1"
    )
    assert len(data.train_dataloader()) >= 1
    assert bool(data.val_dataloader()) is (split != "1,0,0")


def test_documents_of_several_sequences_are_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "some.bin"), dtype=numpy.int32)
    builder.add_document(numpy.arange(40), [30, 10])
    builder.add_document(numpy.arange(20), [20])
    builder.finalize(str(tmp_path / "some.idx"))
    with pytest.raises(ValueError, match=r"has 3 sequences in 2 documents, and every document"):
        IndexedDataModule(tmp_path / "some", 4, 1, vocab_size=100)
