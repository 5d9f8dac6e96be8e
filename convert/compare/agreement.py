"""How far two checkpoints agree on the same images and prompts: visual tokens, and the next token of an answer.

One of them, the reference, answers greedily. The other one scores every position of these answers. As long as both
rank the same token first, the other one would have given the same answer.

Shapes: B probes, R resolution, N visual tokens, T positions of an answer, L of a prompt, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastvlm_mlx.backend import mx
from fastvlm_mlx.checkpoint.load import load_model
from fastvlm_mlx.convert.arrays import Array
from fastvlm_mlx.convert.compare.probes import Probes
from fastvlm_mlx.convert.progress import Notify
from fastvlm_mlx.intervals import of_mean, wilson
from fastvlm_mlx.model.fastvlm import FastVLM
from fastvlm_mlx.streams import free_unused_memory

ANSWER = 10
"""Positions of each answer that are compared."""


@dataclass(frozen=True)
class Reference:
    """The answers of the reference to some probes.

    Attributes:
        visual: Visual tokens (B, N, D).
        answers: Token ids (B, T).
        compared: Whether a position (B, T) is compared: those up to the end of each answer are.
        logits: (B, T, V).
    """

    visual: Array
    answers: npt.NDArray[np.int32]
    compared: npt.NDArray[np.bool_]
    logits: Array

    @classmethod
    def of(cls, folder: Path, probes: Sequence[Probes], notify: Notify, length: int = ANSWER) -> list["Reference"]:
        """The answers of the converted checkpoint in `folder` to several sets of probes.

        Loads the model once: the tower encodes all images and is freed before the decoder's weights are read.
        """
        model = load_model(folder, lazy=True)
        notify("reference: images")
        visual = [_evaluated(model.encode_image(each.pixels)) for each in probes]
        model.free_vision_tower()
        free_unused_memory()
        return [_answers(model, each, tokens, notify, length) for each, tokens in zip(probes, visual, strict=True)]


def _answers(model: FastVLM, probes: Probes, visual: Array, notify: Notify, length: int) -> Reference:
    """The greedy answers, up to `length` tokens long, to `probes` with visual tokens (B, N, D)."""
    notify("reference: answers")
    ids, mask = _padded(probes.prompts)
    step, cache = model.prefill(ids, attention_mask=mask, visual_tokens=mx.array(visual))
    logits, answers = [], []
    for number in range(length):
        notify(f"reference: token {number + 1} of {length}")
        tokens = mx.argmax(step, axis=-1)
        logits.append(_evaluated(step))
        answers.append(np.array(tokens))
        if number < length - 1:
            step = model.language_model(tokens[:, None], cache)[:, -1]
    ids = np.stack(answers, axis=1)
    ended = np.isin(ids, model.config.eos_token_id)
    compared: npt.NDArray[np.bool_] = np.cumsum(ended, axis=1) - ended == 0
    return Reference(visual=visual, answers=ids, compared=compared, logits=np.stack(logits, axis=1))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a checkpoint agrees with a reference.

    Attributes:
        positions: The number of next-token distributions that were compared.
        visual_cosine: Mean cosine similarity of the visual tokens.
        kl: Mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats.
        top1: Share of the positions at which both rank the same token first.
        top5: Share of the reference's five most likely tokens that are among the checkpoint's.
        greedy: Share of the reference's answers that comes before the first token that differs.
        intervals: The 95 % interval of each of these figures, as if positions were drawn independently.
    """

    positions: int
    visual_cosine: float
    kl: float
    top1: float
    top5: float
    greedy: float
    intervals: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, model: FastVLM, probes: Probes, reference: Reference) -> "Agreement":
        """Compares a checkpoint with the reference."""
        visual = model.encode_image(probes.pixels)
        logits = _answer_logits(model, probes, visual, reference.answers)
        compared = reference.compared
        mine, theirs = logits[compared], reference.logits[compared]
        same = np.argmax(logits, axis=-1) == np.argmax(reference.logits, axis=-1)
        before = np.cumprod(same | ~compared, axis=1, dtype=np.bool_) & compared
        cosines = _cosines(_evaluated(visual), reference.visual)
        kl = divergences(theirs, mine)
        top5 = [np.isin(a, b).mean() for a, b in zip(_top(theirs), _top(mine), strict=True)]
        positions = int(compared.sum())
        shares = {
            "top1": float(np.mean(same[compared])),
            "top5": float(np.mean(top5)),
            "greedy": float(before.sum() / positions),
        }
        intervals = {name: wilson(share, positions) for name, share in shares.items()}
        intervals["kl"] = of_mean(kl.tolist(), least=0.0)
        intervals["visual_cosine"] = of_mean(cosines.ravel().tolist(), -1.0, 1.0)
        return cls(
            positions=positions,
            visual_cosine=float(np.mean(cosines)),
            kl=float(np.mean(kl)),
            **shares,
            intervals=intervals,
        )

    def metric(self, name: str) -> float:
        """The value of one of `AGREEMENT_METRICS`."""
        value: float = getattr(self, name)
        return value

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric; None if there is none."""
        return self.intervals.get(name)

    def lines(self) -> list[str]:
        """Its figures in words, each with its interval."""
        spread = {name: f"95% interval {low:.1%} to {high:.1%}" for name, (low, high) in self.intervals.items()}
        kl, cosine = self.intervals["kl"], self.intervals["visual_cosine"]
        return [
            f"top-1 agreement {self.top1:.1%} ({spread['top1']}, {self.positions} positions)",
            f"top-5 overlap {self.top5:.1%} ({spread['top5']})",
            f"answers identical for their first {self.greedy:.1%} ({spread['greedy']})",
            f"KL divergence {self.kl:.2g} nats (95% interval {kl[0]:.2g} to {kl[1]:.2g})",
            f"cosine of the visual tokens {self.visual_cosine:.4f} (95% interval {cosine[0]:.4f} to {cosine[1]:.4f})",
        ]


def _evaluated(value: mx.array) -> Array:
    return np.array(value.astype(mx.float32))


def _padded(rows: Sequence[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Token ids (B, L), padded on the left, and the mask that is False where they are padding."""
    length = max(map(len, rows))
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(length) >= length - len(row) for row in rows])
    return ids, mask


def _answer_logits(model: FastVLM, probes: Probes, visual: mx.array, answers: npt.NDArray[np.int32]) -> Array:
    """The logits (B, T, V) at every position of given answers, in one pass."""
    rows = [np.concatenate([prompt, answer[:-1]]) for prompt, answer in zip(probes.prompts, answers, strict=True)]
    ids, mask = _padded(rows)
    embeddings = model.embed(ids, attention_mask=mask, visual_tokens=visual)
    padding = (~mask).sum(axis=1).tolist()
    decoder = model.language_model
    cache = decoder.make_cache(padding if any(padding) else None)
    hidden = decoder.model(None, cache, embeddings)
    return _evaluated(decoder.head(hidden[:, -answers.shape[1] :]))


def _cosines(first: Array, second: Array) -> Array:
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosines: Array = (first * second).sum(axis=-1) / np.maximum(norms, 1e-30)
    return cosines


def divergences(reference: Array, other: Array) -> Array:
    """KL divergences (positions,) between the softmaxes of logits (positions, V)."""
    p, q = (mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True) for logits in (reference, other))
    return np.maximum(np.array((mx.exp(p) * (p - q)).sum(axis=-1)), 0)


def _top(logits: Array, count: int = 5) -> npt.NDArray[np.intp]:
    return np.argpartition(-logits, count, axis=-1)[..., :count]
