"""The tools that load a model folder, and the call of each that gives the folder's own embeddings.

Tools differ in what they read of a folder: some take neither pooling nor prompts nor length from it. A tool's call states
all that this tool does not read. Model cards and ``clpl_moe.check`` show the same text, and the check runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.cli import nearest
from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import read_json
from clpl_moe.common.markup import as_python

if TYPE_CHECKING:
    from clpl_moe.encoder.settings import EmbeddingSettings

_HEADS = "sparse_linear.pt"
_POOLED = {"cls": "states[:, 0]", "mean": "(states * mask).sum(1) / mask.sum(1)", "last_token": "states[:, -1]"}


@dataclass(frozen=True)
class Model:
    """What calls state of a model folder; ``queries`` and ``passages`` are the texts to embed, as Python code."""

    folder: str
    settings: EmbeddingSettings
    max_length: int
    own_code: bool = False  # whether the folder holds code, such as that of experts
    heads: bool = False  # whether it has BGE-M3's sparse and multi-vector heads
    queries: str = '["…"]'
    passages: str = '["…"]'

    @property
    def path(self) -> str:
        return as_python(self.folder)

    @property
    def trust(self) -> str:
        return ", trust_remote_code=True" if self.own_code else ""

    @property
    def scales(self) -> bool:
        """Whether sentence-transformers has to be told to scale embeddings to length 1, since it truncates them after that."""
        return self.settings.normalize and self.settings.truncate_dim is not None

    @property
    def query(self) -> str:
        return as_python(self.settings.query_prompt)

    @property
    def passage(self) -> str:
        return as_python(self.settings.passage_prompt)


@dataclass(frozen=True)
class Tool:
    """A tool: its name, the package that it comes with, its call for a model, and the call that people begin with.

    ``call`` is Python code that leaves ``queries`` and ``passages``, sequences of vectors; ``usual`` does so with the tool's
    defaults. ``fits`` says why the tool cannot have a model's embeddings, None if it can.
    """

    name: str
    package: str
    call: Callable[[Model], str]
    usual: Callable[[Model], str]
    fits: Callable[[Model], str | None] = lambda model: None


def _transformers(m: Model) -> str:
    left = ', padding_side="left"' if m.settings.pooling == "last_token" else ""
    pooled = _POOLED[m.settings.pooling]
    if m.settings.truncate_dim is not None:
        pooled = f"({pooled})[:, :{m.settings.truncate_dim}]"
    return f"""\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({m.path}{left})
encoder = AutoModel.from_pretrained({m.path}{m.trust})


def embed(texts, prompt):
    texts = [prompt + text for text in texts]
    batch = tokenizer(texts, padding=True, truncation=True, max_length={m.max_length}, return_tensors="pt")
    with torch.no_grad():
        states, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return {f"torch.nn.functional.normalize({pooled}, dim=-1)" if m.settings.normalize else pooled}


queries = embed({m.queries}, {m.query})
passages = embed({m.passages}, {m.passage})
"""


def _transformers_usual(m: Model) -> str:
    return f"""\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({m.path})
encoder = AutoModel.from_pretrained({m.path}{m.trust})
with torch.no_grad():
    queries, passages = (
        encoder(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).last_hidden_state[:, 0]
        for texts in ({m.queries}, {m.passages})
    )
"""


def _sentence_transformers(m: Model) -> str:
    scaled = ", normalize_embeddings=True" if m.scales else ""
    return f"""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({m.path}{m.trust})
queries = model.encode_query({m.queries}{scaled})
passages = model.encode_document({m.passages}{scaled})
"""


def _sentence_transformers_usual(m: Model) -> str:
    return f"""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({m.path}{m.trust})
queries = model.encode({m.queries})
passages = model.encode({m.passages})
"""


def flag_embedding_arguments(folder: str | Path) -> dict[str, Any]:
    """What FlagEmbedding's loaders do not read from a model folder, as their keyword arguments: pooling, normalisation,
    prompts with their format, lengths.

    Raises:
        UserError: the folder's settings cannot be read.

    Example:
        >>> from FlagEmbedding import FlagModel  # doctest: +SKIP
        >>> model = FlagModel("runs/ko", **flag_embedding_arguments("runs/ko"))  # doctest: +SKIP
    """
    from clpl_moe.encoder.settings import read_stated

    stated = read_stated(folder)
    return _flag_arguments(stated.settings, stated.max_length)


def _flag_arguments(settings: EmbeddingSettings, max_length: int | None) -> dict[str, Any]:
    stated = {} if max_length is None else {"query_max_length": max_length, "passage_max_length": max_length}
    if settings.truncate_dim is not None:
        stated["truncate_dim"] = settings.truncate_dim
    return {
        "pooling_method": settings.pooling,
        "normalize_embeddings": settings.normalize,
        "query_instruction_for_retrieval": settings.query_prompt,
        "query_instruction_format": "{}{}",
        "passage_instruction_for_retrieval": settings.passage_prompt,
        "passage_instruction_format": "{}{}",
        **stated,
    }


def _flag(name: str, output: str = "") -> tuple[Callable[[Model], str], Callable[[Model], str]]:
    def call(m: Model) -> str:
        given = _flag_arguments(m.settings, m.max_length) | {"use_fp16": False}
        lines = "\n".join(f"    {key}={_literal(value)}," for key, value in given.items())
        trust = "    trust_remote_code=True,\n" if m.own_code else ""
        return f"""\
from FlagEmbedding import {name}

model = {name}(
    {m.path},
{trust}{lines}
)
queries = model.encode_queries({m.queries}){output}
passages = model.encode_corpus({m.passages}){output}
"""

    def usual(m: Model) -> str:
        return f"""\
from FlagEmbedding import {name}

model = {name}({m.path}{m.trust})
queries = model.encode_queries({m.queries}){output}
passages = model.encode_corpus({m.passages}){output}
"""

    return call, usual


def _literal(value: Any) -> str:
    return as_python(value) if isinstance(value, str) else repr(value)


def _fits_flag_model(m: Model) -> str | None:
    return "has no last_token pooling" if m.settings.pooling == "last_token" else None


def _fits_m3(m: Model) -> str | None:
    return None if m.heads else "for models with BGE-M3's heads"


def _langchain(m: Model) -> str:
    trust = '\n    model_kwargs={"trust_remote_code": True},' if m.own_code else ""
    scaled = ', "normalize_embeddings": True' if m.scales else ""
    return f"""\
from langchain_huggingface import HuggingFaceEmbeddings

embeddings = HuggingFaceEmbeddings(
    model_name={m.path},{trust}
    query_encode_kwargs={{"prompt": {m.query}{scaled}}},
    encode_kwargs={{"prompt": {m.passage}{scaled}}},
)
queries = [embeddings.embed_query(text) for text in {m.queries}]
passages = embeddings.embed_documents({m.passages})
"""


def _langchain_usual(m: Model) -> str:
    trust = ', model_kwargs={"trust_remote_code": True}' if m.own_code else ""
    return f"""\
from langchain_huggingface import HuggingFaceEmbeddings

embeddings = HuggingFaceEmbeddings(model_name={m.path}{trust})
queries = [embeddings.embed_query(text) for text in {m.queries}]
passages = embeddings.embed_documents({m.passages})
"""


def _llama_index(m: Model) -> str:
    trust = "\n    trust_remote_code=True," if m.own_code else ""
    return f"""\
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

embedding = HuggingFaceEmbedding(
    {m.path},{trust}
    query_instruction={m.query},
    text_instruction={m.passage},
    normalize={m.settings.normalize},
)
queries = [embedding.get_query_embedding(text) for text in {m.queries}]
passages = embedding.get_text_embedding_batch({m.passages})
"""


def _llama_index_usual(m: Model) -> str:
    return f"""\
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

embedding = HuggingFaceEmbedding({m.path}{m.trust})
queries = [embedding.get_query_embedding(text) for text in {m.queries}]
passages = embedding.get_text_embedding_batch({m.passages})
"""


def _chroma(m: Model) -> str:
    # Two of its functions for one folder would share one model, and so one prompt.
    trust = "\n    trust_remote_code=True," if m.own_code else ""
    scaled = ", normalize_embeddings=True" if m.scales else ""
    return f"""\
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction
from sentence_transformers import SentenceTransformer

function = SentenceTransformerEmbeddingFunction(
    {m.path},
    prompts={{"document": {m.passage}}},
    default_prompt_name="document",
    normalize_embeddings={m.settings.normalize},{trust}
)
model = SentenceTransformer({m.path}{m.trust})
passages = function({m.passages})  # what a collection with this embedding_function does
queries = model.encode_query({m.queries}{scaled})  # for collection.query(query_embeddings=queries)
"""


def _chroma_usual(m: Model) -> str:
    return f"""\
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

function = SentenceTransformerEmbeddingFunction({m.path}{m.trust})
queries = function({m.queries})
passages = function({m.passages})
"""


def _haystack(m: Model, query: str = "", passage: str = "") -> str:
    given = f"\n    model={m.path}," + ("\n    trust_remote_code=True," if m.own_code else "")
    return f"""\
from haystack import Document
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)

of_queries = SentenceTransformersTextEmbedder({given}{query}
)
of_passages = SentenceTransformersDocumentEmbedder({given}{passage}
)
of_queries.warm_up()
of_passages.warm_up()
queries = [of_queries.run(text)["embedding"] for text in {m.queries}]
documents = of_passages.run([Document(content=text) for text in {m.passages}])["documents"]
passages = [document.embedding for document in documents]
"""


def _haystack_call(m: Model) -> str:
    query, passage = (f'\n    encode_kwargs={{"prompt": {prompt}}},' for prompt in (m.query, m.passage))
    scaled = "\n    normalize_embeddings=True," if m.scales else ""
    return _haystack(m, query + scaled, passage + scaled)


TOOLS = [
    Tool("sentence-transformers", "sentence-transformers", _sentence_transformers, _sentence_transformers_usual),
    Tool("transformers", "transformers", _transformers, _transformers_usual),
    Tool("FlagModel", "FlagEmbedding", *_flag("FlagModel"), fits=_fits_flag_model),
    Tool("BGEM3FlagModel", "FlagEmbedding", *_flag("BGEM3FlagModel", '["dense_vecs"]'), fits=_fits_m3),
    Tool("LangChain", "langchain-huggingface", _langchain, _langchain_usual),
    Tool("LlamaIndex", "llama-index-embeddings-huggingface", _llama_index, _llama_index_usual),
    Tool("Chroma", "chromadb", _chroma, _chroma_usual),
    Tool("Haystack", "sentence-transformers-haystack", _haystack_call, _haystack),
]


def find_tools(names: Sequence[str] | None) -> list[Tool]:
    """The tools of these names, in their order, each once; None: all. Raises :class:`OptionError` for an unknown name."""
    known = {tool.name.lower(): tool for tool in TOOLS}
    for name in names or []:
        if name.lower() not in known:
            found = nearest(name, [tool.name for tool in TOOLS], "")
            raise OptionError("tools", f"found '{name}'{found}; choose of {', '.join(tool.name for tool in TOOLS)}")
    return TOOLS if names is None else [known[name] for name in dict.fromkeys(name.lower() for name in names)]


def describe(folder: str | Path, settings: EmbeddingSettings, max_length: int, name: str | Path | None = None) -> Model:
    """A saved model folder as its calls state it, under its own name or another."""
    file = Path(folder, "config.json")  # which the folder of an adapter lacks
    config = read_json(file, dict) if file.exists() else {}
    heads = Path(folder, _HEADS).exists()
    return Model(str(name or folder), settings, max_length, own_code="auto_map" in config, heads=heads)
