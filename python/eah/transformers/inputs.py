"""From questions and pictures to model inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompts:
    """What a processor is given for questions about one picture each.

    suffix: ends every question. form: with "<image>" where the picture is and "{}" where the question is; None: the
    processor's chat template or, without one, the picture first.

    Raises:
        ValueError: form has no place for the question.
    """

    processor: Any
    suffix: str = ""
    form: str | None = None

    def __post_init__(self):
        check_form(self.form)

    def text(self, question: str) -> str:
        """
        Raises:
            ValueError: the processor has neither an image token nor a chat template.
        """
        question += self.suffix
        token = getattr(self.processor, "image_token", None)
        if self.form is None and getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if not isinstance(token, str):
            raise ValueError(f"{type(self.processor).__name__} has no image token: it is of no vision-language model")
        form = "<image>\n{}" if self.form is None else self.form
        return form.replace("<image>", token).replace("{}", question)

    def inputs(self, texts: list[str], pictures: list) -> Any:
        """A batch; several prompts are padded on the left, for which the processor's tokenizer is set up."""
        tokenizer, several = self.processor.tokenizer, len(texts) > 1
        if several:
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
        begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        options = {"add_special_tokens": False} if begun else {}
        images = [[picture] for picture in pictures]
        return self.processor(text=texts, images=images, padding=several, return_tensors="pt", **options)


def check_form(form: str | None, called: str = "form") -> None:
    """Raises ValueError for a form that leaves the question out. called: what the user gave it as."""
    if form is not None and "{}" not in form:
        raise ValueError(f"{called} must have {{}} where the question is, got {form!r}")


def prepare(processor, picture, question: str) -> Any:
    """The model inputs of one question and its picture."""
    prompts = Prompts(processor)
    return prompts.inputs([prompts.text(question)], [picture])
