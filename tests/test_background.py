"""Work in the background: in order, bounded, and no error is lost."""

import threading
import time

import pytest

from ul_runtime.jobs import Background


class Gate:
    """Work that waits for `open`, and knows what it has done and in which thread."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.done: list[int] = []
        self.threads: set[int] = set()
        self.fail_at = fail_at

    def __call__(self, item: int) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.open.wait(60)
        if item == self.fail_at:
            raise OSError(28, "no space", str(item))
        self.done.append(item)


def test_items_are_worked_on_in_order_in_one_other_thread_and_are_done_at_the_end():
    gate = Gate()
    gate.open.set()
    with Background(gate, most=3) as background:
        for item in range(50):
            background.put(item)
    assert gate.done == list(range(50))
    assert len(gate.threads) == 1
    assert threading.get_ident() not in gate.threads


def test_put_does_not_wait_for_the_work_until_the_most_are_unfinished():
    gate, accepted = Gate(), []

    def produce(background):
        for item in range(5):
            background.put(item)
            accepted.append(item)

    with Background(gate, most=2) as background:
        producer = threading.Thread(target=produce, args=(background,))
        producer.start()
        assert gate.entered.wait(60)
        while len(accepted) < 2:
            assert producer.is_alive()
        producer.join(0.2)
        assert accepted == [0, 1]
        assert producer.is_alive()
        gate.open.set()
        producer.join(60)
    assert gate.done == accepted == [0, 1, 2, 3, 4]


def put_all(gate, most, num_items, then=lambda background: None):
    with Background(gate, most) as background:
        for item in range(num_items):
            background.put(item)
        then(background)


def test_an_error_is_raised_by_check_and_nothing_after_it_is_worked_on():
    gate = Gate(fail_at=1)

    def check_until_it_fails(background):
        background.check()  # nothing has failed yet
        gate.open.set()
        for _ in range(6000):
            background.check()
            time.sleep(0.01)

    with pytest.raises(OSError, match="no space"):
        put_all(gate, 4, 4, check_until_it_fails)
    assert gate.done == [0]


def test_an_error_is_raised_by_the_next_put():
    gate = Gate(fail_at=0)
    gate.open.set()
    with pytest.raises(OSError, match="no space"):
        put_all(gate, 1, 2, pytest.fail)
    assert gate.done == []


def test_an_error_of_the_last_item_is_raised_at_the_end_of_the_block():
    gate = Gate(fail_at=2)
    with pytest.raises(OSError, match="no space"):
        put_all(gate, 4, 3, lambda background: gate.open.set())
    assert gate.done == [0, 1]


def stopped(gate):
    gate.open.set()
    raise KeyError("stopped")


def test_what_was_put_is_done_when_the_block_ends_by_another_error():
    gate = Gate()
    with pytest.raises(KeyError, match="stopped"):
        put_all(gate, 4, 3, lambda background: stopped(gate))
    assert gate.done == [0, 1, 2]


def test_an_error_of_the_work_is_not_hidden_by_that_of_the_block():
    gate = Gate(fail_at=0)
    with pytest.raises(OSError, match="no space") as caught:
        put_all(gate, 4, 1, lambda background: stopped(gate))
    assert isinstance(caught.value.__context__, KeyError)
