"""The harness: adapters where they belong, rows in a drawn order, checkpoints that are whole."""

import json
import logging
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny

from qlora_lab import training
from qlora_lab.data import encode
from qlora_lab.errors import InputError
from qlora_lab.loading import Loaded, load_model
from qlora_lab.orders import make_rows
from qlora_lab.training import attach_adapter, last_complete_checkpoint, order_of_rows, train

pytestmark = pytest.mark.usefixtures("short_collections")
ROWS = make_rows("train", 60)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def plain(base):
    """A loaded model without an adapter: every weight of it can be trained."""
    return load_model(base, bits=16)


def run(loaded, **changes):
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "progress": False}
    return train(loaded.model, loaded.tokenizer, ROWS, **(settings | changes))


# --- adapters --------------------------------------------------------------------------------


def test_adapters_are_pefts_with_the_settings_asked_for(base):
    model = attach_adapter(load_model(base).model, r=8, alpha=4, dropout=0.25)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 4, 0.25)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.lora_A["default"].weight.shape == (8, 128)
    assert layer.lora_B["default"].weight.shape == (64, 8)
    assert layer.scaling["default"] == 0.5
    assert not layer.lora_B["default"].weight.any()


def test_targets_choose_layers(base):
    model = attach_adapter(load_model(base).model, r=2, targets=["q_proj", "v_proj"])
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_an_adapter_that_adds_nothing_is_refused(base, alpha):
    with pytest.raises(InputError, match="alpha .* above 0"):
        attach_adapter(load_model(base, bits=16).model, r=2, alpha=alpha)


def test_unknown_targets_are_refused(base):
    with pytest.raises(InputError, match="query_key.*linear layers are down_proj, gate_proj"):
        attach_adapter(load_model(base, bits=16).model, r=2, targets=["query_key"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"targets": ["q_proj", "value"]}, r"called \['value'\]; the linear ones are down_proj"),
        ({"targets": "(("}, "no layer can be adapted"),
        ({"targets": 3}, "targets 3 is not possible; give a list of texts"),
        ({"r": "16"}, "rank '16'"),
        ({"alpha": "16"}, "alpha '16'"),
        ({"dropout": "0"}, "dropout '0'"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(base, arguments, says):
    model = load_model(base, bits=16).model
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=says) as caught:
        attach_adapter(model, **{"r": 2} | arguments)
    assert (
        "\n" not in str(caught.value)
        and caught.value.__suppress_context__
        or not (caught.value.__context__)
    )
    assert before == [name for name, _ in model.named_modules()]


def test_a_narrow_layer_does_not_limit_the_rank():
    """Qwen2-MoE has a gate of width 1, and PEFT puts a rank of 16 on it as on the others."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 1))
    training.check_adapter(model, 16, 16)
    training.check_adapter(model, 64, 16)
    with pytest.raises(InputError, match="rank 65 is not possible; give .* from 1 to 64"):
        training.check_adapter(model, 65, 16)


def test_a_second_adapter_and_a_loaded_are_refused(base):
    loaded = load_model(base)
    with pytest.raises(InputError, match="of type Loaded .* its .model"):
        attach_adapter(loaded, r=2)
    adapted = attach_adapter(loaded.model, r=2)
    for model in (adapted, loaded.model):
        with pytest.raises(InputError, match="carries an adapter already"):
            attach_adapter(model, r=2)
    with pytest.raises(InputError, match="no linear layer"):
        attach_adapter(torch.nn.ReLU())
    with pytest.raises(InputError, match="give load_model's .model"):
        training.recompute_activations(loaded)


# --- batches ---------------------------------------------------------------------------------


def batches_of(order, batch_size):
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@pytest.mark.parametrize("count", [1, 3, 4, 17, 400])
def test_every_row_comes_once_in_an_epoch_and_batches_are_full(count):
    lengths = [10 + (7 * i) % 90 for i in range(count)]
    steps = -(-count // 4)
    order = order_of_rows(lengths, 4, 3 * steps, seed=0)
    assert len(order) == 4 * 3 * steps
    for epoch in batches_of(order, 4 * steps):
        assert set(epoch) == set(range(count))  # the rows that fill the last batch come twice
    if count > 4:
        assert len({tuple(epoch) for epoch in batches_of(order, 4 * steps)}) == 3
    assert order_of_rows(lengths, 4, 2, seed=0) == order_of_rows(lengths, 4, 9, seed=0)[:8]


def test_rows_of_similar_length_share_a_batch_in_no_order_of_length():
    lengths = torch.randint(20, 140, (600,), generator=torch.manual_seed(0)).tolist()
    order = order_of_rows(lengths, 10, 60, seed=3)
    assert order != order_of_rows(lengths, 10, 60, seed=4)
    batches = [[lengths[i] for i in batch] for batch in batches_of(order, 10)]
    assert sum(max(b) - min(b) for b in batches) / 60 < 15  # any ten rows: about 98
    means = torch.tensor([sum(b) / 10 for b in batches])
    steps = torch.arange(60.0)
    assert torch.corrcoef(torch.stack([means, steps]))[0, 1].abs() < 0.3
    first, last = means[:30].mean(), means[30:].mean()
    assert abs(first - last) < 20


def test_the_trainer_gets_the_rows_in_that_order_without_a_warning(plain, monkeypatch, caplog):
    seen = []

    def spying_collator(tokenizer):
        collate = collator(tokenizer)
        return lambda rows: seen.append([len(row["input_ids"]) for row in rows]) or collate(rows)

    collator = training.collator
    monkeypatch.setattr(training, "collator", spying_collator)
    monkeypatch.setattr(training, "quiet", nullcontext)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", UserWarning)
        run(plain, steps=10, batch_size=6, seed=5)
    assert not [r for r in caplog.records if "length" in r.getMessage()]
    lengths = [len(encode(plain.tokenizer, r["text"], r["answer"])["input_ids"]) for r in ROWS]
    order = order_of_rows(lengths, 6, 10, seed=5)
    assert seen[:10] == [[lengths[i] for i in batch] for batch in batches_of(order, 6)]


# --- losses and precision --------------------------------------------------------------------


def test_a_nan_is_seen_in_the_losses(base):
    model, tokenizer, _ = load_model(base, bits=16)
    model.model.norm.weight.data.fill_(float("nan"))
    losses = train(model, tokenizer, ROWS, steps=2, batch_size=2, progress=False).losses
    assert torch.tensor(losses).isnan().all()


@pytest.mark.parametrize(
    ("bits", "native", "expected"),
    [
        (4, True, torch.float32),  # a 4-bit model says itself what it computes in
        (16, True, torch.bfloat16),
        (16, False, torch.float16),
        (8, True, torch.bfloat16),
    ],
)
def test_mixed_precision_on_a_gpu_is_the_loaders_decision(
    base, monkeypatch, bits, native, expected
):
    model = load_model(base, bits).model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: native)
    assert training._compute_dtype(model) == expected


# --- checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(base, tmp_path_factory):
    """A folder with two checkpoints of adapters."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    model, tokenizer, report = load_model(base)
    run(Loaded(attach_adapter(model, r=4), tokenizer, report), output=folder, save_every=2)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "no state": lambda newest: (newest / "trainer_state.json").unlink(),
    "state": lambda newest: cut(newest / "trainer_state.json"),
    "optimizer": lambda newest: cut(newest / "optimizer.pt"),
    "rng": lambda newest: cut(newest / "rng_state.pth"),
    "adapter": lambda newest: cut(newest / "adapter_model.safetensors"),
    "state of another step": lambda newest: shutil.copy(
        newest.parent / "checkpoint-2" / "trainer_state.json", newest
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_half_written_newest_checkpoint_is_ignored(tmp_path, checkpoints, damage):
    shutil.copytree(checkpoints, tmp_path / "run")
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    DAMAGE[damage](tmp_path / "run" / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_odd_folders_are_no_checkpoints(tmp_path):
    assert last_complete_checkpoint(None) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    for step in (9, 10):  # as numbers, not as text
        folder = tmp_path / "more" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_complete_checkpoint(tmp_path / "more").name == "checkpoint-10"


@pytest.mark.parametrize("changes", [{"save_every": 2}, {"resume": True}])
def test_checkpoints_need_a_folder(plain, changes):
    with pytest.raises(InputError, match="need a folder"):
        run(plain, **changes)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no row"),
        ([{"text": "", "answer": "{}"}], "empty"),
        ([{"text": "a tea for Anna", "answer": " "}], "empty"),
        ([{"text": "a tea " * 600, "answer": "{}"}], "max_length"),
        (
            [{"text": "a tea for Anna"}],
            "a row needs 'text' and 'answer'; this one has \\['text'\\]",
        ),
        (["a tea for Anna"], "a row needs"),
    ],
)
def test_bad_rows_are_refused(plain, rows, says):
    with pytest.raises(InputError, match=says):
        train(plain.model, plain.tokenizer, rows)


def test_a_frozen_model_is_not_trained(base):
    model, tokenizer, _ = load_model(base)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing is trainable"):
        train(model, tokenizer, ROWS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"schedule": "nope"}, "schedule 'nope' is unknown; choose from linear, cosine"),
        ({"schedule": "warmup_stable_decay"}, "is unknown"),
        ({"warmup": -1}, "warmup -1"),
        ({"max_grad_norm": "1"}, "max_grad_norm '1'"),
        ({"optim": ["sgd"]}, "is unknown"),
        ({"output": 3}, "output 3"),
        ({"rows": None}, "rows None is not possible; give a list of rows"),
        ({"tokenizer": "gpt2"}, "tokenizer 'gpt2'"),
        ({"model": (1, 2)}, "give a model: .* its .model"),
    ],
)
def test_what_training_cannot_use_is_refused(plain, arguments, says):
    given = {"model": plain.model, "tokenizer": plain.tokenizer, "rows": ROWS, "steps": 1}
    with pytest.raises(InputError, match=says) as caught:
        train(**given | arguments)
    assert "\n" not in str(caught.value)


def test_state_that_the_driver_pages_counts_too():
    """bitsandbytes marks it; PyTorch, which did not allocate it, leaves it out of its peak."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    paged = torch.zeros(100)
    paged.is_paged = True
    optimizer.state[parameter] = {"state1": paged, "state2": torch.zeros(50), "step": 7}
    assert training._paged_bytes(optimizer) == 400
