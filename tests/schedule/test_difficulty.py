"""Orders from easy to hard against plain lists, and what makes a row difficult against plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import write_config, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_fast.config import Config, load_config
from ava_fast.data.batches import Sequences, Source
from ava_fast.data.loader import TokenLoader
from ava_fast.data.order import Shuffle
from ava_fast.data.prepare import prepare
from ava_fast.data.shards import Piece, write_shards
from ava_fast.errors import UserError
from ava_fast.model.huggingface import write_model
from ava_fast.model.transformer import Transformer
from ava_fast.schedule.difficulty import STAGES, EasyFirst
from ava_fast.schedule.scores import _made, _read, scores

LENGTH, EOS = 8, 0


def ranking(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).permutation(n).astype("<u4")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_an_ordered_epoch_has_every_row_once_and_its_buckets_rise(n: int, seed: int) -> None:
    easiest_first = ranking(n)
    order = EasyFirst(easiest_first, mode="order", seed=seed)
    seen = order.at(np.arange(2 * n)).tolist()
    assert sorted(seen[:n]) == list(range(n))
    edges = [math.ceil(n * k / STAGES) for k in range(STAGES + 1)]
    for first, last in itertools.pairwise(edges):
        assert set(seen[first:last]) == set(easiest_first[first:last].tolist())
    assert seen[n:] == Shuffle(n, seed=seed).at(np.arange(n)).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(0, 2000),
    st.floats(0.01, 1),
    st.sampled_from(["linear", "root", "step"]),
    st.integers(0, 9),
)
def test_the_threshold_admits_what_the_pacing_says_each_row_as_often(
    n: int, horizon: int, start: float, pacing: Any, seed: int
) -> None:
    easiest_first = ranking(n)
    order = EasyFirst(easiest_first, mode="threshold", pacing=pacing, start=start, horizon=horizon, seed=seed)
    seen = order.at(np.arange(horizon + n)).tolist()
    place_of = {int(row): place for place, row in enumerate(easiest_first)}
    curve = {"linear": lambda x: x, "root": math.sqrt, "step": lambda x: int(4 * x) / 4}[pacing]
    for stage in range(STAGES):
        first, last = (math.ceil(horizon * k / STAGES) for k in (stage, stage + 1))
        admitted = math.ceil((start + (1 - start) * curve(stage / STAGES)) * n - 1e-9)
        counts = Counter(place_of[row] for row in seen[first:last])
        assert all(place < admitted for place in counts)
        whole, rest = divmod(last - first, admitted)
        assert sum(counts.values()) == last - first
        assert all(whole <= counts[place] <= whole + (rest > 0) for place in range(admitted))
    assert seen[horizon:] == Shuffle(n, seed=seed).at(np.arange(n)).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.sampled_from(["threshold", "order"]), st.integers(0, 5), st.data())
def test_a_place_does_not_depend_on_its_neighbours(n: int, mode: Any, stream: int, data: st.DataObject) -> None:
    order = EasyFirst(ranking(n), mode=mode, horizon=700, seed=3, stream=stream)
    together = order.at(np.arange(1000))
    places = np.array(data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=5)))
    assert order.at(places).tolist() == together[places].tolist()


def test_the_order_is_pinned() -> None:
    """A position in a checkpoint means this order: whoever changes it raises ORDER_VERSION."""
    for mode, pinned in PINNED.items():
        assert EasyFirst(ranking(40), mode=mode, horizon=64, seed=1).at(np.arange(0, 80, 8)).tolist() == pinned


PINNED: dict[Any, list[int]] = {
    "threshold": [11, 10, 11, 17, 38, 22, 20, 1, 26, 17],
    "order": [27, 18, 37, 32, 7, 26, 17, 35, 25, 14],
}


def documents(split: int) -> list[Piece]:
    generator = np.random.default_rng(split)
    weights = 1 / np.arange(1, 20)
    lengths = generator.integers(1, 60, 30).tolist()
    return [
        Piece(generator.choice(np.arange(1, 20), size, p=weights / weights.sum()).tolist(), size, True)
        for size in lengths
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of made-up tokens, in several files."""
    folder = tmp_path_factory.mktemp("difficulty") / "shards"
    whole: dict[str, Any] = {"tokenizer_json": b"{}", "vocab_size": 20, "eos_id": EOS, "source": "x", "skipped": []}
    write_shards(folder, documents(0), documents(1), **whole, shard_tokens=100)
    return folder


def settings_for(measure: str, *overrides: str) -> Config:
    fixed = [f"curriculum.difficulty.measure={measure}", f"data.max_length={LENGTH}"]
    return load_config(None, [*fixed, *overrides])


def stream(folder: Path) -> list[int]:
    return [int(token) for piece in documents(0) for token in (*piece.tokens, EOS)]


def rows_of(tokens: list[Any]) -> list[list[Any]]:
    rows = (len(tokens) - 1) // LENGTH
    return [tokens[row * LENGTH : row * LENGTH + LENGTH] for row in range(rows)]


def test_length_is_that_of_the_tokens_documents(folder: Path) -> None:
    per_token = [len(piece.tokens) + 1 for piece in documents(0) for _ in range(len(piece.tokens) + 1)]
    expected = [sum(row) for row in rows_of(per_token)]
    found = scores(settings_for("length"), Sequences(folder, "train", LENGTH))
    assert found.tolist() == expected


def test_rarity_is_the_surprisal_of_the_tokens_alone(folder: Path) -> None:
    tokens = stream(folder)
    counts = Counter(tokens)
    expected = [sum(-math.log(counts[token] / len(tokens)) for token in row) for row in rows_of(tokens)]
    found = scores(settings_for("rarity"), Sequences(folder, "train", LENGTH))
    assert found / 2**24 == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Transformer]:
    """An untrained model whose logits are far from even, as `ava-fast import` would leave it."""
    config = load_config(write_config(tmp_path_factory.mktemp("reference") / "c.yaml", folder))
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        model.head.weight.mul_(30)
    source = tmp_path_factory.mktemp("imported") / "model"
    write_model(model.state_dict(), config.model_dump(include={"model", "moe"}), source, None)
    return source, model.eval()


def test_loss_is_the_reference_models(folder: Path, reference: tuple[Path, Transformer]) -> None:
    source, model = reference
    tokens = torch.tensor(stream(folder))
    config = settings_for("loss", f"curriculum.difficulty.reference={source}")
    found = scores(config, Sequences(folder, "train", LENGTH))
    for row in (0, 7, len(found) - 1):
        at = row * LENGTH
        with torch.no_grad():
            loss = model(tokens[None, at : at + LENGTH], tokens[None, at + 1 : at + LENGTH + 1]).loss.item()
        assert found[row] / LENGTH == pytest.approx(loss, rel=1e-4)
    assert len(found) == (len(tokens) - 1) // LENGTH
    assert found.max() > 1.2 * found.min()


def test_another_tokenizers_model_is_refused(folder: Path, reference: tuple[Path, Transformer]) -> None:
    source, _ = reference
    (source / "tokenizer.json").write_text("another")
    config = settings_for("loss", f"curriculum.difficulty.reference={source}")
    with pytest.raises(UserError, match=r"curriculum\.difficulty\.reference: .* another tokenizer"):
        scores(config, Sequences(folder, "train", LENGTH))
    (source / "tokenizer.json").unlink()


def test_a_ranking_is_made_once_and_anew_where_it_is_damaged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, config = Sequences(folder, "train", LENGTH), settings_for("rarity")
    file = _made(config, source)
    made_at, (rows, digest) = file.stat().st_mtime_ns, _read(file)
    assert rows.tolist() == np.argsort(scores(config, source), kind="stable").tolist()
    assert _made(config, source) == file
    assert file.stat().st_mtime_ns == made_at
    assert _made(settings_for("length"), source) != file
    assert _made(config, Sequences(folder, "train", 2 * LENGTH)) != file
    whole = file.read_bytes()
    for damaged in (whole[:-4], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b""):
        file.write_bytes(damaged)
        assert _made(config, source) == file
        assert _read(file)[1] == digest
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_hold_it_is_named(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"tokenizer_json": b"{}", "vocab_size": 20, "eos_id": EOS, "source": "x", "skipped": []}
    write_shards(tmp_path / "shards", documents(0), documents(1), **whole)
    (tmp_path / "shards" / "difficulty").write_text("in the way")
    with pytest.raises(UserError, match=r"curriculum\.difficulty: cannot write .*shards/difficulty"):
        _made(settings_for("rarity"), Sequences(tmp_path / "shards", "train", LENGTH))


@pytest.mark.parametrize("mode", ["threshold", "order"])
def test_ranks_share_one_order_and_a_position_finds_it_again(folder: Path, mode: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_shards(
        other, documents(2), documents(1), tokenizer_json=b"{}", vocab_size=20, eos_id=EOS, source="x", skipped=[]
    )
    sources = [Source(folder, 2.0), Source(other, 1.0)]

    def loader(rank: int, world_size: int, start: float = 0.2) -> TokenLoader:
        orders = []
        for number, source in enumerate(sources):
            rows, digest = _read(_made(settings_for("rarity"), Sequences(source.folder, "train", LENGTH)))
            same: dict[str, Any] = {"horizon": 90, "seed": 0, "stream": number, "identity": f"{mode} {start} {digest}"}
            orders.append(EasyFirst(rows, mode=mode, start=start, **same))
        shared: dict[str, Any] = {"max_length": LENGTH, "batch_size": 6, "seed": 0, "orders": orders}
        return TokenLoader(sources, rank=rank, world_size=world_size, **shared)

    alone, pair = loader(0, 1), [loader(0, 2), loader(1, 2)]
    batches = []
    for _ in range(40):
        batches.append(alone.next_batch()[0])
        assert torch.equal(batches[-1], torch.cat([each.next_batch()[0] for each in pair]))
    rest = loader(0, 1)
    rest.load_state_dict({**alone.state_dict(), "position": 20 * 6})
    for batch in batches[20:]:
        assert torch.equal(rest.next_batch()[0], batch)
    with pytest.raises(UserError, match=r"curriculum\.difficulty was .*0\.2.*, is .*0\.5.*; set it back"):
        loader(0, 1, start=0.5).load_state_dict(alone.state_dict())
    old = {key: value for key, value in alone.state_dict().items() if key != "order"}
    with pytest.raises(UserError, match=r"curriculum\.difficulty was a shuffle, is "):
        loader(0, 1).load_state_dict(old)


def test_real_text_has_short_and_common_first(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "c.yaml", write_corpus(tmp_path / "text")))
    shards = prepare(config.data.data_dir, config.data.cache_dir, vocab_size=config.model.vocab_size)
    config = load_config(tmp_path / "c.yaml", ["curriculum.difficulty.measure=rarity"])
    source = Sequences(shards, "train", config.data.max_length)
    rows, _ = _read(_made(config, source))
    values = scores(config, source)[rows]
    assert (np.diff(values) >= 0).all()
    assert values[-1] > values[0]
