"""The row stream: upstream's to the token, in a seed's order, and never from damaged files."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import described
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import listing

import rows
from corpora import Source
from prepare import Scale, Tokenizer, prepare

SMALL = Scale("cpu", 256, 512, 2**14, 2**11, "tokens", 2**16, startup_free_s=60)
BATCHES, B = 60, 4


def prepared(folder: Path, texts: list[str]) -> Path:
    """A data folder of these documents, by way of Parquet, which leaves them whole."""
    (folder / "texts").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "texts/all.parquet")
    prepare(Source(f"dir:{folder / 'texts'}"), SMALL, folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stdlib") / "data"
    prepare(Source("stdlib"), SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def long(stdlib, tmp_path_factory) -> Path:
    texts = [text for batch in rows_of_shards(stdlib) for text in batch]
    joined = [
        "".join(texts[i : i + n]) for i, n in zip(range(0, 4000, 40), itertools.cycle((9, 40)))
    ]
    return prepared(tmp_path_factory.mktemp("long"), joined)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("tiny"), [chr(97 + i % 26) for i in range(1000)])


def rows_of_shards(folder: Path):
    from corpora import batches

    return batches(folder / name for name in rows.read_manifest(folder)["shards"]["train"])


def served(folder: Path, T: int, batches: int = BATCHES) -> tuple[str, list[int]]:
    stream = rows.RowStream(folder, "train", T)
    digest, epochs, position = hashlib.sha256(), [], 0
    for _ in range(batches):
        batch, epoch, position = stream.take(B, position)
        digest.update(batch.astype("<i8").tobytes())
        epochs.append(epoch)
    return digest.hexdigest(), epochs


def expected(folder: Path, T: int, batches: int = BATCHES) -> tuple[str, list[int]]:
    shards = [folder / name for name in rows.read_manifest(folder)["shards"]["train"]]
    digest, epochs = hashlib.sha256(), []
    source = described.batches(shards, Tokenizer.from_directory(folder), B, T)
    for x, y, epoch in itertools.islice(source, batches):
        digest.update(np.concatenate([x, y[:, -1:]], axis=1).astype("<i8").tobytes())
        epochs.append(epoch)
    return digest.hexdigest(), epochs


@pytest.mark.parametrize("T", [256, 64])
@pytest.mark.parametrize("corpus", ["stdlib", "long", "tiny"])
def test_sixty_batches_are_those_of_the_described_loader(corpus, T, request):
    folder = request.getfixturevalue(corpus)
    assert served(folder, T) == expected(folder, T)


def test_the_long_documents_are_long_and_the_tiny_ones_one_token(long, tiny):
    def lengths(folder):
        return np.diff(rows.arena(folder, "train")[1]) - 1  # without BOS

    assert lengths(long).min() > 8 * SMALL.max_seq_len
    assert set(lengths(tiny)) == {1}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    groups=st.lists(st.integers(1, 30), max_size=5),
    T=st.integers(1, 50),
    least=st.integers(1, 60),
)
def test_bisection_packs_like_the_plain_search(lengths, groups, T, least):
    ends = sorted({min(end, len(lengths)) for end in itertools.accumulate(groups)} | {len(lengths)})
    documents = [[i * 100 + k for k in range(n)] for i, n in enumerate(lengths)]
    refills = (
        (documents[start:end], epoch)
        for epoch in itertools.count(1)
        for start, end in itertools.pairwise([0, *ends])
    )
    plain = itertools.islice(described.rows(refills, list, T, least), 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUFFER", least)
        packed = itertools.islice(rows.pack(np.array(lengths), np.array(ends), T), 40)
        ours = [
            ([t for d, n in zip(docs, taken, strict=True) for t in documents[d][:n]], epoch)
            for docs, taken, epoch in packed
        ]
    assert ours == list(plain)


def test_the_stream_does_not_depend_on_how_many_rows_are_taken_at_a_time(stdlib):
    stream = rows.RowStream(stdlib, "train", 256, seed=5)
    start = stream.rows - 40  # across the end of a pass
    whole, epoch, end = stream.take(96, start)
    parts, position = [], start
    for n in (1, 2, 3, 30, 60):
        part, last, position = stream.take(n, position)
        parts.append(part)
    assert np.array_equal(np.concatenate(parts), whole)
    assert (last, position) == (epoch, end)


def test_a_seed_serves_every_row_once_a_pass_in_an_order_of_its_own(stdlib):
    packed = rows.RowStream(stdlib, "train", 256)
    plain = packed.take(packed.rows, 0)[0]
    passes = []
    for seed, number in ((1, 0), (1, 1), (2, 0)):
        stream = rows.RowStream(stdlib, "train", 256, seed)
        passes.append(stream.take(stream.rows, number * stream.rows)[0])
    for one, other in itertools.combinations([plain, *passes], 2):
        assert not np.array_equal(one, other)
    assert all(multiset(one) == multiset(plain) for one in passes)


def multiset(batch: np.ndarray) -> list[bytes]:
    return sorted(row.tobytes() for row in batch)


def test_seed_zero_repeats_the_described_stream(tiny):
    stream = rows.RowStream(tiny, "train", 256)
    first = stream.take(10, 0)
    again = stream.take(10, stream.rows)
    assert np.array_equal(first[0], again[0])
    assert again[1] > first[1]


def test_the_order_of_a_seed_is_stable_for_ever():
    assert rows.block_order(1, 0, 8) == [3, 7, 5, 4, 0, 1, 6, 2]
    assert rows.block_order(1, 1, 8) == [6, 3, 0, 2, 1, 7, 5, 4]
    assert rows.block_order(0, 7, 4) == [0, 1, 2, 3]


def test_epochs_never_fall_and_go_on_when_the_rows_repeat(stdlib):
    stream = rows.RowStream(stdlib, "train", 256, seed=3)
    epochs = [stream.epoch(p) for p in range(0, 3 * stream.rows, stream.rows // 50)]
    assert epochs == sorted(epochs)
    assert epochs[0] == 1
    assert stream.epoch(2 * stream.rows - 1) > stream.epoch(stream.rows - 1)


def test_another_T_goes_on_at_the_same_fraction_of_the_stream(stdlib):
    long_rows = rows.RowStream(stdlib, "train", 256, seed=1)
    short_rows = rows.RowStream(stdlib, "train", 64, seed=1)
    for position in (0, 1, 1000, long_rows.rows, 3 * long_rows.rows + 17):
        there = short_rows.follow(long_rows, position)
        assert 0 <= there / short_rows.rows - position / long_rows.rows < 1 / short_rows.rows


def test_a_T_that_was_not_prepared_is_served_from_memory(stdlib):
    before = listing(stdlib)
    batch, _, _ = rows.RowStream(stdlib, "train", 31).take(7, 3)
    assert listing(stdlib) == before
    packed = np.concatenate([block for block, _ in rows.packed_rows(stdlib, "train", 31, 10)])
    assert np.array_equal(batch, packed[3:])


def test_half_and_a_quarter_are_prepared_also_in_a_folder_from_before(copy):
    names = [f"rows-train-{T}{suffix}" for T in (64, 128) for suffix in (".u16", ".json")]
    before = {name: (copy / name).read_bytes() for name in names}
    manifest = rows.read_manifest(copy)
    old = {name: fact for name, fact in manifest["files"].items() if name not in names}
    rows.write_json(copy / "manifest.json", manifest | {"files": old})
    identity = rows.manifest_sha256(copy)
    arena = (copy / "train.u16").stat().st_mtime_ns
    for name in names:
        (copy / name).unlink()
    prepare(Source("stdlib"), SMALL, copy)
    assert {name: (copy / name).read_bytes() for name in names} == before
    assert rows.manifest_sha256(copy) == identity
    assert (copy / "train.u16").stat().st_mtime_ns == arena


@pytest.mark.parametrize("T", [0, 257, -1])
def test_a_T_that_is_not_served_is_refused_with_both_numbers(stdlib, T):
    with pytest.raises(rows.DataError, match=f"T={T} .* from 1 to 256"):
        rows.RowStream(stdlib, "train", T)


def test_an_unknown_split_is_refused(stdlib):
    with pytest.raises(rows.DataError, match="no split 'test'"):
        rows.RowStream(stdlib, "test", 256)


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(stdlib, tmp_path) -> Path:
    return Path(shutil.copytree(stdlib, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["rows-train-256.u16", "train.u16", "tokenizer.json"])
def test_a_file_cut_short_is_noticed_at_opening(copy, name):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size - 2)
    with pytest.raises(rows.DataError, match=rf"{name} has {size - 2:,} bytes, {size:,} bytes"):
        rows.RowStream(copy, "train", 256)


def test_shorter_rows_cut_short_are_noticed_too(copy):
    os.truncate(copy / "rows-train-128.u16", 1000)
    with pytest.raises(rows.DataError, match=r"rows-train-128\.u16 has 1,000 bytes"):
        rows.RowStream(copy, "train", 128)


def test_a_missing_file_is_named(copy):
    (copy / "val.offsets").unlink()
    with pytest.raises(rows.DataError, match=r"val\.offsets is missing"):
        rows.RowStream(copy, "train", 256)


def test_a_file_cut_short_while_in_use_ends_in_an_error_not_a_signal(copy):
    stream = rows.RowStream(copy, "train", 256)
    stream.take(4, 0)
    os.truncate(copy / "rows-train-256.u16", 600)
    with pytest.raises(rows.DataError, match="cut short while in use"):
        stream.take(4, 0)


def test_verify_names_the_changed_file_and_both_hashes(copy):
    rows.verify(copy)
    path = copy / "train.u16"
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    new = hashlib.sha256(content).hexdigest()
    with pytest.raises(rows.DataError, match=rf"train\.u16 has sha256 {new}.* says {old}"):
        rows.verify(copy)


def test_verify_hashes_shorter_rows_as_well(copy):
    with (copy / "rows-train-128.u16").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(rows.DataError, match=r"rows-train-128\.u16 has sha256"):
        rows.verify(copy)


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(rows.DataError, match=r"no manifest\.json.*trainer/prepare\.py"):
        rows.RowStream(tmp_path, "train", 256)


def test_a_manifest_of_another_format_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(rows.DataError, match="format 99, this program reads 1"):
        rows.check(copy)


def test_an_interrupted_arena_leaves_nothing(tmp_path):
    def encode(texts):
        if texts == ["second"]:
            raise KeyboardInterrupt
        return [[1, 2, 3]]

    with pytest.raises(KeyboardInterrupt):
        rows.build_arena(tmp_path, "train", [["first"], ["second"]], encode)
    assert list(tmp_path.iterdir()) == []


def test_token_bytes_are_true_and_upstreams_beside(stdlib):
    true, upstream = rows.token_bytes(stdlib)
    assert list(true[:256]) == [1] * 256
    assert sum(upstream[:256]) == 128 + 3 * 128
    assert list(true[-4:]) == list(upstream[-4:]) == [0] * 4
