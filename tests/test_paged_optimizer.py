"""The page simulator against a brute-force LRU, and against what can be derived on paper."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab.errors import InputError
from qlora_lab.paged_optimizer import PAGED_FROM, PageCache, is_paged, simulate, state_pages

small = st.integers(1, 40)


# The numbers of chapter 7.


def test_all_fits_no_faults():
    run = simulate(pages=100, room=100)
    assert [step.fault_rate for step in run.steps] == [0.0, 0.0, 0.0]
    assert run.steady.bytes_moved == 0
    assert run.verdict == "fits without paging"


def test_one_page_too_many_and_every_touch_faults():
    run = simulate(pages=100, room=99)
    assert run.steady.fault_rate == 1.0
    assert run.steady.fetched == run.steady.evicted_by_sweep == 100
    assert run.verdict == "saved by paging"


def test_a_peak_that_evicts_ten_costs_ten():
    run = simulate(pages=100, room=100, peak=10)
    assert run.steady.evicted_by_peak == 10
    assert run.steady.fault_rate == 0.10
    assert run.steady.evicted_by_sweep == 0  # the room is back, nothing else has to leave


def test_room_for_state_and_peak_needs_no_paging():
    run = simulate(pages=100, room=110, peak=10)
    assert run.steady.fetched == 0
    assert run.verdict == "fits without paging"


def test_activations_cannot_be_paged():
    run = simulate(pages=100, room=100, peak=101)
    assert run.verdict == "out of memory"
    assert run.steps == ()
    with pytest.raises(InputError, match="only optimizer state can be paged"):
        _ = run.steady


def test_stall_is_bytes_over_bandwidth_plus_faults():
    step = simulate(
        100, 100, peak=10, page_bytes=2_000_000, bandwidth=20e9, fault_seconds=1e-5
    ).steady
    assert step.bytes_moved == 20 * 2_000_000  # ten out, ten back in
    assert step.stall_seconds == pytest.approx(40e6 / 20e9 + 10 * 1e-5)


def test_prefetch_moves_the_same_bytes_without_faults():
    plain = simulate(100, 100, peak=10, fault_seconds=1e-5).steady
    ahead = simulate(100, 100, peak=10, fault_seconds=1e-5, prefetch=4).steady
    assert (plain.faults, plain.prefetched) == (10, 0)
    assert (ahead.faults, ahead.prefetched) == (0, 10)
    assert ahead.bytes_moved == plain.bytes_moved
    assert ahead.stall_seconds == pytest.approx(plain.stall_seconds - 10 * 1e-5)


def test_prefetching_more_than_fits_defeats_itself():
    # The end of the group evicts its beginning before it is touched: fetched twice.
    step = simulate(pages=20, room=10, prefetch=20).steady
    assert step.prefetched == 20 and step.faults == 20


def test_the_first_step_allocates_and_does_not_fault():
    first = simulate(pages=100, room=99).steps[0]
    assert first.faults == 0 and first.evicted_by_sweep == 1


# Against a reference that is too slow to use and too simple to be wrong.


class ListLRU:
    """LRU by a list in order of use, searched from the front."""

    def __init__(self, room):
        self.room, self.used, self.seen = room, [], set()

    def touch(self, page):
        fault = page in self.seen and page not in self.used
        self.used = [p for p in self.used if p != page] + [page]
        self.seen.add(page)
        self.trim()
        return fault

    def trim(self):
        self.used = self.used[max(0, len(self.used) - self.room) :]


@given(
    room=small,
    events=st.lists(st.one_of(st.integers(0, 15), st.tuples(st.integers(1, 20))), max_size=120),
)
def test_cache_equals_brute_force_lru(room, events):
    cache, reference = PageCache(room), ListLRU(room)
    for event in events:
        if isinstance(event, tuple):  # new room
            cache.resize(event[0])
            reference.room = event[0]
            reference.trim()
        else:
            assert cache.touch(event) == reference.touch(event)
        assert {p for p in range(16) if p in cache} == set(reference.used)
        assert len(cache) <= cache.room


@given(pages=small, room=small, peak=st.integers(0, 40), steps=st.integers(2, 5))
def test_closed_form(pages, room, peak, steps):
    run = simulate(pages, room, peak=peak, steps=steps)
    if peak > room:
        assert not run.steps
        return
    if pages > room:  # the cliff: LRU over a cyclic sweep keeps nothing that is needed next
        expected = pages
    else:
        expected = max(0, pages - (room - peak))
    assert all(step.faults == expected for step in run.steps[1:])
    assert (run.verdict == "fits without paging") == (pages + peak <= room)
    if run.verdict == "fits without paging":
        assert all(step.bytes_moved == 0 for step in run.steps)


@given(pages=small, room=small, peak=st.integers(0, 10), prefetch=st.integers(0, 6))
def test_nothing_is_lost_on_the_way(pages, room, peak, prefetch):
    run = simulate(pages, room, peak=peak, prefetch=prefetch, steps=4, page_bytes=1)
    for step in run.steps:
        assert max(step.resident) <= min(pages, room)
        assert len(step.resident) == pages + 1
    # every page fetched had been evicted before, and what is still out was not fetched again
    evicted = sum(s.evicted_by_peak + s.evicted_by_sweep for s in run.steps)
    fetched = sum(s.fetched for s in run.steps)
    if run.steps:
        assert evicted - fetched == pages - run.steps[-1].resident[-1]
        assert sum(s.bytes_moved for s in run.steps) == evicted + fetched


@given(pages=small, room=small, peak=st.integers(0, 20), extra=st.integers(0, 20))
def test_more_room_never_hurts(pages, room, peak, extra):
    tight, wide = (simulate(pages, r, peak=peak) for r in (room, room + extra))
    if tight.steps:
        assert wide.steady.fetched <= tight.steady.fetched


# bitsandbytes' rule.


def test_rule_is_at_least_a_hundred_thousand():
    assert PAGED_FROM == 100_000
    assert not is_paged(99_999) and is_paged(100_000)


def test_which_adapters_of_llama_7b_are_paged():
    width, inner = 4096, 11008
    assert not is_paged(8 * width) and not is_paged(8 * inner)
    assert not is_paged(16 * width) and is_paged(16 * inner)
    assert is_paged(32 * width)


@pytest.mark.parametrize("numel", [PAGED_FROM - 1, PAGED_FROM])
def test_rule_is_the_one_in_bitsandbytes(numel, monkeypatch):
    """Drive bitsandbytes' own method on a stand-in tensor and see which branch it takes."""
    import bitsandbytes as bnb
    import torch

    optimizer = bnb.optim.PagedAdamW([torch.nn.Parameter(torch.zeros(1))])
    asked = []

    def get_paged(*shape, dtype, device):
        asked.append(shape)
        return torch.zeros(*shape, dtype=dtype)

    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda *a: None)
    monkeypatch.setattr(optimizer.page_mng, "paged_tensors", [])
    # A tensor on "meta" is not on the CPU, so the method takes the device's path.
    optimizer.get_state_buffer(torch.empty(numel, device="meta"))
    assert bool(asked) == is_paged(numel)


def test_on_a_cpu_bitsandbytes_warns_and_does_not_page():
    import bitsandbytes as bnb
    import torch

    weight = torch.nn.Parameter(torch.zeros(PAGED_FROM))
    weight.grad = torch.ones_like(weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = bnb.optim.PagedAdamW([weight], lr=1e-3)
        optimizer.step()
    assert any("not supported on CPU" in str(w.message) for w in caught)
    assert not getattr(optimizer.state[weight]["state1"], "is_paged", False)


def test_state_pages_counts_both_moments_of_large_tensors():
    page = 2 * 2**20
    assert state_pages([99_999]) == 0
    assert state_pages([100_000]) == 2  # 400,000 bytes each: one page a moment
    assert state_pages([page // 4, page // 4 + 1]) == 2 + 4
    assert state_pages([page // 4 + 1], bytes_per_element=1) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"pages": 0, "room": 5},
        {"pages": 5, "room": 0},
        {"pages": 5, "room": 5, "peak": -1},
        {"pages": 5, "room": 5, "steps": 0},
        {"pages": 5, "room": 5, "prefetch": -1},
        {"pages": 5, "room": 5, "page_bytes": 0},
        {"pages": 5, "room": 5, "bandwidth": 0.0},
        {"pages": 5, "room": 5, "fault_seconds": -1.0},
        {"pages": 5, "room": 5, "fault_seconds": float("nan")},
        {"pages": 5, "room": 5, "bandwidth": "25e9"},
        {"pages": "5", "room": 5},
        {"pages": 5, "room": 5.5},
    ],
)
def test_bad_input_is_one_line(arguments):
    with pytest.raises(InputError) as error:
        simulate(**arguments)
    assert "\n" not in str(error.value) and ("give" in str(error.value))


def test_no_room_at_all():
    with pytest.raises(InputError, match="room"):
        PageCache(0).touch(1)
    with pytest.raises(InputError, match="room -1"):
        PageCache(-1)
    with pytest.raises(InputError, match="room 1.5"):
        PageCache(1.5)
    with pytest.raises(InputError, match="numel '100000'"):
        is_paged("100000")
    with pytest.raises(InputError, match="bytes_per_element 0"):
        state_pages([10**6], bytes_per_element=0)


def test_prints_itself():
    text = str(simulate(100, 100, peak=10, steps=2))
    assert text.splitlines()[0] == ("100 pages of state, room for 100, peak of 10: saved by paging")
    assert "10 faults of 100 touches ( 10%)" in text
