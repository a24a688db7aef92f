"""Which entry a 64-bit key has: a hash table in NumPy, all keys of a batch at once."""

import numpy as np

__all__ = ["KeyIndex"]

_EMPTY, _GONE = -1, -2


class KeyIndex:
    """Open addressing by linear probing. Entries are numbers below ``entries``; whose key an entry is, the
    caller keeps in an array, which each call is given.

    Of the slots, a power of two at least twice the entries, at most three quarters are ever taken: removed
    keys leave a mark, and with a quarter of the slots marked the index is :attr:`worn`, to be made anew. What
    is found does not depend on the order in which keys came.
    """

    def __init__(self, entries: int) -> None:
        self._slots = np.full(1 << max(4, (2 * entries - 1).bit_length()), _EMPTY, dtype=np.int32)
        self._gone = 0

    @property
    def nbytes(self) -> int:
        return self._slots.nbytes

    def find(self, keys: np.ndarray, key_of: np.ndarray) -> np.ndarray:
        """The entry of each of ``keys``, int64, or -1; ``key_of`` int64 ``[entries]``."""
        places = self._places(keys, key_of)
        return np.where(places >= 0, self._slots[places], -1)

    def add(self, keys: np.ndarray, entries: np.ndarray) -> None:
        """Distinct keys that are not there yet."""
        at, waiting = self._start(keys), np.arange(len(keys))
        while len(waiting):
            place = at[waiting]
            free = self._slots[place] < 0
            self._slots[place[free]] = entries[waiting[free]]  # of several keys one has the slot
            waiting = waiting[self._slots[place] != entries[waiting]]
            at[waiting] = self._next(at[waiting])

    def remove(self, keys: np.ndarray, key_of: np.ndarray) -> None:
        """Distinct keys that are there."""
        self._slots[self._places(keys, key_of)] = _GONE
        self._gone += len(keys)

    @property
    def worn(self) -> bool:
        return 4 * self._gone > len(self._slots)

    def rebuild(self, keys: np.ndarray, entries: np.ndarray) -> None:
        """From all keys that are there."""
        self._slots[:] = _EMPTY
        self._gone = 0
        self.add(keys, entries)

    def _places(self, keys: np.ndarray, key_of: np.ndarray) -> np.ndarray:
        """The slot of each key, or -1."""
        at, found = self._start(keys), np.full(len(keys), -1, dtype=np.int64)
        waiting = np.arange(len(keys))
        while len(waiting):
            slot = self._slots[at[waiting]]
            hit = slot >= 0
            hit[hit] = key_of[slot[hit]] == keys[waiting[hit]]
            found[waiting[hit]] = at[waiting[hit]]
            waiting = waiting[~hit & (slot != _EMPTY)]
            at[waiting] = self._next(at[waiting])
        return found

    def _start(self, keys: np.ndarray) -> np.ndarray:
        return (mixed(keys) & np.uint64(len(self._slots) - 1)).astype(np.int64)

    def _next(self, at: np.ndarray) -> np.ndarray:
        return (at + 1) & (len(self._slots) - 1)


def mixed(keys: np.ndarray) -> np.ndarray:
    """Keys, int64, with all bits spread over all: the last steps of SplitMix64 (Steele et al. 2014)."""
    x = keys.view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
