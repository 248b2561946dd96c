"""Asking a language model on this machine, through transformers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clpl_moe.common.errors import OptionError, UserError, one_line
from clpl_moe.common.options import refuse_revision_of_folder
from clpl_moe.encoder.hub import asked
from clpl_moe.encoder.load import is_nowhere, not_found, try_tokenizer
from clpl_moe.encoder.weights import no_bar_of_weights
from clpl_moe.llm.backends import Answer, Done, Question
from clpl_moe.llm.options import AskingArguments


class LocalModel:
    """A causal language model, on a CUDA device where there is one, asked through its chat template where it has one."""

    def __init__(self, arguments: AskingArguments, trust_remote_code: bool) -> None:
        model = arguments.model
        hub = {"revision": arguments.revision}
        refuse_revision_of_folder(model, arguments.revision)
        if is_nowhere(model, hub, "config.json"):
            raise not_found(model, hub)
        code: dict[str, Any] = {"trust_remote_code": trust_remote_code, **asked(hub, model)}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", **code)
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            if self._tokenizer.pad_token is None:
                raise ValueError("its tokenizer has neither a token for padding nor one for the end")
            self._tokens("a")  # with its chat template
            try_tokenizer(self._tokenizer)
            with no_bar_of_weights():
                self._model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **code)
        except Exception as error:  # the tokenizers library raises plain ones, that of the weights its own
            raise UserError(f"{model}: cannot be loaded as a language model: {one_line(error)}") from None
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
        temperature = arguments.local_temperature if arguments.temperature is None else arguments.temperature
        most = arguments.max_answer_tokens or arguments.local_answer_tokens
        self._generation: dict[str, Any] = {"max_new_tokens": most, "do_sample": temperature > 0}
        if temperature > 0:
            self._generation["temperature"] = temperature
        positions = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        if most >= positions:
            raise OptionError("max_answer_tokens", f"found {most}, {model} takes {positions} tokens with the prompt")
        self._longest_prompt = positions - most
        self._batch_size = arguments.concurrency
        self.requests = 0
        try:
            self._generate([self._tokens("a")], max_new_tokens=1, do_sample=False)
        except Exception as error:  # of files that are read as they are used only, such as generation_config.json
            raise UserError(f"{model}: cannot be used as a language model: {one_line(error)}") from None

    def ask(self, questions: Iterable[Question], done: Done) -> None:
        """See :class:`Backend`; questions of a batch are answered together."""
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

    def _generate(self, prompts: list[list[int]], **other: Any) -> list[Answer]:
        inputs = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)  # (B, L)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(  # type: ignore[misc]
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    pad_token_id=self._tokenizer.pad_token_id,
                    **self._generation | other,
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
