"""The table of kinds of units, in the order of messages and files. Needs no torch."""

from distill_llm.pruning.units.attention import Attention
from distill_llm.pruning.units.ffn import Ffn
from distill_llm.pruning.units.heads import Heads
from distill_llm.pruning.units.hidden import Hidden
from distill_llm.pruning.units.kind import UnitKind
from distill_llm.pruning.units.layers import Layers
from distill_llm.pruning.units.neurons import Neurons
from distill_llm.pruning.units.queries import Queries

_OWN = (Heads(), Queries(), Neurons(), Layers(), Attention(), Ffn(), Hidden())
KINDS: dict[str, UnitKind] = {kind.name: kind for kind in _OWN}
