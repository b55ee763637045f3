"""Paged optimizer state: what happens when memory runs out for one second.

A paged optimizer puts Adam's moments into *unified memory* (`cudaMallocManaged`): one address
that the CPU and the GPU both see, cut into pages that the driver moves between them. While
everything fits, nothing moves and nothing is slower. When activations need room, the driver
sends optimizer pages to the CPU, and when the optimizer touches one of them it comes back.

How the simulator works, in four steps:

1. The device has `room` pages for optimizer state and activations together (the weights, which
   never move, are already taken off).
2. In the forward and backward pass the activations grow to `peak` pages. Whatever optimizer
   state no longer fits beside them is evicted, the least recently used page first (LRU).
3. The activations are gone before the optimizer runs. It sweeps over its state once, page after
   page, always in the same order. A page that sits on the CPU is a *fault*: it is fetched, and
   if the device is full another page is evicted for it.
4. Every page that crosses the link costs its bytes divided by the link's bandwidth.

Two regimes follow from that and the sweep's fixed order. State that fits at rest but not beside
the peak loses only what the peak pushed out: 10 pages of 100, 10 % faults. State that does not
fit at rest is worse than it looks: one page too many and LRU always evicts the page that is
needed next, so that *every* touch is a fault. Paging saves a run from a short peak; it is a slow
way to run with too little memory.

This is a model of the driver, not the driver. Which page a real driver evicts is its own affair
and may change with its version; here it is plain LRU over equal pages, which is what gives the
cliff. A cache that knew the future would do better (99 of 100 pages would stay), but no driver
does. Transfers here never overlap with computing: bitsandbytes asks for a parameter's state
right before it updates that parameter, so the update has to wait for it anyway.

Source: QLoRA (arXiv 2305.14314), section 3, "Paged Optimizers"; bitsandbytes `optim/optimizer.py`
(`get_state_buffer`, `prefetch_state`) and `functional.py` (`get_paged`, `prefetch_tensor`);
bitsandbytes issue 962, where its author gives the page sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_lab.errors import InputError, above_zero, whole

PAGED_FROM = 100_000
"""Elements from which bitsandbytes puts a parameter's optimizer state into unified memory."""

PAGE_BYTES = 2 * 2**20
"""Bytes moved at once with prefetching (2 MiB); without it a page is a few KiB (issue 962)."""

BANDWIDTH = 25e9
"""Bytes per second over the link: what a PCIe 4.0 x16 slot delivers of its nominal 32 GB/s."""


def is_paged(numel: int) -> bool:
    """Say whether bitsandbytes' paged optimizers page the state of a tensor of this size.

    The rule looks at the number of elements and not at bytes, so it is the same for 8-bit and
    32-bit state. Small adapters are never paged: at width 4096, r=8 gives 32,768 elements.

    Args:
        numel: Elements of the trained tensor.

    Returns:
        True from 100,000 elements on.

    Raises:
        InputError: This is no number of elements.

    Source:
        bitsandbytes `optim/optimizer.py`, `Optimizer8bit.get_state_buffer`.
    """
    whole("numel", numel, 0)
    return numel >= PAGED_FROM


def state_pages(
    numels: Iterable[int], *, page_bytes: int = PAGE_BYTES, bytes_per_element: int = 4
) -> int:
    """Count the pages that the paged part of Adam's state occupies.

    Each of the two moments of each tensor is an allocation of its own, so the last page of each
    is rarely full.

    Args:
        numels: Elements of every trained tensor.
        page_bytes: Bytes of one page.
        bytes_per_element: 4 for 32-bit moments, 1 for 8-bit ones.

    Returns:
        Pages; 0 if no tensor is large enough to be paged.

    Raises:
        InputError: A number is out of range.
    """
    whole("page_bytes", page_bytes)
    whole("bytes_per_element", bytes_per_element)
    moments = (2 * -(-n * bytes_per_element // page_bytes) for n in numels if is_paged(n))
    return sum(moments)


class PageCache:
    """The device's memory as a cache of pages, least recently used page out first.

    Args:
        room: Pages that fit on the device.

    Raises:
        InputError: `room` is negative.
    """

    def __init__(self, room: int):
        whole("room", room, 0)
        self.room = room
        self.evicted = 0
        self._on_device: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._on_cpu: set[int] = set()

    def __len__(self) -> int:
        """Pages that are on the device now."""
        return len(self._on_device)

    def __contains__(self, page: int) -> bool:
        return page in self._on_device

    def __repr__(self) -> str:
        return f"PageCache({len(self)} of {self.room} pages on the device, {self.evicted} evicted)"

    def touch(self, page: int) -> bool:
        """Use a page, which brings it to the device if it is not there.

        A page that was never touched before is allocated where it is used, so it is no fault.

        Args:
            page: The page's number.

        Returns:
            True if the page had to come from the CPU.

        Raises:
            InputError: The device has no room for even one page.
        """
        if self.room < 1:
            raise InputError("no room for a page: a touched page needs room for at least 1 page")
        fetched = page in self._on_cpu
        self._on_cpu.discard(page)
        self._on_device[page] = None
        self._on_device.move_to_end(page)  # now the most recently used
        self._shrink_to(self.room)
        return fetched

    def resize(self, room: int) -> int:
        """Give the cache more or less room, as activations come and go.

        Args:
            room: Pages that fit from now on.

        Returns:
            Pages evicted to the CPU to get there.

        Raises:
            InputError: `room` is negative.
        """
        whole("room", room, 0)
        self.room = room
        return self._shrink_to(room)

    def _shrink_to(self, room: int) -> int:
        evicted = max(0, len(self) - room)
        for _ in range(evicted):
            page, _ = self._on_device.popitem(last=False)
            self._on_cpu.add(page)  # unified memory keeps one copy, so eviction is a transfer
        self.evicted += evicted
        return evicted


@dataclass(frozen=True)
class Step:
    """What one training step did to the optimizer's pages.

    Attributes:
        touches: Pages the optimizer swept over.
        faults: Touches that found their page on the CPU and stopped for it.
        prefetched: Pages brought back by a prefetch before they were touched.
        evicted_by_peak: Pages sent to the CPU because activations needed the room.
        evicted_by_sweep: Pages sent to the CPU because the sweep itself needed the room.
        resident: Pages on the device after each event: the peak, then every touch.
        bytes_moved: Bytes over the link, both directions.
        stall_seconds: Time the GPU waits for the link, from the stated bandwidth.
    """

    touches: int
    faults: int
    prefetched: int
    evicted_by_peak: int
    evicted_by_sweep: int
    resident: tuple[int, ...]
    bytes_moved: int
    stall_seconds: float

    @property
    def fetched(self) -> int:
        """Pages that came back from the CPU, by a fault or by a prefetch."""
        return self.faults + self.prefetched

    @property
    def fault_rate(self) -> float:
        """Faults as a share of the touches, 0 to 1."""
        return self.faults / self.touches


@dataclass(frozen=True)
class Simulation:
    """Training steps under paging, and what would have happened without it.

    Attributes:
        pages: Pages of optimizer state.
        room: Pages of the device for state and activations together.
        peak: Pages that the activations take at their highest.
        steps: One entry a step; empty if the activations alone do not fit.
    """

    pages: int
    room: int
    peak: int
    steps: tuple[Step, ...]

    @property
    def verdict(self) -> str:
        """Who needs paging: "fits without paging", "saved by paging" or "out of memory".

        Only optimizer state is paged. Activations are ordinary device memory, and a peak that is
        larger than the device ends the run with paging as it does without.
        """
        if self.peak > self.room:
            return "out of memory"
        return "fits without paging" if self.pages + self.peak <= self.room else "saved by paging"

    @property
    def steady(self) -> Step:
        """The last step, when the first touches are over.

        Raises:
            InputError: There is none, because the activations alone do not fit.
        """
        if not self.steps:
            raise InputError(
                f"no step was run: {self.peak} pages of activations do not fit into {self.room}, "
                "and only optimizer state can be paged"
            )
        return self.steps[-1]

    def __str__(self) -> str:
        head = f"{self.pages} pages of state, room for {self.room}, peak of {self.peak}"
        lines = [f"{head}: {self.verdict}"]
        for number, step in enumerate(self.steps, start=1):
            lines.append(
                f"step {number}: {step.faults:4d} faults of {step.touches} touches "
                f"({step.fault_rate:4.0%}), {step.prefetched} prefetched, "
                f"{step.evicted_by_peak} evicted by the peak, "
                f"{step.bytes_moved / 1e6:.1f} MB moved, stall {step.stall_seconds * 1e3:.2f} ms"
            )
        return "\n".join(lines)


def simulate(
    pages: int,
    room: int,
    *,
    peak: int = 0,
    steps: int = 3,
    prefetch: int = 0,
    page_bytes: int = PAGE_BYTES,
    bandwidth: float = BANDWIDTH,
    fault_seconds: float = 0.0,
) -> Simulation:
    """Run training steps against a device that may be too small for the optimizer's state.

    Each step is a peak of activations (forward and backward pass), then one sweep of the
    optimizer over all of its pages in order. The first step also allocates the state, so it
    moves less than the ones that follow; the second is already typical.

    Args:
        pages: Pages of optimizer state, at least 1.
        room: Pages that the device has for optimizer state and activations together.
        peak: Pages that the activations take at their highest.
        steps: Training steps, at least 1.
        prefetch: Pages requested together right before they are touched, as bitsandbytes does
            for one parameter at a time; 0 leaves every page to a fault. A prefetch moves the
            same bytes, but does not pay `fault_seconds` for each page.
        page_bytes: Bytes of one page.
        bandwidth: Bytes per second over the link, each page counted once for each crossing.
        fault_seconds: Time the driver needs to serve one fault, on top of the transfer. 0 gives
            the lower bound that bandwidth alone sets.

    Returns:
        The steps and the verdict; without steps if `peak` alone is larger than `room`.

    Raises:
        InputError: A number is out of range, or there is nothing to simulate.
    """
    for name, value in {
        "pages": pages,
        "room": room,
        "steps": steps,
        "page_bytes": page_bytes,
    }.items():
        whole(name, value, 1)
    for name, value in {"peak": peak, "prefetch": prefetch}.items():
        whole(name, value, 0)
    above_zero("bandwidth", bandwidth)
    if fault_seconds != 0:
        above_zero("fault_seconds", fault_seconds)

    if peak > room:
        return Simulation(pages, room, peak, steps=())
    cache = PageCache(room)
    records = []
    for _ in range(steps):
        evicted_by_peak = cache.resize(room - peak)
        resident = [len(cache)]
        cache.resize(room)  # the backward pass has freed the activations

        evicted_before = cache.evicted
        faults = prefetched = 0
        for first in range(0, pages, prefetch or 1):
            group = range(first, min(first + (prefetch or 1), pages))
            if prefetch:
                prefetched += sum(cache.touch(page) for page in group)
            for page in group:
                faults += cache.touch(page)
                resident.append(len(cache))
        evicted_by_sweep = cache.evicted - evicted_before

        moved = page_bytes * (faults + prefetched + evicted_by_peak + evicted_by_sweep)
        stall = moved / bandwidth + faults * fault_seconds
        records.append(
            Step(
                touches=pages,
                faults=faults,
                prefetched=prefetched,
                evicted_by_peak=evicted_by_peak,
                evicted_by_sweep=evicted_by_sweep,
                resident=tuple(resident),
                bytes_moved=moved,
                stall_seconds=stall,
            )
        )
    return Simulation(pages, room, peak, tuple(records))
