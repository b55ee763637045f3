"""FAST=1: a recorded run is found only where everything is the same, and is then the same run."""

import json
import subprocess
import sys
from statistics import median

import bitsandbytes as bnb
import pytest
import torch
from safetensors import safe_open
from tiny_model import tiny_model, tiny_tokenizer

from qlora_lab import QLoRALinear, quantize_4bit, recorded
from qlora_lab.errors import InputError
from qlora_lab.orders import make_rows
from qlora_lab.training import attach_adapter, train
from tools.notebooks import ROOT
from tools.run_notebooks import keep_runs

ROWS = make_rows("seen", 24, seed=3)
SETTINGS = {"steps": 3, "batch_size": 4, "lr": 1e-2, "seed": 0, "progress": False}


def adapted(seed=0, r=2):
    model = tiny_model(context=512)
    torch.manual_seed(seed)
    return attach_adapter(model, r, 2.0 * r)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A recorded run: its folder, its losses, its trained weights."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LAB_RECORD", str(folder))
        patch.delenv("FAST", raising=False)
        model = adapted()
        run = train(model, tiny_tokenizer(), ROWS, **SETTINGS)
    return folder, run, weights(model)


def again(kept, monkeypatch, fast="quiet", rows=ROWS, model=None, **changes):
    monkeypatch.setenv("FAST", fast)
    monkeypatch.setattr(recorded.restore, "__defaults__", (kept[0],))
    model = model or adapted()
    return train(model, tiny_tokenizer(), rows, **SETTINGS | changes), weights(model)


def test_the_same_run_is_not_trained_again(kept, monkeypatch, capsys):
    folder, first, trained = kept
    run, restored = again(kept, monkeypatch)
    assert run.recorded and first.recorded is None
    assert run.losses == pytest.approx(first.losses, abs=1e-6)
    assert run.trainable == first.trainable
    assert restored.keys() == trained.keys()
    assert all(torch.equal(restored[name], trained[name]) for name in trained)
    assert capsys.readouterr().out == ""


def test_it_says_that_it_was_recorded(kept, monkeypatch, capsys):
    again(kept, monkeypatch, fast="1")
    assert capsys.readouterr().out.startswith("FAST=1: trained on 20")


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 2e-2},
        {"seed": 1},
        {"steps": 2},
        {"rows": ROWS[1:]},
        {"model": "other adapter"},
        {"model": "other base"},
    ],
    ids=str,
)
def test_another_run_is_trained(kept, monkeypatch, changes):
    if changes.get("model") == "other adapter":
        changes = {"model": adapted(seed=1)}
    elif changes.get("model") == "other base":
        model = adapted()
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad)[0, 0] += 1
        changes = {"model": model}
    run, _ = again(kept, monkeypatch, **changes)
    assert run.recorded is None


def test_scales_and_codes_count_wherever_they_are_held():
    """Equal codes with other scales, or codes held as buffers, are another model."""
    keys = set()
    ones = torch.ones(64, 64)
    for weight, double in ((ones, False), (2 * ones, False), (ones, True)):
        torch.manual_seed(0)  # the same adapter beside each
        layer = QLoRALinear(quantize_4bit(weight, double_quant=double), r=2, alpha=4)
        keys.add(recorded.key(layer, [], {}))
    for double in (False, True):
        theirs = bnb.nn.Linear4bit(64, 64, compress_statistics=double, quant_type="nf4")
        theirs.load_state_dict({"weight": ones, "bias": torch.zeros(64)})
        keys.add(recorded.key(theirs.to("cpu"), [], {}))
    assert len(keys) == 5


def test_without_fast_nothing_is_taken_from_the_record(kept, monkeypatch):
    run, trained = again(kept, monkeypatch, fast="0")
    assert run.recorded is None
    assert all(torch.allclose(trained[name], kept[2][name], atol=1e-5) for name in trained)


def test_checkpoints_are_written_by_a_real_run(kept, monkeypatch, tmp_path):
    run, _ = again(kept, monkeypatch, output=tmp_path, save_every=2)
    assert run.recorded is None and list(tmp_path.glob("checkpoint-*"))


def test_a_record_says_where_it_comes_from(kept):
    (path,) = kept[0].iterdir()
    with safe_open(path, "pt") as file:
        run = json.loads(file.metadata()["run"])
    assert len(run["losses"]) == SETTINGS["steps"]
    assert run["provenance"]["commit"] and run["provenance"]["device"]


def test_full_fine_tuning_of_a_large_model_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_LAB_RECORD", str(tmp_path))
    monkeypatch.setattr(recorded, "LARGEST", 10)
    train(adapted(), tiny_tokenizer(), ROWS, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_fast_with_a_typing_error(monkeypatch):
    monkeypatch.setenv("FAST", "yes")
    with pytest.raises(InputError, match="FAST='yes' is unknown; 1 uses"):
        train(adapted(), tiny_tokenizer(), ROWS, **SETTINGS)


def test_results_are_read_by_file_and_by_folder(tmp_path, monkeypatch):
    (tmp_path / "cpu" / "x").mkdir(parents=True)
    (tmp_path / "cpu" / "x" / "a.json").write_text('{"value": 1}')
    monkeypatch.setattr(recorded, "RESULTS", (tmp_path / "nowhere", tmp_path))
    assert recorded.results("cpu/x/a.json") == {"value": 1}
    assert recorded.results("cpu/x") == {"a": {"value": 1}}
    with pytest.raises(InputError, match="cpu/y is not there: run the experiment"):
        recorded.results("cpu/y")
    with pytest.raises(InputError, match="cpu holds no results itself; choose from cpu/x"):
        recorded.results("cpu")
    with pytest.raises(InputError, match="results 3 is not possible"):
        recorded.results(3)


def test_a_built_package_carries_the_results(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (copy,) = tmp_path.rglob("assets/results")
    assert {p.relative_to(copy) for p in copy.rglob("*.json")} == {
        p.relative_to(ROOT / "results") for p in (ROOT / "results").rglob("*.json")
    }


def test_only_what_changed_is_recorded_anew(kept, tmp_path):
    (path,) = kept[0].iterdir()
    place = tmp_path / "07"
    keep_runs(kept[0], place)
    stays = place / path.name
    old = stays.stat().st_mtime_ns
    (place / "stale.safetensors").write_bytes(b"of a cell that is gone")
    keep_runs(kept[0], place)
    assert list(place.iterdir()) == [stays] and stays.stat().st_mtime_ns == old
    keep_runs(tmp_path / "nothing", place)
    assert not place.exists()


# --- what was recorded ------------------------------------------------------------------------


def test_the_command_takes_two_minutes_and_learns_pairs_it_never_saw():
    runs = [recorded.results(f"cpu/one_command/seed{seed}.json") for seed in range(3)]
    assert median(run["seconds"]["in all"] for run in runs) <= 120
    assert median(run["exact_match"]["after"]["pairs"] for run in runs) >= 0.95
    assert max(max(run["exact_match"]["before"].values()) for run in runs) == 0
    assert {run["provenance"]["device"]["cores"] for run in runs} == {2}
