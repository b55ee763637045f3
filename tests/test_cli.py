"""The command line: what it prints, what it refuses in one line, and what it never overwrites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.cli import main, newest_adapter, next_folder, read_rows, typed
from qlora_lab.errors import InputError
from qlora_lab.orders import GRADES, make_rows

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "numpy")
COMMANDS = ("finetune", "ask", "evaluate", "memory")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", make_rows("train", 20))


@pytest.fixture
def test_file(tmp_path):
    return write_rows(tmp_path / "mine.jsonl", make_rows("seen", 3))


def everything(folder):
    return {p: p.is_file() and (p.read_bytes(), p.stat().st_mtime) for p in folder.rglob("*")}


# --- quick to start --------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = f"""
import sys
from qlora_lab.cli import main
for argv in [["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS})]:
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 0
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (*COMMANDS, "--steps", "--output", "--resume"):
        assert word in done.stdout


def test_bad_rows_are_refused_without_waiting_for_torch(tmp_path):
    code = f"""
import sys
from qlora_lab.cli import main
for argv in (["finetune", "--data", "missing.jsonl"], ["ask", "", "--adapter", "x"], ["ask", "x"],
             ["finetune", "--test", "x"], ["finetune", "--resume"]):
    assert main(argv) == 2, argv
assert not set({HEAVY}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def test_the_process_exits_with_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lab", "ask", " ", "--adapter", "x"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qlora-lab: the prompt is empty")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["finetun"], ["finetune", "--r", "two"], ["ask"]])
def test_what_cannot_be_parsed_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: qlora-lab" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("finetune --r 0", "rank 0"),
        ("finetune --r 257", "from 1 to 256"),
        ("finetune --r -3", "rank -3"),
        ("finetune --dropout 1", "dropout 1.0"),
        ("finetune --method qlorra", "'qlorra'"),
        ("finetune --steps 0", "steps 0"),
        ("finetune --lr 0", "lr 0.0"),
        ("finetune --batch-size -1", "batch_size -1"),
        ("finetune --seed -1", "seed -1"),
        ("finetune --optim lion9", "'lion9'"),
        ("finetune --save-every 0", "save_every 0"),
        ("finetune --device tpu", "'tpu'"),
        ("finetune --model no/such/model", "'no/such/model'"),
        ("finetune --resume", "needs --output"),
        ("finetune --resume --output nowhere", "no complete checkpoint"),
        ("finetune --test tests.jsonl", "give both"),
        ("finetune --data missing.jsonl", "missing.jsonl cannot be read"),
        ("finetune --data .", "cannot be read"),
        ("ask tea", "no adapter in runs"),
        ("ask tea --adapter nowhere", "nowhere holds no adapter"),
        ("evaluate nowhere", "nowhere holds no adapter"),
        ("evaluate --bits 3", "bits=3"),
        ("evaluate --model no/such/model", "'no/such/model'"),
        ("evaluate --test missing.jsonl", "missing.jsonl cannot be read"),
        ("memory --model no/such/model", "'no/such/model'"),
        ("memory --method 8-bit", "'8-bit'"),
        ("memory --r 0", "0"),
        ("memory --sequence 0", "0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line, says, capsys):
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("qlora-lab: ") and says in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("text", ["", "   ", "two\nlines"])
def test_text_that_no_prompt_can_hold(text, capsys):
    assert main(["ask", text, "--adapter", "x"]) == 2
    assert "the prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b'{"text": "a", "answer": "b"}\n\n{"text": ', "line 3: this is not JSON"),
        (b'["a", "b"]', 'line 1: an object needs the strings "text" and "answer"'),
        (b'{"text": "a"}', "line 1"),
        (b'{"text": "a", "answer": "b"}\n{"text": "a", "answer": 5}', "line 2"),
        (b'{"text": " ", "answer": "b"}', "line 1"),
        (b'{"text": "a", "answer": ""}', "line 1"),
        (b'{"text": "a\\nb", "answer": "b"}', "line 1: the prompt has more than one line"),
        (b'{"text": "caf\xe9", "answer": "b"}', "not UTF-8"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(content, says, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert main(["finetune", "--data", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{path} " in err and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    ["tea", "[]", "{}", '{"name":"Anna"}', '{"name":"Anna","items":[]}', '{"name":"A","items":[1]}',
     '{"items":[{"count":1,"size":null,"item":"tea","with":[]}]}'],
)  # fmt: skip
def test_what_is_measured_must_be_orders(answer, data, tmp_path, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "a tea for Anna", "answer": answer}])
    assert read_rows(bad)  # one may train on anything
    for argv in (["finetune", "--data", data, "--test", bad], ["evaluate", "--test", bad]):
        assert main(argv) == 2
        assert "line 1: this answer is no order" in capsys.readouterr().err


def test_files_of_other_editors_are_read(tmp_path):
    order = make_rows("seen", 1)[0]["answer"]
    rows = [{"text": "a\u2028b", "answer": order}, {"text": "é", "answer": "line\u2028break"}]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": "tea", "answer": order})]
    lines += [json.dumps({"text": "é", "answer": "line\u2028break"}, ensure_ascii=False)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())  # mark, CRLF, U+2028
    assert read_rows(path) == [{"text": "tea", "answer": order}, rows[1]]
    path.write_text(json.dumps(rows[0]), "utf-8")
    with pytest.raises(InputError, match="line 1: the prompt has more than one line"):
        read_rows(path)


# --- the run ---------------------------------------------------------------------------------


@pytest.fixture
def small_orders(monkeypatch):
    """The shipped orders, a few rows of each split."""
    from qlora_lab import data, finetuning

    def few(splits=data.SPLITS, folder=None):
        loaded = original(splits, folder)
        return {split: rows.select(range(min(2, len(rows)))) for split, rows in loaded.items()}

    original = data.load_orders
    monkeypatch.setattr(data, "load_orders", few)
    monkeypatch.setattr(finetuning, "load_orders", few)


def test_a_run_from_end_to_end(small_orders, capsys, tmp_path):
    options = ["--steps", "3", "--batch-size", "2", "--r", "4"]
    assert main(["finetune", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("qlora_lab/assets/model: ") and "NF4" in lines[0]
    table = {line.split()[0]: line.split() for line in lines if line and line.split()[0] in GRADES}
    assert set(table) == set(GRADES)
    assert all(row[1].endswith("%") and row[2].endswith("%") for row in table.values())
    assert "for 3 steps" in out and "nats per token" in out
    answers = out.split("three answers")[1]
    assert answers.count("[WRONG]") + answers.count("[right]") == 3
    for grade in ("pairs", "copying", "corrections"):
        assert first_text(grade) in answers
    assert "the adapter is in runs/finetune-1/adapter (" in out
    assert "what to do next" in out and f"{typed()} ask" in out
    record = json.loads((newest_adapter_folder() / "result.json").read_text("utf-8"))
    assert record["settings"]["steps"] == 3 and record["settings"]["r"] == 4

    # Again: another folder, and the first is as it was.
    before = everything(newest_adapter_folder())
    assert main(["finetune", *options, "--no-before", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "runs/finetune-2/adapter" in out
    row = next(line for line in out.splitlines() if line.startswith("pairs"))
    assert row.split()[1] == "-"  # not measured before
    assert everything(newest_adapter_folder().parent / "finetune-1") == before
    assert main(["finetune", *options, "--output", "runs/finetune-1"]) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert everything(newest_adapter_folder().parent / "finetune-1") == before

    # The saved adapter answers and is measured; its scores are those of the run.
    assert main(["ask", "two large teas for Anna"]) == 0
    newest = capsys.readouterr()
    assert newest.err == "" and newest.out.count("\n") == 1
    assert main(["ask", "two large teas for Anna", "--adapter", "runs/finetune-2"]) == 0
    assert capsys.readouterr().out == newest.out
    assert main(["evaluate", "runs/finetune-1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for grade in GRADES:
        line = next(line for line in out.splitlines() if line.startswith(f"{grade} "))
        assert f"exact match {record['after'][grade]['exact_match']:.1%}" in line
        assert "n=2" in line


def first_text(grade):
    from qlora_lab.data import load_orders

    return load_orders([grade])[grade][0]["text"]


def newest_adapter_folder():
    return newest_adapter(Path("runs")).parent


def test_ones_own_rows(data, test_file, tmp_path, capsys):
    output = tmp_path / "my run"
    argv = ["finetune", "--data", data, "--test", test_file, "--method", "full", "--steps", "1"]
    assert main([*argv, "--output", str(output), "--batch-size", "2", "--no-before"]) == 0
    out = capsys.readouterr().out
    assert "mine " in out and "three answers" not in out
    assert f"the model is in {output.as_posix()}/model" in out
    assert main(["evaluate", "--model", str(output / "model"), "--test", test_file]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mine ")
    assert main(["evaluate", str(output)]) == 2
    assert "whole model" in capsys.readouterr().err


def test_a_stopped_run_is_resumed(data, capsys, monkeypatch, tmp_path):
    from qlora_lab import finetuning

    argv = ["finetune", "--data", data, "--steps", "2", "--batch-size", "2", "--save-every", "1"]
    argv += ["--output", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save", stop)
        assert main(argv) == 130
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert "for 2 steps" in capsys.readouterr().out


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_is_130_and_one_line(monkeypatch, capsys):
    from qlora_lab import finetuning

    monkeypatch.setattr(finetuning, "finetune", stop)
    assert main(["finetune"]) == 130
    err = capsys.readouterr().err
    assert err.strip().startswith("qlora-lab: stopped") and "Traceback" not in err


# --- memory ----------------------------------------------------------------------------------


def test_memory_prints_the_ledger(capsys):
    from transformers import AutoConfig

    from qlora_lab import embedded_model
    from qlora_lab.memory import ledger

    assert main(["memory"]) == 0
    as_trained = {"kbit_prep": True, "autocast": True}
    expected = ledger(AutoConfig.from_pretrained(embedded_model()), **as_trained)
    assert capsys.readouterr().out == f"{expected}\n"
    argv = "memory --method full --batch-size 4 --sequence 256 --checkpointing".split()
    assert main(argv) == 0
    config = AutoConfig.from_pretrained(embedded_model())
    run = {"batch": 4, "sequence": 256, "checkpointing": True}
    expected = ledger(config, "full", dtype="float32", **run)
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["memory", "--no-double-quant", "--r", "8"]) == 0
    expected = ledger(config, r=8, double_quant=False, **as_trained)
    assert capsys.readouterr().out == f"{expected}\n"


# --- folders ---------------------------------------------------------------------------------


def test_the_next_folder_is_one_that_does_not_exist(tmp_path):
    assert next_folder(tmp_path, "run").name == "run-1"
    for number in (1, 2, 4):
        (tmp_path / f"run-{number}").mkdir()
    assert next_folder(tmp_path, "run").name == "run-3"


def test_the_newest_adapter_is_that_of_the_run_that_finished_last(tmp_path):
    with pytest.raises(InputError, match="no adapter"):
        newest_adapter(tmp_path / "missing")
    for number, (finished, what) in enumerate(
        [(300, "adapter"), (100, "adapter"), (400, "model"), (None, "adapter")]
    ):
        folder = tmp_path / f"run-{number}"
        (folder / what).mkdir(parents=True)
        if finished:
            (folder / "result.json").write_text("{}")
            os.utime(folder / "result.json", (finished, finished))
    assert newest_adapter(tmp_path) == tmp_path / "run-0" / "adapter"


def test_what_to_do_next_is_typed_as_it_works_here(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/qlora-lab")
    assert typed() == "qlora-lab"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv/bin/python"))
    assert typed() == f"{Path('.venv/bin/python')} -m qlora_lab"
    monkeypatch.setattr(sys, "executable", str(Path.cwd().parent / "python"))
    assert typed() == f"{Path.cwd().parent / 'python'} -m qlora_lab"
