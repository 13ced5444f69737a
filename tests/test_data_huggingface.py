"""Hugging Face data sets on this disk."""

from pathlib import Path
from typing import Any

import pytest
from image_sources import contents, notes_of, of, opened, png, put, reasons

from ul_runtime.errors import BadInputError, UsageError


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return module


def parquet(datasets: Any, path: Path, values: range, names: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = datasets.ClassLabel(names=names) if names else datasets.Value("string")
    rows = {"picture": [{"bytes": png(v), "path": None} for v in values]}
    rows["label"] = [v % 2 if names else f"c{v % 2}" for v in values]  # type: ignore[misc]
    features = datasets.Features({"picture": datasets.Image(), "label": label})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_a_parquet_file_is_read(tmp_path: Path, datasets: Any) -> None:
    parquet(datasets, tmp_path / "a.parquet", range(6))
    assert of(opened(f"hf:{tmp_path}/a.parquet", tmp_path)) == {v: f"c{v % 2}" for v in range(6)}


def test_a_local_data_set_gives_its_splits_and_class_names(tmp_path: Path, datasets: Any) -> None:
    parquet(datasets, tmp_path / "in" / "train.parquet", range(6), ["zebra", "ant"])
    parquet(datasets, tmp_path / "in" / "test.parquet", range(10, 14), ["zebra", "ant"])
    splits = opened(f"hf:{tmp_path}/in", tmp_path)
    assert splits.train.class_names == ("zebra", "ant")
    assert contents(splits.train) == {v: ["zebra", "ant"][v % 2] for v in range(6)}
    assert set(contents(splits.heldout)) == set(range(10, 14))
    assert set(of(opened(f"hf:{tmp_path}/in:test", tmp_path))) == set(range(10, 14))
    with pytest.raises(BadInputError, match="no split 'dev'; it has"):
        opened(f"hf:{tmp_path}/in:dev", tmp_path)


def test_a_hugging_face_image_folder_is_read_and_its_bad_images_listed(tmp_path: Path, datasets: Any) -> None:
    for value, name in enumerate(["a/0.png", "a/1.png", "b/0.png", "b/1.png"]):
        put(tmp_path / "in" / name, value)
    (tmp_path / "in" / "b" / "2.png").write_bytes(b"%PDF")
    splits = opened(f"hf:{tmp_path}/in", tmp_path)
    assert of(splits) == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert list(reasons(splits.index.train).values()) == ["not an image of a known format"]


def test_addresses_in_rows_are_not_fetched(tmp_path: Path, datasets: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet") and pytest.importorskip("pyarrow")
    rows: dict[str, Any] = {"image": [{"bytes": png(v), "path": None} for v in range(3)]}
    rows["image"].append({"bytes": None, "path": "http://169.254.169.254/image.png"})
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pyarrow.parquet.write_table(pyarrow.table(rows, schema=schema), tmp_path / "a.parquet")
    splits = opened(f"hf:{tmp_path}/a.parquet", tmp_path)
    assert list(reasons(splits.index.train).values()) == ["an address outside the data set"]


@pytest.mark.parametrize("name", ["no/such-data-set", "missing/folder/here"])
def test_an_unknown_data_set_is_bad_input(tmp_path: Path, datasets: Any, name: str) -> None:
    with pytest.raises(BadInputError, match="cannot be read as a Hugging Face data set"):
        opened(f"hf:{name}", tmp_path)


def test_a_truncated_parquet_is_bad_input(tmp_path: Path, datasets: Any) -> None:
    parquet(datasets, tmp_path / "a.parquet", range(6))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(BadInputError, match="cannot be read"):
        opened(f"hf:{tmp_path}/a.parquet", tmp_path)


def table(path: Path, **columns: Any) -> str:
    """A parquet file as pandas, polars or Spark write it: nothing says which column holds images."""
    pyarrow = pytest.importorskip("pyarrow.parquet") and pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return f"hf:{path}"


@pytest.mark.case("R8", "a parquet file of raw bytes, or of bytes and paths, without metadata", "read as images")
def test_columns_of_bytes_are_images(tmp_path: Path, datasets: Any) -> None:
    raw = table(tmp_path / "a.parquet", jpg=[png(v) for v in range(4)], label=["cat", "dog"] * 2)
    both = table(tmp_path / "b.parquet", image=[{"bytes": png(v), "path": None} for v in range(4)], x=[b"1"] * 4)
    assert of(opened(raw, tmp_path)) == {0: "cat", 1: "dog", 2: "cat", 3: "dog"}
    assert of(opened(both, tmp_path)) == dict.fromkeys(range(4), "")


@pytest.mark.case("R8")
def test_of_several_image_columns_the_one_called_image_is_taken(tmp_path: Path, datasets: Any) -> None:
    images, masks = [png(v) for v in range(4)], [png(100 + v) for v in range(4)]
    source = table(tmp_path / "a.parquet", mask=masks, image=images)
    assert set(of(opened(source, tmp_path))) == set(range(4))
    assert any("columns that are not used: mask (binary)" in note for note in notes_of(source))
    with pytest.raises(
        BadInputError, match=r"2 image columns, and none called image; .*rename_column\(COLUMN, 'image'\)"
    ):
        opened(table(tmp_path / "b.parquet", mask=masks, photo=images), tmp_path)
    with pytest.raises(BadInputError, match=r"0 image columns, .*columns: x \(int64\)"):
        opened(table(tmp_path / "c.parquet", x=[1, 2]), tmp_path)


@pytest.mark.case(
    "F22", "parquet with a column category beside the image", "a note names the columns that are not used"
)
def test_columns_that_are_not_used_are_named(tmp_path: Path, datasets: Any) -> None:
    source = table(tmp_path / "a.parquet", image=[png(v) for v in range(4)], category=["cat", "dog"] * 2)
    splits = opened(source, tmp_path)
    assert splits.train.class_names == ()
    assert notes_of(source) == [
        f"{source}: classes come from a column called label, labels, class, fine_label, which it has not; "
        "columns that are not used: category (string)"
    ]
    assert notes_of(source, labelled=False) == []


@pytest.mark.case("R9", "hf: with nothing behind it", "one line that says what is expected")
@pytest.mark.parametrize("source", ["hf:", "hf: "])
def test_a_source_without_a_name_is_refused(tmp_path: Path, datasets: Any, source: str) -> None:
    with pytest.raises(UsageError, match="names no data set; expected hf:NAME"):
        opened(source, tmp_path)


@pytest.mark.case("R10", "a folder that save_to_disk wrote, without hf:", "the error says hf:FOLDER, which is read")
def test_a_folder_of_save_to_disk_is_read_by_its_name(tmp_path: Path, datasets: Any) -> None:
    rows = {"image": [{"bytes": png(v), "path": None} for v in range(4)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInputError, match=rf"a Hugging Face data set is hf:{tmp_path}/saved"):
        opened(tmp_path / "saved", tmp_path)
    assert set(of(opened(f"hf:{tmp_path}/saved", tmp_path))) == set(range(4))
