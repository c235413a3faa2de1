"""The recurrent-depth transformer (Huginn, arXiv 2502.05171).

e      = prelude(sqrt(D) E[tokens])         with an option, sqrt(D) (E[tokens] + P[places])
s_t    = core(adapter [s_(t-1) ; e])        t = 1..r, s_0 given
logits = norm(coda(norm(s_r))) E^T          one norm, one E
"""

# B rows  T tokens  D width  V vocabulary  N chosen depths  M labels that count

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.model.block import make_block
from pretrain.model.cache import Span
from pretrain.model.config import CHUNK_TOKENS, DocumentMask, ModelConfig
from pretrain.model.core import RecurrentCore
from pretrain.model.depth import Depth
from pretrain.model.diagnostics import Diagnostics, diagnose, row_means
from pretrain.model.digits import DigitEmbedding
from pretrain.model.embedding import TiedEmbedding
from pretrain.model.layout import Layout, Mask, split_documents
from pretrain.model.loss import IGNORED, cross_entropy, weighted_sum
from pretrain.model.norm import make_norm

__all__ = ["Output", "RecurrentCore", "RecurrentModel"]


class Output(NamedTuple):
    """What one forward pass gives; None where it was not asked for.

    A tuple, because engines look for tensors in tuples only.
    """

    logits: Tensor | None = None
    """Float32 [B, T, V]; with logits_at [B, 1, V]."""
    loss: Tensor | None = None
    """Mean nats over the labels that count, by weight; NaN if none counts."""
    nats: Tensor | None = None
    """Sum of weight x nats over the labels that count: float32 scalar, differentiable."""
    num_labels: Tensor | None = None
    """Sum of weights over the labels that count: float32 scalar."""
    states: tuple[Tensor, ...] | None = None
    """s_0 .. s_r of the deepest row, [B, T, D] each; a row that ended before has its last."""
    state: Tensor | None = None
    """s_r of every row, after its own depth r, before any norm: [B, T, D]."""
    latent: Tensor | None = None
    """norm(s_r) [B, T, D]."""
    hidden: Tensor | None = None
    """What the head sees, norm(coda(norm(s_r))): [B, T, D]."""
    nats_by_depth: Tensor | None = None
    """Sum of weight x nats of each row at each chosen depth: float32 [N, B]."""
    hits_by_depth: Tensor | None = None
    """Labels of each row that are the likeliest token at each chosen depth: float32 [N, B]."""
    labels_by_row: Tensor | None = None
    """Sum of weights of each row: float32 [B]."""
    diagnostics: Diagnostics | None = None
    """Of the state at `diagnose_depth` and what the head makes of it."""
    kl_by_depth: Tensor | None = None
    """KL in nats from each chosen depth's prediction to the next one's, as `nats_by_depth`:
    float32 [N - 1, B]."""
    moves: Tensor | None = None
    """Mean over the tokens of a row of ||s_t - s_(t-1)|| / ||s_t||, t = 1.. : float64 [r, B]."""


class RecurrentModel(nn.Module):
    """Prelude, recurrent core, coda. Weights are NaN until initialised or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # The backward pass computes all but the last so many iterations again; None: keep them all.
        self.kept_iterations: int | None = None
        # The mean depth it is trained with and what of it carries gradient, where that is known.
        self.usual_depth: Depth | None = None
        self.embedding = TiedEmbedding(config)
        self.digit_embedding = (
            None
            if config.digit_positions is None
            else DigitEmbedding(config, config.digit_positions)
        )
        self.prelude = nn.ModuleList(make_block(config) for _ in range(config.prelude_layers))
        self.core = RecurrentCore(config)
        self.coda = nn.ModuleList(make_block(config) for _ in range(config.coda_layers))
        self.final_norm = make_norm(config)

    def forward(
        self,
        tokens: Tensor,
        depths: Sequence[Depth],
        *,
        initial_state: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        documents: Tensor | None = None,
        prefixes: Tensor | None = None,
        digit_shift: Tensor | None = None,
        keep_logits: bool = True,
        logits_at: Tensor | None = None,
        return_states: bool = False,
        evaluate_depths: Sequence[int] | None = None,
        diagnose_depth: int | None = None,
        measures_hits: bool = False,
    ) -> Output:
        """Run every row to its own depth.

        tokens [B, T] int; initial_state s_0 [B, T, D]; labels [B, T] aligned with tokens (the
        next token), -100 does not count; weights [B, T] of labels, default 1; documents [B, T],
        the index of each token's document in its row, -1 on padding, needed if the model isolates
        documents; prefixes [B], leading tokens that all tokens of the row see; digit_shift [B], see
        `DigitEmbedding`; logits_at [B], of each row the one token whose logits are wanted (no
        labels then). With evaluate_depths and labels only `nats_by_depth` and `labels_by_row` are
        returned, and with measures_hits (on one rank) `hits_by_depth`, with diagnose_depth
        `diagnostics` there, `kl_by_depth`, `moves`. ConfigError if arguments do not fit together.
        """
        _check(tokens, depths, initial_state, labels, evaluate_depths, diagnose_depth)
        layout = self._layout(tokens, documents, prefixes)
        embedded_BTD = self.embed(tokens, layout, digit_shift_B=digit_shift)
        keep = _iterations_to_keep(depths, evaluate_depths, diagnose_depth, return_states)
        state_BTD, kept, moves_RBT = self.core(
            embedded_BTD,
            initial_state.to(embedded_BTD.dtype),
            depths=depths,
            layout=layout,
            keep=keep,
            kept_iterations=self.kept_iterations,
            measures_moves=diagnose_depth is not None,
        )
        if evaluate_depths is not None:
            assert labels is not None
            state_at = dict(zip(keep, kept, strict=True))
            asked = sorted({*evaluate_depths, *_last_two(diagnose_depth)[1:]})
            hidden = {depth: self.decode(state_at[depth], layout)[1] for depth in asked}
            output = self._evaluate(hidden, evaluate_depths, labels, weights, measures_hits)
            if diagnose_depth is None or moves_RBT is None:
                return output
            before, at, counted_BT = *_last_two(diagnose_depth), labels != IGNORED
            return output._replace(
                diagnostics=diagnose(state_at[before], state_at[at], hidden[at], counted_BT),
                kl_by_depth=self._compare(hidden, evaluate_depths, labels, weights),
                moves=row_means(moves_RBT, counted_BT),
            )
        latent_BTD, hidden_BTD = self.decode(state_BTD, layout)
        states = kept if return_states else None
        output = Output(state=state_BTD, states=states, latent=latent_BTD, hidden=hidden_BTD)
        return self._head(output, labels, weights, keep_logits, logits_at)

    @torch.no_grad()
    def losses_at(
        self,
        tokens: Tensor,
        depths: Sequence[int],
        *,
        initial_state: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of nats of each row at each depth [N, B], and its number of labels [B].

        One pass to the largest depth, no gradient.
        """
        if not depths:
            raise ConfigError("depths=[] asks for no loss; name at least one depth.")
        output = self(
            tokens,
            [Depth(max(depths), 0)] * tokens.shape[0],
            initial_state=initial_state,
            labels=labels,
            weights=weights,
            documents=documents,
            evaluate_depths=depths,
        )
        return output.nats_by_depth, output.labels_by_row

    @torch.no_grad()
    def hits_at(
        self,
        tokens: Tensor,
        depths: Sequence[int],
        *,
        initial_state: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
    ) -> Tensor:
        """How many labels of each row are the likeliest token, at each depth: float32 [N, B].

        Where all of them are, the greedy text from the same states is these labels. One pass to
        the largest depth, no gradient.
        """
        output = self(
            tokens,
            [Depth(max(depths), 0)] * tokens.shape[0],
            initial_state=initial_state,
            labels=labels,
            documents=documents,
            evaluate_depths=depths,
            measures_hits=True,
        )
        hits_NB: Tensor = output.hits_by_depth
        return hits_NB

    def _layout(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        prefixes_B: Tensor | None,
    ) -> Layout:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT, segments_BT = positions_T.expand_as(tokens_BT), None
        if self.config.documents is DocumentMask.isolated:
            if documents_BT is None:
                raise ConfigError(
                    "model.documents=isolated needs the document of each token; pass documents."
                )
            segments_BT, positions_BT = split_documents(documents_BT)
        return Layout.at(
            positions_BT,
            Mask(segments_BT, prefixes_B),
            head_width=self.config.head_width,
            base=self.config.rope_base,
        )

    def embed(
        self,
        tokens_BT: Tensor,
        layout: Layout,
        span: Span | None = None,
        digit_shift_B: Tensor | None = None,
    ) -> Tensor:
        """What every iteration is given, e [B, T, D]; a span continues tokens already read."""
        x_BTD = self.embedding(tokens_BT)
        if self.digit_embedding is not None:
            x_BTD = x_BTD + self.digit_embedding(tokens_BT, digit_shift_B, span)
        return _run(self.prelude, x_BTD, layout, span, "prelude")

    def decode(
        self, state_BTD: Tensor, layout: Layout, span: Span | None = None
    ) -> tuple[Tensor, Tensor]:
        """norm(s) and norm(coda(norm(s))), what the head sees, [B, T, D] each."""
        latent_BTD = self.final_norm(state_BTD)
        coda_BTD = _run(self.coda, latent_BTD, layout, span, "coda")
        return latent_BTD, self.final_norm(coda_BTD)

    def _head(
        self,
        output: Output,
        labels_BT: Tensor | None,
        weights_BT: Tensor | None,
        keep_logits: bool,
        logits_at_B: Tensor | None,
    ) -> Output:
        """The output with logits and losses, as far as they are asked for."""
        assert output.hidden is not None
        if logits_at_B is not None:
            assert labels_BT is None, "the loss of every token needs the logits of every token"
            at_B1D = logits_at_B[:, None, None].expand(-1, 1, output.hidden.shape[-1])
            output = output._replace(logits=self.embedding(None, output.hidden.gather(1, at_B1D)))
        elif keep_logits:
            output = output._replace(logits=self.embedding(None, output.hidden))
        if labels_BT is None:
            return output
        if output.logits is not None:
            flat_N = cross_entropy(output.logits.flatten(0, 1), labels_BT.flatten())
            nats_BT = flat_N.view_as(labels_BT)
        else:
            nats_BT = self.embedding(None, output.hidden, labels_BT)
        nats, num_labels = weighted_sum(nats_BT, labels_BT, weights_BT)
        return output._replace(nats=nats, num_labels=num_labels, loss=nats / num_labels)

    def _evaluate(
        self,
        hidden: dict[int, Tensor],
        depths: Sequence[int],
        labels_BT: Tensor,
        weights_BT: Tensor | None,
        measures_hits: bool,
    ) -> Output:
        rows = []
        for depth in depths:
            nats_BT = self.embedding(None, hidden[depth], labels_BT)
            nats_B, labels_B = weighted_sum(nats_BT, labels_BT, weights_BT, dim=1)
            rows.append(nats_B)
        return Output(
            nats_by_depth=torch.stack(rows),
            labels_by_row=labels_B,
            hits_by_depth=self._count_hits(hidden, depths, labels_BT) if measures_hits else None,
        )

    def _count_hits(
        self, hidden: dict[int, Tensor], depths: Sequence[int], labels_BT: Tensor
    ) -> Tensor:
        is_counted_BT = labels_BT != IGNORED
        wanted_M = labels_BT[is_counted_BT]
        rows_NB = []
        for depth in depths:
            hits_BT = torch.zeros_like(is_counted_BT)
            parts = hidden[depth][is_counted_BT].split(CHUNK_TOKENS)
            found = [self.embedding(None, part_MD[None])[0].argmax(-1) for part_MD in parts]
            hits_BT[is_counted_BT] = torch.cat(found) == wanted_M
            rows_NB.append(hits_BT.sum(1))
        return torch.stack(rows_NB).float()

    def _compare(
        self,
        hidden: dict[int, Tensor],
        depths: Sequence[int],
        labels_BT: Tensor,
        weights_BT: Tensor | None,
    ) -> Tensor:
        """KL from each depth to the next, summed over the labels of each row: [N - 1, B]."""
        rows = [
            weighted_sum(
                self.embedding(None, hidden[depth], None, hidden[following]),
                labels_BT,
                weights_BT,
                dim=1,
            )[0]
            for depth, following in pairwise(depths)
        ]
        return torch.stack(rows) if rows else labels_BT.new_zeros(0, len(labels_BT)).float()


def _iterations_to_keep(
    depths: Sequence[Depth],
    evaluate_depths: Sequence[int] | None,
    diagnose_depth: int | None,
    return_states: bool,
) -> list[int]:
    """After which iterations the core keeps the state, ascending."""
    if return_states:
        return list(range(max(depth.total for depth in depths) + 1))
    return sorted({*(evaluate_depths or ()), *_last_two(diagnose_depth)})


def _last_two(depth: int | None) -> tuple[int, ...]:
    return () if depth is None else (depth - 1, depth)


def _run(
    layers: nn.ModuleList, x_BTD: Tensor, layout: Layout, span: Span | None, part: str
) -> Tensor:
    for index, layer in enumerate(layers):
        x_BTD = layer(x_BTD, layout, None if span is None else span.slot(part, index))
    return x_BTD


def _check(
    tokens_BT: Tensor,
    depths: Sequence[Depth],
    state_BTD: Tensor,
    labels_BT: Tensor | None,
    evaluate_depths: Sequence[int] | None,
    diagnose_depth: int | None,
) -> None:
    rows = tokens_BT.shape[0]
    if len(depths) != rows or state_BTD.shape[:2] != tokens_BT.shape:
        raise ConfigError(
            f"{rows} rows of {tokens_BT.shape[1]} tokens came with {len(depths)} depths and an "
            f"initial state of {tuple(state_BTD.shape[:2])}; give one of each for every row."
        )
    for row, depth in enumerate(depths):
        if depth.total < 1 or min(depth) < 0:
            raise ConfigError(f"row {row} has {depth}; its iterations must be at least 1.")
    if evaluate_depths is None:
        if diagnose_depth is not None:
            raise ConfigError(f"diagnose_depth={diagnose_depth} needs evaluate_depths.")
        return
    shallowest = min(depth.total for depth in depths)
    if labels_BT is None or not evaluate_depths:
        raise ConfigError("evaluate_depths needs labels and at least one depth.")
    asked = [*evaluate_depths, *_last_two(diagnose_depth)[1:]]
    if min(asked) < 1 or max(asked) > shallowest:
        raise ConfigError(
            f"evaluate_depths={list(evaluate_depths)} and diagnose_depth={diagnose_depth} must lie "
            f"within 1 and {shallowest}, the depth that all rows are run to."
        )
