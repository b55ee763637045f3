"""What `experiments/` collects over seeds is what its recorded runs say, and its jobs exist."""

import importlib
import json
from pathlib import Path

import pytest

from experiments import __main__ as every
from experiments import methods
from experiments import next as next_

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "results" / "cpu"


def stored(path):
    return json.loads((CPU / path).read_text("utf-8"))


def test_the_summary_of_the_methods_is_that_of_the_runs():
    assert methods.summarise(CPU / "methods") == stored("methods/summary.json")["exact_match"]


def test_the_answers_shown_are_those_that_the_runs_gave():
    shown = stored("methods/answers.json")
    shown.pop("provenance")
    assert methods.collect_answers(CPU / "methods") == shown
    assert set(shown["answers"]) == set(methods.METHODS)


def test_the_summary_of_what_people_ask_next_is_that_of_the_runs():
    assert next_.summarise(CPU / "next") == stored("next/summary.json")["runs"]


def test_every_job_is_a_module_that_says_what_it_does():
    for job in (*every.JOBS, (every.ALONE,)):
        module = importlib.import_module(f"experiments.{job[0]}")
        assert f"python -m experiments.{job[0]}" in module.__doc__
        assert set(job[1:2]) - {"--seeds"} <= set(getattr(module, "SWEEPS", ()))
    # what collects is run again after all seeds, so it must be among the jobs
    assert set(every.SUMMARIES) <= {job[0] for job in every.JOBS}


@pytest.mark.parametrize("folder", every.FOLDERS)
def test_every_sweep_has_three_seeds_and_says_where_it_comes_from(folder):
    records = [json.loads(p.read_text("utf-8")) for p in (CPU / folder).glob("*seed*.json")]
    assert {record["provenance"]["seed"] for record in records} >= set(every.SEEDS)
    for record in records:
        assert {"device", "versions", "commit", "date", "command"} <= set(record["provenance"])
