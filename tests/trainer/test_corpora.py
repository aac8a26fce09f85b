"""Corpora: the same documents everywhere, and downloads that survive a bad network."""

import hashlib
import http.server
import itertools
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import corpora
from corpora import Source, download, hold_out, pieces
from rows import DataError

CONTENT = bytes(range(256)) * 20_000  # 5 MB


# --- a server with a bad day ----------------------------------------------------------------------


@dataclass
class Hub:
    """A real HTTP server. `plan` says what happens to each request in turn, then all goes well."""

    files: dict[str, bytes]
    plan: list[str] = field(default_factory=list)
    states: str = "sha256"  # in X-Linked-ETag: the file's sha256, or a wrong one, or nothing
    resumes: bool = True
    asked: list[str] = field(default_factory=list)  # path and range of every request
    url: str = ""

    def etag(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        return {"sha256": digest, "wrong": digest[::-1], "nothing": "not-a-hash"}[self.states]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub: Hub = self.server.hub
        wanted = self.headers.get("Range", "")
        act = hub.plan.pop(0) if hub.plan else "well"
        if self.path.startswith("/datasets"):  # as the hub does: the hash, and elsewhere the bytes
            content = hub.files.get(self.path.rpartition("/")[2])
            if content is None:
                return self.send_error(404)
            self.send_response(302)
            self.send_header("X-Linked-ETag", f'"{hub.etag(content)}"')
            self.send_header("Location", f"/cdn/{self.path.rpartition('/')[2]}")
            self.send_header("Content-Length", "0")
            hub.plan.insert(0, act)
            return self.end_headers()
        hub.asked.append(f"{self.path} {wanted}".strip())
        if act.isdigit():
            return self.send_error(int(act))
        content = hub.files[self.path.rpartition("/")[2]]
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and hub.resumes else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if act.startswith("drop"):  # after so many bytes, without a goodbye
            self.wfile.write(content[start : start + int(act[4:])])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub({"file": CONTENT}, url=f"http://127.0.0.1:{server.server_port}/datasets")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(hub: Hub, folder: Path) -> bytes:
    target = folder / "file.parquet"
    download(f"{hub.url}/x/file", target, "file", pause=0.001)
    assert [path.name for path in folder.iterdir()] == ["file.parquet"]
    return target.read_bytes()


def test_a_dropped_connection_is_resumed_where_it_broke(hub, tmp_path, capfd):
    hub.plan = ["drop1000000", "drop2000000"]
    assert fetched(hub, tmp_path) == CONTENT
    assert hub.asked == ["/cdn/file", "/cdn/file bytes=1000000-", "/cdn/file bytes=3000000-"]
    assert "broke off at 1,000,000 of 5,120,000 bytes" in capfd.readouterr().err


def test_a_later_call_goes_on_from_the_part_of_an_earlier_one(hub, tmp_path):
    (tmp_path / "file.parquet.part").write_bytes(CONTENT[:4_000_000])
    assert fetched(hub, tmp_path) == CONTENT
    assert hub.asked == ["/cdn/file bytes=4000000-"]


def test_a_server_that_cannot_resume_starts_again(hub, tmp_path):
    hub.resumes = False
    hub.plan = ["drop1000000"]
    assert fetched(hub, tmp_path) == CONTENT


@pytest.mark.parametrize("trouble", ["503", "429", "500", "drop0"])
def test_passing_trouble_is_tried_again(hub, tmp_path, trouble):
    hub.plan = [trouble] * 3
    assert fetched(hub, tmp_path) == CONTENT


def test_many_drops_are_borne_as_long_as_bytes_come(hub, tmp_path):
    hub.plan = ["drop100000"] * 30
    assert fetched(hub, tmp_path) == CONTENT


def test_trouble_without_end_ends_and_keeps_what_came(hub, tmp_path):
    hub.plan = ["drop1000000"] + ["503"] * 50
    with pytest.raises(DataError, match=r"503.* 1,000,000 bytes are kept in .*\.part"):
        fetched(hub, tmp_path)
    hub.plan = []
    assert fetched(hub, tmp_path) == CONTENT


def test_what_is_not_there_is_not_asked_for_again(hub, tmp_path):
    with pytest.raises(DataError, match="404"):
        download(f"{hub.url}/x/nothing", tmp_path / "n", "n", pause=0.001)


def test_nobody_at_the_address_is_said(tmp_path):
    with pytest.raises(DataError, match="could not be downloaded"):
        download("http://127.0.0.1:1/x", tmp_path / "n", "n", pause=0.001)


def test_a_wrong_sha256_is_never_published(hub, tmp_path):
    hub.states = "wrong"
    with pytest.raises(DataError, match=r"what came has sha256 .* the hub says"):
        fetched(hub, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_thrown_away_and_fetched_whole(hub, tmp_path):
    (tmp_path / "file.parquet.part").write_bytes(b"x" * 4_000_000)
    assert fetched(hub, tmp_path) == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(hub, tmp_path):
    (tmp_path / "file.parquet.part").write_bytes(CONTENT * 2)
    assert fetched(hub, tmp_path) == CONTENT


def test_without_a_stated_hash_the_length_is_checked(hub, tmp_path):
    hub.states = "nothing"
    hub.plan = ["drop77"]
    assert fetched(hub, tmp_path) == CONTENT


# --- corpora that are downloaded ------------------------------------------------------------------


def parquet(texts: list[str], **how) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, **how)
    return sink.getvalue().to_pybytes()


def test_climbmix_takes_its_first_shards_and_the_last_for_validation(hub, tmp_path):
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    hub.files = {name: parquet([name]) for name in names}
    source = Source("climbmix", shards=2, base_url=hub.url)
    assert all(
        url.startswith(f"{hub.url}/karpathy/climbmix-400b-shuffle/resolve/main/shard_0")
        for url in source.downloads().values()
    )
    with pytest.raises(DataError, match=r"3 files .*--download-only"):
        corpora.fetch(source, tmp_path, offline=True)
    corpora.fetch(source, tmp_path)
    corpora.fetch(source, tmp_path, offline=True)
    assert corpora.shards(source, tmp_path, piece=100) == {
        "train": [f"shards/{name}" for name in names[:2]],
        "val": [f"shards/{names[2]}"],
    }
    assert len(hub.asked) == 3


def test_tinystories_keeps_its_test_rows_out(hub, tmp_path):
    stories = [f"story {i}" for i in range(23_000)]
    hub.files = {"tinystories_gpt4_clean.parquet": parquet(stories, row_group_size=1000)}
    source = Source("tinystories", base_url=hub.url)
    corpora.fetch(source, tmp_path)
    shards = corpora.shards(source, tmp_path, piece=100)
    assert documents(tmp_path, shards["val"]) == stories[10_000:20_000]
    assert documents(tmp_path, shards["train"]) == stories[20_000:]


def documents(folder: Path, names: list[str]) -> list[str]:
    return list(itertools.chain.from_iterable(corpora.batches(folder / n for n in names)))


def test_a_corpus_nobody_knows_is_refused():
    with pytest.raises(DataError, match="no corpus 'wikipedia': stdlib, climbmix"):
        Source("wikipedia")
    with pytest.raises(DataError, match="1 to 6542 training shards, not 0"):
        Source("climbmix", shards=0)


def test_batches_are_128_and_the_rest_of_each_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet([str(i) for i in range(700)], row_group_size=300))
    sizes = [len(batch) for batch in corpora.batches([path])]
    assert sizes == [128, 128, 44, 128, 128, 44, 100]


# --- text of one's own ----------------------------------------------------------------------------


@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 40))
def test_pieces_are_short_enough_and_lose_only_white_space(text, limit):
    parts = pieces(text, limit)
    assert all(len(part) <= limit for part in parts)
    assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", text)


def test_pieces_end_where_a_section_ends_rather_than_within_a_line():
    text = "def a():\n    pass\n\n\ndef b():\n    return 1\n"
    assert pieces(text, 30) == ["def a():\n    pass\n\n\n", "def b():\n    return 1\n"]
    assert pieces("one two three", 9) == ["one two ", "three"]
    assert pieces("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_whole_files_are_held_out():
    units = [[f"{i}-{k}" for k in range(5)] for i in range(100)]
    parts = hold_out(units)
    files = {split: {text.partition("-")[0] for text in parts[split]} for split in parts}
    assert not files["train"] & files["val"]
    assert len(parts["train"]) + len(parts["val"]) == 500
    assert 25 <= len(parts["val"]) <= 45


def test_of_few_files_documents_are_held_out():
    parts = hold_out([["one", "two", "three"]])
    assert len(parts["val"]) == 1
    assert len(parts["train"]) == 2
    with pytest.raises(DataError, match="two documents"):
        hold_out([["alone"]])


def test_the_order_of_the_files_does_not_matter():
    units = [[f"{i} {k}" for k in range(3)] for i in range(50)]
    assert hold_out(units) == hold_out(units[::-1])


def test_a_folder_gives_its_text_and_leaves_out_what_is_none(tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/note.md").write_text("# A note\n")
    (tmp_path / "umlaut.txt").write_text("Grüße", encoding="utf-8")
    (tmp_path / "more.parquet").write_bytes(parquet(["from parquet", "x" * 500]))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "empty.txt").write_text("")
    source = Source(f"dir:{tmp_path}")
    shards = corpora.shards(source, tmp_path / ".data", piece=100)
    texts = documents(tmp_path / ".data", shards["train"] + shards["val"])
    assert sorted(texts) == sorted(["# A note\n", "Grüße", "from parquet", "x" * 500])
    assert "2 files were not" in capsys.readouterr().err


def test_parquet_without_a_text_column_is_refused_by_name(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "wrong.parquet")
    with pytest.raises(DataError, match=r'wrong\.parquet has no column "text"; it has body'):
        corpora.shards(Source(f"dir:{tmp_path}"), tmp_path / "out", piece=100)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        corpora.shards(Source(f"dir:{tmp_path}/nowhere"), tmp_path / "out", piece=100)


def test_the_standard_library_is_the_same_each_time_without_its_tests(tmp_path):
    made = [corpora.shards(Source("stdlib"), tmp_path / name, piece=768) for name in "ab"]
    assert made[0] == made[1]
    for name in made[0]["train"] + made[0]["val"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    texts = {split: documents(tmp_path / "a", made[0][split]) for split in made[0]}
    characters = {split: sum(map(len, texts[split])) for split in texts}
    assert characters["train"] > 5_000_000
    assert characters["val"] > 300_000
    assert max(map(len, texts["train"])) <= 768
