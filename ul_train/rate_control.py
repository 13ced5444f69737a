"""The bitrate as a setting: loss_factor is steered until the latent costs the bits that were asked for."""

import math
from dataclasses import dataclass

_GAIN = 6.0  # e-folds of loss_factor in a whole run for bits that stay one e-fold off
_SMOOTHING = 0.02  # of a run: time constant of the average of the bits
_MOST_OFF = 0.7  # e-folds of bits that are answered; more is answered as this


@dataclass
class RateControl:
    """Integral control in logarithms: d log(loss_factor) = -gain log(bits / target) d(step / num_steps), after `start`.

    Bits follow loss_factor late, and by about one to three times its relative change. Before `start` (the ramp of the
    prior's gradient) they are far above where they settle, so nothing is steered, only averaged.
    """

    target: float  # bits a pixel
    num_steps: int
    start: int  # step
    loss_factor: float
    log_bits: float | None = None  # average of log bits a pixel so far

    def follow(self, bits_per_pixel: float, step: int) -> None:
        """Take in the bits of a batch, one step after another; what is not finite and positive is passed over."""
        if not (math.isfinite(bits_per_pixel) and bits_per_pixel > 0.0):
            return
        seen = math.log(bits_per_pixel)
        share = min(1.0, 1.0 / (_SMOOTHING * self.num_steps))
        self.log_bits = seen if self.log_bits is None else self.log_bits + share * (seen - self.log_bits)
        if step >= self.start:
            off = max(-_MOST_OFF, min(_MOST_OFF, self.log_bits - math.log(self.target)))
            self.loss_factor *= math.exp(-_GAIN / self.num_steps * off)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"loss_factor": self.loss_factor} | ({} if self.log_bits is None else {"log_bits": self.log_bits})

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`; an empty one leaves all as it is."""
        self.loss_factor = state.get("loss_factor", self.loss_factor)
        self.log_bits = state.get("log_bits", self.log_bits)
