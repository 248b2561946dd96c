"""Which weights a run's folder keeps: the trained ones, the base model's, or weights between both.

With a dev collection the base model is a candidate for the best model, as the checkpoints are. So are the mixtures of
``merge_base_alpha``, made as ``clpl_moe.merge`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from clpl_moe.common.files import share, write_json
from clpl_moe.common.output import writing
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.adapter import WEIGHTS_FILE, mixed_adapter
from clpl_moe.encoder.frozen_cache import frozen_cache_of, set_frozen_cache
from clpl_moe.encoder.weights import read_tensors
from clpl_moe.merge.mix import Mixer, best_alpha
from clpl_moe.merge.options import RECORD_FILE
from clpl_moe.moe.inject import has_experts, merge_experts
from clpl_moe.train.arguments import CLPLModelArguments
from clpl_moe.train.options import DEV_METRICS
from clpl_moe.train.trainer import CLPLTrainer

Metrics = dict[str, float]


@dataclass
class Kept:
    """What a folder holds.

    Attributes:
        alpha: share of the trained weights: 1, 0 where it is the base model, or between.
        candidates: share -> metrics on the dev collection; empty without one.
    """

    alpha: float = 1.0
    candidates: dict[float, Metrics] = field(default_factory=dict)

    @property
    def metrics(self) -> Metrics | None:
        """On the dev collection; None where the model was not evaluated."""
        return self.candidates.get(self.alpha)


class Keeper:
    """Decides what the folders of a run that is over keep. All processes have to call it, as they share the evaluation.

    Args:
        trainer: of the run.
        model_args: name the base model.
        load_base: loads it on the CPU, with the experts that the run began with.
        before: its metrics; None where it is no candidate.
    """

    def __init__(
        self,
        trainer: CLPLTrainer,
        model_args: CLPLModelArguments,
        load_base: Callable[[], Encoder],
        before: Metrics | None,
    ) -> None:
        self.trainer, self.args, self.model_args = trainer, trainer.args, model_args
        self.load_base, self.before = load_base, before
        self.metric = DEV_METRICS[(self.args.metric_for_best_model or "ndcg@10").removeprefix("eval_")]

    def keep(self, folder: Path, trained: Metrics | None, *, evaluate: bool = False) -> Kept:
        """Put the best weights into a folder, which holds the trained ones with these metrics (None: not known).
        ``evaluate`` them also where nothing is compared with them."""
        found = {alpha: metrics for alpha, metrics in ((0.0, self.before), (1.0, trained)) if metrics is not None}
        alphas, missing = {*(self.args.merge_base_alpha or [1.0])}, set[float]()
        if self.trainer.evaluator is not None:
            alphas |= {1.0, *found}
            missing = alphas - found.keys() if evaluate or len(alphas) > 1 else missing
        mixture = _Mixture(folder, self)
        for alpha in sorted(missing):
            assert self.trainer.evaluator is not None
            metrics = self.trainer.of_first(self.trainer.evaluator(mixture.at(alpha)))
            found[alpha] = {known: metrics[name] for name, known in DEV_METRICS.items()}
        kept = Kept(self._best(found) if len(alphas) > 1 else alphas.pop(), dict(sorted(found.items())))
        self.trainer.wait()  # until all have read the trained weights
        if self.trainer.is_world_process_zero():
            if kept.alpha != 1:
                mixture.save(kept.alpha)
            self._write_record(folder, kept)
        return kept

    def _best(self, found: dict[float, Metrics]) -> float:
        sign = 1 if self.args.greater_is_better else -1
        return best_alpha({alpha: sign * metrics[self.metric] for alpha, metrics in found.items()})

    def _write_record(self, folder: Path, kept: Kept) -> None:
        if kept.alpha == 1 and not self.args.shares:
            (folder / RECORD_FILE).unlink(missing_ok=True)  # of a run that resumes with other options
            return
        base = {"base": self.model_args.model_name_or_path, "base_revision": self.model_args.revision}
        candidates = [{"alpha": alpha, "metrics": metrics} for alpha, metrics in kept.candidates.items()]
        write_json(folder / RECORD_FILE, {**base, "alpha": kept.alpha, "metric": self.metric, "candidates": candidates})


class _Mixture:
    """The trained model of a folder, mixed with the base model; both are loaded when they are needed."""

    def __init__(self, folder: Path, keeper: Keeper) -> None:
        self.folder, self.keeper = folder, keeper
        self._encoder: Encoder | None = None
        self._mixer: Mixer | None = None

    def at(self, alpha: float) -> Encoder:
        """The encoder with this share of the trained weights."""
        args = self.keeper.args
        if self._encoder is None:
            self._encoder = Encoder.load(
                self.folder,
                device=args.device,
                compute_dtype=args.encode_dtype,
                **self.keeper.model_args.of_saved,
            )
            # Its frozen layers are the trainer's, and every mixture's.
            set_frozen_cache(self._encoder.model, frozen_cache_of(self.keeper.trainer.encoder.model))
        if alpha != 1 and self._mixer is None:
            base = self.keeper.load_base()
            if has_experts(base.model) and not has_experts(self._encoder.model):
                merge_experts(base)
            self._mixer = Mixer(self._encoder, base)
        if self._mixer is not None:
            self._mixer.mix(alpha)
        return self._encoder

    def save(self, alpha: float) -> None:
        """Put the mixture into the folder."""
        encoder, mixer = self.at(alpha), self._mixer
        assert mixer is not None
        # The weights that are replaced may be mapped from their file.
        with writing(self.keeper.args.folder, inside=True) as place, place.additions(self.folder) as new:
            if (self.folder / WEIGHTS_FILE).is_file():
                state = mixed_adapter(read_tensors(str(self.folder / WEIGHTS_FILE)), mixer.base, alpha)
                save_file(state, new / WEIGHTS_FILE, {"format": "pt"})
                share(new / WEIGHTS_FILE)
                for name, head in mixer.heads(alpha).items():
                    torch.save({key: value.detach().cpu() for key, value in head.items()}, new / name)
            else:
                encoder.save(new, heads=mixer.heads(alpha))
