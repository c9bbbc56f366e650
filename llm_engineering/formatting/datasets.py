"""Formats datasets as token ids.

Over-long rows are cut or quarantined, and texts are divided. Rows that spell special tokens are quarantined.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, Value
from transformers import PreTrainedTokenizerBase

from llm_engineering.data.ledger import Ledger
from llm_engineering.data.rows import (
    AT_LAST_SENTENCE,
    REPLAY,
    SPLITS,
    InstructionRow,
    PreferenceRow,
    PromptRow,
    Quarantined,
    Row,
    TextRow,
    read_row,
    written_as,
)
from llm_engineering.data.storage import TableWriter, stream_records, work_folder
from llm_engineering.errors import RequestError, WorkError
from llm_engineering.formatting.columns import COLUMNS, piece_records, row_record
from llm_engineering.formatting.control_tokens import ControlTokens
from llm_engineering.formatting.prompt_rows import PromptTokens, prompt_tokens
from llm_engineering.formatting.render import (
    IGNORE_INDEX,
    Pair,
    Rendered,
    Tokens,
    UnrenderableError,
    prompt_length,
    render,
    text_tokens,
)
from llm_engineering.progress import Progress, counted
from llm_engineering.recipe.data_blocks import FormattingConfig

_FINDINGS = Features(dict.fromkeys(("id", "source", "rule", "detail"), Value("string")))
SAMPLE_ROWS = 5
_BATCH_ROWS = 256


class FormattedRow(NamedTuple):
    """A row as token ids.

    Attributes:
        records: the columns that the trainer reads: one record, or one for each piece of a text; none for a quarantined
            row.
        length: tokens before the row is cut; of a pair, prompt and longer answer; 0 if the row cannot be tokenised.
        rejected: the quarantine record, or None.
        truncated: what was cut off, or empty.
        respaced: whether the chat template changed the white space of an answer.
        rule: how it was cut: `truncated` at the end, or `oldest_turns_dropped`.
    """

    row: Row
    records: list[dict[str, Any]]
    length: int
    rejected: Quarantined | None
    truncated: str = ""
    respaced: bool = False
    rule: str = "truncated"


class Trained(NamedTuple):
    """Rows of the training split, and their tokens in one epoch."""

    rows: int
    tokens: int


class Lengths:
    """Counts the lengths of rows in tokens and in turns, and lists the rows that were cut.

    Memory holds one number for each distinct length, and for each document of a held-out split.

    Attributes:
        kept: rows of each split, and pieces of texts, by their length after cutting.
        all: rows by their length before cutting, quarantined rows included.
        turns: kept rows by their turns.
        trained: kept rows of the training split, or pieces of texts, and their tokens, by `written_as`.
        documents: kept rows, or pieces of texts, of each held-out split by their document; "" for those without one.
        replayed: kept rows, or pieces of texts, of general datasets, which are trained on beside the data.
        ended: kept pairs whose rejected answer was cut and ends at its last whole sentence.
        respaced: kept rows in which the chat template changed the white space of an answer.
        samples: the first SAMPLE_ROWS kept rows of each split.
        truncated: a table of findings with the rows that were cut.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Counter[int]] = {}
        self.all: Counter[int] = Counter()
        self.turns: Counter[int] = Counter()
        self.trained: dict[str, Trained] = {}
        self.documents: dict[str, Counter[str]] = {}
        self.replayed = 0
        self.ended = 0
        self.respaced = 0
        self.samples: list[tuple[str, Row]] = []
        self.truncated = TableWriter(work_folder() / "truncated.arrow", _FINDINGS)

    def add(self, split: str, formatted: FormattedRow) -> None:
        """Count a row of a split."""
        if formatted.length:
            self.all[formatted.length] += 1
        if formatted.rejected is None:
            kept = self.kept.setdefault(split, Counter())
            for record in formatted.records:
                kept[_trained_length(record)] += 1
            row = formatted.row
            if split == "train":
                before = self.trained.get(written_as(row), Trained(0, 0))
                tokens = sum(map(_trained_length, formatted.records))
                self.trained[written_as(row)] = Trained(before.rows + len(formatted.records), before.tokens + tokens)
            elif split in SPLITS:
                self.documents.setdefault(split, Counter())[row.document] += len(formatted.records)
            self.replayed += len(formatted.records) if row.origin == REPLAY else 0
            self.ended += row.origin.endswith(AT_LAST_SENTENCE)
            self.respaced += formatted.respaced
            if formatted.truncated:
                names = {"id": row.id, "source": row.source}
                self.truncated.write({**names, "rule": formatted.rule, "detail": formatted.truncated})
            self.turns[len(row.prompt) + (0 if isinstance(row, PromptRow) else len(row.answers[0]))] += 1
            if sum(name == split for name, _ in self.samples) < SAMPLE_ROWS:
                self.samples.append((split, row))


def _trained_length(record: Mapping[str, Any]) -> int:
    if "input_ids" in record:
        return len(record["input_ids"])
    if "answers" in record:
        return len(record["prompt_ids"])
    if "completion_ids" in record:
        return len(record["prompt_ids"]) + len(record["completion_ids"])
    return len(record["prompt_ids"]) + max(len(record["chosen_ids"]), len(record["rejected_ids"]))


def format_rows(
    rows: Iterable[Row], stage: str, tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> Iterator[FormattedRow]:
    """Token ids of each row, or its quarantine record.

    Raises:
        WorkError: there is no chat template, or a row is over-long under `over_long: raise`.
    """
    control = ControlTokens(tokenizer)
    remaining = iter(rows)
    # The library tokenizers spreads a batch over the cores.
    while batch := list(islice(remaining, _BATCH_ROWS)):
        special = [control.spelt_in(row) for row in batch]
        rest = [row for row, token in zip(batch, special, strict=True) if not token]
        texts = [row for row in rest if isinstance(row, TextRow)]
        prompts = [row for row in rest if isinstance(row, PromptRow)]
        turns = [row for row in rest if not isinstance(row, TextRow | PromptRow)]
        # All rows are of one kind.
        rendered = iter(
            [
                *(text_tokens(texts, tokenizer) if texts else []),
                *prompt_tokens(prompts, tokenizer),
                *render(turns, tokenizer, config.max_length),
            ]
        )
        for row, token in zip(batch, special, strict=True):
            if token:
                detail = f"its text spells {token}, which the tokenizer would read as the token itself"
                yield _set_aside(row, stage, "special_token_in_text", detail)
            else:
                formatted = _fitted(row, stage, next(rendered), config)
                if (
                    config.over_long == "drop_oldest_turns"
                    and not isinstance(row, PromptRow)
                    and formatted.length
                    and formatted.rejected is not None
                ):
                    formatted = _with_newest_turns(row, formatted, stage, tokenizer, config)
                yield formatted


def _with_newest_turns(
    row: Row, over_long: FormattedRow, stage: str, tokenizer: PreTrainedTokenizerBase, config: FormattingConfig
) -> FormattedRow:
    """Format an over-long row without as few of its oldest exchanges as possible; as before if its last one does not fit.

    The system message stays. The records have the id of the whole row.
    """
    # Texts are cut into pieces instead.
    assert isinstance(row, InstructionRow | PreferenceRow)
    shorter = [_without_exchanges(row, count) for count in range(1, _exchanges(row))]
    formatted: dict[int, FormattedRow] = {}

    def fits(number: int) -> bool:
        (rendered,) = render([shorter[number]], tokenizer, config.max_length)
        formatted[number] = _fitted(shorter[number], stage, rendered, config)
        return formatted[number].rejected is None

    number = bisect_left(range(len(shorter)), True, key=fits)
    if number == len(shorter):
        return over_long
    detail = f"it has {over_long.length} tokens or more, formatting.max_length is {config.max_length}: without its first {number + 1} exchanges"
    records = [{**record, "id": row.id, "truncated": True} for record in formatted[number].records]
    respaced = formatted[number].respaced
    return FormattedRow(row, records, over_long.length, None, detail, respaced, rule="oldest_turns_dropped")


def _exchanges(row: Row) -> int:
    """The number of user turns with an answer."""
    turns = [*row.prompt, *row.answers[0]] if isinstance(row, InstructionRow) else row.prompt
    return sum(turn.role == "user" for turn in turns)


def _without_exchanges(row: InstructionRow | PreferenceRow, count: int) -> InstructionRow | PreferenceRow:
    """The row without its `count` oldest user turns and their answers."""
    start = 1 if row.prompt[0].role == "system" else 0
    kept = len(row.prompt) - start - 2 * count
    if kept > 0:
        return row.model_copy(update={"prompt": [*row.prompt[:start], *row.prompt[start + 2 * count :]]})
    # The prompt ends with a user turn. What is left to drop begins with its answer.
    assert isinstance(row, InstructionRow)
    rest = row.completion[-kept:]
    return row.model_copy(update={"prompt": [*row.prompt[:start], rest[0]], "completion": rest[1:]})


def _fitted(row: Row, stage: str, tokens: Rendered | PromptTokens, config: FormattingConfig) -> FormattedRow:
    if isinstance(row, TextRow):
        assert isinstance(tokens, Tokens)
        return FormattedRow(row, piece_records(row, tokens, config.max_length), len(tokens.input_ids), None)
    if isinstance(tokens, UnrenderableError):
        return _set_aside(row, stage, tokens.reason, str(tokens))
    if isinstance(tokens, list):
        return _fitted_answers(row, stage, tokens, config)
    if isinstance(tokens, Tokens):
        start, length = prompt_length(tokens), len(tokens.input_ids)
    elif isinstance(tokens, PromptTokens):
        start = length = len(tokens.prompt_ids)
    else:
        start = len(tokens.prompt_ids)
        length = start + max(len(tokens.chosen_ids), len(tokens.rejected_ids))
    if length <= config.max_length:
        record = row_record(row, tokens, config, truncated=False)
        return FormattedRow(row, [record], length, None, respaced=tokens.respaced)
    fits_prompt = start < config.max_length
    # The later turns of a conversation are not rendered once it is too long.
    detail = (
        f"it has {'at least ' if len(row.answers[0]) > 1 else ''}{length} tokens"
        if fits_prompt
        else f"its prompt alone has {start} tokens"
    )
    detail += f", formatting.max_length is {config.max_length}"
    if config.over_long == "raise":
        raise WorkError(
            f"Row {row.id} ({row.source}) is over-long: {detail}, and the recipe has formatting.over_long: raise. "
            "Raise max_length, shorten the row, or set over_long to drop, drop_oldest_turns or truncate."
        )
    if config.over_long == "truncate" and fits_prompt and not isinstance(tokens, PromptTokens):
        cut = _cut(tokens, config.max_length)
        if isinstance(cut, Pair) and cut.chosen_ids == cut.rejected_ids:
            detail += ", and both answers are the same up to that length"
            return _set_aside(row, stage, "over_long", detail, length)
        detail += "; the rest is cut off, and the end of its answer is not trained"
        return FormattedRow(row, [row_record(row, cut, config, truncated=True)], length, None, detail, tokens.respaced)
    return _set_aside(row, stage, "over_long" if fits_prompt else "over_long_prompt", detail, length)


def _fitted_answers(row: Row, stage: str, answers: Sequence[Tokens], config: FormattingConfig) -> FormattedRow:
    """Fit the answers of a conversation one by one. Under `truncate`, those whose prompt does not fit are left out."""
    parts = [_fitted(row, stage, tokens, config) for tokens in answers]
    length = max(part.length for part in parts)
    unfit = next((part for part in parts if part.rejected is not None), None)
    records = [record for part in parts for record in part.records]
    if unfit is not None and (config.over_long != "truncate" or not records):
        # Where the first answer fits, the conversation is too long, although the prompt of a later one alone does not fit.
        reason = {"reason": "over_long"} if records and unfit.rejected is not None else {}
        return FormattedRow(row, [], length, unfit.rejected and unfit.rejected.model_copy(update=reason))
    truncated = next((part.truncated for part in parts if part.truncated), "")
    if unfit is not None:
        truncated = f"{len(records)} of its answers are kept; before the next one its prompt alone fills max_length"
    return FormattedRow(row, records, length, None, truncated, any(part.respaced for part in parts))


def _cut(tokens: Tokens | Pair, max_length: int) -> Tokens | Pair:
    """Cut a row to `max_length`. The prompt stays whole, and a conversation ends with its last trained token."""
    if isinstance(tokens, Pair):
        room = max_length - len(tokens.prompt_ids)
        return Pair(tokens.prompt_ids, tokens.chosen_ids[:room], tokens.rejected_ids[:room])
    labels = tokens.labels[:max_length]
    while labels[-1] == IGNORE_INDEX:
        labels.pop()
    return Tokens(tokens.input_ids[: len(labels)], labels)


def _set_aside(row: Row, stage: str, reason: str, detail: str, length: int = 0) -> FormattedRow:
    return FormattedRow(row, [], length, Quarantined.of_row(row, stage, reason, detail))


def format_splits(
    splits: Mapping[str, Dataset],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    config: FormattingConfig,
    folder: Path,
    ledger: Ledger,
) -> tuple[DatasetDict, Lengths]:
    """Format the splits of a dataset, and count the lengths of their rows.

    Instruction rows get the columns `input_ids`, `labels` (-100 for tokens that are not trained) and `prompt_tokens` (the
    tokens before the first answer); preference rows get `prompt_ids`, `chosen_ids` and `rejected_ids`; labelled rows get
    `prompt_ids`, `completion_ids` and `label`; prompts get `prompt_ids`, `prompt` (messages) and `answers` (accepted ones).
    `truncated` marks a row that was cut. In the split `test` only answers have labels, even with `train_on_prompt`, so that losses are
    comparable.

    Text rows get `input_ids` and `labels` of every token; a text of more than `max_length` tokens becomes several rows.

    Args:
        ledger: records the quarantined rows. A test split of the user's own has its own stage, e.g. `instruction_test`.

    Raises:
        WorkError: there is no chat template, or a row is over-long under `over_long: raise`.
        RequestError: no row of a split is left.
    """
    own_test = f"{kind}_test"
    stages = {name: own_test if name == "test" and own_test in ledger.kept else kind for name in splits}
    to_row = partial(read_row, kind=kind)
    datasets = DatasetDict()
    lengths = Lengths()
    kept: dict[str, int] = {}
    progress = Progress(f"{kind} rows tokenised", sum(map(len, splits.values())))
    for name, split in splits.items():
        reasons: Counter[str] = Counter()
        kept[name] = 0
        labelled = config.model_copy(update={"train_on_prompt": config.train_on_prompt and name != "test"})
        with TableWriter(folder / f"formatted-{name}.arrow", COLUMNS[kind]) as table:
            for formatted in format_rows(map(to_row, stream_records(split)), kind, tokenizer, labelled):
                lengths.add(name, formatted)
                if formatted.rejected is None:
                    kept[name] += 1
                    for record in formatted.records:
                        table.write(record)
                else:
                    reasons[formatted.rejected.reason] += 1
                    ledger.set_aside([formatted.rejected.model_copy(update={"stage": stages[name]})])
                progress.advance()
        if not table.rows:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise RequestError(
                f"All {counted(len(split), 'row')} of the {name} split were set aside while formatting ({counts}). "
                "If they are over-long, raise formatting.max_length. If the chat template cannot render them, name another "
                "one in formatting.chat_template, e.g. chatml."
            )
        datasets[name] = table.dataset()
    for stage in dict.fromkeys(stages.values()):
        names = [name for name in splits if stages[name] == stage]
        ledger.record(stage, sum(len(splits[name]) for name in names), sum(kept[name] for name in names))
    return datasets, lengths
