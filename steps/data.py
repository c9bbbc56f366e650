"""Steps from documents to formatted datasets.

`content_hash` and `evaluation_hash` are hashes of files that a step reads, so that a changed file runs the step again.
"""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from datasets import DatasetDict, Features, List, Value, concatenate_datasets

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.load import load_evaluation, load_rows, prompts_of
from llm_engineering.data.prepare import check_splits
from llm_engineering.data.prepare import prepare as prepare_rows
from llm_engineering.data.rows import (
    REPEATED,
    SPLITS,
    InstructionRow,
    Quarantined,
    TextRow,
    folded,
    instruction_row,
    preference_row,
    split_of,
)
from llm_engineering.data.storage import rows_dataset, stream_records, to_dataset, work_folder
from llm_engineering.documents.document import Document
from llm_engineering.documents.fingerprints import dataset_fingerprints, document_fingerprints, fingerprint_table
from llm_engineering.documents.general_instructions import balanced_instructions, replayed_instructions
from llm_engineering.documents.passages import chunks, cut_passages, repeated_claim
from llm_engineering.documents.read import read_documents as read_all_documents
from llm_engineering.documents.texts import document_rows, replay_rows, sentence_rows
from llm_engineering.evaluation.measures.exam import read_exam
from llm_engineering.feedback.human_rows import facts as human_facts
from llm_engineering.feedback.human_rows import join as join_people
from llm_engineering.feedback.human_rows import read_snapshot, repeated
from llm_engineering.feedback.people import snapshots
from llm_engineering.generation.abstention import generate_abstentions
from llm_engineering.generation.clients.open import open_client
from llm_engineering.generation.derived.question_wordings import OTHER_WORDING, other_wordings
from llm_engineering.generation.derived.two_hop import two_hop_questions
from llm_engineering.generation.facts import REWORDING, ROUNDS, diversity, generate_facts
from llm_engineering.generation.instructions import generate_instructions as generate_from_passages
from llm_engineering.generation.instructions import prompt_versions
from llm_engineering.generation.preferences import generate_preferences as generate_from_rows
from llm_engineering.generation.prompts import PROMPT_FILES
from llm_engineering.generation.types import Completer
from llm_engineering.recipe.compute_blocks import ComputeConfig
from llm_engineering.recipe.data_blocks import (
    UNFIT,
    DataConfig,
    DocumentsConfig,
    FormattingConfig,
    ReplayConfig,
    SplitConfig,
)
from llm_engineering.recipe.evaluation_blocks import ExamConfig
from llm_engineering.recipe.generation_blocks import ClientConfig, InstructionWriting, PreferenceWriting
from llm_engineering.recipe.model_blocks import ModelConfig
from llm_engineering.recipe.recipe_keys import DerivingSetup
from llm_engineering.recipe.settings import Settings
from steps.caching import project_step
from steps.logging import log_artifact, log_rows, page_facts
from steps.materializers import Directory, DirectoryMaterializer, HFDatasetMaterializer
from steps.written_exam import questions_of, record_exam, with_written_questions

if TYPE_CHECKING:
    from llm_engineering.generation.derived.rewritings import Derived

_TEXT = Value("string")
_DOCUMENT_FEATURES = Features(
    id=_TEXT, source=_TEXT, title=_TEXT, text=_TEXT, parts=List({"start": Value("int64"), "name": _TEXT})
)


@project_step(output_materializers=HFDatasetMaterializer)
def read_documents(documents: DocumentsConfig, content_hash: str) -> Annotated[DatasetDict, "documents"]:
    """Read the documents."""
    kept, rejected = read_all_documents(documents)
    ledger = Ledger()
    ledger.record("document", len(kept) + len(rejected), len(kept), rejected)
    log_rows("documents", ledger, "document", path=documents.path, content_hash=content_hash)
    rows = to_dataset([document.model_dump() for document in kept], _DOCUMENT_FEATURES)
    sources = fingerprint_table(document_fingerprints(documents))
    return DatasetDict(documents=rows, sources=sources, **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer, files=PROMPT_FILES, in_job=True)
def generate_instructions(
    documents: DatasetDict,
    config: DocumentsConfig,
    model: ModelConfig,
    chat_template: str | None,
    compute: ComputeConfig,
    client: ClientConfig,
    writing: InstructionWriting,
    seed: int,
    replay: str | None,
    replay_hash: str | None,
    split: SplitConfig | None = None,
) -> Annotated[DatasetDict, "instruction_candidates"]:
    """Cut the documents into passages, write instructions for them with the client, and add the general rows.

    `replay_hash` is of the dataset `replay`. Questions that need two facts do not join facts of two parts of `split`.
    """
    ledger = Ledger.load(documents)
    passages, rejected = cut_passages([Document.model_validate(d) for d in documents["documents"]], config, seed)
    ledger.record("passage", len(passages) + len(rejected), len(passages), rejected)
    writer = open_client(client, model, compute, Settings(), chat_template)
    facts: dict[str, Any] = {"replay_hash": replay_hash} if replay_hash is not None else {}
    facts |= repeated_claim(passages)
    if writing.questions == "fact":
        # The recipe allows only the local model here.
        assert isinstance(writer, Completer)
        rows, rejected, read = generate_facts(passages, writer, writing, seed=seed, rounds=ROUNDS)
        joined: list[InstructionRow] = []
        if writing.two_hop and split is not None:
            joined = two_hop_questions(rows, passages, writing.two_hop, seed, partial(split_of, config=split))
        facts["diversity"] = diversity(rows, len(passages), joined)
        rows, read = rows + joined, read + len(joined)
    else:
        rows, rejected = generate_from_passages(passages, writer, writing, seed)
        read = len(passages)
    general = balanced_instructions(replay, len(rows), seed)
    rows += [row for row in general if isinstance(row, InstructionRow)]
    rejected += [row for row in general if isinstance(row, Quarantined)]
    ledger.record("instruction", read + len(general), len(rows), rejected, writes=True)
    prompts = prompt_versions(writer, writing)
    log_rows("instruction_candidates", ledger, "instruction", generated_by=writer.identity, prompts=prompts, **facts)
    sources = fingerprint_table(dataset_fingerprints([replay]))
    return DatasetDict(rows=rows_dataset(rows, "instruction"), sources=sources, **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer, in_job=True)
def generate_preferences(
    dataset: DatasetDict,
    documents: DatasetDict | None,
    model: ModelConfig,
    chat_template: str | None,
    compute: ComputeConfig,
    client: ClientConfig,
    writing: PreferenceWriting,
    seed: int,
    config: DocumentsConfig | None = None,
    questions: InstructionWriting | None = None,
    trained: Directory | None = None,
    written: Directory | None = None,
) -> Annotated[DatasetDict, "preference_candidates"]:
    """Answer the prompts of the instruction dataset with the base model or the client.

    `documents` are the source of the dataset; None for the user's own dataset. With `config` and `questions` the pairs also teach
    what the documents do not say: the base model writes questions in new wordings, and the model in the folder `trained` answers;
    None is the base model. No pair asks a question of the exam that the run has `written`.
    """
    ledger = Ledger.load(dataset)
    rows = [instruction_row(record) for name in SPLITS for record in dataset[name]]
    # Pairs need each question once.
    rows = [row for row in rows if not row.origin.startswith((OTHER_WORDING, REPEATED))]
    texts = {record["source"]: record["text"] for record in documents["documents"]} if documents else {}
    answering = partial(open_client, client, model, compute, Settings(), chat_template)
    if config is not None and questions is not None and documents is not None:
        sentences, _ = cut_passages([Document.model_validate(d) for d in documents["documents"]], config, seed)
        base = answering()
        assert isinstance(base, Completer)
        reworded, _, _ = generate_facts(sentences, base, questions, REWORDING, seed)
        del base
        writer = answering(trained.path if trained else None)
        made, rejected, read = generate_abstentions(
            rows, [s.text for s in sentences], writer, writing, seed, reworded, questions_of(written)
        )
    else:
        writer = answering(trained.path if trained else None)
        made, rejected = generate_from_rows(rows, texts, writer, writing, seed)
        read = len(rows)
    ledger.record("preference", read, len(made), rejected, writes=True)
    log_rows("preference_candidates", ledger, "preference", generated_by=writer.identity)
    return DatasetDict(rows=rows_dataset(made, "preference"), **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def collect_prompts(dataset: DatasetDict) -> Annotated[DatasetDict, "prompt_candidates"]:
    """Make a prompt of the question of each instruction row. Held-out questions stay held out."""
    ledger = Ledger.load(dataset)
    candidates = DatasetDict()
    for name, stage, splits in (("rows", "prompt", SPLITS[:2]), ("test_rows", "prompt_test", SPLITS[2:])):
        rows = [instruction_row(record) for split in splits for record in dataset[split]]
        rows = [row for row in rows if not row.origin.startswith(REPEATED)]
        prompts, rejected = prompts_of(rows, stage)
        ledger.record(stage, len(rows), len(prompts), rejected)
        candidates[name] = rows_dataset(prompts, "prompt")
    log_rows("prompt_candidates", ledger, "prompt")
    return DatasetDict(**candidates, **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def label_preferences(dataset: DatasetDict, has_own_test: bool) -> Annotated[DatasetDict, "labelled_candidates"]:
    """Make two labelled answers of each pair of the preference dataset: the chosen one is good, the rejected one is bad.

    `has_own_test` says whether the test split is the user's own; its answers stay in a test split.
    """
    ledger = Ledger.load(dataset)
    own_test = ["test"] if has_own_test else []
    parts = {"rows": [name for name in SPLITS if name not in own_test], "test_rows": own_test}
    answers = {
        # Repeated pairs would be duplicates here; `prepare` repeats their answers.
        part: [
            row
            for name in names
            for pair in dataset[name]
            if not pair["origin"].startswith(REPEATED)
            for row in preference_row(pair).labelled()
        ]
        for part, names in parts.items()
        if names
    }
    for part, rows in answers.items():
        ledger.record("labelled" if part == "rows" else "labelled_test", len(rows), len(rows))
    log_rows("labelled_candidates", ledger, "labelled")
    candidates = {part: rows_dataset(rows, "labelled") for part, rows in answers.items()}
    return DatasetDict(**candidates, **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer, files=PROMPT_FILES)
def collect_texts(
    documents: DatasetDict,
    config: DocumentsConfig,
    seed: int,
    replay: ReplayConfig | None,
    split: SplitConfig,
    content_hash: str | None,
    deriving: DerivingSetup | None = None,
    instructions: DatasetDict | None = None,
) -> Annotated[DatasetDict, "text_candidates"]:
    """Make a text row of each document or of each sentence, and add rewritings and the share of the general dataset.

    `content_hash` is of the general dataset. `deriving` is None without rewritings and without a budget of tokens;
    `instructions` are the prepared ones that both need.
    """
    ledger = Ledger.load(documents)
    read = [Document.model_validate(d) for d in documents["documents"]]
    if config.unit == "sentence":
        passages, rejected = cut_passages(read, config, seed)
        ledger.record("passage", len(passages) + len(rejected), len(passages), rejected)
        rows = sentence_rows(passages)
    else:
        rows = document_rows(read)
    facts: dict[str, Any] = {"content_hash": content_hash} if content_hash is not None else {}
    facts |= repeated_claim(chunks(read, config))
    aside: list[Quarantined] = []
    if deriving is not None:
        asked = [instruction_row(record) for name in SPLITS for record in instructions[name]] if instructions else []
        derived, more = _derived(read, rows, asked, config, seed, split, deriving)
        rows, aside, facts = rows + derived.rows, derived.rejected, facts | more
    replayed, rejected = replay_rows(replay, rows, split) if replay is not None else ([], [])
    aside += rejected
    # A rewriting that is set aside was never a row of the data.
    ledger.record(
        "text", len(rows) + len(replayed) + len(aside), len(rows) + len(replayed), aside, writes=bool(deriving)
    )
    log_rows("text_candidates", ledger, "text", replayed=len(replayed), **facts)
    sources = fingerprint_table(dataset_fingerprints([replay.path if replay is not None else None]))
    texts = rows_dataset(rows + replayed, "text")
    return DatasetDict(rows=texts, sources=sources, **ledger.datasets())


def _derived(
    documents: list[Document],
    texts: list[TextRow],
    asked: list[InstructionRow],
    config: DocumentsConfig,
    seed: int,
    split: SplitConfig,
    setup: DerivingSetup,
) -> tuple["Derived", dict[str, Any]]:
    """The rewritings of the documents, and the facts about them to log."""
    from llm_engineering.generation.derived.rewritings import derive_texts, text_diversity
    from llm_engineering.models.tokenizer import load_tokenizer

    sentences, _ = cut_passages(documents, config.model_copy(update={"unit": "sentence"}), seed)
    passages = sentences if config.unit == "sentence" else cut_passages(documents, config, seed)[0]
    is_endpoint = setup.client.client != "local" and bool(setup.writing.rewritings)
    writer = open_client(setup.client, setup.model, setup.compute, Settings()) if is_endpoint else None
    tokenizer = None
    if setup.tokens is not None:
        tokenizer = load_tokenizer(setup.model, Settings(), setup.formatting.chat_template)
    derived = derive_texts(documents, passages, sentences, texts, asked, setup, split, writer, tokenizer, seed)
    return derived, {"diversity": text_diversity(derived.rows, asked, passages, split), **derived.facts}


@project_step(output_materializers=HFDatasetMaterializer)
def load(
    kind: str,
    path: str,
    test_path: str | None,
    format_name: str | None,
    columns: dict[str, str],
    content_hash: str,
    replay: str | None,
    replay_hash: str | None,
) -> Annotated[DatasetDict, "{kind}_candidates"]:
    """Read the user's own dataset of a kind and its test split, and add the general rows. `replay_hash` is of those."""
    data = DataConfig.model_validate({"format": format_name, "columns": columns})
    ledger = Ledger()
    folder = work_folder()
    loaded = load_rows(path, kind, data, folder / "rows.arrow", ledger, more=replayed_instructions(replay))
    candidates = DatasetDict(rows=loaded.rows)
    if test_path is not None:
        candidates["test_rows"] = load_rows(test_path, kind, data, folder / "test.arrow", ledger, "_test").rows
    facts = {"replay_hash": replay_hash} if replay_hash is not None else {}
    log_rows(f"{kind}_candidates", ledger, kind, path=path, content_hash=content_hash, format=loaded.format, **facts)
    sources = fingerprint_table(dataset_fingerprints([path, test_path, replay]))
    return DatasetDict(**candidates, sources=sources, **ledger.datasets())


@project_step(output_materializers=HFDatasetMaterializer)
def add_human(kind: str, rows: str, snapshot: str) -> Annotated[DatasetDict, "human_{rows}"]:
    """Read what people had said about the rows of a kind when the run began. `snapshot` is its hash."""
    human = read_snapshot(snapshot, kind, snapshots(Settings()))
    log_artifact(f"human_{rows}", **human_facts(human))
    return human


@project_step(output_materializers=HFDatasetMaterializer)
def prepare(
    kind: str,
    candidates: DatasetDict | None,
    checks: DataConfig,
    evaluation_hash: str | None,
    exam: ExamConfig | None,
    exam_hash: str | None,
    written: Directory | None = None,
    human: DatasetDict | None = None,
    instructions: DatasetDict | None = None,
) -> Annotated[DatasetDict, "{kind}_dataset"]:
    """Check, judge and split the rows of a kind. No row for training asks a question of the exam.

    `evaluation_hash` is of `data.decontaminate_against`. `written` is the exam that the run has written. `human` are the rows of
    people, which join the candidates; without candidates they are all rows. None of them that is trained on asks a question of
    the test split of `instructions`.
    """
    ledger = Ledger.load(candidates) if candidates is not None else Ledger()
    if human is not None:
        tested = instructions["test"] if instructions is not None else []
        held_out = {folded(instruction_row(record).prompt[-1:]) for record in tested}
        candidates = join_people(candidates, human, kind, checks, ledger, held_out)
    assert candidates is not None
    exam, exam_hash = with_written_questions(exam, exam_hash, written)
    if kind == "instruction" and written is not None:
        record_exam(ledger, written.path)
    questions = [row.question for row in read_exam(exam)] if exam is not None else []
    evaluation = load_evaluation(checks.decontaminate_against, checks.decontaminate_ngram, questions)
    own_test = candidates.get("test_rows")
    prepared = prepare_rows(candidates["rows"], kind, checks, ledger, work_folder(), own_test, evaluation)
    check_splits(prepared.splits, kind, ledger)
    splits = prepared.splits
    if kind == "instruction" and checks.wordings:
        trained = [instruction_row(record) for record in stream_records(splits["train"])]
        others = other_wordings(trained, checks.wordings, evaluation)
        ledger.add(kind, len(others))
        splits["train"] = concatenate_datasets([splits["train"], rows_dataset(others, "instruction")])
    if checks.human_weight > 1:
        again = repeated(splits["train"], kind, checks.human_weight)
        ledger.add(kind, len(again))
        splits["train"] = concatenate_datasets([splits["train"], again])
    facts: dict[str, Any] = {name: len(part) for name, part in splits.items()}
    hashes = {"evaluation_hash": evaluation_hash, "exam_hash": exam_hash}
    facts |= {name: digest for name, digest in hashes.items() if digest is not None}
    log_rows(f"{kind}_dataset", ledger, kind, **facts)
    return DatasetDict(**splits, **prepared.tables(), **ledger.datasets())


@project_step(output_materializers={"formatted_{stage}": HFDatasetMaterializer, "data_report": DirectoryMaterializer})
def format_rows(
    stage: str,
    kind: str,
    dataset: DatasetDict,
    model: ModelConfig,
    formatting: FormattingConfig,
    train_unfit: bool,
    epochs: float | None = None,
    comparing: list[str] | None = None,
) -> tuple[Annotated[DatasetDict, "formatted_{stage}"], Annotated[Directory, "data_report"]]:
    """Render and label the rows of a stage, and write the data report. Rows that are not fit to train on are refused.

    `epochs` is how often the stage reads the rows; None if the run only evaluates with them. `comparing` are the rewards
    of the stage that compare with accepted answers.
    """
    # transformers takes seconds to import, and a run that takes the steps of this module from the cache does without.
    from llm_engineering.formatting.datasets import format_splits
    from llm_engineering.formatting.prompt_rows import check_accepted
    from llm_engineering.formatting.template_check import check_chat_template
    from llm_engineering.models.tokenizer import load_tokenizer
    from llm_engineering.reports.data_report import refuse_unfit_data, write_data_report

    ledger = Ledger.load(dataset)
    folder = work_folder()
    splits = {name: dataset[name] for name in SPLITS}
    tokenizer = load_tokenizer(model, Settings(), formatting.chat_template)
    formatted, lengths = format_splits(splits, kind, tokenizer, formatting, folder, ledger)
    check_accepted(formatted, comparing or [])
    # Texts have no chat template.
    template = check_chat_template(tokenizer) if kind != "text" else []
    report = write_data_report(
        folder / "report",
        kind,
        ledger,
        dataset,
        lengths,
        formatting.max_length,
        epochs=epochs,
        template=template,
        facts=page_facts(model.name_or_path),
    )
    if not train_unfit:
        refuse_unfit_data(report, folder / "report", Settings().llm_output_dir / "unfit_data" / stage)
    unfit = {UNFIT: report["why"]} if report["why"] else {}
    log_rows(
        f"formatted_{stage}",
        ledger,
        kind,
        tokens=report["tokens"]["total"],
        tokens_to_train=report["tokens_to_train"],
        base_model=model.name_or_path,
    )
    log_rows("data_report", ledger, kind, **report["rows"], **unfit)
    return formatted, Directory(path=folder / "report")
