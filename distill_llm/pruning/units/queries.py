"""Queries: one query head of every group of a layer at a time, so that groups stay alike."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, Line, Load, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from distill_llm.pruning.planning.candidate import Choice


class Queries(UnitKind):
    """The least query of every group of a layer."""

    name = scored = cuts = "queries"

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """The least queries of all groups of a layer, then the next; the last ones stay."""
        rows = [
            (i, row.view(-1, choice.had["queries"][i]).sort(dim=1).values.sum(0)[:-1])
            for i, row in enumerate(choice.scores.queries)
            if len(row)
        ]
        return [(i, j, value) for i, row in rows for j, value in enumerate(row.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """A query of every group."""
        return choice.count["heads"][i] * choice.price("queries", i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """One query of every group."""
        if choice.each["queries"][i] == 1:
            return False
        choice.each["queries"][i] -= 1
        return True

    def flops(self, load: Load) -> Line:
        """Its projection, its columns of the output's, and its products with keys and values of all tokens."""
        rows, products, projections = position_products(load.config)
        projected = rows * projections / (load.batch_size * load.sequence_length)  # once for all tokens
        scores = 4.0 * load.sequence_length * load.head_size + 2.0 * rows * products * load.head_size
        return (2 + projected) * 2.0 * load.head_size, scores

    def held(self, load: Load) -> list[float]:
        """The keys and values of the cached tokens, where every query head has its own."""
        return [2 * load.head_size * tokens for tokens in load.cached] if load.family.caches_queries else []


def position_products(config: "PreTrainedConfig") -> tuple[int, int, int]:
    """Of attention with embeddings of relative positions (DeBERTa): how many there are; by how many projections of them each
    query head multiplies its queries and keys (c2p, p2c); and how many it makes. Zeros for all other families."""
    if not getattr(config, "relative_attention", False):
        return 0, 0, 0
    spans = getattr(config, "position_buckets", -1), config.max_relative_positions, config.max_position_embeddings
    types = len({"c2p", "p2c"} & set(config.pos_att_type or ()))
    return 2 * next(span for span in spans if span > 0), types, 2 if getattr(config, "share_att_key", False) else types
