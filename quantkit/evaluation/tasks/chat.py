"""Conversations as texts, as lm-eval's own models make them: for tasks asked in the model's chat format."""

from typing import Any

import jinja2

from quantkit.errors import EvaluationError, first_line

Messages = list[dict[str, str]]


class ChatFormat:
    """The chat template of a tokenizer of transformers. Raises EvaluationError if it has none, or one that fails."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise EvaluationError(
                f"{tokenizer.name_or_path} has no chat template", fix="leave out --apply-chat-template"
            )

    def __call__(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """One text, up to where the answer begins or goes on; without the system's part, if the template takes none."""
        turns = [message for message in chat_history if message["role"] != "system"]
        try:
            try:
                return self._rendered(chat_history, add_generation_prompt)
            except jinja2.exceptions.TemplateError:
                return self._rendered(turns, add_generation_prompt)
        except Exception as error:  # a template is a program, whose mistakes are Python's errors too
            raise EvaluationError(
                f"{self._tokenizer.name_or_path}: its chat template cannot be used ({first_line(error)})",
                fix="correct the template, or leave out --apply-chat-template",
            ) from error

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
