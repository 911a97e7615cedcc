"""Which version of a model answers a request: the stable one, or the canary for a share of the requests, by their key.

A key is a point of [0, 2⁶⁴), the same in every process, and the canary answers the points below its share. So a key
keeps its version, and a share that grows moves keys from stable to canary and none back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal, get_args

from starlette.types import Scope

from service.control import Refused, Routes
from service.errors import Conflict
from service.runtime import Runtime

RouteName = Literal["stable", "canary", "shadow"]

ROUTE_NAMES: Final[tuple[RouteName, ...]] = get_args(RouteName)  # which stand for a version in addresses
POINTS: Final = 2**64
KEY_HEADER: Final = b"x-request-key"


@dataclass(frozen=True, slots=True)
class Traffic:
    """The routes of one model as far as their versions serve: a canary or a shadow that does not is None.

    Points below `canary_below` are the canary's; of what stable answers, the shadow scores those below `shadow_below`.
    """

    model: str
    stable: Runtime | None
    canary: Runtime | None
    shadow: Runtime | None
    canary_below: int
    shadow_below: int

    def of(self, key: bytes | None) -> Runtime | None:
        """The version for a request that names none."""
        if key is not None and self.canary_below and point(self.model, key) < self.canary_below:
            return self.canary
        return self.stable

    def shadow_of(self, answering: Runtime, scope: Scope) -> Runtime | None:
        """The version that scores a request once more; None where it is not chosen, or is not the stable one's."""
        if answering is not self.stable:
            return None
        chosen = self.shadow_below == POINTS or point(self.model, request_key(scope), b"shadow") < self.shadow_below
        return self.shadow if chosen else None


def resolve(model: str, routes: Routes, serving: Mapping[str, Runtime]) -> Traffic:
    """What routes come to among the versions that serve, highest first."""
    canary, shadow = serving.get(str(routes.canary)), serving.get(str(routes.shadow))
    stable = serving.get(routes.default(serving) or "")
    return Traffic(
        model,
        stable,
        canary,
        shadow,
        canary_below=below(routes.canary_percent) if canary else 0,
        shadow_below=below(routes.shadow_percent) if shadow and shadow is not stable else 0,
    )


def below(percent: float) -> int:
    """The end of the points that are so many percent of all."""
    return int(percent / 100 * POINTS)


def point(model: str, key: bytes, purpose: bytes = b"canary") -> int:
    """Where a key stands; each model and purpose has its keys in an order of its own."""
    return int.from_bytes(blake2b(key, digest_size=8, key=model.encode(), person=purpose).digest())


def request_key(scope: Scope) -> bytes:
    """The header X-Request-Key, or else the request's id, which is random where the client gave none."""
    for name, value in scope["headers"]:
        if name == KEY_HEADER and value:
            return bytes(value)
    request_id: str = scope["state"]["record"].request_id
    return request_id.encode()


def passed_over(routes: Routes, serving: Mapping[str, Runtime]) -> list[str]:
    """The versions that routes name and that do not serve."""
    return [str(version) for version in sorted(routes.named) if str(version) not in serving]


def check_routes(model: str, routes: Routes, serving: Mapping[str, Runtime], rejected: Mapping[str, Refused]) -> None:
    """Raise Conflict where routes name a version that does not serve."""
    for version in passed_over(routes, serving):
        why = f" (it was refused: {rejected[version].reason})" if version in rejected else ""
        there = ", ".join(serving) or "none"
        raise Conflict(f"version {version} of {model} does not serve{why}; those that do: {there}")
