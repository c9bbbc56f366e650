"""What a run takes from outside: files by hash, and the model that it is compared with."""

from pydantic import BaseModel


class Inputs(BaseModel):
    """What a run takes from outside: a changed file is a changed parameter.

    Attributes:
        documents, instructions, preferences: of the files that the recipe names, with their test splits; None where
            it names none.
        evaluation: of the files in `data.decontaminate_against`; None where there are none.
        checks: of the user's own check and the folder of lm-eval's tasks; None where there are none.
        sft_recipe, dpo_recipe: of everything that decides the result of a training stage.
        incumbent: the version in production when the run begins; None where there is none.
        code: the commit of this project, with `+changes` if files differ from it.
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
