"""How fast micro-batches of each key run: what the watchdog's patience and the worth of a small batch go by."""

from typing import Final

_REMEMBERED: Final = 4096


class Pace:
    """Seconds a token, by key. Owned by the event loop thread."""

    def __init__(self) -> None:
        self._s_per_token: dict[str, float] = {}

    def learn(self, key: str, tokens: int, seconds: float) -> None:
        """Keep the slowest recent pace: it decays by a tenth a batch towards what is measured."""
        if len(self._s_per_token) >= _REMEMBERED:  # keys hold what callers chose: they must not pile up
            self._s_per_token.clear()
        self._s_per_token[key] = max(seconds / tokens, 0.9 * self._s_per_token.get(key, 0.0))

    def seconds(self, key: str, tokens: int) -> float | None:
        """What so many tokens are taken to last; None until one of the key was measured."""
        s_per_token = self._s_per_token.get(key)
        return None if s_per_token is None else s_per_token * tokens

    def tokens(self, key: str, seconds: float) -> int | None:
        """How many tokens are taken to last so long; None until one of the key was measured."""
        s_per_token = self._s_per_token.get(key)
        return None if not s_per_token else int(seconds / s_per_token)
