"""train.py does what its description says: it learns, looks only back, and fails in words."""

import argparse
import ast
import inspect
import math
import os
import re
import string
import subprocess
import sys
import textwrap
import typing
from types import SimpleNamespace

import pytest
import torch

import prepare
import rows
from corpora import Source
from programs import TRAIN, block, load_train, run

VOCABULARY, T = 257, 64
train, stand_in = load_train()


def small_gpt(scale="cpu", attend=train.sdpa_attention, **changes):
    """A tiny model of a scale's architecture whose output matrices are not zero."""
    sizes = {"width_per_layer": 8, "head_width": 32} | changes
    c = block(train, scale, **sizes)
    torch.manual_seed(0)
    model = train.GPT(c, VOCABULARY, T, attend).initialise(torch.float32)
    with torch.no_grad():
        for matrix in model.layers(train.Linear):
            if not matrix.weight.any():
                matrix.weight.normal_(std=0.1)
    return c, model


def batches(rows, length=T, module=typing):
    """Endless (x, y, epoch) of a module's source text."""
    data, at = stand_in.rows(module, length), 0
    while True:
        part = data[torch.arange(at, at + rows) % len(data)]
        at += rows
        yield part[:, :-1], part[:, 1:], 1


@pytest.fixture
def clock(monkeypatch):
    """Counts batches as the referee would: `clock(n)` gives a loader whose budget is n batches."""
    served = {"batches": 0, "budget": 1}

    def counted(rows):
        for batch in batches(rows):
            served["batches"] += 1
            yield batch

    def start(budget, rows):
        served.update(batches=0, budget=budget)
        return counted(rows)

    monkeypatch.setattr(train, "MAX_SEQ_LEN", T)
    monkeypatch.setattr(train, "progress", lambda: min(1, served["batches"] / served["budget"]))
    return start


def test_sixty_steps_bring_the_loss_on_other_text_down_by_half_a_bit_per_byte(clock):
    c = block(train, "cpu", head_width=32, width_per_layer=16, total_batch=8 * T)
    torch.manual_seed(1)
    model = train.GPT(c, VOCABULARY, T, train.sdpa_attention).initialise(torch.float32)
    untrained = stand_in.evaluate_bpb(model, None, 16, T)
    optimiser = train.Optimiser(model, c, compiled=False)
    steps, counted, seconds = train.train(model, optimiser, clock(60, 8), c, torch.device("cpu"))
    assert (steps, counted) == (60, 60)
    assert seconds > 0
    assert untrained == pytest.approx(math.log2(VOCABULARY), abs=0.1)
    assert stand_in.evaluate_bpb(model, None, 16, T) < untrained - 0.5


def test_the_program_trains_is_scored_and_ends_with_the_summary(tmp_path):
    done = run(tmp_path, TRAIN.read_text())
    assert done.returncode == 0, done.stderr
    assert "eager: no compiler (/no/compiler)" in done.stdout
    assert "attention: sdpa; fa3: needs Hopper" in done.stdout
    summary = dict(line.split(": ") for line in done.stdout.split("---\n")[1].splitlines())
    assert list(summary) == [
        "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent",
        "total_tokens_M", "num_steps", "num_params_M", "depth",
    ]  # fmt: skip
    assert 0 < float(summary["val_bpb"]) < math.log2(VOCABULARY) - 0.5
    assert int(summary["num_steps"]) == 20
    assert "20 | loss" in done.stdout or "00020 (" in done.stdout


def test_a_nan_ends_the_run_at_once_with_status_1_and_in_words(tmp_path):
    text, changed = re.subn(r'("logit_cap": )15.0', r"\1float('nan')", TRAIN.read_text())
    assert changed == 3
    done = run(tmp_path, text)
    assert done.returncode == 1
    assert "Training failed: the loss of step 1 is nan" in done.stderr
    assert "---" not in done.stdout


@pytest.mark.parametrize("loss", [math.nan, math.inf, 100.5])
def test_a_hopeless_loss_ends_the_run(loss):
    with pytest.raises(SystemExit, match="Training failed: the loss of step 7 is"):
        train.check(loss, 7)
    train.check(100, 7)


def test_telemetry_names_what_a_reader_needs(clock):
    stand_in.LOGGED.clear()
    c, model = small_gpt(total_batch=2 * T, device_batch=2)
    optimiser = train.Optimiser(model, c, compiled=False)
    train.train(model, optimiser, clock(10, 2), c, torch.device("cpu"))
    names = ["step", "loss", "lr_multiplier", "tokens_per_second", "memory_mb"]
    assert [list(entry) for entry in stand_in.LOGGED] == [names] * 10
    assert [entry["step"] for entry in stand_in.LOGGED] == list(range(1, 11))
    multipliers = [entry["lr_multiplier"] for entry in stand_in.LOGGED]
    assert multipliers[:6] == [1.0] * 6
    assert multipliers[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


# ---------------------------------------------------------------- model


def test_parameters_are_counted_as_described():
    with torch.device("meta"):
        h100 = train.GPT(block(train, "h100"), 8192, 2048, None)
        cpu = train.GPT(block(train, "cpu"), 2048, 256, None)
    count = [sum(p.numel() for p in model.parameters()) for model in (h100, cpu)]
    C, V = 512, 8192
    assert count[0] == 6 * V * C + 8 * 12 * C * C + 4 * 4 * 32 + 2 * 8  # 50.3M, as upstream's
    assert count[1] == 3 * 2048 * 128 + 2 * 12 * 128 * 128 + 2 * 64 + 2 * 2
    assert h100.windows == [1024, 1024, 1024, 2048] * 2
    assert cpu.windows == [1, 256]
    assert h100.flops_per_token() == pytest.approx(0.398 * 989.5e12 / 1.665e6, rel=0.02)


@pytest.mark.parametrize(("scale", "depth"), [("h100", 8), ("small", 4), ("cpu", 2)])
def test_every_scale_makes_a_step_that_changes_every_parameter(scale, depth):
    c, model = small_gpt(scale)
    assert len(model.blocks) == depth
    optimiser = train.Optimiser(model, c, compiled=False)
    x, y, _ = next(batches(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in (1, 2):
        model.zero_grad()
        model(x, y).backward()
        optimiser.step(step, 0.0, 1.0)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        assert not torch.equal(p, before[name]), name
    assert model(x).shape == (2, T, VOCABULARY)


def test_the_stream_stays_in_bfloat16_and_logits_are_float32():
    """As on a GPU: one float32 tensor in the residual stream would make all of it float32."""
    c = block(train, "h100", width_per_layer=8, head_width=32)
    model = train.GPT(c, VOCABULARY, T, train.sdpa_attention).initialise(torch.bfloat16)
    seen = set()
    for layer in model.layers((train.Block, train.Linear, train.Attention, train.MLP)):
        layer.register_forward_hook(lambda _layer, _inputs, output: seen.add(output.dtype))
    x, y, _ = next(batches(2))
    optimiser = train.Optimiser(model, c, compiled=False)
    for step in (1, 2):
        loss = model(x, y)
        loss.backward()
        optimiser.step(step, 0.0, 1.0)
        model.zero_grad()
    assert seen == {torch.bfloat16}
    assert loss.dtype == model(x).dtype == torch.float32
    kinds = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    assert all("embedding" in name for name in kinds)


def test_initial_weights_are_as_described():
    c = block(train, "h100", width_per_layer=32)
    model = train.GPT(c, 1024, T, train.sdpa_attention).initialise(torch.bfloat16)
    attention, mlp = model.blocks[-1].attention, model.blocks[-1].mlp
    bound = math.sqrt(3 / 256)
    assert model.embedding.weight.dtype == attention.value_embedding.weight.dtype == torch.bfloat16
    assert model.embedding.weight.float().std().item() == pytest.approx(1, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    for layer in (attention.query, attention.key, attention.value, mlp.hidden):
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert not any(w.weight.any() for w in (attention.output, mlp.output, attention.gate))
    has_values = [b.attention.value_embedding is not None for b in model.blocks]
    assert has_values == [False, True] * 4
    assert model.residual_scales.tolist() == [1.0] * 8
    assert model.injection_scales.tolist() == pytest.approx([0.1] * 8)


def test_later_tokens_leave_earlier_logits_exactly_as_they_were():
    _, model = small_gpt("h100")
    x, _, _ = next(batches(3))
    for cut in (1, 17, T - 1):
        other = x.clone()
        other[:, cut:] = (other[:, cut:] + 1) % VOCABULARY
        seen, changed = model(x), model(other)
        assert torch.equal(seen[:, :cut], changed[:, :cut])
        assert not torch.equal(seen[:, cut:], changed[:, cut:])


def test_a_short_window_hides_what_lies_further_back():
    _, model = small_gpt(depth=1, short_window=0.25)
    model.blocks[0].attention.window = 16
    x, _, _ = next(batches(1))
    for back, visible in ((16, True), (17, False)):
        other = x.clone()
        other[:, -1 - back] = (other[:, -1 - back] + 1) % VOCABULARY
        assert torch.equal(model(x)[:, -1], model(other)[:, -1]) != visible


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_losses_do_not_depend_on_the_rows_beside_them(rows):
    _, model = small_gpt()
    x, y, _ = next(batches(8))
    whole = model(x, y, reduction="none").view(8, T)
    parts = [
        model(a, b, reduction="none") for a, b in zip(x.split(rows), y.split(rows), strict=True)
    ]
    assert torch.allclose(torch.cat(parts).view(8, T), whole, atol=1e-5)
    assert whole.mean().item() == pytest.approx(model(x, y).item(), abs=1e-5)


def test_a_shorter_context_is_a_prefix():
    _, model = small_gpt()
    x, _, _ = next(batches(2))
    assert torch.allclose(model(x[:, :20]), model(x)[:, :20], atol=1e-5)


def test_logits_stay_within_their_cap():
    _, model = small_gpt(head_std=100.0)
    assert model(next(batches(1))[0]).abs().max() <= 15


# ---------------------------------------------------------------- optimisers


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 24), (2, 24, 96), (1, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalising_brings_all_singular_values_near_one(shape, dtype):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u @ torch.diag_embed(s.clamp_min(0.05 * s.max())) @ v
    nearly = train.orthogonalise(1e-3 * matrices, dtype)
    values = torch.linalg.svdvals(nearly.float())
    assert values.min() > 0.8
    assert values.max() < 1.2
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), nearly.flatten(), dim=0) > 0.98


def muon(rows=24, columns=12, n=2, rate=0.1):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(rows, columns)) for _ in range(n)]
    return parameters, train.Muon(parameters, rate, beta2=0.95)


def test_a_muon_step_is_as_large_as_its_rate_says_whatever_the_gradient():
    for size in (1e-6, 1e3):
        parameters, group = muon()
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = size * torch.randn_like(p)
        with torch.no_grad():
            group.schedule(1.0, momentum=0.9, decay=0.0)
            group.update()
        for p, old in zip(parameters, before, strict=True):
            change = (p.detach() - old) / (0.1 * math.sqrt(24 / 12))
            assert change.norm().item() == pytest.approx(math.sqrt(12), rel=0.15)
            neurons = change.norm(dim=1)  # NorMuon: rows of equal size
            assert neurons.max() < 1.02 * neurons.min()


def test_muon_leaves_a_matrix_without_gradient_alone():
    parameters, group = muon()
    before = parameters[0].detach().clone()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        group.schedule(1.0, momentum=0.9, decay=0.1)
        group.update()
    assert torch.equal(parameters[0], before)


def test_weight_decay_acts_only_where_it_pulls_the_same_way_as_the_gradient():
    (free,), plain = muon(n=1)
    (decayed,), decaying = muon(n=1)
    start = free.detach().clone()
    gradient = torch.randn_like(start)
    for p, group, decay in ((free, plain, 0.0), (decayed, decaying, 0.5)):
        p.grad = gradient.clone()
        with torch.no_grad():
            group.schedule(1.0, momentum=0.9, decay=decay)
            group.update()
    towards_zero = (start - free.detach()) * start > 0
    pulled = (free - decayed).detach() / start  # positive: nearer to zero than without decay
    assert torch.allclose(pulled[towards_zero], torch.tensor(0.5 * 0.1 * math.sqrt(2)), rtol=1e-3)
    assert not pulled[~towards_zero].any()


def test_adamw_equals_torchs():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5, 3))
    theirs = torch.nn.Parameter(ours.detach().clone())
    group = train.AdamW([ours], 0.1, 0.8, 0.95, 1e-10)
    reference = torch.optim.AdamW([theirs], 0.05, (0.8, 0.95), 1e-10, weight_decay=0)
    for step in range(1, 6):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        with torch.no_grad():
            group.schedule(step, multiplier=0.5)
            group.update()
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch(clock):
    def gradients_of_a_step(rows):
        c, model = small_gpt(device_batch=rows, total_batch=8 * T)
        found = []
        recorder = SimpleNamespace(
            step=lambda *_: found.extend(p.grad.clone() for p in model.parameters())
        )
        train.train(model, recorder, clock(8 // rows, rows), c, torch.device("cpu"))
        return found

    for whole, accumulated in zip(gradients_of_a_step(8), gradients_of_a_step(2), strict=True):
        assert torch.allclose(whole, accumulated, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- constants


def shipped_blocks():
    tree = ast.parse(TRAIN.read_text())
    (value,) = [
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "CONSTANTS"
    ]  # fmt: skip
    return tree, ast.literal_eval(value)


def test_constants_are_literals_one_a_line_with_the_same_names_at_every_scale():
    _, blocks = shipped_blocks()
    assert list(blocks) == ["h100", "small", "cpu"]
    assert blocks == train.CONSTANTS
    assert len({tuple(block) for block in blocks.values()}) == 1
    text = TRAIN.read_text()
    for name in blocks["cpu"]:
        assert len(re.findall(rf'^ +"{name}": \S+,', text, flags=re.M)) == 3


def test_every_constant_found_by_syntax_is_used():
    tree, blocks = shipped_blocks()
    used = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("c", "self.c")
    }  # fmt: skip
    assert used == set(blocks["cpu"])


def graphs(**changes):
    """The code of every graph that torch.compile would compile for a step."""
    torch._dynamo.reset()
    found = []

    def capture(graph, _inputs):
        found.append(graph.code)
        return graph.forward

    c, model = small_gpt(**changes)
    optimiser = train.Optimiser(model, c, compiled=False)
    compiled = torch.compile(model, backend=capture, dynamic=False)
    optimiser.update = torch.compile(optimiser.update_all, backend=capture, dynamic=False)
    x, y, _ = next(batches(2))
    for step in (1, 2):
        compiled(x, y).backward()
        optimiser.step(step, 0.5 * step, 1.0)
        model.zero_grad()
    return found


def test_numbers_of_optimisers_schedules_and_initialisation_compile_nothing_anew():
    shipped = graphs()
    assert len(shipped) == 2  # the model and all of the optimiser: no graph breaks, no recompiling
    _, blocks = shipped_blocks()
    names = list(blocks["cpu"])
    tuned = [*names[names.index("embedding_std") : names.index("device_batch")],
             *names[names.index("total_batch") + 1 :]]  # fmt: skip
    assert "matrix_rate" in tuned
    assert "warmdown" in tuned
    halved = {name: blocks["cpu"][name] / 2 for name in tuned}
    assert graphs(**halved) == shipped
    assert graphs(logit_cap=7.5) != shipped


# ---------------------------------------------------------------- with the real prepare


def test_the_shipped_program_alone_starts_a_referee_and_learns(tmp_path):
    """At least 64 optimiser steps; nobody else is there to start a referee."""
    texts, data = tmp_path / "texts", tmp_path / "data"
    texts.mkdir()
    for number, module in enumerate((typing, string, textwrap, inspect, argparse, ast)):
        (texts / f"{number}.txt").write_text(inspect.getsource(module))
    scale = prepare.Scale("cpu", T, 400, 2**12, 2**9, "tokens", 64 * 2048, startup_free_s=60)
    prepare.prepare(Source(f"dir:{texts}"), scale, data)
    kept = {name: value for name, value in os.environ.items() if "AUTORESEARCH" not in name}
    done = subprocess.run(
        [sys.executable, TRAIN],
        cwd=tmp_path,
        env={**kept, "AUTORESEARCH_DATA": str(data), "CXX": "none", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    summary = dict(line.split(": ") for line in done.stdout.split("---\n")[1].splitlines())
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert int(summary["num_steps"]) >= 64  # and a few that warm up
    assert losses[0] == pytest.approx(math.log(400), abs=0.1)
    # an untrained model scores losses[0] nats a token: by as much as the loss falls, so does it
    assert 0 < float(summary["val_bpb"]) < flat_bpb(data, losses[0]) - 0.5


def flat_bpb(data, loss):
    """bits per byte of a model that loses `loss` nats at every token of the validation rows."""
    stream = rows.RowStream(data, "val", T)
    tokens = stream.take(min(2**12 // T, stream.rows), 0)[0][:, 1:]
    lengths = rows.token_bytes(data)[0][tokens]
    return (lengths > 0).sum() * loss / (math.log(2) * lengths.sum())


def test_the_program_is_short_enough_to_be_read_whole():
    assert len(TRAIN.read_text().splitlines()) <= 700
