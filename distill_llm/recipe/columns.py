"""The section `columns` of data: what the user's own columns are called."""

from pydantic import Field

from distill_llm.recipe.section import Section


class ColumnsSection(Section):
    """Names of the columns of the user's own data."""

    text: str | None = Field(default=None, description="column with the text, or the first of two")
    text_pair: str | None = Field(default=None, description="column with the second text of a pair")
    label: str | None = Field(default=None, description="column with the class or the number")
    prompt: str | None = Field(default=None, description="column with the prompt")
    response: str | None = Field(default=None, description="column with the response that the student learns")
    messages: str | None = Field(default=None, description="column with chats, in place of prompt and response")
    teacher_of: str | None = Field(
        default=None,
        description="column of the training rows that says which teacher teaches a row, by a name that teacher.ensemble knows"
        " (`teaches`)",
    )
