"""What ul-export does: averaged weights to ONNX, the proof against torch, one hashed bundle."""

import copy
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from ul_export.onnx_graphs import _AGAIN, _HALF, _INT8, _TRANSPOSED, OPSETS, export_graphs, parameters, step_graphs
from ul_export.onnx_model import (
    check_graph,
    half_tensor,
    join_weights,
    split_weights,
)
from ul_export.precision.graphs import in_memory
from ul_export.precision.lower import KINDS, Kind, as_computed, by_channel
from ul_export.precision.reduce import REPORT, reduced_bundle, with_their_weights
from ul_export.precision.search import CALIBRATION_IMAGES, first_difference
from ul_export.verify import (
    BATCH_SIZES,
    FP32,
    PROOF_BATCHES,
    REDUCED,
    Proof,
    Tolerances,
    image_psnr_db,
    require,
    verify,
)
from ul_runtime import durable
from ul_runtime.backends import NO_BF16
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle, write_bundle
from ul_runtime.errors import BadInputError, NonFiniteError, UsageError
from ul_runtime.images import from_uint8
from ul_runtime.machine import versions
from ul_runtime.manifest import GRAPH_NAMES, MANIFEST_NAME, BundleInfo, Manifest, Provenance
from ul_runtime.pipeline import Pipeline
from ul_train.data.prepare import open_splits
from ul_train.run import Run
from ul_train.torch_backend import torch_pipeline

LEAST_PSNR_DB = 35.0  # of images by rounded against those by exact weights, from the same noise
NUM_IMAGES = 16


def rounded(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the networks, every floating-point weight the float16 next to it. BadInputError: one is too large."""
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    for name, network in copies.items():
        for key, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            half = value.half()
            if not torch.isfinite(half).all():
                largest = value.abs().max().item()
                raise BadInputError(
                    f"weight {name}.{key} is up to {largest:.4g}, float16 ends at 65504; export with --weights fp32"
                )
            value.copy_(half)
    return copies


def effect_of_rounding(exact: Pipeline, by_rounded: Pipeline) -> dict[str, Any]:
    """The same pictures by both, from the same noise: largest difference of a pixel in [-1, 1], and their PSNR.

    BadInputError below LEAST_PSNR_DB.
    """
    (expected,), (given,) = (list(p.generate(NUM_IMAGES, batch_size=NUM_IMAGES)) for p in (exact, by_rounded))
    psnr = image_psnr_db(expected.x, given.x)
    if not psnr >= LEAST_PSNR_DB:
        raise BadInputError(
            f"images by weights rounded to float16 are at {psnr:.1f} dB of those by exact weights, at least "
            f"{LEAST_PSNR_DB:g} is asked for; no bundle was written: export with --weights fp32"
        )
    largest = float(np.abs(expected.x - given.x).max())
    return {"num_images": NUM_IMAGES, "image_psnr_db": min(psnr, 200.0), "largest_pixel_difference": largest}


def torch_reference(described: BundleInfo, networks: dict[str, nn.Module]) -> Pipeline:
    """The sampling path by torch in float32 on the processor, which every proof is against."""
    cpu = torch.device("cpu")
    return torch_pipeline(described, networks["encoder"], networks["prior"], networks["decoder"], cpu, "fp32")


@dataclass(frozen=True)
class Trial:
    """Files that may become the bundle `out`, and the networks that they have to equal."""

    out: Path
    described: BundleInfo
    files: dict[str, bytes]
    networks: dict[str, nn.Module]
    threads: int | None = None

    def prove(
        self, tolerances: Tolerances = FP32, backend: str = "ort-cpu", batch_sizes: Sequence[int] = BATCH_SIZES
    ) -> tuple[Proof, str]:
        """(proof, name of the backend) of the files as a bundle on the disk of `out`, opened as a user's is.

        ort-cpu computes in what it takes for the bundle, openvino in bfloat16.
        """
        reference = torch_reference(self.described, self.networks)
        with durable.temporary_directory_beside(self.out) as temporary:
            bundle = write_bundle(temporary / "trial", self.described, self.files)
            for graph in self.described.graphs.values():
                for file in {graph.file, graph.float32_file or graph.file}:
                    check_graph(temporary / "trial" / file)
            precision = "bf16" if backend == "openvino" else None
            opened = open_backend(backend, bundle, precision=precision, threads=self.threads)
            return verify(reference, opened, tolerances=tolerances, batch_sizes=batch_sizes), opened.name

    def by_openvino(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The proof of a bundle in bf16 on OpenVINO, which computes in it natively where the processor does.

        {"openvino": its figures} where it holds; else nothing, said why: `auto` takes OpenVINO only where it was
        proved.
        """
        if find_spec("openvino") is None:
            say("bf16: not proved on OpenVINO, which is not installed")
            return {}
        from ul_runtime.backends.openvino import has_bf16

        if not has_bf16():
            say(f"bf16: not proved on OpenVINO: {NO_BF16}")
            return {}
        proof, _ = self.prove(REDUCED["bf16"], "openvino")
        if proof.failures:
            say(f"bf16: does not hold on OpenVINO, which auto will not take: {proof.failures[0]}")
            return {}
        return {"openvino": {"versions": versions(["openvino"]), **proof.figures}}

    def first_difference(self, proof: Proof) -> str:
        """Where the worst call of a proof that failed parts from torch: module and node."""
        graph, described = proof.worst_graph, self.described
        modules = {each.name: each.module for each in step_graphs(self.networks, described.image, described.latent)}
        entry = described.graphs[graph]
        model = join_weights(self.files[entry.file], self.files[entry.weights], entry.weights)
        return first_difference(modules[graph], model, described, graph, proof.worst_calls[graph][0].inputs)


WEIGHTS = ("fp32", "fp16")
_DEFAULT_OPSET = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # convolutions take bfloat16 from opset 22 on


@dataclass(frozen=True)
class ExportOptions:
    """The options of ul-export. `weights`: what they are stored in where graphs compute in float32.

    `calibrate`: source of images; None = the run's own. `opset` None = the precision's.
    """

    opset: int | None = None
    precision: Kind | Literal["fp32"] = "fp32"
    weights: str = "fp32"
    calibrate: str | None = None
    cache: Path = Path("cache")
    threads: int | None = None
    overwrite: bool = False

    def check(self) -> int:
        """The opset. UsageError for what cannot be."""
        opset = _DEFAULT_OPSET[self.precision] if self.opset is None else self.opset
        if opset not in OPSETS:
            raise UsageError(f"--opset is {opset}; expected {', '.join(map(str, OPSETS[:-1]))} or {OPSETS[-1]}")
        if self.precision == "bf16" and opset < _DEFAULT_OPSET["bf16"]:
            raise UsageError(f"--opset is {opset}; convolutions take bfloat16 from opset {_DEFAULT_OPSET['bf16']} on")
        if self.weights not in WEIGHTS:
            raise UsageError(f"--weights {self.weights}: expected {' or '.join(WEIGHTS)}")
        if self.precision != "fp32" and self.weights != "fp32":
            raise UsageError(f"--weights {self.weights}: --{self.precision} says itself how weights are stored")
        if self.precision == "fp32" and self.calibrate is not None:
            raise UsageError("--calibrate is for --fp16, --bf16 and --int8")
        return opset


def export_bundle(run: Path, out: Path, options: ExportOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Export the run and verify; the bundle at `out` is whole or absent. Returns what to print.

    BadInputError: a stage is missing, or a graph does not equal torch, or float32 in a lower precision.
    NonFiniteError: a weight is NaN or Inf. UsageError: `out` is in the way. OutputError: it cannot be written.
    """
    opset, weights, threads = options.check(), options.weights, options.threads
    _check_free(out, options.overwrite)
    started = time.monotonic()
    trained = Run.open(run).finished()
    config, networks = trained.run.config, trained.networks
    check_finite(run, networks)
    x, which = (
        (None, {})
        if options.precision == "fp32"
        else calibration_images(trained.run, options.calibrate, options.cache, say)
    )
    if threads:
        torch.set_num_threads(threads)
    described = trained.manifest(opset)
    steps = config.base_stage.steps
    say(f"exporting {config.name} (base step {trained.step} of {steps}, averaged weights) at opset {opset}")
    parity: dict[str, Any] = {"reference": f"torch {torch.__version__}"}
    if weights == "fp16":
        exact, networks = networks, rounded(networks)
        described = described.model_copy(update={"provenance": rounded_provenance(described)})
        say("measuring what rounding the weights to float16 does to pictures")
        parity["rounded_weights"] = effect_of_rounding(
            torch_reference(described, exact), torch_reference(described, networks)
        )
    files = export_graphs(networks, described, opset, weights == "fp16")
    batches = ", ".join(map(str, BATCH_SIZES))
    say(f"comparing with torch along the whole sampling path, at batch sizes {batches}")
    trial = Trial(out, described, files, networks, threads)
    proof, backend = trial.prove(batch_sizes=PROOF_BATCHES)
    require(proof, str(run), lambda: trial.first_difference(proof))
    parity |= {"backend": backend, **proof.figures}
    by_rounding = parity.get("rounded_weights")
    reduced: dict[str, Any] = {}
    if x is not None and options.precision != "fp32":
        described, files, reduced = reduced_bundle(described, files, options.precision, x, threads, say)
        lowered = replace(trial, described=described, files=files)
        on_this_machine, _ = lowered.prove(REDUCED[options.precision])
        require(on_this_machine, str(run))
        parity[options.precision] = reduced | {"on_this_machine": on_this_machine.figures, "calibration": which}
        if options.precision == "bf16":
            parity["bf16"] |= lowered.by_openvino(say)
        say(f"report: {REPORT}.html in the bundle")
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=options.overwrite)
    return {
        "bundle": str(out),
        "hash": final.hash,
        "megabytes": sum(entry.size for entry in final.manifest.files.values()) / 1e6,
        "opset": opset,
        **reduced_in_short(reduced),
        **proof_in_short(proof),
        **({"rounded_weights_psnr_db": by_rounding["image_psnr_db"]} if by_rounding else {}),
        "seconds": time.monotonic() - started,
    }


def check_export(run: Path, threads: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Prove the float32 export of a run as it stands, before its stages are finished; writes nothing that lasts.

    Returns what to print. Errors are those of `export_bundle`.
    """
    started = time.monotonic()
    newest = Run.open(run).newest()
    networks = newest.networks
    check_finite(run, networks)
    if threads:
        torch.set_num_threads(threads)
    opset = _DEFAULT_OPSET["fp32"]
    described = newest.manifest(opset)
    where = f"{newest.stage} step {newest.step}"
    say(f"checking the export of {described.name} ({where}, averaged weights) at opset {opset}")
    files = export_graphs(networks, described, opset)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder) / "bundle", described, files, networks, threads)
        proof, _ = trial.prove()
    require(proof, str(run), lambda: trial.first_difference(proof))
    return {**proof_in_short(proof), "seconds": time.monotonic() - started}


def proof_in_short(proof: Proof) -> dict[str, Any]:
    """Of the proof in float32, what ul-export prints."""
    paths = [figures for figures in proof.figures.values() if "z_0" in figures]
    return {
        "worst_graph_difference": proof.worst_graph_difference,
        "worst_z_0_difference": max(figures["z_0"] for figures in paths),
        "worst_image_psnr_db": min(figures["image_psnr_db"] for figures in paths),
    }


def calibration_images(
    run: Run, calibrate: str | None, cache: Path, say: Callable[[str], None]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(images `b c h w` in [-1, 1] for the encoder's ranges and proof, which they are). BadInputError, UsageError.

    The first held-out ones of the run, or the first of the source `calibrate`: all of these may be used.
    """
    source, heldout = (run.info.data, run.info.heldout) if calibrate is None else (calibrate, None)
    try:
        splits = open_splits(run.config.image, source, heldout, cache)
    except BadInputError as error:
        if calibrate is not None:
            raise
        raise BadInputError(
            f"{run.path}: {error}; the ranges of the encoder need images, give others by --calibrate"
        ) from None
    parts = [splits.heldout] if calibrate is None else [splits.heldout, splits.train]
    pixels = np.concatenate([part.batch(np.arange(min(CALIBRATION_IMAGES, len(part))))[0] for part in parts])
    x = from_uint8(pixels[:CALIBRATION_IMAGES])
    which = "the run's held-out images" if calibrate is None else "--calibrate"
    if len(x) < CALIBRATION_IMAGES:
        few = f"the encoder is proved on only {len(x)} images ({which})"
        say(f"{few}; {CALIBRATION_IMAGES} show its range better")
    return x, {"images": len(x), "source": which, "data_fingerprint": parts[0].fingerprint}


def reduced_in_short(reduced: dict[str, Any]) -> dict[str, Any]:
    """Of the proof in a lower precision, what ul-export prints."""
    if not reduced:
        return {}
    paths = [each for each in reduced.values() if isinstance(each, dict) and "z_0" in each]
    pinned, shares = reduced.get("pinned"), reduced.get("flops_share")  # bundles of older versions have neither
    return {
        **({"pinned_nodes": sum(map(len, pinned.values()))} if pinned is not None else {}),
        **({"least_share_of_flops": min(shares.values())} if shares else {}),
        "lowered_z_0_difference": max(each["z_0"] for each in paths),
        "lowered_image_psnr_db": min(each["image_psnr_db"] for each in paths),
    }


def rounded_provenance(described: BundleInfo) -> Provenance:
    """Its own, and that weights are rounded."""
    return described.provenance.model_copy(update={"weights": f"{described.provenance.weights}, rounded to float16"})


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse before any work what `write_bundle` would refuse after it."""
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"{out}: exists already; choose another --out, or --overwrite")
    if os.path.lexists(out) and not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out}: exists and is not a bundle; choose another --out")
    durable.check_output_directory(Path(os.path.abspath(out)).parent, ["*"])


def check_finite(run: Path, networks: dict[str, nn.Module]) -> None:
    """NonFiniteError with the name of a weight that is NaN or Inf."""
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{run}: weight {name}.{key} is not finite; remove the newest checkpoint of its stage, "
                    "go on with ul-train --resume, and export again"
                )


def replace_weights(model: ModelProto, given: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> None:
    """Put these parameters into the initializers named after them, in the precision that they have there.

    `constants`: of initializers that lie outside of the graph and are no parameters. BadInputError: another number of
    values, or not the same parameters on both sides: none may keep its old values.
    """
    used: set[str] = set()
    for tensor in model.graph.initializer:
        half, int8 = _HALF.fullmatch(tensor.name), _INT8.fullmatch(tensor.name)
        stem = _AGAIN.sub("", (half or int8 or {"weight": tensor.name})["weight"])
        source = stem.removesuffix(_TRANSPOSED)
        if source not in given:
            if "." in source:  # a parameter's name, which no constant has
                raise BadInputError(f"the bundle has a weight {source} and the run has not; export without --update")
            if tensor.external_data:
                tensor.CopyFrom(numpy_helper.from_array(constants[tensor.name], tensor.name))
            continue
        used.add(source)
        value = given[source].T if stem.endswith(_TRANSPOSED) else given[source]
        if int8 is not None:
            values, scale = by_channel(value, int(int8["axis"]))
            value = values if int8["part"] == "int8" else scale
        if value.size != int(np.prod(tensor.dims)):
            raise BadInputError(
                f"{source} has {value.size} values, the bundle {list(tensor.dims)}; export without --update"
            )
        new = numpy_helper.from_array(np.ascontiguousarray(value.reshape(tuple(tensor.dims))), tensor.name)
        tensor.CopyFrom(half_tensor(new, tensor.data_type) if half else new)
    if left := sorted(given.keys() - used):
        raise BadInputError(
            f"the graph does not have {len(left)} weights of the run, such as {left[0]}; export without --update"
        )


_SAME = ("image", "latent", "classes", "logsnr_z", "logsnr_x")  # of bundles whose graphs are the same


def _kind(bundle: Bundle) -> Kind | None:
    """What its networks compute in, None for float32."""
    precision = bundle.manifest.graphs["prior_step"].precision
    return next((kind for kind in KINDS if kind == precision), None)


def _rounded_weights(bundle: Bundle) -> bool:
    """Whether weights are stored in half precision and computed with in float32."""
    names = (name for graph in GRAPH_NAMES for name in bundle.initializers(graph))
    return _kind(bundle) is None and any(name.endswith(".half") for name in names)


def update_bundle(
    run: Path,
    old: Path,
    out: Path,
    threads: int | None,
    say: Callable[[str], None],
    *,
    calibrate: str | None = None,
    cache: Path = Path("cache"),
) -> dict[str, Any]:
    """Write the run's weights with the graphs of the bundle `old` to `out`, which may be `old`; what to print.

    The proof is that of an export, of the encoder in a lower precision on images of the run or of `calibrate`; pins and
    scales stay as they were found for the old weights. BadInputError: other networks, or the proof fails.
    NonFiniteError: a weight is NaN or Inf. UsageError: `calibrate` for a bundle in float32.
    """
    started = time.monotonic()
    bundle = Bundle.open(old)
    manifest, kind = bundle.manifest, _kind(bundle)
    trained = Run.open(run).finished()
    networks = trained.networks
    check_finite(run, networks)
    described = trained.manifest(manifest.graphs["encoder"].opset)
    _check_same(run, old, described, manifest)
    if kind is None and calibrate is not None:
        raise UsageError(f"--calibrate is for bundles in a lower precision; {old} is in float32")
    x = None if kind is None else calibration_images(trained.run, calibrate, cache, say)[0]
    described = described.model_copy(update={"graphs": manifest.graphs})
    if _rounded_weights(bundle):
        described = described.model_copy(update={"provenance": rounded_provenance(described)})
        networks = rounded(networks)
    say(f"base step {trained.step} of {run} into the graphs of {old} ({kind or 'fp32'})")
    files = _files(bundle, described, networks)
    say("comparing with torch along the whole sampling path")
    trial = Trial(out, described, files, networks, threads)
    proof, backend = trial.prove(batch_sizes=PROOF_BATCHES) if kind is None else trial.prove(REDUCED[kind])
    require(proof, str(run))
    figures: dict[str, Any] = proof.figures
    shown = proof_in_short(proof)
    if kind is not None:
        assert x is not None
        typed = _prove_typed(described, files, networks, kind, threads, str(run), x)
        of_old: Any = manifest.parity.get(kind, {})  # older versions kept neither
        kept = {name: of_old[name] for name in ("pinned", "flops_share") if name in of_old}
        shown = reduced_in_short(kept | typed.figures)
        say(f"{REPORT}.html is left out: it is of the old weights")
        figures = {kind: kept | typed.figures | {"on_this_machine": proof.figures}}
        if kind == "bf16":
            figures["bf16"] |= trial.by_openvino(say)
    parity = {"reference": f"torch {torch.__version__}", "backend": backend, "updated_from": bundle.hash} | figures
    final = write_bundle(out, described.model_copy(update={"parity": parity}), files, overwrite=out == old)
    return {
        "bundle": str(out),
        "hash": final.hash,
        "precision": kind or "fp32",
        **shown,
        "seconds": time.monotonic() - started,
    }


def _check_same(run: Path, old: Path, described: BundleInfo, manifest: Manifest) -> None:
    """BadInputError unless both have the same formats and networks; by recipes, which older bundles lack."""
    pairs = {part: (getattr(described, part), getattr(manifest, part)) for part in _SAME}
    for part in ("encoder", "decoder", "base") if manifest.recipe else ():
        pairs[part] = _without_dropout(described.recipe.get(part)), _without_dropout(manifest.recipe.get(part))
    for part, (ours, its) in pairs.items():
        if ours != its:
            raise BadInputError(f"{run}: its {part} is {ours}, that of {old} {its}; export without --update")


def _without_dropout(part: Any) -> Any:
    """A network of a recipe without what only training knows."""
    return {name: value for name, value in part.items() if name != "dropout"} if isinstance(part, dict) else part


def _files(old: Bundle, info: BundleInfo, networks: dict[str, nn.Module]) -> dict[str, bytes]:
    """The bundle's graphs over new weights; its report is of the old ones, and stays behind."""
    files = {}
    modules = {graph.name: graph.module for graph in step_graphs(networks, info.image, info.latent)}
    for name, entry in info.graphs.items():
        given, constants = parameters(modules[name]), old.initializers(name)
        for file in (entry.file, entry.float32_file):
            if file is not None:
                model = onnx.load_model_from_string(old.read(file))
                replace_weights(model, given, constants)
                files[file], files[entry.weights] = split_weights(model, entry.weights)
    left = {*old.manifest.files} - {*files, f"{REPORT}.json", f"{REPORT}.html"}
    return files | {name: old.read(name) for name in left}


def _prove_typed(
    info: BundleInfo,
    files: dict[str, bytes],
    networks: dict[str, nn.Module],
    kind: Kind,
    threads: int | None,
    run: str,
    x: np.ndarray,
) -> Proof:
    """The typed graphs with all their rounding against torch in float32, the encoder on images x `b c h w` too."""
    models = {name: as_computed(model, kind) for name, model in with_their_weights(info, files).items()}
    reference = torch_reference(info, networks)
    proof = verify(
        reference, in_memory(info, models, threads), tolerances=REDUCED[kind], batch_sizes=PROOF_BATCHES, x=x
    )
    advice = "pins and scales are those of the old weights: export without --update finds new ones"
    require(proof, f"{run}, in {kind}", lambda: advice)
    return proof
