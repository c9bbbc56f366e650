"""The step that writes an exam from the documents, and how other steps read it."""

from pathlib import Path
from typing import Annotated

from datasets import DatasetDict

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import Quarantined, instruction_row
from llm_engineering.data.storage import stream_records, work_folder
from llm_engineering.documents.document import Document
from llm_engineering.documents.passages import cut_passages
from llm_engineering.evaluation.exam_writer import write_exam as write_from_rows
from llm_engineering.evaluation.measures.exam import EXAM_FILE, ExamRow, exam_hash, with_written
from llm_engineering.evaluation.measures.json_lines import read_json_lines
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.prompts import PROMPT_FILES
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import DocumentsConfig, SplitConfig
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.settings import Settings
from steps.caching import project_step
from steps.logging import log_artifact
from steps.materializers import Directory, DirectoryMaterializer

# The questions that were set aside, beside the file of the exam.
_SET_ASIDE = "set_aside.jsonl"


@project_step(output_materializers=DirectoryMaterializer, files=PROMPT_FILES, in_job=True)
def write_exam(
    candidates: DatasetDict,
    documents: DatasetDict,
    config: DocumentsConfig,
    model: ModelConfig,
    chat_template: str | None,
    compute: ComputeConfig,
    client: ClientConfig,
    writing: InstructionWriting,
    exam: ExamConfig,
    split: SplitConfig,
    seed: int,
) -> Annotated[Directory, "exam"]:
    """Choose or write questions in wordings that are left out of training, and check them with the client.

    The artifact has the questions in the format of a user's own file, and those that were set aside.
    """
    passages, _ = cut_passages([Document.model_validate(d) for d in documents["documents"]], config, seed)
    rows = [instruction_row(record) for record in stream_records(candidates["rows"])]
    writer = open_client(client, model, compute, Settings(), chat_template)
    written = write_from_rows(rows, passages, writer, writing, exam, split, seed)
    folder = work_folder()
    lines = [row.model_dump_json(exclude_defaults=True) for row in written.rows]
    (folder / EXAM_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    lines = [row.model_dump_json() for row in written.quarantine]
    (folder / _SET_ASIDE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    ledger = Ledger()
    record_exam(ledger, folder)
    kinds = {kind: sum(row.kind == kind for row in written.rows) for kind in ("single", "unanswerable")}
    log_artifact("exam", **kinds, set_aside=ledger.by_reason("exam"), generated_by=writer.identity)
    return Directory(path=folder)


def record_exam(ledger: Ledger, folder: Path) -> None:
    """Count the questions of a written exam, and those that were set aside, as a stage of their own."""
    kept = len((folder / EXAM_FILE).read_text(encoding="utf-8").splitlines())
    rejected = [row for _, row in read_json_lines(folder / _SET_ASIDE, "exam", Quarantined)]
    ledger.record("exam", kept + len(rejected), kept, rejected)


def questions_of(written: Directory | None) -> list[str]:
    """The questions of the exam that the run has written; none if the recipe names a file."""
    if written is None:
        return []
    return [row.question for _, row in read_json_lines(written.path / EXAM_FILE, "exam", ExamRow)]


def with_written_questions(
    exam: ExamConfig | None, digest: str | None, written: Directory | None
) -> tuple[ExamConfig | None, str | None]:
    """The exam with the file that the run has written, if there is one, and the hash of the exam's files.

    Args:
        digest: the hash of the files that the recipe names.
    """
    if exam is None or written is None:
        return exam, digest
    exam = with_written(exam, written.path)
    return exam, exam_hash(exam)
