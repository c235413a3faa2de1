"""Keys and values of tokens already read, for generation.

Every (part, layer, iteration) has its own slot: an iteration of the core attends to what the same
iteration wrote for earlier tokens. With `shared_iterations` = s, iteration t writes where t mod s
did, which bounds memory by s iterations whatever the depth (arXiv 2502.05171, section 6.2).
"""

# B rows  T new tokens  S all tokens so far  H heads  K head width

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pretrain.errors import ConfigError


@dataclass
class _Buffer:
    keys_BSHK: Tensor
    values_BSHK: Tensor
    filled: int = 0


@dataclass
class KeyValueCache:
    """Room for `capacity` tokens; `length` of them are read. One depth for all rows and tokens."""

    capacity: int
    shared_iterations: int | None = None
    length: int = 0
    _buffers: dict[tuple[str, int, int], _Buffer] = field(default_factory=dict)

    def slot(self, part: str, layer: int, iteration: int = 0) -> "Slot":
        """Where one layer, in one iteration, writes and reads."""
        if self.shared_iterations is not None:
            iteration %= self.shared_iterations
        return Slot(self, (part, layer, iteration))

    def advance(self, tokens: int) -> None:
        """Count tokens as read, after all layers have written them."""
        self.length += tokens

    def write(
        self, name: tuple[str, int, int], k_BTHK: Tensor, v_BTHK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the read ones; all keys and values so far, [B, S, H, K] each.

        Raises ConfigError if the cache is full, or if this iteration has not seen every earlier
        token, which happens when a later token is given more iterations than an earlier one.
        """
        rows, tokens = k_BTHK.shape[:2]
        stop = self.length + tokens
        if stop > self.capacity:
            raise ConfigError(
                f"the cache has room for {self.capacity} tokens, {stop} are needed; "
                "generate fewer tokens or shorten the prompt."
            )
        if name not in self._buffers:
            shape = (rows, self.capacity, *k_BTHK.shape[2:])
            self._buffers[name] = _Buffer(k_BTHK.new_zeros(shape), v_BTHK.new_zeros(shape))
        buffer = self._buffers[name]
        if buffer.filled not in (self.length, stop):
            raise ConfigError(
                f"slot {name} holds {buffer.filled} of {self.length} tokens; "
                "keep num_steps the same for all tokens of a text."
            )
        buffer.keys_BSHK[:, self.length : stop] = k_BTHK
        buffer.values_BSHK[:, self.length : stop] = v_BTHK
        buffer.filled = stop
        return buffer.keys_BSHK[:, :stop], buffer.values_BSHK[:, :stop]


class Slot(NamedTuple):
    """One layer's place in the cache."""

    cache: KeyValueCache
    name: tuple[str, int, int]

    def write(self, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens; all keys and values so far."""
        return self.cache.write(self.name, k_BTHK, v_BTHK)
