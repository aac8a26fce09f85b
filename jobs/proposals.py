"""Proposals from asking to an experiment's commit: researchers work in threads of their own."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from agent import edit
from agent.researcher import Context, Researcher, after
from jobs import evidence, lab, materialise, names, plan
from jobs.errors import UserError
from jobs.journal import Journal
from jobs.model import Experiment, Proposal, Unavailable, Usage, to_json
from jobs.records import Branch
from jobs.repository import Repository

NAP_S = 60.0  # before a researcher is asked again that names no time
AFTER_REFUSAL_S = 1.0
GRACE_S = 1.5  # for researchers to return at the end: those that wait or read do so at once


@dataclass(frozen=True)
class Asked:
    """A proposal under way in a thread of its own."""

    branch: str
    base: str
    parent: str | None  # the experiment that `base` is
    future: Future[Proposal | Unavailable]
    program_sha256: str
    stands_in: bool  # the understudy was asked


class Proposals:
    """Asks the researchers of a campaign and turns their answers into experiments.

    Args:
        researchers: of a branch; `understudy`: who steps in while that one is unavailable.
        stop: set when the campaign ends: researchers return within seconds.
    """

    def __init__(
        self,
        site: materialise.Site,
        journal: Journal,
        repository: Repository,
        researchers: Callable[[Branch], Researcher],
        understudy: Callable[[Branch], Researcher | None],
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._site, self._journal, self._repository = site, journal, repository
        self._researchers, self._understudy = researchers, understudy
        self._say, self._stop = say, stop
        self._pool = ThreadPoolExecutor(site.config.executor.slots, "researcher")
        self._asked: dict[str, Asked] = {}  # by proposal id
        # (branch, whether of its understudy) -> when it is asked again
        self._not_before: dict[tuple[str, bool], datetime] = {}
        self._exhausted: set[str] = set()  # branches whose researcher has nothing more to say
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()  # from the researchers' threads
        records = journal.state.experiments()
        self._known = {r.fingerprint: r.id for r in records if r.fingerprint}

    def close(self) -> None:
        """Let go of the threads; what they were asked for is booked by the next start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wind_up(self) -> None:
        """Take what still comes once `stop` is set: it says what it cost, a reserve is a guess."""
        wait([asked.future for asked in self._asked.values()], GRACE_S)
        self.take()

    @property
    def pending(self) -> bool:
        return bool(self._asked)

    @property
    def silent(self) -> bool:
        """Whether no researcher of an active branch has anything more to say."""
        active = {b.name for b in self._journal.state.branches.values() if b.active and b.head}
        return bool(active) and active <= self._exhausted

    def recover(self) -> None:
        """Book what died with the last controller."""
        for request in list(self._journal.state.requests.values()):
            usage = _at_most(request.reserve)
            lost = Unavailable("the controller ended while this was asked for", None, usage)
            self._journal.record(
                "proposal_failed", proposal=request.proposal, unavailable=to_json(lost)
            )

    def files(self, commit: str) -> dict[str, str]:
        """The editable files of a commit."""
        paths = self._site.config.task.editable
        return {path: self._repository.read(commit, path) for path in paths}

    def program(self, branch: str) -> str:
        """The branch's program.md as it reads now: an edit in mid-campaign counts from here on.

        Raises UserError: it cannot be read.
        """
        named = self._journal.state.branch(branch).settings.get("program", "program.md")
        path: Path = self._repository.root / named
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{branch}: its program {path} cannot be read: {error}") from None

    # -- asking -----------------------------------------------------------------------------------

    def ask(self) -> None:
        """Baselines where there is none yet; a proposal for each free slot."""
        state, config = self._journal.state, self._site.config
        for branch in list(plan.lacking_baseline(state, config)):
            self._ask_safely(branch, self._propose_baseline)
        now, branches = datetime.now(UTC), self._journal.state.branches
        resting = {who for who, until in self._not_before.items() if now < until}
        napping = {b for b, stands_in in resting if not stands_in}
        mute = self._exhausted | {
            b for b in napping if (b, True) in resting or self._understudy(branches[b]) is None
        }
        for branch in list(plan.openings(self._journal.state, config, mute)):
            self._ask_safely(branch, partial(self._request, napping=branch in napping))

    def _ask_safely(self, branch: str, act: Callable[[str], None]) -> None:
        """One branch's trouble (its program.md is gone) pauses that branch, not the others."""
        try:
            act(branch)
        except UserError as error:
            self._say(f"{branch} is paused: {error}")
            self._journal.record("branch_paused", branch=branch, reason=str(error))

    def _propose_baseline(self, branch: str) -> None:
        settings = self._journal.state.branch(branch).settings
        start = settings["start_commit"] or self._repository.start(settings["start"])
        program = self.program(branch)
        self.accept(None, Proposal(branch, start, {}, "baseline", "none"), None, _sha256(program))

    def _request(self, branch: str, napping: bool) -> None:
        state, program = self._journal.state, self.program(branch)
        base, parent = state.branch(branch).head_commit, state.branch(branch).head
        assert base is not None  # plan.openings names branches with a head only
        researcher = (self._understudy if napping else self._researchers)(state.branch(branch))
        assert researcher is not None  # napping without an understudy is mute
        context = self._context(branch, base, program)
        reserve = getattr(researcher, "reserve", lambda *_: Usage())(state, branch)
        proposal = f"p{state.events:06d}"
        self._journal.record(
            "proposal_requested",
            proposal=proposal,
            branch=branch,
            base=base,
            slot=len(self._asked),
            reserve=to_json(reserve),
        )
        future = self._pool.submit(researcher.propose, self._journal.state, branch, context)
        self._asked[proposal] = Asked(branch, base, parent, future, _sha256(program), napping)

    def _context(self, branch: str, base: str, program: str) -> Context:
        config, state = self._site.config, self._journal.state
        settings = config.branches.get(branch)
        waiting = sum(request.branch == branch for request in state.requests.values())
        return Context(
            base=base,
            files=self.files(base),
            program=program,
            scale=config.data.scale,
            seed=(settings or config).agent.seed,
            number=state.branch(branch).proposals + waiting,
            metric=config.task.metric,
            direction="higher" if config.task.direction == "maximise" else "lower",
            readable=_readable(config.task.kind),
            known=dict(self._known),
            records=evidence.Evidence(
                state, self._repository, self._site.campaign_dir / "runs", config.task.editable
            ),
            say=lambda line: self._heard.put(f"{branch}: {line}"),
            stop=self._stop,
        )

    # -- answers ----------------------------------------------------------------------------------

    def take(self) -> None:
        """The answers that have come: experiments of proposals, a record of everything else."""
        while not self._heard.empty():
            self._say(self._heard.get())
        for request, asked in list(self._asked.items()):
            if not asked.future.done():
                continue
            del self._asked[request]
            answer = self._answer(request, asked)
            if isinstance(answer, Proposal):
                self.accept(request, answer, asked.parent, asked.program_sha256)
            else:
                self._unavailable(request, asked, answer)

    def _answer(self, request: str, asked: Asked) -> Proposal | Unavailable:
        usage = _at_most(self._journal.state.requests[request].reserve)
        try:
            answer = asked.future.result()
            usage = answer.usage
            wrong = self._refusal(asked, answer) if isinstance(answer, Proposal) else None
        except Exception as error:  # a researcher must not raise; no GPU may idle for it
            words = f"the researcher failed: {type(error).__name__}: {error}"[:500]
            return Unavailable(words, after(NAP_S), usage)
        return Unavailable(f"refused: {wrong}", after(AFTER_REFUSAL_S), usage) if wrong else answer

    def _refusal(self, asked: Asked, proposal: Proposal) -> str | None:
        """The controller's own check, whoever proposed: the right base, allowed files, an edit."""
        if (proposal.branch, proposal.base) != (asked.branch, asked.base):
            return "it was made for another branch or commit than it was asked for"
        if outside := set(proposal.files) - set(self._site.config.task.editable):
            return f"it edits {', '.join(sorted(outside))}, which is not editable"
        present = self.files(asked.base)
        if all(present[path] == text for path, text in proposal.files.items()):
            return "it changes nothing"
        mark = edit.fingerprint({**present, **proposal.files})
        if other := self._known.get(mark):  # a neighbour had the same idea meanwhile
            return f"it is the program of {other}"
        return None

    def _unavailable(self, request: str, asked: Asked, answer: Unavailable) -> None:
        branch = asked.branch
        self._journal.record("proposal_failed", proposal=request, unavailable=to_json(answer))
        if self._stop.is_set():
            return
        if answer.until is None and not asked.stands_in:
            self._exhausted.add(branch)
        else:  # an understudy at its end may find something once the history has grown
            until = datetime.fromisoformat(answer.until or after(NAP_S))
            self._not_before[branch, asked.stands_in] = until
        self._say(f"{branch}: no proposal now: {answer.reason}")

    def accept(
        self,
        request: str | None,
        proposal: Proposal,
        parent: str | None,
        program_sha256: str,
        recorded: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """From a proposal to an experiment: objects, the record, the ref, in this order.

        Args:
            parent: the experiment that it was made from; None: it is its branch's baseline.
            recorded: events that belong before it in the ledger, in one write with it.
        """
        commit = self._commit(proposal, parent, program_sha256)
        before = self.files(proposal.base)
        counts = [edit.line_counts(before[p], text) for p, text in proposal.files.items()]
        experiment = Experiment(
            id=self._journal.state.next_id,
            branch=proposal.branch,
            commit=commit,
            base=proposal.base,
            parent=parent,
            description=proposal.description,
            researcher=proposal.researcher,
            program_sha256=program_sha256,
            hypothesis=proposal.hypothesis,
            tags=proposal.tags,
            lines_added=sum(added for added, _ in counts),
            lines_removed=sum(removed for _, removed in counts),
            usage=proposal.usage,
            rebased_from=proposal.rebased_from,
        )
        mark = edit.fingerprint({**before, **proposal.files})
        proposed = {"proposal": request, "experiment": to_json(experiment), "fingerprint": mark}
        self._journal.record_all([*recorded, ("proposed", proposed)])
        self._known[mark] = experiment.id
        ref = names.attempt_ref(self._site.config.campaign, experiment.id)
        self._repository.point(ref, commit, None)

    def _commit(self, proposal: Proposal, parent: str | None, program_sha256: str) -> str:
        message = "\n\n".join(filter(None, (proposal.description, proposal.hypothesis)))
        own = {
            "Branch": proposal.branch,
            "Parent-Experiment": parent,
            "Rebased-From": proposal.rebased_from,
            "Researcher": proposal.researcher,
            "Program-SHA256": program_sha256,
        }
        trailers = materialise.trailers(self._site, own)
        return self._repository.commit(proposal.base, proposal.files, message, trailers)

    def carry_over(
        self,
        name: str,
        into: str,
        word: str,
        recorded: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> str | None:
        """Propose an experiment's edit again on the present head of a branch, by a 3-way merge.

        Args:
            word: "rebased" or "adopted", for the description.
            recorded: as `accept` takes it.

        Returns:
            Why there is no experiment of it; None: there is, and `recorded` in the ledger.

        Raises:
            UserError: no such experiment or branch, a branch without a head.
        """
        state = self._journal.state
        try:
            source, target = state.record(name), state.branch(into)
        except KeyError as error:
            raise UserError(f"there is no {error} in this campaign") from None
        if (head := target.head_commit) is None:
            raise UserError(f"branch {into} has no head yet")
        merged = self._merged(source.base, source.commit, head)
        if not merged:
            conflict = f"{name} does not merge with the head of {into}: left as it is"
            reason = conflict if merged is None else f"{name} is in {into} already"
            self._say(reason)
            return reason
        origin = state.experiment(name)
        proposal = Proposal(
            branch=into,
            base=head,
            files=merged,
            description=f"{word} {name}: {source.description}",
            researcher=origin.researcher,
            hypothesis=origin.hypothesis,
            tags=origin.tags,
            rebased_from=name,
        )
        self.accept(None, proposal, target.head, origin.program_sha256, recorded)
        return None

    def _merged(self, base: str, theirs: str, ours: str) -> Mapping[str, str] | None:
        """The files that a merge changes against `ours`; None on a conflict."""
        old, new, head = self.files(base), self.files(theirs), self.files(ours)
        texts = {p: self._repository.merge_file(old[p], head[p], new[p]) for p in old}
        if any(text is None for text in texts.values()):
            return None
        return {p: text for p, text in texts.items() if text is not None and text != head[p]}


def _readable(kind: str) -> dict[str, str]:
    """What a researcher may read besides the program; a general task knows no prepare.py."""
    path = lab.TRAINER / "prepare.py"
    return {} if kind == "general" else {f"trainer/{path.name}": path.read_text()}


def _at_most(reserve: Usage) -> Usage:
    """What is booked where nobody knows what was spent."""
    return replace(reserve, estimated=bool(reserve.dollars))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
