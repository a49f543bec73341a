"""Tasks that people ask for and that are not supported, by the names that they and their models go by."""

from collections.abc import Iterable

NAMES = {
    "token classification": ("ner", "pos", "token_classification", "conll2003"),
    "question answering on spans of a text": ("qa", "squad", "question_answering", "extractive_qa"),
    "sequence-to-sequence modelling": ("seq2seq", "summarization", "translation", "text2text_generation", "text2text"),
    "multiple choice": ("multiple_choice", "swag"),
    "image classification": ("image_classification", "image", "vision"),
    "speech recognition": ("automatic_speech_recognition", "asr", "audio"),
}
HEADS = {
    "ForTokenClassification": "token classification",
    "ForQuestionAnswering": "question answering on spans of a text",
    "ForConditionalGeneration": "sequence-to-sequence modelling",
    "ForMultipleChoice": "multiple choice",
    "ForImageClassification": "image classification",
    "ForCTC": "speech recognition",
}


def unsupported_task(name: str) -> str | None:
    """What a task of this name is, in words, where it is one of those not supported."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    return next((task for task, names in NAMES.items() if plain in names), None)


def unsupported_head(classes: Iterable[str]) -> str | None:
    """What a model of these classes is for, in words, where that is not supported."""
    return next((task for each in classes for head, task in HEADS.items() if each.endswith(head)), None)
