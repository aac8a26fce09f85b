"""The experiment: a GPT, its optimisers and its training loop. This is the file to edit.

Data, clock and score belong to `prepare`, which stays as it is; everything below is yours, as long
as the program trains on what `make_dataloader` yields, stops when `progress()` reaches 1 and then
calls `evaluate_bpb` once. Reading order: constants, attention, model, optimisers, schedule, loop.

Shapes in comments: B rows, T positions, C channels of the residual stream, H heads of D channels,
V vocabulary.

CONSTANTS holds one block per scale, and the block named by SCALE is the active one. Tools find it
by syntax, as `CONSTANTS = {"<scale>": {"<name>": <literal>, ...}, ...}`: one literal a line, the
same names in every block, each used as `c.<name>`. Rates, schedules, initialisation and the other
numbers of the optimisers reach compiled code as tensors, so that changing them compiles nothing.
"""

import gc
import importlib
import math
import os
import shutil
import sys
import sysconfig
import time
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch starts CUDA

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import (
    MAX_SEQ_LEN,
    SCALE,
    SEED,
    Tokenizer,
    evaluate_bpb,
    log,
    make_dataloader,
    progress,
)

STARTED = time.perf_counter()

CONSTANTS = {
    # One H100 (80 GB): T 2048, vocabulary 8192, five minutes of wall time.
    "h100": {
        # model
        "depth": 8,  # layers
        "width_per_layer": 64,  # C = depth times this, rounded up to whole heads
        "head_width": 128,  # D, of queries, keys and values
        "mlp_factor": 4,  # hidden channels of the MLP per channel of the stream
        "window_pattern": "SSSL",  # repeated over the layers: Short or Long; the last is always L
        "short_window": 0.5,  # how far back S layers look, as a share of the context
        "rotary_base": 10_000,  # of the wavelengths of the positions
        "value_gate_channels": 32,  # channels that decide how much value embedding enters
        "logit_cap": 15.0,  # logits are squashed into +- this
        # initialisation
        "embedding_std": 1.0,
        "head_std": 0.001,
        "matrix_scale": 1.0,  # of the uniform matrices; 1 keeps a unit input at unit size
        "residual_scale": 1.0,  # what each layer keeps of the stream
        "injection_scale": 0.1,  # what each layer adds of the embedding again
        # batches
        "device_batch": 128,  # rows per forward and backward pass
        "total_batch": 524_288,  # tokens per optimiser step, by accumulating gradients
        # AdamW, for everything that is not a matrix (rates at width 768, scaled by its root)
        "embedding_rate": 0.6,  # token and value embeddings
        "head_rate": 0.004,
        "scalar_rate": 0.5,  # injection scales; residual scales move a hundred times slower
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "injection_beta1": 0.96,  # injection scales average over longer
        "adam_eps": 1e-10,
        # Muon, for the matrices
        "matrix_rate": 0.04,
        "momentum_start": 0.85,
        "momentum_end": 0.95,
        "momentum_steps": 300,  # optimiser steps from the one to the other
        "muon_beta2": 0.95,  # averages the sizes of neurons
        "weight_decay": 0.2,  # falls linearly to 0
        # schedule
        "warmdown": 0.5,  # last share of the budget, over which the rates fall linearly to 0
    },
    # Cards of 8 to 24 GB: T 1024, vocabulary 8192, five minutes of wall time.
    "small": {
        "depth": 4,
        "width_per_layer": 64,
        "head_width": 128,
        "mlp_factor": 4,
        "window_pattern": "L",
        "short_window": 0.5,
        "rotary_base": 10_000,
        "value_gate_channels": 32,
        "logit_cap": 15.0,
        "embedding_std": 1.0,
        "head_std": 0.001,
        "matrix_scale": 1.0,
        "residual_scale": 1.0,
        "injection_scale": 0.1,
        "device_batch": 16,
        "total_batch": 65_536,
        "embedding_rate": 0.6,
        "head_rate": 0.004,
        "scalar_rate": 0.5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "injection_beta1": 0.96,
        "adam_eps": 1e-10,
        "matrix_rate": 0.04,
        "momentum_start": 0.85,
        "momentum_end": 0.95,
        "momentum_steps": 300,
        "muon_beta2": 0.95,
        "weight_decay": 0.2,
        "warmdown": 0.5,
    },
    # Two CPU cores: T 256, vocabulary 2048, a budget in tokens of about 20 seconds.
    "cpu": {
        "depth": 2,
        "width_per_layer": 64,
        "head_width": 64,
        "mlp_factor": 4,
        "window_pattern": "SSSL",
        "short_window": 0.004,  # one token back: two layers learn to copy soonest from pairs
        "rotary_base": 10_000,
        "value_gate_channels": 64,
        "logit_cap": 15.0,
        "embedding_std": 1.0,
        "head_std": 0.001,
        "matrix_scale": 1.0,
        "residual_scale": 1.0,
        "injection_scale": 0.1,
        "device_batch": 8,
        "total_batch": 2048,
        "embedding_rate": 0.6,
        "head_rate": 0.004,
        "scalar_rate": 0.5,
        "adam_beta1": 0.6,
        "adam_beta2": 0.95,
        "injection_beta1": 0.96,
        "adam_eps": 1e-10,
        "matrix_rate": 0.04,
        "momentum_start": 0.85,
        "momentum_end": 0.9,
        "momentum_steps": 300,
        "muon_beta2": 0.95,
        "weight_decay": 0.1,
        "warmdown": 0.5,
    },
}


# ---------------------------------------------------------------- attention
# Every backend is a function (q, k, v, window) -> y on (B, T, H, D). Position i sees the positions
# from i - window to i; a window of T or more is full causal attention.


def attention_mask(T, window, device):
    """(T, T) of bool: True where query (row) may look at key (column)."""
    position = torch.arange(T, device=device)
    back = position[:, None] - position[None, :]
    return (back >= 0) & (back <= window)


def sdpa_attention(q, k, v, window):
    """PyTorch's own, everywhere. It knows no windows: short ones cost a mask and full attention."""
    T = q.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    if window >= T:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = attention_mask(T, window, q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2)


def flex_attention(device, T, windows):
    """FlexAttention: block masks, built here once, skip what a window hides. Only as compiled."""
    if reason := why_not_compile(device):
        return reason
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as eager

    def block_mask(window):
        def visible(b, h, query, key):
            return (query >= key) & (query - key <= window)

        return create_block_mask(visible, None, None, T, T, device=device)

    masks = {window: block_mask(window) for window in windows}
    compiled = torch.compile(eager, dynamic=False)

    def attend(q, k, v, window):
        if q.size(1) != T:
            return sdpa_attention(q, k, v, window)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        return compiled(q, k, v, block_mask=masks[window]).transpose(1, 2)

    return attend


def flash_attention(module):
    """FlashAttention from an installed module: sliding windows without a mask."""
    try:
        function = importlib.import_module(module).flash_attn_func
    except ImportError as error:
        return str(error)

    def attend(q, k, v, window):
        back = -1 if window >= q.size(1) else window
        y = function(q, k, v, causal=True, window_size=(back, 0))
        return y[0] if isinstance(y, tuple) else y  # some FA3 add the log-sum-exp

    return attend


def attention_backends(device, T, windows):
    """{name: function, or the reason why it cannot run here}, the fastest first."""
    cuda = device.type == "cuda"
    generation = torch.cuda.get_device_capability(device)[0] if cuda else 0  # Ampere 8, Hopper 9
    return {
        "fa3": flash_attention("flash_attn_interface") if generation == 9 else "needs Hopper",
        "fa2": flash_attention("flash_attn") if generation >= 8 else "needs Ampere or newer",
        "flex": flex_attention(device, T, windows) if cuda else "needs CUDA",
        "sdpa": sdpa_attention,
    }


# ---------------------------------------------------------------- model


def norm(x):
    """Root-mean-square norm over the last axis, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(T, D, base):
    """cos and sin of every position's rotation angles, each (T, 1, D/2), in float32."""
    wavelengths = base ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    angles = torch.arange(T, dtype=torch.float32)[:, None] / wavelengths
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x: (B, T, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Linear(nn.Linear):
    """No bias; weights in float32, applied in the precision of the input.

    Cast here rather than by autocast, which would run every norm in float32 and with it, since
    additions take the wider type, the whole residual stream.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention over a window; in some layers the values also depend on the bare token."""

    def __init__(self, c, V, C, window, attend, has_value_embedding):
        super().__init__()
        self.heads, self.window, self.attend = C // c.head_width, window, attend
        self.query, self.key, self.value = Linear(C, C), Linear(C, C), Linear(C, C)
        self.output = Linear(C, C)
        self.value_embedding = nn.Embedding(V, C) if has_value_embedding else None
        gates = min(c.value_gate_channels, C)
        self.gate = Linear(gates, self.heads) if has_value_embedding else None

    def forward(self, x, tokens, cos, sin):
        B, T, C = x.shape
        q, k, v = (
            matrix(x).view(B, T, self.heads, -1) for matrix in (self.query, self.key, self.value)
        )
        if self.value_embedding is not None:
            amount = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, H)
            v = v + amount.unsqueeze(-1) * self.value_embedding(tokens).view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = self.attend(q, k, v, self.window)  # (B, T, H, D)
        return self.output(y.reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, c, C):
        super().__init__()
        self.hidden = Linear(C, c.mlp_factor * C)
        self.output = Linear(c.mlp_factor * C, C)

    def forward(self, x):
        return self.output(F.relu(self.hidden(x)).square())


class Block(nn.Module):
    def __init__(self, c, V, C, window, attend, has_value_embedding):
        super().__init__()
        self.attention = Attention(c, V, C, window, attend, has_value_embedding)
        self.mlp = MLP(c, C)

    def forward(self, x, tokens, cos, sin):
        x = x + self.attention(norm(x), tokens, cos, sin)
        return x + self.mlp(norm(x))


def layer_windows(c, T):
    """How far back each layer looks: T is everything. The last layer always sees everything."""
    short = max(1, int(T * c.short_window))
    letters = [c.window_pattern[layer % len(c.window_pattern)] for layer in range(c.depth)]
    return [short if letter == "S" else T for letter in letters[:-1]] + [T]


class GPT(nn.Module):
    """`model(x)` gives logits (B, T, V), float32; `model(x, y)` the mean loss in nats, and with
    reduction="none" the loss of every position, (B * T)."""

    def __init__(self, c, V, T, attend):
        super().__init__()
        C = math.ceil(c.depth * c.width_per_layer / c.head_width) * c.head_width
        self.c, self.windows = c, layer_windows(c, T)
        self.embedding = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(
            # every other layer has a value embedding, counted from the last, which has one
            Block(c, V, C, window, attend, has_value_embedding=(c.depth - layer) % 2 == 1)
            for layer, window in enumerate(self.windows)
        )
        self.residual_scales = nn.Parameter(torch.empty(c.depth))
        self.injection_scales = nn.Parameter(torch.empty(c.depth))
        self.head = Linear(C, V)
        cos, sin = rotary_table(T, c.head_width, c.rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def layers(self, kind):
        return [module for module in self.modules() if isinstance(module, kind)]

    @torch.no_grad()
    def initialise(self, dtype):
        """Fresh weights. The stream runs in `dtype`, because embeddings and rotary tables do."""
        c, bound = self.c, self.c.matrix_scale * math.sqrt(3 / self.head.in_features)
        for layer in self.layers((Linear, nn.Embedding)):
            nn.init.uniform_(layer.weight, -bound, bound)
        for block in self.blocks:
            for silent in (block.attention.output, block.mlp.output, block.attention.gate):
                if silent is not None:
                    nn.init.zeros_(silent.weight)
        nn.init.normal_(self.embedding.weight, std=c.embedding_std)
        nn.init.normal_(self.head.weight, std=c.head_std)
        self.residual_scales.fill_(c.residual_scale)
        self.injection_scales.fill_(c.injection_scale)
        for table in self.layers(nn.Embedding):
            table.to(dtype)
        self.cos, self.sin = self.cos.to(dtype), self.sin.to(dtype)
        return self

    def forward(self, tokens, targets=None, reduction="mean"):
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        x = embedded = norm(self.embedding(tokens))  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = self.residual_scales[layer] * x + self.injection_scales[layer] * embedded
            x = block(x, tokens, cos, sin)
        cap = self.c.logit_cap
        logits = cap * torch.tanh(self.head(norm(x)).float() / cap)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    def flops_per_token(self):
        """Of forward and backward: 6 per weight of a matrix, 12 C per visible position a layer."""
        weights = sum(layer.weight.numel() for layer in self.layers(Linear))
        return 6 * weights + 12 * self.head.in_features * sum(self.windows)


# ---------------------------------------------------------------- optimisers
# Numbers that change from step to step, or that one likes to tune, are 0-dimensional tensors on
# the device: compiled code reads them instead of containing them.


def number(value, like):
    return torch.tensor(float(value), dtype=torch.float32, device=like.device)


class AdamW:
    """Adam without weight decay, over a list of tensors."""

    def __init__(self, parameters, rate, beta1, beta2, eps):
        self.parameters, self.rate, self.betas = parameters, rate, (beta1, beta2)
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        self.beta1, self.beta2, self.eps, self.step_size, self.square_scale = (
            number(value, parameters[0]) for value in (beta1, beta2, eps, 0, 0)
        )

    def schedule(self, step, multiplier):
        """Numbers of step `step` (from 1), corrected for averages that started from zero."""
        beta1, beta2 = self.betas
        self.step_size.fill_(self.rate * multiplier / (1 - beta1**step))
        self.square_scale.fill_(1 / (1 - beta2**step))

    def update(self):
        for p, mean, square in zip(self.parameters, self.mean, self.square, strict=True):
            mean.add_((1 - self.beta1) * (p.grad - mean))
            square.add_((1 - self.beta2) * (p.grad.square() - square))
            p.sub_(self.step_size * mean / ((square * self.square_scale).sqrt() + self.eps))


# Five steps of the Polar Express (arXiv 2505.16932), each X <- a X + (b A + c A A) X, A = X X':
# together they bring every singular value near 1. Safety factor 1.02, for bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices, dtype):
    """The nearest (semi-)orthogonal matrix, roughly, of each of (n, rows, columns)."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum, orthogonalised (Muon), neurons brought to equal size (NorMuon), cautious decay.

    One group holds all matrices of one shape, stacked, so that they are multiplied together.
    """

    def __init__(self, parameters, rate, beta2):
        self.parameters = parameters
        rows, columns = parameters[0].shape
        self.rate = rate * math.sqrt(max(1.0, rows / columns))
        self.short_axis = -1 if rows >= columns else -2
        stack = torch.stack([p.detach() for p in parameters])  # (n, rows, columns)
        self.average = torch.zeros_like(stack)
        self.size = torch.zeros_like(stack.mean(self.short_axis, keepdim=True))
        self.dtype = torch.bfloat16 if stack.is_cuda else torch.float32
        self.beta2, self.momentum, self.step_size, self.decay = (
            number(value, stack) for value in (beta2, 0, 0, 0)
        )

    def schedule(self, multiplier, momentum, decay):
        self.step_size.fill_(self.rate * multiplier)
        self.momentum.fill_(momentum)
        self.decay.fill_(decay)

    def update(self):
        gradient = torch.stack([p.grad for p in self.parameters])
        self.average.lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp(self.average, self.momentum)  # Nesterov's
        direction = self.equalise(orthogonalise(ahead, self.dtype))
        for p, change in zip(self.parameters, direction.unbind(), strict=True):
            shrinks = (change * p > 0).to(p.dtype)  # decay only where it pulls the same way
            p.sub_(self.step_size * (change + self.decay * shrinks * p))

    def equalise(self, x):
        """Divide each neuron by its usual size, then restore the norm of the whole matrix."""
        size = x.square().mean(self.short_axis, keepdim=True)
        self.size.lerp_(size, 1 - self.beta2)
        equal = x * self.size.clamp_min(1e-10).rsqrt()
        before, after = (m.norm(dim=(-2, -1), keepdim=True) for m in (x, equal))
        return equal * (before / after.clamp_min(1e-10))


class Optimiser:
    """Which parameter learns how: AdamW and Muon groups, stepped together."""

    def __init__(self, model, c, compiled):
        self.c = c
        embeddings = [table.weight for table in model.layers(nn.Embedding)]
        matrices = defaultdict(list)
        for layer in model.layers(Linear):
            if layer is not model.head:
                matrices[layer.weight.shape].append(layer.weight)
        scale = (model.head.in_features / 768) ** -0.5

        def adamw(parameters, rate, beta1=c.adam_beta1):
            return AdamW(parameters, rate, beta1, c.adam_beta2, c.adam_eps)

        self.adamw = [
            adamw(embeddings, c.embedding_rate * scale),
            adamw([model.head.weight], c.head_rate * scale),
            adamw([model.residual_scales], c.scalar_rate / 100),
            adamw([model.injection_scales], c.scalar_rate, c.injection_beta1),
        ]
        self.muon = [Muon(group, c.matrix_rate, c.muon_beta2) for group in matrices.values()]
        self.update = torch.compile(self.update_all, dynamic=False) if compiled else self.update_all

    def update_all(self):
        for group in [*self.adamw, *self.muon]:
            group.update()

    @torch.no_grad()
    def step(self, step, done, multiplier):
        """Step `step` (from 1) at progress `done`, with the rates times `multiplier`."""
        c, warm = self.c, min(1.0, (step - 1) / self.c.momentum_steps)
        momentum = c.momentum_start + warm * (c.momentum_end - c.momentum_start)
        for group in self.adamw:
            group.schedule(step, multiplier)
        for group in self.muon:
            group.schedule(multiplier, momentum, c.weight_decay * (1 - done))
        self.update()


def rate_multiplier(c, done):
    """Of all learning rates at progress `done`: 1, then linearly to 0 over the warmdown."""
    return min(1.0, (1 - done) / c.warmdown)


# ---------------------------------------------------------------- machine


def pick_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def why_not_compile(device):
    """None where torch.compile can work, else the reason."""
    if device.type == "mps":
        return "torch.compile for MPS is a prototype"
    variable, names = "CC", ("gcc", "clang")  # Triton's
    if device.type == "cpu":
        variable, names = "CXX", ("clang++" if sys.platform == "darwin" else "g++",)
    names = (os.environ[variable],) if variable in os.environ else names
    if not any(shutil.which(name) for name in names):
        return f"no compiler ({' or '.join(names)})"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return None if os.path.exists(header) else f"no {header}"


def peak_memory_mb(device):
    """Most memory used so far in MiB: of the card where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_flops(device):
    """Dense bf16 operations a second by the maker's data sheet; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
    return next((flops for key, flops in known.items() if key in name), None)


# ---------------------------------------------------------------- loop


def check(loss, step):
    """End the run at once when it cannot come to anything.

    Raises:
        SystemExit: with status 1, in words, for a loss that is NaN or over 100.
    """
    if not loss <= 100:
        sys.exit(f"Training failed: the loss of step {step} is {loss}. Nothing was scored.")


class Monitor:
    """Looks at the loss about every percent of the budget: reading it waits for the device."""

    def __init__(self, device, batch_tokens):
        self.device, self.batch_tokens = device, batch_tokens
        self.last_step, self.last_time, self.last_done = 0, time.perf_counter(), -1.0

    def report(self, step, done, loss, multiplier, epoch):
        if done - self.last_done < 0.01 and done < 1:
            return
        loss, now = loss.item(), time.perf_counter()
        check(loss, step)
        rate = (step - self.last_step) * self.batch_tokens / (now - self.last_time)
        memory = peak_memory_mb(self.device)
        log(
            step=step, loss=loss, lr_multiplier=multiplier, tokens_per_second=rate, memory_mb=memory
        )
        print(f"step {step:05d} ({done:6.1%}) | loss {loss:.4f} | rates x {multiplier:.2f} | "
              f"{rate:,.0f} tokens/s | {memory:,.0f} MB | epoch {epoch}", flush=True)  # fmt: skip
        self.last_step, self.last_time, self.last_done = step, now, done


def train(model, optimiser, loader, c, device):
    """Until progress() is 1. Gives (steps, steps and seconds of them that the clock counted)."""
    passes = c.total_batch // (c.device_batch * MAX_SEQ_LEN)
    monitor = Monitor(device, c.total_batch)
    step, free_steps, clock, done = 0, 0, time.perf_counter(), progress()
    while done < 1:
        if done == 0:  # still in the warm-up, which the budget does not count
            free_steps, clock = step, time.perf_counter()
        step, multiplier = step + 1, rate_multiplier(c, done)
        for _ in range(passes):
            x, y, epoch = next(loader)  # (B, T) each
            loss = model(x, y)
            (loss / passes).backward()
        optimiser.step(step, done, multiplier)
        model.zero_grad(set_to_none=True)
        done = progress()
        monitor.report(step, done, loss.detach(), multiplier, epoch)
        if step == 1:  # from here on no step should wait for a collection
            gc.collect()
            gc.freeze()
            gc.disable()
    return step, step - free_steps, time.perf_counter() - clock


def build(c, device, T, V):
    """The model, the model as compiled, and its optimiser; says what they run on."""
    dtype = torch.float32  # on a CPU too: few are fast in bfloat16, and scores should not differ
    if device.type == "cuda":
        dtype = torch.bfloat16
        torch.set_float32_matmul_precision("high")
    backends = attention_backends(device, T, set(layer_windows(c, T)))
    chosen = next(name for name, backend in backends.items() if callable(backend))
    passed_over = [f"{name}: {why}" for name, why in backends.items() if isinstance(why, str)]
    with device:
        model = GPT(c, V, T, backends[chosen]).initialise(dtype)
    eager = why_not_compile(device)
    compiled = model if eager else torch.compile(model, dynamic=False)
    # On a CPU the optimiser is matrix products, which compiling does not make faster.
    optimiser = Optimiser(model, c, compiled=device.type == "cuda" and not eager)
    print(f"scale {SCALE}, seed {SEED}, {dtype} on {device}, {'eager' if eager else 'compiled'}")
    print(f"attention: {chosen}", *passed_over, *([f"eager: {eager}"] if eager else []), sep="; ")
    return model, compiled, optimiser


def main():
    c, T = SimpleNamespace(**CONSTANTS[SCALE]), MAX_SEQ_LEN
    if c.total_batch % (c.device_batch * T):
        sys.exit(f"total_batch {c.total_batch} is no multiple of {c.device_batch} rows of {T}.")
    torch.manual_seed(SEED)
    device, tokenizer = pick_device(), Tokenizer.from_directory()
    model, compiled, optimiser = build(c, device, T, tokenizer.get_vocab_size())
    loader = make_dataloader(tokenizer, c.device_batch, T, "train")
    steps, counted, seconds = train(compiled, optimiser, loader, c, device)
    # Not the compiled model: it would be compiled anew, which takes longer than it saves.
    val_bpb = evaluate_bpb(model, tokenizer, c.device_batch)

    peak, flops = peak_flops(device), model.flops_per_token() * counted * c.total_batch / seconds
    print("---")
    print(f"val_bpb:          {val_bpb:.6f}")
    print(f"training_seconds: {seconds:.1f}")
    print(f"total_seconds:    {time.perf_counter() - STARTED:.1f}")
    print(f"peak_vram_mb:     {peak_memory_mb(device):.1f}")
    print(f"mfu_percent:      {f'{100 * flops / peak:.2f}' if peak else 'unknown'}")
    print(f"total_tokens_M:   {steps * c.total_batch / 1e6:.1f}")
    print(f"num_steps:        {steps}")
    print(f"num_params_M:     {sum(p.numel() for p in model.parameters()) / 1e6:.1f}")
    print(f"depth:            {c.depth}")


if __name__ == "__main__":
    main()
