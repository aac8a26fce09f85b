"""The user's repository is only ever added to; commits, refs and snapshots are exact."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import names
from jobs.errors import Paused, UserError
from jobs.objects import Entry
from jobs.repository import BranchInUse, RefMoved, Repository

PROGRAM = "trainer/train.py"
TEXT = "".join(f"line_{i} = {i}\n" for i in range(60))
WHEN = 1_700_000_000


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def make_lab(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "Ada")
    git(folder, "config", "user.email", "ada@example.org")
    (folder / "trainer").mkdir()
    (folder / PROGRAM).write_text(TEXT)
    (folder / "trainer" / "prepare.py").write_text("frozen = True\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "notes und größe.md").write_text("ä\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "start")
    return folder


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    return make_lab(tmp_path / "my lab größe")


@pytest.fixture
def repository(lab: Path) -> Repository:
    return Repository(lab)


def edited(line: int, to: str) -> dict[str, str]:
    lines = TEXT.splitlines(keepends=True)
    lines[line] = to + "\n"
    return {PROGRAM: "".join(lines)}


def commit(
    repository: Repository, base: str, files: dict[str, str], message: str = "try it"
) -> str:
    return repository.commit(base, files, message, {"Campaign": "night", "Branch": "main"}, WHEN)


# Commits


def test_a_commit_is_what_git_itself_would_have_made(lab: Path, repository: Repository) -> None:
    made = commit(repository, repository.start(), edited(3, "line_3 = 33"), "raise line 3")
    (lab / PROGRAM).write_text(edited(3, "line_3 = 33")[PROGRAM])
    git(lab, "commit", "-qam", "by hand")
    assert git(lab, "rev-parse", f"{made}^{{tree}}") == git(lab, "rev-parse", "HEAD^{tree}")
    assert git(lab, "log", "-1", "--format=%an <%ae> %at %P", made).split() == [
        "Ada",
        "<ada@example.org>",
        str(WHEN),
        git(lab, "rev-parse", "HEAD^").strip(),
    ]
    git(lab, "fsck", "--strict", "--full")


def test_modes_nested_paths_submodules_and_odd_names_are_carried_over(
    lab: Path, repository: Repository
) -> None:
    start = repository.start()
    git(lab, "update-index", "--add", "--cacheinfo", f"160000,{start},vendor/sub")
    git(lab, "update-index", "--add", "--cacheinfo", f"160000,{start},sub.d")
    git(lab, "commit", "-qm", "a submodule")
    base = repository.start()
    files = {"run.sh": "#!/bin/sh\necho\n", "new/deep/er.py": "x = 1\n", "trainer.py": "y = 2\n"}
    made = commit(repository, base, files)
    before = git(lab, "ls-tree", "-r", base).splitlines()
    after = git(lab, "ls-tree", "-r", made).splitlines()
    assert {row.split("\t")[1] for row in set(after) ^ set(before)} == set(files)
    assert next(row for row in after if row.endswith("run.sh")).startswith("100755")
    git(lab, "fsck", "--strict")


def test_the_same_proposal_at_the_same_time_is_the_same_commit(repository: Repository) -> None:
    start = repository.start()
    one = commit(repository, start, edited(3, "a = 1"))
    assert commit(repository, start, edited(3, "a = 1")) == one
    assert commit(repository, start, edited(3, "a = 2")) != one
    assert repository.tree(commit(repository, start, {})) == repository.tree(start)


def test_every_trailer_is_there_and_none_can_be_forged(lab: Path, repository: Repository) -> None:
    message = "ignore\x1b[31m this\n\nCampaign: forged\nBranch: forged\n\nCampaign: forged too"
    given = {"Campaign": "night", "Researcher": "sweep\nBranch: forged", "Experiment": "e0001"}
    made = repository.commit(repository.start(), {}, message, given, WHEN)
    found = repository.trailers(made)
    assert list(found) == [*names.TRAILERS, "Experiment"]
    assert found["Campaign"] == "night"
    assert found["Researcher"] == "sweep Branch: forged"
    assert found["Branch"] == found["Container-Tag"] == found["Rebased-From"] == "none"
    by_git = git(lab, "log", "-1", "--format=%(trailers:unfold)", made).strip().splitlines()
    assert dict(row.split(": ", 1) for row in by_git) == found
    assert "\x1b" not in git(lab, "cat-file", "-p", made)
    assert repository.trailers(repository.start()) == {}


def test_without_a_name_in_git_the_project_signs(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(lab, "config", "--unset", "user.name")
    git(lab, "config", "--unset", "user.email")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    repository = Repository(lab)
    made = commit(repository, repository.start(), {})
    assert (
        git(lab, "log", "-1", "--format=%an %ae", made) == "autoresearch autoresearch@localhost\n"
    )


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("../outside.py", "inside the repository"),
        ("/etc/passwd", "inside the repository"),
        ("a/../b", "inside the repository"),
        (".git/config", "inside the repository"),
        ("x/.GIT/hooks", "inside the repository"),
        ("a//b", "inside the repository"),
        ("trainer", "a folder"),
        ("trainer/", "inside the repository"),
        ("link", "a symbolic link"),
        ("run.sh/below", "not a folder"),
    ],
)
def test_a_path_that_is_no_file_of_the_repository_is_refused(
    lab: Path, repository: Repository, path: str, says: str
) -> None:
    (lab / "link").symlink_to("run.sh")
    git(lab, "add", "link")
    git(lab, "commit", "-qm", "link")
    with pytest.raises(UserError, match=says):
        commit(repository, repository.start(), {path: "x"})


def test_text_is_read_back_as_it_was_written(lab: Path, repository: Repository) -> None:
    text = "a = 'ä'\r\nb = 2\n\n\x0c\nno newline at the end"
    made = commit(repository, repository.start(), {PROGRAM: text})
    assert repository.read(made, PROGRAM) == text
    (lab / "binary").write_bytes(b"\xff\xfe\x00")
    git(lab, "add", "binary")
    git(lab, "commit", "-qm", "binary")
    with pytest.raises(UserError, match="not UTF-8"):
        repository.read(repository.start(), "binary")
    for absent in ("no/such.py", "trainer"):
        with pytest.raises(UserError, match="has no file"):
            repository.read(made, absent)


def test_checkout_index_branch_and_uncommitted_work_are_untouched(
    lab: Path, repository: Repository
) -> None:
    (lab / PROGRAM).write_text("half an idea\n")
    (lab / "staged.txt").write_text("staged\n")
    git(lab, "add", "staged.txt")
    (lab / "untracked.txt").write_text("mine\n")
    status = git(lab, "status", "-s")
    os.utime(lab / "run.sh", (WHEN, WHEN))  # so that a git status would write the index anew
    watched = [lab / ".git" / name for name in ("index", "HEAD", "config", "logs/HEAD")]
    before = [p.read_bytes() for p in watched]
    assert any("uncommitted" in remark for remark in repository.remarks())
    start = repository.start()
    for i in range(3):
        made = commit(repository, start, edited(i, f"a = {i}"))
        repository.point(names.attempt_ref("night", f"e{i}"), made)
    repository.point(names.branch_ref("night", "main"), made)
    repository.snapshot(made, lab.parent / "run" / "program")
    repository.pack(least=0)
    assert [p.read_bytes() for p in watched] == before
    assert git(lab, "status", "-s") == status
    assert git(lab, "rev-parse", "main").strip() == start
    assert (lab / PROGRAM).read_text() == "half an idea\n"


# Refs


def test_a_ref_is_moved_by_compare_and_swap_and_again_is_harmless(
    lab: Path, repository: Repository
) -> None:
    start = repository.start()
    one, two = (commit(repository, start, edited(i, "a = 1")) for i in (1, 2))
    ref = names.branch_ref("night", "main")
    repository.point(ref, one)
    repository.point(ref, one)
    repository.point(ref, one, start)
    with pytest.raises(RefMoved, match="moved by something else"):
        repository.point(ref, two)
    with pytest.raises(RefMoved):
        repository.point(ref, two, start)
    assert git(lab, "rev-parse", ref).strip() == one
    repository.point(ref, two, one)
    repository.point(ref, two, one)
    assert repository.refs("refs/heads/autoresearch") == {ref: two}


def test_a_branch_that_lags_on_its_own_line_or_was_deleted_is_brought_up(
    lab: Path, repository: Repository
) -> None:
    line = [repository.start()]
    for i in range(3):
        line.append(commit(repository, line[-1], edited(i, "a = 1")))
    ref = names.branch_ref("night", "main")
    repository.point(ref, line[1])
    repository.point(ref, line[3], line[2])
    assert git(lab, "rev-parse", ref).strip() == line[3]
    git(lab, "update-ref", "-d", ref)
    repository.point(ref, line[3], line[2])
    assert git(lab, "rev-parse", ref).strip() == line[3]


def test_a_branch_that_is_checked_out_stays_until_it_is_not(
    lab: Path, repository: Repository
) -> None:
    one = commit(repository, repository.start(), edited(1, "a = 1"))
    two, three = (commit(repository, one, edited(i, "a = 1")) for i in (2, 3))
    ref, other = names.branch_ref("night", "main"), names.branch_ref("night", "other")
    repository.point_all([(ref, one, None), (other, one, None)])
    git(lab, "worktree", "add", "-q", str(lab.parent / "look"), "autoresearch/night/other")
    git(lab, "switch", "-q", "autoresearch/night/main")
    for held, folder in ((ref, lab), (other, lab.parent / "look")):
        with pytest.raises(BranchInUse, match=folder.name):
            repository.point(held, two, one)
    assert repository.restore({ref: two})[0].startswith("autoresearch/night/main is checked out")
    assert git(lab, "status", "-s") == ""
    git(lab, "switch", "-q", "main")
    repository.point(ref, three, one)
    assert git(lab, "rev-parse", ref).strip() == three


def test_refs_that_were_lost_are_made_again_and_foreign_moves_are_told(
    lab: Path, repository: Repository
) -> None:
    start = repository.start()
    made = {f"e{i:04}": commit(repository, start, edited(i, "a = 1")) for i in range(6)}
    refs = {names.attempt_ref("night", e): sha for e, sha in made.items()}
    repository.point_all([(ref, sha, None) for ref, sha in refs.items()])
    for experiment in ("e0001", "e0003"):
        git(lab, "update-ref", "-d", names.attempt_ref("night", experiment))
    git(lab, "update-ref", names.attempt_ref("night", "e0005"), made["e0000"])
    pruned = {names.attempt_ref("night", "e0009"): "a" * 40}
    troubles = repository.restore(refs | pruned)
    assert ["e0009: its commit" in t or "e0005" in t for t in troubles] == [True, True]
    assert repository.refs("refs/autoresearch") == {
        **refs,
        names.attempt_ref("night", "e0005"): made["e0000"],
    }


def test_one_refused_move_of_a_batch_does_not_stop_the_others(repository: Repository) -> None:
    start = repository.start()
    made = [commit(repository, start, edited(i, "a = 1")) for i in range(3)]
    refs = [names.attempt_ref("night", f"e{i}") for i in range(3)]
    repository.point(refs[1], start)
    with pytest.raises(RefMoved):
        repository.point_all([(r, m, None) for r, m in zip(refs, made, strict=True)])
    assert repository.refs("refs/autoresearch") == dict(
        zip(refs, [made[0], start, made[2]], strict=True)
    )


def test_a_branch_of_the_shorter_name_in_the_way_is_told(lab: Path, repository: Repository) -> None:
    git(lab, "branch", "autoresearch")
    with pytest.raises(Paused, match=r"git branch -m"):
        repository.point(names.branch_ref("night", "main"), repository.start())


@pytest.mark.parametrize(
    "name",
    [
        *["", "-rf", "a..b", "a@{1}", "a b", "a/b", "a\x07", "ü", "x" * 65, ".hidden", "a.lock"],
        *["end.", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "refs/heads/x", "\n"],
    ],
)
def test_a_name_that_git_or_a_file_system_refuses_is_refused_in_words(name: str) -> None:
    with pytest.raises(UserError, match="campaign name"):
        names.check_name("campaign", name)


def test_every_name_that_is_allowed_is_a_ref_of_git(lab: Path) -> None:
    for name in ("a", "night-1", "A.b_c-d", "0", "x" * 64, "records", "HEAD"):
        git(lab, "check-ref-format", names.branch_ref(names.check_name("branch", name), name))


# What is wrong with a repository


def test_what_is_no_repository_to_start_from_is_said(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="not in a git repository"):
        Repository(tmp_path / "plain")
    with pytest.raises(UserError, match="not in a git repository"):
        Repository(tmp_path / "no such")
    git(tmp_path, "init", "-q", "empty")
    with pytest.raises(UserError, match="no commit yet"):
        Repository(tmp_path / "empty").start()
    git(tmp_path, "clone", "-q", "--bare", str(lab), "bare.git")
    with pytest.raises(UserError, match="bare"):
        Repository(tmp_path / "bare.git")
    git(tmp_path, "init", "-q", "--object-format=sha256", "other")
    with pytest.raises(UserError, match="format"):
        Repository(tmp_path / "other")


def test_a_commit_that_is_not_there_is_said(repository: Repository) -> None:
    for name in ("no-such-branch", "f" * 40, "--all", "a\nb", ""):
        with pytest.raises(UserError, match="no commit"):
            repository.start(name)
    with pytest.raises(UserError, match="does not hold it"):
        repository.read("f" * 40, PROGRAM)


def test_an_ambiguous_prefix_is_said(lab: Path, repository: Repository) -> None:
    # ids with the same first four digits, found by trying: about 400 commits for 16 bits
    seen: dict[str, str] = {}
    for i in range(5000):
        prefix = commit(repository, repository.start(), {}, f"try {i}")[:4]
        if prefix in seen:
            break
        seen[prefix] = prefix
    with pytest.raises(UserError, match="the beginning of several"):
        repository.start(prefix)


def test_shallow_detached_and_submodules_work_and_are_told(lab: Path, tmp_path: Path) -> None:
    (lab / ".gitmodules").write_text("")
    git(lab, "add", "-A")
    git(lab, "commit", "-qm", "second")
    git(tmp_path, "clone", "-q", "--depth", "1", lab.as_uri(), "shallow")
    shallow = tmp_path / "shallow"
    git(shallow, "checkout", "-q", "--detach")
    repository = Repository(shallow)
    said = " ".join(repository.remarks())
    assert all(word in said for word in ("shallow", "detached", "submodules"))
    made = commit(repository, repository.start(), edited(1, "a = 1"))
    repository.point(names.attempt_ref("night", "e0001"), made)
    assert "+a = 1\n" in repository.diff(repository.start(), made)


def test_a_clean_repository_has_nothing_to_tell(repository: Repository) -> None:
    assert repository.remarks() == []


def test_a_linked_work_tree_and_a_folder_inside_are_the_repository(
    lab: Path, repository: Repository
) -> None:
    git(lab, "worktree", "add", "-q", "--detach", str(lab.parent / "linked"))
    linked = Repository(lab.parent / "linked")
    made = commit(linked, linked.start(), edited(1, "a = 1"))
    linked.point(names.attempt_ref("night", "e0001"), made)
    assert repository.start("refs/autoresearch/night/e0001") == made
    assert Repository(lab / "trainer").root == lab


def test_a_hook_that_starts_a_campaign_does_not_misdirect_it(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_lab(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    repository = Repository(lab)
    made = commit(repository, repository.start(), edited(1, "a = 1"))
    repository.point(names.attempt_ref("night", "e0001"), made)
    assert git(lab, "for-each-ref", "refs/autoresearch").startswith(made)
    assert git(other, "for-each-ref", "refs/autoresearch") == ""


def python(code: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
import os, sys
from jobs.errors import AutoresearchError
from jobs.repository import Repository
if sys.argv[2:]:  # everything is imported: root's interpreter need not be readable from here on
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    repository = Repository(sys.argv[1])
    sha = repository.commit(repository.start(), {"trainer/train.py": "x = 1"}, "try", {}, 0)
    repository.point("refs/autoresearch/night/e0001", sha)
except AutoresearchError as error:
    print(type(error).__name__, error)
"""


def test_a_missing_git_is_said(lab: Path, tmp_path: Path) -> None:
    assert "UserError git is not on PATH" in python(OPEN, str(lab), PATH=str(tmp_path))


def test_a_git_that_is_too_old_is_said(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\necho git version 2.25.1\n")
    (tmp_path / "git").chmod(0o755)
    said = python(OPEN, str(lab), PATH=str(tmp_path))
    assert "UserError git 2.25.1 is too old, 2.27 or newer is needed" in said


@pytest.fixture
def public() -> Iterator[tuple[Path, list[str]]]:
    """A lab and the ordinary user who owns it: `nobody` where the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-"))
    lab = make_lab(folder / "lab")
    uid = 65534 if os.getuid() == 0 else None
    if uid:
        folder.chmod(0o755)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
    yield lab, [str(uid)] if uid else []
    for path in folder.rglob("*"):
        path.is_dir() and path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_repository_that_cannot_be_written_pauses_in_words(
    public: tuple[Path, list[str]],
) -> None:
    lab, user = public
    for folder in (lab / ".git").rglob("*"):
        folder.is_dir() and folder.chmod(0o555)
    said = python(OPEN, str(lab), *user, HOME=str(lab.parent))
    assert said.startswith("Paused")
    assert "could not be written: Permission denied (EACCES)" in said
    assert "write permission" in said
    for folder in (lab / ".git/objects").rglob("*"):
        folder.is_dir() and folder.chmod(0o755)
    (lab / ".git/objects").chmod(0o755)
    said = python(OPEN, str(lab), *user, HOME=str(lab.parent))
    assert said.startswith("Paused git could not move refs/autoresearch/night/e0001")
    assert "write permission" in said


def test_a_repository_of_another_user_is_refused_with_the_remedy_that_git_names(lab: Path) -> None:
    said = python(OPEN, str(lab), GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert said.startswith("UserError git refuses")
    assert "safe.directory" in said


def test_a_full_disk_leaves_no_half_object(lab: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + OPEN
    before = sorted((lab / ".git/objects").rglob("*"))
    assert "Paused" in python(code, str(lab))
    left = [p for p in (lab / ".git/objects").rglob("*") if p.is_file() and p not in before]
    assert all(p.stat().st_size > 0 for p in left)
    git(lab, "fsck", "--strict")


# Packing and garbage collection


def test_nothing_is_lost_by_packing_and_by_the_users_gc(lab: Path, repository: Repository) -> None:
    start = repository.start()
    made = [commit(repository, start, edited(i, "a = 1")) for i in range(40)]
    unreferenced = made.pop()
    refs = {names.attempt_ref("night", f"e{i:04}"): sha for i, sha in enumerate(made)}
    repository.point_all([(ref, sha, None) for ref, sha in refs.items()])
    assert not repository.pack()
    assert repository.pack(least=0)
    loose = [p for p in (lab / ".git/objects").glob("??/*") if p.is_file()]
    assert loose == []
    assert not list((lab / ".git/refs/autoresearch").rglob("e*"))
    assert repository.read(unreferenced, PROGRAM)
    assert repository.pack(least=0)
    git(lab, "gc", "-q", "--prune=now")
    git(lab, "fsck", "--strict", "--full")
    fresh = Repository(lab)
    for opened in (repository, fresh):
        assert opened.refs("refs/autoresearch") == refs
        assert all(opened.read(sha, PROGRAM) != TEXT for sha in made)


def test_reading_goes_on_when_someone_ends_the_cat_file_process(
    lab: Path, repository: Repository
) -> None:
    start = repository.start()
    repository.read(start, PROGRAM)
    for child in ("cat_file_all", "cat_file_header"):
        getattr(repository._repo.git, child).proc.kill()
        getattr(repository._repo.git, child).proc.wait()
    assert repository.start("main") == start
    assert repository.read(start, "notes und größe.md") == "ä\n"


# Snapshots


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def test_a_snapshot_is_the_commit_and_read_only(
    lab: Path, repository: Repository, tmp_path: Path
) -> None:
    (lab / "trainer" / "link.py").symlink_to("../run.sh")
    git(lab, "add", "-A")
    git(lab, "commit", "-qm", "link")
    start, folder = repository.start(), tmp_path / "runs" / "program"
    repository.snapshot(start, folder)
    assert contents(folder) == {k: v for k, v in contents(lab).items() if not k.startswith(".git")}
    assert os.readlink(folder / "trainer" / "link.py") == "../run.sh"
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}
    assert modes["program"] == modes["trainer"] == modes["run.sh"] == 0o555
    assert modes["train.py"] == 0o444
    assert [p.name for p in folder.parent.iterdir()] == ["program"]


def test_a_snapshot_of_some_paths_holds_only_those(repository: Repository, tmp_path: Path) -> None:
    repository.snapshot(repository.start(), tmp_path / "one", ["trainer/train.py", "run.sh"])
    assert set(contents(tmp_path / "one")) == {"trainer/train.py", "run.sh"}
    repository.snapshot(repository.start(), tmp_path / "two", ["trainer"])
    assert set(contents(tmp_path / "two")) == {"trainer/train.py", "trainer/prepare.py"}
    with pytest.raises(UserError, match="has no 'tainer'"):
        repository.snapshot(repository.start(), tmp_path / "three", ["tainer"])
    assert not (tmp_path / "three").exists()


def test_a_snapshot_that_was_written_into_or_torn_is_made_again(
    repository: Repository, tmp_path: Path
) -> None:
    folder = tmp_path / "program"
    repository.snapshot(repository.start(), folder)
    inode = folder.stat().st_ino
    repository.snapshot(repository.start(), folder)
    assert folder.stat().st_ino == inode
    expected = contents(folder)
    for spoil in (
        lambda: (folder / PROGRAM).write_text("cheat()\n"),
        lambda: (folder / "trainer" / "extra.py").write_text(""),
        lambda: (folder / "run.sh").unlink(),
    ):
        for path in (folder, folder / "trainer", folder / PROGRAM):
            path.chmod(0o755)
        spoil()
        (tmp_path / ".program.new").mkdir()
        repository.snapshot(repository.start(), folder)
        assert contents(folder) == expected


@pytest.mark.parametrize("target", ["/etc", "../..", "a/b/up/..", "../../../../etc/passwd"])
def test_a_link_that_leaves_the_tree_is_refused(
    lab: Path, repository: Repository, tmp_path: Path, target: str
) -> None:
    (lab / "a" / "b").mkdir(parents=True)
    (lab / "a" / "b" / "up").symlink_to("../..")
    (lab / "escape").symlink_to(target)
    git(lab, "add", "-A")
    git(lab, "commit", "-qm", "link")
    with pytest.raises(UserError, match="symbolic link"):
        repository.snapshot(repository.start(), tmp_path / "inner" / "program")
    assert list((tmp_path / "inner").iterdir()) == []


def test_a_tree_with_paths_that_git_would_not_check_out_is_refused(
    repository: Repository, tmp_path: Path
) -> None:
    blob = repository.objects.write("blob", b"#!/bin/sh")
    for name in ("..", ".git", ".GIT"):
        evil = repository.objects.write_tree({name: Entry("100644", blob)})
        made = repository.write_commit(evil, [], "evil")
        with pytest.raises(UserError, match="would not check out"):
            repository.snapshot(made, tmp_path / "program")


# Differences


def test_differences_are_gits_whatever_the_user_configured(
    lab: Path, repository: Repository
) -> None:
    start = repository.start()
    made = commit(repository, start, edited(3, "a = 1\nb = 2"))
    git(lab, "config", "diff.noprefix", "true")
    git(lab, "config", "diff.external", "/bin/false")
    git(lab, "config", "color.ui", "always")
    text = repository.diff(start, made, [PROGRAM])
    assert f"--- a/{PROGRAM}\n+++ b/{PROGRAM}\n" in text
    assert "\n-line_3 = 3\n+a = 1\n+b = 2\n" in text
    assert repository.diff(start, made, ["run.sh"]) == ""
    assert repository.diff(start, made, ["*"]) == ""


def test_texts_merge_by_lines_or_not_at_all(repository: Repository) -> None:
    ours, theirs, clash = (edited(i, to)[PROGRAM] for i, to in ((3, "a"), (50, "b"), (3, "c")))
    merged = repository.merge_file(TEXT, ours, theirs)
    assert merged == edited(3, "a")[PROGRAM].replace("line_50 = 50", "b")
    assert repository.merge_file(TEXT, ours, clash) is None
    assert repository.merge_file(TEXT, TEXT, ours) == ours
    assert repository.merge_file("a\r\nb", "a\r\nb", "ä\r\nb") == "ä\r\nb"


def test_the_campaigns_folder_is_ignored_once_and_only_in_this_clone(
    lab: Path, repository: Repository
) -> None:
    (lab / ".git/info/exclude").write_text("*.log")
    for _ in range(3):
        repository.exclude("/campaigns/")
    assert (lab / ".git/info/exclude").read_text() == "*.log\n/campaigns/\n"
    (lab / "campaigns").mkdir()
    (lab / "campaigns" / "x").write_text("")
    assert git(lab, "status", "--porcelain") == ""
