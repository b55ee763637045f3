"""Two gloo processes: the losses of one, a killed one, bytes counted, and one voice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny

from qlora_lab import distributed
from qlora_lab.cli import main
from qlora_lab.errors import InputError
from qlora_lab.finetuning import finetune, load_adapter
from qlora_lab.loading import load_model
from qlora_lab.orders import make_rows
from qlora_lab.training import attach_adapter, last_complete_checkpoint

ROWS = make_rows("train", 40)
SAME = {"r": 4, "alpha": 32, "lr": 1e-2, "steps": 6}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# One start of two processes costs more than all that they do, so one start does all.
BOTH = """
import json, sys
import torch
from qlora_lab import distributed
from qlora_lab.cli import read_rows
from qlora_lab.errors import InputError
from qlora_lab.finetuning import finetune

base, rows = sys.argv[1], read_rows("rows.jsonl")
distributed.start("cpu")
out = {"world": distributed.world_size()}
same = dict(json.loads(sys.argv[2]), rows=rows, batch_size=2, progress=False)
same["tests"] = {"some": read_rows("rows.jsonl")[:2]}
for name, shard in (("ddp", False), ("fsdp", True)):
    with distributed.Traffic() as traffic:
        result = finetune(base, before=False, shard=shard, output=name, **same)
    out[name] = {
        "losses": result.run.losses,
        "held": distributed.held_bytes(result.model),
        "sent": {k: traffic.total(k) for k in ("all-reduce", "all-gather", "reduce-scatter")},
    }
asked = []
try:
    distributed.first(lambda: asked.append(1))
    finetune(base, before=False, output="ddp", **same)
except InputError as error:
    out["refused"] = str(error)
out["asked"] = len(asked)
rank = torch.distributed.get_rank()
open(f"out-{rank}.json", "w").write(json.dumps(out))
distributed.stop()
"""


def start(folder: Path, *command: str) -> subprocess.Popen:
    root = str(Path(distributed.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save_tiny(folder / "base")
    lines = [json.dumps({"text": r["text"], "answer": r["answer"]}) for r in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "both.py").write_text(BOTH)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The same run in one process: twice the rows in a forward pass."""
    return finetune(folder / "base", rows=ROWS, tests={}, batch_size=4, progress=False, **SAME)


@pytest.fixture(scope="module")
def both(folder):
    process = start(folder, "both.py", "base", json.dumps(SAME))
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    return [json.loads((folder / f"out-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(alone, both, way):
    for out in both:
        assert out["world"] == 2
        assert out[way]["losses"] == pytest.approx(alone.run.losses, abs=1e-4)


def test_ddp_sends_the_gradients_of_the_adapters_and_little_else(alone, both):
    sent = both[0]["ddp"]["sent"]
    # A ring of two sends what it is given, once; 4 bytes a gradient.
    assert sent["all-reduce"] == SAME["steps"] * 4 * alone.run.trainable
    assert sent["reduce-scatter"] == 0 and sent["all-gather"] < 1000


def test_fsdp_gathers_every_block_twice_and_the_rest_once(folder, alone, both):
    out = both[0]["fsdp"]
    held = distributed.held_bytes(attach_adapter(load_model(folder / "base").model, 4))
    blocks = 2  # and everything else is embeddings and one norm
    norms = blocks * 2 * 64 * 4
    once = held["embeddings"] - norms
    twice = held["weights"] + held["adapters"] + norms
    gathered = SAME["steps"] * (once + 2 * twice) // 2
    # Evaluation and the gathering of the adapter come on top.
    assert gathered <= out["sent"]["all-gather"] < 20 * gathered
    assert out["sent"]["reduce-scatter"] == SAME["steps"] * held["adapters"] // 2
    for name in ("weights", "embeddings", "adapters", "gradients", "optimizer"):
        assert out["held"][name] == held[name] // 2, name
    assert out["held"]["constants"] == held["constants"]  # the scales are not cut


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_saved_adapter_is_whole_and_that_of_one_process(folder, alone, both, way):
    saved = load_adapter(folder / way, folder / "base").model.state_dict()
    theirs = {n: p for n, p in alone.model.named_parameters() if p.requires_grad}
    assert len(theirs) == 2 * 7 * 2
    for name, parameter in theirs.items():
        torch.testing.assert_close(saved[name], parameter.detach(), atol=1e-4, rtol=1e-3)


def test_the_first_decides_and_all_hear_of_it(both):
    assert [out["asked"] for out in both] == [1, 0]
    assert all("already holds a finished run" in out["refused"] for out in both)


DIES = """
import os, signal, sys
import torch
from qlora_lab.cli import main

done, step = [], torch.optim.AdamW.step

def counted(self, *args, **kwargs):
    done.append(1)
    if len(done) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

torch.optim.AdamW.step = counted
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_ends_the_run_and_one_process_goes_on(folder, alone):
    run = folder / "killed"
    (folder / "dies.py").write_text(DIES)
    # torchrun takes --r for the beginning of an option of its own, hence --rank.
    options = [f"--{'rank' if name == 'r' else name}={value}" for name, value in SAME.items()]
    options += ["--data=rows.jsonl", "--model=base", "--batch-size=2", "--save-every=2"]
    process = start(folder, "dies.py", "finetune", *options, "--output=killed")
    printed = process.communicate(timeout=500)[0]
    assert process.returncode not in (0, None)
    assert "exitcode  : -9" in printed
    assert printed.count("parameters in NF4") == 1  # one voice
    assert not (run / "result.json").exists()
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["processes"], settings["batch_size"]) == (2, 2)
    assert last_complete_checkpoint(run) == run / "checkpoint-4"

    same = {"rows": ROWS, "tests": {}, "progress": False, "output": run, "resume": True}
    with pytest.raises(InputError, match="4 rows a step, not 2"):
        finetune(folder / "base", batch_size=2, **same, **SAME)
    resumed = finetune(folder / "base", batch_size=4, **same, **SAME)
    assert resumed.run.losses == pytest.approx(alone.run.losses, abs=1e-4)
    assert (run / "result.json").exists()


def test_a_checkpoint_counts_when_every_process_has_written_its_part(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    (tmp_path / "settings.json").write_text(json.dumps({"processes": 2}))
    torch.save({}, checkpoint / "rng_state_0.pth")
    assert last_complete_checkpoint(tmp_path) is None
    torch.save({}, checkpoint / "rng_state_1.pth")
    assert last_complete_checkpoint(tmp_path) == checkpoint


def test_alone_nothing_is_started_and_nothing_can_be_shared(folder, tmp_path):
    assert distributed.world_size() == 1 and distributed.is_first()
    distributed.start("cpu")
    distributed.stop()
    assert distributed.first(lambda: 7) == 7
    with pytest.raises(InputError, match="nproc_per_node"):
        finetune(folder / "base", shard=True, output=tmp_path / "run")
    with pytest.raises(InputError, match="nproc_per_node"):
        distributed.shard(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="choose qlora or lora"):
        finetune(folder / "base", "full", shard=True)
    with pytest.raises(InputError, match="one process's share"):
        finetune(folder / "base", shard=True, save_every=2, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_cards_are_refused(monkeypatch):
    third = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "LOCAL_RANK": "2"}
    for name, value in third.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="2 CUDA devices cannot serve process 3"):
        distributed.start("cuda")


def test_of_several_processes_one_prints_the_error(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["finetune", "--resume"]) == 2
        assert capsys.readouterr().err.count("\n") == lines
