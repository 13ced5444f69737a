"""ul-bench: how fast a bundle runs here, beside other backends and the same networks in torch."""

import json

import typer

from ul_export.options import BenchOptions
from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, BundleAlone, SamplingOptions, with_options

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog="Example: ul-bench fashion.bundle --peers openvino,openvino-bf16,torch --run runs/fashion")
@with_options
def bench(bundle: BundleAlone, options: BenchOptions, sampling: SamplingOptions, as_json: AsJson = False) -> None:
    """Measure prior step, decoder step, whole images and start-up of a bundle, against this machine's own ceiling."""
    from ul_export.bench import report
    from ul_export.bench.bench import run_bench

    result = run_bench(bundle, options, sampling.overrides)
    if options.plot is not None:
        report.write_plot(result, options.plot)
    if as_json:
        print(json.dumps(result))
    else:
        report.print_report(result)


def main() -> None:
    """Console script."""
    run_command(app, "ul-bench")
