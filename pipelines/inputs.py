"""The inputs of a run that are not in its recipe: hashes of files, and models of earlier runs."""

from pydantic import BaseModel, Field


class Inputs(BaseModel):
    """Inputs of a run that are not in its recipe. Files are hashes, so that a changed file is a changed parameter.

    Attributes:
        documents, instructions, preferences, labelled, prompts, replay, replay_instructions: hash of the files that the recipe
            names, with their test splits; None if it names none.
        people: for each kind of rows that people add to, the hash of what they said.
        judged: hash of the verdicts of blind comparisons; None if there are none.
        evaluation: hash of the files in `data.decontaminate_against`; None if there are none.
        checks: hash of the user's own check and the folder of lm-eval's tasks; None if there are none.
        rewards: hash of each file with rewards of the user's own, by its path.
        exam: hash of the exam's questions; None if there is no exam.
        recipes: for each stage, the hash of everything that decides its result.
        adapters: for each stage that an earlier run has trained, the id of its adapter's version.
        reward_models: for each stage whose reward `reward_model` names a version, and for `evaluation` if its `reward_model` is
            set, the id of this model's artifact version.
        incumbent: the version in production when the run begins; None if there is none.
        code: the project's commit, with `+changes` if files differ from it.
    """

    documents: str | None
    instructions: str | None
    preferences: str | None
    prompts: str | None = None
    labelled: str | None = None
    replay: str | None
    replay_instructions: str | None = None
    people: dict[str, str] = Field(default_factory=dict)
    judged: str | None = None
    evaluation: str | None
    checks: str | None
    rewards: dict[str, str] = Field(default_factory=dict)
    exam: str | None = None
    recipes: dict[str, str]
    code: str
    adapters: dict[str, str] = Field(default_factory=dict)
    reward_models: dict[str, str] = Field(default_factory=dict)
    incumbent: int | None = None
