"""Asking a language model on this machine, through transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from clpl_moe.common.errors import UserError
from clpl_moe.synthesize.journal import Answer, Question


class LocalModel:
    """A causal language model, on a CUDA device where there is one, and how it is asked.

    Its chat template is used where its tokenizer has one.

    Args:
        model: folder or hub name.
        temperature: 0 takes the most likely token each time; above it, tokens are drawn.
        max_answer_tokens: longest answer.
        batch_size: questions at once.
        trust_remote_code: run code that the model's own folder holds.

    Attributes:
        requests: questions asked.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float = 0.7,
        max_answer_tokens: int = 256,
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from clpl_moe.encoder.bars import no_bar_of_weights

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                model, padding_side="left", trust_remote_code=trust_remote_code
            )
            with no_bar_of_weights():
                self._model = AutoModelForCausalLM.from_pretrained(
                    model, dtype="auto", trust_remote_code=trust_remote_code
                )
        except Exception as error:  # the tokenizers library raises plain ones, that of the weights its own
            raise UserError(f"{model}: cannot be loaded as a language model: {' '.join(str(error).split())}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
        self._generation: dict[str, Any] = {"max_new_tokens": max_answer_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._generation["temperature"] = temperature
        positions = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        self._longest_prompt = positions - max_answer_tokens
        self._batch_size = batch_size
        self.requests = 0

    def ask(self, questions: Iterable[Question], done: Callable[[Question, Answer | str], None]) -> None:
        """Ask everything, ``batch_size`` at once, and hand over each answer as it comes.

        Args:
            questions: in the order of asking.
            done: called with each question and its answer, or why there is none.

        Raises:
            UserError: a batch does not fit in memory.
        """
        remaining = iter(questions)
        while batch := [(question, self._tokens(question.prompt)) for question in islice(remaining, self._batch_size)]:
            for question, tokens in batch:
                if len(tokens) > self._longest_prompt:
                    done(question, f"prompt too long: {len(tokens)} tokens, the model takes {self._longest_prompt}")
            batch = [(question, tokens) for question, tokens in batch if len(tokens) <= self._longest_prompt]
            if not batch:
                continue
            self.requests += len(batch)
            for (question, _), answer in zip(batch, self._generate([tokens for _, tokens in batch])):
                done(question, answer)

    def _tokens(self, prompt: str) -> list[int]:
        if self._tokenizer.chat_template is None:
            return self._tokenizer(prompt, verbose=False)["input_ids"]
        # A model that reasons first would spend its tokens on that; other templates pass over the last argument.
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self._tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]

    def _generate(self, prompts: list[list[int]]) -> list[Answer]:
        import torch

        inputs = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)  # (B, L)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(  # type: ignore[misc]
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    pad_token_id=self._tokenizer.pad_token_id,
                    **self._generation,
                )
        except torch.OutOfMemoryError:
            raise UserError(f"{len(prompts)} questions at once do not fit in memory: lower concurrency") from None
        written = tokens[:, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=written.device).flatten()
        answers = []
        for prompt, row in zip(prompts, written):
            end = torch.isin(row, ends).nonzero().flatten()
            length = int(end[0]) if len(end) else len(row)
            text = self._tokenizer.decode(row[:length], skip_special_tokens=True)
            assert isinstance(text, str)  # a list for a batch only
            answers.append(Answer(text, len(end) == 0, len(prompt), min(length + 1, len(row))))
        return answers
