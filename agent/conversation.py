"""Owns the language-model researcher: one fresh conversation for each proposal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent import brief, money, program
from agent.api import Model, Stopped
from agent.researcher import Context, after
from agent.workbench import TOOLS, Refused, Submitted, Workbench
from jobs.history import add_usage
from jobs.model import Proposal, Unavailable, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobs.history import State

REFUSALS = 3  # of one submission, then the conversation ends
NUDGES = 3  # replies without a tool call, or cut off
CALLS = 40  # of one conversation
RETRY_S = 5.0  # until the next conversation after one that came to nothing

_NO_TOOL = (
    "Your reply called no tool, so nothing happened. Edit the program with "
    "str_replace_based_edit_tool and hand it in with submit."
)
_CUT = (
    "Your reply was cut off at the limit of {limit} tokens, so nothing in it was done. "
    "Make smaller edits: str_replace instead of create, one at a time."
)
_HOUR = {"type": "ephemeral", "ttl": "1h"}  # experiments outlast the ordinary five minutes


class Anthropic:
    """Proposes by the Messages API: reads, edits a scratch copy, submits what passes the checks."""

    def __init__(self, settings: Any, campaign_caps: Any = None, model: Model | None = None):
        """`campaign_caps`: dollars and tokens for all branches together; None: no such cap.

        Raises UserError: no price is known for the model.
        """
        self._settings, self._caps = settings, campaign_caps
        self._model = model or Model(settings)
        self._claimed: set[str] = set()  # crashes that a conversation is mending now
        self._lock = threading.Lock()

    def reserve(self, state: State, branch: str) -> Usage:
        return money.proposal(self._settings)

    def propose(self, state: State, branch: str, context: Context) -> Proposal | Unavailable:
        reserve = self.reserve(state, branch)
        if capped := money.at_cap(state, branch, self._settings, self._caps, reserve):
            return capped
        with self._repairing(state, branch, context) as fix:
            talk = _Conversation(self._model, self._settings, state, branch, context, fix)
            try:
                submitted = talk.hold()
            except (Stopped, program.ProgramError) as end:
                until = end.until if isinstance(end, Stopped) else after(30.0)
                return Unavailable(str(end), until, talk.spent)
            trespasses = dict.fromkeys(talk.bench.trespasses)
            return Proposal(
                branch=branch,
                base=context.base,
                files=submitted.files,
                description=submitted.description,
                researcher=f"anthropic:{self._settings.model}",
                hypothesis=submitted.hypothesis,
                tags=(
                    brief.MODEL,
                    *submitted.tags,
                    *([f"repair:{fix}"] if fix else []),
                    *(f"refused:{path}" for path in list(trespasses)[:3]),
                ),
                usage=talk.spent,
            )

    @contextmanager
    def _repairing(self, state: State, branch: str, context: Context) -> Iterator[str | None]:
        """A crash to mend that no other slot mends at the same time."""
        found = brief.crashed(state, branch, context.base, self._settings.fix_attempts)
        with self._lock:
            found = None if found in self._claimed else found
            if found:
                self._claimed.add(found)
        try:
            yield found
        finally:
            with self._lock:
                self._claimed.discard(found or "")


class _Conversation:
    """The tool loop of one proposal."""

    def __init__(
        self,
        model: Model,
        settings: Any,
        state: State,
        branch: str,
        context: Context,
        fix: str | None,
    ) -> None:
        self._model, self._settings, self._context = model, settings, context
        self._deadline = time.monotonic() + settings.deadline
        crashed = context.records.files(fix) if fix else {}
        start = crashed if set(crashed) == set(context.files) else context.files
        self.bench = Workbench(state, context, start)
        self.spent = Usage()
        self._opening: Callable[[], str] = lambda: brief.digest(state, branch, context, fix)
        self._nudges = 0

    def hold(self) -> Submitted:
        """Talks until something is submitted.

        Raises Stopped: it came to nothing; ProgramError: program.md cannot be read.
        """
        system = [{"type": "text", "text": text} for text in brief.system(self._context)]
        for block in system:
            block["cache_control"] = _HOUR  # type: ignore[assignment]
        messages: list[dict[str, Any]] = [_user(_block(self._opening()))]
        for _ in range(CALLS):
            message = self._ask({"system": system, "messages": _with_breakpoint(messages)})
            self._answer(message, messages)
            if self.bench.submitted:
                return self.bench.submitted
            if self.bench.refusals > REFUSALS or self._nudges > NUDGES:
                break
        raise Stopped(f"the model submitted nothing that could be run: {self._last}", _soon())

    _last = "no submission"

    def _ask(self, parts: Mapping[str, Any]) -> Any:
        request = {
            "model": self._settings.model,
            "max_tokens": self._settings.max_tokens,
            "tools": list(TOOLS),
            "thinking": {"type": "adaptive"},
            "output_config": {"effort": self._settings.effort},
            **parts,
        }
        books = self._afford, self._spend
        reply = self._model.ask(request, *books, self._context, self._deadline)
        if not reply.usage.cache_write_tokens and not reply.usage.cache_read_tokens:
            self._context.say("the API cached nothing: is the prefix too short?")
        return reply.message

    def _afford(self, request: Mapping[str, Any]) -> None:
        """Caps count what was reserved: no proposal may cost more than that. Raises Stopped."""
        size = len(str(request).encode())
        most = money.bound(self._model.price, size, self._settings.max_tokens)
        reserve = money.proposal(self._settings)
        total = add_usage(self.spent, most)
        if size > money.LARGEST_REQUEST:
            raise Stopped("the conversation grew too long", _soon())
        if total.dollars > reserve.dollars or money.tokens(total) > money.tokens(reserve):
            raise Stopped("the conversation used up what was set aside for it", _soon())

    def _spend(self, usage: Usage) -> None:
        self.spent = add_usage(self.spent, usage)

    def _answer(self, message: Any, messages: list[dict[str, Any]]) -> None:
        """Does what a complete reply asks for, and appends both sides to the conversation."""
        if message.stop_reason in ("refusal", "model_context_window_exceeded"):
            raise Stopped(f"the model stopped with {message.stop_reason}", _soon())
        if message.stop_reason == "max_tokens":
            self._nudge(messages, _CUT.format(limit=self._settings.max_tokens))
            return
        content = [_echo(block) for block in message.content]
        content = [block for block in content if block.get("text") != ""]
        if content:
            messages.append({"role": "assistant", "content": content})
        calls = [block for block in message.content if block.type == "tool_use"]
        if calls:
            messages.append(_user(*(self._use(call) for call in calls)))
        elif message.stop_reason != "pause_turn":
            self._nudge(messages, _NO_TOOL)

    def _nudge(self, messages: list[dict[str, Any]], text: str) -> None:
        self._nudges += 1
        self._last = text
        if messages[-1]["role"] == "user":
            messages[-1]["content"].append(_block(text))
        else:
            messages.append(_user(_block(text)))

    def _use(self, call: Any) -> dict[str, Any]:
        answer: dict[str, Any] = {"type": "tool_result", "tool_use_id": call.id}
        if self.bench.submitted:
            return {**answer, "content": "submitted already", "is_error": True}
        try:
            return {**answer, "content": self.bench.use(call.name, call.input)}
        except Refused as refused:
            self._last = str(refused)
            return {**answer, "content": str(refused), "is_error": True}


def _soon() -> str:
    return after(RETRY_S)


def _block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def _echo(block: Any) -> dict[str, Any]:
    """A block of a reply as it goes back: thinking verbatim, nothing that the SDK added."""
    fields = {
        "text": ("text",),
        "thinking": ("thinking", "signature"),
        "redacted_thinking": ("data",),
        "tool_use": ("id", "name", "input"),
    }
    names = fields.get(block.type)
    if names is None:
        return dict(block.model_dump(exclude_none=True))
    return {"type": block.type, **{name: getattr(block, name) for name in names}}


def _with_breakpoint(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its end marked for the cache; marks must not pile up (4 allowed)."""
    last = messages[-1]
    *before, end = last["content"]
    marked = {**last, "content": [*before, {**end, "cache_control": _HOUR}]}
    return [*messages[:-1], marked]
