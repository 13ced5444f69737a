"""The bitrate as a setting: loss_factor is steered until the latent costs the bits that were asked for."""

import math
from dataclasses import dataclass, field

_PROPORTIONAL = 3.0  # e-folds of loss_factor for bits that are one e-fold off
_INTEGRAL = 20.0  # the same, gathered in a whole run
_SMOOTHING = 0.02  # of a run: time constant of the average of the bits
_MOST_OFF = 0.7  # e-folds of bits that are answered; more is answered as this
_LEAST, _MOST = math.log(1.05), math.log(200.0)  # of log loss_factor: at 1 and below the latent empties


@dataclass
class RateControl:
    """Proportional and integral control in logarithms: with off = log(bits / target), from step `start` on

        log loss_factor = log_factor - 3 off,   d log_factor = -20 off d(step / num_steps)

    Bits follow loss_factor a fifth of a run late, and by one to three times its relative change. Before `start` (the
    ramp of the prior's gradient) they are far above where they settle, so nothing is steered, only averaged.
    """

    target: float  # bits a pixel
    num_steps: int
    start: int  # step
    loss_factor: float
    log_factor: float = field(init=False)  # the integral; starts at the log of the first loss_factor
    log_bits: float = math.nan  # average of log bits a pixel so far

    def __post_init__(self) -> None:
        self.log_factor = math.log(self.loss_factor)

    def follow(self, bits_per_pixel: float, step: int) -> None:
        """Take in the bits of a batch, one step after another; what is not finite and positive is passed over."""
        if not (math.isfinite(bits_per_pixel) and bits_per_pixel > 0.0):
            return
        seen = math.log(bits_per_pixel)
        share = min(1.0, 1.0 / (_SMOOTHING * self.num_steps))
        self.log_bits = seen if math.isnan(self.log_bits) else self.log_bits + share * (seen - self.log_bits)
        if step >= self.start:
            off = max(-_MOST_OFF, min(_MOST_OFF, self.log_bits - math.log(self.target)))
            self.log_factor = _bounded(self.log_factor - _INTEGRAL / self.num_steps * off)
            self.loss_factor = math.exp(_bounded(self.log_factor - _PROPORTIONAL * off))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: all that has changed."""
        factors = {"loss_factor": self.loss_factor, "log_factor": self.log_factor}
        return factors if math.isnan(self.log_bits) else factors | {"log_bits": self.log_bits}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`; an empty one leaves all as it is."""
        for name, value in state.items():
            setattr(self, name, value)


def _bounded(log_factor: float) -> float:
    return max(_LEAST, min(_MOST, log_factor))
