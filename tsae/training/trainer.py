"""One autoencoder in training: the optimizer step, and the state that a checkpoint holds.

The trainer contains no formula: losses are in `tsae.training.objectives`, schedules in `tsae.training.schedules`,
thresholds in `tsae.sae.thresholds`, and what a step measures in `tsae.training.step_metrics`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.parallel.buffer import BatchShard
from tsae.parallel.gradients import GradientSum
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
from tsae.training.cuda_graph import GraphedSteps
from tsae.training.feature_lists import FeatureLists
from tsae.training.feature_state import DeadFeatures, TemporalBuffer, lag1_correlation
from tsae.training.objectives import (
    LossInputs,
    LossTerms,
    auxk_loss,
    bands_for,
    kept_positions,
    objective,
    prefix_share,
)
from tsae.training.optimization import (
    add_gradient_noise,
    add_l0_lagrangian_gradient,
    build_optimizer,
    clip_gradients,
    keep_rates_on_device,
    optimizer_state,
    project_decoder_gradient,
    renormalize_decoder,
    set_learning_rate,
    threshold_parameters,
)
from tsae.training.schedules import StepPlan, learning_rate, step_plan, temporal_ramp
from tsae.training.sparse_step import DeadRows, SparseStep, check_steps, uses_lists
from tsae.training.steering import Steering
from tsae.training.step_metrics import Piece, correlation_metrics, loss_metrics
from tsae.training.temporal_objectives import (
    MaskedPairs,
    Pairs,
    WindowEdges,
    draw_pairs,
    draw_pairs_by_hash,
    find_window_edges,
)
from tsae.utils.device import runs_behind
from tsae.utils.nested import flatten
from tsae.utils.output import say
from tsae_kernels import CountedStats, TemporalStats, count_positions, within_sequence_variance

if TYPE_CHECKING:
    from tsae.sae.thresholds import ThresholdController
    from tsae.training.init_from import WarmStart


class DivergedError(UserError):
    """A loss term, the gradient or the state is not finite."""


class StepResult(NamedTuple):
    """What a step leaves for its measurements; scalars on the device.

    norm: of the gradient, before clipping
    """

    pieces: list[Piece]
    l0: Tensor
    norm: Tensor


class Trainer:
    """Trains one `SparseAutoencoder` on batches of activations.

    Args:
        cfg: configuration of the run, with ``cfg.sae.d_in`` set.
        normalizer: centring and scaling of the input.
        device: device of the autoencoder.
        autocast: whether matrix products run in bfloat16.
        ranks: with several processes, the position of this one: it trains on its `BatchShard` of every batch and its
            shard of the dictionary, and ends a step with the weights that a single process would have.
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
        self.normalizer = replace(normalizer, mean=normalizer.mean.to(device))
        check_steps(cfg, device, ranks.world.size)
        self.optimizer = build_optimizer(self.sae, cfg.optimizer, capturable=cfg.cuda_graph)
        self.gradient_sum = GradientSum(self.sae.parameter_dict().values(), ranks.data)
        self.lists: SparseStep | None = None
        if uses_lists(cfg, device, ranks.world.size):
            self.lists = SparseStep(cfg, self.sae, ranks, autocast=autocast)
        self.graphs = GraphedSteps(self._make_step, device) if cfg.cuda_graph else None
        self.steering = Steering(cfg, self.sae, ranks)
        self.temporal_buffer = TemporalBuffer(cfg.sae.d_sae, cfg.objective.buffer_std, generator=generator)
        self.temporal_buffer.variance = split(self.temporal_buffer.variance, 0, ranks.features).to(device)
        self.dead = DeadFeatures(cfg.sae.d_sae // ranks.features.size)
        self.dead.silent = self.dead.silent.to(device)
        self.noise_generator = torch.Generator().manual_seed(cfg.seed + 1)
        self.correlation = torch.zeros_like(self.temporal_buffer.variance)  # of the last logged batch, lag 1
        self.step = 0
        self.tokens = 0
        self.step_on_device = torch.zeros((), dtype=torch.int64, device=device)  # seeds the draws there
        self._any_dead = False  # at the last logged step
        self._lost = 0  # steps since then that changed no weight

    @property
    def controller(self) -> ThresholdController:
        """What steers the thresholds."""
        return self.steering.controller

    def start_from(self, start: WarmStart) -> None:
        """Take the weights and thresholds of an existing autoencoder, before the first step."""
        if isinstance(self.sae, ShardedAutoencoder):
            self.sae.load_whole_state(start.sae.state_dict())
        else:
            self.sae.load_state_dict(start.sae.state_dict())
        self.steering.start_from(start.theta)
        if self.lists is not None:
            self.lists.forget_copies()

    def train_step(self, batch: ActivationBatch | BatchShard, *, log: bool = False) -> dict[str, float]:
        """One optimizer step on raw activations.

        batch: x (B, T, d_in) and segments (B, T), on any device; with several processes the shard of this one
        log: whether to measure
        out: the values of a line of `metrics.jsonl`, or empty without ``log``

        On a GPU nothing waits for the device without ``log`` (in one process; segments on the CPU).

        Raises:
            DivergedError: a loss term or the gradient is NaN or infinite; the weights are unchanged. On a GPU this is
                checked only with ``log``, since it synchronises with the device; in a CUDA graph after the update.
        """
        cfg = self.cfg
        check = log or not runs_behind(self.device)
        tokens = int(np.count_nonzero(batch.full_segments.cpu().numpy() >= 0))
        plan = step_plan(self.step, cfg.steps, cfg.objective, cfg.optimizer)
        if self.graphs is not None and plan.noise == 0:
            listed = 0 if self.lists is None else self.lists.capacity
            result = self.graphs(self._moved(batch), plan, self.optimizer, (listed, self._any_dead))
            if check:
                for piece in result.pieces:
                    self._check_finite(piece.terms)
                self._check_norm(result.norm)
        else:
            set_learning_rate(self.optimizer, plan.lr)
            result = self._make_step(self._moved(batch), plan, tokens, check=check)
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        return self._measurements(result) if log else {}

    def _make_step(
        self, batch: ActivationBatch | BatchShard, plan: StepPlan, tokens: int | Tensor, *, check: bool
    ) -> StepResult:
        """A step, with the learning rate set; ``tokens``: positions of the full batch."""
        cfg, sae, ranks = self.cfg, self.sae, self.ranks
        lists = self.lists if plan.noise == 0 else None  # noise is on all rows
        self.optimizer.zero_grad(set_to_none=True)
        pieces = self._accumulate_gradients(batch, plan, lists, check=check)
        if self.steering.priced:
            sums = (_sum(each) for each in zip(*(piece.l0_gradients for piece in pieces), strict=True))
            add_l0_lagrangian_gradient(sae, [ranks.data.sum_no_grad(local(gradient)) for gradient in sums])
        norm = self._prepare_gradients(plan, lists)
        if check:
            self._check_norm(norm)
        if lists is not None:
            lists.update(self.optimizer, plan.lr, cfg.optimizer)
        else:
            self.optimizer.step()
            if cfg.sae.unit_norm_decoder:
                renormalize_decoder(sae)
            if self.lists is not None:
                self.lists.forget_copies()
        l0 = _sum(piece.weight * piece.l0 for piece in pieces)
        self.steering.update(l0, [piece.transitions for piece in pieces], batch.full_segments)
        self.dead.update(torch.cat([piece.stats.square for piece in pieces]), tokens, ranks)
        self.step_on_device.add_(1)
        return StepResult(pieces, l0, norm)

    def _moved(self, batch: ActivationBatch | BatchShard) -> ActivationBatch | BatchShard:
        """The batch on the device; on the CPU, pieces are moved one by one."""
        if not runs_behind(self.device):
            return batch

        def move(tensor: Tensor) -> Tensor:
            if self.device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()  # from any other memory, the copy would wait
            return tensor.to(self.device, non_blocking=True)

        if isinstance(batch, BatchShard):
            return BatchShard(move(batch.x), move(batch.segments), move(batch.full_segments), batch.first)
        return ActivationBatch(move(batch.x), move(batch.segments))

    def _accumulate_gradients(
        self, batch: ActivationBatch | BatchShard, plan: StepPlan, lists: SparseStep | None, *, check: bool
    ) -> list[Piece]:
        """Forward and backward of each piece (``cfg.chunk`` sequences) of the batch."""
        sae, dead = self.sae, self._dead_features(lists)
        if lists is not None:
            lists.begin()
        pieces: list[Piece] = []
        last = (len(batch.x) - 1) // self.cfg.chunk if self.cfg.chunk else 0
        for chunk, weight in self._chunks(batch):
            if pieces:
                pieces[-1] = pieces[-1]._replace(h=None)  # the features of one piece at a time
            with self.gradient_sum.last_backward(len(pieces) == last):
                pieces.append(self._backward(chunk, weight, plan, lists, dead, check=check))
        self.gradient_sum.wait()
        if lists is not None:
            lists.gather(dead if isinstance(dead, DeadRows) else None)
        elif isinstance(dead, DeadRows):
            dead.add_gradients(sae, self.ranks.data)
        if len(pieces) > 1:  # the temporal buffer is updated once all pieces are known
            self._update_temporal_buffer(_sum(piece.weight * piece.variance for piece in pieces), plan.mixing)
        return pieces

    def _dead_features(self, lists: SparseStep | None) -> Tensor | DeadRows | None:
        """The dead features, None if AuxK is off or there is none.

        On a GPU, where their number is not known, those silent for longest, at most twice as many as AuxK takes; and
        only if some feature was dead at the last logged step.
        """
        cfg = self.cfg.objective
        if cfg.aux_weight == 0:
            return None
        if not (lists or runs_behind(self.device)) or self.ranks.features.size > 1:
            return self.dead.indices(cfg.dead_after_tokens)
        if not self._any_dead:
            return None
        count = min(2 * self._aux_k, self.cfg.sae.d_sae)
        features, used = self.dead.longest_silent(cfg.dead_after_tokens, count)
        return DeadRows.of(self.sae, features, used)

    def _chunks(
        self, batch: ActivationBatch | BatchShard
    ) -> Iterator[tuple[ActivationBatch | BatchShard, float | Tensor | None]]:
        """The pieces of the batch and each one's share of the positions; the batch itself and None if it is not cut."""
        size = self.cfg.chunk or len(batch.x)
        if size >= len(batch.x):
            yield batch, None
            return
        positions = (batch.segments >= 0).sum().clamp(min=1)
        for x, segments in zip(batch.x.split(size), batch.segments.split(size), strict=True):
            share = (segments >= 0).sum() / positions
            yield ActivationBatch(x, segments), share if runs_behind(share.device) else float(share)

    def _backward(
        self,
        batch: ActivationBatch | BatchShard,
        weight: float | Tensor | None,
        plan: StepPlan,
        lists: SparseStep | None,
        dead: Tensor | DeadRows | None,
        *,
        check: bool,
    ) -> Piece:
        """Add ``weight`` (None: 1) times the gradient of the loss on ``batch`` to the gradients of the parameters."""
        cfg, sae = self.cfg, self.sae
        segments = batch.segments.to(self.device, non_blocking=True)
        x = self.normalizer(batch.x.to(self.device, non_blocking=True))
        target = x
        if cfg.sae.d_out:
            x, target = (part.contiguous() for part in x.split((cfg.sae.d_in, cfg.sae.d_out), dim=-1))
        h: Tensor | FeatureLists
        price = self._gate_price(segments, weight, plan)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if lists is None:
                pre = sae.pre_activation(x)
                self.steering.prepare(pre, segments, self.step, plan.ramp)
                h, counted, l0 = sae.activate_counted(pre, bands_for(cfg.objective), segments)
                gated = h if price is None else sae.gated(h, pre, segments, price)
                *prefixes, xhat = sae.decode_prefixes(gated)
            else:
                centred, pre = lists.pre_activation(x)
                self.steering.prepare(pre, segments, self.step, plan.ramp)
                h, counted, l0 = lists.encode(centred, pre, bands_for(cfg.objective), segments)
                *prefixes, xhat = lists.decode(h, price)
            auxiliary = self._auxiliary(x, target - xhat, dead, segments)
        transitions = counted.transitions if isinstance(counted, CountedStats) else None
        stats = counted.temporal if isinstance(counted, CountedStats) else counted
        variance = self._variance(stats, segments)
        if weight is None:  # the loss uses the temporal buffer as updated by this batch
            self._update_temporal_buffer(variance, plan.mixing)
        inputs = LossInputs(
            x=target,
            xhat=xhat,
            h=h,
            stats=stats,
            segments=segments,
            variance=self.temporal_buffer.variance,
            auxiliary=auxiliary,
            prefixes=prefixes,
            pairs=self._pairs(batch.full_segments),
            edges=None if lists else self._window_edges(batch),
            l0=l0,
            ranks=self.ranks,
            first=batch.first,
            weights=plan.loss,
        )
        terms = objective(inputs, self.step, cfg.objective)
        if check:
            self._check_finite(terms)
        l0_gradients = (
            torch.autograd.grad(l0, threshold_parameters(sae), retain_graph=True) if self.steering.priced else ()
        )
        weight = 1.0 if weight is None else weight
        (weight * terms.total).backward()
        return Piece(
            weight,
            target,
            h.detach(),
            segments,
            TemporalStats(*(each.detach() for each in stats)),
            transitions,
            variance,
            LossTerms(*(term.detach() for term in terms)),
            l0.detach(),
            tuple(weight * gradient for gradient in l0_gradients),
        )

    def _gate_price(self, segments: Tensor, weight: float | Tensor | None, plan: StepPlan) -> Tensor | None:
        """What a unit of squared error weighs, for `SparseAutoencoder.gated`; None without ``sae.gate_gradient``."""
        if not self.cfg.sae.uses_gate_gradient:
            return None
        price = plan.loss.reconstruction / kept_positions(segments, segments, self.ranks)
        if self.cfg.sae.groups:  # the loss is the mean over prefixes
            price = price * split(prefix_share(self.cfg.sae.groups).to(segments.device), 0, self.ranks.features)
        return price if weight is None else weight * price

    def _pairs(self, segments: Tensor) -> Pairs | MaskedPairs | None:
        """The pairs of the contrastive objective, a function of the seed and the step alone."""
        cfg = self.cfg.objective
        if "contrastive" not in cfg.terms:
            return None
        if runs_behind(self.device):
            on_device = segments.to(self.device, non_blocking=True)
            return draw_pairs_by_hash(on_device, cfg.offset, cfg.pairs, self.cfg.seed, self.step_on_device)
        generator = torch.Generator().manual_seed((self.cfg.seed * 1_000_003 + self.step) % 2**63)
        pairs = draw_pairs(segments.cpu(), cfg.offset, cfg.pairs, generator)
        return Pairs(*(index.to(self.device, non_blocking=True) for index in pairs))

    def _window_edges(self, batch: ActivationBatch | BatchShard) -> WindowEdges | None:
        if "window" not in self.cfg.objective.terms or (runs_behind(self.device) and self.ranks.world.size == 1):
            return None
        edges = find_window_edges(batch.full_segments, self.cfg.objective.window)
        length, start = batch.segments.shape[1], batch.first * batch.segments.shape[1]
        if len(batch.segments) < len(batch.full_segments):
            here = (edges.firsts >= start) & (edges.firsts < start + len(batch.segments) * length)
            edges = WindowEdges(edges.full, edges.firsts[here] - start, edges.missing[here])
        return WindowEdges(*(part.to(self.device, non_blocking=True) for part in edges))

    @property
    def _aux_k(self) -> int:
        return self.cfg.objective.aux_k or max(1, self.cfg.sae.d_in // 2)

    def _auxiliary(
        self, x: Tensor, residual: Tensor, dead: Tensor | DeadRows | None, segments: Tensor
    ) -> Tensor | None:
        if isinstance(dead, DeadRows):
            centred = x - self.sae.b_dec if self.cfg.sae.apply_b_dec_to_input else x
            dead_pre = (centred / self.cfg.sae.input_scale) @ dead.W_enc.T + dead.b_enc
            through_zero = self.cfg.sae.kind.dead_below_zero
            arguments = residual, dead_pre, dead.W_dec, self._aux_k, segments
            return auxk_loss(*arguments, through_zero=through_zero, ranks=self.ranks, used=dead.used)
        if dead is None or int(self.ranks.features.sum_no_grad(torch.tensor(dead.numel()))) == 0:
            return None
        # A separate product: dead features get a gradient at every token, and the gradient of the others stays sparse.
        dead_pre = self.sae.pre_activation(x, dead) + self.sae.b_enc[dead]
        through_zero = self.cfg.sae.kind.dead_below_zero
        W_dec = self.sae.W_dec.index_select(0, dead)
        return auxk_loss(residual, dead_pre, W_dec, self._aux_k, segments, through_zero=through_zero, ranks=self.ranks)

    @property
    def _adaptive(self) -> bool:
        return "multiscale" in self.cfg.objective.terms and self.cfg.objective.adaptive

    def _variance(self, stats: TemporalStats, segments: Tensor) -> Tensor:
        """Of each feature within the sequences of the full batch; a scalar 0 if no term uses it."""
        if not self._adaptive:
            return self.temporal_buffer.variance.new_zeros(())
        positions = count_positions(segments)
        variance = within_sequence_variance(stats, positions)
        return self.ranks.data.weighted_mean_no_grad(variance, (positions > 0).sum())

    def _update_temporal_buffer(self, variance: Tensor, mixing: float | Tensor) -> None:
        if self._adaptive:
            self.temporal_buffer.update(variance, mixing)

    def _check_finite(self, terms: LossTerms) -> None:
        # The parts before their sum, so that the message names the one that is not finite.
        for name, value in reversed(list(terms._asdict().items())):
            if not torch.isfinite(value):
                raise DivergedError(f"step {self.step + 1}: the {name} term of the loss is {value.item()}")

    def _check_norm(self, norm: Tensor) -> None:
        if not torch.isfinite(norm):
            raise DivergedError(f"step {self.step + 1}: the norm of the gradient is {norm.item()}")

    def _prepare_gradients(self, plan: StepPlan, lists: SparseStep | None) -> Tensor:
        """Noise, projection, clipping; returns the norm of the gradient before clipping."""
        cfg = self.cfg.optimizer
        limit = cfg.clip_norm if cfg.clip_norm > 0 else float("inf")
        if lists is not None:
            return lists.clip(limit)
        if plan.noise > 0:
            add_gradient_noise(self.sae, plan.noise, self._noise_generator())
        if self.cfg.sae.unit_norm_decoder:
            project_decoder_gradient(self.sae)
        return clip_gradients(self.sae, limit)

    def _noise_generator(self) -> torch.Generator:
        """On a GPU one of its own, a function of the seed and the step."""
        if not runs_behind(self.device):
            return self.noise_generator
        return torch.Generator(self.device).manual_seed((self.cfg.seed * 1_000_003 + self.step + 1) % 2**63)

    def _check_lists(self) -> dict[str, int]:
        """Fit the lists, and say so if they were too short since the last call; what a log line has of it."""
        if self.lists is None:
            return {}
        lost = self.lists.check()
        self._lost += lost
        if lost:
            listed = "active or nearly active" if self.cfg.sae.uses_gate_gradient else "active"
            say(
                f"Up to step {self.step}, {lost} steps changed no weight, because a token had more {listed} features "
                f"than its list has places; from now on it has {self.lists.capacity}."
            )
        return {"list_capacity": self.lists.capacity, "lost_steps": self._lost}

    @torch.no_grad()
    def _measurements(self, result: StepResult) -> dict[str, float]:
        pieces, l0, norm = result
        last = pieces[-1]
        assert last.h is not None
        self.correlation = lag1_correlation(last.h, last.segments, self.ranks)
        features = self.ranks.features
        dead = torch.tensor(self.dead.indices(self.cfg.objective.dead_after_tokens).numel())
        self._any_dead = int(dead) > 0
        out = {"step": self.step, "tokens": self.tokens} | loss_metrics(pieces, self.ranks)
        out |= {
            "l0": l0.item(),
            "dead": int(features.sum_no_grad(dead)),
            "gradient_norm": norm.item(),
            "lr": learning_rate(self.step - 1, self.cfg.steps, self.cfg.optimizer),
        }
        out |= self._check_lists()
        self._lost = 0
        out |= correlation_metrics(self.correlation, last, self.ranks)
        if self.cfg.sae.kind.shares_threshold:
            out["threshold"] = self.sae.threshold[0].item()
        elif self.sae.thresholds_learned or self.cfg.sae.kind.rates:
            out["threshold"] = (features.sum_no_grad(self.sae.threshold.mean()) / features.size).item()
        return out

    @torch.no_grad()
    def finished(self) -> SparseAutoencoder:
        """The autoencoder for inference on raw activations: threshold frozen, normalization folded in.

        To be called on all processes. A sharded dictionary is gathered on the CPU of rank 0; the other ranks get their
        unfinished shard.
        """
        if self.ranks.features.size > 1:
            state = self.state_dict()
            if not self.ranks.is_rank0:
                return self.sae
            alone = Trainer(self.cfg, self.normalizer, torch.device("cpu"), autocast=False)
            alone.load_state_dict(state)
            return alone.finished()
        sae = self.sae
        self.steering.freeze(temporal_ramp(self.step, self.cfg.objective))
        mean, scale, target_scale = self.normalizer.mean, self.normalizer.scale, self.normalizer.target_scale
        if self.cfg.sae.d_out:
            mean, target_mean = mean.split((self.cfg.sae.d_in, self.cfg.sae.d_out))
            out = sae.folded(mean, scale, target_mean, target_scale or scale).eval()
        else:
            out = sae.folded(mean, scale).eval()
        self.steering.freeze_learned(out)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which `load_state_dict` continues bit for bit.

        They are those of a single process, whatever the ranks. To be called on all ranks; complete on rank 0.
        """
        sae, features = self.sae, self.ranks.features
        sharded = sae if isinstance(sae, ShardedAutoencoder) else None
        return {
            "sae": sharded.whole_state() if sharded else sae.state_dict(),
            "optimizer": whole_optimizer_state(self.optimizer, sharded) if sharded else optimizer_state(self.optimizer),
            "controller": self.controller.state_dict(),
            **self.steering.rates_state(),
            "temporal_buffer": whole(self.temporal_buffer.variance, 0, features),
            "silent": whole(self.dead.silent, 0, features),
            "correlation": whole(self.correlation, 0, features),
            "noise_generator": self.noise_generator.get_state(),
            "normalizer": self._normalizer_state(),
            "steps": self.step,
            "tokens": self.tokens,
            "any_dead": self._any_dead,
        } | ({} if self.lists is None else self.lists.state_dict())

    def _normalizer_state(self) -> dict[str, Any]:
        state = {field.name: getattr(self.normalizer, field.name) for field in fields(self.normalizer)}
        return state if self.normalizer.target_scale else {name: state[name] for name in ("mean", "scale")}

    def check_finite(self) -> None:
        """Raise `DivergedError`, naming the tensor, unless all of the state is finite. Synchronises with the device."""
        self._check_lists()
        tensors = {name: value for name, value in flatten(self._own_state()).items() if isinstance(value, Tensor)}
        bad = torch.tensor([not torch.isfinite(tensor).all() for tensor in tensors.values()])
        found = self.ranks.world.any(bad).nonzero()  # on any process
        if len(found):
            raise DivergedError(f"step {self.step}: {list(tensors)[int(found[0])]} is not finite")

    def _own_state(self) -> dict[str, Any]:
        """The tensors of this process that can become infinite."""
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
        """Continue from a `state_dict`, whatever the number of processes that saved it."""
        features = self.ranks.features
        if isinstance(self.sae, ShardedAutoencoder):
            self.sae.load_whole_state(state["sae"])
            load_whole_optimizer_state(self.optimizer, self.sae, state["optimizer"])
        else:
            self.sae.load_state_dict(state["sae"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.cfg.cuda_graph:
                keep_rates_on_device(self.optimizer)
        self.controller.load_state_dict({k: v.to(self.device) for k, v in state["controller"].items()})
        self.steering.load_rates_state(state)
        self.temporal_buffer.variance = split(state["temporal_buffer"], 0, features).to(self.device, copy=True)
        self.dead.silent = split(state["silent"], 0, features).to(self.device, copy=True)
        self.correlation = split(state["correlation"], 0, features).to(self.device)
        self.noise_generator.set_state(state["noise_generator"])
        normalizer = InputNormalizer(**state["normalizer"])
        self.normalizer = replace(normalizer, mean=normalizer.mean.to(self.device))
        self.step, self.tokens = state["steps"], state["tokens"]
        self.step_on_device.fill_(self.step)
        # Older checkpoints lack it: no auxiliary loss for dead features until the next logged step.
        self._any_dead = state.get("any_dead", False)
        if self.lists is not None:
            self.lists.load_state_dict(state)


def _sum(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)
