"""What `tune` may try: the [tune] table of a recipe."""

from typing import Any, Self

from pydantic import Field, model_validator

from bundle.schema import Strict

Number = int | float


class Dimension(Strict):
    """The values that one key may take: `choices`, or a range from `low` to `high`, both included.

    A range of two integers gives integers. `log` draws from the logarithm, `step` only whole steps above `low`.
    """

    choices: tuple[Any, ...] = Field(default=(), description="any values, lists too")
    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.choices:
            if self.model_fields_set != {"choices"}:
                raise ValueError("give choices, or low and high, not both")
        elif self.low is None or self.high is None:
            raise ValueError("give choices, or low and high")
        elif not self.low < self.high:
            raise ValueError(f"low = {self.low} is not less than high = {self.high}")
        elif self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs low above 0, and no step")
        elif self.integral and isinstance(self.step, float):
            raise ValueError(f"step = {self.step} between integers: give an integer, or low and high with a point")
        return self

    @property
    def integral(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the two ends of the range."""
        return self.choices or (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Whether the value is a choice, or in the range and on one of its steps."""
        if self.choices:
            return value in self.choices
        if self.low is None or self.high is None or not isinstance(value, int if self.integral else Number):
            return False
        steps = (value - self.low) / (self.step or 1)
        return self.low <= value <= self.high and (self.step is None or abs(steps - round(steps)) < 1e-8)


class Tune(Strict):
    """How many trials, and over which keys of the recipe: `"fit.learning_rate" = { low = 0.005, high = 0.1 }`."""

    trials: int = Field(default=30, ge=1, description="trials that end, those that are stopped early included")
    prune: bool = Field(default=True, description="stop a trial that is behind the median of those before it")
    space: dict[str, Dimension] = Field(min_length=1)
