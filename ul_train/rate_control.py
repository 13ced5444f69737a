"""The bitrate as a setting: loss_factor is steered until the latent costs the bits that were asked for."""

import math
from dataclasses import dataclass, field

_PROPORTIONAL = 3.0  # e-folds of loss_factor for bits that are one e-fold off
_INTEGRAL = 20.0  # the same, gathered in a whole run
_SMOOTHING = 0.02  # of a run: time constant of the average of the bits
_MOST_OFF = 0.7  # e-folds of bits that are answered; more is answered as this
_MOST = 200.0  # of loss_factor
LEAST = {"diffusion": 1.05, "mse": 0.01}  # at 1 and below a diffusion decoder leaves the latent empty
MISSED = 0.1  # a rate further than this from its target has missed it


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
    least: float = LEAST["diffusion"]  # that loss_factor may become
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
            self.log_factor = self._bounded(self.log_factor - _INTEGRAL / self.num_steps * off)
            self.loss_factor = math.exp(self._bounded(self.log_factor - _PROPORTIONAL * off))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: all that has changed."""
        factors = {"loss_factor": self.loss_factor, "log_factor": self.log_factor}
        return factors if math.isnan(self.log_bits) else factors | {"log_bits": self.log_bits}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`; an empty one leaves all as it is."""
        for name, value in state.items():
            setattr(self, name, value)

    def _bounded(self, log_factor: float) -> float:
        return max(math.log(self.least), min(math.log(_MOST), log_factor))


def missed(bits_per_pixel: float, target: float | None) -> str | None:
    """What to say of a rate that missed its target; None if it did not, or had none."""
    if target is None or abs(bits_per_pixel / target - 1.0) <= MISSED:
        return None
    return (
        f"the latent costs {bits_per_pixel:.3f} bits/pixel, the target was {target:g}: train longer, or give another "
        "target; the log has loss_factor, which may have come to its end"
    )
