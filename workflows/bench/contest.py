"""Anything that runs, timed fairly: in turn, round by round, within a time budget; what fails is noted and left out."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dha.peak import watch_peak
from dha.stopwatch import fill_lap, synchronise, time_runs
from dkd_trainer.evidence.pair_counter import PairCounter

MIN_LAP = {"cpu": 0.2, "cuda": 0.05}  # seconds: shorter runs are timed several at once
COMPILING = 30.0  # seconds that a first compilation is expected to take
MAX_RUNS = 2000


class Entrant(NamedTuple):
    """One thing to time: `run` gives its output, `prepare` is not timed.

    `work` is any measure of effort that entrants of the same `family` share: what the smaller ones took tells what a
    larger one will take. A `compiled` one has a first run that says nothing about the others.
    """

    name: str
    title: str
    run: Callable[[], Tensor]
    prepare: Callable[[], Any] = lambda: None
    work: float = 1.0
    family: tuple = ()
    compiled: bool = False


@dataclass
class Record:
    """What came out for an entrant.

    `seconds` a run by round; `pairs` of query and key in PyTorch's attention and ours; `difference` of the output to
    the first entrant's, relative norm, None where that is no number or has none; `run_memory` in bytes, beyond what lay
    on the device before: the weights of all entrants may; `error` says why figures are missing.
    """

    name: str
    title: str
    pairs: int | None = None
    difference: float | None = None
    warm_up_seconds: float | None = None
    graph_breaks: int | None = None
    runs_per_lap: int = 1
    seconds: list[float] = field(default_factory=list)
    run_memory: int | None = None
    error: str | None = None


class Forecast:
    """Seconds that an entrant will take, from those of its family."""

    def __init__(self):
        self.rates: dict[tuple, float] = {}

    def learn(self, entrant: Entrant, seconds: float) -> None:
        self.rates[entrant.family] = seconds / entrant.work

    def expect(self, entrant: Entrant) -> float | None:
        """None where no relative has run."""
        rate = self.rates.get(entrant.family)
        return None if rate is None else rate * entrant.work


def relate(output: Tensor, reference: Tensor | None) -> float | None:
    """Norm of the difference over the norm of the reference; None where that is no number or there is none."""
    if reference is None or output.shape != reference.shape:
        return None
    ratio = ((output - reference).float().norm() / reference.float().norm()).item()
    return ratio if math.isfinite(ratio) else None


def count_graph_breaks() -> int:
    """How often torch.compile has had to leave a graph so far."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def warm_up(entrant: Entrant, record: Record, device: torch.device) -> Tensor:
    """One uncounted run that also says what the entrant computes and, on a CPU, how much memory that takes."""
    entrant.prepare()
    start = time.perf_counter()
    if entrant.compiled:
        before = count_graph_breaks()
        output = entrant.run()
        record.graph_breaks = count_graph_breaks() - before
    elif device.type == "cpu":
        with watch_peak(device) as peak, PairCounter() as counter:
            output = entrant.run()
        record.run_memory, record.pairs = peak.bytes, counter.pairs
    else:
        with PairCounter() as counter:
            output = entrant.run()
        record.pairs = counter.pairs
    synchronise(device)
    record.warm_up_seconds = time.perf_counter() - start
    return output


def choose_runs(entrant: Entrant, record: Record, device: torch.device) -> None:
    """Runs of a lap: one where it is long enough, else as many as fill the shortest lap."""
    seconds = record.warm_up_seconds
    # The first run sets libraries up and compiles: it may take seconds where the next takes milliseconds.
    if device.type == "cuda" or entrant.compiled or seconds < 5 * MIN_LAP["cpu"]:
        seconds = time_runs(entrant.run, device, 1)
    record.runs_per_lap = fill_lap(seconds, MIN_LAP[device.type], MAX_RUNS)
    record.seconds.append(seconds)  # until the first counted lap takes its place


def time_lap(entrant: Entrant, record: Record, device: torch.device) -> float:
    """One round's seconds a run; the most memory that one takes on CUDA goes into the record."""
    entrant.prepare()
    if device.type != "cuda":
        return time_runs(entrant.run, device, record.runs_per_lap)
    entrant.run()  # untimed: to load a model may empty the allocator's cache, which the next run fills again
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = time_runs(entrant.run, device, record.runs_per_lap)
    record.run_memory = max(record.run_memory or 0, torch.cuda.max_memory_allocated(device) - before)
    return seconds


def describe_error(error: Exception) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def attempt(record: Record, action: Callable[[], Any]) -> Any:
    """The action's result; None where it fails, which the record then says, and the memory is free again."""
    try:
        return action()
    except Exception as error:
        record.error = describe_error(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def find_refusal(expected: float | None, others: float, deadline: float) -> str | None:
    """Why an entrant that takes about `expected` seconds is not to start: after it `others` must fit as well."""
    left = deadline - time.monotonic()
    if expected is None or expected + others <= left:
        return None
    return f"skipped: about {expected:.3g} s expected, {max(left, 0):.3g} s left"


class Contest:
    """Entrants in the order of their importance: where time is short, the last ones are left out first."""

    def __init__(self, entrants: Sequence[Entrant], device: torch.device, deadline: float, forecast: Forecast):
        self.entrants, self.device, self.deadline, self.forecast = entrants, device, deadline, forecast
        self.records = [Record(entrant.name, entrant.title) for entrant in entrants]
        self.live: list[int] = []
        self.reference: Tensor | None = None

    def qualify(self, index: int) -> None:
        """Warm an entrant up, and find out what it computes and how many runs make a lap, if there is time for it."""
        entrant, record = self.entrants[index], self.records[index]
        shortest = MIN_LAP[self.device.type]
        round_seconds = sum(max(self.records[i].seconds[0], shortest) for i in self.live)
        record.error = find_refusal(self.expect(entrant), round_seconds, self.deadline)
        if record.error is None:
            attempt(record, lambda: self.try_out(index))
        if record.error is None:
            self.forecast.learn(entrant, record.seconds[0])
            self.live.append(index)

    def expect(self, entrant: Entrant) -> float | None:
        """Seconds of a warm-up and a lap: from smaller ones of its kind, else what the first entrant took."""
        first = self.records[self.live[0]] if self.live else None
        if entrant.compiled:
            return first.warm_up_seconds if first else COMPILING
        run = self.forecast.expect(entrant)
        run = first.seconds[0] if run is None and first else run
        return None if run is None else 2 * run

    def try_out(self, index: int) -> None:
        """Warm an entrant up; the first one's output, and no other's, is what all are held against."""
        entrant, record = self.entrants[index], self.records[index]
        output = warm_up(entrant, record, self.device)
        self.reference = output if index == 0 else self.reference
        record.difference = relate(output, self.reference)
        del output
        choose_runs(entrant, record, self.device)

    def lap(self, index: int, number: int) -> None:
        """An entrant's turn in a round; it drops out where it fails."""
        record = self.records[index]
        seconds = attempt(record, lambda: time_lap(self.entrants[index], record, self.device))
        record.seconds = [] if seconds is None else [*record.seconds[:number], seconds]

    def hold(self, rounds: int, save: Callable[[list[Record]], None], bar: tqdm) -> None:
        """Rounds start with another entrant each, so that none always follows the same one."""
        for index, entrant in enumerate(self.entrants):
            bar.set_postfix_str(f"warm-up {entrant.name}")
            self.qualify(index)
            bar.update()
        self.reference, longest = None, 0.0
        for number in range(rounds):
            begin = time.monotonic()
            if not self.live or (number and begin + longest > self.deadline):
                break
            for turn in range(len(self.live)):
                index = self.live[(turn + number) % len(self.live)]
                bar.set_postfix_str(self.entrants[index].name)
                self.lap(index, number)
                bar.update()
            self.live = [index for index in self.live if self.records[index].error is None]
            longest = max(longest, time.monotonic() - begin)
            save(self.records)
        bar.total = bar.n


def hold_contest(
    entrants: Sequence[Entrant],
    device: torch.device,
    rounds: int,
    deadline: float = math.inf,
    save: Callable[[list[Record]], None] = lambda records: None,
    forecast: Forecast | None = None,
    label: str = "",
) -> list[Record]:
    """Warm every entrant up, then time all of them round by round; `save` is called after each round.

    No round but the first starts that would end after `deadline` (on `time.monotonic`'s clock).
    """
    contest = Contest(entrants, device, deadline, forecast or Forecast())
    with torch.inference_mode(), tqdm(total=len(entrants) * (1 + rounds), desc=label, unit="lap") as bar:
        contest.hold(rounds, save, bar)
    return contest.records


def share_time(weights: Sequence[float], index: int, end: float) -> float:
    """Deadline of the task at `index`: what is left until `end` is shared among the remaining ones by their weight."""
    now = time.monotonic()
    return now + max(0.0, end - now) * weights[index] / sum(weights[index:])
