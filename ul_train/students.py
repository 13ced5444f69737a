"""Students: networks that take few calls, learned from the averaged networks, their teacher.

Trajectory regression (progressive distillation, Salimans & Ho 2022, arXiv 2202.00512; consistency mid-training, arXiv
2509.24526): at the nodes s -> t of the few calls, the student predicts the clean value with which a ddim step from the
teacher's state z_s ends at its state z_t. Of the decoder's one call that is the teacher's image from the same noise.

Moment matching in several steps (Salimans, Mensink, Heek & Hoogeboom 2024, arXiv 2406.04103): see `Moments`.

A student is the same network with other weights, so step graphs, export and engines are those of its teacher. Guidance
is part of what it learned.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ul_runtime import noise
from ul_runtime.diffusion import alpha, diffuse, sigma, sigmoid, x_from_v
from ul_runtime.images.convert import to_uint8
from ul_runtime.images.png import contact_sheet, png_bytes
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, silent
from ul_runtime.samplers import parse_grid
from ul_runtime.settings import Overrides
from ul_train import objective as ul
from ul_train.config import Config, StudentConfig
from ul_train.data.imageset import ImageSet
from ul_train.log import RunLog
from ul_train.model import make_base, make_decoder
from ul_train.stage import Batch, Stage

SAMPLER = "ddim"  # of trajectories' students
_PAIRS = 32  # of a preview: teacher beside student
_NUMBERS = {"prior": 1000, "decoder": 2000}  # of stages, with the calls added
OWN_SEED = 2**63  # of trajectories, with the run's seed added: no image that anybody asks for has this noise


@dataclass(frozen=True)
class Trajectories:
    """What a student learns from: arrays `n ...` by name, and the SHA-256 of what they were made from."""

    arrays: Mapping[str, np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Copies of these rows of each array."""
        return {name: np.asarray(array[ids]) for name, array in self.arrays.items()}


class Student(Stage):
    """One network that learns to take `calls` calls in the place of the prior or the decoder."""

    goes_on = True
    place: ClassVar[str]
    calls: ClassVar[int]

    def begin(self) -> None:
        """As the teacher, and without dropout: what is learned is no data, but another network's answer."""
        for module in self.modules.values():
            module.load_state_dict(self.frozen[self.place].state_dict())
            for layer in module.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0

    @property
    def student_settings(self) -> StudentConfig:
        """Of the recipe."""
        return self.config.students[self.name]

    @property
    def sampled(self) -> dict[str, nn.Module]:
        """The frozen networks, and the averaged student by its name."""
        return {**self.frozen, self.name: self.ema["student"]}

    def preview(self, pipeline: Pipeline, heldout: ImageSet, step: int, log: RunLog, tick: Tick = silent) -> bytes:
        """Images of the teacher, each beside the student's from the same noise; their squared difference is logged.

        `pipeline` has the student.
        """
        names = pipeline.manifest.classes or None
        sides = []
        teacher: Overrides = {"students": ()}
        if self.place == "prior" and self.num_classes:
            teacher["guidance"] = guidance_of(self.config, self.name)
        for overrides in (teacher, Overrides(students=(self.name,))):
            batches = pipeline.generate(_PAIRS, labels=names, tick=tick, **overrides)
            sides.append(np.concatenate([batch.x for batch in batches if batch.x is not None]))
        apart = float(np.square(sides[0].clip(-1.0, 1.0) - sides[1].clip(-1.0, 1.0)).mean())
        log.evaluation(self.name, step, {"teacher_mse": apart})
        pairs = [side for pair in zip(*map(to_uint8, sides), strict=True) for side in pair]
        title = f"step {step}: squared difference to the teacher {apart:.4f}"
        return png_bytes(contact_sheet(pairs, title, ("teacher", self.name) * 4))

    def _at(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See Stage."""


def teacher_nodes(config: Config, name: str) -> np.ndarray:
    """The `calls` + 1 noise levels between which a student of the prior steps: logsnr, float64."""
    ends = config.make_objective().schedule_z.ends
    return parse_grid(grid_of(config, name))(int(name.partition("-")[2]), *ends)


@dataclass(kw_only=True)
class PriorSteps(Batch):
    """A batch of steps s -> t of the teacher: `x` is z_s, `b c h w`."""

    z_t: Tensor
    logsnr_s: Tensor  # b
    logsnr_t: Tensor


class PriorStudent(Student):
    """By trajectory regression: at every node of its grid, the clean value that leads to the teacher's next node."""

    place = "prior"
    places = {"student": "prior"}  # noqa: RUF012
    conditional = True

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"student": make_base(config, num_classes)}

    def batch(self, images: Any, ids: np.ndarray, step: int) -> Batch:
        """Trajectories of the teacher, of each one step, drawn by (seed, stage, step)."""
        assert isinstance(images, Trajectories)
        rows, nodes = images.batch(ids), teacher_nodes(self.config, self.name)
        at = torch.randint(self.calls, (len(ids),), generator=self.generator(step)).numpy()
        row = np.arange(len(ids))
        states, levels = rows["states"], nodes.astype(np.float32)
        return PriorSteps(
            x=self._at(states[row, at]),
            label=self._at(rows["label"]),
            draws=_no_draws(self.device),
            z_t=self._at(states[row, at + 1]),
            logsnr_s=self._at(levels[at]),
            logsnr_t=self._at(levels[at + 1]),
        )

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared difference of the student's clean value to that which leads to the teacher's z_t."""
        assert isinstance(batch, PriorSteps)
        s, t = (level.reshape(-1, 1, 1, 1) for level in (batch.logsnr_s, batch.logsnr_t))
        wanted = clean_value_between(batch.x, batch.z_t, s, t)
        v_pred = self.compute["student"](batch.x, batch.logsnr_s, batch.label).float()
        error = (x_from_v(batch.x, v_pred, s) - wanted).square().mean()
        return error, {"squared_error": error}


def clean_value_between(z_s: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The clean value with which a ddim step from z_s at logsnr s ends at z_t at logsnr t > s."""
    gained = alpha(t) * -torch.expm1(-0.5 * (t - s))
    return (z_t - sigma(t) / sigma(s) * z_s) / gained


@dataclass(kw_only=True)
class DecoderCalls(Batch):
    """A batch of one-call decodes: `x` is the teacher's image from the noise `eps` and z_0, `b c h w` each."""

    z_0: Tensor
    eps: Tensor


class DecoderStudent(Student):
    """By trajectory regression in one step: the teacher's image from the same noise, never the data, which blurs."""

    place = "decoder"
    places = {"student": "decoder"}  # noqa: RUF012
    channels_last = True

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"student": make_decoder(config)}

    def batch(self, images: Any, ids: np.ndarray, step: int) -> Batch:
        """Latents and the teacher's images of them; the noise that both begin with is made again."""
        assert isinstance(images, Trajectories)
        rows = images.batch(ids)
        eps = noise.normals(OWN_SEED + self.config.seed, ids, noise.DECODER_START, self.config.image_shape)
        return DecoderCalls(
            x=self._at(rows["x"].astype(np.float32)),
            label=torch.zeros(len(ids), dtype=torch.int64, device=self.device),
            draws=_no_draws(self.device),
            z_0=self._at(rows["z_0"]),
            eps=self._at(eps),
        )

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared difference of the student's one call to the teacher's image."""
        assert isinstance(batch, DecoderCalls)
        noisiest = torch.full((len(batch.x),), self.objective.schedule_x.ends[0], device=self.device)
        v_pred = self.compute["student"](batch.eps, noisiest, batch.z_0).float()
        error = (x_from_v(batch.eps, v_pred, noisiest.reshape(-1, 1, 1, 1)) - batch.x).square().mean()
        return error, {"squared_error": error}


class Moments(Student):
    """By moment matching: student g, auxiliary network f and teacher f_T begin with the same weights.

        s ~ U(0, 1) on the grid, t = min(s + U(0, 1) / k, 1) noisier;  z_t = alpha_t x + sigma_t eps;  x~ = g(z_t)
        z_s = a draw of q(z_s | z_t, x~), as the ancestral sampler makes it
        even steps: w(s) (|x~ - f(z_s)|^2 + |f_T(z_s) - f(z_s)|^2) for f;   odd: w(s) <x~, f(z_s) - f_T(z_s)> for g

    The teacher is guided. Sampled by `ancestral`, with noise in each step.
    """

    place = "prior"
    places = {"student": "prior"}  # noqa: RUF012
    conditional = True
    betas = (0.0, 0.99)

    @staticmethod
    def networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"student": make_base(config, num_classes), "auxiliary": make_base(config, num_classes)}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """That of the auxiliary network in even steps, that of the student in odd ones."""
        draws, z_clean = batch.draws, self.frozen_latent(batch)
        s = draws.t_z
        t = (s + draws.t_x / self.calls).clamp(max=1.0)
        logsnr_s, logsnr_t = self._logsnr(s), self._logsnr(t)
        level_s, level_t = (level.reshape(-1, 1, 1, 1) for level in (logsnr_s, logsnr_t))
        z_t = diffuse(z_clean, draws.eps_prior, level_t)
        for_student = step % 2 == 1
        with torch.set_grad_enabled(for_student):
            x = x_from_v(z_t, self.compute["student"](z_t, logsnr_t, batch.label).float(), level_t)
        delta = level_s - level_t
        ratio = sigma(level_s) / sigma(level_t)
        kept = -torch.expm1(-delta)
        z_s = ratio * torch.exp(-0.5 * delta) * z_t + alpha(level_s) * kept * x
        z_s = (z_s + sigma(level_s) * kept.sqrt() * draws.eps_z).detach()
        weight = sigmoid(self.objective.base_bias - level_s)
        with torch.no_grad():
            teacher = self._guided(z_s, logsnr_s, batch.label)
        with torch.set_grad_enabled(not for_student):
            auxiliary = x_from_v(z_s, self.compute["auxiliary"](z_s, logsnr_s, batch.label).float(), level_s)
        if for_student:
            loss = (weight * x * (auxiliary - teacher).detach()).mean()
            return loss, {"moments": (auxiliary - teacher).square().mean().detach()}
        error = (auxiliary - x.detach()).square() + (auxiliary - teacher).square()
        return (weight * error).mean(), {"auxiliary_error": (auxiliary - x.detach()).square().mean().detach()}

    def _logsnr(self, t: Tensor) -> Tensor:
        """Of times in [0, 1] along the sampling grid, 1 the noisiest."""
        ends = self.objective.schedule_z.ends
        nodes = parse_grid(grid_of(self.config, self.name))(1000, *ends)
        levels = np.interp(1.0 - t.cpu().numpy(), np.linspace(0.0, 1.0, len(nodes)), nodes)
        return torch.from_numpy(levels.astype(np.float32)).to(self.device)

    def _guided(self, z: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        """The teacher's clean value with its guidance."""
        level = logsnr.reshape(-1, 1, 1, 1)
        pred = x_from_v(z, self.frozen["prior"](z, logsnr, label).float(), level)
        weight = guidance_of(self.config, self.name)
        if weight == 1.0 or not self.num_classes:
            return pred
        no_label = x_from_v(z, self.frozen["prior"](z, logsnr, torch.full_like(label, self.num_classes)).float(), level)
        low, high = self.config.sampling.guidance_interval
        inside = ((logsnr >= low) & (logsnr <= high)).reshape(-1, 1, 1, 1)
        return torch.where(inside, weight * pred + (1.0 - weight) * no_label, pred)


def guidance_of(config: Config, name: str) -> float:
    """The weight that a student's teacher is guided with."""
    given = config.students[name].guidance
    return config.sampling.guidance if given is None else given


def grid_of(config: Config, name: str) -> str:
    """The time grid of a student and of its teacher's trajectories."""
    sampling = config.sampling
    return config.students[name].grid or (sampling.decoder_grid if name.startswith("decoder") else sampling.grid)


def sampler_of(config: Config, name: str) -> str:
    """The sampler that a student is made for."""
    return "ancestral" if config.students[name].method == "moments" else SAMPLER


@cache
def _kind(name: str, base: type[Student], needs: str) -> type[Student]:
    place, calls = name.split("-")
    fields = {"name": name, "calls": int(calls), "needs": needs, "number": _NUMBERS[place] + int(calls)}
    return type(f"{base.__name__}{calls}", (base,), {**fields, "__doc__": base.__doc__})


def kind_of(name: str, method: str, last: Mapping[str, str]) -> type[Student]:
    """The stage that trains a student such as prior-4; `last`: the stage that each place's network is of."""
    place = name.partition("-")[0]
    base: type[Student] = DecoderStudent if place == "decoder" else Moments if method == "moments" else PriorStudent
    return _kind(name, base, last[place])


def _no_draws(device: torch.device) -> ul.Draws:
    nothing = torch.zeros(0, device=device)
    return ul.Draws(nothing, nothing, nothing, nothing, nothing)
