"""In which order the event loop works, when refusals are told, and how long answers take to get back."""

import asyncio
import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from mprec.serving.http.pace import LATEST_S, Pace
from mprec.serving.http.return_trip import ReturnTrip
from mprec.serving.http.turns import Turns


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def in_loop(work):
    """Run ``work(loop, clock)``, which may give a coroutine, in a loop."""

    async def main():
        found = work(asyncio.get_running_loop(), Clock())
        return await found if asyncio.iscoroutine(found) else found

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def test_answers_come_before_new_queries_and_the_loop_looks_between_them():
    log = []

    async def run(loop, clock):
        turns, first = Turns(loop, clock), Future()
        here, there = socket.socketpair()
        here.setblocking(False)
        loop.add_reader(here, lambda: log.append(f"read {here.recv(1).decode()}"))
        turns.when_done(first, lambda future: log.append(f"answer {future.result()}"))

        def query(number):
            log.append(f"query {number}")
            there.send(b"%d" % number)
            if number == 0:
                first.set_result(0)

        for number in range(3):
            turns.begin(lambda number=number: query(number))
        while len(log) < 7:
            await asyncio.sleep(0.001)
        loop.remove_reader(here)
        here.close()
        there.close()

    in_loop(run)
    assert [entry for entry in log if entry != "answer 0"] == [
        f"{what} {number}" for number in range(3) for what in ("query", "read")
    ]
    assert log.index("answer 0") < log.index("query 1")


def test_the_loop_is_woken_once_for_answers_that_finish_together():
    async def run(loop, clock):
        turns, got, wakings = Turns(loop, clock), [], []
        plain = loop.call_soon_threadsafe
        turns._loop = SimpleNamespace(call_soon_threadsafe=lambda *args: (wakings.append(1), plain(*args)))
        futures = [Future() for _ in range(50)]
        for future in futures:
            turns.when_done(future, lambda done: got.append(done.result()))
        thread = threading.Thread(target=lambda: [f.set_result(i) for i, f in enumerate(futures)])
        thread.start()
        thread.join()
        assert got == []  # the loop has not run yet
        while len(got) < 50:
            await asyncio.sleep(0.001)
        assert got == list(range(50))
        assert len(wakings) == 1

    in_loop(run)


def test_an_answer_that_cannot_be_handed_out_does_not_keep_others_from_theirs():
    async def run(loop, clock):
        told, got = [], []
        loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
        turns = Turns(loop, clock)
        one, other = Future(), Future()
        turns.when_done(one, lambda _: 1 / 0)
        turns.when_done(other, lambda _: got.append(1))
        one.set_result(0)
        other.set_result(0)
        await asyncio.sleep(0.01)
        assert got == [1]
        assert isinstance(told[0], ZeroDivisionError)

    in_loop(run)


def test_answers_for_a_loop_that_is_gone_are_dropped_in_silence(caplog):
    future = Future()
    in_loop(lambda loop, clock: Turns(loop, clock).when_done(future, lambda _: None))
    future.set_result(0)
    assert caplog.records == []


def test_what_is_read_may_have_come_while_the_loop_was_busy():
    """Two turns of 3 s each; then the loop is idle again."""

    async def run(loop, clock):
        turns, arrivals = Turns(loop, clock), []

        def query():
            clock.now += 3
            loop.call_soon(lambda: arrivals.append((turns.arrival(), clock.now)))

        turns.begin(query)
        turns.begin(query)
        turns.begin(query)
        for _ in range(8):
            await asyncio.sleep(0)
        bounds = [now - arrival for arrival, now in arrivals]
        assert bounds[0] >= 3  # what came in the first turn is seen after it
        assert all(bound <= 6 for bound in bounds)  # but it is never more than two turns old
        clock.now += 50
        assert turns.arrival() == clock.now

    in_loop(run)


def test_refusals_are_told_at_once_while_they_are_few_and_paced_beyond_that():
    async def run(loop, clock):
        pace, told = Pace(loop, clock), []

        def refuse(number):
            pace.tell(lambda: told.append((number, clock.now)), clock.now + LATEST_S, 1e-4)

        for number in range(5):  # one each second
            refuse(number)
            clock.now += 1
        assert [number for number, _ in told] == list(range(5))
        del told[:]
        start = clock.now
        for number in range(1000):
            refuse(number)
        assert len(told) == 1
        for step in range(1, 230):
            clock.now = start + 0.005 * step
            await asyncio.sleep(0.003)  # more than a timer's shortest wait
            if clock.now < start + LATEST_S:
                assert len(told) < 1 + 500 * (clock.now - start)  # a few hundred a second
                halfway = len(told)
        assert halfway > 100
        assert [number for number, _ in told] == list(range(1000))  # in order
        assert all(at <= start + LATEST_S + 0.1 for _, at in told)  # and the rest when they must be

    in_loop(run)


def test_one_refusal_that_took_long_does_not_hold_up_the_others():
    async def run(loop, clock):
        pace, told = Pace(loop, clock), []
        pace.tell(lambda: told.append(0), clock.now + LATEST_S, 10.0)
        clock.now += 0.02
        pace.tell(lambda: told.append(1), clock.now + LATEST_S, 1e-4)
        assert told == [0, 1]

    in_loop(run)


@given(st.lists(st.floats(0, 1), max_size=50), st.floats(0, 100))
def test_the_return_trip_is_estimated_from_above_and_forgotten(seconds, silence):
    trip = ReturnTrip()
    assert trip.expected_s(0.0) == 0
    for i, value in enumerate(seconds):
        trip.observe(float(i), value)
    last = float(len(seconds) - 1)
    assert trip.expected_s(last + silence) <= trip.expected_s(last)
    assert trip.expected_s(last + 60) < 1e-12


def test_the_return_trip_covers_what_is_usual():
    trip = ReturnTrip()
    values = [0.001, 0.002] * 200
    for i, value in enumerate(values):
        trip.observe(float(i), value)
    assert 0.002 <= trip.expected_s(399.0) < 0.004


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5])
def test_one_answer_in_a_hundred_comes_back_later_than_expected(shape):
    """Where each query has waited for as long as it may, as in a queue that is always full."""
    rng, trip, late = np.random.default_rng(0), ReturnTrip(), []
    for i, seconds in enumerate(1e-3 * rng.lognormal(0, shape, 20_000)):
        late.append(seconds > trip.expected_s(i / 4000))
        trip.observe(i / 4000, seconds, late[-1])
    assert np.mean(late[2000:]) <= 0.012
    for i in range(20_000):  # none are late any more
        trip.observe(5 + i / 4000, 1e-3)
    assert trip.expected_s(10.0) < 2e-3
