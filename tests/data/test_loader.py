"""Packing, order, sharding over ranks and resuming, against plain slices of the concatenated tokens."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ava_fast.data.loader import TokenLoader, heldout_sequences
from ava_fast.data.order import Shuffle
from ava_fast.data.shards import Piece, TokenStream, write_shards
from ava_fast.errors import UserError

EOS = 65_535  # the largest uint16: signed arithmetic anywhere would show


@contextmanager
def shards(
    documents: list[list[int]], shard_tokens: int = 10, vocab_size: int = 65_536, eos_id: int = EOS
) -> Iterator[Path]:
    """Both splits hold `documents`."""
    with tempfile.TemporaryDirectory() as parent:
        pieces = [Piece(document, len(document), True) for document in documents]
        write_shards(
            Path(parent) / "s",
            pieces,
            pieces,
            tokenizer_json=b"{}",
            vocab_size=vocab_size,
            eos_id=eos_id,
            source="a test",
            skipped=[],
            shard_tokens=shard_tokens,
        )
        yield Path(parent) / "s"


def concatenated(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in [*document, EOS]]


def global_batches(folder: Path, world_size: int, count: int, start: int = 0, **settings: int) -> list[list[list[int]]]:
    """Batches of all ranks, put together: per batch, its rows of S + 1 tokens."""
    loaders = [TokenLoader(folder, **settings, rank=rank, world_size=world_size) for rank in range(world_size)]  # type: ignore[arg-type]
    batches = []
    for _ in range(start):
        for loader in loaders:
            loader.next_batch()
    for _ in range(count):
        rows = []
        for loader in loaders:
            tokens_BS, labels_BS = loader.next_batch()
            assert tokens_BS.dtype == labels_BS.dtype == torch.int64
            assert tokens_BS.shape == labels_BS.shape == (settings["batch_size"] // world_size, settings["max_length"])
            assert torch.equal(tokens_BS[:, 1:], labels_BS[:, :-1])
            rows += torch.cat([tokens_BS, labels_BS[:, -1:]], 1).tolist()
        batches.append(rows)
    return batches


documents = st.lists(st.integers(0, 20), min_size=1, max_size=5).map(
    # Every token is unique, so that a row says which sequence it is.
    lambda lengths: [list(range(100 * number, 100 * number + length)) for number, length in enumerate(lengths)]
)


@settings(max_examples=40, deadline=None)
@given(
    documents, st.integers(1, 12), st.integers(5, 30), st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(0, 9)
)
def test_every_token_of_an_epoch_exactly_once(
    texts: list[list[int]], max_length: int, shard_tokens: int, world_size: int, rows: int, seed: int
) -> None:
    stream = concatenated(texts)
    sequences = [stream[i : i + max_length + 1] for i in range(0, len(stream) - max_length, max_length)]
    if not sequences:
        return
    with shards(texts, shard_tokens) as folder:
        batch_size = rows * world_size
        settings = {"max_length": max_length, "batch_size": batch_size, "seed": seed}
        batches = global_batches(folder, world_size, -(-3 * len(sequences) // batch_size), **settings)
        seen = [row for batch in batches for row in batch]
        for epoch in range(3):
            visited = seen[epoch * len(sequences) : (epoch + 1) * len(sequences)]
            assert sorted(visited) == sorted(sequences)
            order = Shuffle(len(sequences), seed=seed).at(np.arange(len(sequences)) + epoch * len(sequences))
            assert visited == [sequences[index] for index in order]


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 30))
def test_global_batches_do_not_depend_on_the_world_size_and_resume_exactly(
    length: int, max_length: int, seed: int, batches_before: int
) -> None:
    with shards([list(range(length))]) as folder:
        order = {"max_length": max_length, "batch_size": 4, "seed": seed}
        reference = global_batches(folder, 1, batches_before + 5, **order)
        for world_size in (2, 4):
            assert global_batches(folder, world_size, batches_before + 5, **order) == reference
        loader = TokenLoader(folder, **order)  # type: ignore[arg-type]
        for _ in range(batches_before):
            loader.next_batch()
        state = loader.state_dict()
        for world_size in (1, 2):
            rows = []
            for rank in range(world_size):
                resumed = TokenLoader(folder, **order, rank=rank, world_size=world_size)  # type: ignore[arg-type]
                resumed.load_state_dict(state)
                assert resumed.position == 4 * batches_before
                tokens_BS, labels_BS = resumed.next_batch()
                rows += torch.cat([tokens_BS, labels_BS[:, -1:]], 1).tolist()
            assert rows == reference[batches_before]
        loader.load_state_dict({**state, "position": 0})  # back again: no state but the position
        tokens_BS, _ = loader.next_batch()
        assert tokens_BS.tolist() == [row[:-1] for row in reference[0]]


def test_a_resumed_run_may_have_another_batch_size() -> None:
    with shards([list(range(60))]) as folder:
        small = TokenLoader(folder, max_length=4, batch_size=2, seed=3)
        large = TokenLoader(folder, max_length=4, batch_size=4, seed=3)
        large.next_batch()
        small.load_state_dict(large.state_dict())
        expected, _ = large.next_batch()
        assert torch.equal(torch.cat([small.next_batch()[0], small.next_batch()[0]]), expected)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    with shards([list(range(200))]) as folder:
        first, second = global_batches(folder, 1, 2, max_length=2, batch_size=100, seed=0)
        (other,) = global_batches(folder, 1, 1, max_length=2, batch_size=100, seed=1)
        assert sorted(first) == sorted(second) == sorted(other)
        assert first != second
        assert first != other
        loader = TokenLoader(folder, max_length=2, batch_size=50, seed=0)
        loader.next_batch()
        assert (loader.sequences_per_epoch, loader.position, loader.epoch) == (100, 50, 0.5)


def test_a_position_in_other_data_is_refused() -> None:
    with shards([list(range(60))]) as folder, shards([list(range(1, 61))]) as other:
        state = TokenLoader(folder, max_length=4, batch_size=2, seed=3).state_dict()
        changed = TokenLoader(other, max_length=5, batch_size=2, seed=4)
        with pytest.raises(
            UserError,
            match=r"training\.seed was 3, is 4; data\.max_length was 4, is 5; the tokens in .* \(data\.data_dir\) are",
        ):
            changed.load_state_dict(state)
        assert changed.position == 0
        moved = TokenLoader(folder, max_length=4, batch_size=2, seed=4)
        with pytest.raises(UserError, match=r"place in the data: training\.seed was 3, is 4; set it back"):
            moved.load_state_dict(state)


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with (
        shards([list(range(60))]) as folder,
        pytest.raises(UserError, match=r"training\.batch_size: 3 cannot be shared out over 2 ranks; give a multiple"),
    ):
        TokenLoader(folder, max_length=4, batch_size=3, seed=3, world_size=2)


def test_a_sequence_longer_than_the_split_is_refused() -> None:
    with shards([list(range(9))]) as folder:
        assert len(heldout_sequences(folder, max_length=9)) == 1
        with pytest.raises(
            UserError, match=r"^data\.max_length: 10 needs 11 tokens, but the train split in .* has 10; give a smaller"
        ):
            TokenLoader(folder, max_length=10, batch_size=1, seed=0)
        with pytest.raises(UserError, match=r"the validation split in .* has 10"):
            heldout_sequences(folder, max_length=10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("limit", "chosen"), [(None, range(6)), (6, range(6)), (99, range(6)), (3, [0, 2, 4]), (1, [0])]
)
def test_heldout_sequences_are_fixed_spread_and_shared_out(
    limit: int | None, chosen: list[int], world_size: int
) -> None:
    text = list(range(24))
    with shards([text]) as folder:
        shares = [
            heldout_sequences(folder, max_length=4, limit=limit, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
    stream = concatenated([text])
    assert np.concatenate(shares).tolist() == [stream[4 * i : 4 * i + 5] for i in chosen]
    assert {share.shape[1] for share in shares} == {5}
    assert {share.dtype for share in shares} == {np.dtype(np.int64)}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_pass_over_what_is_to_be_avoided_whether_it_is_known_before_or_after_a_resume() -> None:
    documents = [[number] * 9 for number in range(20)]
    arguments = {"max_length": 4, "batch_size": 4, "seed": 3}
    with shards(documents) as folder:
        plain = global_batches(folder, 2, 12, **arguments)
        for avoid, kept in (
            ([(8, 16)], [0, 1, 4, 5, 6]),
            ([(20, 24), (8, 12), (12, 20)], [0, 1, 6, 7]),
            ([(9, 15)], [0, 1]),  # not at batches' edges: the batches that they touch are not seen whole
        ):
            loaders = [TokenLoader(folder, **arguments, rank=rank, world_size=2) for rank in range(2)]  # type: ignore[arg-type]
            seen = []
            for place in range(len(kept)):
                resumed = [TokenLoader(folder, **arguments, rank=rank, world_size=2) for rank in range(2)]  # type: ignore[arg-type]
                for loader, other in zip(loaders, resumed, strict=True):
                    loader.avoid = list(avoid) if place == 0 else loader.avoid
                    other.load_state_dict(loader.state_dict())
                loaders = resumed
                seen.append([row for loader in loaders for row in loader.next_batch()[0].tolist()])
            assert seen == [[row[:-1] for row in plain[number]] for number in kept]
            assert loaders[0].position == loaders[1].position
        assert loaders[0].next_batch()[0].shape == (2, 4)
        assert loaders[0].position == 15 + 4


def test_documents_of_a_batch_are_those_whose_tokens_it_holds() -> None:
    documents = [[number] * (1 + number % 7) for number in range(30)]
    with shards(documents) as folder:
        loader = TokenLoader(folder, max_length=5, batch_size=2, seed=1)
        numbers = [number for number, document in enumerate(documents) for _ in [*document, EOS]]
        for _ in range(20):
            position = loader.position
            expected = {n for _, index in loader.batches.share(position) for n in numbers[5 * index : 5 * index + 6]}
            assert loader.documents(position) == sorted(expected)
            loader.next_batch()


def test_document_offsets_are_where_documents_and_rows_begin() -> None:
    documents = [[number] * (number % 7) for number in range(30)]  # some empty: an end of text alone
    with shards(documents) as folder:
        loader = TokenLoader(folder, max_length=9, batch_size=4, seed=1, document_attention=True)
        for _ in range(6):
            tokens_BS, labels_BS, cu_seqlens = loader.next_batch()
            assert cu_seqlens.dtype == torch.int32
            flat = tokens_BS.flatten().tolist()
            begins = [place for place in range(36) if place % 9 == 0 or flat[place - 1] == EOS]
            assert cu_seqlens.tolist() == [*begins, 36]
            assert torch.equal(tokens_BS[:, 1:], labels_BS[:, :-1])


def test_reading_ahead_changes_no_batch_wherever_the_position_goes() -> None:
    with shards([[number] * 9 for number in range(40)]) as folder:
        plain, ahead = (TokenLoader(folder, max_length=4, batch_size=4, seed=2, prefetch=depth) for depth in (0, 3))
        for jump in (0, 0, 0, 8, 0, -4, 0, 12, 0, 0, -20, 0):
            for loader in (plain, ahead):
                loader.position += jump
            before = ahead.position
            assert all(map(torch.equal, ahead.next_batch(), plain.next_batch()))
            assert ahead.position == plain.position == before + 4  # the consumer's, not the reader's
        for loader in (plain, ahead):
            loader.avoid = [(loader.position, loader.position + 6)]
        assert all(map(torch.equal, ahead.next_batch(), plain.next_batch()))
        assert ahead.state_dict() == plain.state_dict()
        ahead.close()
        assert all(map(torch.equal, ahead.next_batch(), plain.next_batch()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_batches_that_were_read_ahead_are_page_locked() -> None:
    with shards([[number] * 9 for number in range(40)]) as folder:
        loader = TokenLoader(folder, max_length=4, batch_size=4, seed=2, document_attention=True, prefetch=2)
        assert all(tensor.is_pinned() for _ in range(3) for tensor in loader.next_batch())


@pytest.mark.parametrize(("cuda", "prefetch", "pinned"), [(True, 2, 3), (True, 0, 0), (False, 2, 0)])
def test_each_tensor_is_asked_to_be_page_locked_by_the_thread_that_reads_ahead(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, prefetch: int, pinned: int
) -> None:
    asked: list[str] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(threading.current_thread().name)
        return tensor.clone()

    devices: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: devices.append((threading.current_thread().name, n)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with shards([[number] * 9 for number in range(40)]) as folder:
        loader = TokenLoader(folder, max_length=4, batch_size=4, seed=2, document_attention=True, prefetch=prefetch)
        plain = TokenLoader(folder, max_length=4, batch_size=4, seed=2, document_attention=True)
        assert all(map(torch.equal, loader.next_batch(), plain.next_batch()))
        loader.close()
    assert len(asked) >= pinned
    assert len(asked) % 3 == 0, "tokens, targets and offsets"
    assert bool(asked) == bool(pinned)
    assert all(name.startswith("batches") for name in asked)
    assert devices == ([(asked[0], 5)] if pinned else []), "on the rank's own device"


def test_the_reading_thread_ends_with_its_loader() -> None:
    def threads() -> list[threading.Thread]:
        started = [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
        return [thread for thread in started if thread not in others]

    others: list[threading.Thread] = []
    others = threads()  # of earlier tests' loaders, which nobody has collected yet
    with shards([[number] * 9 for number in range(40)]) as folder:
        closed, dropped = (TokenLoader(folder, max_length=4, batch_size=4, seed=2, prefetch=3) for _ in range(2))
        for loader in (closed, dropped):
            loader.next_batch()
        (first, second) = threads()
        closed.close()
        assert threads() == [second]
        del dropped, loader
        second.join(60)
        assert not first.is_alive()
        assert not second.is_alive()


def damage(folder: Path, kind: str) -> None:
    """What happens to the shard that holds tokens 40 to 59, in bytes 0 to 39, while it is open."""
    file = folder / "train" / "00002.bin"
    match kind:
        case "flipped":
            with file.open("r+b") as opened:
                opened.seek(14)
                opened.write(np.array([998], "<u2").tobytes())  # a possible token
        case "cut":
            os.truncate(file, 20)
        case "removed":
            file.unlink()
        case "replaced":
            (folder / "new").write_bytes(b"")
            (folder / "new").replace(file)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("flipped", r"00002\.bin or the checks\.bin beside it is damaged: bytes 0 to 40 are not what was written"),
        ("cut", r"00002\.bin has been cut to 20 of 40 bytes since this run opened it; prepare the data again"),
        ("removed", None),
        ("replaced", None),
    ],
)
def test_a_file_that_changes_under_way_costs_the_batches_that_need_it_and_no_more(
    kind: str, says: str | None, prefetch: int
) -> None:
    with shards([[number] * 9 for number in range(14)], shard_tokens=20, vocab_size=1000, eos_id=999) as folder:
        arguments = {"max_length": 4, "batch_size": 1, "seed": 0, "prefetch": prefetch}
        expected = [batch[0] for batch in global_batches(folder, 1, 34, max_length=4, batch_size=1, seed=0)]
        loader = TokenLoader(folder, **arguments)  # type: ignore[arg-type]
        damage(folder, kind)
        needs = set(range(9, 15)) if kind in ("flipped", "cut") else set()  # sequence i is tokens 4i to 4i + 4
        failed = {}
        for place in range(34):
            (_, index), *_ = loader.batches.share(place)
            try:
                tokens_BS, labels_BS = loader.next_batch()
                assert [[*tokens_BS[0].tolist(), int(labels_BS[0, -1])]] == [expected[place]]
            except UserError as error:
                failed[index] = str(error)
            assert loader.position == place + 1
        assert failed.keys() == needs
        assert all(re.search(str(says), message) for message in failed.values())
        loader.close()


def test_a_place_is_found_at_once_wherever_it_is() -> None:
    with shards([list(range(139))]) as folder:
        first, far = (TokenLoader(folder, max_length=4, batch_size=2, seed=0) for _ in range(2))
        epoch = first.sequences_per_epoch
        far.load_state_dict({**first.state_dict(), "position": epoch * 10**12})
        rows = [tuple(row) for _ in range(epoch // 2) for row in far.next_batch()[0].tolist()]
        again = [tuple(row) for _ in range(epoch // 2) for row in first.next_batch()[0].tolist()]
        assert len(set(rows)) == len(rows)
        assert rows != again
        assert far.epoch == 10**12 + len(rows) / epoch


def test_a_position_of_a_release_with_another_order_is_refused() -> None:
    with shards([list(range(60))]) as folder:
        loader = TokenLoader(folder, max_length=4, batch_size=2, seed=3)
        state = loader.state_dict()
        del state["order_version"]
        with pytest.raises(UserError, match="it counts in order 1, this release in order 2; go on with the release"):
            loader.load_state_dict(state)


def test_a_batch_that_cannot_be_read_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with shards([[number] * 9 for number in range(20)]) as folder:
        plain, damaged = (TokenLoader(folder, max_length=4, batch_size=2, seed=0) for _ in range(2))
        expected = [plain.next_batch()[0] for _ in range(3)]
        with monkeypatch.context() as patched:
            patched.setattr(TokenStream, "read_rows", lambda *_: damaged_file())
            with pytest.raises(UserError, match="damaged"):
                damaged.next_batch()
        assert torch.equal(damaged.next_batch()[0], expected[1])
        assert torch.equal(damaged.next_batch()[0], expected[2])


def damaged_file() -> None:
    raise UserError("0.bin is damaged")
