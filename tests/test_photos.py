"""The commands of "A small model from scratch" (training/README.md), on fewer photographs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(
    not os.environ.get("PHOTOS") or not shutil.which("npm"),
    reason="takes minutes, npm and a network: PHOTOS=1 python -m pytest tests/test_photos.py",
)
def test_held_out_photographs_are_named_more_often_than_by_chance(tmp_path):
    """Chance is 10%, of ten names; 500 guesses reach 15% about once in 3,000 tries."""
    short = ["--train=16000", "--steps=250", f"--out={tmp_path}/photos"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/bench/photos.py", *short],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"^all .* ([\d.]+)% right", done.stdout, re.MULTILINE)[1]) > 20
