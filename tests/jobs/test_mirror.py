"""Notes read as a notebook, and a campaign travels whole between clones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs import mirror, names
from jobs.errors import AutoresearchError, UserError
from jobs.repository import Repository

TRAILERS = {"Campaign": "night", "Branch": "main"}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    folder = tmp_path / "lab"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "Ada")
    git(folder, "config", "user.email", "ada@example.org")
    (folder / "train.py").write_text("x = 1\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


def attempts(repository: Repository, count: int, campaign: str = "night") -> list[str]:
    """Attempts with their refs; the last one heads the branch."""
    start = repository.start("main")
    made = [
        repository.commit(start, {"train.py": f"x = {i}\n"}, f"try {i}", TRAILERS, i)
        for i in range(count)
    ]
    moves = [(names.attempt_ref(campaign, f"e{i:04}"), sha, None) for i, sha in enumerate(made)]
    repository.point_all(moves)
    repository.point(names.branch_ref(campaign, "main"), made[-1])
    return made


def shown(folder: Path, commit: str) -> str:
    return git(folder, "notes", "--ref", "autoresearch", "show", commit)


def test_notes_are_read_by_git_log_and_can_be_replaced(lab: Path) -> None:
    repository = Repository(lab)
    made = attempts(repository, 60)
    for i in range(0, 60, 10):
        mirror.note(repository, {sha: f"note of {sha}\nseed: 1" for sha in made[i : i + 10]})
    mirror.note(repository, {made[7]: "2.1847 -> 2.1623, keep\x1b[2J"})
    mirror.note(repository, {made[7]: "2.1847 -> 2.1623, keep\x1b[2J"})
    assert shown(lab, made[7]) == "2.1847 -> 2.1623, keep [2J\n"
    assert all(shown(lab, sha) == f"note of {sha}\nseed: 1\n" for sha in made[:7])
    log = git(lab, "log", "--notes=autoresearch", "-1", "autoresearch/night/main")
    assert f"note of {made[-1]}" in log
    assert len(git(lab, "notes", "--ref", "autoresearch", "list").splitlines()) == 60
    assert len(git(lab, "log", "--oneline", mirror.NOTES).splitlines()) == 7
    git(lab, "fsck", "--strict")


@pytest.mark.parametrize("fan_out", [False, True])  # git keeps few notes flat, many in folders
def test_a_note_that_a_person_wrote_with_git_is_replaced_not_doubled(
    lab: Path, fan_out: bool
) -> None:
    repository = Repository(lab)
    made = attempts(repository, 3)
    paths = [f"{sha[:2]}/{sha[2:4]}/{sha[4:]}" if fan_out else sha for sha in made]
    tree = repository.objects.replace_files(None, dict.fromkeys(paths, b"by hand\n"))
    repository.point(mirror.NOTES, repository.write_commit(tree, [], "by hand\n"))
    assert shown(lab, made[1]) == "by hand\n"
    mirror.note(repository, {made[1]: "ours"})
    assert [shown(lab, sha) for sha in made] == ["by hand\n", "ours\n", "by hand\n"]
    git(lab, "notes", "--ref", "autoresearch", "add", "-f", "-m", "again", made[1])
    mirror.note(repository, {made[1]: "ours again"})
    assert shown(lab, made[1]) == "ours again\n"
    assert len(git(lab, "notes", "--ref", "autoresearch", "list").splitlines()) == 3


def test_two_writers_of_notes_lose_none(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Repository(lab), Repository(lab)
    made = attempts(one, 3)
    write_commit = one.write_commit

    def interrupted(*arguments: object) -> str:
        monkeypatch.setattr(one, "write_commit", write_commit)
        mirror.note(other, {made[1]: "other"})
        return write_commit(*arguments)

    mirror.note(one, {made[0]: "first"})
    monkeypatch.setattr(one, "write_commit", interrupted)
    mirror.note(one, {made[2]: "one"})
    assert [shown(lab, sha) for sha in made] == ["first\n", "other\n", "one\n"]


def test_records_are_kept_beside_each_other_and_read_back(lab: Path) -> None:
    repository = Repository(lab)
    with pytest.raises(UserError, match="no records of campaign 'night'; it has none"):
        mirror.load_records(repository, "night")
    mirror.save_records(repository, "night", {"campaign.yaml": b"a: 1\n", "x/y": b"\x00\xff"})
    mirror.save_records(repository, "night", {"campaign.yaml": b"a: 2\n"})
    head = repository.start(names.records_ref("night"))
    mirror.save_records(repository, "night", {"campaign.yaml": b"a: 2\n"})
    assert repository.start(names.records_ref("night")) == head
    assert mirror.load_records(repository, "night") == {
        "campaign.yaml": b"a: 2\n",
        "x/y": b"\x00\xff",
    }
    assert git(lab, "show", "refs/autoresearch/night/records:campaign.yaml") == "a: 2\n"


def test_a_ledger_is_kept_in_chunks_as_it_grows(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CHUNK", 1000)
    repository, ledger = Repository(lab), tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"")
    for i in range(40):
        with open(ledger, "ab") as file:
            file.write(b'{"n": %d, "event": "something"}\n' % i * (i % 7))
        mirror.save_ledger(repository, "night", ledger, {"snapshot": b"s"})
        assert mirror.load_ledger(repository, "night") == ledger.read_bytes()
    assert len(mirror.load_records(repository, "night")) == 1 + -(-ledger.stat().st_size // 1000)


@pytest.mark.parametrize("torn", [b'{"n": 1, "ev', b"x" * 150])
def test_a_line_that_a_kill_tore_is_not_kept(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    monkeypatch.setattr(mirror, "CHUNK", 64)
    repository, ledger = Repository(lab), tmp_path / "ledger.jsonl"
    whole = b'{"n": 0, "event": "something that needs more than a chunk"}\n' * 2
    ledger.write_bytes(whole + torn)
    mirror.save_ledger(repository, "night", ledger)
    assert mirror.load_ledger(repository, "night") == whole
    ledger.write_bytes(whole + b'{"n": 1}\n')  # its next writer cut it off and went on
    mirror.save_ledger(repository, "night", ledger)
    assert mirror.load_ledger(repository, "night") == ledger.read_bytes()


def test_two_writers_of_one_ledger_lose_none_of_its_lines(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, ledger = Repository(lab), Repository(lab), tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"{}\n")
    write_commit = one.write_commit

    def interrupted(*arguments: object) -> str:
        monkeypatch.setattr(one, "write_commit", write_commit)
        ledger.write_bytes(b"{}\n{}\n")
        mirror.save_ledger(other, "night", ledger)
        return write_commit(*arguments)

    monkeypatch.setattr(one, "write_commit", interrupted)
    mirror.save_ledger(one, "night", ledger, {"data.json": b"d"})
    assert mirror.load_ledger(one, "night") == ledger.read_bytes()
    assert mirror.load_records(one, "night")["data.json"] == b"d"


def test_a_campaign_pushed_and_fetched_is_the_same_in_another_clone(
    lab: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(lab), "site.git")
    git(lab, "remote", "add", "site", str(tmp_path / "site.git"))
    repository = Repository(lab)
    made = attempts(repository, 12)
    mirror.note(repository, {sha: f"note {sha}" for sha in made})
    mirror.save_records(repository, "night", {"ledger/000000": b"{}\n"})
    mirror.push(repository, "site", "night")
    mirror.push(repository, "site", "night")
    git(tmp_path / "site.git", "gc", "-q", "--prune=now")
    git(tmp_path, "clone", "-q", str(tmp_path / "site.git"), "clone")
    clone = Repository(tmp_path / "clone")
    mirror.fetch(clone, "origin", "night")
    git(clone.root, "gc", "-q", "--prune=now")
    for below in ("refs/autoresearch", "refs/heads/autoresearch", mirror.NOTES):
        assert clone.refs(below) == repository.refs(below)
    assert not clone.refs("refs/autoresearch-incoming")
    assert mirror.load_ledger(clone, "night") == b"{}\n"
    assert shown(clone.root, made[3]) == f"note {made[3]}\n"


def test_fetching_deletes_nothing_and_merges_the_notes_of_both(lab: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(lab), "site.git")
    repository = Repository(lab)
    made = attempts(repository, 3)
    mirror.note(repository, {made[0]: "from the lab", made[1]: "from the lab"})
    mirror.push(repository, str(tmp_path / "site.git"), "night")
    git(tmp_path, "clone", "-q", str(tmp_path / "site.git"), "clone")
    git(tmp_path / "clone", "config", "remote.origin.prune", "true")
    clone = Repository(tmp_path / "clone")
    mirror.note(clone, {made[1]: "from the clone", clone.start(): "from the clone"})
    clone.point(names.attempt_ref("night", "e0100"), clone.start())
    mirror.fetch(clone, "origin", "night")
    assert clone.start("refs/autoresearch/night/e0100")
    said = [shown(clone.root, sha) for sha in (made[0], made[1], clone.start())]
    assert said == ["from the lab\n", "from the clone\n", "from the clone\n"]
    mirror.push(clone, "origin", "night")
    mirror.note(repository, {made[2]: "late"})
    with pytest.raises(AutoresearchError, match=r"has more: autoresearch fetch"):
        mirror.push(repository, str(tmp_path / "site.git"), "night")
    mirror.fetch(repository, str(tmp_path / "site.git"), "night")
    mirror.push(repository, str(tmp_path / "site.git"), "night")


def test_a_clone_that_went_further_stays_and_one_that_went_elsewhere_is_refused(
    lab: Path, tmp_path: Path
) -> None:
    site = str(tmp_path / "site.git")
    git(tmp_path, "clone", "-q", "--bare", str(lab), "site.git")
    repository = Repository(lab)
    first = attempts(repository, 1)[-1]
    mirror.push(repository, site, "night")
    git(tmp_path, "clone", "-q", site, "clone")
    clone = Repository(tmp_path / "clone")
    mirror.fetch(clone, "origin", "night")

    branch = names.branch_ref("night", "main")
    ahead = repository.commit(first, {"train.py": "x = 9\n"}, "further", TRAILERS)
    repository.point(branch, ahead, first)
    mirror.fetch(repository, site, "night")  # as it was there before: nothing to do
    assert repository.refs(branch) == {branch: ahead}
    mirror.push(repository, site, "night")
    mirror.fetch(clone, "origin", "night")
    assert clone.refs(branch) == {branch: ahead}

    other = clone.commit(ahead, {"train.py": "x = 8\n"}, "elsewhere", TRAILERS)
    clone.point(branch, other, ahead)
    mine = repository.commit(ahead, {"train.py": "x = 7\n"}, "here", TRAILERS)
    repository.point_all([(branch, mine, ahead), (names.attempt_ref("night", "e7"), mine, None)])
    mirror.push(repository, site, "night")
    ours = ("refs/autoresearch", "refs/heads", mirror.NOTES)
    before = clone.refs(*ours)
    with pytest.raises(AutoresearchError, match=f"{branch} is {other} here and {mine} there"):
        mirror.fetch(clone, "origin", "night")
    assert clone.refs(*ours) == before
    assert not clone.refs("refs/autoresearch-incoming")


def test_what_cannot_be_sent_or_fetched_is_said(lab: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(lab), "site.git")
    repository = Repository(lab)
    attempts(repository, 2, "evening")
    for remote in ("--upload-pack=touch /tmp/x", "-o", ""):
        with pytest.raises(UserError, match="is no remote"):
            mirror.push(repository, remote, "evening")
    with pytest.raises(UserError, match="no campaign 'night' in this clone; it has evening"):
        mirror.push(repository, "origin", "night")
    with pytest.raises(AutoresearchError, match="git push nowhere failed"):
        mirror.push(repository, "nowhere", "evening")
    with pytest.raises(AutoresearchError) as error:
        mirror.fetch(repository, "https://me:secret@localhost:1/x.git", "night")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="has no campaign 'night'"):
        mirror.fetch(repository, str(tmp_path / "site.git"), "night")
    with pytest.raises(UserError, match="campaign name"):
        mirror.fetch(repository, "origin", "../x")
