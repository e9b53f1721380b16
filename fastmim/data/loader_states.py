"""Where a process's stream stands, from what all processes said when the run was saved, however many they were."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["state_of"]


def state_of(states: Sequence[Mapping[str, Any]] | Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The state for process `rank` of `size`; `states` are those saved, by rank (or the only one).

    As many processes as before: each its own. Others: all at the saved step; each knows every unreadable image, and the
    first one carries the count of replaced ones.
    """
    saved = [states] if isinstance(states, Mapping) else states
    if len(saved) == size:
        return dict(saved[rank])
    state = dict(saved[0])
    if "unreadable" in state:
        state["unreadable"] = sorted(
            {int(index): reason for one in saved for index, reason in one["unreadable"]}.items()
        )
        state["replaced"] = 0 if rank else sum(one["replaced"] for one in saved)
    return state
