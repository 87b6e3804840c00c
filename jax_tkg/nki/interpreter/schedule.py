"""Runs the two programs of a launch, one instruction at a time, in an order that can be repeated.

Each program has a thread, so that a kernel is ordinary Python; a baton lets only one run. Without a
seed a program runs until it waits for the other or ends; with a seed the baton may change hands
before any instruction.
"""

import contextvars
import random
import threading
from collections.abc import Callable
from typing import Any

from jax_tkg.nki.interpreter.errors import DeadlockError, Source, kernel_line


class _Stopped(BaseException):
    """The other program failed; not an Exception, so that a kernel's `except` lets it pass."""


class Schedule:
    """The baton of one launch."""

    def __init__(self, programs: int, seed: int | None) -> None:
        self._turn = threading.Condition()
        self._running = 0
        self._waiting: dict[int, tuple[Callable[[], bool], str, Source]] = {}
        self._ended: set[int] = set()
        self._failure: BaseException | None = None
        self._random = None if seed is None else random.Random(seed)
        self.programs = programs

    def run(self, programs: list[Callable[[], Any]]) -> list[Any]:
        """Runs all programs to their end; raises what the first to fail raised."""
        if self.programs == 1:
            return [programs[0]()]
        results: list[Any] = [None] * self.programs

        def run_one(i: int) -> None:
            try:
                self._wait_for_turn(i)
                results[i] = programs[i]()
            except _Stopped:
                pass
            except BaseException as error:  # raised again in the caller's thread
                self._failure = self._failure or error
            finally:
                self._end(i)

        threads = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(run_one, i), name=f"nki-program-{i}"
            )
            for i in range(self.programs)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # such as KeyboardInterrupt: the programs must not go on
            self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure
        return results

    def maybe_switch(self, program: int) -> None:
        """Before an instruction: with a seed, perhaps lets another program run first."""
        if self._failure is not None:
            raise _Stopped
        if self.programs == 1 or self._random is None:
            return
        others = [i for i in range(self.programs) if i != program and self._can_run(i)]
        if others and self._random.random() < 0.5:
            self._give(self._random.choice(others))
            self._wait_for_turn(program)

    def wait(self, program: int, ready: Callable[[], bool], what: str) -> None:
        """Lets others run until `ready`; `what` is said when that can never be."""
        if ready():
            return
        self._waiting[program] = (ready, what, kernel_line())
        if not self._give_next():
            raise self._stuck()
        self._wait_for_turn(program)
        del self._waiting[program]

    def _can_run(self, i: int) -> bool:
        return i not in self._ended and (i not in self._waiting or self._waiting[i][0]())

    def _give(self, program: int) -> None:
        with self._turn:
            self._running = program
            self._turn.notify_all()

    def _give_next(self) -> bool:
        runnable = [i for i in range(self.programs) if self._can_run(i)]
        if runnable:
            self._give(runnable[0])
        return bool(runnable)

    def _wait_for_turn(self, program: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == program or self._failure is not None)
        if self._failure is not None:
            raise _Stopped

    def _end(self, program: int) -> None:
        self._ended.add(program)
        if self._failure is not None:
            self._fail(self._failure)
        elif len(self._ended) < self.programs and not self._give_next():
            self._fail(self._stuck())

    def _fail(self, error: BaseException) -> None:
        with self._turn:
            self._failure = self._failure or error
            self._turn.notify_all()

    def _stuck(self) -> DeadlockError:
        stories = [
            f"program {i} waits at {where} for {what}"
            for i, (_, what, where) in sorted(self._waiting.items())
        ] + [f"program {i} has ended" for i in sorted(self._ended)]
        sources = [where for _, _, where in self._waiting.values()]
        return DeadlockError(
            "programs.deadlock",
            "; ".join(stories) + ". Both programs must issue the same exchanges in the same order.",
            *sources,
        )
