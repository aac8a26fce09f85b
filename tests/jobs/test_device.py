"""What is made of a GPU, its driver and torch; and the probe itself, on this machine's torch."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from jobs import config, device

H100, A100 = ("NVIDIA H100 80GB HBM3", "550.54.15"), ("NVIDIA A100", "550.54.15")
CUDA = {"device": "cuda", "gpu": "NVIDIA H100", "cuda": "12.8"}
BLIND, CPU = ({"device": "cpu", "gpu": None, "cuda": cuda} for cuda in ("12.8", None))
LOCAL = config.parse({}).executor


@pytest.mark.parametrize(
    ("cards", "told", "wanted", "status", "words"),
    [
        ([H100], CUDA, True, "ok", "driver 550.54.15"),
        ([], CPU, True, "ok", "built for CPUs"),  # the test cluster's pretend GPUs
        ([], BLIND, False, "ok", "sees no GPU"),
        ([], BLIND, True, "failure", "executor.gpu_syntax"),
        ([H100], BLIND, True, "failure", "administrator"),
        ([("Tesla V100", "470.82")], CUDA, True, "failure", "525 or newer"),
        ([H100], CUDA | {"cuda": "13.0"}, True, "failure", "580 or newer"),
        ([H100, A100], CUDA, True, "warning", "branches.NAME.gpu"),
        ([H100], CPU, True, "warning", "trainer.def"),
    ],
)
def test_cards_and_driver_against_what_torch_is_built_for(cards, told, wanted, status, words):
    finding = device.gpu(cards, told, wanted)
    assert finding.status == status
    assert words in f"{finding.seen} {finding.remedy}"


@pytest.mark.parametrize(
    ("kind", "backends", "status"),
    [
        ("cpu", {"fa3": "not here: needs Hopper", "sdpa": "works"}, "ok"),
        ("cuda", {"fa3": "works", "fa2": "works", "flex": "works", "sdpa": "works"}, "ok"),
        ("cuda", {"fa3": "not here: No module", "fa2": "works", "sdpa": "works"}, "ok"),
        ("cuda", {"fa2": "works", "flex": "fails: no compiler", "sdpa": "works"}, "warning"),
        ("cuda", {"fa2": "not here: No module", "sdpa": "works"}, "warning"),
        ("cuda", {"fa2": "fails: no kernel image", "sdpa": "works"}, "failure"),  # it is taken
        ("cuda", {"sdpa": "fails: wrong by 0.3"}, "failure"),
    ],
)
def test_attention_is_judged_by_the_backend_that_train_py_would_use(kind, backends, status):
    finding = device.attention({"device": kind, "attention": backends})
    assert finding.status == status
    assert all(words in finding.seen for words in backends.values())


def test_the_probe_tries_the_shipped_train_py_here():
    found = {finding.check: finding for finding in device.findings(LOCAL, None)}
    assert found["attention"].status != "failure"
    assert "sdpa works" in found["attention"].seen
    assert "flex " in found["attention"].seen
    assert set(found) == {"GPU", "attention", "compiler"}


def test_an_interpreter_without_torch_is_a_failure_with_its_own_words(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    (finding,) = device.findings(dataclasses.replace(LOCAL, python=str(bare)), None)
    assert finding.status == "failure"
    assert "No module named 'torch'" in finding.seen
    assert "executor.python" in finding.remedy
