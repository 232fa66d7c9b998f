import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.planning.simulation.clock import Clock
from triptych.planning.simulation.host import Host, Job, weight_of

Plan = list[tuple[float, float, float, float]]  # begins at, seconds, weight, threads

PLANS = st.lists(
    st.tuples(
        st.floats(0, 10),
        st.floats(0, 5),
        st.sampled_from([weight_of(0), weight_of(5), weight_of(19)]),
        st.sampled_from([1.0, 2.0]),
    ),
    min_size=1,
    max_size=12,
)
CORES = st.sampled_from([1, 2, 3, 8])


class Run:
    """Plays a plan to its end, looking at the rates after every event."""

    def __init__(self, cores: float, plan: Plan) -> None:
        self.clock = Clock()
        self.host = Host(self.clock, cores)
        self.ends: dict[int, float] = {}
        self.jobs: dict[int, Job] = {}
        self.idle_while_wanted = False
        self.most_cores = 0.0
        self._cores = cores
        for number, (begins, seconds, weight, threads) in enumerate(plan):
            self.clock.at(begins, self._begin, number, seconds, weight, threads)
        self.clock.run(until=self._look)

    def _begin(self, number: int, seconds: float, weight: float, threads: float) -> None:
        self.jobs[number] = self.host.run(seconds, weight, self._end, number, threads=threads)

    def _end(self, number: int) -> None:
        self.ends[number] = self.clock.now

    def _look(self) -> bool:
        running = [job for number, job in self.jobs.items() if number not in self.ends]
        used = sum(job.cores for job in running)
        self.most_cores = max(self.most_cores, used)
        self.idle_while_wanted |= used < min(self._cores, sum(job.threads for job in running)) * (1 - 1e-9)
        return False


@given(CORES, PLANS)
def test_every_job_ends_and_has_had_its_work(cores: int, plan: Plan) -> None:
    run = Run(cores, plan)
    assert run.ends.keys() == set(range(len(plan)))
    assert run.host.num_running == 0
    assert run.host.busy_s == pytest.approx(sum(seconds for _, seconds, _, _ in plan))


@given(CORES, PLANS)
def test_no_core_idles_while_a_job_could_use_it_and_no_more_than_all_are_used(cores: int, plan: Plan) -> None:
    run = Run(cores, plan)
    assert not run.idle_while_wanted
    assert run.most_cores <= cores * (1 + 1e-9)


@given(CORES, PLANS)
def test_no_job_is_faster_than_its_threads_or_than_the_machine(cores: int, plan: Plan) -> None:
    run = Run(cores, plan)
    for number, (begins, seconds, _, threads) in enumerate(plan):
        assert run.ends[number] - begins >= seconds / min(threads, cores) * (1 - 1e-9) - 1e-9


@given(st.integers(1, 4), st.integers(1, 8), st.floats(0.001, 5))
def test_equal_jobs_of_equal_weight_end_together(cores: int, number: int, seconds: float) -> None:
    run = Run(cores, [(0.0, seconds, 1.0, 1.0)] * number)
    expected = seconds * max(1.0, number / cores)
    assert list(run.ends.values()) == pytest.approx([expected] * number)


@given(PLANS)
def test_with_cores_without_end_nobody_waits(plan: Plan) -> None:
    run = Run(math.inf, plan)
    for number, (begins, seconds, _, threads) in enumerate(plan):
        assert run.ends[number] == pytest.approx(begins + seconds / threads)


def test_a_nice_job_gets_its_share_beside_an_important_one() -> None:
    run = Run(1, [(0.0, 1.0, weight_of(0), 1.0), (0.0, 1.0, weight_of(5), 1.0)])
    assert run.ends[0] == pytest.approx(1.0 + weight_of(5))
    assert run.ends[1] == pytest.approx(2.0)


@given(st.integers(1, 6), st.floats(0.1, 5), st.floats(0, 1))
def test_work_takes_longer_beside_a_core_that_works_and_more_of_them_count_as_one(
    number: int, seconds: float, crowding: float
) -> None:
    clock, ends = Clock(), []
    host = Host(clock, number)
    jobs = [host.run(seconds, 1.0, lambda: ends.append(clock.now), crowding=crowding) for _ in range(number)]
    clock.run(until=lambda: False)
    longer = seconds * crowding * (number > 1)
    assert ends == [pytest.approx(seconds + longer)] * number
    assert [job.crowded_s for job in jobs] == [pytest.approx(longer, abs=1e-9)] * number
    assert host.busy_s == pytest.approx(number * (seconds + longer))


def test_as_many_cores_slow_work_as_it_has_threads() -> None:
    clock, ends = Clock(), dict[str, float]()
    host = Host(clock, 8)
    host.run(4.0, 2.0, lambda: ends.update(wide=clock.now), threads=2.0, crowding=0.1)
    for _ in range(4):
        host.run(10.0, 1.0, lambda: None)
    clock.run(until=lambda: False)
    assert ends == {"wide": pytest.approx(2.0 * 1.2)}


def test_those_who_wait_for_a_core_crowd_nobody() -> None:
    clock, ends = Clock(), []
    host = Host(clock, 1)
    for _ in range(3):
        host.run(1.0, 1.0, lambda: ends.append(clock.now), crowding=0.5)
    clock.run(until=lambda: False)
    assert ends == [pytest.approx(3.0)] * 3


def test_the_threads_of_one_job_do_not_crowd_each_other() -> None:
    clock, ends = Clock(), []
    host = Host(clock, 4)
    host.run(4.0, 4.0, lambda: ends.append(clock.now), threads=4.0, crowding=0.5)
    clock.run(until=lambda: False)
    assert ends == [pytest.approx(1.0)]


def test_work_that_does_not_mind_others_slows_those_that_do() -> None:
    clock, ends = Clock(), dict[str, float]()
    host = Host(clock, 2)
    host.run(1.0, 1.0, lambda: ends.update(robust=clock.now))
    host.run(1.0, 1.0, lambda: ends.update(crowded=clock.now), crowding=1.0)
    clock.run(until=lambda: False)
    assert ends == {"robust": pytest.approx(1.0), "crowded": pytest.approx(1.5)}


def test_a_callback_may_bring_the_next_job() -> None:
    clock, ends = Clock(), []
    host = Host(clock, 2)

    def again(left: int) -> None:
        ends.append(clock.now)
        if left:
            host.run(1.0, 1.0, again, left - 1)

    host.run(1.0, 1.0, again, 2)
    clock.run(until=lambda: False)
    assert ends == [pytest.approx(time) for time in (1.0, 2.0, 3.0)]
