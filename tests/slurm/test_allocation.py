"""Runs as steps of a held allocation, on the real test cluster, as an ordinary user."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rig import USER, count_calls, slurm, switch, wait_for

pytestmark = pytest.mark.cluster

FOUR_NODES = {"nodes": 4, "slots": 8, "hold_hours": 0.5}
ONE_NODE = {"nodes": 1, "slots": 2, "hold_hours": 0.5}


def holders() -> list[list[str]]:
    """[id, state] of the jobs that hold nodes, oldest first."""
    lines = slurm("squeue", "-h", "-u", USER, "-o", "%i %T %j", "-S", "i").splitlines()
    return [line.split()[:2] for line in lines if " hold-night-" in line]


def sruns(run: str) -> list[int]:
    """The processes of a run's srun (it forks one)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[0] == b"srun" and f"--job-name=night-{run}".encode() in argv:
            found.append(int(path.parent.name))
    return found


def kill_together(pids: list[int]) -> None:
    """An srun that sees the other one of its pair die ends the step."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)


def runs(count: int, first: int = 1) -> list[str]:
    return [f"e{number:04d}-s1-a1" for number in range(first, first + count)]


def test_eight_runs_at_once_have_eight_pairs_of_node_and_device(controller):
    night = controller("allocation", settings=FOUR_NODES)
    for run in runs(8):
        night("submit", run, sleep=6)
    claims = wait_for(lambda: night("survey") and all(map(night.claim, runs(8))) and
                      [night.claim(run) for run in runs(8)], 60)  # fmt: skip
    pairs = {(claim["node"], claim["device"]) for claim in claims}
    assert pairs == {(f"n{n}", str(d)) for n in (1, 2, 3, 4) for d in (0, 1)}
    assert len({claim["slurm_job"] for claim in claims}) == 1
    assert max(claim["time"] for claim in claims) < min(claim["time"] for claim in claims) + 6
    assert "ANTHROPIC_API_KEY" not in claims[0]["environment"]
    wait_for(lambda: all(map(night.finished, runs(8))), why="for the results")


def test_the_next_run_starts_in_the_place_of_the_last_at_once(controller):
    night = controller("allocation", settings={**ONE_NODE, "slots": 1})
    night("submit", "e0001-s1-a1", sleep=1)
    waits = []
    for before, run in zip(runs(4), runs(4, first=2), strict=True):
        wait_for(lambda b=before: night("survey") is not None and night.finished(b), 60)
        ended = time.time()
        night("submit", run, sleep=1)
        assert night.state(run)["phase"] == "running", "no survey in between was needed"
        waits.append(wait_for(lambda r=run: night.claim(r))["time"] - ended)
    assert sorted(waits)[1] < 2.0
    assert night.state(run)["queue_s"] < 1.0


def test_a_run_without_a_place_waits_and_says_why(controller):
    night = controller("allocation", settings={**ONE_NODE, "slots": 1})
    night("submit", "e0001-s1-a1", sleep=4)
    said = night.state("e0001-s1-a1")["reason"]
    assert "waits for its allocation" in said or said == "starting"  # Slurm may be that quick
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"))
    night("submit", "e0002-s1-a1")
    assert night.state("e0002-s1-a1") | {"reason": ""} == {
        "phase": "pending", "reason": "", "node": None, "permanent": False, "queue_s": None,
        "preempted": False, "cancelled": False, "oom": False,
    }  # fmt: skip
    wait_for(lambda: night("survey") is not None and night.finished("e0002-s1-a1"))


def test_a_killed_step_ends_and_its_neighbour_goes_on(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=1, kill="SIGKILL")
    night("submit", "e0002-s1-a1", sleep=5)
    ended = night.until("e0001-s1-a1", "ended")
    assert "ended with" in ended["reason"]
    wait_for(lambda: night.finished("e0002-s1-a1"), why="for the neighbour")


def test_a_payload_that_cannot_start_is_told_with_its_last_words(controller):
    night = controller("allocation", settings={**ONE_NODE, "setup": ["unset PYTHONPATH"]})
    night("submit", "e0001-s1-a1")
    assert "No module named" in night.until("e0001-s1-a1", "ended")["reason"]


def test_a_run_outlives_both_its_sruns(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=6)
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    assert len(sruns("e0001-s1-a1")) == 2
    kill_together(sruns("e0001-s1-a1"))
    time.sleep(1)
    assert night.state("e0001-s1-a1")["phase"] == "running"
    wait_for(lambda: night.finished("e0001-s1-a1"), why="for the result")


def test_steps_are_found_again_after_the_controller_and_its_sruns_were_killed(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=8)
    night("submit", "e0002-s1-a1", sleep=300)
    wait_for(lambda: night("survey") and all(map(night.claim, runs(2))), 60)
    night.kill()
    kill_together([*sruns("e0001-s1-a1"), *sruns("e0002-s1-a1")])
    night.start()
    assert night("adopt", *runs(3)) == runs(2), "the third was never submitted"
    assert night.state("e0001-s1-a1")["phase"] == "running"
    wait_for(lambda: night("survey") is not None and night.finished("e0001-s1-a1"))
    night("cancel", "e0002-s1-a1")
    assert "ended" in night.until("e0002-s1-a1", "ended")["reason"]
    assert len(holders()) == 1, "no second holder was asked for"


def test_a_run_that_waits_is_started_by_the_next_controller(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1")
    night.restart()
    assert night("adopt", "e0001-s1-a1") == runs(1)
    wait_for(lambda: night("survey") is not None and night.finished("e0001-s1-a1"))
    assert len(holders()) == 1


def test_a_holder_without_a_controller_lets_steps_finish_and_ends_itself(controller):
    night = controller("allocation", settings=ONE_NODE, constants={"stale_s": 4})
    night("submit", "e0001-s1-a1", sleep=12)
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    night.kill()
    wait_for(lambda: night.finished("e0001-s1-a1"), why="for the step to finish")
    wait_for(lambda: not holders(), 30, "for the holder to end")
    log = next((night.folder / "submitit").glob("holder-*.log"))
    assert "no heartbeat of the controller for 4 s" in log.read_text()


def test_a_holder_with_nothing_to_do_ends_itself(controller):
    night = controller("allocation", settings=ONE_NODE, constants={"idle_s": 4, "heartbeat_s": 1})
    night("submit", "e0001-s1-a1", sleep=8)
    wait_for(lambda: night("survey") is not None and night.finished("e0001-s1-a1"), 60)
    wait_for(lambda: not holders(), 30, "for the holder to end")
    log = next((night.folder / "submitit").glob("holder-*.log"))
    assert "nothing to run for 4 s" in log.read_text()
    night("submit", "e0002-s1-a1")
    wait_for(lambda: night("survey") is not None and night.finished("e0002-s1-a1"), 60)


def test_nothing_starts_that_would_not_fit_and_the_next_holder_comes_in_time(controller):
    """Three minutes are held; a run of 100 s no longer fits after 80 s, nor is it cut off."""
    night = controller("allocation", settings={**ONE_NODE, "slots": 1, "hold_hours": 0.05})
    night("submit", "e0001-s1-a1", limit_s=20.0, sleep=1)
    wait_for(lambda: night("survey") is not None and night.finished("e0001-s1-a1"), 60)
    first = holders()[0][0]
    slurm("scontrol", "update", f"jobid={first}", "TimeLimit=2")
    night("survey")
    night("submit", "e0002-s1-a1", limit_s=110.0, sleep=2)
    claim = wait_for(lambda: night("survey") is not None and night.claim("e0002-s1-a1"), 60)
    assert claim["slurm_job"] != first
    wait_for(lambda: [h[0] for h in holders()] == [claim["slurm_job"]] or night("survey") is None,
             30, "for the old holder to be given back")  # fmt: skip
    refused = night("submit", "e0003-s1-a1", limit_s=600.0)
    assert "executor.hold_hours" in refused["words"]


def test_a_lost_allocation_is_told_and_another_is_asked_for(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=60)
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    slurm("scancel", holders()[0][0])
    ended = night.until("e0001-s1-a1", "ended")
    assert "its allocation" in ended["reason"]
    assert ended["cancelled"]
    night("submit", "e0001-s1-a2")
    wait_for(lambda: night("survey") is not None and night.finished("e0001-s1-a2"), 60)


def test_a_dead_node_takes_only_its_own_runs(controller):
    night = controller("allocation", settings={**FOUR_NODES, "slots": 4})
    for run in runs(4):
        night("submit", run, sleep=25)
    wait_for(lambda: night("survey") and all(map(night.claim, runs(4))), 60)
    victim = next(run for run in runs(4) if night.claim(run)["node"] == "n4")
    try:
        os.kill(int(Path("/run/autoresearch-cluster/pid/slurmd-n4").read_text()), signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*/environ"):  # a node that is gone runs nothing
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"SLURMD_NODENAME=n4" in variables and b"SUBMITIT_EXECUTOR=allocation" in variables:
                os.kill(int(path.parent.name), signal.SIGKILL)
        ended = night.until(victim, "ended", 90)
        assert ended["node"] == "n4"
        for run in set(runs(4)) - {victim}:
            wait_for(lambda r=run: night.finished(r), 60, "for the other nodes")
        again = victim.replace("-a1", "-a2")
        more = [f"e{number:04d}-s1-a1" for number in range(11, 15)]
        night("submit", again, avoid=["n4"])
        for run in more:  # nobody has said yet that n4 is gone
            night("submit", run, sleep=1)
        for run in [again, *more]:
            wait_for(lambda r=run: night("survey") is not None and night.finished(r), 150)
            assert night.claim(run)["node"] != "n4"
    finally:
        switch(accounting=False)


def daemons(job: str) -> list[Path]:
    """What Slurm itself runs on nodes for the steps of a job."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                found.append(path.parent)
    return found


def test_the_loss_of_its_only_node_ends_an_allocation_and_is_that_nodes_fault(controller):
    night = controller("allocation", settings={**ONE_NODE, "exclude": ["n1", "n2", "n3"]})
    night("submit", "e0001-s1-a1", sleep=300)
    claim = wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    try:
        os.kill(int(Path("/run/autoresearch-cluster/pid/slurmd-n4").read_text()), signal.SIGKILL)
        ended = night.until("e0001-s1-a1", "ended", 90)
    finally:
        os.kill(claim["pid"], signal.SIGKILL)
        switch(accounting=False)
        # One that cannot tell slurmctld of its end, in the next test, would have its node drained.
        wait_for(lambda: not daemons(claim["slurm_job"]), 120, "for the step's own daemons")
    assert "NODE_FAIL" in ended["reason"]
    assert (ended["node"], ended["cancelled"]) == ("n4", False)


def test_thirty_seconds_without_slurmctld_cost_no_run(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=12)
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    os.kill(int(Path("/run/autoresearch-cluster/pid/slurmctld").read_text()), signal.SIGTERM)
    down = time.monotonic()
    try:
        assert wait_for(lambda: night("survey") is None, 20)
        night("submit", "e0002-s1-a1", sleep=1)
        wait_for(lambda: night.finished("e0001-s1-a1"), 40, "for the run that was on its way")
        time.sleep(max(0.0, 30.0 - (time.monotonic() - down)))
    finally:
        switch(accounting=False)
    wait_for(lambda: night("survey") is not None and night.finished("e0002-s1-a1"), 90)


def test_one_query_a_tick_whatever_the_number_of_runs(controller, home):
    counted = count_calls(home)
    night = controller("allocation", settings=FOUR_NODES, environ={"PATH": counted.path})
    calls = []
    known = 0
    for number in (1, 8, 64):
        for run in runs(number - known, first=known + 1):
            night("submit", run, sleep=300)
        known = number
        wait_for(lambda n=number: night("survey") and all(map(night.claim, runs(min(n, 8)))), 60)
        counted.clear()
        assert len(night("survey")) == number
        calls.append(counted.calls())
    assert calls == [["squeue"]] * 3


def test_refused_settings_are_told_and_nothing_waits(controller):
    night = controller("allocation", settings={**ONE_NODE, "partition": "nowhere"})
    answer = night("submit", "e0001-s1-a1")
    assert answer["error"] == "UserError"
    assert "Invalid partition name" in answer["words"]
    assert "executor.partition" in answer["words"]
    assert night("adopt", "e0001-s1-a1") == []


def test_runs_are_on_the_nodes_that_they_name_and_one_that_names_none_that_is_ends(controller):
    night = controller("allocation", settings={"nodes": 3, "slots": 3, "hold_hours": 0.5})
    first, second, lost = runs(3)
    night("submit", first, place={"node": "n4"}, sleep=8)
    night("submit", second, place={"node": "n2"}, sleep=1)
    night("submit", lost, place={"node": "nowhere9"})
    assert "Invalid node name" in night.until(lost, "ended", 90)["reason"]
    wait_for(lambda: night("survey") and night.finished(first) and night.finished(second), 90)
    assert [night.claim(run)["node"] for run in (first, second)] == ["n4", "n2"]


def test_at_the_end_the_nodes_are_given_back_unless_a_run_is_under_way(controller):
    night = controller("allocation", settings=ONE_NODE)
    night("submit", "e0001-s1-a1", sleep=4)
    wait_for(lambda: night("survey") and night.claim("e0001-s1-a1"), 60)
    night("close")
    time.sleep(1)
    assert [state for _, state in holders()] == ["RUNNING"], "the run goes on"
    wait_for(lambda: night.finished("e0001-s1-a1"), 30)
    night("close")
    wait_for(lambda: not holders(), 20)


@pytest.mark.parametrize("syntax", ["gres", "gpus", "gpus-per-node"])
def test_every_way_of_asking_for_gpus_gives_each_run_its_own(controller, syntax):
    night = controller("allocation", settings={**ONE_NODE, "gpu_syntax": syntax})
    for run in runs(2):
        night("submit", run, sleep=4)
    wait_for(lambda: night("survey") is not None and all(map(night.claim, runs(2))), 60)
    assert {night.claim(run)["device"] for run in runs(2)} == {"0", "1"}


def test_where_slurm_knows_no_gpus_places_stand_for_devices(controller):
    night = controller("allocation", settings={**ONE_NODE, "gpu_syntax": "none"})
    for run in runs(2):
        night("submit", run, sleep=4)
    wait_for(lambda: night("survey") is not None and all(map(night.claim, runs(2))), 60)
    assert {night.claim(run)["device"] for run in runs(2)} == {"0", "1"}


def test_the_plugin_is_registered_by_its_entry_point():
    done = subprocess.run(
        ["python3", "-c", "import tomllib; print(tomllib.load(open('pyproject.toml', 'rb'))"
         "['project']['entry-points']['submitit'])"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "slurm.step:AllocationExecutor" in done.stdout
