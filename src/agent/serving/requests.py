"""From a client's keys to the policy's: the model's feature names, or openpi's short ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent.observation_check import TASK
from agent.saved_processors import STATE

if TYPE_CHECKING:
    from agent.inference import LoadedPolicy

_DEEPEST = 10


class Translation:
    """Which key of a request is which of the policy's.

    A slash and a dot are the same, and a map within the request is as good as a slash. ``observation.images.top`` may be
    called ``observation/images/top``, ``observation/top``, ``images/top`` or ``top``; the state ``observation/state`` or
    ``state``; the instruction ``task`` or ``prompt``.

    Args:
        policy: that is served.
        renames: further names: the client's key → the policy's.

    Raises:
        ValueError: if a rename leads to no key of the policy.
    """

    def __init__(self, policy: LoadedPolicy, renames: Mapping[str, str]) -> None:
        self._policy = policy
        keys = [*policy.cameras, STATE, TASK]
        for theirs, ours in renames.items():
            if ours not in keys:
                raise ValueError(f"--rename: {theirs}={ours}: the policy has no {ours}; it has {', '.join(keys)}")
        names = [(key, key) for key in keys] + [("prompt", TASK), ("state", STATE)]
        for slot in policy.cameras:
            short = slot.removeprefix("observation.").removeprefix("images.").removeprefix("image.")
            # The set, because the short name can be the whole one.
            names += [(name, slot) for name in {f"observation.{short}", f"images.{short}", short} - {slot}]
        uses = Counter(name for name, _ in names)
        self._names = {name: key for name, key in names if uses[name] == 1 or name == key}
        self._names |= {_dotted(theirs): ours for theirs, ours in renames.items()}

    def observation(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The observation in a request, checked.

        Raises:
            ValueError: in the client's words.
        """
        observation: dict[str, Any] = {}
        said: dict[str, str] = {}  # the policy's key → the client's
        for theirs, value in _flat(request):
            ours = self._names.get(_dotted(theirs), theirs)
            if ours in said:
                raise ValueError(f"{theirs} and {said[ours]} are both {ours}; give it once")
            observation[ours], said[ours] = value, theirs
        try:
            self._policy.check(observation)
        except ValueError as error:
            key, colon, rest = str(error).partition(":")
            if colon and said.get(key, key) != key:
                raise ValueError(f"{said[key]} ({key}):{rest}") from None
            raise
        return observation


def _dotted(key: str) -> str:
    return key.replace("/", ".")


def _flat(request: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    if depth > _DEEPEST:  # msgpack goes deeper than Python's stack
        raise ValueError(f"{prefix:.60}: maps are nested more than {_DEEPEST} deep")
    pairs: list[tuple[str, Any]] = []
    for key, value in request.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}/", depth + 1) if isinstance(value, dict) and value else [(name, value)]
    return pairs
