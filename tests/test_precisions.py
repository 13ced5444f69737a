"""tools/precisions.py: what it says of a bundle, and its table."""

from pathlib import Path

import pytest
from analytic_bundle import write_analytic_bundle
from tool_module import load_tool

import ul_runtime
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline

QUALITY = {
    **{"evaluated": "as it is", "space": "pixels", "count": 60, "gfd": 1.25, "gfd_spread": 0.5, "gfd_real": 0.75},
    **{"precision": 0.8, "recall": 0.7, "rfd": 2.5, "psnr_db": 20.125, "bits_per_pixel": 0.1},
}
PARITY = {"batch 1, guidance 1": {"z_0": 1e-6, "image_psnr_db": 120.0}, "reference": "torch"}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    pipeline = ul_runtime.load(write_analytic_bundle(tmp_path / "bundle").path, threads=1)
    pipeline.manifest.parity.update(PARITY)
    return pipeline


def test_the_table_has_a_row_a_bundle_with_its_precision_and_quality(pipeline):
    tool = load_tool("precisions")
    row = tool.described(pipeline)
    (row["images_per_s"],) = tool.speeds([pipeline], 1)
    assert min(row["images_per_s"].values()) > 0
    lines = tool.markdown({"rows": [row | {"quality": QUALITY}], "threads": 1, "command": "c"}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert (cells[0], cells[3:6]) == ("fp32", ["0", "1e-06", "120"])
    assert (cells[6:9], cells[-1]) == (["1.25 ± 0.50", "2.50", "20.12"], "ort-cpu, fp32")
    assert len(cells) == len(lines[0].strip("|").split("|"))
    assert "of 60 samples and reconstructions, pixels features; of real images: 0.75." in lines[4]


def test_bundles_of_other_weights_are_refused(pipeline, tmp_path):
    other = ul_runtime.load(write_analytic_bundle(tmp_path / "other", size=16).path, threads=1)
    changed = other.manifest.provenance.model_copy(update={"run_id": "another"})
    other.manifest = other.manifest.model_copy(update={"provenance": changed})
    with pytest.raises(UsageError, match="b: is not of the same weights as a"):
        load_tool("precisions").check_same([Path("a"), Path("b")], [pipeline, other])
    load_tool("precisions").check_same([Path("a"), Path("b")], [pipeline, pipeline])
