"""Steps from documents to formatted datasets."""

import tempfile
from pathlib import Path
from typing import Annotated

from datasets import Dataset, DatasetDict

from llm_engineering.config import (
    ClientConfig,
    ComputeConfig,
    DocumentsConfig,
    FormattingConfig,
    InstructionWriting,
    ModelConfig,
    PreferenceWriting,
    SplitConfig,
)
from llm_engineering.data.formats import read_instructions, read_preferences
from llm_engineering.data.ledger import Ledger
from llm_engineering.data.report import write_data_report
from llm_engineering.data.rows import (
    InstructionRow,
    PreferenceRow,
    instruction_dataset,
    instruction_row,
    preference_dataset,
    preference_row,
)
from llm_engineering.data.split import SPLITS, split_rows
from llm_engineering.data.validate import validate_instructions, validate_preferences
from llm_engineering.documents.passages import cut_passages
from llm_engineering.documents.read import Document
from llm_engineering.documents.read import read_documents as read_all_documents
from llm_engineering.formatting.datasets import format_splits
from llm_engineering.generation.client import open_client
from llm_engineering.generation.instructions import generate_instructions as generate_from_passages
from llm_engineering.generation.instructions import prompt_versions
from llm_engineering.generation.preferences import generate_preferences as generate_from_rows
from llm_engineering.generation.prompts import PROMPT_FILES
from llm_engineering.models import load_tokenizer
from llm_engineering.settings import Settings
from steps.caching import project_step
from steps.logging import log_rows
from steps.materializers import Directory, DirectoryMaterializer, HFDatasetMaterializer


@project_step(output_materializers=HFDatasetMaterializer)
def read_documents(documents: DocumentsConfig, content_hash: str) -> Annotated[DatasetDict, "documents"]:
    """Read the documents. `content_hash` stands for the files' content, so that a change of a file is a change here."""
    found, rejected = read_all_documents(documents)
    ledger = Ledger()
    ledger.record("document", len(found) + len(rejected), len(found), rejected)
    log_rows("documents", ledger, "document", path=documents.path, content_hash=content_hash)
    return DatasetDict(documents=Dataset.from_list([document.model_dump() for document in found]), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer, files=PROMPT_FILES)
def generate_instructions(
    documents: DatasetDict,
    config: DocumentsConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    client: ClientConfig,
    writing: InstructionWriting,
    seed: int,
) -> Annotated[DatasetDict, "instruction_candidates"]:
    """Cut the documents into passages and let the client write an instruction for each."""
    ledger = Ledger.load(documents)
    passages, rejected = cut_passages([Document.model_validate(d) for d in documents["documents"]], config, seed)
    ledger.record("passage", len(passages) + len(rejected), len(passages), rejected)
    writer = open_client(client, model, compute, Settings())
    rows, rejected = generate_from_passages(passages, writer, writing, seed)
    ledger.record("instruction", len(passages), len(rows), rejected)
    prompts = prompt_versions(writer, writing)
    log_rows("instruction_candidates", ledger, "instruction", generated_by=writer.identity, prompts=prompts)
    return DatasetDict(rows=instruction_dataset(rows), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def load_instructions(path: str, content_hash: str) -> Annotated[DatasetDict, "instruction_candidates"]:
    """Read the user's own instruction dataset."""
    name, rows, rejected = read_instructions(Path(path))
    ledger = Ledger()
    ledger.record("instruction", len(rows) + len(rejected), len(rows), rejected)
    log_rows("instruction_candidates", ledger, "instruction", path=path, content_hash=content_hash, format=name)
    return DatasetDict(rows=instruction_dataset(rows), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def prepare_instructions(
    candidates: DatasetDict, near_duplicate_threshold: float, split: SplitConfig
) -> Annotated[DatasetDict, "instruction_dataset"]:
    """Validate and split."""
    ledger = Ledger.load(candidates)
    rows, rejected = validate_instructions(
        [instruction_row(record) for record in candidates["rows"]], near_duplicate_threshold
    )
    ledger.record("instruction", len(candidates["rows"]), len(rows), rejected)
    parts = split_rows(rows, split, "instruction", ledger.quarantine)
    log_rows("instruction_dataset", ledger, "instruction", **{name: len(part) for name, part in parts.items()})
    return DatasetDict({name: instruction_dataset(part) for name, part in parts.items()}, **ledger.datasets())


@project_step(output_materializers={"formatted_sft": HFDatasetMaterializer, "data_report": DirectoryMaterializer})
def format_instructions(
    dataset: DatasetDict, model: ModelConfig, formatting: FormattingConfig
) -> tuple[Annotated[DatasetDict, "formatted_sft"], Annotated[Directory, "data_report"]]:
    """Render and label every row, and report on the data."""
    ledger = Ledger.load(dataset)
    splits: dict[str, list[InstructionRow]] = {
        name: [instruction_row(record) for record in dataset[name]] for name in SPLITS
    }
    formatted, lengths, rejected = format_splits(splits, load_tokenizer(model, Settings()), formatting)
    ledger.record("instruction", sum(map(len, splits.values())), sum(map(len, formatted.values())), rejected)
    folder = Path(tempfile.mkdtemp())
    report = write_data_report(folder, "instruction", ledger, splits, lengths, formatting.max_length)
    log_rows("formatted_sft", ledger, "instruction", tokens=report["tokens"]["total"], base_model=model.name_or_path)
    log_rows("data_report", ledger, "instruction", **report["rows"])
    return formatted, Directory(path=folder)


@project_step(output_materializers=HFDatasetMaterializer)
def generate_preferences(
    dataset: DatasetDict,
    documents: DatasetDict | None,
    model: ModelConfig,
    compute: ComputeConfig,
    client: ClientConfig,
    writing: PreferenceWriting,
    seed: int,
) -> Annotated[DatasetDict, "preference_candidates"]:
    """Let the base model or the client answer the prompts of the instruction dataset.

    `documents` are those that the dataset was generated from, None for a dataset of one's own.
    """
    ledger = Ledger.load(dataset)
    rows = [instruction_row(record) for name in SPLITS for record in dataset[name]]
    texts = {record["source"]: record["text"] for record in documents["documents"]} if documents else {}
    writer = open_client(client, model, compute, Settings())
    made, rejected = generate_from_rows(rows, texts, writer, writing, seed)
    ledger.record("preference", len(rows), len(made), rejected)
    log_rows("preference_candidates", ledger, "preference", generated_by=writer.identity)
    return DatasetDict(rows=preference_dataset(made), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def load_preferences(path: str, content_hash: str) -> Annotated[DatasetDict, "preference_candidates"]:
    """Read the user's own preference dataset."""
    name, rows, rejected = read_preferences(Path(path))
    ledger = Ledger()
    ledger.record("preference", len(rows) + len(rejected), len(rows), rejected)
    log_rows("preference_candidates", ledger, "preference", path=path, content_hash=content_hash, format=name)
    return DatasetDict(rows=preference_dataset(rows), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def prepare_preferences(
    candidates: DatasetDict, near_duplicate_threshold: float, split: SplitConfig
) -> Annotated[DatasetDict, "preference_dataset"]:
    """Validate and split."""
    ledger = Ledger.load(candidates)
    rows, rejected = validate_preferences(
        [preference_row(record) for record in candidates["rows"]], near_duplicate_threshold
    )
    ledger.record("preference", len(candidates["rows"]), len(rows), rejected)
    parts = split_rows(rows, split, "preference", ledger.quarantine)
    log_rows("preference_dataset", ledger, "preference", **{name: len(part) for name, part in parts.items()})
    return DatasetDict({name: preference_dataset(part) for name, part in parts.items()}, **ledger.datasets())


@project_step(output_materializers={"formatted_dpo": HFDatasetMaterializer, "data_report": DirectoryMaterializer})
def format_preferences(
    dataset: DatasetDict, model: ModelConfig, formatting: FormattingConfig
) -> tuple[Annotated[DatasetDict, "formatted_dpo"], Annotated[Directory, "data_report"]]:
    """Render every pair, and report on the data."""
    ledger = Ledger.load(dataset)
    splits: dict[str, list[PreferenceRow]] = {
        name: [preference_row(record) for record in dataset[name]] for name in SPLITS
    }
    formatted, lengths, rejected = format_splits(splits, load_tokenizer(model, Settings()), formatting)
    ledger.record("preference", sum(map(len, splits.values())), sum(map(len, formatted.values())), rejected)
    folder = Path(tempfile.mkdtemp())
    report = write_data_report(folder, "preference", ledger, splits, lengths, formatting.max_length)
    log_rows("formatted_dpo", ledger, "preference", tokens=report["tokens"]["total"], base_model=model.name_or_path)
    log_rows("data_report", ledger, "preference", **report["rows"])
    return formatted, Directory(path=folder)
