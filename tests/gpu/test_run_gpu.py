"""The course's run on CUDA: bfloat16, peak memory, float16 where there is no bfloat16, resuming."""

import json
import shutil

import pytest
import torch
from tiny_model import save_tiny

from qlora_lab.finetuning import finetune, load_adapter
from qlora_lab.loading import four_bit_layers, load_model
from qlora_lab.orders import make_rows

pytestmark = pytest.mark.gpu

ROWS = make_rows("train", 60)
SMALL = {"rows": ROWS, "tests": {}, "steps": 6, "batch_size": 4, "r": 4, "alpha": 32, "lr": 1e-2}
SMALL |= {"device": "cuda", "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def course_run(tmp_path_factory):
    """The run of `qlora-lab finetune`, once."""
    folder = tmp_path_factory.mktemp("course") / "run"
    return finetune(device="cuda", output=folder, progress=False)


def native_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def test_the_course_run_learns_the_unseen_pairs(course_run):
    expected = torch.bfloat16 if native_bf16() else torch.float16
    assert course_run.report.compute_dtype == expected and course_run.report.device == "cuda"
    assert course_run.before["pairs"].exact_match == 0
    assert course_run.after["pairs"].exact_match >= 0.95
    assert course_run.run.seconds + course_run.evaluation_seconds < 120


def test_its_peak_memory_is_recorded(course_run):
    record = json.loads((course_run.folder / "result.json").read_text("utf-8"))
    assert record["peak_bytes"] == course_run.run.peak_bytes
    # At least the base is there; and a model of 4 million parameters does not fill a card.
    assert course_run.report.total_bytes < record["peak_bytes"] < 8e9
    device = record["provenance"]["device"]
    assert device["gpu"] == torch.cuda.get_device_name(0) and device["driver"]
    assert record["settings"]["optim"] == "paged_adamw_32bit"


def test_its_adapter_works_on_a_cpu_too(course_run):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        here = course_run.model.eval()(ids.cuda()).logits.float().cpu()
        there = load_adapter(course_run.folder, device="cpu").model(ids).logits
    assert (here - there).abs().mean() < 0.05 * there.abs().mean()


def test_the_layers_compute_in_what_was_decided(base):
    model, _, report = load_model(base, device="cuda")
    layers = four_bit_layers(model)
    assert {layer.compute_dtype for layer in layers.values()} == {report.compute_dtype}
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert report.guarded == 0  # the guards are against CPU kernels


@pytest.mark.parametrize("method", ["qlora", "8bit", "lora", "full"])
def test_every_method_starts_where_the_cpu_starts(base, method):
    cuda = finetune(base, method, **SMALL).run
    cpu = finetune(base, method, **(SMALL | {"device": "cpu"})).run
    assert torch.tensor(cuda.losses).isfinite().all() and cuda.peak_bytes > 0
    assert cuda.losses[0] == pytest.approx(cpu.losses[0], rel=1e-2)
    assert cuda.losses[-1] == pytest.approx(cpu.losses[-1], rel=5e-2)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_card_without_bf16_trains_in_fp16_with_loss_scaling(base, method, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    options = SMALL | {"rows": ROWS[:4], "steps": 20}
    result = finetune(base, method, **options)
    losses = torch.tensor(result.run.losses)
    assert losses.isfinite().all() and losses[-1] < 0.95 * losses[0]
    if method != "full":  # full fine-tuning holds float32 and is cast by autocast
        assert result.report.compute_dtype == torch.float16
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in trained)


def test_an_evaluation_before_training_changes_no_loss(base):
    tests = {"seen": make_rows("seen", 3)}
    without, with_one = (
        finetune(base, **(SMALL | {"tests": tests, "before": b})).run.losses for b in (False, True)
    )
    assert with_one == pytest.approx(without, rel=1e-3)


def test_a_run_resumes(base, tmp_path):
    options = SMALL | {"dropout": 0.1, "save_every": 2}
    whole = finetune(base, output=tmp_path / "whole", **options).run.losses
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in ("result.json", "checkpoint-4", "checkpoint-6", "adapter"):
        path = tmp_path / "cut" / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = finetune(base, output=tmp_path / "cut", resume=True, **options).run.losses
    assert resumed == pytest.approx(whole, rel=1e-3)


def test_checkpointing_lowers_the_peak_and_changes_little(base):
    options = SMALL | {"batch_size": 32}
    kept = finetune(base, **options).run
    recomputed = finetune(base, checkpointing=True, **options).run
    assert recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.losses == pytest.approx(kept.losses, rel=1e-2)
