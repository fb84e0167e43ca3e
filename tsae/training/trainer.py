"""One autoencoder in training: a step, and the state that a checkpoint holds.

The trainer knows no formula: losses are in `tsae.training.objectives`, schedules in `tsae.training.schedules`,
thresholds in `tsae.sae.thresholds`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.parallel.buffer import BatchShard
from tsae.parallel.sharding import (
    ShardedAutoencoder,
    load_whole_optimizer_state,
    local,
    split,
    whole,
    whole_optimizer_state,
)
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.sae.thresholds import ThresholdController, initial_threshold
from tsae.training.feature_state import DeadFeatures, TemporalBuffer, lag1_correlation
from tsae.training.objectives import LossTerms, auxk_loss, bands_for, objective
from tsae.training.optimization import (
    add_gradient_noise,
    add_l0_lagrangian_gradient,
    build_optimizer,
    clip_gradients,
    project_decoder_gradient,
    renormalize_decoder,
    sum_gradients,
    threshold_parameters,
)
from tsae.training.schedules import buffer_mixing, learning_rate, noise_std
from tsae.training.temporal_objectives import Pairs, WindowEdges, draw_pairs, find_window_edges
from tsae_kernels import TemporalStats, count_positions, within_sequence_variance


class DivergedError(UserError):
    """A loss term, the gradient or the state is not finite."""


class _Part(NamedTuple):
    """What a step keeps of a piece of its batch; all without gradient."""

    weight: float
    x: Tensor
    h: Tensor | None
    segments: Tensor
    stats: TemporalStats
    variance: Tensor
    terms: LossTerms
    l0: Tensor
    l0_gradients: tuple[Tensor, ...]


class Trainer:
    """Trains one `SparseAutoencoder` on batches of activations.

    Args:
        cfg: the run's configuration, with ``cfg.sae.d_in`` set.
        normalizer: input centring and scaling.
        device: where the autoencoder lives.
        autocast: whether matrix products run in bfloat16.
        ranks: with several processes, where this one stands; it then trains on its `BatchShard` of every batch, and on
            its part of the dictionary, and all end a step with the weights that one process would have.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        normalizer: InputNormalizer,
        device: torch.device,
        *,
        autocast: bool,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        generator = torch.Generator().manual_seed(cfg.seed)
        self.cfg, self.device, self.autocast, self.ranks = cfg, device, autocast, ranks
        sae = SparseAutoencoder(cfg.sae, generator=generator)
        if ranks.features.size > 1:
            self.sae: SparseAutoencoder = ShardedAutoencoder(sae, ranks, device).train()
        else:
            self.sae = sae.to(device).train()
            self.sae.ranks = ranks
        self.normalizer = InputNormalizer(normalizer.mean.to(device), normalizer.scale)
        self.optimizer = build_optimizer(self.sae, cfg.optimizer)
        self.controller = ThresholdController(cfg.sae.k)
        self.temporal_buffer = TemporalBuffer(cfg.sae.d_sae, cfg.objective.buffer_std, generator=generator)
        self.temporal_buffer.variance = split(self.temporal_buffer.variance, 0, ranks.features).to(device)
        self.dead = DeadFeatures(cfg.sae.d_sae // ranks.features.size)
        self.dead.silent = self.dead.silent.to(device)
        self.noise_generator = torch.Generator().manual_seed(cfg.seed + 1)
        self.correlation = torch.zeros_like(self.temporal_buffer.variance)  # of the last logged batch, lag 1
        self.step = 0
        self.tokens = 0

    def train_step(self, batch: ActivationBatch | BatchShard, *, log: bool = False) -> dict[str, float]:
        """One optimizer step on raw activations; with ``log``, the measurements of `metrics.jsonl`, else nothing.

        batch: x (B, T, d_in) and segments (B, T), on any device; with several processes this one's share

        Raises:
            DivergedError: a term of the loss or the gradient is NaN or infinite; the weights are as before the step.
                (On a GPU this is looked at on steps with ``log`` only.)
        """
        cfg, sae, step, ranks = self.cfg, self.sae, self.step, self.ranks
        whole = batch.batch_segments if isinstance(batch, BatchShard) else batch.segments
        dead = self.dead.indices(cfg.objective.dead_after_tokens) if cfg.objective.aux_weight > 0 else None
        look = log or self.device.type == "cpu"
        priced = sae.thresholds_learned and self._steered
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[_Part] = []
        for chunk, weight in self._chunks(batch):
            if parts:
                parts[-1] = parts[-1]._replace(h=None)  # so that one piece's features are held at a time
            parts.append(self._backward(chunk, weight, dead, look=look, priced=priced))
        terms = LossTerms(*(_total(part.weight * getattr(part.terms, n) for part in parts) for n in LossTerms._fields))
        l0 = _total(part.weight * part.l0 for part in parts)
        if len(parts) > 1:  # the temporal buffer moves when all pieces are known
            self._move_variance(_total(part.weight * part.variance for part in parts), step)
        l0_gradients = tuple(_total(each) for each in zip(*(part.l0_gradients for part in parts), strict=True))
        if ranks.data.size > 1:
            sum_gradients(sae, ranks.data)
            l0_gradients = tuple(ranks.data.total(local(gradient)) for gradient in l0_gradients)
        if priced:
            add_l0_lagrangian_gradient(sae, l0_gradients)
        norm = self._prepare_gradients(step)
        if look and not torch.isfinite(norm):
            raise DivergedError(f"step {step + 1}: the norm of the gradient is {norm.item()}")
        self.optimizer.step()
        if cfg.sae.unit_norm_decoder:
            renormalize_decoder(sae)
        if self._steered:
            self._steer(l0)
        tokens = int((whole >= 0).sum())
        self.dead.update(torch.cat([part.stats.square for part in parts]), tokens, ranks)
        self.step, self.tokens = step + 1, self.tokens + tokens
        return self._measurements(terms, parts, l0, norm) if log else {}

    def _chunks(
        self, batch: ActivationBatch | BatchShard
    ) -> Iterator[tuple[ActivationBatch | BatchShard, float | None]]:
        """The pieces of the batch that are worked on at once, and the share of its positions that each has; the batch
        itself and None where it is not cut."""
        size = self.cfg.chunk or len(batch.x)
        if size >= len(batch.x):
            yield batch, None
            return
        positions = (batch.segments >= 0).sum().clamp(min=1)
        for x, segments in zip(batch.x.split(size), batch.segments.split(size), strict=True):
            yield ActivationBatch(x, segments), float((segments >= 0).sum() / positions)

    def _backward(
        self,
        batch: ActivationBatch | BatchShard,
        weight: float | None,
        dead: Tensor | None,
        *,
        look: bool,
        priced: bool,
    ) -> _Part:
        """Add ``weight`` (None: 1) times the gradient of the loss on ``batch`` to the parameters' gradients."""
        cfg, sae, step, ranks = self.cfg, self.sae, self.step, self.ranks
        whole, first = (batch.batch_segments, batch.first) if isinstance(batch, BatchShard) else (batch.segments, 0)
        segments = batch.segments.to(self.device, non_blocking=True)
        x = self.normalizer(batch.x.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            pre = sae.pre_activation(x)
            self._set_threshold(pre, segments)
            h, stats, l0 = sae.activate_counted(pre, bands_for(cfg.objective), segments)
            *prefixes, xhat = sae.decode_prefixes(h)
            auxiliary = self._auxiliary(x, x - xhat, dead, segments)
        variance = self._variance(stats, segments)
        if weight is None:  # the temporal buffer after this batch
            self._move_variance(variance, step)
        terms = objective(
            x,
            xhat,
            h,
            stats,
            step,
            cfg.objective,
            segments=segments,
            variance=self.temporal_buffer.variance,
            auxiliary=auxiliary,
            prefixes=prefixes,
            pairs=self._pairs(whole),
            edges=self._window_edges(whole, first, len(x)),
            l0=l0,
            ranks=ranks,
            first=first,
        )
        if look:
            self._check_finite(terms)
        l0_gradients = torch.autograd.grad(l0, threshold_parameters(sae), retain_graph=True) if priced else ()
        weight = 1.0 if weight is None else weight
        (weight * terms.total).backward()
        return _Part(
            weight,
            x,
            h.detach(),
            segments,
            TemporalStats(*(each.detach() for each in stats)),
            variance,
            LossTerms(*(term.detach() for term in terms)),
            l0.detach(),
            tuple(weight * gradient for gradient in l0_gradients),
        )

    @property
    def _steered(self) -> bool:
        """Whether the controller holds the mean L0 at ``sae.k``."""
        if self.cfg.sae.kind.steered:
            return self.cfg.sae.steering == "controller"
        return self.sae.thresholds_learned and self.cfg.objective.l0 == 0

    @torch.no_grad()
    def _set_threshold(self, pre: Tensor, segments: Tensor) -> None:
        if not self._steered and not self.sae.thresholds_learned:
            return
        if self.step == 0 and not self.controller.started:
            self.controller.start(initial_threshold(pre, self.sae.b_enc, self.cfg.sae.k, segments, self.ranks))
            if self.sae.log_threshold is not None:
                self.sae.log_threshold.fill_(self.controller.theta.log())
        if self.cfg.sae.kind.steered:
            self.sae.threshold.fill_(self.controller.theta)
            self.sae.release.copy_(self.sae.threshold * self.cfg.sae.release_ratio)

    @torch.no_grad()
    def _steer(self, l0: Tensor) -> None:
        """One step of control; of learned thresholds it moves the common factor."""
        before = self.controller.theta
        after = self.controller.update(l0)
        if self.sae.log_threshold is not None:
            self.sae.log_threshold.add_((after / before).log())

    def _pairs(self, segments: Tensor) -> Pairs | None:
        """The contrastive objective's, drawn anew each step from the seed and the step alone."""
        cfg = self.cfg.objective
        if "contrastive" not in cfg.terms:
            return None
        generator = torch.Generator().manual_seed((self.cfg.seed * 1_000_003 + self.step) % 2**63)
        pairs = draw_pairs(segments.cpu(), cfg.offset, cfg.pairs, generator)
        return Pairs(*(index.to(self.device, non_blocking=True) for index in pairs))

    def _window_edges(self, segments: Tensor, first: int, count: int) -> WindowEdges | None:
        """Of ``count`` sequences of the batch, from ``first`` on."""
        if "window" not in self.cfg.objective.terms:
            return None
        edges = find_window_edges(segments, self.cfg.objective.window)
        if count < len(segments):
            start, end = first * segments.shape[1], (first + count) * segments.shape[1]
            here = (edges.firsts >= start) & (edges.firsts < end)
            edges = WindowEdges(edges.full, edges.firsts[here] - start, edges.missing[here])
        return WindowEdges(*(part.to(self.device, non_blocking=True) for part in edges))

    def _auxiliary(self, x: Tensor, residual: Tensor, dead: Tensor | None, segments: Tensor) -> Tensor | None:
        if dead is None or int(self.ranks.features.total(torch.tensor(dead.numel()))) == 0:
            return None
        # A product of its own: dead features get a gradient at every token, and that of all others stays sparse.
        dead_pre = self.sae.pre_activation(x, dead) + self.sae.b_enc[dead]
        k = self.cfg.objective.aux_k or max(1, self.cfg.sae.d_in // 2)
        through_zero = self.cfg.sae.kind.dead_below_zero
        W_dec = self.sae.W_dec.index_select(0, dead)
        return auxk_loss(residual, dead_pre, W_dec, k, segments, through_zero=through_zero, ranks=self.ranks)

    @property
    def _adaptive(self) -> bool:
        return "multiscale" in self.cfg.objective.terms and self.cfg.objective.adaptive

    def _variance(self, stats: TemporalStats, segments: Tensor) -> Tensor:
        """Of each feature within the batch's sequences, 0 where nothing asks for it."""
        if not self._adaptive:
            return self.temporal_buffer.variance.new_zeros(())
        positions = count_positions(segments)
        variance = within_sequence_variance(stats, positions)
        if self.ranks.data.size > 1:  # the mean over the rows of all shares
            rows = (positions > 0).sum()
            every = self.ranks.data.total(rows).clamp(min=1)
            variance = self.ranks.data.total(variance * rows) / every
        return variance.detach()

    def _move_variance(self, variance: Tensor, step: int) -> None:
        if self._adaptive:
            self.temporal_buffer.update(variance, buffer_mixing(step, self.cfg.objective))

    def _check_finite(self, terms: LossTerms) -> None:
        # The parts before their sum, so that the message names the one that broke.
        for name, value in reversed(list(terms._asdict().items())):
            if not torch.isfinite(value):
                raise DivergedError(f"step {self.step + 1}: the {name} term of the loss is {value.item()}")

    def _prepare_gradients(self, step: int) -> Tensor:
        """Noise, projection, clipping, learning rate; returns the gradient's norm before clipping."""
        cfg = self.cfg.optimizer
        std = noise_std(step, cfg)
        if std > 0:
            add_gradient_noise(self.sae, std, self.noise_generator)
        if self.cfg.sae.unit_norm_decoder:
            project_decoder_gradient(self.sae)
        norm = clip_gradients(self.sae, cfg.clip_norm if cfg.clip_norm > 0 else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.cfg.steps, cfg)
        return norm

    @torch.no_grad()
    def _measurements(self, terms: LossTerms, parts: list[_Part], l0: Tensor, norm: Tensor) -> dict[str, float]:
        """Of the batch; correlations over time of its last piece."""
        data, features = self.ranks.data, self.ranks.features
        h, segments = parts[-1].h, parts[-1].segments
        assert h is not None
        kept = torch.cat([part.x[part.segments >= 0] for part in parts])  # [n, d_in]
        if data.size == 1:
            spread = (kept - kept.mean(0)).square().sum(-1).mean()
        else:
            n = data.total(torch.tensor(float(len(kept)), device=h.device)).clamp(min=1.0)
            spread = data.total((kept - data.total(kept.sum(0)) / n).square().sum()) / n
        self.correlation = lag1_correlation(h, segments, self.ranks)
        fired = data.any((h[segments >= 0] > 0).any(0))
        alive = features.gather(self.correlation)[features.gather(fired.to(torch.uint8)).bool()]
        quantiles = alive.quantile(torch.tensor([0.1, 0.5, 0.9], device=h.device)) if alive.numel() else torch.zeros(3)
        out = {"step": self.step, "tokens": self.tokens, "loss": terms.total.item()}
        out |= {name: getattr(terms, name).item() for name in LossTerms._fields[1:]}
        out |= {
            "explained_variance": 1.0 - terms.reconstruction.item() / max(spread.item(), 1e-12),
            "l0": l0.item(),
            "dead": int(features.total(torch.tensor(self.dead.indices(self.cfg.objective.dead_after_tokens).numel()))),
            "gradient_norm": norm.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "lag1_correlation": alive.mean().item() if alive.numel() else 0.0,
        }
        out |= {f"lag1_correlation_p{p}": q.item() for p, q in zip((10, 50, 90), quantiles, strict=True)}
        if self.cfg.sae.kind.shares_threshold:
            out["threshold"] = self.sae.threshold[0].item()
        elif self.sae.thresholds_learned:
            out["threshold"] = (features.total(self.sae.threshold.mean()) / features.size).item()
        return out

    @torch.no_grad()
    def finished(self) -> SparseAutoencoder:
        """The autoencoder for inference on raw activations: threshold frozen, normalization folded in.

        Of a dictionary that is split it is on the CPU, and on the first process only; the others, which must call this
        too, get a part that is of no use.
        """
        if self.ranks.features.size > 1:
            state = self.state_dict()
            if not self.ranks.first:
                return self.sae
            alone = Trainer(self.cfg, self.normalizer, torch.device("cpu"), autocast=False)
            alone.load_state_dict(state)
            return alone.finished()
        sae, controller = self.sae, self.controller
        frozen = self._steered and controller.started
        if frozen and not sae.thresholds_learned:
            sae.threshold.fill_(controller.frozen)
            sae.release.copy_(sae.threshold * self.cfg.sae.release_ratio)
        out = sae.folded(self.normalizer.mean, self.normalizer.scale).eval()
        if frozen and sae.thresholds_learned:
            out.threshold *= controller.frozen / controller.theta
            out.release *= controller.frozen / controller.theta
            out.update_threshold_parameters()
        return out

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `load_state_dict` goes on from, bit for bit.

        They are those of one process, whatever the ranks are; to be called on all, and of use on the first.
        """
        sae, features = self.sae, self.ranks.features
        split_up = isinstance(sae, ShardedAutoencoder)
        return {
            "sae": sae.whole_state() if split_up else sae.state_dict(),
            "optimizer": whole_optimizer_state(self.optimizer, sae) if split_up else self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "temporal_buffer": whole(self.temporal_buffer.variance, 0, features),
            "silent": whole(self.dead.silent, 0, features),
            "correlation": whole(self.correlation, 0, features),
            "noise_generator": self.noise_generator.get_state(),
            "normalizer": {"mean": self.normalizer.mean, "scale": self.normalizer.scale},
            "steps": self.step,
            "tokens": self.tokens,
        }

    def check_finite(self) -> None:
        """Raise `DivergedError`, naming the tensor, unless all of the state is finite. Synchronises with the device."""
        names, bad = [], []
        for name, tensor in _tensors(self._own_state()):
            names.append(name)
            bad.append(not torch.isfinite(tensor).all())
        found = self.ranks.world.any(torch.tensor(bad)).nonzero()  # on whichever process
        if len(found):
            raise DivergedError(f"step {self.step}: {names[int(found[0])]} is not finite")

    def _own_state(self) -> dict[str, Any]:
        """What `state_dict` holds that can become infinite, of this process."""
        slots = self.optimizer.state_dict()["state"]
        return {
            "sae": {name: local(tensor) for name, tensor in self.sae.parameter_dict().items()}
            | dict(self.sae.named_buffers(recurse=False)),
            "optimizer": {"state": {i: {k: local(v) for k, v in slot.items()} for i, slot in slots.items()}},
            "controller": self.controller.state_dict(),
            "temporal_buffer": self.temporal_buffer.variance,
            "correlation": self.correlation,
            "normalizer": {"mean": self.normalizer.mean},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, by whatever processes."""
        features = self.ranks.features
        if isinstance(self.sae, ShardedAutoencoder):
            self.sae.load_whole_state(state["sae"])
            load_whole_optimizer_state(self.optimizer, self.sae, state["optimizer"])
        else:
            self.sae.load_state_dict(state["sae"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict({k: v.to(self.device) for k, v in state["controller"].items()})
        self.temporal_buffer.variance = split(state["temporal_buffer"], 0, features).to(self.device)
        self.dead.silent = split(state["silent"], 0, features).to(self.device)
        self.correlation = split(state["correlation"], 0, features).to(self.device)
        self.noise_generator.set_state(state["noise_generator"])
        normalizer = state["normalizer"]
        self.normalizer = InputNormalizer(normalizer["mean"].to(self.device), normalizer["scale"])
        self.step, self.tokens = state["steps"], state["tokens"]


def _total(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state, with dotted names."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}".lstrip("."))
    elif isinstance(state, Tensor):
        yield name, state
