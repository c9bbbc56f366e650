"""What a run reads from outside, by hash."""

from pydantic import BaseModel


class Inputs(BaseModel):
    """Hashes of what a run reads from outside: a changed file is a changed parameter.

    Attributes:
        documents, instructions, preferences: of the files that the recipe names, with their test splits; None where
            it names none.
        evaluation: of the files in `data.decontaminate_against`; None where there are none.
        checks: of the user's own check and the folder of lm-eval's tasks; None where there are none.
        sft_recipe, dpo_recipe: of everything that decides the result of a training stage.
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
