"""What can run on this machine and what cannot, each tried and not only looked for, and what to do about it."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ul_runtime.backends import INSTALL_ORT_GPU, ON_A_CARD, ORT_GPU, REINSTALL_ORT_GPU, one_line
from ul_runtime.backends.tensorrt_build import KINDS, Plan, Profile, build_engine, open_library
from ul_runtime.backends.tensorrt_engines import EngineCache
from ul_runtime.errors import ULError, UsageError
from ul_runtime.machine import Card, cards, driver_version, has_bindings, versions
from ul_runtime.manifest import TensorFormat

DEFAULT = "ort-cpu"  # the backend without which nothing runs
_SIZE = 8


@dataclass(frozen=True)
class Finding:
    """`works`: None = absent, which may be as the user wants it. `advice`: what to do, where there is something."""

    what: str
    works: bool | None
    says: str
    advice: str = ""


def examine(engines: EngineCache) -> Iterator[Finding]:
    """All findings, in the order in which one helps to understand the next."""
    yield Finding("processors", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process")
    yield _ort_cpu()
    yield _openvino()
    card, found = _card()
    yield card
    for name in KINDS:
        yield _tensorrt(name, found)
    if (packages := _ort_cuda(found)) is not None:
        yield packages
    yield _engines(engines, found)
    for each in found:
        for name in ON_A_CARD:
            yield _on_card(name, each, engines.folder)
    yield _torch(found)


def _ort_cpu() -> Finding:
    try:
        from ul_runtime.backends import ort_cpu
    except UsageError as error:
        return Finding(DEFAULT, False, str(error))
    return _computes(DEFAULT, f"onnxruntime {ort_cpu.VERSION}", lambda a, b: ort_cpu.product(1)(a, b))


def _install(extra: str) -> str:
    """How to install one of this package's extras."""
    again = "; it brings onnxruntime back over onnxruntime-gpu, so uninstall and force-reinstall as the README says"
    return f"pip install 'unified-latents[{extra}]'" + (again if ORT_GPU in versions([ORT_GPU]) else "")


def _ort_cuda(found: list[Card]) -> Finding | None:
    """Which of ONNX Runtime's packages is there; None where cards are there to try it on, and nothing is in the way."""
    there = versions(("onnxruntime", ORT_GPU))
    if ORT_GPU not in there:
        install = f"with a card: pip uninstall -y onnxruntime && {INSTALL_ORT_GPU}"
        return None if found else Finding("ort-cuda", None, "onnxruntime-gpu is not installed", install)
    if "onnxruntime" in there:
        says = "onnxruntime and onnxruntime-gpu are both installed, and the last of them has overwritten the other"
        return Finding("ort-cuda", False, says, f"pip uninstall -y onnxruntime && {REINSTALL_ORT_GPU}")
    says = f"onnxruntime-gpu {there[ORT_GPU]}, and no card to try it on"
    return None if found else Finding("ort-cuda", None, says)


def _openvino() -> Finding:
    if find_spec("openvino") is None:
        return Finding("openvino", None, "not installed", _install("openvino"))
    from ul_runtime.backends import openvino

    bf16 = "bfloat16 is native here" if openvino.has_bf16() else "no native bfloat16 here"
    return _computes("openvino", f"OpenVINO {openvino.VERSION}, {bf16}", lambda a, b: openvino.product("fp32", 1, b)(a))


def _computes(what: str, by: str, product: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Finding:
    """A backend that multiplies two matrices, and whether rightly."""
    a, b = np.random.default_rng(0).standard_normal((2, _SIZE, _SIZE), np.float32)
    if np.allclose(product(a, b), a @ b, atol=1e-4):
        return Finding(what, True, by)
    return Finding(what, False, f"{by}: a product of two matrices is wrong", "install it again")


def _card() -> tuple[Finding, list[Card]]:
    if not has_bindings():
        return Finding("NVIDIA cards", None, "cuda-bindings is not installed", _install("gpu")), []
    try:
        found = cards()
    except UsageError as error:
        return Finding("NVIDIA cards", None, str(error), "with a card: install NVIDIA's driver"), []
    if not found:
        return Finding("NVIDIA cards", None, "none"), []
    names = "; ".join(
        f"{card.number}: {card.name}, {card.architecture}, {card.memory / 2**30:.0f} GiB" for card in found
    )
    return Finding("NVIDIA cards", True, f"{names}; the driver takes CUDA {driver_version()}"), found


def _tensorrt(name: str, found: list[Card]) -> Finding:
    """A library that builds an engine: for the first card, or ahead for an architecture where it can."""
    kind = KINDS[name]
    if find_spec(kind.module) is None:
        return Finding(name, None, "not installed", _install(kind.extra))
    try:
        library = open_library(name)
    except UsageError as error:
        return Finding(name, False, str(error))
    able = library.targets()
    ahead = [card.architecture for card in found if card.architecture in able][:1] or able[1:2]
    other = bool(able and found and ahead[0] != found[0].architecture)
    lacking = f"; not for {found[0].architecture} of card 0" if other else ""
    if not able and not found:
        return Finding(name, None, f"{library.title}: builds only where a card is", "run it on a machine with a card")
    inputs = [TensorFormat(name=each, dtype="float32", shape=("b", "b")) for each in "ab"]
    from ul_runtime.backends.ort_cpu import PRODUCT

    try:
        engine = build_engine(library, Plan("doctor", "product", PRODUCT, inputs, Profile(_SIZE, _SIZE), tuple(ahead)))
    except ULError as error:
        return Finding(name, False, str(error))
    where = f"builds ahead, without a card, for {', '.join(able)}" if able else "builds for card 0"
    return Finding(name, True, f"{library.title}: {where}{lacking}; tried: {len(engine)} bytes")


def _on_card(name: str, card: Card, engines: Path) -> Finding:
    """A backend opened on a card over the model of the package, and whether its steps are the processor's."""
    from ul_runtime.backends import choose
    from ul_runtime.loading import open_bundle

    what, bundle, opened = f"{name}, card {card.number}", open_bundle(None), None
    said: list[str] = []
    options = choose.CardOptions(card.number, engines if name == "tensorrt" else None)
    try:
        opened = choose.open_on_a_card(name, bundle, None, options, said.append)
        difference = choose.check_step(opened, bundle)
    except UsageError as error:  # not installed, or not for such a card
        return Finding(what, None, str(error))
    except ULError as error:
        return Finding(what, False, str(error), "; ".join(said))
    finally:
        choose.close(opened)
        opened = None
        gc.collect()
    return Finding(what, True, f"steps of {bundle.manifest.name} differ from the processor's by {difference:.1e}")


def _torch(found: list[Card]) -> Finding:
    """Whether torch, which samples a run without an export, computes rightly, and on which device."""
    if find_spec("torch") is None:
        return Finding("torch", None, "not installed", _install("train"))
    try:
        torch_device = import_module("ul_train.torch_backend")  # which builds on this package, not this one on it
    except (ImportError, OSError) as error:
        return Finding("torch", False, f"installed, and cannot be loaded: {error}", _install("train"))
    where, product = torch_device.product()
    try:
        finding = _computes("torch", f"torch {torch_device.VERSION} on {where}", product)
    except RuntimeError as error:  # of torch: for example without kernels for the card
        says = f"torch {torch_device.VERSION} on {where} fails: {one_line(error)}"
        return Finding("torch", False, says, "install a build of torch for this card")
    if finding.works and found and where == "cpu":
        return Finding("torch", False, f"{finding.says}, though there is a card", "install torch's build for CUDA")
    return finding


def _engines(cache: EngineCache, found: list[Card]) -> Finding:
    builds = f"ul-export BUNDLE --tensorrt{'' if found else ' --target sm89'} builds them ahead"
    if cache.folder.exists():
        try:
            cache.check_folder()
        except ULError as error:
            return Finding("engines", False, str(error))
    entries = list(cache.entries())
    if not entries:
        return Finding("engines", None, f"none in {cache.folder}", builds)
    foreign = [entry for entry in entries if not entry.trusted]
    damaged = [entry for entry in entries if entry.facts is None and entry.trusted]
    libraries = {name: open_library(name).version for name, kind in KINDS.items() if find_spec(kind.module) is not None}
    whole = [entry.facts for entry in entries if entry.facts is not None and entry.facts.is_engine]
    absent = [facts for facts in whole if facts.library not in libraries]
    stale = [facts for facts in whole if libraries.get(facts.library, facts.version) != facts.version]
    valid = [facts for facts in whole if facts not in absent and facts not in stale]
    built_for = ", ".join(dict.fromkeys(facts.targets or facts.card for facts in valid))
    counts = [f"{len(valid)} valid{f' (for {built_for})' if valid else ''}"]
    counts += [f"{len(stale)} of another version of their library"] if stale else []
    counts += [f"{len(absent)} of a library that is not installed"] if absent else []
    counts += [f"{len(damaged)} damaged"] if damaged else []
    counts += [f"{len(foreign)} that are not this user's alone"] if foreign else []
    megabytes = sum(entry.size for entry in entries) / 1e6
    advice = [f"remove {entry.path}; what is needed is built anew" for entry in (*damaged, *foreign)[:3]]
    advice += ["those that are not valid can be removed, or stay for their library's return"] if stale or absent else []
    return Finding(
        "engines",
        not (damaged or foreign),
        f"{', '.join(counts)}; {megabytes:.1f} MB in {cache.folder}",
        "; ".join(advice),
    )
