"""The scripts in examples/ run, and show what they say."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test__script__runs_without_a_warning_and_prints_something(script, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert run.stdout.strip()


def test__scripts__are_there():
    assert "diverging_convolution" in {script.stem for script in SCRIPTS}


@pytest.fixture(scope="module")
def diverging():
    with torch.random.fork_rng():
        yield runpy.run_path(str(ROOT / "examples" / "diverging_convolution.py"))


def test__convolution__diverges_without_clipping_and_fit_says_what_to_do(diverging):
    error = diverging["error_without_clipping"](8)
    assert "training diverged" in error
    assert "clip_grad_value=1" in error


def test__convolution__converges_with_clipping(diverging):
    first, last, norm = diverging["losses_with_clipping"](8)
    assert first > 1000
    assert last < 1
    assert 0 < norm < 40
