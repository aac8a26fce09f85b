"""Every attention backend that runs here is what its definition says, in float64."""

import pytest
import torch

from programs import load_train

train, _ = load_train()

DEVICE = train.pick_device()
T = 128
SHAPES = [(2, T, 2, 32), (1, T, 1, 64)]  # (B, T, H, D)
WINDOWS = (1, 32, T // 2, T)
BACKENDS = train.attention_backends(DEVICE, T, WINDOWS)
RUNNING = [name for name, backend in BACKENDS.items() if callable(backend)]
PRECISION = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE.type == "cuda" else 2e-6


def reference(q, k, v, window):
    """Attention by its definition, position by position, in float64."""
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    y = torch.zeros_like(v)
    for i in range(q.size(1)):
        near = slice(max(0, i - window), i + 1)
        scores = torch.einsum("bhd,bkhd->bhk", q[:, i], k[:, near]) / q.size(-1) ** 0.5
        y[:, i] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v[:, near])
    return y


def random_heads(shape, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float32).to(DEVICE, PRECISION) for _ in range(3)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RUNNING)
def test_a_backend_agrees_with_the_definition(name, shape, window):
    q, k, v = random_heads(shape)
    y = BACKENDS[name](q, k, v, window)
    assert y.shape == shape
    error = (y.cpu().double() - reference(q, k, v, window)).abs().max().item()
    assert error < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", RUNNING)
def test_a_backends_gradients_reach_exactly_what_it_sees(name, window):
    heads = random_heads(SHAPES[0])
    for x in heads:
        x.requires_grad_()
    BACKENDS[name](*heads, window)[:, 100].float().sum().backward()
    for x in heads[1:]:  # keys and values
        reached = x.grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
        assert reached == list(range(max(0, 100 - window), 101))


@pytest.mark.parametrize("name", RUNNING)
def test_a_shorter_sequence_than_prepared_for_is_served(name):
    q, k, v = random_heads((2, 48, 2, 32))
    for window in (32, T):
        y = BACKENDS[name](q, k, v, window).cpu().double()
        assert torch.allclose(y, reference(q, k, v, window), atol=TOLERANCE)


def test_the_backends_are_known_by_name_and_those_that_cannot_run_say_why():
    assert list(BACKENDS) == ["fa3", "fa2", "flex", "sdpa"]
    assert "sdpa" in RUNNING
    reasons = [reason for reason in BACKENDS.values() if not callable(reason)]
    assert all(isinstance(reason, str) and reason for reason in reasons)


def test_a_flash_attention_that_is_not_installed_is_a_reason():
    assert "no_such_module" in train.flash_attention("no_such_module")


@pytest.mark.parametrize(("window", "asked"), [(32, (32, 0)), (T, (-1, 0))])
def test_flash_attention_is_asked_for_a_causal_window(monkeypatch, window, asked):
    """The call as FlashAttention documents it; what it computes is tested where it is installed."""
    calls = []

    class Module:
        @staticmethod
        def flash_attn_func(q, k, v, causal, window_size):
            calls.append((causal, window_size))
            return v, "log-sum-exp"

    monkeypatch.setattr(train.importlib, "import_module", lambda name: Module)
    q, k, v = random_heads(SHAPES[0])
    assert train.flash_attention("flash_attn_interface")(q, k, v, window) is v
    assert calls == [(True, asked)]


@pytest.mark.proof
def test_flex_attention_agrees_with_the_definition_as_compiled_for_a_cpu():
    """Without a GPU its masks can at least be held against the definition."""
    cpu = torch.device("cpu")
    backend = train.flex_attention(cpu, T, (32, T))
    assert callable(backend), backend
    q, k, v = (x.cpu().float() for x in random_heads(SHAPES[0]))
    with torch.no_grad():
        for window in (32, T):
            y = backend(q, k, v, window).double()
            assert torch.allclose(y, reference(q, k, v, window), atol=2e-6)
