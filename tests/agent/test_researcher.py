"""The factory, the sweep that stands in, outages, caps and the key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import anthropic
import pytest
import server as api
from server import Reply, Server, edit, step, submit
from tale import PATH, Tale, settings

from agent import keys, money
from agent.api import Model, failure
from agent.command import Command
from agent.conversation import Anthropic
from agent.researcher import after, researcher
from agent.scripted import Scripted
from agent.sweep import Sweep
from jobs.errors import UserError
from jobs.model import Proposal, Unavailable, Usage, to_json
from jobs.settings import Prices


def longer(request: dict[str, Any]) -> Reply:
    if step(request) == 0:
        change = {"old_str": "warmdown=0.5", "new_str": "warmdown=0.75"}
        return Reply((edit(command="str_replace", path=PATH, **change),))
    return Reply((submit("longer"),))


def model(server: Server, patience: float = 0.3, campaign: Any = None, **changes: Any) -> Anthropic:
    """The model's researcher, at a test's pace."""
    given = settings(base_url=server.url, outage_patience=patience, **changes)
    return Anthropic(given, campaign, Model(given, 0.5, 0.05))


def ask(asked: Any, tale: Tale, branch: str = "main") -> Proposal | Unavailable:
    return asked.propose(tale.state, branch, tale.context(branch))


def test_the_factory_makes_each_kind(tmp_path):
    path = tmp_path / "edits.yaml"
    path.write_text("[]")
    assert isinstance(researcher(settings(kind="sweep")), Sweep)
    assert isinstance(researcher(settings(kind="scripted", script=str(path))), Scripted)
    assert isinstance(researcher(settings(kind="anthropic")), Anthropic)
    assert isinstance(researcher(settings(kind="command", argv=("true",))), Command)
    with pytest.raises(UserError, match="not on PATH"):
        researcher(settings(kind="command", argv=("no-such-program",)))
    with pytest.raises(UserError, match=r"agent\.prices"):
        researcher(settings(kind="anthropic", model="claude-unheard-of"))


def test_the_protocol_costs_no_heavy_import():
    script = "import sys, agent.researcher; print([m for m in ('optuna', 'anthropic', 'torch') "
    script += "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("fault", ["529", "429-absurd", "reset", "hang"])
def test_an_outage_is_told_within_the_patience_and_the_model_returns(fault):
    tale, broken = Tale(), True
    with Server(longer, lambda call: fault if broken else None) as server:
        asked = model(server)
        began = time.monotonic()
        found = ask(asked, tale)
        assert time.monotonic() - began < 2.5
        assert isinstance(found, Unavailable)
        assert after(60) < found.until < after(4000)
        assert found.usage.dollars >= server.dollars
        broken = False
        assert ask(asked, tale).description == "longer"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "does not accept the key"),
        ("402", "spending limit"),
        ("spend", "spending limit"),
        ("400", "refuses the request"),
    ],
)
def test_what_a_person_must_end_stops_at_once_in_words(fault, words):
    with Server(longer, lambda call: fault) as server:
        began = time.monotonic()
        found = ask(model(server, patience=600.0), Tale())
    assert time.monotonic() - began < 2.0
    assert len(server.calls) == 1
    assert isinstance(found, Unavailable)
    assert words in found.reason
    assert found.until > after(300)
    assert found.usage == Usage()


def test_an_outage_that_lasts_costs_the_patience_once():
    tale = Tale()
    with Server(longer, lambda call: "529") as server:
        asked = model(server, patience=0.5)
        ask(asked, tale)
        calls = len(server.calls)
        time.sleep(0.5)
        began = time.monotonic()
        ask(asked, tale)
        assert len(server.calls) == calls + 1  # one look
    assert time.monotonic() - began < 1.0


def test_a_retry_after_beyond_the_patience_is_not_waited_for():
    with Server(longer, lambda call: "429-absurd") as server:
        began = time.monotonic()
        found = ask(model(server, patience=600.0), Tale())
    assert time.monotonic() - began < 2.0
    assert after(3000) < found.until < after(4000)  # two weeks were asked for


def test_a_wait_is_reported_before_it_begins():
    tale = Tale()
    with Server(longer, lambda call: "529" if call == 0 else None) as server:
        ask(model(server, patience=20.0), tale)
    assert len(tale.said) == 1
    assert tale.said[0].startswith("waiting 0 s: the API is not available (529")


def test_no_key_is_told_without_a_call(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with Server(longer) as server:
        found = ask(model(server), Tale())
        assert server.calls == []
    assert "no API key" in found.reason


def test_a_key_that_was_replaced_is_read_at_the_next_proposal(tmp_path):
    path = tmp_path / "key"
    path.write_text("sk-ant-old-one")
    path.chmod(0o600)
    tale = Tale()
    with Server(longer, lambda call: "401" if call == 0 else None) as server:
        asked = model(server, key_file=str(path))
        assert "[key]" in ask(asked, tale).reason
        path.write_text("sk-ant-new-one")
        assert isinstance(ask(asked, tale), Proposal)
    assert "sk-ant-new-one" in str(server.calls[-1].headers)


def test_at_the_cap_it_ends_or_is_asked_again_as_configured():
    caps = SimpleNamespace(dollars=0.5, tokens=None)
    tale = Tale()
    tale.put("proposal_requested", proposal="p", branch="main", reserve={"dollars": 0.6})
    with Server(longer) as server:
        again = ask(model(server, caps=caps), tale)
        end = ask(model(server, caps=caps, at_cap="end"), tale)
        assert server.calls == []
    assert "0.5 dollars leaves no room" in again.reason
    assert again.until is not None
    assert end.until is None


def test_a_cap_that_is_only_reserved_ends_no_branch():
    caps = SimpleNamespace(dollars=12.0, tokens=None)
    tale = Tale()
    tale.put("proposal_requested", proposal="p", branch="main", reserve={"dollars": 12.5})
    with Server(longer) as server:
        asked = model(server, caps=caps, at_cap="end")
        assert ask(asked, tale).until is not None
        tale.put("proposal_failed", proposal="p", unavailable={"usage": {"dollars": 11.9}})
        reserve = to_json(asked.reserve(tale.state, "main"))
        tale.put("proposal_requested", proposal="q", branch="main", reserve=reserve)
        assert ask(asked, tale).until is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ftp://127.0.0.1"])
def test_what_is_wrong_here_is_told_at_once_and_costs_nothing(address):
    given = settings(base_url=address, outage_patience=600.0)
    found = ask(Anthropic(given, None, Model(given, 0.5, 0.05)), Tale())
    assert "cannot be sent from here" in found.reason
    assert found.usage == Usage()


def test_faults_of_this_side_are_no_broken_connection():
    for error in (ImportError("no boto3"), anthropic.AnthropicError("no region")):
        failed = failure(error)
        assert (failed.passing, failed.sent) == (False, False)
    assert failure(ConnectionError("reset")).sent


def test_caps_hold_with_eight_branches_in_flight():
    branches = tuple(f"b{n}" for n in range(8))
    tale, cap = Tale(branches), 14.0
    spent, refused = {"usage": to_json(Usage(dollars=0.7))}, 0
    with Server(longer) as server:
        asked = model(server, campaign=SimpleNamespace(dollars=cap, tokens=None))
        most = asked.reserve(tale.state, "b0").dollars
        for _ in range(20):
            going = []
            for branch in branches:
                reserve = to_json(asked.reserve(tale.state, branch))
                tale.put("proposal_requested", proposal=branch, branch=branch, reserve=reserve)
                found = money.over_cap(tale.state, branch, settings().caps, asked._caps)
                refused += bool(found)
                if found:
                    assert isinstance(ask(asked, tale, branch), Unavailable)
                    tale.put("proposal_failed", proposal=branch, unavailable={})
                else:
                    going.append(branch)
            assert tale.state.committed().dollars <= cap
            for branch in going:
                tale.put("proposal_failed", proposal=branch, unavailable=spent)
        assert server.calls == []
    assert refused
    assert cap - most <= tale.state.spent.dollars <= cap


def test_caps_of_a_branch_and_in_tokens_hold_too():
    tale = Tale(("a", "b"))
    reserve = to_json(Usage(output_tokens=10**6))
    tale.put("proposal_requested", proposal="p", branch="a", reserve=reserve)
    caps, none = SimpleNamespace(dollars=None, tokens=999_999), settings().caps
    assert "999,999 tokens" in money.over_cap(tale.state, "a", caps, None)
    assert money.over_cap(tale.state, "b", caps, None) is None
    assert "999,999 tokens" in money.over_cap(tale.state, "b", none, caps)


def test_prices_can_be_configured_and_names_of_clouds_are_understood():
    own = Prices(input=1, output=2, cache_write=3, cache_read=4)
    assert money.price(settings(model="mine", prices={"mine": own})) == own
    bedrock = money.price(settings(model="us.anthropic.claude-opus-5-5"))
    assert bedrock == money.PRICES["claude-opus-5-5"]
    with pytest.raises(UserError, match="no price is known"):
        money.price(settings(model="x"))


def test_the_key_comes_from_a_private_file_or_the_environment(tmp_path):
    path = tmp_path / "key"
    path.write_text(" secret-key \n")
    path.chmod(0o600)
    assert keys.load(str(path)) == {"api_key": "secret-key"}
    path.chmod(0o644)
    with pytest.raises(keys.KeyUnusable, match="chmod 600"):
        keys.load(str(path))
    assert keys.load(None, {"ANTHROPIC_AUTH_TOKEN": "t0ken"}) == {"auth_token": "t0ken"}
    with pytest.raises(keys.KeyUnusable, match="ANTHROPIC_API_KEY"):
        keys.load(None, {})
    with pytest.raises(keys.KeyUnusable, match="could not be read"):
        keys.load(str(tmp_path / "absent"))


def test_keys_are_scrubbed_from_texts_and_environments():
    text = f"Authorization: Bearer {api.KEY} and my-own-secret"
    assert keys.scrub(text, "my-own-secret") == "Authorization: [key] and [key]"


def test_what_a_command_starts_inherits_no_key_while_the_command_itself_has_it(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of-nobody-else")
    told = [sys.executable, "-c", "import os; print(sorted(os.environ))"]
    with keys.taken():
        assert keys.load(None) == {"api_key": "of-nobody-else"}
        inherited = subprocess.run(told, capture_output=True, text=True, check=True).stdout
    assert "PATH" in inherited
    assert "ANTHROPIC" not in inherited
    assert keys.found(os.environ) == {"ANTHROPIC_API_KEY": "of-nobody-else"}


@pytest.mark.parametrize("provider", ["bedrock", "vertex"])
def test_a_cloud_that_is_not_set_up_is_told_in_words(monkeypatch, provider):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "CLOUD_ML_REGION"):
        monkeypatch.delenv(name, raising=False)
    asked = researcher(settings(kind="anthropic", provider=provider))
    found = ask(asked, Tale())
    assert isinstance(found, Unavailable)
    assert re.search("region|extra|import|install", found.reason), found.reason
    assert found.usage == Usage()
