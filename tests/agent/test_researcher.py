"""The factory, the sweep that stands in, outages, caps and the key."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import server as api
from server import Reply, Server, edit, step, submit
from tale import PATH, Tale, settings

from agent import keys, money
from agent.api import Model
from agent.conversation import Anthropic
from agent.researcher import Fallback, after, researcher
from agent.scripted import Scripted
from agent.sweep import Sweep
from jobs.errors import UserError
from jobs.model import Proposal, Unavailable, Usage, to_json


def longer(request: dict[str, Any]) -> Reply:
    if step(request) == 0:
        change = {"old_str": "warmdown=0.5", "new_str": "warmdown=0.75"}
        return Reply((edit(command="str_replace", path=PATH, **change),))
    return Reply((submit("longer"),))


def backed(server: Server, patience: float = 0.3, at_cap: str = "fallback", **changes: Any):
    """The model with the sweep behind it, at a test's pace."""
    given = settings(base_url=server.url, outage_patience=patience, **changes)
    return Fallback(Anthropic(given, None, Model(given, 0.5, 0.05)), Sweep(given), at_cap)


def ask(asked: Any, tale: Tale, branch: str = "main") -> Proposal | Unavailable:
    """As the controller asks."""
    reserve = asked.reserve(tale.state, branch)
    return asked.propose(tale.state, branch, tale.context(branch, reserve=reserve))


def test_the_factory_makes_each_kind(tmp_path):
    path = tmp_path / "edits.yaml"
    path.write_text("[]")
    assert isinstance(researcher(settings(kind="sweep")), Sweep)
    assert isinstance(researcher(settings(kind="scripted", script=str(path))), Scripted)
    assert isinstance(researcher(settings(kind="anthropic")), Fallback)
    assert isinstance(researcher(settings(kind="command", argv=("true",))), Fallback)
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
def test_in_an_outage_the_sweep_stands_in_within_the_patience_and_the_model_returns(fault):
    tale, broken = Tale(), True
    with Server(longer, lambda call: fault if broken else None) as server:
        asked = backed(server)
        began = time.monotonic()
        found = ask(asked, tale)
        assert time.monotonic() - began < 2.5
        assert isinstance(found, Proposal)
        assert found.researcher == "sweep"
        calls = len(server.calls)
        assert asked.why
        tale.accept(found, 1.7, "discard")
        assert ask(asked, tale).researcher == "sweep"  # at once: the model is not asked
        assert len(server.calls) == calls
        broken = False
        asked._not_before = after(-1)  # the time has come
        back = ask(asked, tale)
    assert back.description == "longer"
    assert asked.why == ""


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
    tale = Tale()
    with Server(longer, lambda call: fault) as server:
        asked = backed(server, patience=600.0)
        began = time.monotonic()
        found = ask(asked, tale)
    assert time.monotonic() - began < 2.0
    assert len(server.calls) == 1
    assert found.researcher == "sweep"
    assert words in asked.why
    assert any(words in doing for _, doing in tale.reports)


def test_an_outage_that_lasts_costs_the_patience_once():
    tale = Tale()
    with Server(longer, lambda call: "529") as server:
        asked = backed(server, patience=0.5)
        ask(asked, tale)
        calls = len(server.calls)
        time.sleep(0.5)
        asked._not_before = after(-1)
        began = time.monotonic()
        ask(asked, tale)
        assert len(server.calls) == calls + 1  # one look, then the sweep again
    assert time.monotonic() - began < 1.0


def test_money_spent_in_vain_is_booked_with_what_stood_in():
    tale = Tale()
    with Server(longer, lambda call: "clean-drop" if call < 9 else None) as server:
        found = ask(backed(server, patience=0.0), tale)
    assert found.researcher == "sweep"
    assert found.usage.dollars >= server.dollars > 0
    assert found.usage.estimated


def test_no_key_is_told_and_the_sweep_stands_in(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with Server(longer) as server:
        asked = backed(server)
        assert ask(asked, Tale()).researcher == "sweep"
    assert "no API key" in asked.why


def test_at_the_cap_the_sweep_goes_on_or_the_branch_ends():
    caps = SimpleNamespace(dollars=0.5, tokens=None)
    with Server(longer) as server:
        assert ask(backed(server, caps=caps), Tale()).researcher == "sweep"
        end = ask(backed(server, at_cap="end", caps=caps), Tale())
        assert isinstance(end, Unavailable)
        assert end.until is None
        assert "cap" in end.reason
        assert server.calls == []


def test_caps_hold_with_eight_branches_in_flight():
    branches = tuple(f"b{n}" for n in range(8))
    tale, cap = Tale(branches), 7.0
    campaign = SimpleNamespace(dollars=cap, tokens=None)
    with Server(longer) as server:
        given = settings(base_url=server.url)
        asked = Anthropic(given, campaign, Model(given, 0.5, 0.05))
        for number in range(40):
            reserves = dict.fromkeys(branches)
            for branch in branches:
                reserves[branch] = asked.reserve(tale.state, branch)
                if reserves[branch]:
                    request = {"proposal": f"{branch}-{number}", "branch": branch}
                    reserve = to_json(reserves[branch])
                    tale.put("proposal_requested", **request, reserve=reserve)
            assert tale.state.committed().dollars <= cap
            for branch in (branch for branch in branches if reserves[branch]):
                spent = {"usage": to_json(Usage(dollars=reserves[branch].dollars / 4))}
                request = {"proposal": f"{branch}-{number}"}
                tale.put("proposal_failed", **request, unavailable=spent)
    assert cap - money.proposal(given).dollars <= tale.state.spent.dollars <= cap


def test_caps_of_a_branch_and_in_tokens_hold_too():
    tale = Tale(("a", "b"))
    request = {"proposal": "p", "branch": "a", "reserve": to_json(Usage(output_tokens=10**6))}
    tale.put("proposal_requested", **request)
    asked = Anthropic(settings(caps=SimpleNamespace(dollars=None, tokens=1_500_000)))
    assert asked.reserve(tale.state, "a") is None
    assert asked.reserve(tale.state, "b") is not None
    both = Anthropic(settings(), SimpleNamespace(dollars=None, tokens=1_500_000))
    assert both.reserve(tale.state, "b") is None


def test_prices_can_be_configured_and_names_of_clouds_are_understood():
    own = SimpleNamespace(input=1, output=2, cache_write=3, cache_read=4)
    assert money.price(settings(model="mine", prices={"mine": own})) == (1, 2, 3, 4)
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
    assert "x" not in keys.without({"ANTHROPIC_API_KEY": "x", "PATH": "y"}).values()
