"""What students learn from: trajectories of the averaged networks, made by the sampling loop itself, kept in the run.

    RUN/trajectories/prior-4/0000.safetensors    states n k+1 c h w, label n
    RUN/trajectories/decoder-1/0000.safetensors  z_0 n c h w, x n c h w in float16

Each file is whole or absent, so that a stop loses one at most. All names the teacher and the settings that made it.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ul_runtime.backends import Backend, WrappedBackend
from ul_runtime.files import durable
from ul_runtime.files.safe_tensors import reading_safetensors
from ul_runtime.images.convert import from_uint8
from ul_runtime.loop import Inputs
from ul_runtime.pipeline import Pipeline
from ul_runtime.progress import Tick, progress
from ul_runtime.settings import Overrides, Settings
from ul_train import checkpoint as ckpt
from ul_train.data.imageset import ImageSet, epoch_order
from ul_train.run import Run
from ul_train.stages import own_stages, students_of
from ul_train.students import OWN_SEED, Moments, Student, Trajectories, grid_of, guidance_of
from ul_train.torch_backend import torch_pipeline

_LOG = logging.getLogger(__name__)
_A_FILE, _A_BATCH = 512, 64  # trajectories
Arrays = dict[str, np.ndarray]


def trajectories_of(student: Student, run: Run, images: ImageSet, tick: Tick) -> "Trajectories | ImageSet":
    """What this student learns from; images where that is no trajectories. Made where it is not there. StoppedError."""
    if isinstance(student, Moments):
        return images
    settings, by = student.student_settings, _prior_student(student, run)
    pipeline = _pipeline(student, run)
    of_teacher, latents = _teacher_settings(student, pipeline), pipeline.settings(students=() if by is None else (by,))
    facts = {
        "teachers": {name: ckpt.read_state(run.checkpoints(name)[-1])[1] for name in _teachers(run, by)},
        "begins_with": run.config.init,
        "settings": of_teacher.as_dict(),
        "sampled_by": by,
        "sampled_share": settings.sampled_share if student.place == "decoder" else None,
        "latents": latents.as_dict(),
        "seed": run.config.seed,
        "images": images.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = run.path / "trajectories" / student.name
    durable.make_directory(folder.parent)
    durable.make_directory(folder)
    rows = {first: min(_A_FILE, settings.examples - first) for first in range(0, settings.examples, _A_FILE)}
    parts = {first: _read(_file(folder, first), digest, count) for first, count in rows.items()}
    missing = [first for first, part in parts.items() if part is None]
    if missing:
        number = sum(rows[first] for first in missing)
        _LOG.info(f"student {student.name}: making {number:,} trajectories of its teacher")
    with progress(f"trajectories for {student.name}", len(missing), "files") as done:
        for first in missing:
            ids = np.arange(first, first + rows[first])
            if student.place == "decoder":
                made = _decodes(student, pipeline, of_teacher, latents, images, ids, tick)
            else:
                made = _steps(student, pipeline, of_teacher, ids, tick)
            durable.atomic_write(_file(folder, first), save(made, {"made_from": digest}))
            parts[first] = made
            done(1)
    fingerprint = hashlib.sha256(f"{digest} {settings.examples}".encode()).hexdigest()
    return Trajectories(_joined(list(parts.values())), fingerprint)


def _joined(parts: Sequence[Arrays | None]) -> Arrays:
    """One array of each name."""
    whole = [part for part in parts if part is not None]
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}


def _file(folder: Path, first: int) -> Path:
    return folder / f"{first // _A_FILE:04d}.safetensors"


def _read(path: Path, digest: str, rows: int) -> Arrays | None:
    """None: not there, made from something else, or of another number of trajectories. BadInputError: damaged."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    with reading_safetensors(data, str(path), "remove this file, it is made again"):
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header.get("__metadata__", {}).get("made_from") != digest:
            return None
        arrays = load(data)
        return arrays if all(len(array) == rows for array in arrays.values()) else None


def _teachers(run: Run, by: str | None) -> list[str]:
    """Stages whose checkpoints trajectories depend on; `by`: the student that samples latents."""
    stages = [stage.name for stage in own_stages(run.config) if run.checkpoints(stage.name)]
    return stages if by is None else [*stages, by]


def _prior_student(student: Student, run: Run) -> str | None:
    """The finished student of the prior that samples latents for one of the decoder."""
    if student.place != "decoder":
        return None
    names = (kind.name for kind in students_of(run.config) if kind.place == "prior")
    return next((name for name in names if name in student.frozen and run.is_finished(name)), None)


class _States(WrappedBackend):
    """Keeps the states that the prior's loop goes through."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.states: list[np.ndarray] = []

    def run(self, graph_name: str, inputs: Inputs) -> Inputs:
        """See Backend.run."""
        if not self.states:
            self.states.append(inputs["z"])
        outputs = self.backend.run(graph_name, inputs)
        self.states.append(outputs["z_next"])
        return outputs


def _pipeline(student: Student, run: Run) -> Pipeline:
    """Over the student's teacher."""
    students = {name: 0 for name in student.frozen if name in run.config.students}
    return torch_pipeline(run.manifest(students=students), student.frozen, student.device, student.precision)


def _teacher_settings(student: Student, pipeline: Pipeline) -> Settings:
    """Of its trajectories: the bundle's own sampler in few steps, guided."""
    recipe, grid = student.student_settings, grid_of(student.config, student.name)
    if student.place == "decoder":
        given = Overrides(decoder_steps=recipe.teacher_steps, decoder_sampler=recipe.sampler, decoder_grid=grid)
    else:
        given = Overrides(steps=recipe.teacher_steps, sampler=recipe.sampler, grid=grid)
        if pipeline.num_classes:
            given["guidance"] = guidance_of(student.config, student.name)
    return pipeline.settings(**given)


def _in_batches(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[first : first + _A_BATCH] for first in range(0, len(ids), _A_BATCH)]


def _steps(student: Student, pipeline: Pipeline, settings: Settings, ids: np.ndarray, tick: Tick) -> Arrays:
    """States of the prior's loop at the nodes of the student; all classes in turn, and no label."""
    kept, labels = [], ids % (student.num_classes + 1)
    every = student.student_settings.teacher_steps // student.calls
    for part in _in_batches(ids):
        tick(0)
        recorder = _States(pipeline.backend)
        recorded = Pipeline(pipeline.manifest, recorder)
        recorded.sample_z_0(part, part % (student.num_classes + 1), OWN_SEED + student.config.seed, settings, tick)
        kept.append(np.stack(recorder.states[::every], axis=1))
    return {"states": np.concatenate(kept), "label": labels.astype(np.int64)}


def _decodes(
    student: Student,
    pipeline: Pipeline,
    settings: Settings,
    latents: Settings,
    images: ImageSet,
    ids: np.ndarray,
    tick: Tick,
) -> Arrays:
    """z_0 of images, and a share that the prior (its student, if there is one) samples; the teacher's decodes."""
    seed, num, share = OWN_SEED + student.config.seed, len(images), student.student_settings.sampled_share
    given, decoded = [], []
    for part in _in_batches(ids):
        tick(0)
        chosen = [epoch_order(num, student.config.seed, index // num)[index % num] for index in part.tolist()]
        z_0 = pipeline.encode(from_uint8(images.batch(chosen)[0]), seed=seed, indices=part).z_0
        sampled = np.flatnonzero(part % 1000 < 1000 * share)
        if len(sampled):
            rank = part[sampled] // 1000 * int(1000 * share) + part[sampled] % 1000  # so that all classes occur
            labels = rank % max(1, pipeline.num_classes)
            z_0[sampled] = pipeline.sample_z_0(part[sampled], labels, seed, latents, tick)
        given.append(z_0)
        decoded.append(pipeline.sample_x(z_0, part, seed, settings.decoder, tick).astype(np.float16))
    return {"z_0": np.concatenate(given), "x": np.concatenate(decoded)}
