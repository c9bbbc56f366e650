"""The inputs of a run that are not in its recipe: hashes of files, and the model in production."""

from pydantic import BaseModel


class Inputs(BaseModel):
    """Inputs of a run that are not in its recipe. Files are hashes, so that a changed file is a changed parameter.

    Attributes:
        documents, instructions, preferences: hash of the files that the recipe names, with their test splits; None if
            it names none.
        evaluation: hash of the files in `data.decontaminate_against`; None if there are none.
        checks: hash of the user's own check and the folder of lm-eval's tasks; None if there are none.
        sft_recipe, dpo_recipe: hash of everything that decides the result of the training stage.
        incumbent: the version in production when the run begins; None if there is none.
        code: the project's commit, with `+changes` if files differ from it.
    """

    documents: str | None
    instructions: str | None
    preferences: str | None
    evaluation: str | None
    checks: str | None
    sft_recipe: str
    dpo_recipe: str
    code: str
    incumbent: int | None = None
