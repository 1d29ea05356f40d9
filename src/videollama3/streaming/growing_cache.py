"""A KV cache that grows in place, can be cut short, and is shared by forks until they go their own ways.

Keys and values of new tokens enter, those of all tokens leave as views, as transformers' models ask for them; nothing
that is held is copied but when the room is used up. Which tokens are held is left to `prompt_cache.py`.

Two forks and one buffer with room for eight tokens; what one appends lies behind what the other sees, which has to
move when it goes on:

    buffer      a b c d e . . .
    one         a b c             appends x: e and d are in the way, so it moves to a buffer of its own
    other       a b c d e         appends f in place
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Room of a new buffer, in tokens; it doubles when it is used up.
_LEAST_ROOM = 256


class _Buffer:
    """Memory of one layer's keys and values, with the layers that look at its beginning.

    Args:
        like: keys, (batch, heads, any, width), of the wanted type.
        like_values: likewise.
        room: tokens.
    """

    def __init__(self, like: torch.Tensor, like_values: torch.Tensor, room: int) -> None:
        # Outside of inference mode, so that it can be written in and out of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.empty((*part.shape[:2], room, part.shape[-1]), dtype=part.dtype, device=part.device)
                for part in (like, like_values)
            )
        self.lock = threading.Lock()
        # Forks that nobody uses any more drop out by themselves.
        self.holders: weakref.WeakKeyDictionary[GrowingLayer, int] = weakref.WeakKeyDictionary()

    @property
    def room(self) -> int:
        return int(self.keys.shape[-2])

    def claim(self, holder: GrowingLayer, begin: int, end: int) -> bool:
        """Gives a holder of `begin` tokens the place up to `end`; False where there is none or another's is in it."""
        with self.lock:
            others = [length for other, length in self.holders.items() if other is not holder]
            if end > self.room or any(length > begin for length in others):
                return False
            self.holders[holder] = end
            return True

    def hold(self, holder: GrowingLayer, length: int) -> None:
        with self.lock:
            self.holders[holder] = length

    def release(self, holder: GrowingLayer) -> None:
        with self.lock:
            self.holders.pop(holder, None)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer.

    Args:
        max_tokens: no room beyond is kept for later; more tokens can be held all the same.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        # (batch, heads, tokens, width), once there are any; transformers sets new ones from outside as well.
        self.keys: Any = None
        self.values: Any = None
        self._max_tokens = max_tokens
        self._buffer: _Buffer | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Holds no tokens, of this type."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens.

        Args:
            key_states: (batch, heads, new tokens, width).
            value_states: likewise.
            args: not used, there for the common signature.
            kwargs: likewise.

        Returns:
            Keys and values of all tokens, (batch, heads, tokens, width) each: views that are valid until tokens are
            taken back.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        buffer = self._buffer
        if buffer is None or not self._is_in(buffer) or not buffer.claim(self, begin, end):
            buffer = self._move(end, key_states, value_states)
        buffer.keys[..., begin:end, :] = key_states
        buffer.values[..., begin:end, :] = value_states
        self.keys, self.values = buffer.keys[..., :end, :], buffer.values[..., :end, :]
        return self.keys, self.values

    def _is_in(self, buffer: _Buffer) -> bool:
        """Whether the tokens still lie there: transformers' reordering for beams, among others, sets new tensors."""
        return self.keys is not None and bool(self.keys.data_ptr() == buffer.keys.data_ptr())

    def _move(self, num_tokens: int, key_states: torch.Tensor, value_states: torch.Tensor) -> _Buffer:
        """Copies what is held into a buffer of its own with room for `num_tokens` and more."""
        if self._buffer is not None:
            self._buffer.release(self)
        held = self.get_seq_length()
        room = max(num_tokens, min(max(2 * held, _LEAST_ROOM), self._max_tokens))
        buffer = _Buffer(key_states, value_states, room)
        buffer.keys[..., :held, :] = self.keys
        buffer.values[..., :held, :] = self.values
        buffer.hold(self, num_tokens)
        self._buffer = buffer
        return buffer

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def keep(self, num_tokens: int) -> None:
        """Takes all but the first `num_tokens` tokens back."""
        if self.keys is None or num_tokens >= self.get_seq_length():
            return
        self.keys, self.values = self.keys[..., :num_tokens, :], self.values[..., :num_tokens, :]
        if self._buffer is not None:
            self._buffer.hold(self, num_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back; transformers' own name, called with a number that is not positive."""
        self.keep(self.get_seq_length() - abs(tokens_to_remove))

    def reset(self) -> None:
        """Holds nothing any more."""
        if self._buffer is not None:
            self._buffer.release(self)
        self.keys, self.values, self._buffer = None, None, None
        self.is_initialized = False

    def fork(self) -> GrowingLayer:
        """A layer that goes on from here and shares the memory as long as it can."""
        twin = GrowingLayer(self._max_tokens)
        twin.__dict__.update(self.__dict__)
        if self._buffer is not None:
            self._buffer.hold(twin, self.get_seq_length())
        return twin

    @property
    def allocated_bytes(self) -> int:
        """Of the whole buffer."""
        return 0 if self._buffer is None else self._buffer.keys.nbytes + self._buffer.values.nbytes

    @property
    def used_bytes(self) -> int:
        """Of the tokens held."""
        return 0 if self.keys is None else int(self.keys.nbytes + self.values.nbytes)


class GrowingCache(Cache):
    """One growing layer for each of the language model's.

    All tokens are held, also where layers attend to a window: their masks see to that.

    Args:
        num_layers: of the language model.
        max_tokens: no room beyond is kept for later.
    """

    def __init__(self, num_layers: int, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        super().__init__(layers=[GrowingLayer(max_tokens) for _ in range(num_layers)])

    def keep(self, num_tokens: int) -> None:
        """Takes all but the first `num_tokens` tokens back."""
        for layer in self.layers:
            layer.keep(num_tokens)

    def fork(self) -> GrowingCache:
        """A cache that goes on from here; tokens are copied only when both have gone on."""
        twin = GrowingCache(0, max_tokens=self._max_tokens)
        twin.layers = [layer.fork() for layer in self.layers]
        return twin

    @property
    def used_bytes(self) -> int:
        """Bytes of the tokens held."""
        return sum(layer.used_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes with the room for further tokens; what forks share counts for each."""
        return sum(layer.allocated_bytes for layer in self.layers)
