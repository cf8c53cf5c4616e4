"""Several sources: exact proportions, epochs of their own, one place for all of them; and a run over two folders."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from corpus import write_config, write_corpus
from launch import launch, only_run, records
from test_loader import shards

from ava_fast.config import ConfigError, load_config
from ava_fast.data.batches import Batches, Source
from ava_fast.data.loader import TokenLoader, heldout_sequences
from ava_fast.data.order import Shuffle
from ava_fast.data.shards import Piece, write_shards
from ava_fast.errors import UserError

LENGTHS, WEIGHTS = (401, 121, 41), (0.5, 0.3, 0.2)  # 100, 30 and 10 sequences of 4
ORDER = {"max_length": 4, "seed": 5}


@pytest.fixture
def sources():
    """Tokens of source n lie from 1,000·n on, each once."""
    with ExitStack() as stack:
        texts = [[list(range(1000 * n, 1000 * n + length - 1))] for n, length in enumerate(LENGTHS, 1)]
        yield [Source(stack.enter_context(shards(text)), weight) for text, weight in zip(texts, WEIGHTS, strict=True)]


def rows(loaders: list[TokenLoader], batches: int) -> list[list[int]]:
    return [row for _ in range(batches) for loader in loaders for row in loader.next_batch()[0].tolist()]


def test_proportions_are_exact_and_every_source_has_epochs_of_its_own(sources: list[Source]) -> None:
    loader = TokenLoader(sources, batch_size=8, **ORDER)
    seen = rows([loader], 50)
    origins = [row[0] // 1000 - 1 for row in seen]
    for n in range(1, 401):
        counts = Counter(origins[:n])
        assert all(abs(counts[source] - n * weight) < 1 for source, weight in enumerate(WEIGHTS))
    assert loader.progress() == [(200, 2.0), (120, 4.0), (80, 8.0)]
    for source, n in enumerate((100, 30, 10)):
        own = [
            (row[0] - 1000 * (source + 1)) // 4 for row, origin in zip(seen, origins, strict=True) if origin == source
        ]
        assert own == Shuffle(n, seed=5, stream=source).at(np.arange(len(own))).tolist()
        epochs = [own[start : start + n] for start in range(0, len(own), n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_one_position_says_where_all_sources_are_at_any_world_size(sources: list[Source]) -> None:
    loader = TokenLoader(sources, batch_size=4, **ORDER)
    expected = rows([loader], 40)
    half = TokenLoader(sources, batch_size=4, **ORDER)
    rows([half], 17)
    pair = [TokenLoader(sources, batch_size=4, rank=rank, world_size=2, prefetch=2, **ORDER) for rank in range(2)]
    for own in pair:
        own.load_state_dict(half.state_dict())
    assert rows(pair, 23) == expected[17 * 4 :]


def test_other_weights_or_another_tokenizer_are_refused(sources: list[Source], tmp_path: Path) -> None:
    state = TokenLoader(sources, batch_size=4, **ORDER).state_dict()
    heavier = [sources[0]._replace(weight=0.6), *sources[1:]]
    with pytest.raises(UserError, match=r"the tokens in .*, .* \(data\.sources\) are not the ones .*, or their prop"):
        TokenLoader(heavier, batch_size=4, **ORDER).load_state_dict(state)
    same = [source._replace(weight=10 * source.weight) for source in sources]
    TokenLoader(same, batch_size=4, **ORDER).load_state_dict(state)
    write_shards(
        tmp_path / "other", [Piece([1] * 9, 9, True)], [Piece([1] * 9, 9, True)], tokenizer_json=b"{ }",
        vocab_size=65_536, eos_id=65_535, source="a test", skipped=[],
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data\.sources: .*/other was prepared with another tokenizer than "):
        TokenLoader([*sources, Source(tmp_path / "other")], batch_size=4, **ORDER)


def test_heldout_sequences_come_from_every_source_by_weight(sources: list[Source]) -> None:
    origins = heldout_sequences(sources, max_length=4, limit=10)[:, 0] // 1000
    assert origins.tolist() == [1] * 5 + [2] * 3 + [3] * 2
    assert np.bincount(heldout_sequences(sources, max_length=4)[:, 0] // 1000).tolist() == [0, 100, 30, 10]
    halves = [heldout_sequences(sources, max_length=4, limit=10, rank=rank, world_size=2) for rank in range(2)]
    assert (np.concatenate(halves)[:, 0] // 1000).tolist() == origins.tolist()


def test_documents_are_counted_on_from_source_to_source() -> None:
    with shards([[1] * 9] * 3) as first, shards([[2] * 9] * 4) as second:
        batches = Batches([Source(first), Source(second)], max_length=9, batch_size=1, seed=0)
        for position in range(8):
            ((source, index),) = batches.share(position)
            own = batches.sources[source].documents(index)
            assert batches.documents(position) == [3 * source + document for document in own]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{data_dir: x, sources: [{data_dir: a, weight: 1}]}", "data.data_dir: .*null, as data.sources names"),
        ("{sources: [{data_dir: a, weight: 1}, {data_dir: a, weight: 2}]}", "data.sources: .*each data_dir once"),
        ("{sources: [{data_dir: a, weight: 1}, {data_dir: b, weight: 0.3333333}]}", "repeat after 13,333,333 seq"),
        ("{sources: [{data_dir: a, weight: 0}]}", r"data.sources: .*a list of \{data_dir, weight\}"),
        ("{sources: []}", r"data.sources: .*a list of \{data_dir, weight\}"),
    ],
)
def test_sources_that_make_no_mixture_are_refused(data: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {data}\n")
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / "c.yaml")


def test_a_run_over_two_folders_with_attention_inside_documents(tmp_path: Path) -> None:
    folders = [write_corpus(tmp_path / name, documents=count, words=200) for name, count in (("a", 12), ("b", 3))]
    mixture = [{"data_dir": str(folder), "weight": weight} for folder, weight in zip(folders, (3, 1), strict=True)]
    data = {"data_dir": None, "sources": mixture, "document_attention": True}
    finished = launch(write_config(tmp_path / "c.yaml", folders[0], data=data), ranks=2)
    assert finished.returncode == 0, finished.stdout
    run = only_run(tmp_path / "c.yaml")
    steps = records(run, "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    first, second = json.loads((run / "summary.json").read_text())["sources"]
    assert (first["sequences"], second["sequences"]) == (120, 40)
    assert second["epochs"] > 1
    assert (
        f"| {second['folder']} | 40 | {second['epochs']:.2f} | {second['first_document']:,} |"
        in (run / "report.md").read_text()
    )
