"""The encoder with all that belongs to it: model, tokenizer, pooling, prompts, lengths, precision."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.files import share
from clpl_moe.encoder.adapter import CONFIG_FILE, has_adapter, save_adapter
from clpl_moe.encoder.encode import Kind, encode, tokenize
from clpl_moe.encoder.load import load_encoder
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from clpl_moe.encoder.precision import autocast, compute_dtype
from clpl_moe.encoder.settings import EmbeddingSettings, longest_input, pool, stated_by_folder, write_settings
from clpl_moe.encoder.weights import HEAD_FILES, find_heads, model_fingerprint, no_bar_of_weights
from clpl_moe.moe.inject import refuse_foreign_experts
from clpl_moe.moe.install import has_experts
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES

logger = logging.getLogger(__name__)


@dataclass(init=False, eq=False)
class Encoder:
    """Model, tokenizer and all that decides their embeddings: to encode, to train, to save.

    Args:
        model: its output has ``last_hidden_state``. With experts it can be saved if it is an XLM-R, RoBERTa or BERT.
        tokenizer: the model's.
        settings: pooling, normalisation and prompts. None: those of the folder that the model was loaded from by this
            package, otherwise BGE-M3's.
        max_length: longest input in tokens. None: as its folder states, otherwise the tokenizer's limit; no more than the
            model's positions.
        compute_dtype: precision to compute in while the weights are float32. None: bfloat16 where the device is fast at it.
        head_files: BGE-M3's sparse and multi-vector heads that are saved along, name to place on this disk. None: it is
            not known whether the model has any.

    Raises:
        UserError: ``settings`` is None and those of the model's folder cannot be computed.

    Example:
        >>> encoder = Encoder.load("BAAI/bge-m3")  # doctest: +SKIP
        >>> queries = encoder.encode_queries(["대한민국의 수도는?"])  # doctest: +SKIP
        >>> passages = encoder.encode_passages(["서울은 대한민국의 수도이다.", "부산은 항구 도시이다."])  # doctest: +SKIP
        >>> queries @ passages.T  # doctest: +SKIP
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    settings: EmbeddingSettings
    max_length: int
    compute_dtype: torch.dtype | None
    head_files: Mapping[str, str] | None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EmbeddingSettings | None = None,
        max_length: int | None = None,
        compute_dtype: torch.dtype | None = None,
        head_files: Mapping[str, str] | None = MappingProxyType({}),
    ) -> None:
        stated = stated_by_folder(model)
        if settings is None and stated.fault is not None:
            raise UserError(stated.fault)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or stated.settings
        self.max_length = max_length or longest_input(model, tokenizer, stated.max_length)
        self.compute_dtype = compute_dtype
        self.head_files = None if head_files is None else dict(head_files)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        settings: EmbeddingSettings | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        tokenizer: str | Path | None = None,
        truncate_dim: int | None = None,
    ) -> Encoder:
        """Load an encoder from a folder or by its name on the hub, in evaluation mode.

        ``path`` and ``revision`` are what :func:`load_encoder` takes, and ``tokenizer`` the folder or hub name of another tokenizer. ``settings``
        take the place of those that the folder states. ``dtype`` is the weights', ``compute_dtype`` is :class:`Encoder`'s.
        Without ``device`` it is a CUDA device where there is one. ``trust_remote_code`` lets code of the folder run.
        ``truncate_dim`` takes the place of that of the settings: embeddings have only their first so many dimensions, and
        :meth:`save` writes this into the folder.

        Raises:
            UserError: nothing is found at ``path``, it cannot be loaded, its settings cannot be computed, or ``truncate_dim``
                is more dimensions than the model has.
        """
        hub = {"cache_dir": cache_dir, "token": token, "revision": revision}
        model, loaded_tokenizer = load_encoder(
            path, dtype=dtype, trust_remote_code=trust_remote_code, tokenizer=tokenizer, **hub
        )
        try:
            heads = find_heads(path, **hub)
        except UserError:  # whoever needs them asks again
            heads = None
        encoder = cls(model, loaded_tokenizer, settings, compute_dtype=compute_dtype, head_files=heads)
        if truncate_dim is not None:
            encoder.truncate_to(truncate_dim)
        return encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the encoder computes in on its device."""
        return compute_dtype(self.model, self.compute_dtype)

    @property
    def dimensions(self) -> int:
        """The dimensions of an embedding."""
        whole = self.model.config.hidden_size
        return min(whole, self.settings.truncate_dim or whole)

    def truncate_to(self, dimensions: int) -> Encoder:
        """Leave only the first ``dimensions`` of embeddings, as a model allows that was trained with ``matryoshka_dims``; in
        place. Raises :class:`OptionError`, a :class:`UserError`, where the model has fewer."""
        whole = self.model.config.hidden_size
        if not 1 <= dimensions <= whole:
            raise OptionError("truncate_dim", f"found {dimensions}, expected 1 to {whole}, the model's dimensions")
        self.settings = dataclasses.replace(self.settings, truncate_dim=dimensions)
        return self

    @property
    def base_model(self) -> nn.Module:
        """The bare encoder, under the name that ``inject_moe`` and ``merge_experts`` look for."""
        return self.model.base_model

    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer: equal for an equal encoder, wherever it came from."""
        return model_fingerprint(self.model, self.tokenizer)

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Embed queries, each with the query prompt, without gradients.

        Texts are cut off after ``max_length`` tokens, prompt included; None: the encoder's. A batch has ``batch_tokens`` at most
        (padding counts where there is any), but one text at least; None: 16,384, or 2,048 on a CPU, where small batches stay
        in its cache.

        Returns:
            (n, D) float32 on the CPU, in the order of ``texts``.

        Raises:
            UserError: ``max_length`` is beyond the encoder's positions, a batch does not fit in memory, embeddings are not
                finite.
        """
        return encode(self, texts, kind="query", max_length=max_length, batch_tokens=batch_tokens, progress=progress)

    def encode_passages(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Embed passages, each with the passage prompt; otherwise as :meth:`encode_queries`."""
        return encode(self, texts, kind="passage", max_length=max_length, batch_tokens=batch_tokens, progress=progress)

    def embed(
        self,
        batch: Sequence[str] | Mapping[str, Tensor] | PackedTexts,
        kind: Kind | None = None,
        *,
        max_length: int | None = None,
    ) -> Tensor:
        """Embed one batch with gradients, in the mode that the model is in: for a training loop of one's own.

        The batch holds texts, which need ``kind`` for their prompt (:class:`ValueError` without it) and are cut off after
        ``max_length`` tokens, prompt included (None: the encoder's); or it is the tokenizer's output for texts with their
        prompts, padded, with ``attention_mask``; or packed texts.

        Returns:
            (n, D) float32 on the model's device, in the order of the batch; computed in the precision of a surrounding
            autocast block, otherwise in the encoder's ``dtype``.
        """
        if not isinstance(batch, (Mapping, PackedTexts)):
            if kind not in ("query", "passage"):
                raise ValueError(f"texts need the kind 'query' or 'passage', which names their prompt; found {kind!r}")
            texts = tokenize(self, batch, kind=kind, max_length=max_length or self.max_length)
            batch = PackedTexts.from_sequences(texts.sequences).select(texts.places)
        model, pooling, normalize = self.model, self.settings.pooling, self.settings.normalize
        inside = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if inside else self.dtype
        with autocast(model, dtype):
            if isinstance(batch, PackedTexts):
                embeddings = embed_packed(model, batch.to(self.device), pooling=pooling, normalize=normalize)
                return self.settings.truncate(embeddings.float())
            features = {name: tensor.to(self.device) for name, tensor in batch.items()}
            pooled = pool(model(**features).last_hidden_state, features["attention_mask"], pooling).float()
            return self.settings.truncate(F.normalize(pooled, dim=-1) if normalize else pooled)

    def save(
        self,
        folder: str | Path,
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a self-contained model folder: weights, configuration, tokenizer and sentence-transformers' files.

        With experts it also holds their code, so that ``AutoModel``, ``BGEM3FlagModel`` and ``SentenceTransformer`` load
        it with ``trust_remote_code=True``, without this package. Of a model with an adapter of peft, the folder holds the adapter
        and no other weights; :meth:`load` adds it to the base model's.

        Files of the same names are replaced, and what would make an adapter of a whole model or the other way round goes.
        ``heads`` are state dicts by file name, ``sparse_linear.pt`` and ``colbert_linear.pt``; those not named are copied from
        the folder that the encoder was loaded from. ``state_dict`` holds weights to write instead of the model's own (gathered
        from several devices, for instance).

        Raises:
            ValueError: the encoder has experts but is of a class that cannot be loaded again, or runs code of its folder; an
                adapter goes to the folder of its base model.
        """
        model, folder = self.model, Path(folder)
        refuse_foreign_experts(model)
        if has_experts(model) and not isinstance(model, tuple(MOE_CLASSES.values())):
            names = ", ".join(c.__name__ for c in MOE_CLASSES)
            fault = f"a {type(model).__name__} with experts could not be loaded again"
            raise ValueError(f"{fault}: merge_experts(model) first, or start from one of {names}")
        if heads is None and self.head_files is None:
            named = f"sparse and multi-vector heads ({', '.join(HEAD_FILES)})"
            logger.warning("the hub did not say whether the model has %s: %s gets none", named, folder)
        folder.mkdir(parents=True, exist_ok=True)
        if has_adapter(model):
            save_adapter(model, folder)
        else:
            with no_bar_of_weights():
                model.save_pretrained(folder, state_dict=state_dict)
            (folder / CONFIG_FILE).unlink(missing_ok=True)  # transformers would add an adapter that lay here
        for file in folder.glob("*.safetensors"):
            share(file)
        save_tokenizer(self.tokenizer, folder)
        write_settings(folder, self.settings, max_length=self.max_length, hidden_size=model.config.hidden_size)
        heads, files = heads or {}, self.head_files or {}
        for name in HEAD_FILES:
            if name in heads:
                torch.save({key: value.detach().cpu() for key, value in heads[name].items()}, folder / name)
            elif name in files and Path(files[name]).resolve() != (folder / name).resolve():
                shutil.copyfile(files[name], folder / name)

    def to(self, device: torch.device | str) -> Encoder:
        """Move the model to a device; in place."""
        self.model.to(device)  # type: ignore[arg-type]
        return self

    def train(self, mode: bool = True) -> Encoder:
        """Training mode (dropout); in place."""
        self.model.train(mode)
        return self

    def eval(self) -> Encoder:
        """Evaluation mode; in place."""
        return self.train(False)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters, for an optimizer."""
        return self.model.parameters()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer's files, without the truncation and padding of its last call.

    transformers would write them along, and whoever reads ``tokenizer.json`` by itself would cut every text at that length.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):  # of a folder written like that
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def save_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    settings: EmbeddingSettings | None = None,
    *,
    max_length: int | None = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    heads_from: str | Path | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder that every tool of the field loads: :meth:`Encoder.save` for a model and a tokenizer.

    ``model``, ``tokenizer``, ``settings`` and ``max_length`` are :class:`Encoder`'s, the others :meth:`Encoder.save`'s, but
    ``heads_from``: folder or hub name of the base model, from which heads that ``heads`` does not name are copied.

    Raises:
        UserError: as :class:`Encoder` does, or the hub does not say whether ``heads_from`` has heads. Nothing is written.
        ValueError: as :meth:`Encoder.save` does.
    """
    encoder = Encoder(model, tokenizer, settings, max_length)
    if heads_from is not None and not set(HEAD_FILES) <= set(heads or {}):
        encoder.head_files = find_heads(heads_from)
    encoder.save(folder, heads=heads, state_dict=state_dict)
