"""Datasets that may be empty: a clean document folder has nothing in quarantine."""

from datasets import Dataset, DatasetDict, Features, Value

from steps.materializers import HFDatasetMaterializer


def test_empty_datasets_are_read_again(tmp_path):
    features = Features({"x": Value("string")})
    stored = DatasetDict(
        rows=Dataset.from_dict({"x": ["a", "b"]}, features=features),
        quarantine=Dataset.from_dict({"x": []}, features=features),
    )
    materializer = HFDatasetMaterializer(uri=str(tmp_path))
    materializer.save(stored)
    read = materializer.load(DatasetDict)
    assert read["rows"]["x"] == stored["rows"]["x"]
    assert len(read["quarantine"]) == 0
    assert read["quarantine"].features == features


def test_a_local_dataset_is_read_in_place_and_described_without_reading_it_whole(tmp_path):
    stored = DatasetDict(rows=Dataset.from_dict({"x": list(range(2000))}))
    materializer = HFDatasetMaterializer(uri=str(tmp_path))
    materializer.save(stored)
    read = materializer.load(DatasetDict)
    assert read["rows"].cache_files[0]["filename"].startswith(str(tmp_path))
    assert materializer.extract_metadata(read)["splits"] == {"rows": 2000}
