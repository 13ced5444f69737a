"""What the commands say is missing can be installed by what they say."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from ul_runtime import install as module
from ul_runtime.errors import UsageError
from ul_runtime.install import install, require_packages

SMALL = "; without an NVIDIA GPU, first install torch's CPU build by the command on pytorch.org/get-started"


@pytest.mark.case(
    "N3",
    "the hints what to install, in six commands",
    "they name the checkout, folder or repository that this package came from, and torch's CPU build",
)
def test_from_a_checkout_the_hint_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert install("openvino") == f"pip install '{module._CHECKOUT}[openvino]'"
    monkeypatch.chdir(module._CHECKOUT)
    assert install("gpu") == "pip install '.[gpu]'"


@pytest.mark.case("N3")
@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"url": "file:///home/a%20b/ul", "dir_info": {}}, "pip install '/home/a b/ul[gpu]'"),
        (
            {"url": "file:///w/ul.whl", "archive_info": {}},
            "pip install '/w/ul.whl[gpu]'",
        ),
        (
            {"url": "https://host/ul.git", "vcs_info": {"vcs": "git", "commit_id": "a1"}},
            "pip install 'unified-latents[gpu] @ git+https://host/ul.git@a1'",
        ),
        (None, "pip install '.[gpu]' in the folder of its source"),
    ],
)
def test_an_installed_package_says_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, object] | None, said: str
) -> None:
    text = None if record is None else json.dumps(record)
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(module, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert install("gpu") == said


def test_a_package_that_pip_does_not_know_is_installed_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(module, "distribution", absent)
    assert install("gpu") == "pip install '.[gpu]' in the folder of its source"


@pytest.mark.case("N3")
def test_where_torch_is_to_come_its_small_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert install("train").endswith(SMALL)
    assert not install("gpu").endswith(SMALL)
    with pytest.raises(UsageError, match=r"^torch is not installed; pip install "):
        require_packages("torch", extras="train,export")
