"""The benchmarks' arithmetic and their door; what they measure is run by `make bench`."""

import json
import sys

import pytest
import torch

from benchmarks import __main__, bench_price, bench_quantize, common


@pytest.fixture
def times(monkeypatch):
    """A clock on which the first candidate takes 1, 2, 9 s in its rounds and the second 4, 4, 4."""
    ticks = [t for first in (1, 2, 9) for t in (0, first, 100, 104)]
    monkeypatch.setattr(common.time, "perf_counter", iter(ticks).__next__)
    return common.Timing({"ours": lambda: None, "theirs": lambda: None}, rounds=3)


def test_a_row_compares_medians(times):
    row = times.row("ours", "theirs", at_most=0.6)
    assert row == {
        "what": "ours",
        "ms": 2000,
        "ms_min": 1000,
        "ms_max": 9000,
        "rounds": 3,
        "against": "theirs",
        "ratio": 0.5,
        "at_most": 0.6,
        "met": True,
    }
    assert not times.row("ours", "theirs", at_most=0.4)["met"]
    assert not times.row("ours", "theirs", at_least=0.6)["met"]


def test_the_table_says_what_was_missed(times):
    text = common.table([times.row("ours", "theirs", at_most=0.4), times.row("theirs")])
    assert "0.50x  of theirs (at most 0.4: MISSED)" in text


def test_results_carry_their_provenance(times, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    path = common.save("quantize", [times.row("theirs")], "cpu", load=0.25)
    assert path == tmp_path / "cpu" / "bench_quantize.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["rows"][0]["ms"] == 4000
    assert record["provenance"]["load_before"] == 0.25
    assert {"device", "versions", "commit", "date", "command"} <= set(record["provenance"])


def test_a_small_run(monkeypatch):
    """On a small weight, without torchao, which nothing depends on. Wrong values are not timed."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rows = bench_quantize.dequantize_rows(weight, rounds=2)
    assert [row["what"] for row in rows[:2]] == ["dequantize to float32", "bitsandbytes to float32"]
    monkeypatch.setattr(bench_quantize, "dequantize_4bit", lambda q: weight)
    with pytest.raises(AssertionError, match="other values than bitsandbytes"):
        bench_quantize.dequantize_rows(weight, rounds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_of_another_kernel_are_restored_and_timed(monkeypatch, dtype):
    """A CUDA kernel puts a near tie on the other side: that is no fault of the restoring."""
    quantize = bench_quantize.bnb.quantize_4bit

    def another_kernel(weight, **options):
        packed, state = quantize(weight, **options)
        packed[5] ^= 0x10
        return packed, state

    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(bench_quantize.bnb, "quantize_4bit", another_kernel)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(bench_quantize.dequantize_rows(weight, rounds=2)) == 4


@pytest.mark.parametrize(
    "arguments, words",
    [(["--only", "speed"], "no benchmark 'speed'"), (["--rounds", "3"], "needs 5 or more")],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quantize", "step"])
def test_every_bar_was_kept_when_it_was_recorded(name):
    rows = json.loads((common.RESULTS / "cpu" / f"bench_{name}.json").read_text("utf-8"))["rows"]
    held = [row for row in rows if "at_most" in row or "at_least" in row]
    assert held and all(row["met"] for row in held)
    for row in held:
        assert row["ratio"] <= row.get("at_most", row["ratio"])
        assert row["ratio"] >= row.get("at_least", row["ratio"])


def test_the_price_is_taken_pairwise(monkeypatch):
    """QLoRA against LoRA at each number of tokens; the same loop for both."""
    monkeypatch.setattr(bench_price, "BATCHES", (1,))
    monkeypatch.setattr(bench_price, "LENGTH", 8)
    monkeypatch.setattr(bench_price, "WIDTH", 64)
    monkeypatch.setattr(bench_price, "TOKENS", (2,))
    rows = bench_price.rows(rounds=2)
    pairs = [(row["what"], row["against"], row["tokens"]) for row in rows if "against" in row]
    assert pairs == [
        ("step of QLoRA, 8 tokens", "step of LoRA, 8 tokens", 8),
        ("4-bit layer, 2 tokens", "plain layer, 2 tokens", 2),
    ]
    assert all(row["ratio"] > 0 for row in rows if "ratio" in row)
