"""Whole runs: same losses whatever came before, runs that resume, folders nobody overwrites."""

import json
import os
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from tiny_model import save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import qlora_lab
from qlora_lab import finetuning, loading, training
from qlora_lab.data import collator, encode, prompt
from qlora_lab.errors import InputError
from qlora_lab.evaluation import evaluate_orders
from qlora_lab.finetuning import METHODS, finetune, load_adapter, recipe
from qlora_lab.loading import EMBEDDED, load_model
from qlora_lab.orders import make_rows
from qlora_lab.training import ALPHA_OVER_R, attach_adapter, last_complete_checkpoint, make_portable

pytestmark = pytest.mark.usefixtures("short_collections")
ROWS = make_rows("train", 60)
TESTS = {"seen": make_rows("seen", 3), "pairs": make_rows("pairs", 2)}
SMALL = {"rows": ROWS, "tests": {}, "steps": 4, "batch_size": 4, "progress": False}
SMALL |= {"r": 4, "alpha": 32, "lr": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def run(base, method="qlora", **changes):
    return finetune(base, method, **(SMALL | changes))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- the four methods ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(base):
    """Of each method a run without an evaluation before it and one with, made once."""
    made = {}

    def runs(method):
        if method not in made:
            made[method] = [run(base, method, tests=TESTS, before=b) for b in (False, True)]
        return made[method]

    return runs


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_finite_and_the_same_each_time(pair, method):
    first, again = pair(method)
    assert len(first.run.losses) == SMALL["steps"]
    assert torch.tensor(first.run.losses).isfinite().all()
    assert again.run.losses == first.run.losses


@pytest.mark.parametrize("method", METHODS)
def test_a_few_rows_are_learnt(base, method):
    losses = run(base, method, rows=ROWS[:4], steps=16).run.losses
    assert losses[-1] < 0.95 * losses[0]


def test_another_seed_is_another_run(base, pair):
    assert run(base, seed=1).run.losses != pair("qlora")[0].run.losses


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_move_unless_everything_is_trained(base, pair, method):
    fresh = load_model(base, METHODS[method]).model.state_dict()
    result = pair(method)[1]
    state = result.model.state_dict()
    trainable = {n: p for n, p in result.model.named_parameters() if p.requires_grad}
    assert result.run.trainable == sum(p.numel() for p in trainable.values())
    if method == "full":
        assert set(trainable) == {n for n, _ in tiny_model().named_parameters()}
        assert all(not torch.equal(state[n], fresh[n]) for n in trainable if "norm" not in n)
        return
    assert trainable and all("lora_" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    # Seven layers in each of two blocks, none of them the head, r (in + out) numbers each.
    widths = 4 * (64 + 64) + 3 * (64 + 128)
    assert result.run.trainable == 2 * 4 * widths
    compared = 0
    for name, tensor in fresh.items():
        path, _, leaf = name.rpartition(".")
        for kept in (f"base_model.model.{path}{inner}.{leaf}" for inner in ("", ".base_layer")):
            if kept in state:  # bitsandbytes keeps 8-bit scales elsewhere after a forward pass
                assert torch.equal(state[kept].float(), tensor.float()), name
                compared += 1
    assert compared >= len(list(tiny_model().parameters()))
    # B starts at zero: where it still is, no gradient came, whatever was evaluated before.
    assert all(p.any() for n, p in trainable.items() if "lora_B" in n)


def test_the_recipe_is_the_tuned_one_for_the_embedded_model_only(base):
    tuned = recipe(None, "qlora", 8)
    assert tuned == (finetuning.LEARNING_RATE["qlora"], 8 * ALPHA_OVER_R)
    for name in (EMBEDDED, qlora_lab.embedded_model(), Path(qlora_lab.embedded_model())):
        assert recipe(name, "qlora", 8) == tuned
    # Dettmers et al. 2023, appendix B.2, whatever the rank.
    assert recipe(base, "qlora", 8) == recipe("org/7b", "8bit", 64) == (2e-4, 16)
    settings = run(base, lr=None, alpha=None, steps=1).settings
    assert (settings["lr"], settings["alpha"]) == (2e-4, 16)


def test_a_recipe_for_nothing_is_refused():
    with pytest.raises(InputError, match="'foo' is unknown; choose from qlora"):
        recipe(None, "foo", 4)
    with pytest.raises(InputError, match="rank 0"):
        recipe(None, "qlora", 0)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_checkpointing_computes_twice_and_changes_no_loss(base, pair, method, monkeypatch):
    forwards = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: forwards.append(1) or forward(*args))
    recomputed = run(base, method, checkpointing=True).run.losses
    counted = len(forwards)  # before `pair`, which may have to train first
    assert recomputed == pytest.approx(pair(method)[0].run.losses, rel=1e-5)
    assert counted == 2 * 2 * SMALL["steps"]  # in each of two blocks twice a step


def test_accumulation_is_a_larger_batch(base, pair):
    parts = run(base, batch_size=2, accumulation=2).run.losses
    assert parts == pytest.approx(pair("qlora")[0].run.losses, rel=1e-4)


def test_the_learning_rate_matters_from_the_second_update_on(base, pair):
    slow, usual = run(base, lr=1e-5).run.losses, pair("qlora")[0].run.losses
    assert slow[0] == usual[0]
    assert usual[-1] < slow[-1]


# --- evaluate, then train --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_before_training_changes_no_loss(pair, method):
    without, with_one = pair(method)
    assert set(with_one.before) == set(with_one.after) == set(TESTS) and not without.before
    assert with_one.run.losses == without.run.losses


needs_the_repacking_cpu = pytest.mark.skipif(
    not has_avx512bf16(),
    reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack weights in eval mode",
)


def layers_with_gradients_after_an_evaluation(base) -> dict[str, bool]:
    """Whether a gradient reaches each kind of layer's B in the first backward pass."""
    model, tokenizer, _ = load_model(base)
    evaluate_orders(model, tokenizer, TESTS)
    model = attach_adapter(model, r=4).train()
    batch = collator(tokenizer)([encode(tokenizer, r["text"], r["answer"]) for r in ROWS])
    model(**batch).loss.backward()
    found: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            kind = name.split(".")[-4]
            reached = parameter.grad is not None and bool(parameter.grad.any())
            found[kind] = found.get(kind, True) and reached
    return found


def test_after_an_evaluation_gradients_reach_every_adapter(base):
    found = layers_with_gradients_after_an_evaluation(base)
    assert len(found) == 7 and all(found.values()), found


@needs_the_repacking_cpu
@pytest.mark.filterwarnings("ignore::UserWarning")  # all that says what is lost
def test_fault_4_without_the_guard_they_do_not(base, monkeypatch):
    monkeypatch.setattr(loading, "guard", lambda model: 0)
    found = layers_with_gradients_after_an_evaluation(base)
    # These feed a 4-bit layer through which nothing comes back.
    assert not any(found[kind] for kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    without, with_one = (run(base, tests=TESTS, before=b).run.losses for b in (False, True))
    assert with_one != pytest.approx(without, rel=1e-3)


def merged_logits(model, ids):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: merging into 4 bits rounds
        return model.merge_and_unload()(ids).logits


def evaluated_and_fresh(base, folder):
    """Logits after a merge: of a run that was evaluated, and of its adapter loaded anew."""
    ids = torch.arange(3, 40)[None]
    result = run(base, tests=TESTS, output=folder, lr=2e-2)
    fresh = load_adapter(folder).model
    return merged_logits(result.model.eval(), ids), merged_logits(fresh, ids)


def test_a_merge_after_an_evaluation_is_that_of_a_fresh_model(base, tmp_path):
    evaluated, fresh = evaluated_and_fresh(base, tmp_path / "run")
    torch.testing.assert_close(evaluated, fresh, atol=1e-5, rtol=1e-5)


@needs_the_repacking_cpu
def test_fault_3_without_the_guard_a_merge_after_an_evaluation_is_wrong(
    base, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "guard", lambda model: 0)
    evaluated, fresh = evaluated_and_fresh(base, tmp_path / "run")
    assert (evaluated - fresh).abs().mean() > 0.5 * fresh.abs().mean()


# --- optimizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
def test_optimizers_of_the_gpu_run_on_a_cpu_too(base, pair, optim):
    result = run(base, optim=optim)
    assert result.settings["optim"] == optim
    # Paging moves states and changes no number; 8 bits for the states change little.
    expected = pair("qlora")[0].run.losses
    assert result.run.losses == pytest.approx(expected, rel=1e-4 if "32" in optim else 1e-2)


# --- resuming --------------------------------------------------------------------------------


# Two epochs, so that the order of the second has to resume; dropout, so that the random state has.
LONGER = {"rows": ROWS[:10], "steps": 6, "dropout": 0.1, "save_every": 2}


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """Folders of runs stopped right after their last checkpoint, and the losses they had."""
    made = {}

    def folder_and_losses(method):
        if method not in made:
            folder = tmp_path_factory.mktemp("stopped") / method
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(training, "make_portable", stop_at_checkpoint_6)
                run(base, method, output=folder, **LONGER)
            made[method] = folder, run(base, method, **LONGER | {"save_every": None}).run.losses
        return made[method]

    return folder_and_losses


def stop_at_checkpoint_6(checkpoint):
    make_portable(checkpoint)
    if checkpoint.name == "checkpoint-6":
        raise KeyboardInterrupt


def stopped_at(stopped, folder, method, step):
    """A copy of the folder as it was when the checkpoint of this step had been written."""
    source, losses = stopped(method)
    shutil.copytree(source, folder)
    for later in range(step + 2, 7, 2):
        shutil.rmtree(folder / f"checkpoint-{later}")
    assert last_complete_checkpoint(folder) == folder / f"checkpoint-{step}"
    assert not (folder / "result.json").exists()
    return losses


@pytest.mark.parametrize(("method", "step"), [("qlora", 4), ("full", 2), ("qlora", 6)])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    base, tmp_path, stopped, method, step
):
    folder = tmp_path / "run"
    expected = stopped_at(stopped, folder, method, step)
    old = files_of(folder)
    result = run(base, method, output=folder, resume=True, **LONGER)
    # The history is whole, and the steps after the resume are the same as well.
    assert result.run.losses == pytest.approx(expected, rel=1e-6)
    assert json.loads((folder / "result.json").read_text("utf-8"))["method"] == method
    new = files_of(folder)
    assert all(new[name] == content for name, content in old.items())  # nothing was overwritten
    assert (folder / "checkpoint-6").is_dir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_run_resumes_from_before_a_half_written_checkpoint(base, tmp_path, stopped):
    expected = stopped_at(stopped, tmp_path / "run", "qlora", 4)
    cut(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")
    result = run(base, output=tmp_path / "run", resume=True, **LONGER)
    assert result.run.losses == pytest.approx(expected, rel=1e-6)
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"


def test_other_settings_do_not_resume(base, tmp_path, stopped):
    stopped_at(stopped, tmp_path / "run", "qlora", 4)
    before = files_of(tmp_path / "run")
    for method, changes, says in (
        ("qlora", {"r": 8}, "begun with r=4, not 8"),
        ("lora", {}, "begun with method=qlora, not lora"),
    ):
        with pytest.raises(InputError, match=says):
            run(base, method, output=tmp_path / "run", resume=True, **LONGER | changes)
    assert files_of(tmp_path / "run") == before


# --- what is saved ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run on the embedded model, with checkpoints."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    options = {"steps": 3, "output": folder, "save_every": 2, "tests": TESTS, "lr": 2e-2}
    return finetune(**(SMALL | options))


def logits(model, tokenizer):
    ids = tokenizer([prompt("two large teas for Zoe")], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(ids).logits


def test_the_record_is_complete(saved):
    record = json.loads((saved.folder / "result.json").read_text("utf-8"))
    assert record["method"] == "qlora" and record["base"]["name"] == EMBEDDED
    assert record["settings"]["r"] == 4 and record["settings"]["steps"] == 3
    assert record["losses"] == [round(x, 6) for x in saved.run.losses]
    assert record["trainable"] == saved.run.trainable and record["peak_bytes"] is None
    assert record["seconds"]["training"] > 0 and record["seconds"]["evaluation"] > 0
    for scores in (record["before"], record["after"]):
        assert {grade: s["n"] for grade, s in scores.items()} == {"seen": 3, "pairs": 2}
    assert record["provenance"]["seed"] == 0
    assert set(record["provenance"]) >= {"device", "versions", "commit", "date", "command"}


def test_the_table_has_a_line_for_each_grade(saved):
    head, *lines = saved.table().splitlines()
    assert "before" in head and "after" in head and "interval" in head
    assert [line.split()[0] for line in lines] == ["seen", "pairs"]
    after = f"{saved.after['seen'].exact_match:.1%}"
    assert lines[0].split()[1:3] == [f"{saved.before['seen'].exact_match:.1%}", after]


def test_no_folder_of_this_machine_is_saved(saved):
    repository = str(Path(qlora_lab.__file__).parents[1])
    for name, content in files_of(saved.folder).items():
        if name.endswith("training_args.bin"):  # a checkpoint's own, for resuming on the spot
            continue
        for folder in (repository, str(saved.folder.parent)):
            assert folder.encode() not in content, name
    for part in ("adapter", "checkpoint-2"):
        config = json.loads((saved.folder / part / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == EMBEDDED


def test_the_adapter_is_small_and_the_base_is_not_in_it(saved):
    size = sum(len(content) for content in files_of(saved.folder / "adapter").values())
    weights = (saved.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 4 * saved.run.trainable <= weights < 4.2 * saved.run.trainable
    assert size < saved.report.total_bytes


def test_the_adapter_loads_elsewhere(saved, tmp_path, monkeypatch):
    shutil.copytree(saved.folder / "adapter", tmp_path / "copy" / "adapter")
    monkeypatch.chdir(tmp_path)
    expected = logits(saved.model, saved.tokenizer)
    for folder in ("copy", Path("copy") / "adapter"):
        loaded = load_adapter(folder)
        assert isinstance(loaded.model, PeftModel) and not loaded.model.training
        assert loaded.report.name == EMBEDDED and loaded.report.bits == 4
        assert torch.equal(logits(loaded.model, loaded.tokenizer), expected)
    # Plain PEFT on a plain base: the same 4-bit base, and then the 16-bit one.
    plain = PeftModel.from_pretrained(load_model().model, tmp_path / "copy" / "adapter")
    assert torch.equal(logits(plain, saved.tokenizer), expected)
    base16 = AutoModelForCausalLM.from_pretrained(qlora_lab.embedded_model(), dtype=torch.float32)
    without = logits(base16, saved.tokenizer)
    plain = PeftModel.from_pretrained(base16, tmp_path / "copy" / "adapter")
    got, same = logits(plain, saved.tokenizer), load_adapter("copy", bits=16)
    assert torch.equal(logits(same.model, same.tokenizer), got)
    assert not torch.allclose(got, without, atol=1e-3)


def test_the_tokenizer_is_saved_beside_it(saved):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved.folder / "adapter")
    assert tokenizer("2 teas")["input_ids"] == saved.tokenizer("2 teas")["input_ids"]
    assert tokenizer.pad_token_id == saved.tokenizer.pad_token_id


@pytest.mark.parametrize(
    "written",
    ["C:\\lab\\Anna\\lab\\qlora_lab\\assets\\model", "/srv/anna/qlora_lab/assets/model"],
)
def test_an_adapter_from_another_machine_finds_the_embedded_model(saved, tmp_path, written):
    adapter = tmp_path / "adapter"
    shutil.copytree(saved.folder / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = written
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "README.md").write_text(f"base_model: {written}")
    loaded = load_adapter(adapter)
    assert torch.equal(logits(*loaded[:2]), logits(saved.model, saved.tokenizer))
    make_portable(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == EMBEDDED
    assert not (adapter / "README.md").exists()


def test_the_folder_of_ones_own_base_is_kept_because_it_is_needed(base, tmp_path):
    run(base, output=tmp_path / "run", steps=1)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert load_adapter(tmp_path / "run").report.name == base.name
    assert str(base) not in (tmp_path / "run" / "result.json").read_text()


def test_full_fine_tuning_saves_a_model_that_loads_as_any(base, tmp_path):
    result = run(base, "full", output=tmp_path / "run")
    folder = tmp_path / "run" / "model"
    expected = logits(result.model, result.tokenizer)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder), result.tokenizer), expected
    )
    assert torch.equal(logits(*load_model(folder, bits=16)[:2]), expected)
    with pytest.raises(InputError, match="whole model"):
        load_adapter(tmp_path / "run")


def test_the_record_is_written_last(base, tmp_path, monkeypatch):
    seen = []

    def replace(source, target):
        folder = Path(target).parent
        seen.append(
            (Path(target).name, (folder / "adapter" / "adapter_model.safetensors").exists())
        )
        return rename(source, target)

    rename = os.replace
    monkeypatch.setattr(finetuning.os, "replace", replace)
    (tmp_path / "run").mkdir()  # an empty folder will do
    run(base, output=tmp_path / "run", steps=1)
    assert seen[-1] == ("result.json", True)
    assert not (tmp_path / "run" / "result.json.part").exists()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        run(base, output=tmp_path / "other", steps=1)
    assert not (tmp_path / "other" / "result.json").exists()


def test_without_an_output_nothing_is_left_behind(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run(base, tests=TESTS)
    assert result.folder is None and result.after
    assert not list(tmp_path.iterdir())


# --- folders are never overwritten -----------------------------------------------------------


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("content", [["result.json"], ["notes.txt"], ["settings.json"]])
def test_a_folder_that_holds_anything_is_refused(base, tmp_path, content, resume):
    folder = filled(tmp_path / "run", *content)
    with pytest.raises(InputError) as caught:
        run(base, output=folder, resume=resume)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert files_of(folder) == {content[0]: b"mine"}


def test_a_file_is_no_folder(base, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        run(base, output=tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_of_two_runs_sent_to_one_folder_the_second_stops(base, tmp_path):
    folder = tmp_path / "run"

    def say(line):  # the other run claims the folder while this one is measuring
        if "measuring the base" in line:
            finetuning.claim(folder, {"r": 1})

    with pytest.raises(InputError, match="belongs to another run"):
        run(base, output=folder, tests=TESTS, say=say)
    assert set(files_of(folder)) == {"settings.json"}


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "lorra"}, "'lorra'"),
        ({"r": 0}, "rank 0"),
        ({"r": -1}, "rank -1"),
        ({"r": 65}, "from 1 to 64"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"alpha": 0}, "alpha 0"),
        ({"alpha": "twice"}, "alpha 'twice'"),
        ({"steps": 0}, "steps 0"),
        ({"steps": "many"}, "steps 'many'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"accumulation": -2}, "accumulation -2"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"lr": float("inf")}, "lr inf"),
        ({"lr": "fast"}, "lr 'fast'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"optim": "adamm"}, "'adamm'"),
        ({"save_every": 0}, "save_every 0"),
        ({"resume": True}, "no complete checkpoint"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured_or_written(
    base, tmp_path, monkeypatch, changes, says
):
    monkeypatch.setattr(finetuning, "evaluate_orders", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(InputError) as caught:
        run(base, **({"output": tmp_path / "run", "tests": TESTS} | changes))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"save_every": 2}, {"resume": True}])
def test_checkpoints_need_a_folder(base, changes):
    with pytest.raises(InputError, match="need a folder"):
        run(base, **changes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": ["qlora"]}, "is unknown; choose from qlora"),
        ({"name": 3}, "model 3"),
        ({"rows": [{"text": "a"}]}, "a row needs"),
        ({"tests": [ROWS]}, "grades .* give rows by grade"),
        ({"tests": {"mine": [{"text": "a", "answer": "b"}]}}, "is no order"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"output": 3}, "output 3"),
    ],
)
def test_nothing_is_loaded_for_a_run_that_cannot_be(monkeypatch, arguments, says):
    def load(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(finetuning, "load_model", load)
    with pytest.raises(InputError, match=says):
        finetune(**arguments)


def test_folders_without_a_usable_adapter_are_refused(saved, base, tmp_path):
    def refusal(folder, *args):
        with pytest.raises(InputError) as caught:
            load_adapter(folder, *args)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert "no adapter" in refusal(tmp_path / "missing")
    assert "no adapter" in refusal(tmp_path)
    assert "does not fit" in refusal(saved.folder / "adapter", base)  # another shape
    for name, file in (("a", "adapter_config.json"), ("b", "adapter_model.safetensors")):
        shutil.copytree(saved.folder / "adapter", tmp_path / name)
        cut(tmp_path / name / file)
        refusal(tmp_path / name)
        (tmp_path / name / file).unlink()
        assert "no adapter" in refusal(tmp_path / name)
