"""What Slurm says, and what we make of it. Programs of the same names stand for odd answers."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from rig import ROOT

from jobs import outcome, payload
from jobs.errors import UserError
from jobs.model import Budget, Run
from slurm import commands
from slurm.commands import Busy, Row, Unanswered
from slurm.executor import last_line, state_of


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script on PATH under a name of Slurm's."""

    def put(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


PROXY = ("http_proxy", "https_proxy", "no_proxy")


def test_the_projects_own_jobs_get_what_a_run_gets_and_the_way_to_images_and_out():
    wanted = {*commands._KEPT, "AUTORESEARCH_IMAGES", *PROXY, *map(str.upper, PROXY)}
    for name in ("overnight", "image", "data"):
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        (names,) = re.findall(r"^#SBATCH --export=(\S+)$", text, re.MULTILINE)
        assert set(names.split(",")) == wanted, name


POLICY = (
    "Batch job submission failed: Job violates accounting/QOS policy"
    " (job submit limit, user's size and/or time limits)"
)
LINE = "7|RUNNING|n[1-2]|2026-01-01T00:00:00|2026-01-01T00:00:30|1-02:03:04|None|/lab|night|odd"


def test_a_line_of_squeue_is_a_row_also_with_an_odd_name(program):
    program("squeue", f"echo '{LINE}'; echo 'something else'")
    assert commands.queue() == [
        Row("7", "RUNNING", "n[1-2]", "None", "night|odd", "/lab", 30.0, 93784.0)
    ]


def test_a_wait_over_a_change_of_the_clocks_is_as_long_as_it_was(program, monkeypatch):
    program("squeue", "echo '7|RUNNING|n1|2026-03-29T01:59:00|2026-03-29T03:01:00|9:59|None|/l|a'")
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        assert commands.queue()[0].queue_s == 120.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text", ["echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1", "exit 1", "kill -9 $$"]
)
def test_a_failed_query_is_no_information(program, text: str):
    program("squeue", text)
    with pytest.raises(Unanswered):
        commands.queue()


def test_a_query_that_hangs_is_no_information(program):
    program("squeue", "sleep 60")
    with pytest.raises(Unanswered, match="timed out"):
        commands.ask(["squeue"], timeout_s=0.3)


def test_an_empty_answer_is_an_answer(program):
    program("squeue", "exit 0")
    assert commands.queue() == []


def test_a_cancelled_job_of_the_accounts_is_a_row(program):
    program("sacct", "echo '9|CANCELLED by 1000|n1|2026-01-01T00:00:00|Unknown|None|/lab|night'")
    row = commands.accounting(jobs=["9"])[0]
    assert (row.state, row.queue_s, row.folder) == ("CANCELLED", None, "/lab")


def test_where_sacct_fails_there_is_no_accounting(program):
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert not commands.has_accounting()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("9:59", 599.0),
        ("1:00:00", 3600.0),
        ("2-00:00:00", 172800.0),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_durations(text: str, seconds: float | None):
    assert commands.seconds(text) == seconds


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        ("Batch job submission failed: Invalid partition name specified", "partition"),
        ("Invalid account or account/partition combination specified", "account"),
        ("Invalid qos specification", "qos"),
        ("Invalid generic resource (gres) specification", "gpu_syntax or gpus"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "hold_hours"),
        ("Requested node configuration is not available", "gpus, cpus, memory"),
        ("Memory specification can not be satisfied", "memory"),
        (f"QOSMaxWallDurationPerJobLimit; {POLICY}", "margin, hold_hours"),
        (f"QOSMaxGRESPerJob; {POLICY}", "gpu_syntax or gpus"),
        (f"QOSMinGRES; {POLICY}", "gpu_syntax or gpus"),
        (f"AssocMaxNodePerJobLimit; {POLICY}", "qos or account"),
        ("something that nobody has seen before", "executor's settings"),
    ],
)
def test_a_refusal_names_the_setting_and_keeps_slurms_words(said: str, setting: str):
    error = commands.refusal(said)
    assert isinstance(error, UserError)
    assert said in str(error)
    assert setting in str(error)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("AssocMaxSubmitJobLimit; Job violates accounting/QOS policy (job submit limit)", Busy),
        ("QOSMaxSubmitJobPerUserLimit", Busy),
        (f"QOSGrpSubmitJobsLimit; {POLICY}", Busy),
        (POLICY, Busy),
        ("Unable to contact slurm controller (connect failure)", Unanswered),
        ("Socket timed out on send/recv operation", Unanswered),
        ("Command '['sbatch']' timed out after 60.0 seconds", Unanswered),
        ("Zero Bytes were transmitted or received", Unanswered),
    ],
)
def test_what_passes_by_itself_is_no_refusal(said: str, kind: type):
    assert isinstance(commands.refusal(said), kind)


@pytest.mark.parametrize(
    ("reason", "permanent"),
    [
        ("Resources", False),
        ("Priority", False),
        ("None", False),
        ("Dependency", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpSubmitJobsLimit", False),
        ("AssocMaxJobsLimit", False),
        ("AssocGrpGRES", True),
        ("AssocGrpCPUMinutesLimit", True),
        ("QOSGrpGRESMinutes", True),
        ("ReqNodeNotAvail, UnavailableNodes:n1", True),
        ("ReqNodeNotAvail, Reserved for maintenance", True),
        ("PartitionTimeLimit", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("JobHeldAdmin", True),
        ("BadConstraints", True),
    ],
)
def test_reasons_that_waiting_does_not_mend_come_with_a_remedy(reason: str, permanent: bool):
    state = state_of(Row("1", "PENDING", reason=reason))
    assert state.permanent is permanent
    assert state.reason.startswith(reason)
    assert (": " in state.reason) is permanent


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        ("PENDING", "pending"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("COMPLETED", "ended"),
        ("FAILED", "ended"),
        ("TIMEOUT", "ended"),
        ("NODE_FAIL", "ended"),
        ("OUT_OF_MEMORY", "ended"),
        ("A_STATE_OF_TOMORROW", "ended"),
    ],
)
def test_phases(state: str, phase: str):
    assert state_of(Row("1", state)).phase == phase


def test_only_preemption_counts_as_preemption_and_only_cancelling_as_that():
    for state in ("PREEMPTED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "FAILED"):
        told = state_of(Row("1", state))
        assert told.preempted is (state == "PREEMPTED")
        assert told.cancelled is (state == "CANCELLED")


def test_only_slurms_own_word_says_that_memory_ran_out():
    run = Run("e0001", 1, 1, Budget("wall", 1), "cpu")
    said = {state: state_of(Row("1", state)) for state in ("OUT_OF_MEMORY", "FAILED")}
    ends = {state: outcome.lost(run, "no result", found).status for state, found in said.items()}
    assert ends == {"OUT_OF_MEMORY": "oom", "FAILED": "infrastructure"}


def test_an_outer_jobs_variables_do_not_reach_slurms_commands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk")
    environment = commands.environment()
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "ANTHROPIC_API_KEY"} & set(environment)
    assert environment["SLURM_CONF"] == "/etc/slurm/slurm.conf"


def test_a_host_without_slurm_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"no sbatch on this host .*executor.kind: local"):
        commands.require("sbatch", "executor.kind: slurm")


def test_a_runs_id_is_the_end_of_its_name():
    assert payload.run_id("my-night-e0042-s1-a1") == "e0042-s1-a1"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("one\ntwo\n\n", "two"),
        ("one\nslurmstepd-n2: error: *** STEP 4.0 ON n2 CANCELLED DUE TO TIME LIMIT ***\nbye\n",
         "slurmstepd-n2: error: *** STEP 4.0 ON n2 CANCELLED DUE TO TIME LIMIT ***"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_words_of_a_log_are_slurms_own_where_it_ended_the_job(
    tmp_path: Path, log: str, words: str
):
    (tmp_path / "log").write_text(log)
    assert last_line(tmp_path / "log") == words
    assert last_line(tmp_path / "none") == ""
