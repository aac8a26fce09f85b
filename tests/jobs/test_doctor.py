"""Doctor's judgements by table, its request by a real server, its command in labs."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from toylab import Lab, change

from jobs import cli, config, doctor
from slurm import trial

KEY = "sk-ant-test-0123456789abcdef"


# -- judgements -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "mb", "files"),
    [
        ({"limits": {"experiments": 10}}, 10 * 3 + 4096 + 1024, 70),
        ({"limits": {"hours": 2}, "budget": {"wall": 300}}, 24 * 3 + 4096 + 1024, 168),
        ({"budget": {"wall": 300}, "executor": {"slots": 8}}, 1152 * 3 + 8 * 4096 + 1024, 8064),
        ({"limits": {"experiments": 1}, "branches": {"a": {}, "b": {}}}, 3 + 4096 + 2048, 7),
    ],
)
def test_the_forecast_counts_what_runs_leave_and_what_those_under_way_hold(settings, mb, files):
    assert doctor.forecast(config.parse(settings), 3, 7) == (mb, files)


@pytest.mark.parametrize(
    ("free", "status"),
    [
        ((9000, 1e6), "ok"),
        ((math.inf, 800), "ok"),
        ((1000 + 5999, 1e6), "warning"),  # what is to stay free does not count
        ((9000, 799), "warning"),
        ((999, 1e6), "failure"),  # the campaign would pause at once
        ((9000, 0), "failure"),
    ],
)
def test_room_is_judged_by_megabytes_and_by_files(free, status):
    finding = doctor.room(free, (6000, 800), 1000, "/lab")
    assert (finding.status, bool(finding.remedy)) == (status, status != "ok")


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ("", (math.inf, math.inf)),
        ("sh: quota: not found", (math.inf, math.inf)),
        ("Disk quotas for user u (uid 7): none", (math.inf, math.inf)),
        (  # quota -w -p: the soft limit binds once its grace is over
            "Disk quotas for user u (uid 7): \n"
            "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
            "srv:/home  1048576 2097152 4194304 0 900 1000 0 0\n",
            (1024, 100),
        ),
        ("/lustre 3145728* 2097152 4194304 6d23h59m 10 0 0 -", (-1024, math.inf)),  # lfs
        ("/dev/a 0 1024 0 0 0 0 9 0\n/dev/b 0 4096 0 0 0 0 5 0", (1, 5)),  # the least
    ],
)
def test_quotas_are_read_as_both_tools_print_them(told, left):
    assert doctor.quota(told) == left


@pytest.mark.parametrize(("ahead", "status"), [(0.2, "ok"), (-4, "ok"), (9, "warning")])
def test_a_clock_that_differs_is_told(ahead, status):
    assert doctor.clock(ahead, "file server").status == status


@pytest.mark.parametrize(
    ("seconds", "status"), [(0.3, "ok"), (30, "warning"), (math.inf, "failure")]
)
def test_the_shared_folders_lag(seconds, status):
    assert doctor.lag(seconds).status == status


def test_the_ways_to_keep_a_controller_on_a_login_node_are_lines_to_copy():
    told = doctor.by_hand(Path("/home/u/my lab"))
    for way in ("tmux new -d", "nohup sh -c", "*/10 * * * * bash -lc"):
        assert way in told
    assert "my lab" in told
    assert "interrupted" in told.partition("crontab")[2]  # what was stopped stays so


# -- the API --------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Callable[[int], str]]:
    """A real server on this host that answers everything with one status; its address."""
    servers = []

    def serve(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kinds = {401: "authentication_error", 404: "not_found_error"}
                error = {"type": kinds.get(status, "overloaded_error"), "message": KEY}
                model = {"id": "claude-opus-5-5", "type": "model", "display_name": "Opus"}
                body = model if status == 200 else {"type": "error", "error": error}
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())
                assert self.headers["x-api-key"] == KEY

            def log_message(self, *args: Any) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "judged"), [(200, "ok"), (401, "failure"), (404, "warning"), (529, "warning")]
)
def test_the_api_is_asked_by_a_real_request_and_the_key_is_never_told(
    served, monkeypatch, status, judged
):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    address = served(status)
    told = doctor.researcher(config.parse({"agent": {"base_url": address}}).agent)
    assert (told.check, told.status) == ("API", judged), told
    assert bool(told.remedy) == (judged != "ok")
    assert KEY not in told.seen + told.remedy
    assert status != 200 or address in told.seen


def test_an_api_out_of_reach_is_a_failure_that_names_address_and_proxy(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    agent = config.parse({"agent": {"base_url": "http://127.0.0.1:9"}}).agent
    told = doctor.researcher(agent)
    assert told.status == "failure"
    assert "refused" in told.seen
    assert "agent.base_url" in told.remedy
    assert "https_proxy" in told.remedy


@pytest.mark.parametrize(
    ("agent", "status", "words"),
    [
        ({}, "ok", "sweep"),
        ({"kind": "anthropic"}, "failure", "agent.key_file"),
        ({"kind": "anthropic", "provider": "bedrock"}, "ok", "not asked"),
        ({"kind": "command", "argv": ["sh", "-c", "x"]}, "ok", "sh"),
        ({"kind": "command", "argv": ["no-such-agent"]}, "failure", "no-such-agent"),
    ],
)
def test_researchers_that_need_no_api_and_those_that_cannot_be_had(
    monkeypatch, agent, status, words
):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    told = doctor.researcher(config.parse({"agent": agent}).agent)
    assert told.status == status
    assert words in told.seen + told.remedy


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def asked(capsys, monkeypatch) -> Callable[..., tuple[int, dict[str, dict[str, str]]]]:
    """`autoresearch doctor --json` in a folder: exit status, findings by their check."""

    def ask(folder: Path) -> tuple[int, dict[str, dict[str, str]]]:
        monkeypatch.chdir(folder)
        status = cli.main(["doctor", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert all(finding["remedy"] for finding in told if finding["status"] != "ok")
        return status, {finding["check"]: finding for finding in told}

    return ask


def test_a_lab_on_this_machine_is_found_fit_and_nothing_is_changed(make_lab, asked):
    lab: Lab = make_lab(change(X=1))
    before = lab.git("status", "--porcelain", "--ignored")
    status, told = asked(lab.root)
    assert status == 0
    assert {"git", "disk", "clock", "data", "researcher"} <= set(told)
    assert lab.git("status", "--porcelain", "--ignored") == before


def test_people_are_told_each_check_in_a_line_and_what_it_comes_to(make_lab, monkeypatch, capsys):
    lab: Lab = make_lab(change(X=1))
    lab.git("config", "user.name", "T")
    lab.git("config", "user.email", "t@example.org")
    monkeypatch.chdir(lab.root)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok      git: ") for line in lines)
    assert lines[-1] == "a campaign can start"


def test_a_committer_that_git_does_not_know_is_a_warning_with_the_command(
    make_lab, asked, monkeypatch, tmp_path
):
    lab: Lab = make_lab(change(X=1))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    status, told = asked(lab.root)
    assert status == 0
    assert told["git"]["status"] == "warning"
    assert "git config --global user.email" in told["git"]["remedy"]


def test_what_is_wrong_is_told_and_ends_with_status_1(make_lab, asked, tmp_path):
    lab: Lab = make_lab(change(X=1))
    lab.configure(task={**lab.settings["task"], "editable": ["absent.py"]})
    status, told = asked(lab.root)
    assert status == 1
    assert "absent.py" in told["git"]["seen"]
    lab.configure(executer={})
    status, told = asked(lab.root)
    assert status == 1
    assert "did you mean 'executor'" in told["settings"]["seen"]


def test_data_and_image_that_are_missing_are_told_with_the_command(make_lab, asked, tmp_path):
    lab: Lab = make_lab(change(X=1))
    del lab.settings["task"]
    lab.configure(
        data={"corpus": "climbmix", "folder": str(tmp_path / "data")},
        executor={"image": "night", "images": str(tmp_path / "images")},
    )
    status, told = asked(lab.root)
    assert status == 1
    assert "autoresearch prepare" in told["data"]["seen"]
    assert "autoresearch image build" in told["image"]["seen"]
    assert "attention" not in told  # the host's torch says nothing about the image


@pytest.mark.parametrize(("scale", "seconds"), [("cpu", 3600), ("h100", 300)])
def test_slurm_is_asked_for_the_time_that_a_first_run_may_take(
    tmp_path, monkeypatch, scale, seconds
):
    asked = []
    monkeypatch.setattr(trial, "settings", lambda *told: asked.append(told) or [])
    settings = {"executor": {"kind": "slurm"}, "data": {"scale": scale}}
    settings["branches"] = {"a": {"node": "n1"}, "b": {}}
    doctor.examine(config.parse(settings), tmp_path)
    ((_, _, limit_s, places),) = asked
    assert seconds < limit_s < seconds + 3600
    assert places == [{"node": "n1"}, {}]


def test_without_a_campaign_yaml_the_defaults_are_checked(tmp_path, asked):
    status, told = asked(tmp_path)
    assert status == 1  # no repository
    assert "git" in told["git"]["seen"]
    assert told["attention"]["status"] == "ok"
