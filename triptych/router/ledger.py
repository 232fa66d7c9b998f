"""What all requests hold together of their bodies and media, in bytes: one number, and one bound for it.

Pure: whoever is about to hold more says so first, and is refused where it does not fit beside what others hold.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from types import TracebackType
from typing import Self

from triptych.errors import RequestError
from triptych.router.admission import BUSY_RETRY_S, overloaded
from triptych.router.clock import Clock

SMALL_SHARE = 8  # one part in so many of the bound is for small requests without media: text is answered beside them
_SMALL_BYTES = 64 << 10  # or a thousandth of the bound, if that is more

# A body that came more slowly than this after some seconds gives its place to others when they need it.
FAIR_GRACE_S = 5.0
FAIR_BYTES_PER_S = 64 << 10


def body_cost(num_bytes: int) -> int:
    """What comes of a body in base64, at most: the text, and the bytes that it spells."""
    return num_bytes + num_bytes * 3 // 4


class _Pool:
    """A part of the bound. Whoever is alone in it may have more."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class Ledger:
    """Opens reservations and adds them up."""

    def __init__(
        self, max_bytes: int, clock: Clock, refused: Callable[[RequestError], None] = lambda error: None
    ) -> None:
        """`refused` is told of every refusal."""
        self._clock = clock
        self._refused = refused
        self._small_bytes = max(max_bytes >> 10, _SMALL_BYTES)
        self._small = _Pool(max_bytes // SMALL_SHARE)
        self._main = _Pool(max_bytes - max_bytes // SMALL_SHARE)
        self._open: set[Reservation] = set()
        self._arriving: dict[Reservation, None] = {}  # the oldest first

    @property
    def num_bytes(self) -> int:
        return self._small.num_bytes + self._main.num_bytes

    def reserve(self) -> "Reservation":
        """Of nothing at first."""
        return Reservation(self)

    def check_integrity(self) -> None:
        for pool in (self._small, self._main):
            held = [one.num_bytes for one in self._open if one.pool is pool]
            assert sum(held) == pool.num_bytes, f"{sum(held)} bytes reserved, {pool.num_bytes} counted"
            assert pool.num_bytes <= pool.max_bytes or len(held) == 1, f"{pool.num_bytes} of {pool.max_bytes} bytes"

    def _set(self, reservation: "Reservation", num_bytes: int) -> None:
        """Raises RequestError(503) where it holds more than before and there is no room: then it keeps what it has."""
        is_small = num_bytes <= self._small_bytes and not reservation.has_media
        pool = self._small if is_small else self._main
        if num_bytes and (reservation.pool is not pool or num_bytes > reservation.num_bytes):
            self._make_room(reservation, num_bytes, pool)
        self._clear(reservation)
        if num_bytes:
            reservation.pool, reservation.num_bytes = pool, num_bytes
            pool.num_bytes += num_bytes
            self._open.add(reservation)

    def _clear(self, reservation: "Reservation") -> None:
        if reservation.pool is not None:
            reservation.pool.num_bytes -= reservation.num_bytes
        reservation.pool, reservation.num_bytes = None, 0
        self._open.discard(reservation)

    def _make_room(self, reservation: "Reservation", num_bytes: int, pool: _Pool) -> None:
        """Takes what bodies hold that come too slowly, if that is enough."""
        others = pool.num_bytes - (reservation.num_bytes if reservation.pool is pool else 0)
        if not others or others + num_bytes <= pool.max_bytes:
            return
        latest = self._clock.now - FAIR_GRACE_S
        old = takewhile(lambda one: one.began_at < latest, self._arriving)
        slow = [one for one in old if one.pool is pool and one is not reservation and one.is_slow]
        rest = others - sum(one.num_bytes for one in slow)
        if rest and rest + num_bytes > pool.max_bytes:
            raise self._refusal()  # named by no frame on its way: gc alone would let go of what they hold
        for one in slow:
            if others + num_bytes > pool.max_bytes:
                others -= one.num_bytes
                one.displace()

    def _refusal(self) -> RequestError:
        most = self._small.max_bytes + self._main.max_bytes
        why = f"requests hold {self.num_bytes} of at most {most} bytes of bodies and media"
        error = overloaded(why, BUSY_RETRY_S)
        self._refused(error)
        return error


class Reservation:
    """What one request holds. Leaving the `with` block lets go of all of it."""

    def __init__(self, ledger: Ledger) -> None:
        self.num_bytes = 0
        self.pool: _Pool | None = None
        self.has_media = False
        self._ledger = ledger
        self._num_arrived = 0
        self.began_at = 0.0
        self._hurry: Callable[[], None] | None = None
        self._displaced = False

    @contextmanager
    def arriving(self, hurry: Callable[[], None]) -> Iterator[None]:
        """Inside, a body arrives. If it comes slowly its place may go to others: then `hurry` is called, once, and
        whatever is asked for later raises RequestError(408)."""
        self.began_at, self._hurry = self._ledger._clock.now, hurry
        self._ledger._arriving[self] = None
        try:
            yield
        finally:
            self._ledger._arriving.pop(self, None)

    def expect(self, num_bytes: int) -> None:
        """The body will be so long, as its head says. Raises RequestError(503)."""
        self._hold(body_cost(num_bytes))

    def arrive(self, num_bytes: int) -> None:
        """So much more of the body is here. Raises RequestError(503, 408)."""
        self._num_arrived += num_bytes
        self._hold(max(self.num_bytes, body_cost(self._num_arrived)))

    def take(self, num_bytes: int) -> None:
        """So many bytes of media beside the body. Raises RequestError(503)."""
        self.has_media = True
        self._hold(self.num_bytes + num_bytes)

    def keep(self, media_bytes: int) -> None:
        """From now on only so many bytes of media: the body and its text are let go. Raises RequestError(503)."""
        self.has_media = media_bytes > 0
        self._hold(media_bytes)

    def close(self) -> None:
        """Idempotent."""
        self._ledger._clear(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_slow(self) -> bool:
        """Of a body that arrives."""
        fair_s = FAIR_GRACE_S + self._num_arrived / FAIR_BYTES_PER_S
        return self._ledger._clock.now - self.began_at > fair_s

    def displace(self) -> None:
        assert self._hurry is not None, "only a body that arrives can be too slow"
        self._displaced = True
        self._ledger._arriving.pop(self, None)
        self.close()
        self._hurry()

    def _hold(self, num_bytes: int) -> None:
        if self._displaced:
            text = "the body comes too slowly for a server that is overloaded; please try again later"
            raise RequestError(text, status=408, code="request_timeout", retry_after_s=BUSY_RETRY_S)
        self._ledger._set(self, num_bytes)
