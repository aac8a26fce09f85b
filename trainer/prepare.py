"""Owns what every experiment is given and none may change: data, tokenizer, batches and the score.

From a program, five names as in upstream's autoresearch and four more:

    from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb
    from prepare import SCALE, SEED, log, progress

    for x, y, epoch in make_dataloader(tokenizer, B, T, "train"):   # (B, T) int64, on the device
        ...                                  # until progress() reaches 1.0
    val_bpb = evaluate_bpb(model, tokenizer, batch_size)            # final: the feed is closed

Behind them stands the referee, a process of its own that holds the data, the clock and the score
(PROTOCOL.md). Importing does no work: the first use of a name that needs the referee
opens the session, and starts a referee where none was given.

From a shell, once per corpus and scale (`python trainer/prepare.py --help`):

    python trainer/prepare.py --corpus stdlib --scale cpu
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# --- scales ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The size of a campaign's problem. All its experiments share it; train.py cannot change it."""

    name: str
    max_seq_len: int  # tokens of context, T
    vocab_size: int
    eval_tokens: int  # of the validation rows that are scored
    reference_batch_tokens: int  # one optimiser step of the shipped train.py
    budget_kind: str  # "wall": seconds of training; "tokens": tokens of training
    budget_amount: int
    startup_free_s: int  # imports, compilation and warm-up cost nothing up to here

    @property
    def warmup_tokens(self) -> int:
        """The clock starts behind them: upstream does not count its first 11 steps."""
        return 11 * self.reference_batch_tokens


SCALES = {
    scale.name: scale
    for scale in (
        # Upstream's constants: one H100.
        Scale("h100", 2048, 8192, 40 * 2**19, 2**19, "wall", 300, startup_free_s=120),
        # Cards of 8 to 24 GB.
        Scale("small", 1024, 8192, 2**21, 2**16, "wall", 300, startup_free_s=180),
        # About 20 s on two cores, a minute on one. In tokens: on a shared machine, seconds do not
        # repeat.
        Scale("cpu", 256, 2048, 2**17, 2**11, "tokens", 400 * 2**11, startup_free_s=300),
    )
}


# --- tokenizer ------------------------------------------------------------------------------------

# GPT-4's way to split text before merging, but with digits in groups of one or two.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(4))  # the last ids; the first is BOS
TRAINING_CHARACTERS = 10**9
DOCUMENT_CHARACTERS = 10_000
SAMPLE_TOKENS = 96  # of text that a trained model writes


class Tokenizer:
    """Byte-pair encoding: rustbpe trains, tiktoken encodes. Stored as JSON, never pickled."""

    def __init__(self, pattern: str, ranks: list[bytes], special_tokens: list[str]):
        import tiktoken

        self.pattern, self.ranks, self.special_tokens = pattern, ranks, special_tokens
        self._encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={name: len(ranks) + i for i, name in enumerate(special_tokens)},
        )

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """A tokenizer of at most `vocab_size` tokens (fewer where the texts offer fewer merges)."""
        import rustbpe

        trained = rustbpe.Tokenizer()
        merges = vocab_size - len(SPECIAL_TOKENS)
        trained.train_from_iterator(texts, merges, pattern=SPLIT_PATTERN)
        ranks = sorted(trained.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls(SPLIT_PATTERN, [bytes(token) for token, _ in ranks], list(SPECIAL_TOKENS))

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """Read tokenizer.json; without a folder, the one of the session."""
        folder = Path(directory) if directory is not None else _session().folder
        stored = json.loads((folder / "tokenizer.json").read_text())
        ranks = [base64.b64decode(token) for token in stored["ranks"]]
        return cls(stored["pattern"], ranks, stored["special_tokens"])

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and token_bytes.json: what each token counts in bits per byte."""
        from rows import write_json

        special = [0] * len(self.special_tokens)
        # Upstream measures a token by decoding it, where a lone byte >= 0x80 becomes U+FFFD, of
        # three bytes. Ours counts what is there; upstream's count is kept to compare scores.
        decoded = [len(token.decode("utf-8", errors="replace").encode()) for token in self.ranks]
        counts = {"true": [*map(len, self.ranks), *special], "upstream": decoded + special}
        write_json(folder / "token_bytes.json", counts)
        stored = {
            "pattern": self.pattern,
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
            "special_tokens": self.special_tokens,
        }
        write_json(folder / "tokenizer.json", stored)

    def get_vocab_size(self) -> int:
        return self._encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return len(self.ranks)

    def encode(
        self, text: str | list[str], prepend: int | str | None = None, num_threads: int = 8
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list; `prepend` (id or special token) in front."""
        if isinstance(prepend, str):
            prepend = self._encoding.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return first + self._encoding.encode_ordinary(text)
        return [
            first + ids
            for ids in self._encoding.encode_ordinary_batch(text, num_threads=num_threads)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


# --- what a program is given ----------------------------------------------------------------------


def __getattr__(name: str):
    """MAX_SEQ_LEN, TIME_BUDGET (0.98 of the budget), SEED and SCALE: facts of the session."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "SEED", "SCALE"):
        return getattr(_session(), name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def progress() -> float:
    """The share of the budget used, in [0, 1], by the referee's clock."""
    return _session().progress


def log(**metrics) -> None:
    """Record numbers (tensors of one element too) and short texts in the run's telemetry."""
    _session().log({k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()})


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str) -> Iterator[tuple]:
    """Yield (inputs, targets, epoch) for ever: int64 (B, T), contiguous, on `device()`, yours.

    Only the split "train" and T up to MAX_SEQ_LEN are served (ValueError says so). Another B or
    a shorter T continues the stream. Once the budget is used up the last batch repeats.
    """
    session = _session()
    while True:
        rows, epoch = session.next(B, T, split)
        yield *_tensors(rows), epoch


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte on the validation rows, computed by the referee. Closes the feed; only once.

    The model is asked for `model(x, y, reduction="none")`: the loss of every position in nats,
    (B*T,) or (B, T). It is in eval mode meanwhile, without gradients, under the caller's autocast.
    Its weights and a sample of its text are left in the scratch folder afterwards.
    """
    import torch

    session = _session()
    with _evaluating(model), torch.no_grad():
        for rows, answer in session.score(batch_size):
            x, y = _tensors(rows)
            losses = model(x, y, reduction="none")
            if losses.numel() != x.numel():
                raise ValueError(
                    'model(x, y, reduction="none") must give the loss of every position, '
                    f"{tuple(x.shape)}; it gave {tuple(losses.shape)}"
                )
            answer(losses.float().reshape(x.shape).cpu().numpy())
    _save_weights(model)
    _save_sample(model, tokenizer)
    return session.val_bpb


@functools.cache
def device() -> str:
    """Where batches go: "cuda", else "mps", else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def _session():
    """The conversation with the referee, opened once."""
    if "AUTORESEARCH_REFEREE" not in os.environ:
        os.environ["AUTORESEARCH_DATA"] = str(_ready_data())
    from referee.client import Session

    return Session.open()


def _tensors(rows) -> tuple:
    """(x, y), int64 (B, T) on the device, of rows, uint16 (B, T+1), soon to be overwritten."""
    if device() == "cuda":
        return _pinned_ring().send(rows)
    import torch

    parts = (rows[:, :-1], rows[:, 1:])
    return tuple(torch.from_numpy(part.astype("int64")).to(device()) for part in parts)


class _PinnedRing:
    """Copies to the GPU without waiting for it.

    Three pinned buffers in turn: the copy out of a buffer runs later than the call that asks for
    it, so a single one would be overwritten before it left, as soon as a program asks for several
    batches without waiting for the GPU (gradient accumulation).
    """

    def __init__(self):
        import torch

        self._slots = [(None, torch.cuda.Event()) for _ in range(3)]

    def send(self, rows) -> tuple:
        import torch

        pinned, copied = self._slots.pop(0)
        copied.synchronize()  # returns at once, unless the GPU is three batches behind
        if pinned is None or pinned.shape != rows.shape:
            pinned = torch.empty(rows.shape, dtype=torch.int16, pin_memory=True)
        pinned.numpy()[...] = rows.view("int16")
        tokens = pinned.to("cuda", non_blocking=True)
        copied.record()
        self._slots.append((pinned, copied))
        # Widened over there: a quarter of the bytes to copy. A mask, since uint16 lacks kernels.
        return tuple(part.long().bitwise_and_(0xFFFF) for part in (tokens[:, :-1], tokens[:, 1:]))


_pinned_ring = functools.cache(_PinnedRing)


@contextlib.contextmanager
def _evaluating(model):
    """Eval mode for a model, the mode of each of its modules restored at the end."""
    modules = list(model.modules()) if hasattr(model, "modules") else []
    modes = [module.training for module in modules]
    if modules:
        model.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _save_weights(model) -> None:
    """Leave model.safetensors in the scratch folder. Trouble is told, and never costs a run."""
    scratch = os.environ.get("AUTORESEARCH_SCRATCH")
    if not scratch or not hasattr(model, "state_dict"):
        return
    try:
        from safetensors.torch import save_file

        path = Path(scratch) / "model.safetensors"
        tensors, shared = _distinct(model.state_dict())
        save_file(tensors, f"{path}.tmp", metadata=shared)
        os.replace(f"{path}.tmp", path)
    except Exception as error:
        print(f"The weights could not be saved in {scratch}: {error}", file=sys.stderr)


def _save_sample(model, tokenizer: Tokenizer) -> None:
    """Leave sample.txt, what the model writes by itself, in the scratch folder. As for weights.

    The model is asked for `model(x)`: logits (B, T, V). Not compiled, since every length is new.
    """
    scratch = os.environ.get("AUTORESEARCH_SCRATCH")
    if not scratch:
        return
    import torch

    tokens = [tokenizer.get_bos_token_id()]
    generator = torch.Generator().manual_seed(0)
    try:
        with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            while len(tokens) <= SAMPLE_TOKENS:
                x = torch.tensor([tokens], device=device())
                likely = (model(x)[0, -1].float().cpu() / 0.8).softmax(-1)
                tokens.append(int(torch.multinomial(likely, 1, generator=generator)))
        Path(scratch, "sample.txt").write_text(tokenizer.decode(tokens[1:]))
    except Exception as error:
        print(f"No sample of the model's text: {type(error).__name__}: {error}", file=sys.stderr)


def _distinct(state: dict) -> tuple[dict, dict[str, str]]:
    """A state dict as safetensors can hold it: (tensors that share no memory, {tied name: name}).

    torch.compile's wrappers are taken out of the names. Tied tensors are stored once, the others'
    names in the metadata, as safetensors.torch.load_model expects them.
    """
    import torch

    tensors, shared, seen = {}, {}, {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        name = name.replace("_orig_mod.", "")
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            shared[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors, shared


# --- preparing the data ---------------------------------------------------------------------------


def default_folder(corpus: str, scale: str) -> Path:
    """Where prepared data lies unless told otherwise: one place for all labs."""
    if corpus.startswith("dir:"):  # the same words mean another folder elsewhere
        corpus = "dir:" + os.path.abspath(os.path.expanduser(corpus[4:]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "autoresearch/data" / f"{corpus.replace(':', '-').replace('/', '_')}-{scale}"


def prepare(source, scale: Scale, folder: Path, offline=False, download_only=False) -> dict | None:
    """Make a data folder of a corpora.Source; return its manifest (None after `download_only`).

    Every step publishes its files by rename and is not done again, so an interruption costs one
    step; the manifest comes last. Raises rows.DataError.
    """
    import corpora
    import rows

    shards = source.shards if source.name == "climbmix" else None
    scale_facts = dataclasses.asdict(scale) | {"warmup_tokens": scale.warmup_tokens}
    request = {"corpus": source.name, "scale": scale_facts, "training_shards": shards}
    manifest = folder / "manifest.json"
    # A complete folder may be read-only: no lock there.
    with contextlib.nullcontext() if manifest.exists() else _alone(folder):
        if manifest.exists():
            _same(manifest, request)
            found = rows.check(folder)
            with contextlib.suppress(OSError):  # read-only
                _pack_shorter(folder, scale)
            return found
        _begin(folder, request)
        corpora.fetch(source, folder, offline)
        if download_only:
            return None
        shards = corpora.shards(source, folder, piece=3 * scale.max_seq_len)
        paths = {split: [folder / name for name in shards[split]] for split in ("train", "val")}
        tokenizer = _tokenizer(folder, paths["train"], scale.vocab_size)
        counts = {split: _pack(folder, split, paths[split], tokenizer, scale) for split in paths}
        made = {"shards": shards, "counts": counts, "versions": _versions()}
        made |= {"vocab_size": tokenizer.get_vocab_size(), "bos": tokenizer.get_bos_token_id()}
        _pack_shorter(folder, scale)
        return rows.write_manifest(folder, request | made)


def _begin(folder: Path, request: dict) -> None:
    """Go on with what an earlier call for the same request left, or write down this one."""
    import rows

    record = folder / ".request.json"
    if record.exists():
        _same(record, request)
        for left_by_a_kill in folder.rglob(".*.tmp"):
            left_by_a_kill.unlink()
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise rows.DataError(f"{folder} holds other files: name an empty folder with --data.")
    rows.write_json(record, request)


def _same(record: Path, request: dict) -> None:
    """Raise DataError where a folder was made, or begun, for another request."""
    import rows

    stored = json.loads(record.read_text())
    if any(stored.get(name) != value for name, value in request.items()):
        raise rows.DataError(
            f"{record.parent} was begun for {stored['corpus']} at scale {stored['scale']['name']} "
            f"(training shards: {stored['training_shards']}), as that was then defined; this "
            "request differs. Name another folder with --data, or delete it."
        )


def _tokenizer(folder: Path, shards: list[Path], vocab_size: int) -> Tokenizer:
    """The folder's tokenizer, trained where it is missing."""
    import corpora
    import rows

    if not (folder / "tokenizer.json").exists():
        say = rows.Progress(f"training a tokenizer of {vocab_size}", "characters")
        texts = _sample(corpora.batches(shards), say)
        Tokenizer.train(texts, vocab_size).save(folder)
        say.end("done")
    return Tokenizer.from_directory(folder)


def _sample(batches: Iterator[list[str]], say) -> Iterator[str]:
    """The beginnings of documents, up to a billion characters."""
    characters = 0
    for text in itertools.chain.from_iterable(batches):
        yield text[:DOCUMENT_CHARACTERS]
        characters += min(len(text), DOCUMENT_CHARACTERS)
        if characters >= TRAINING_CHARACTERS:
            return
        say(characters)


def _pack(folder: Path, split: str, shards: list[Path], tokenizer: Tokenizer, scale: Scale) -> dict:
    """Tokenise one split and pack its rows; return what there is of each."""
    import corpora
    import rows

    if not (folder / f"{split}.u16").exists():
        bos = tokenizer.get_bos_token_id()
        encode = functools.partial(tokenizer.encode, prepend=bos, num_threads=_cores())
        rows.build_arena(folder, split, corpora.batches(shards), encode)
    facts = rows.rows_path(folder, split, scale.max_seq_len).with_suffix(".json")
    if not facts.exists():
        rows.bake_into(folder, split, scale.max_seq_len)
    tokens, offsets, _ = rows.arena(folder, split)
    packed = json.loads(facts.read_text())["rows"]
    return {"documents": len(offsets) - 1, "tokens": tokens.size, "rows": packed}


def _pack_shorter(folder: Path, scale: Scale) -> None:
    """Training rows of half and a quarter of the context, which programs also ask for."""
    import rows

    for T in (scale.max_seq_len // 2, scale.max_seq_len // 4):
        if not rows.rows_path(folder, "train", T).with_suffix(".json").exists():
            rows.bake_into(folder, "train", T)


def _cores() -> int:
    """What this process may use: a job's share of its node, where the system tells."""
    own = getattr(os, "sched_getaffinity", None)
    return min(16, len(own(0)) if own else os.cpu_count() or 1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("numpy", "pyarrow", "rustbpe", "tiktoken")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in packages}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel drops it with the process, however that ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process prepares {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: as before, one at a time is up to you
            pass
        yield


def _ready_data() -> Path:
    """The data folder of a program that runs alone; the standard library is prepared on the way."""
    corpus = os.environ.get("AUTORESEARCH_CORPUS", "stdlib")
    scale = os.environ.get("AUTORESEARCH_SCALE", "cpu")
    folder = Path(os.environ.get("AUTORESEARCH_DATA") or default_folder(corpus, scale))
    if not (folder / "manifest.json").exists():
        command = [__file__, "--corpus", corpus, "--scale", scale, "--data", str(folder)]
        if corpus != "stdlib":
            raise SystemExit(f"There is no data in {folder}. Run: python {' '.join(command)}")
        print(f"Preparing {corpus} at scale {scale} in {folder}, once.", file=sys.stderr)
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    return folder


# --- the command ----------------------------------------------------------------------------------

HELP = """\
Prepare the data of a campaign: documents -> Parquet shards -> tokenizer -> packed token rows.

corpora
  stdlib       Python's own standard library: nothing to download
  climbmix     the corpus of upstream's autoresearch, 10 shards and the validation shard
  tinystories  short stories of a small world, for small machines (673 MB)
  dir:PATH     your own: text files (UTF-8) or Parquet files with a "text" column

scales
{scales}

examples
  python trainer/prepare.py                                      the standard library, scale cpu
  python trainer/prepare.py --corpus dir:~/notes --scale small
  python trainer/prepare.py --corpus climbmix --scale h100 --data DIR --download-only
  python trainer/prepare.py --corpus climbmix --scale h100 --data DIR --offline
The last two: first where there is internet, then as a job on a node where there is none.
Interrupted, the same command goes on where it was.
"""


def main(arguments: list[str] | None = None) -> int:
    import corpora
    import rows

    scales = "\n".join(
        f"  {s.name:6} context {s.max_seq_len}, vocabulary {s.vocab_size}, "
        f"{s.budget_amount:,} {'seconds' if s.budget_kind == 'wall' else 'tokens'} of training"
        for s in SCALES.values()
    )
    parser = argparse.ArgumentParser(
        description=HELP.format(scales=scales), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", default="stdlib", metavar="NAME")
    parser.add_argument("--scale", default="cpu", choices=SCALES)
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: ~/.cache/autoresearch/")
    parser.add_argument("--shards", type=int, default=10, help="training shards of climbmix")
    parser.add_argument("--base-url", default=corpora.HUB, help="a mirror of the hub's data sets")
    parser.add_argument("--download-only", action="store_true", help="stop after the network")
    parser.add_argument("--offline", action="store_true", help="fail rather than download")
    parser.add_argument("--verify", action="store_true", help="hash every file of a folder again")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON at the end")
    asked = parser.parse_args(arguments)
    folder = asked.data or default_folder(asked.corpus, asked.scale)
    try:
        if asked.verify:
            manifest = rows.verify(folder)
        else:
            source = corpora.Source(asked.corpus, asked.shards, asked.base_url)
            scale = SCALES[asked.scale]
            manifest = prepare(source, scale, folder, asked.offline, asked.download_only)
    except (rows.DataError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    _report(folder, manifest, asked.json)
    return 0


def _report(folder: Path, manifest: dict | None, as_json: bool) -> None:
    import rows

    facts = {"folder": str(folder), "complete": manifest is not None}
    if manifest:
        facts |= {name: manifest[name] for name in ("corpus", "counts", "vocab_size")}
        facts |= {"scale": manifest["scale"]["name"], "manifest": rows.manifest_sha256(folder)}
    if as_json:
        print(json.dumps(facts))
    elif not manifest:
        print(f"{folder}: everything is there that comes over the network")
    else:
        print(f"{facts['corpus']} at scale {facts['scale']} in {folder}")
        for split, count in facts["counts"].items():
            print(f"  {split:6}", ", ".join(f"{number:,} {name}" for name, number in count.items()))
        print(f"  manifest sha256 {facts['manifest']}")


if __name__ == "__main__":
    raise SystemExit(main())
