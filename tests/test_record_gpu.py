"""The recorder of `make gpu`, as far as it can be tried without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import record_gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so_and_records_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(record_gpu, "RESULTS", tmp_path)
    assert record_gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no CUDA device" in err
    assert not list(tmp_path.iterdir())


def test_it_also_runs_as_a_file():
    done = subprocess.run(
        [sys.executable, "tools/record_gpu.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--methods" in done.stdout


def test_a_trial_on_a_cpu_needs_a_folder_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(record_gpu, "RESULTS", tmp_path)
    assert record_gpu.main(["--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_records_of_a_trial(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(record_gpu, "RESULTS", tmp_path / "results")
    out = tmp_path / "trial"
    argv = ["--device", "cpu", "--out", str(out), "--steps", "2", "--methods", "qlora", "full"]
    assert record_gpu.main(argv) == 0
    assert sorted(p.name for p in out.iterdir()) == ["finetune_full.json", "finetune_qlora.json"]
    assert not (tmp_path / "results").exists()
    table = capsys.readouterr().out.split("ms/step")[1].splitlines()
    for line, method in zip(table[1:], ("qlora", "full"), strict=True):
        one = json.loads((out / f"finetune_{method}.json").read_text("utf-8"))
        assert one["method"] == method and len(one["losses"]) == 2
        assert one["peak_bytes"] is None and one["ms_a_step"] > 0
        assert one["saved_bytes"] > 4 * one["trainable"]
        assert one["provenance"]["command"] == "python -m tools.record_gpu"
        assert one["provenance"]["seed"] == 0 and one["base"]["name"] == "qlora_lab/assets/model"
        assert set(one["provenance"]) >= {"device", "versions", "commit", "date"}
        assert str(tmp_path) not in json.dumps(one)
        assert line.split()[0] == method and line.split()[3] == "-"
