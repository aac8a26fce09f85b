"""The referee: its clock with fake times, its sums, and its feed and score over a real socket."""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import SCALE, T, data_folder

import rows
from referee import folder as shared
from referee import protocol
from referee.client import Session
from referee.clock import Clock, Terms
from referee.protocol import Refused
from referee.score import NotFinite, Scoring

# --- the clock ------------------------------------------------------------------------------------


def wall(amount=100.0, free=60.0, warmup=11):
    return Clock(Terms("wall", amount, free, warmup), begun=1000.0)


def test_warm_up_is_free_and_the_clock_starts_with_the_first_batch_after_it():
    clock = wall()
    assert all(clock.hand_out(1000 + i, 1) for i in range(11))
    assert clock.started is None
    assert clock.progress(1050) == 0
    assert clock.hand_out(1050, 1)
    assert clock.progress(1050) == 0
    assert clock.progress(1075) == 0.25
    assert (clock.served, clock.trained) == (12, 1)


def test_a_huge_first_batch_is_no_way_to_train_for_free():
    clock = wall()
    assert clock.hand_out(1000, 10_000)
    assert clock.started == 1000


def test_start_up_beyond_the_free_seconds_is_charged_to_the_budget():
    clock = wall()
    clock.hand_out(1000, 11)
    assert clock.progress(1090) == 0.3  # also while the warm-up lasts
    assert clock.hand_out(1090, 1)
    assert clock.charged(1090) == 30
    assert not clock.hand_out(1160, 1)
    assert clock.closed == 1160
    assert clock.report(1200)["training_seconds"] == 70


def test_a_program_that_only_warms_up_runs_out_of_budget():
    clock = wall()
    assert clock.hand_out(1159, 11)
    assert not clock.hand_out(1161, 1)
    assert clock.progress(1161) == 1
    assert clock.overrun(1170) == 10


def test_scoring_must_be_asked_for_within_a_hundredth_and_at_least_a_second():
    for amount, window in ((20.0, 1.0), (300.0, 3.0)):
        clock = wall(amount)
        clock.hand_out(1010, 12)
        end = 1010 + amount
        assert not clock.is_late(end + window)
        assert clock.is_late(end + window + 0.01)
        assert clock.ask_score(end + window) == pytest.approx(window)
        assert clock.report(end + 9)["overrun_seconds"] == pytest.approx(window)


def test_scoring_early_closes_the_feed():
    clock = wall()
    clock.hand_out(1010, 12)
    assert clock.ask_score(1050) == 0
    assert not clock.hand_out(1051, 1)
    assert clock.report(1060)["training_seconds"] == 40
    assert clock.report(1060)["closed_by"] == "score"


def test_a_token_budget_hands_out_no_token_more_and_knows_its_last_batch():
    clock = Clock(Terms("tokens", 100, 60, 11), begun=0.0)
    clock.hand_out(1, 11)
    shares = []
    while clock.hand_out(2, 30):
        shares.append(clock.progress(2))
    assert shares == [0.3, 0.6, 1.0]  # a fourth would not fit: no step on a repeated batch
    assert clock.trained == 90
    assert clock.progress(3) == 1
    assert clock.overrun(1e9) == 0
    assert not clock.is_late(1e9)


def test_a_wall_ceiling_closes_the_feed_of_a_token_budget():
    clock = Clock(Terms("tokens", 1000, 10, 0, ceiling_s=60), begun=0.0)
    assert clock.hand_out(20, 1)  # ten seconds over the free ones
    assert clock.hand_out(69, 1)
    assert not clock.hand_out(71, 1)
    assert clock.closed_by == "wall"
    assert not clock.is_late(1000)


def test_time_budget_leaves_room_for_a_loop_that_times_itself():
    assert Terms("wall", 300, 60, 0).time_budget == pytest.approx(294)
    assert Terms("tokens", 300, 60, 0).time_budget == math.inf
    assert Terms("tokens", 300, 60, 0, 90).time_budget == 90


# --- the sum --------------------------------------------------------------------------------------


def scoring(batch, count=10, order=None):
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 50, (count, 9)).astype("<u2")
    lengths = np.arange(50) % 4
    order = rng.permutation(count) if order is None else order
    return Scoring(shown, lengths, lengths * 2, batch, order), shown, lengths


def losses_of(shown):
    return (shown[:, 1:] * 0.37 + shown[:, :-1] * 0.011).astype("<f4")


@pytest.mark.parametrize("batch", [1, 3, 8, 10, 67])
def test_every_batch_size_scores_the_same_rows_to_the_same_number(batch):
    one, shown, lengths = scoring(batch)
    for index in range(one.batches):
        assert one.rows(index).shape == (batch, 9)
        one.take(index, losses_of(one.rows(index)))
    result, counted = one.result(), lengths[shown[:, 1:]]
    nats = losses_of(shown).astype(float)[counted > 0].sum()
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / counted.sum(), rel=1e-12)
    assert result["val_bpb_upstream"] == pytest.approx(result["val_bpb"] / 2)
    assert result["rows_scored"] == 10


def test_answers_that_are_no_losses_are_told_apart():
    one, _, _ = scoring(4)
    good = losses_of(one.rows(0))
    one.take(0, np.where(good > 5, good, np.float32(-1e-7)))  # rounding
    with pytest.raises(ValueError, match="negative"):
        one.take(0, good - 100)
    for bad in (np.nan, np.inf):
        with pytest.raises(NotFinite):
            one.take(0, np.where(good > 5, np.float32(bad), good))


# --- over a real socket ---------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def data():
    data_folder()
    yield
    runs.remove_data()


@pytest.fixture
def session(monkeypatch):
    """Opens sessions as `python train.py` alone does; closes them."""
    with contextlib.ExitStack() as stack:

        def opened(seed=0) -> Session:
            monkeypatch.delenv("AUTORESEARCH_REFEREE", raising=False)
            monkeypatch.setenv("AUTORESEARCH_DATA", str(data_folder()))
            monkeypatch.setenv("AUTORESEARCH_SEED", str(seed))
            one = Session.open()
            stack.callback(one.close)
            return one

        yield opened


def expected(count, seed=0, length=T, position=0):
    stream = rows.RowStream(data_folder(), "train", length, seed)
    return stream.take(count, position)[0]


def test_facts_of_the_run_come_with_the_welcome(session):
    one = session(seed=3)
    assert (one.max_seq_len, one.seed, one.scale, one.progress) == (T, 3, "cpu", 0)
    assert one.time_budget == math.inf
    assert (one.folder / "tokenizer.json").exists()


@pytest.mark.parametrize("seed", [0, 5])
def test_the_feed_is_the_seeds_stream_whatever_the_batch_size(session, seed):
    one = session(seed)
    got = [one.next(b, T)[0].copy() for b in (3, 8, 8, 1, 20, 3)]
    assert np.array_equal(np.concatenate(got), expected(43, seed))


def test_a_shorter_length_goes_on_at_the_same_share_of_the_stream(session):
    one = session()
    one.next(100, T)
    short, _ = one.next(4, T // 2)
    longer = rows.RowStream(data_folder(), "train", T, 0)
    shorter = rows.RowStream(data_folder(), "train", T // 2, 0)
    begin = shorter.follow(longer, 100)
    assert begin == pytest.approx(100 * shorter.rows / longer.rows, abs=1)
    assert np.array_equal(short, expected(4, 0, T // 2, begin))
    assert one.next(2, T)[0].shape == (2, T + 1)


def test_a_view_stays_until_the_call_after_the_next_one(session):
    one = session()
    views = []
    for count, length in ((8, T), (8, T), (8, T), (4, T), (8, T // 2), (8, T), (4, T), (8, T)):
        view = one.next(count, length)[0]
        time.sleep(0.05)  # the referee writes ahead meanwhile
        views.append((view, view.copy()))
        assert all(np.array_equal(shown, kept) for shown, kept in views[-2:])
    assert view.base is not None


def test_a_thread_that_fetches_and_one_that_logs_take_turns(session):
    one = session()
    with ThreadPoolExecutor() as pool:
        batches = pool.submit(lambda: [one.next(1, T)[0].copy() for _ in range(200)])
        logs = pool.submit(lambda: [one.log({"step": i}) for i in range(400)])
        logs.result()
        assert np.array_equal(np.concatenate(batches.result()), expected(200))


def test_large_batches_are_served_or_refused_in_words(session):
    one = session()
    with pytest.raises(Refused, match="MiB"):
        one.next(2**22, T)
    big, _ = one.next(128, T)
    assert np.array_equal(big, expected(128))
    with pytest.raises(Refused, match="over the budget"):
        one.next(2**12, T)
    assert one.next(1, T)[0].shape == (1, T + 1)


def test_at_the_close_the_last_batch_repeats_in_any_shape(session):
    one = session()
    last = None
    while one.progress < 1:
        last = one.next(8, T)[0].copy()
    for _ in range(5):
        again, _ = one.next(8, T)
        assert np.array_equal(again, last)
    assert np.array_equal(one.next(4, T // 2)[0][:1, :5], last[:1, :5])
    assert one.progress == 1


def test_the_budget_is_what_is_served_after_the_warm_up(session):
    one = session()
    batches = 0
    while one.progress < 1:
        one.next(8, T)
        batches += 1
    assert batches * 8 * T == SCALE.warmup_tokens + SCALE.budget_amount


@pytest.mark.parametrize("batch", [3, 8, 67])
def test_bits_per_byte_equal_a_plain_evaluation(session, batch):
    """A model whose losses depend on every token of the row."""
    one = session()
    seen = []
    for shown, answer in one.score(batch):
        seen.append(shown.copy())
        answer(np.cumsum(losses_of(shown), axis=1) / 50)
    stream = rows.RowStream(data_folder(), "val", T)
    count = min(SCALE.eval_tokens // T, stream.rows)
    plain = stream.take(count, 0)[0]
    lengths = rows.token_bytes(data_folder())[0][plain[:, 1:]]
    nats = (np.cumsum(losses_of(plain), axis=1) / 50).astype(float)[lengths > 0].sum()
    assert one.val_bpb == pytest.approx(nats / math.log(2) / lengths.sum(), rel=1e-6)
    order = np.concatenate(seen)[:count]
    assert sorted(map(bytes, order)) == sorted(map(bytes, plain))
    assert not np.array_equal(order, plain)  # shuffled


def test_refusals_leave_the_session_in_use(session):
    one = session()
    for rows_, length, split in ((8, T, "val"), (8, T + 1, "train"), (8, T, "test")):
        with pytest.raises(ValueError, match=r"val|longer|test"):
            one.next(rows_, length, split)
    with pytest.raises(Refused, match="finite number"):
        one.log({"loss": 1e301})
    with pytest.raises(Refused, match="32"):
        one.log({str(i): i for i in range(33)})
    one.log({"loss": float("nan"), "text": "fine", "none": None, "step": np.int64(3)})
    assert one.next(8, T)[0].shape == (8, T + 1)


def test_an_answer_of_the_wrong_shape_or_none_is_caught_at_once(session):
    one = session()
    scored = one.score(8)
    _, answer = next(scored)
    with pytest.raises(ValueError, match="shape"):
        answer(np.zeros((8, T + 1), np.float32))
    with pytest.raises(RuntimeError, match="not answered"):
        next(scored)


def test_no_batch_is_served_while_scoring_is_under_way(session):
    one = session()
    next(one.score(8))
    with pytest.raises(Refused, match="under way"):
        one.next(8, T)


def test_only_one_connection_is_served(session):
    one = session()
    with socket.socket(socket.AF_UNIX) as second, pytest.raises(OSError, match="No such file"):
        second.connect(str(one.folder / "socket"))
    assert one.next(8, T)[0].shape == (8, T + 1)


def test_a_session_ends_with_its_folder_and_a_forked_child_does_not_end_it(session):
    one = session()
    child = os.fork()
    if child == 0:
        one.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert one.next(8, T)[0].shape == (8, T + 1)
    one.close()
    one.close()
    assert not one.folder.exists()
    with pytest.raises(ConnectionError):
        one.next(8, T)


def test_a_killed_program_takes_its_own_referee_and_folder_along(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(
        "from referee.client import Session\nsession = Session.open()\n"
        "print(session._own_referee.pid, session.folder, flush=True)\nimport time\ntime.sleep(60)"
    )
    trainer = str(runs.REPO / "trainer")
    env = {**os.environ, "PYTHONPATH": trainer, "AUTORESEARCH_DATA": str(data_folder())}
    with subprocess.Popen(
        [sys.executable, str(program)], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        referee, folder = process.stdout.readline().split()
        process.kill()
    deadline = time.monotonic() + 20
    while (Path(folder).exists() or alive(referee)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(folder).exists()
    assert not alive(referee)


def test_alone_with_damaged_data_nothing_is_left(tmp_path, monkeypatch):
    data = Path(shutil.copytree(data_folder(), tmp_path / "data"))
    (data / "val.u16").unlink()
    monkeypatch.delenv("AUTORESEARCH_REFEREE", raising=False)
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    with pytest.raises(ConnectionError, match="it ended at its start"):
        Session.open()
    ours = f"autoresearch-{os.getpid()}."
    assert [entry for entry in os.listdir(shared.place()) if entry.startswith(ours)] == []


def alive(pid: str) -> bool:
    """Whether it is still a referee: numbers are used again, and the dead have no command line."""
    with contextlib.suppress(OSError):
        return "referee" in Path(f"/proc/{pid}/cmdline").read_text()
    return False


def test_telemetry_is_stored_up_to_its_size(tmp_path):
    program = "for i in range(3000): session.log({f'k{j}': 'x' * 200 for j in range(30)})\n"
    result = runs.run(tmp_path, program + runs.HONEST)
    assert result["status"] == "ok"
    assert (tmp_path / "run" / "telemetry.jsonl").stat().st_size <= 8 * 2**20


# --- programs written for upstream ----------------------------------------------------------------

UPSTREAM = """
import time
import torch
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

torch.manual_seed(42)
torch.set_num_threads(1)
tokenizer = Tokenizer.from_directory()
vocab, batch = tokenizer.get_vocab_size(), {batch}

class Bigram(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(vocab, vocab)
        torch.nn.init.zeros_(self.table.weight)
    def forward(self, x, y=None, reduction='mean'):
        logits = self.table(x)
        if y is None:
            return logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), reduction=reduction)
        return loss

model = Bigram()
optimiser = torch.optim.SGD(model.parameters(), lr=50.0)
loader = make_dataloader(tokenizer, batch, MAX_SEQ_LEN, "train")
x, y, epoch = next(loader)
seconds, step = 0.0, 0
while True:
    start = time.time()
    loss = model(x, y)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    x, y, epoch = next(loader)
    time.sleep(0.03)  # a step takes a while
    if step > 10:
        seconds += time.time() - start
    step += 1
    if step > 10 and seconds >= TIME_BUDGET:
        break
print('val_bpb:', evaluate_bpb(model, tokenizer, batch), 'steps:', step)
"""


@pytest.mark.parametrize("times", [1, 2], ids=["reference batch", "twice the batch"])
def test_an_upstream_style_program_runs_unmodified_under_a_wall_budget(tmp_path, times):
    """Five names, its own timing, its own seed, no end of the loader expected."""
    program = UPSTREAM.format(batch=times * SCALE.reference_batch_tokens // T)
    budget = {"kind": "wall", "amount": 4.0}
    result = runs.run(tmp_path, program, prelude="", budget=budget, startup_free_s=60, threads=1)
    assert result["status"] == "ok", (result["reason"], result["log"])
    assert result["value"] < runs.uniform_bpb() - 0.5  # it has learned
    assert result["training_seconds"] == pytest.approx(4, abs=0.2)
    assert result["overrun_seconds"] <= 1


def test_frames_survive_any_cut_of_the_stream():
    ours, theirs = socket.socketpair()
    message = {"type": "next", "rows": 8, "text": "ü" * 1000}
    body = json.dumps(message).encode()
    frame = len(body).to_bytes(4, "little") + body
    with ours, theirs:
        for i in range(0, len(frame), 100):
            theirs.sendall(frame[i : i + 100])
        assert protocol.receive(ours) == message
        with pytest.raises(ValueError, match="over the limit"):
            protocol.send(ours, {"type": "log", "text": "x" * protocol.MAX_FRAME})
        theirs.close()
        assert protocol.receive(ours) is None
