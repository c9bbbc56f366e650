"""The recipe's `generation` block: which model writes the datasets, what it writes, and what it may cost."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from llm_engineering.recipe.block import Block

# Fewer tokens do not hold an instruction in JSON, with its braces and its key.
MIN_JSON_TOKENS = 64

PartT = TypeVar("PartT", bound="Block")


class Prices(Block):
    """The prices of an endpoint, in US dollars for a million tokens."""

    input_per_million: float = Field(ge=0)
    output_per_million: float = Field(ge=0)


class ClientConfig(Block):
    """Which model writes, and where it runs: in this process, behind an OpenAI-compatible endpoint, or on Bedrock.

    `engine: vllm` runs the local model in vLLM on a CUDA card. The keys after `engine` are for endpoints. `response_format`
    says how the endpoint is asked for its answer: `json_schema` by a schema that it enforces, `prompt` by a schema in the
    prompt; `text` asks for no JSON, for small models that cannot write it. `max_total_tokens` and `max_cost_usd` limit each generated dataset; answers from
    the store of earlier answers count too.
    """

    client: Literal["local", "openai", "bedrock"] = "local"
    batch_size: int = Field(16, ge=1)
    engine: Literal["transformers", "vllm"] = "transformers"
    model: str | None = None
    base_url: str | None = None
    response_format: Literal["json_schema", "prompt", "text"] = "json_schema"
    temperature: float | None = Field(None, ge=0, le=2)
    concurrency: int = Field(8, ge=1)
    timeout_s: float = Field(60.0, gt=0)
    max_retries: int = Field(5, ge=0)
    max_total_tokens: int | None = Field(None, ge=1)
    max_cost_usd: float | None = Field(None, gt=0)
    prices: Prices | None = None

    @model_validator(mode="after")
    def _client(self) -> Self:
        if self.client == "local":
            for name in sorted(ClientConfig.model_fields.keys() - {"client", "batch_size", "engine"}):
                if getattr(self, name) != ClientConfig.model_fields[name].default:
                    raise ValueError(f"{name} has no effect with client local: remove it, or choose another client")
            return self
        if self.engine != "transformers":
            raise ValueError(f"engine has no effect with client {self.client}: remove it")
        if not self.model:
            raise ValueError(f"client {self.client} needs `model`, the endpoint's name of the model")
        if self.client == "bedrock" and self.base_url is not None:
            raise ValueError(
                "base_url belongs to client openai: remove it, boto3 derives Bedrock's address from the AWS region"
            )
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ValueError(f"base_url {self.base_url} is no address such as http://127.0.0.1:8000/v1")
            if url.username or url.password or url.query:
                raise ValueError("base_url may hold no password and no query: set the key as OPENAI_API_KEY")
        if self.max_cost_usd is not None and self.prices is None:
            raise ValueError("max_cost_usd needs `prices`, the cost of a token: set both, or remove max_cost_usd")
        return self


class JudgeConfig(ClientConfig):
    """The model that judges or grades answers, always at temperature 0. The keys are those of `generation`."""

    max_new_tokens: int = Field(64, ge=16)

    @model_validator(mode="before")
    @classmethod
    def _greedy(cls, keys: Any) -> Any:
        # This runs first. Otherwise ClientConfig's own validator would report `temperature` first, and advise the user
        # to choose another client.
        if isinstance(keys, dict) and keys.get("temperature") is not None:
            raise ValueError("temperature has no effect: a judge answers at temperature 0. Remove it")
        return keys


Style = Literal["question", "task", "how_to"]


class InstructionWriting(Block):
    """How passages become instruction rows: what is asked, the style of each question, and who writes the answer.

    With `questions: passage` the question is about the whole passage. With `fact` each passage is a sentence, the model
    continues examples with a question about one fact, and the answer is a few words of the sentence.
    `styles` are weights; a style is drawn for each passage with the seed. With `answers: document` the answer is the
    passage, word for word; with `model` the client writes the answer from the passage.
    `two_hop` is the most questions to make, by rule, that need two facts: "Who designed the lamp that is made in Ibbersea?"
    They need `questions: fact`.
    """

    questions: Literal["passage", "fact"] = "passage"
    question_max_new_tokens: int = Field(32, ge=1)
    styles: dict[Style, Annotated[float, Field(ge=0)]] = {"question": 1.0}  # noqa: RUF012 — pydantic copies defaults
    answers: Literal["document", "model"] = "document"
    answer_max_new_tokens: int | None = Field(None, ge=1)
    two_hop: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _writing(self) -> Self:
        if self.two_hop and self.questions != "fact":
            raise ValueError("two_hop joins two questions about facts: set questions to fact, or remove two_hop")
        if self.questions == "fact":
            for name in ("answers", "styles", "answer_max_new_tokens"):
                if getattr(self, name) != InstructionWriting.model_fields[name].default:
                    raise ValueError(
                        f"{name} has no effect with questions fact, whose answers are words of the sentence: remove it, or "
                        "set questions to passage"
                    )
        if not sum(self.styles.values()):
            raise ValueError("styles has no weight above 0, so nothing would be generated: set one, e.g. {question: 1}")
        if self.answers == "document" and self.answer_max_new_tokens is not None:
            raise ValueError("answer_max_new_tokens has no effect with answers document: remove it")
        if self.answers == "model" and self.answer_max_new_tokens is None:
            raise ValueError("with `answers: model`, answer_max_new_tokens must be set, e.g. to 512")
        return self


# What happens to a rejected answer that was cut.
RejectedCut = Literal["sentence", "drop", "keep"]


class PreferenceWriting(Block):
    """How instruction rows become preference pairs: the base model or the client writes the rejected answer.

    `rejected_cut` says what happens to an answer of the base model that reaches `rejected_max_new_tokens`, and to one of a
    blind comparison that reaches `evaluation.max_new_tokens`: it ends at its last whole sentence (`sentence`; without a
    whole one the pair is set aside), the pair is set aside (`drop`), or the answer stays as it is (`keep`), and then DPO
    teaches not to stop within a sentence.

    With `unanswerable` above 0, that many questions are made that the documents do not answer. The chosen answer says so, and
    the rejected one is what the model of the stage before DPO makes up. That model also answers all instructions: its wrong
    answers are rejected, and where it is right, the answer of another question, or for some to decline.
    """

    rejected_by: Literal["base", "client"] = "base"
    rejected_max_new_tokens: int = Field(64, ge=1)
    rejected_cut: RejectedCut = "sentence"
    rejected_temperature: float = Field(1.0, ge=0)
    max_preferences: int | None = Field(None, ge=1)
    unanswerable: int = Field(0, ge=0)


# Other forms in which the texts of `cpt` say what the documents say.
Rewriting = Literal["faq", "dialogue", "list", "reordered", "summary", "reworded"]
# The kinds that rules make of the documents and the questions, and those that the model of an endpoint writes.
BY_RULE: tuple[Rewriting, ...] = ("faq", "dialogue", "list", "reordered")
BY_ENDPOINT: tuple[Rewriting, ...] = ("summary", "faq", "list", "dialogue", "reworded")
# The kinds that rules make of accepted questions.
FROM_QUESTIONS: tuple[Rewriting, ...] = ("faq", "dialogue")


class TextWriting(Block):
    """The rewritings that continued pre-training reads beside the documents, because facts are learned in many wordings.

    With client `local` rules make the kinds `faq` (questions and answers under a title), `dialogue`, `list` (the sentences
    of each section under its title) and `reordered` (sentences about the same name together, in another order), from the
    documents and the accepted questions. An endpoint writes `summary`, `faq`, `list`, `dialogue` and `reworded` from each
    passage. Only the documents that are trained on are rewritten. `knowledge.tokens` limits the rewritings.
    """

    rewritings: list[Rewriting] = []  # noqa: RUF012 — pydantic copies defaults
    rewriting_max_new_tokens: int = Field(512, ge=MIN_JSON_TOKENS)

    @model_validator(mode="after")
    def _once(self) -> Self:
        twice = next((kind for kind in self.rewritings if self.rewritings.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f"rewritings names {twice} twice: remove one of them")
        return self


class GenerationConfig(ClientConfig, InstructionWriting, PreferenceWriting, TextWriting):
    """How datasets are written from documents. A step gets only the parts that it uses, so that
    a change of another part does not invalidate its cached result.
    """

    @model_validator(mode="after")
    def _questions(self) -> Self:
        if self.questions == "fact" and self.client != "local":
            raise ValueError(
                f"questions fact needs client local, because the model continues a text and client {self.client} answers "
                "messages: set questions to passage, or client to local"
            )
        return self

    @model_validator(mode="after")
    def _rejected_by(self) -> Self:
        if self.rejected_by == "client" and self.client == "local":
            raise ValueError("rejected_by client is for endpoints: client local is the base model already, so set base")
        return self

    @model_validator(mode="after")
    def _unanswerable(self) -> Self:
        if self.unanswerable and (self.questions != "fact" or self.max_preferences is not None):
            raise ValueError(
                "unanswerable needs questions fact, and pairs of all of them: set questions to fact and max_preferences to "
                "null, or unanswerable to 0"
            )
        return self

    @model_validator(mode="after")
    def _rewritings(self) -> Self:
        default = TextWriting.model_fields["rewriting_max_new_tokens"].default
        if self.rewriting_max_new_tokens != default and (self.client == "local" or not self.rewritings):
            raise ValueError(
                "rewriting_max_new_tokens has no effect, because only an endpoint writes rewritings, and only with "
                "rewritings: remove it"
            )
        if self.rewritings and self.client != "local" and self.response_format == "text":
            raise ValueError(
                "rewritings are written as JSON by an endpoint, and response_format text is for models that cannot write it: "
                "set response_format to json_schema or prompt, or remove rewritings"
            )
        able, other = (BY_RULE, BY_ENDPOINT) if self.client == "local" else (BY_ENDPOINT, BY_RULE)
        unable = next((kind for kind in self.rewritings if kind not in able), None)
        if unable is not None:
            writer = "an endpoint writes" if self.client == "local" else "client local makes"
            raise ValueError(
                f"rewritings: client {self.client} cannot make {unable}, which {writer}: choose among {', '.join(able)}, or "
                f"use {'client openai or bedrock' if self.client == 'local' else 'client local'}, which has "
                f"{', '.join(other)}"
            )
        return self

    @property
    def rejecting_client(self) -> ClientConfig:
        """The client that writes the rejected answers."""
        return ClientConfig(batch_size=self.batch_size) if self.rejected_by == "base" else self.part(ClientConfig)

    def part(self, block: type[PartT]) -> PartT:
        """One of the four parts, e.g. ClientConfig."""
        return block.model_validate(self.model_dump(include=set(block.model_fields)))
