"""Proof that the tests bite: each fault put into a copy of the source makes tests fail that pass without it.

The copy holds the packages and the tests that ought to notice. One process imports torch, then runs pytest in a fork
of itself for each copy.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RATES, TERMS = "tests/test_exact_rates.py", "tests/test_objective.py"
PROCESS, CONFIG, SAMPLERS = "tests/test_noise_process.py", "tests/test_config.py", "tests/test_samplers.py"
PRECISION, INT8 = "tests/test_precision.py", "tests/test_quantize.py"
FILES = (RATES, TERMS, PROCESS, CONFIG, SAMPLERS, PRECISION, INT8, "tests/exact_denoisers.py")
UNCHANGED = "the unchanged source"

pytestmark = pytest.mark.slow

FORKS = """
import json, os, sys
import hypothesis, numpy, pydantic, pytest, torch
codes = {}
for name, folder, tests in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        with open("report.txt", "w") as report:
            os.dup2(report.fileno(), 1)
            code = pytest.main(["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests])
            import ul_train
            sys.stdout.flush()
            os._exit(code if ul_train.__file__.startswith(folder) else 99)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Fault:
    """`old` replaced by `new` in `file`; the tests of `where` called `test` (a start of their names) have to notice."""

    file: str
    old: str
    new: str
    where: str
    test: str


FAULTS = {
    "the minus removed": Fault(
        "ul_runtime/diffusion.py", "-0.5 * slope", "0.5 * slope", RATES, "gaussian_latents_cost"
    ),
    "values averaged instead of summed": Fault(
        "ul_runtime/diffusion.py",
        "return xp.sum(xp.reshape(",
        "return xp.mean(xp.reshape(",
        TERMS,
        "every_term_is_summed",
    ),
    "the terminal KL left out": Fault(
        "ul_train/objective.py",
        "schedule) + kl_terminal(z_clean, schedule.ends[0])",
        "schedule)",
        RATES,
        "gaussian_latents_cost",
    ),
    "the decoder's sigmoid swapped": Fault(
        "ul_train/objective.py",
        "loss_factor * sigmoid(bias - logsnr)",
        "loss_factor * sigmoid(logsnr - bias)",
        TERMS,
        "decoder_weight_is",
    ),
    "the base's sigmoid swapped": Fault(
        "ul_train/objective.py",
        "sigmoid(objective.base_bias - objective.schedule_z.logsnr(t))",
        "sigmoid(objective.schedule_z.logsnr(t) - objective.base_bias)",
        TERMS,
        "decoder_and_base_terms",
    ),
    "the noise of z_0 at logsnr 10": Fault(
        "ul_train/objective.py", "schedule.ends[1]", "10.0", RATES, "the_rate_is_the_information_in_the_z_0"
    ),
    "the prior down to logsnr 10": Fault(
        "ul_train/config.py", "latent_logsnr: float = 5.0", "latent_logsnr: float = 10.0", CONFIG, "in_every_preset"
    ),
    "a stop-gradient on the encoder": Fault(
        "ul_train/objective.py",
        "z if share >= 1.0 else z.detach() + share * (z - z.detach())",
        "z.detach()",
        TERMS,
        "prior_share_scales",
    ),
    "noise scaled by sigma squared": Fault(
        "ul_runtime/diffusion.py", "+ sigma(logsnr) * eps\n", "+ sigma(logsnr) ** 2 * eps\n", PROCESS, "diffuse_has"
    ),
    "the prior ending clean": Fault(
        "ul_runtime/samplers.py", "    if ends_clean:", "    if True:", SAMPLERS, "z_0_leaves_the_prior_with_its_noise"
    ),
    "the sampler's integrals without their series": Fault(
        "ul_runtime/samplers.py", "    if y < 0.3:", "    if y < 0.0:", SAMPLERS, "moments_are_their_integrals"
    ),
    "UniPC without its corrector": Fault(
        "ul_runtime/samplers.py", "b = a * correction", "b = 0.0 * correction", SAMPLERS, "unipc2_predicts_and_corrects"
    ),
    "an emulation that does not round": Fault(
        "ul_export/precision/lower.py",
        "            if node.op_type not in MOVEMENT:",
        "            if False:",
        PRECISION,
        "an_emulated_graph",
    ),
    "a softmax in half precision": Fault(
        "ul_export/precision/lower.py", '    "Softmax",\n', "", PRECISION, "statistics_the_update"
    ),
    "overflow that is let pass": Fault(
        "ul_export/precision/search.py",
        "if headroom_bits(seen) < LEAST_HEADROOM_BITS:",
        "if headroom_bits(seen) < -LEAST_HEADROOM_BITS:",
        PRECISION,
        "nodes_that_touch_a_magnitude",
    ),
    "ranges of positive values alone": Fault(
        "ul_export/precision/graphs.py",
        'tape.op("Abs",',
        'tape.op("Identity",',
        PRECISION,
        "ranges_are_the_largest",
    ),
    "one scale for all channels": Fault(
        "ul_export/precision/lower.py",
        "np.abs(weight).max(axis=others)",
        "np.full(weight.shape[axis], np.abs(weight).max())",
        INT8,
        "a_weight_is_within",
    ),
}


def copy_of_the_source(folder: Path) -> Path:
    """The packages and the tests that have to notice, without caches."""
    for package in ("ul_runtime", "ul_train", "ul_export"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for file in FILES:
        shutil.copy(ROOT / file, folder / file)
    return folder


def selection(*faults: Fault) -> list[str]:
    """pytest arguments that select what has to notice these faults."""
    files = sorted({fault.where for fault in faults})
    return [*files, "-k", " or ".join(sorted({f"test_{fault.test}" for fault in faults}))]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """(exit code of pytest, its report) of each copy."""
    jobs = {UNCHANGED: (copy_of_the_source(tmp_path_factory.mktemp("copy")), selection(*FAULTS.values()))}
    for name, fault in FAULTS.items():
        folder = copy_of_the_source(tmp_path_factory.mktemp("copy"))
        source = (folder / fault.file).read_text()
        count = source.count(fault.old)
        assert count == 1, f"{fault.file} has {fault.old!r} {count} times; expected 1: {name}"
        (folder / fault.file).write_text(source.replace(fault.old, fault.new))
        jobs[name] = folder, selection(fault)
    todo = json.dumps([(name, str(folder), tests) for name, (folder, tests) in jobs.items()])
    settings = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # Outside the repository, so that no package of it is on the path.
    folder = tmp_path_factory.mktemp("forks")
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=todo, cwd=folder, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (codes[name], (folder / "report.txt").read_text()) for name, (folder, _) in jobs.items()}


def test_what_has_to_notice_passes_on_the_unchanged_source(outcomes):
    code, report = outcomes[UNCHANGED]
    assert code == 0, report


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name, outcomes):
    code, report = outcomes[name]
    assert code == 1, report  # 1: tests failed; 5: none selected; 99: another copy imported
    assert "1 failed" in report
