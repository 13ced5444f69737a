"""The training loop of every stage: seeded by (seed, step), guarded against non-finite updates, resumable."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError
from ul_runtime.progress import Tick, silent
from ul_train import checkpoint as ckpt
from ul_train.config import StageConfig, config_hash
from ul_train.data.imageset import ImageSet, sample_ids
from ul_train.log import RunLog
from ul_train.stage import Stage, ema_decay_at, update_ema
from ul_train.students import Trajectories
from ul_train.torch_backend import follow_load

Hook: TypeAlias = Callable[[int], None]  # given the steps done
MOST_BAD_STEPS = 3  # non-finite steps in a row before training stops


def learning_rate_at(step: int, settings: StageConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from learning_rate to its final share at the last step."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    done = min(1.0, step / settings.steps)
    decay = settings.final_learning_rate + (1.0 - settings.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * warm * decay


def _nothing(step: int) -> None:
    """The hook of training that nobody looks into."""


@dataclass
class Trainer:
    """One stage on one data set, writing into one run directory."""

    stage: Stage
    images: ImageSet | Trajectories
    run: Path
    log: RunLog
    step: int = 0
    evaluated: bool = True  # False: the evaluation of this step is due
    counters: dict[str, int] = field(default_factory=lambda: {"skipped": 0, "skipped_in_a_row": 0})

    def __post_init__(self) -> None:
        settings = self.stage.settings
        self.parameters = self.stage.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=self.stage.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def train(
        self, evaluate: Hook = _nothing, check: Hook = _nothing, check_every: int | None = None, tick: Tick = silent
    ) -> None:
        """Train to the last step, which is a tick each. StoppedError (75) of `tick`, with a checkpoint of that step.

        `evaluate` may raise StoppedError too; `check` is called once the checkpoint of its step is saved, first
        at step 1.
        NonFiniteError (76) after three bad steps in a row.
        """
        settings, run = self.stage.settings, self.stage.config.run
        with self.log.stage(self.stage.name, settings.steps, settings.batch_size, self.step, len(self.images)):
            if self._stops_in(evaluate):
                raise self._stopped()
            while self.step < settings.steps:
                figures = self.train_step()
                self.step += 1
                self.log.step(self.stage.name, self.step, figures)
                last = self.step == settings.steps
                self.evaluated = not last and self.step % run.eval_every > 0
                stopped = self._stops_in(evaluate, silent if last else tick)
                checking = check_every is not None and (self.step == 1 or self.step % check_every == 0)
                if last or stopped or checking or self.step % run.checkpoint_every == 0:
                    self.save()
                if stopped and not last:
                    raise self._stopped()
                if checking:
                    check(self.step)

    def _stops_in(self, evaluate: Hook, tick: Tick = silent) -> bool:
        """Evaluate this step if that is due; whether a stop came before or in the middle of it."""
        try:
            tick(1)
            if not self.evaluated:
                evaluate(self.step)
                self.evaluated = True
        except StoppedError:
            return True
        return False

    def _stopped(self) -> StoppedError:
        return StoppedError(
            f"stopped at step {self.step} of {self.stage.settings.steps} of stage {self.stage.name}, saved; "
            f"go on with ul-train {self.run} --resume"
        )

    def train_step(self) -> dict[str, float]:
        """One optimiser step, or none when loss or gradient is not finite: the weights never take such an update."""
        settings, device, threads = self.stage.settings, self.stage.device, follow_load()
        ids = sample_ids(len(self.images), self.stage.config.seed, self.step, settings.batch_size)
        batch = self.stage.batch(self.images, ids, self.step)
        torch.manual_seed(self._dropout_seed())
        figures: dict[str, float] = {}
        for index in range(settings.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.stage.precision == "bf16"):
                loss, part = self.stage.loss(batch.part(index, settings.accumulate), self.step)
            (loss / settings.accumulate).backward()
            for name, value in {**part, "loss": loss}.items():
                figures[name] = figures.get(name, 0.0) + value.item() / settings.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip).item()
        figures["gradient_norm"] = norm
        figures["threads"] = threads
        figures["learning_rate"] = learning_rate_at(self.step, settings)
        if math.isfinite(figures["loss"]) and math.isfinite(norm):
            self._update(figures["learning_rate"])
        else:
            self._skip(figures["loss"], norm)
        if (control := self.stage.rate_control) is not None:
            figures["loss_factor"] = control.loss_factor
            control.follow(figures["bits_per_pixel"], self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _dropout_seed(self) -> int:
        """The seed next to that of the step's noise: the same one would tie the dropped values to the noise."""
        return self.stage.generator(self.step).initial_seed() ^ 1

    def _update(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.counters["skipped_in_a_row"] = 0
        decay = ema_decay_at(self.step, self.stage.settings.ema_decay)
        for name, module in self.stage.modules.items():
            update_ema(self.stage.ema[name], module, decay)

    def _skip(self, loss: float, norm: float) -> None:
        self.counters["skipped"] += 1
        self.counters["skipped_in_a_row"] += 1
        where = f"stage {self.stage.name}, step {self.step}"
        if self.counters["skipped_in_a_row"] >= MOST_BAD_STEPS:
            raise NonFiniteError(
                f"{where}: loss {loss}, gradient norm {norm}, {MOST_BAD_STEPS} steps in a row; weights unchanged; "
                "lower the learning rate, or use --set run.precision=fp32, and start again"
            )
        skipped = self.counters["skipped"]
        text = f"{where}: loss {loss}, gradient norm {norm}; this step was skipped, {skipped} so far"
        self.log.warn(text, self.stage.name, self.step + 1)

    def save(self) -> None:
        """Commit a checkpoint and remove those that the policy does not keep."""
        config, folder = self.stage.config, self.run / "checkpoints"
        state = ckpt.State(
            stage=self.stage.name,
            step=self.step,
            seed=config.seed,
            config_sha256=config_hash(config),
            data_fingerprint=self.images.fingerprint,
            counters=self.counters,
            rate_control=self.stage.rate_control.state() if self.stage.rate_control else {},
            encoder_checkpoint=self.stage.encoder_checkpoint,
            log_sums=self.log.sums,
        )
        optimizer = ckpt.optimizer_tensors(self.optimizer, list(self.parameters))
        weights, ema = ckpt.tensors_of(self.stage.modules), ckpt.tensors_of(self.stage.ema)
        ckpt.save_checkpoint(folder, state, weights, ema, optimizer)
        ckpt.prune(folder, self.stage.name, config.run.keep_checkpoints)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of this stage. BadInputError: damaged, or the base of another encoder."""
        saved = ckpt.load_checkpoint(path)
        if saved.state.encoder_checkpoint != self.stage.encoder_checkpoint:
            raise BadInputError(
                f"{path}: learned the latents of another encoder than the run's last one of stage {self.stage.needs}; "
                f"remove the checkpoints {saved.state.stage}-* to train it again"
            )
        ckpt.load_tensors(self.stage.modules, saved.weights, str(path))
        ckpt.load_tensors(self.stage.ema, saved.ema, str(path))
        ckpt.load_optimizer(self.optimizer, list(self.parameters), saved.optimizer)
        if self.stage.rate_control is not None:
            self.stage.rate_control.restore(saved.state.rate_control)
        self.step, self.counters = saved.state.step, dict(saved.state.counters)
        self.log.sums = {name: (total, number) for name, (total, number) in saved.state.log_sums.items()}
