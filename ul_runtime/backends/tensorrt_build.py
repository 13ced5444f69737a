"""An ONNX step graph to a TensorRT engine, with progress, and with errors that name the node at fault.

Node names begin with the path of the torch module that they came from, so an error says where in the model it is.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from ul_runtime.errors import BadInputError, StoppedError, ULError, UsageError, one_line
from ul_runtime.install import install
from ul_runtime.manifest import TensorFormat
from ul_runtime.progress import Tick, silent


@dataclass(frozen=True)
class Kind:
    """What one library does otherwise than another."""

    title: str  # in messages
    module: str
    extra: str  # of this package, that brings it
    oldest: tuple[int, ...]
    builds_ahead: bool = False  # for architectures that it is told, on a machine without a GPU
    keeps_timings: bool = False  # chooses kernels by measuring them, and can be given earlier measurements
    compiles_late: bool = False  # compiles kernels when an engine first runs, and can be given what it compiled before
    user_allocation: bool = False  # is told that an engine may allocate nothing as it runs, else there is no capture


_LATE = {"builds_ahead": True, "compiles_late": True, "user_allocation": True}
KINDS = {
    "tensorrt": Kind("TensorRT", "tensorrt", "tensorrt", (10, 12), keeps_timings=True),
    "tensorrt-rtx": Kind("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", (1, 7), **_LATE),
}


@dataclass
class Library:
    """An imported library: `api` is its module, `log` what it last warned of, newest last."""

    name: str
    kind: Kind
    api: Any
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """One logger: the library keeps the first that a process gives it, whatever comes later."""
        api, log = self.api, self.log

        class Logger(api.ILogger):  # type: ignore[name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity <= api.ILogger.Severity.WARNING:
                    log.append(f"{severity.name.lower()}: {message}")

        self.logger = Logger()

    @property
    def version(self) -> str:
        """For example 1.7.1.116."""
        return str(self.api.__version__)

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.kind.title} {self.version}"

    @property
    def last(self) -> str:
        """What it last complained of."""
        return self.log[-1] if self.log else "no reason given"

    def targets(self) -> list[str]:
        """The architectures that it can be told to build for; none where it builds for the machine's GPU alone."""
        if not self.kind.builds_ahead:
            return []
        names = [name.lower() for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        return sorted(names, key=lambda name: int(name[2:]))

    def check_targets(self, targets: tuple[str, ...]) -> None:
        """UsageError for an architecture that the library does not build for."""
        for target in targets:
            if target not in self.targets():
                able = ", ".join(self.targets()) or "only for the GPU of the machine it runs on"
                raise UsageError(f"{self.title} does not build for {target!r}; it builds for {able}")


def installed() -> list[str]:
    """Names of the libraries that are installed; the first is the one to prefer."""
    return [name for name, kind in KINDS.items() if find_spec(kind.module) is not None]


@cache
def open_library(name: str) -> Library:
    """Import `tensorrt` or `tensorrt-rtx`. UsageError: not installed, or too old."""
    kind = KINDS[name]
    if find_spec(kind.module) is None:
        raise UsageError(f"{kind.title} is not installed; {install(kind.extra)}")
    try:
        api = importlib.import_module(kind.module)
    except (ImportError, OSError) as error:
        raise UsageError(f"{kind.title} is installed and cannot be loaded: {error}") from error
    if not hasattr(api, "Builder"):
        raise UsageError(f"the package {kind.module} holds no library; install {kind.title} as its maker says")
    version = tuple(int(part) for part in str(api.__version__).split(".")[:2])
    if version < kind.oldest:
        oldest = ".".join(map(str, kind.oldest))
        raise UsageError(f"{kind.title} {api.__version__} is installed; expected {oldest} or newer: upgrade it")
    return Library(name, kind, api)


def library_for(targets: tuple[str, ...]) -> Library:
    """The library that builds for these architectures (none = for this machine's GPU). UsageError: there is none."""
    able = [name for name in installed() if KINDS[name].builds_ahead or not targets]
    if not able:
        wanted = [kind for kind in KINDS.values() if kind.builds_ahead or not targets]
        ways = " or ".join(install(kind.extra) for kind in wanted)
        raise UsageError(f"{' or '.join(kind.title for kind in wanted)} is not installed; {ways}")
    library = open_library(able[0])
    library.check_targets(targets)
    return library


def library_on(architecture: str) -> Library:
    """The library that runs on a GPU of this architecture. UsageError: there is none, with the reason of each."""
    reasons = []
    for name in installed():
        library = open_library(name)
        if not library.targets() or architecture in library.targets():
            return library
        reasons.append(f"{library.title} has {', '.join(library.targets())} and not {architecture}")
    lacking = [kind for name, kind in KINDS.items() if name not in installed()]
    reasons += [f"{kind.title} is not installed: {install(kind.extra)}" for kind in lacking]
    raise UsageError(f"no TensorRT for a GPU of {architecture}: {'; '.join(reasons)}")


_BRANCHES = (1, 2, 2)  # of guidance: least, likeliest, most
_MOST_BATCH = 65536
REFITTABLE = "refittable"  # beside these, where asked for


def flags(library: Library, *, refittable: bool) -> str:
    """What `build_engine` sets, in words."""
    return ", ".join(["no TF32", *["user allocation"] * library.kind.user_allocation, *[REFITTABLE] * refittable])


@dataclass(frozen=True)
class Profile:
    """The batches that an engine takes: 1 to `most`; kernels are chosen for `likely`."""

    most: int = 64  # what a GPU makes at once by default
    likely: int = 64

    def __post_init__(self) -> None:
        """UsageError for what cannot be."""
        if not 1 <= self.likely <= self.most <= _MOST_BATCH:
            raise UsageError(f"batches of {self.likely} and at most {self.most}: expected 1 to {_MOST_BATCH}, in order")

    def shapes(self, tensor: TensorFormat) -> list[tuple[int, ...]]:
        """Its smallest, likeliest and largest shape."""
        sizes = {"b": (1, self.likely, self.most), "g": _BRANCHES}
        return [tuple(d if isinstance(d, int) else sizes[d][k] for d in tensor.shape) for k in range(3)]


@dataclass(frozen=True)
class Plan:
    """What is built: the graph `name` of `where`, as ONNX with its weights inside, for these architectures.

    `targets` empty = the GPU of this machine.
    """

    where: str
    name: str
    onnx: bytes
    inputs: Sequence[TensorFormat]
    profile: Profile
    targets: tuple[str, ...]
    timings: "Timings | None" = None
    refittable: bool = False  # weights can be replaced; the library then optimises less around them


@dataclass
class Timings:
    """What the library measured of kernels, as it writes it (empty = nothing yet); a build adds to it."""

    data: bytes = b""


def build_engine(library: Library, plan: Plan, tick: Tick = silent) -> bytes:
    """The engine's bytes. `tick` gets shares of the work as it is done, 1 in all.

    BadInputError: the library cannot parse or build the graph, with node, operator and reason. StoppedError.
    """
    engine, why = _attempt(library, plan, tick=tick)
    if engine is not None:
        return engine
    tick(0)
    named = [node for node in _node_names(library, plan) if node and node in why]
    node = max(named, key=len) if named else first_failing_node(library, plan, tick)
    at = f"node {node}" if node else "no single node is at fault"
    wanted = f" for {', '.join(plan.targets)}" if plan.targets else ""
    raise BadInputError(
        f"{plan.where}: {plan.name}: {library.title} cannot build it{wanted}: {at}: {one_line(why, 400)}; "
        "export with another --opset or precision, or use another backend"
    )


def first_failing_node(library: Library, plan: Plan, tick: Tick = silent) -> str | None:
    """The first node, in the graph's order, with which the graph up to it does not build; by bisection.

    For failures of which the library does not say the place. None if every part builds.
    """
    names = _node_names(library, plan)
    builds, fails = 0, len(names)
    while fails - builds > 1:
        middle = (builds + fails) // 2
        tick(0)
        if _attempt(library, plan, layers=middle)[0] is None:
            fails = middle
        else:
            builds = middle
    return names[fails - 1] if fails < len(names) else (names[-1] if names else None)


def _attempt(
    library: Library, plan: Plan, *, layers: int | None = None, tick: Tick = silent
) -> tuple[bytes | None, str]:
    """(The engine, or None; what the library said) of the whole graph, or of its first `layers` layers."""
    builder = library.api.Builder(library.logger)
    network, parser = _parse(library, builder, plan)
    if layers is not None:
        _cut(network, layers)
    config = builder.create_builder_config()
    if plan.targets:
        config.num_compute_capabilities = len(plan.targets)
        for number, target in enumerate(plan.targets):
            config.set_compute_capability(getattr(library.api.ComputeCapability, target.upper()), number)
    config.clear_flag(library.api.BuilderFlag.TF32)  # float32 is float32
    if library.kind.user_allocation:
        config.set_flag(library.api.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if plan.refittable:
        config.set_flag(library.api.BuilderFlag.REFIT)
    profile = builder.create_optimization_profile()
    for tensor in plan.inputs:
        profile.set_shape(tensor.name, *plan.profile.shapes(tensor))
    config.add_optimization_profile(profile)
    if layers is None:
        config.progress_monitor = _monitor(library, tick)
    if plan.timings is not None and layers is None:
        _give_timings(config, plan.timings)
    library.log.clear()
    engine = builder.build_serialized_network(network, config)
    del parser  # it holds the weights of the network
    if engine is not None and plan.timings is not None and layers is None:
        plan.timings.data = bytes(config.get_timing_cache().serialize())
    return None if engine is None else bytes(engine), " ".join(library.log)


def _give_timings(config: Any, timings: Timings) -> None:
    """What does not fit library or GPU is begun anew."""
    cache = config.create_timing_cache(timings.data)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _parse(library: Library, builder: Any, plan: Plan) -> tuple[Any, Any]:
    """(The strongly typed network, its parser). BadInputError with the node that is not supported."""
    api = library.api
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, library.logger)
    if not parser.parse(plan.onnx):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        parts = [f"node {error.node_name()} ({error.node_operator()}): {_reason(error)}" for error in errors[:3]]
        raise BadInputError(
            f"{plan.where}: {plan.name}: {library.title} does not take it: {'; '.join(parts) or 'no reason given'}; "
            "export with another --opset or precision, or use another backend"
        )
    return network, parser


def _reason(error: Any) -> str:
    """Why the parser refused: its text where it has one, and the kind of error."""
    kind = error.code().name.lower().replace("_", " ")
    text = str(error.desc())
    return kind if text in ("", "false") else f"{kind}: {one_line(text, 400)}"


def _node_names(library: Library, plan: Plan) -> list[str]:
    """Name of each layer of the parsed network: that of the ONNX node it came from."""
    network, _ = _parse(library, library.api.Builder(library.logger), plan)
    return [str(network.get_layer(number).name) for number in range(network.num_layers)]


def _cut(network: Any, layers: int) -> None:
    """Leave the first `layers` layers: what they compute and none of them reads is the output, the rest is dead."""
    for output in [network.get_output(number) for number in range(network.num_outputs)]:
        network.unmark_output(output)
    kept = [network.get_layer(number) for number in range(layers)]
    read = {tensor.name for layer in kept for k in range(layer.num_inputs) if (tensor := layer.get_input(k))}
    for layer in kept:
        for k in range(layer.num_outputs):
            if (tensor := layer.get_output(k)) is not None and tensor.name not in read:
                network.mark_output(tensor)


def _monitor(library: Library, tick: Tick) -> Any:
    """A progress monitor of the library that ticks; where that raises StoppedError, the build ends with no engine."""
    stopped = False

    def advance(share: float) -> None:
        nonlocal stopped
        try:
            tick(share)
        except StoppedError:  # which must not pass through the library
            stopped = True

    phases = _Phases(advance)

    class Monitor(library.api.IProgressMonitor):  # type: ignore[name-defined]
        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            phases.start(name, parent, num_steps)

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            phases.step(name, step)
            advance(0)
            return not stopped

    return Monitor()


class _Phases:
    """The share of a build that is done, from its nested phases; told as increments that never go back."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._told = 0.0
        self._open: dict[str, tuple[str | None, int, int]] = {}  # phase -> (parent, steps, steps done)

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase of `num_steps` steps begins, within a step of its parent."""
        self._open[name] = parent, max(1, num_steps), 0

    def step(self, name: str, step: int) -> None:
        """Step `step`, from 0, is complete."""
        if name not in self._open:
            return
        parent, steps, _ = self._open[name]
        self._open[name] = parent, steps, step + 1
        share, outer = 0.0, name
        while outer in self._open:
            above, steps, done = self._open[outer]
            share = min(1.0, (done + share) / steps)
            if above is None:
                return self._tell(share)
            outer = above

    def finish(self, name: str) -> None:
        """The phase is over; of the outermost: all is done."""
        parent, _, _ = self._open.pop(name, (name, 1, 0))
        if parent is None:
            self._tell(1.0)

    def _tell(self, share: float) -> None:
        if share > self._told:
            self._tick(share - self._told)
            self._told = share


def refit_engine(library: Library, engine: bytes, onnx: bytes, where: str) -> bytes:
    """The engine with the weights of `onnx`, which is the graph that it was built of but for these.

    ULError: the library cannot load the engine, or not all of its weights are in the graph.
    """
    api = library.api
    library.log.clear()
    loaded = api.Runtime(library.logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise ULError(f"{where}: {library.title} cannot load its engine: {library.last}")
    refitter = api.Refitter(loaded, library.logger)
    if not api.OnnxParserRefitter(refitter, library.logger).refit_from_bytes(onnx):
        raise ULError(f"{where}: {library.title} does not find the weights in the graph: {library.last}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(map(str, refitter.get_missing_weights()[:3])) or library.last
        raise ULError(f"{where}: {library.title} lacks weights: {missing}")
    return bytes(loaded.serialize())
