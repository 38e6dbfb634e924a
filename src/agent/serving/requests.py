"""Translates a client's keys into the policy's: feature names of the model, openpi's short ones, or the command line's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.deployment.observations import TASK, UnfitKeys, check_task
from agent.deployment.processors import STATE
from agent.serving.advice import told_to_client

if TYPE_CHECKING:
    from agent.inference import LoadedPolicy

_DEEPEST = 10


class Translation:
    """Knows which key of a request is which key of the policy.

    A slash and a dot are the same, and a map within the request is as good as a slash. ``observation.images.top`` may be
    called ``observation/images/top``, ``observation/top``, ``images/top`` or ``top``; the state ``observation/state`` or
    ``state``; the instruction ``task`` or ``prompt``.

    Args:
        policy: that is served.
        renames: further names: the client's key → the policy's. ``a,b`` → ``observation.state`` is a state whose parts the
            client sends under two keys, put together in this order; so are more of them.
        ignored: keys, or maps of keys, of the client that the policy has no use for.
        default_prompt: the instruction for requests that have none.

    Raises:
        ValueError: if an option leads to no key of the policy, or contradicts another.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        renames: Mapping[str, str],
        ignored: Sequence[str] = (),
        default_prompt: str | None = None,
    ) -> None:
        self._policy = policy
        keys = [*policy.cameras, STATE, TASK]
        names = [(key, key) for key in keys] + [("prompt", TASK), ("state", STATE)]
        for slot in policy.cameras:
            short = slot.removeprefix("observation.").removeprefix("images.").removeprefix("image.")
            # The set, because the short name can be the whole one.
            names += [(name, slot) for name in {f"observation.{short}", f"images.{short}", short} - {slot}]
        uses = Counter(name for name, _ in names)
        self._names = {name: key for name, key in names if uses[name] == 1 or name == key}
        self._names |= {_dotted(theirs): ours for theirs, ours in policy.renamed.items() if ours in keys}
        self._parts: tuple[str, ...] = ()
        self._parts_said = ""
        given: set[str] = set()
        for theirs, ours in renames.items():
            self._rename(theirs, ours, keys)
            parts = [_dotted(part) for part in theirs.split(",")]
            for part in parts:
                if part in given or parts.count(part) > 1:
                    raise ValueError(f"--rename: {part} is given twice; a key of the client has one meaning")
                if any(_is_below(part, _dotted(key)) for key in ignored):
                    raise ValueError(f"--ignore: {part} is also named by --rename; write one of them")
            given |= {*parts}
        self._ignored = tuple(_dotted(key) for key in ignored)
        self._default_prompt = default_prompt
        if default_prompt is not None:
            try:
                check_task(default_prompt)
            except ValueError as error:
                raise ValueError(f"--default_prompt: {str(error).removeprefix(f'{TASK}: ')}") from None

    def _rename(self, theirs: str, ours: str, keys: Sequence[str]) -> None:
        if ours not in keys:
            raise ValueError(f"--rename: {theirs}={ours}: the policy has no {ours}; it has {', '.join(keys)}")
        if "," not in theirs:
            self._names[_dotted(theirs)] = ours
            return
        if ours != STATE or self._parts:
            what = "it is put together already" if ours == STATE else f"only {STATE} can be put together from several"
            raise ValueError(f"--rename: {theirs}={ours}: {what}")
        self._parts, self._parts_said = tuple(_dotted(part) for part in theirs.split(",")), theirs

    def observation(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the observation in a request and checks it.

        Raises:
            ValueError: in the client's words.
        """
        observation: dict[str, Any] = {}
        said: dict[str, str] = {}  # the policy's key → the client's
        parts: dict[str, tuple[str, Any]] = {}
        dropped = []
        for theirs, value in _flat(request):
            name = _dotted(theirs)
            if any(_is_below(name, key) for key in self._ignored):
                dropped.append(theirs)
                continue
            if name in self._parts and name not in parts:
                parts[name] = (theirs, value)
                continue
            ours = self._names.get(name, theirs)
            if ours in said:
                raise ValueError(f"{theirs} and {said[ours]} are both {ours}; give it once")
            observation[ours], said[ours] = value, theirs
        if parts:
            if STATE in said:
                raise ValueError(f"{said[STATE]} and {self._parts_said} are both {STATE}; give it once")
            observation[STATE], said[STATE] = self._joined(parts), self._parts_said
        if TASK not in observation and self._default_prompt is not None:
            observation[TASK] = self._default_prompt
        try:
            self._policy.check(observation)
        except UnfitKeys as error:
            raise ValueError(told_to_client(error, observation, said, dropped, self._policy.state_dim)) from None
        except ValueError as error:
            raise ValueError(_in_their_words(str(error), said)) from None
        return observation

    def _joined(self, parts: Mapping[str, tuple[str, Any]]) -> np.ndarray:
        """Joins the state (state_dim,) whose parts a client sends under several keys."""
        if absent := [part for part in self._parts if part not in parts]:
            raise ValueError(
                f"the request has no {', '.join(absent)}; {STATE} is put together from {self._parts_said} (--rename)"
            )
        return np.concatenate([_numbers(*parts[part]) for part in self._parts])


def _numbers(theirs: str, value: Any) -> np.ndarray:
    """Reads a part of the state as (n,), a single number too."""
    wanted = f"expected a part of {STATE}: numbers, shape (n,), or one number"
    try:
        values = np.atleast_1d(np.asarray(value))
    except ValueError:
        raise ValueError(f"{theirs}: got lists of several lengths, {wanted}") from None
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        kind = f"{values.dtype} of shape {values.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{theirs}: got {kind}, {wanted}")
    return values


def _in_their_words(text: str, said: Mapping[str, str]) -> str:
    """Writes a message that begins with keys of the policy with the client's names for them."""
    keys, colon, rest = text.partition(":")
    named = [f"{said[key]} ({key})" if said.get(key, key) != key else key for key in keys.split(", ")]
    return f"{', '.join(named)}{colon}{rest}"


def _dotted(key: str) -> str:
    return key.replace("/", ".")


def _is_below(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _flat(request: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    if depth > _DEEPEST:  # msgpack goes deeper than Python's stack
        raise ValueError(f"{prefix:.60}: maps are nested more than {_DEEPEST} deep")
    pairs: list[tuple[str, Any]] = []
    for key, value in request.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}/", depth + 1) if isinstance(value, dict) and value else [(name, value)]
    return pairs
