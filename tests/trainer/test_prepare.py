"""What a program is given: the tokenizer, its batches, its score; and how the data is made."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

import prepare
import rows
from corpora import Source
from prepare import SCALES, Scale, Tokenizer

PREPARE = Path(prepare.__file__)
TINY = Scale("cpu", 64, 400, 2**12, 2**9, "tokens", 2**20, startup_free_s=60)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder of 120 short files, taken from Python's own json and email packages."""
    folder = tmp_path_factory.mktemp("texts")
    library = Path(os.__file__).parent
    source = "".join(
        p.read_text() for d in ("json", "email") for p in sorted((library / d).glob("*.py"))
    )
    for i in range(120):
        (folder / f"{i:03d}.txt").write_text(source[i * 2000 : (i + 1) * 2000])
    return folder


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare.prepare(Source(f"dir:{texts}"), TINY, folder)
    return folder


@pytest.fixture
def tokenizer(data) -> Tokenizer:
    return Tokenizer.from_directory(data)


@pytest.fixture
def session(data, tmp_path, monkeypatch):
    """A run of this process under a real referee, started as `python train.py` would start it."""
    for name in ("AUTORESEARCH_REFEREE", "AUTORESEARCH_SCRATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    monkeypatch.setenv("AUTORESEARCH_SEED", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    prepare._session.cache_clear()
    yield prepare._session()
    prepare._session().close()
    prepare._session.cache_clear()


class Model(torch.nn.Module):
    """Predicts from the current token alone; dropout would show a forgotten eval mode."""

    def __init__(self, vocab: int, flat: bool = True):
        super().__init__()
        torch.manual_seed(vocab)
        self.embedding = torch.nn.Embedding(vocab, 16)
        self.head = torch.nn.Linear(16, vocab)
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.dropout = torch.nn.Dropout(0.5)
        self.flat = flat
        self.to(prepare.device())

    def forward(self, x, y=None, reduction="mean"):
        logits = self.head(self.dropout(self.frozen(self.embedding(x))))
        if y is None:
            return logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), reduction=reduction
        )
        return losses if self.flat or reduction == "mean" else losses.view(x.shape)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["def main():\n    return 12345\n", "Grüße, 世界 \x07", "", " \n\n"]
)
def test_what_is_encoded_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_list_is_encoded_text_by_text_with_a_token_in_front(tokenizer):
    bos = tokenizer.get_bos_token_id()
    both = tokenizer.encode(["one", "two"], prepend=bos)
    assert both == [[bos, *tokenizer.encode("one")], [bos, *tokenizer.encode("two")]]
    assert tokenizer.encode("one", prepend="<|reserved_0|>") == both[0]


def test_special_tokens_are_the_last_four_and_cannot_come_from_text(tokenizer):
    size = tokenizer.get_vocab_size()
    assert size == TINY.vocab_size
    assert tokenizer.get_bos_token_id() == size - 4
    assert max(tokenizer.encode("<|reserved_0|>")) < size - 4


def test_digits_come_in_groups_of_one_or_two(tokenizer):
    assert all(len(tokenizer.decode([t])) <= 2 for t in tokenizer.encode("1234567890"))


def test_true_bytes_add_up_to_the_text(tokenizer, data):
    true, upstream = rows.token_bytes(data)
    text = "naïve café, 世界 and\n\tmore"
    ids = tokenizer.encode(text)
    assert true[ids].sum() == len(text.encode())
    assert upstream[ids].sum() > true[ids].sum()  # lone bytes of 世 count three each


def test_the_stored_tokenizer_is_plain_json(data):
    stored = json.loads((data / "tokenizer.json").read_text())
    assert set(stored) == {"pattern", "ranks", "special_tokens"}


# --- batches --------------------------------------------------------------------------------------


def test_importing_prepare_does_no_work():
    code = (
        "import sys, prepare; print([m for m in ('torch', 'numpy', 'referee') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PREPARE.parent), "AUTORESEARCH_REFEREE": "/none"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output == "[]\n"


def test_the_facts_of_the_session_are_names_of_the_module(session):
    from prepare import MAX_SEQ_LEN, SCALE, SEED, TIME_BUDGET

    assert (64, "cpu", 0, math.inf) == (MAX_SEQ_LEN, SCALE, SEED, TIME_BUDGET)
    with pytest.raises(ImportError, match="cannot import name 'EVAL_TOKENS'"):
        from prepare import EVAL_TOKENS  # noqa: F401


def test_batches_are_the_row_stream_in_tensors_of_the_callers_own(session, tokenizer, data):
    loader = prepare.make_dataloader(tokenizer, 4, 64, "train")
    kept = [next(loader) for _ in range(40)]  # a loader that lent its buffers would overwrite them
    stream, position = rows.RowStream(data, "train", 64), 0
    for x, y, epoch in kept:
        batch, wanted, position = stream.take(4, position)
        assert np.array_equal(x.cpu(), batch[:, :-1])
        assert np.array_equal(y.cpu(), batch[:, 1:])
        assert epoch == wanted
        for part in (x, y):
            assert part.dtype == torch.int64
            assert part.is_contiguous()
            assert part.shape == (4, 64)
    assert prepare.progress() > 0


def test_another_batch_size_continues_the_stream(session, tokenizer, data):
    first = next(prepare.make_dataloader(tokenizer, 3, 64, "train"))[0]
    second = next(prepare.make_dataloader(tokenizer, 5, 64, "train"))[0]
    expected = rows.RowStream(data, "train", 64).take(8, 0)[0][:, :-1]
    assert np.array_equal(torch.cat([first, second]).cpu(), expected)


@pytest.mark.parametrize(
    ("T", "split", "words"), [(64, "val", "only 'train'"), (65, "train", "64")]
)
def test_what_is_not_served_is_refused_in_words(session, tokenizer, T, split, words):
    with pytest.raises(ValueError, match=words):
        next(prepare.make_dataloader(tokenizer, 2, T, split))


def test_log_takes_numbers_of_any_library(session):
    prepare.log(loss=torch.tensor(1.5), rate=np.float32(0.25), step=3, note="fine")
    with pytest.raises(ValueError, match="log"):
        prepare.log(text="x" * 10_000)


# --- the score ------------------------------------------------------------------------------------


def plain_bpb(model: Model, data: Path) -> float:
    """Bits per byte by the description, in one process and float64."""
    stream = rows.RowStream(data, "val", 64)
    batch = stream.take(min(TINY.eval_tokens // 64, stream.rows), 0)[0].astype(np.int64)
    x, y = (torch.from_numpy(part).to(prepare.device()) for part in (batch[:, :-1], batch[:, 1:]))
    lengths = torch.from_numpy(rows.token_bytes(data)[0]).to(y.device)[y].flatten()
    model.eval()
    with torch.no_grad():
        losses = model(x, y, reduction="none").flatten().double()
    model.train()
    return float(losses[lengths > 0].sum() / (math.log(2) * lengths.sum()))


@pytest.mark.parametrize(("batch", "flat"), [(3, True), (8, False), (67, True)])
def test_the_score_is_that_of_a_plain_evaluation(session, tokenizer, data, batch, flat):
    model = Model(tokenizer.get_vocab_size(), flat)
    expected = plain_bpb(model, data)
    model.frozen.eval()
    assert prepare.evaluate_bpb(model, tokenizer, batch) == pytest.approx(expected, abs=1e-6)
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training, "each module gets its own mode back"


class Recurrent(torch.nn.Module):
    """A GRU of two layers: the loss of a position hangs on all before it."""

    def __init__(self, vocab: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, 24)
        self.memory = torch.nn.GRU(24, 32, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(32, vocab)

    def logits(self, x):
        return self.head(self.memory(self.embedding(x))[0])

    def forward(self, x, y, reduction="mean"):
        return torch.nn.functional.cross_entropy(
            self.logits(x).flatten(0, 1), y.flatten(), reduction=reduction
        )


class Neighbours(Recurrent):
    """A causal convolution that answers with losses by row and position."""

    def __init__(self, vocab: int):
        super().__init__(vocab)
        self.memory = torch.nn.Conv1d(24, 32, 5)

    def logits(self, x):
        seen = torch.nn.functional.pad(self.embedding(x).mT, (4, 0))
        return self.head(torch.relu(self.memory(seen)).mT)

    def forward(self, x, y, reduction="mean"):
        return torch.nn.functional.cross_entropy(self.logits(x).mT, y, reduction=reduction)


class Hopeless(Recurrent):
    """Sure of the wrong token: losses of a hundred nats beside losses of none."""

    def logits(self, x):
        return 100.0 * torch.nn.functional.one_hot(x, self.head.out_features).float()


def transformer(vocab: int, steps: int):
    """train.py's own at scale cpu, after some steps on the training rows."""
    import train  # needs the session: it asks prepare for the scale as it is imported

    c = SimpleNamespace(**train.CONSTANTS["cpu"] | {"total_batch": 512})
    model = train.GPT(c, vocab, 64, train.sdpa_attention).initialise(torch.float32)
    optimiser = train.Optimiser(model, c, compiled=False)
    loader = prepare.make_dataloader(Tokenizer.from_directory(), 8, 64, "train")
    for step in range(1, steps + 1):
        x, y, _ = next(loader)
        model(x.cpu(), y.cpu()).backward()
        optimiser.step(step, 0.0, 1.0)
        model.zero_grad()
    return model.to(prepare.device())


MODELS = {
    "recurrent": Recurrent,
    "convolution": Neighbours,
    "hopeless": Hopeless,
    "transformer": lambda vocab: transformer(vocab, 0),
    "transformer, trained": lambda vocab: transformer(vocab, 30),
}


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_the_model_its_score_is_that_of_a_plain_evaluation(session, tokenizer, data, kind):
    torch.manual_seed(1)
    model = MODELS[kind](tokenizer.get_vocab_size()).to(prepare.device())
    expected = plain_bpb(model, data)
    assert prepare.evaluate_bpb(model, tokenizer, 8) == pytest.approx(expected, abs=1e-4)


def test_a_model_that_answers_in_bfloat16_is_scored(session, tokenizer, data):
    model = Model(tokenizer.get_vocab_size()).bfloat16()
    expected = plain_bpb(model.float(), data)
    with torch.autocast(prepare.device(), torch.bfloat16):
        found = prepare.evaluate_bpb(model.bfloat16(), tokenizer, 8)
    assert found == pytest.approx(expected, rel=0.01)


def test_a_model_that_reduces_its_losses_is_told(session, tokenizer):
    model = Model(tokenizer.get_vocab_size())
    with pytest.raises(ValueError, match=r"every position, \(8, 64\); it gave \(\)"):
        prepare.evaluate_bpb(lambda x, y, reduction: model(x, y), tokenizer, 8)


def test_a_second_score_is_refused_in_words(session, tokenizer):
    model = Model(tokenizer.get_vocab_size())
    prepare.evaluate_bpb(model, tokenizer, 8)
    with pytest.raises(ValueError, match="final"):
        prepare.evaluate_bpb(model, tokenizer, 8)


def test_tied_and_compiled_weights_are_saved_under_their_own_names(
    session, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("AUTORESEARCH_SCRATCH", str(tmp_path))
    model = Model(tokenizer.get_vocab_size())
    model.head.weight = model.embedding.weight
    model.head = torch.compile(model.head, backend="eager")
    wrapped = torch.compile(model, backend="eager")
    prepare.evaluate_bpb(wrapped, tokenizer, 8)
    fresh = Model(tokenizer.get_vocab_size())
    fresh.head.weight = fresh.embedding.weight
    torch.nn.init.zeros_(fresh.embedding.weight)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.head.weight, model.embedding.weight)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {"embedding.weight", "head.bias"}
        assert file.metadata() == {"head.weight": "embedding.weight"}


def test_a_scored_model_leaves_a_sample_of_its_text_uncompiled(
    session, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("AUTORESEARCH_SCRATCH", str(tmp_path))

    def refuse(*_):
        raise AssertionError("compiled for a shape that comes once")

    model = Model(tokenizer.get_vocab_size())
    prepare._save_sample(torch.compile(model, backend=refuse), tokenizer)
    text = (tmp_path / "sample.txt").read_text()
    assert len(tokenizer.encode(text)) > 10
    prepare._save_sample(model, tokenizer)
    assert (tmp_path / "sample.txt").read_text() == text


def test_a_model_without_logits_costs_no_run(session, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_SCRATCH", str(tmp_path))
    prepare.evaluate_bpb(Model(tokenizer.get_vocab_size()), tokenizer, 8)
    assert (tmp_path / "sample.txt").exists()
    (tmp_path / "sample.txt").unlink()
    prepare._save_sample(lambda x, y: None, tokenizer)
    assert not (tmp_path / "sample.txt").exists()
    assert "No sample of the model's text: TypeError" in capsys.readouterr().err


def test_views_of_one_tensor_are_saved_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_SCRATCH", str(tmp_path))
    bank = torch.arange(12.0).reshape(3, 4)
    model = torch.nn.Module()
    model.register_buffer("all", bank)
    model.register_buffer("turned", bank.T)
    model.register_buffer("first", bank[0])
    prepare._save_weights(model)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["turned"], bank.T)
    assert torch.equal(saved["first"], bank[0])


def test_weights_that_cannot_be_saved_do_not_cost_the_score(
    session, tokenizer, monkeypatch, capsys
):
    monkeypatch.setenv("AUTORESEARCH_SCRATCH", "/nowhere")
    assert prepare.evaluate_bpb(Model(tokenizer.get_vocab_size()), tokenizer, 8) > 0
    assert "could not be saved in /nowhere" in capsys.readouterr().err


# --- preparing ------------------------------------------------------------------------------------


def command(*arguments: object, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PREPARE, *map(str, arguments)], capture_output=True, text=True, **how
    )


def test_scales_keep_upstreams_constants():
    h100 = SCALES["h100"]
    assert (h100.max_seq_len, h100.vocab_size, h100.eval_tokens) == (2048, 8192, 20_971_520)
    assert (h100.budget_kind, h100.budget_amount) == ("wall", 300)
    assert h100.warmup_tokens == 11 * 524_288


def test_the_manifest_names_everything_and_is_the_same_each_time(texts, tmp_path):
    printed = [
        json.loads(command("--corpus", f"dir:{texts}", "--data", tmp_path / n, "--json").stdout)
        for n in "ab"
    ]
    assert printed[0]["manifest"] == printed[1]["manifest"] == rows.manifest_sha256(tmp_path / "a")
    assert printed[0]["complete"]
    named = set(rows.verify(tmp_path / "a")["files"])
    found = {
        path.relative_to(tmp_path / "a").as_posix()
        for path in (tmp_path / "a").rglob("[!.]*")
        if path.is_file()
    }
    assert found == named | {"manifest.json"}


STEPS = ("shards/index.json", "tokenizer.json", "train.u16", "rows-train-256.json", "val.u16")


def test_killed_at_any_step_the_same_command_finishes(texts, tmp_path):
    arguments = ["--corpus", f"dir:{texts}", "--data"]
    whole = json.loads(command(*arguments, tmp_path / "whole", "--json").stdout)
    for step in STEPS:
        process = subprocess.Popen(
            [sys.executable, PREPARE, *arguments, tmp_path / "part"], stderr=subprocess.DEVNULL
        )
        while not (tmp_path / "part" / step).exists():
            time.sleep(0.001)
        process.kill()
        process.wait()
    again = json.loads(command(*arguments, tmp_path / "part", "--json").stdout)
    assert again["manifest"] == whole["manifest"]
    assert not list((tmp_path / "part").rglob("*.tmp"))


def test_ctrl_c_ends_in_words_and_leaves_no_half_file(texts, tmp_path):
    text = "".join(path.read_text() for path in sorted(texts.iterdir()))
    (tmp_path / "many").mkdir()
    for i in range(240):  # enough for seconds of work: the signal has to come before the end
        (tmp_path / "many" / f"{i}.txt").write_text(f"{i}\n{text}")
    arguments = ["--corpus", f"dir:{tmp_path / 'many'}", "--data", tmp_path / "data"]
    process = subprocess.Popen(
        [sys.executable, PREPARE, *arguments], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "data" / STEPS[0]).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert "goes on from here" in process.communicate()[1]
    assert process.returncode == 130
    assert not list((tmp_path / "data").rglob("*.tmp"))
    assert not (tmp_path / "data/manifest.json").exists()


def test_two_at_once_make_one_folder(texts, tmp_path):
    arguments = [sys.executable, PREPARE, "--corpus", f"dir:{texts}", "--data", tmp_path, "--json"]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [json.loads(process.communicate()[0]) for process in both]
    assert printed[0] == printed[1]
    rows.verify(tmp_path)


def test_a_folder_of_another_request_is_refused(data, texts, tmp_path):
    wrong = command("--corpus", f"dir:{texts}", "--data", data, "--scale", "small")
    assert wrong.returncode == 1
    assert "at scale cpu" in wrong.stderr
    again = command("--corpus", f"dir:{texts}", "--data", data)
    assert "as that was then defined" in again.stderr, "TINY is not the cpu of SCALES"
    (tmp_path / "mine.txt").write_text("not data")
    wrong = command("--data", tmp_path)
    assert "holds other files" in wrong.stderr


def test_without_the_network_the_missing_files_are_named(tmp_path):
    missing = command(
        "--corpus", "climbmix", "--data", tmp_path / "d", "--offline", "--shards", "2"
    )
    assert missing.returncode == 1
    assert "shards/shard_00000.parquet" in missing.stderr
    assert "--download-only" in missing.stderr


def test_help_teaches():
    text = command("--help").stdout
    for word in (
        "stdlib",
        "climbmix",
        "tinystories",
        "dir:PATH",
        "h100",
        "small",
        "cpu",
        "--offline",
    ):
        assert word in text


def test_a_program_alone_prepares_the_standard_library_once(tmp_path):
    code = (
        "import torch, prepare\n"
        "from prepare import MAX_SEQ_LEN, Tokenizer, make_dataloader\n"
        "x, y, epoch = next(make_dataloader(Tokenizer.from_directory(), 2, MAX_SEQ_LEN, 'train'))\n"
        "print(tuple(x.shape), epoch)\n"
    )
    (tmp_path / "train.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AUTORESEARCH_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(PREPARE.parent)}
    for told in (True, False):
        ended = subprocess.run(
            [sys.executable, tmp_path / "train.py"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ended.stdout == "(2, 256) 1\n", ended.stderr
        assert ("Preparing stdlib" in ended.stderr) == told
    assert (tmp_path / "autoresearch/data/stdlib-cpu/manifest.json").exists()


def test_a_folder_named_from_elsewhere_is_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name / "notes").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        source = Source("dir:notes")
        assert source.name == f"dir:{tmp_path / name / 'notes'}"
        found.append(prepare.default_folder("dir:notes", "cpu"))
        assert prepare.default_folder(source.name, "cpu") == found[-1]
    assert found[0] != found[1]
