"""When to speculate: a rule for the host, which decides between two calls of a compiled loop.

The loops have static trip counts and no branches, so that a step cannot choose between one token
and several. A call of a few steps can: one program drafts and verifies, the other takes a token a
step, and the host looks at what was accepted before it starts the next. No clock is read: the same
accepted counts give the same choices, so that a seed reproduces a run.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jax_tkg._checks import real_number, whole_number
from jax_tkg._typing import Array, Int
from jax_tkg.generation.drafts import Drafter, check_drafter


@runtime_checkable
class PausableDrafter(Drafter, Protocol):
    """A drafter that can go on after tokens which it did not draft."""

    def follow(
        self, tokens: Int[Array, "B W"], lengths: Int[Array, " B"], state: Any, *, chunk: int
    ) -> Any:
        """Brings the state up to the text, on the host, when speculation pauses or goes on.

        Args:
            tokens: int32 `[B, W]`, as for `draft`.
            lengths: int32 `[B]`, likewise; any number of tokens may have been added.
            state: from `start`, the last draft or the last call of this; may be donated.
            chunk: tokens to take in at a time.

        Returns:
            The state for the next draft.
        """
        ...


@dataclass(frozen=True)
class Adaptive:
    """Speculates while it pays: what `speculate=` takes in place of a drafter.

    Drafts are made for `window` steps of the model. If these gave fewer than `break_even` tokens a
    step, mean over the rows that got any, the next `pause` steps are made without drafts, and then
    it is tried again. Each try in a row that fails doubles the pause, up to `longest_pause`; one
    that succeeds resets it and begins the next window.

    A step with drafts costs the same whatever is accepted, so `break_even` is the time of a step
    with drafts divided by that of one without: of the model, its dtype, the batch and the machine.
    `jax_tkg.generation.step_times` measures both. 1 never pauses.

    Attributes:
        drafter: makes the drafts, such as `PromptLookup()`.
        break_even: tokens a step, at least 1.
        window: steps of a try, at least 1.
        pause: steps without drafts after a try that failed, at least 1.
        longest_pause: at least `pause`.

    Raises:
        TypeError: for a drafter that cannot be paused, or a setting of the wrong type.
        ValueError: for a number that is too small.
    """

    drafter: Drafter
    break_even: float = 1.5
    window: int = 4
    pause: int = 16
    longest_pause: int = 256

    def __post_init__(self) -> None:
        """Validates the fields."""
        check_drafter("Adaptive: drafter", self.drafter)
        if real_number("Adaptive: break_even", self.break_even) < 1:
            raise ValueError(
                "Adaptive: a step gives at least one token, so break_even must be at least 1, got "
                f"{self.break_even}."
            )
        if self.can_pause and not isinstance(self.drafter, PausableDrafter):
            raise TypeError(
                f"Adaptive: {type(self.drafter).__name__} cannot be paused; it needs the methods "
                "of jax_tkg.generation.PausableDrafter: those of a Drafter, and "
                "follow(tokens, lengths, state, chunk=) -> state."
            )
        for name in ("window", "pause"):
            whole_number(f"Adaptive: {name}", getattr(self, name), least=1)
        hint = f"The first pause has {self.pause} steps."
        whole_number("Adaptive: longest_pause", self.longest_pause, least=self.pause, hint=hint)

    @property
    def can_pause(self) -> bool:
        """Whether there is anything to measure: a step never gives fewer tokens than one."""
        return self.break_even > 1


class Pace:
    """Whether to speculate now, by the rule of `Adaptive`; told what came of each call.

    Attributes:
        speculates: whether the next call should draft.
    """

    def __init__(self, rule: Adaptive) -> None:
        """Begins with a try."""
        self._rule = rule
        self._next_pause = rule.pause
        self._left = self._row_steps = self._tokens = 0
        self.speculates = True
        self._try()

    def took(self, *, steps: int, row_steps: int, tokens: int) -> None:
        """After a call that was made as `speculates` said.

        Args:
            steps: of the model, in which any row got a token.
            row_steps: the same counted for each row that got one.
            tokens: that the rows got.
        """
        self._left -= steps
        self._row_steps += row_steps
        self._tokens += tokens
        if self._left > 0:
            return
        if not self.speculates:
            self._try()
        elif self._tokens >= self._rule.break_even * self._row_steps:
            self._next_pause = self._rule.pause
            self._try()
        else:
            self.speculates = False
            self._left = self._next_pause
            self._next_pause = min(2 * self._next_pause, self._rule.longest_pause)

    def _try(self) -> None:
        self.speculates = True
        self._left = self._rule.window
        self._row_steps = self._tokens = 0

    def __str__(self) -> str:
        """One line."""
        if not self.speculates:
            return f"pausing for {self._left} more steps"
        return f"drafting, {self._tokens} tokens in {self._row_steps} steps of this window"
