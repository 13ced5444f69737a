"""Engines of a bundle's step graphs: from the cache where they are valid, built and kept where they are not."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ul_runtime.bundle import Bundle
from ul_runtime.cards import cards
from ul_runtime.control import UNWATCHED, Control
from ul_runtime.device import pixels
from ul_runtime.device.interface import Tensor
from ul_runtime.errors import ULError
from ul_runtime.manifest import GraphName
from ul_runtime.onnx_weights import with_weights
from ul_runtime.tensorrt.build import REFITTABLE, Plan, Profile, Timings, build_engine, flags
from ul_runtime.tensorrt.engines import EngineCache, Facts
from ul_runtime.tensorrt.library import Library, library_on
from ul_runtime.tensorrt.refit import refit_engine
from ul_runtime.user_cache import engine_dir


class Prepared(NamedTuple):
    """An engine, and why it was built: None if it was there."""

    engine: bytes
    built_because: str | None


@dataclass(frozen=True)
class Engines:
    """Engines by one library, for `targets` or else for `card`, in one cache."""

    library: Library
    cache: EngineCache
    profile: Profile
    targets: tuple[str, ...] = ()
    card: str = ""
    refittable: bool = False

    @property
    def batches(self) -> str:
        """As Facts.profile."""
        return f"1,{self.profile.likely},{self.profile.most}"

    def facts(self, bundle: Bundle, graph: GraphName, *, float32: bool = False) -> Facts:
        """What the engine of a graph depends on."""
        entry, files = bundle.manifest.graphs[graph], bundle.manifest.files
        file = entry.float32_file or entry.file if float32 else entry.file
        return Facts(
            bundle=bundle.manifest.name,
            graph=graph,
            graph_sha256=files[file].sha256,
            weights_sha256=files[entry.weights].sha256,
            library=self.library.name,
            version=self.library.version,
            targets=",".join(self.targets),
            card="" if self.targets else self.card,
            profile=self.batches,
            flags=flags(self.library, refittable=self.refittable),
        )

    def kept(self, what: str) -> Facts:
        """Of what the library keeps beside its engines, whatever their graphs."""
        return Facts(
            "any", what, "", "", self.library.name, self.library.version, ",".join(self.targets), self.card, ""
        )

    def engine(
        self,
        bundle: Bundle,
        graph: GraphName,
        say: Callable[[str], None],
        *,
        float32: bool = False,
        batch: int | None = None,
        control: Control = UNWATCHED,
    ) -> Prepared:
        """The engine of a graph, for batches up to `batch` at least. One line says why, where it has to be built.

        Errors are those of `build_engine`.
        """

        def onnx() -> bytes:
            return with_weights(bundle.graph(graph, float32=float32), bundle.initializers(graph))

        facts, inputs = self.facts(bundle, graph, float32=float32), bundle.manifest.graphs[graph].inputs
        return self._engine(facts, str(bundle.path), onnx, inputs, batch, say, control)

    def pixels(self, bundle: Bundle, say: Callable[[str], None], *, batch: int) -> Prepared:
        """As `engine`, of the graph of device.pixels for the bundle's images."""
        image = bundle.manifest.image
        sizes = f"{image.channels} {image.size}"
        like = self.facts(bundle, "decoder_step")
        facts = replace(like, graph=pixels.NAME, graph_sha256=hashlib.sha256(pixels.ONNX).hexdigest())
        facts = replace(facts, weights_sha256=hashlib.sha256(sizes.encode()).hexdigest())  # no weights, but sizes
        inputs = pixels.PixelGraph.of(image).inputs
        return self._engine(facts, str(bundle.path), lambda: pixels.ONNX, inputs, batch, say, UNWATCHED)

    def _engine(
        self,
        facts: Facts,
        where: str,
        onnx: Callable[[], bytes],
        inputs: Sequence[Tensor],
        batch: int | None,
        say: Callable[[str], None],
        control: Control,
    ) -> Prepared:
        if (engine := self.cache.find(facts, batch)) is not None:
            return Prepared(engine, None)
        if batch is not None and batch > self.profile.most:
            larger = replace(self, profile=replace(self.profile, most=batch))
            wider = replace(facts, profile=larger.batches)
            return larger._engine(wider, where, onnx, inputs, None, say, control)
        if self.card and (refitted := self._refitted(facts, where, onnx, batch, say)) is not None:
            return Prepared(refitted, "the weights have changed")
        with self.cache.building(facts, say, control):
            if (engine := self.cache.find(facts, batch)) is not None:  # another process has built it
                return Prepared(engine, None)
            return self._build(facts, where, onnx, inputs, say, control)

    def _build(
        self,
        facts: Facts,
        where: str,
        onnx: Callable[[], bytes],
        inputs: Sequence[Tensor],
        say: Callable[[str], None],
        control: Control,
    ) -> Prepared:
        why = self.cache.why(facts)
        say(f"{facts.graph}: building an engine by {self.library.title}: {why}")
        timings, kept = None, self.kept("timings")
        if self.library.kind.keeps_timings:
            timings = Timings(self.cache.load(kept) or b"")
        plan = Plan(where, facts.graph, onnx(), inputs, self.profile, self.targets, timings, self.refittable)
        engine = build_engine(self.library, plan, control)
        self.cache.store(facts, engine)
        if timings is not None:
            self.cache.store(kept, timings.data)
        return Prepared(engine, why)

    def _refitted(
        self, facts: Facts, where: str, onnx: Callable[[], bytes], batch: int | None, say: Callable[[str], None]
    ) -> bytes | None:
        """An engine that is there with these weights put in, and kept; None, said why, where that does not work."""
        other = self.cache.with_other_weights(facts, REFITTABLE, batch)
        if other is None or (old := self.cache.load(other)) is None:
            return None
        say(f"{facts.graph}: new weights into the engine that is there, by {self.library.title}")
        try:
            engine = refit_engine(self.library, old, onnx(), where)
        except ULError as error:
            say(f"{facts.graph}: it has to be built, its weights cannot be replaced: {error}")
            return None
        self.cache.store(replace(other, weights_sha256=facts.weights_sha256), engine)
        return engine


def engines_for_card(number: int, folder: Path | None = None) -> Engines:
    """Engines that a card of this machine runs, in `folder` or the user's cache. UsageError: no library for it."""
    card = cards()[number]
    library = library_on(card.architecture)
    targets = (card.architecture,) if library.targets() else ()
    return Engines(library, EngineCache(engine_dir(folder)), Profile(), targets, f"{card.name}, {card.architecture}")
