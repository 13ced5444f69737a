"""tools/exporters.py: what it compares is what torch computes."""

import pytest
from exported_run import PLAIN, exported_run
from tool_module import load_tool

from ul_export.onnx_graphs import step_graphs
from ul_export.precision.graphs import in_memory
from ul_runtime.bundle import Bundle
from ul_train.run import Run

pytestmark = pytest.mark.slow


def test_the_torchscript_exporter_is_given_the_norm_that_it_lacks(tmp_path_factory):
    """Its graph of the decoder equals torch at another batch size than it was exported with; the control does not."""
    tool, exported = load_tool("exporters"), exported_run(PLAIN, tmp_path_factory)
    manifest = Bundle.open(exported.bundle).manifest
    networks = Run.open(exported.run).finished().networks
    graph = next(each for each in step_graphs(networks, manifest.image, manifest.latent) if each.name == "decoder_step")
    model = tool.torchscript(graph, [tensor.name for tensor in manifest.graphs["decoder_step"].outputs], tool.OPSET)
    inputs = tool.random_inputs(graph, 5)
    given = in_memory(manifest, {"decoder_step": model}, threads=1).run("decoder_step", inputs)
    assert tool.difference(graph, inputs, given) < 1e-5
    assert tool.difference(graph, inputs | {"x": inputs["x"] * 1.01}, given) > 1e-4
