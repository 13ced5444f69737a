"""What the tools that write a table share: options of ul-eval and its figures, and the files of a result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ul_runtime.settings import option, threads_option


@dataclass(frozen=True)
class EvalOptions:
    """Of ul-eval, which runs in a process of its own."""

    images: int = option(1000, "Images of rFD and gFD.", metavar="COUNT")
    eval_option: list[str] = option([], "Of ul-eval, such as --features=pixels; repeatable.", metavar="--X=Y")
    threads: int | None = threads_option()
    cache: Path | None = option(None, "Prepared images, as for ul-train.", metavar="DIR")

    @property
    def shared(self) -> list[str]:
        """Words of options that ul-train takes as well."""
        from ul_train.sweep import option_words

        return option_words({"--threads": self.threads, "--cache": self.cache})

    def words(self, seeds: int) -> list[str]:
        """Of the command."""
        return ["--images", str(self.images), "--seeds", str(seeds), *self.shared, *self.eval_option]


def evaluated(bundle: Path, data: str, words: list[str]) -> dict[str, Any]:
    """The record of ul-eval."""
    from ul_train.sweep import run_script

    return json.loads(run_script("ul-eval", str(bundle), "--data", data, *words, "--json"))


def write_results(
    out: Path, names: tuple[str, ...], record: dict[str, Any], table: str, plot: bytes | None = None
) -> None:
    """Write the record, its table in Markdown and its plot as files of these names, and print the table."""
    from ul_runtime.files import durable

    durable.make_directory(out)
    durable.write_json(out / names[0], record)
    durable.atomic_write(out / names[1], table.encode())
    if plot is not None:
        durable.atomic_write(out / names[2], plot)
    print(table, end="")
