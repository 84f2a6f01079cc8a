"""What the machine has is found by trying it; what is missing is named with the command that gets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from orpo_cli import doctor
from orpo_cli.doctor import Finding


def orpo_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orpo_cli", "doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_this_machine_can_train_and_no_token_is_shown(tmp_path):
    done = orpo_doctor("--json", HF_TOKEN="hf_donotshowme", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert by_name["torch"]["what"] == version("torch")
    assert by_name["4-bit"]["state"] == "ok"
    assert by_name["cpu dtypes"]["what"].startswith("float32, bfloat16")
    assert by_name["hub"]["what"].startswith("offline")
    assert by_name["hub cache"]["what"].startswith(str(tmp_path / "hub"))
    assert by_name["hub token"]["what"] == "there is one"
    assert "donotshowme" not in done.stdout + done.stderr


def test_a_torch_that_cannot_be_imported_fails_and_hides_nothing_else(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    path = os.pathsep.join([str(tmp_path), str(Path(doctor.__file__).parents[1])])
    done = orpo_doctor(PYTHONPATH=path)
    assert done.returncode == 1
    assert "fails  torch" in done.stdout
    assert "cannot be imported: ImportError: libcudart.so.12: cannot open\n" in done.stdout
    assert "pip install -c constraints.txt torch" in done.stdout
    assert "disk here" in done.stdout
    assert "Traceback" not in done.stderr


RICH, NOBODYS = version("rich"), "not-a-package-of-anyone"
INSTALL = f"pip install '{NOBODYS}>=1'"


@pytest.mark.parametrize(
    ("requirement", "use", "expected"),
    [
        ("rich>=14.0", None, Finding("rich", "ok", RICH)),
        ("rich>=1400", None, Finding("rich", "fails", f"{RICH}, and 1400 is needed", "pip install 'rich>=1400'")),
        (f"{NOBODYS}>=1", None, Finding(NOBODYS, "fails", "not installed", INSTALL)),
        (f"{NOBODYS}>=1", "for x", Finding(NOBODYS, "lacks", "not installed, for x", INSTALL)),
    ],
)
def test_packages(requirement, use, expected):
    assert doctor.package(requirement, use) == expected


def test_versions_are_compared_as_numbers():
    assert doctor._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor._numbers("2.9") < doctor._numbers("2.11")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_tried(dtype):
    assert doctor.product_error("cpu", dtype) is None
    assert "float33" in (doctor.product_error("cpu", "float33") or "")
    assert doctor.product_error("meta", dtype) is not None  # a device that computes nothing


def test_four_bit_layers_are_tried_in_another_process():
    assert 0 < doctor.four_bit_error("cpu") < doctor.WRONG
    found = doctor.four_bit("nowhere")
    assert (found.name, found.state) == ("4-bit", "lacks")
    assert "nowhere" in found.what
    assert found.hint


def test_a_failure_is_one_whatever_else_is_well():
    well, bad = Finding("a", "ok", "1"), Finding("b", "fails", "2", "get it")
    assert not doctor.fails([well, Finding("c", "lacks", "3")])
    assert doctor.fails([well, bad])
    assert doctor.report([well, bad]) == "ok     a  1\nfails  b  2\n          get it"
