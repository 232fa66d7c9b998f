"""Random internal messages of every kind: well-formed, and otherwise anything that a stage could be told.

What would be a lie of a trusted process about somebody else's request is left out, because nothing could tell it from
the truth: a release of a lease that is held, an abort of a live request, content under the name of other content.
"""

import math
import random
import typing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.builders import BLOCK_TOKENS, make_media, make_request, make_unit
from triptych import messages
from triptych.core import InstanceId, LeaseId, Media, RequestId, Role
from triptych.messages import AnyMessage, Embedded, Encode, Prefilled, Prefilling, Release, Share, Submit, Table, Ticket

COMMANDS = ("Table", "SwitchRole", "Shutdown")  # of the controller, who means what it says
KINDS = [kind for kind in typing.get_args(messages.AnyMessage) if kind.__name__ not in COMMANDS]
NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 1000, 1 << 31, 1 << 53, -1, -(1 << 31))
NEVER_GRANTED = 1 << 40  # leases from here on


@dataclass
class Noise:
    """Draws messages from one random stream, about requests and units that nobody else speaks of."""

    rng: random.Random
    epochs: dict[str, str]  # of the instances that there are
    requests: list[str] = field(default_factory=lambda: [f"noise-{i}" for i in range(6)])
    _submitted: set[str] = field(default_factory=set)

    def request(self) -> Submit:
        """Often under the name of one before it."""
        rng = self.rng
        name = rng.choice(self.requests)
        if name in self._submitted and rng.random() < 0.5:
            name = f"noise-{len(self.requests)}"
            self.requests.append(name)
        self._submitted.add(name)
        return make_request(
            name,
            tuple(self._unit() for _ in range(rng.randrange(4))),
            text=rng.randrange(1, 9),
            max_tokens=rng.choice([1, 2, 8]),
            ordered=rng.random() < 0.5,
        )

    def message(self) -> AnyMessage:
        """Mostly what makes sense on its own, as if something before it had been lost or had overtaken it."""
        draw = self.rng.random()
        if draw < 0.35:
            return self._sensible()
        if draw < 0.4:
            return Table(self.rng.choice([0, -1, -(1 << 31)]), [])  # older than any
        kind = self.rng.choice(KINDS)
        return typing.cast(AnyMessage, self._struct(kind))

    def _sensible(self) -> AnyMessage:
        rng = self.rng
        request = make_request(
            rng.choice(self.requests), tuple(self._unit() for _ in range(rng.randrange(4))), text=rng.randrange(1, 9)
        )
        unit = self._unit()
        match rng.randrange(7):
            case 0:
                return self.request()
            case 1:
                return Encode(request.request_id, make_media(rng.randbytes(4)), request.units, self._instance())
            case 2:
                return Embedded(request.request_id, unit.hash, self._ticket(unit.num_tokens, "embedding"))
            case 3:
                ticket = self._ticket(len(request.token_ids), "kv")
                return Prefilling(request.request_id, len(request.token_ids) + 9, request.prompt_hashes, ticket)
            case 4:
                ticket = self._ticket(len(request.token_ids), "kv")
                tokens = [*request.token_ids, 5]
                return Prefilled(
                    request.request_id, tokens, len(tokens) - 1, request.sampling, 0, request.prompt_hashes, ticket
                )
            case 5:
                return Share(request.request_id, unit, self._instance())
            case _:
                return messages.Abort(request.request_id)

    def _ticket(self, num_tokens: int, region: str) -> Ticket:
        """Of as many blocks as it should have, often of a holder that is not there or of another incarnation."""
        holder = self._instance()
        epoch = self.epochs.get(holder, "none") if self.rng.random() < 0.5 else "stale"
        first = self.rng.choice([0, 3, 20, 30, 1 << 20])  # of 32
        blocks = [first + i for i in range(-(-num_tokens // BLOCK_TOKENS))]
        return Ticket(holder, epoch, self._lease(), region, blocks, num_tokens)

    def _unit(self) -> typing.Any:
        number = self.rng.randrange(8)  # the content decides the number of rows
        return make_unit(f"noise-{number}", (1, 4, 8, 9)[number % 4])

    def _instance(self) -> InstanceId:
        return InstanceId(self.rng.choice([*self.epochs, "ghost", ""]))

    def _lease(self) -> LeaseId:
        return LeaseId(NEVER_GRANTED + self.rng.randrange(1 << 20))

    # ---- anything at all, by the types of the fields

    def _struct(self, kind: type[msgspec.Struct]) -> msgspec.Struct:
        if kind is Release:
            return Release(self._lease())
        if kind is Ticket:
            num_tokens = self.rng.choice([-1, 0, 1, 4, 9, 33, 1 << 10])
            return self._ticket(num_tokens, self.rng.choice(["kv", "embedding", "", "nowhere"]))
        if kind is Media:
            return make_media(self.rng.randbytes(4))
        if kind is Submit:
            return self._mangled(self.request())
        hints = typing.get_type_hints(kind)
        values = {one.name: self._value(hints[one.name], one.name) for one in msgspec.structs.fields(kind)}
        return kind(**values)

    def _mangled(self, message: Submit) -> Submit:
        """With one field that may be anything."""
        name = self.rng.choice([name for name in message.__struct_fields__ if name != "request_id"])
        value = self._value(typing.get_type_hints(Submit)[name], name)
        return msgspec.structs.replace(message, **{name: value})

    def _value(self, kind: Any, name: str) -> Any:
        rng = self.rng
        if kind is RequestId:
            return rng.choice([*self.requests, "", "nobody"])
        if kind is InstanceId:
            return self._instance()
        if kind is LeaseId:
            return self._lease()
        if name == "epoch":
            return rng.choice([*self.epochs.values(), "", "stale"])
        if name == "region":
            return rng.choice(["kv", "embedding", "", "nowhere"])
        if name == "hash" or (isinstance(kind, typing.NewType) and kind.__supertype__ is bytes):
            return b"noise" + rng.randbytes(11)
        if isinstance(kind, typing.NewType):
            return self._value(kind.__supertype__, name)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self._struct(kind)
        return self._container(kind, name)

    def _container(self, kind: Any, name: str) -> Any:
        rng, origin, args = self.rng, typing.get_origin(kind), typing.get_args(kind)
        length = rng.choice([0, 0, 1, 2, 5])
        if origin is list:
            return [self._value(args[0], name) for _ in range(length)]
        if origin is tuple:
            return tuple(self._value(args[0], name) for _ in range(length))
        if origin is dict:
            return {self._value(args[0], name): self._value(args[1], name) for _ in range(length)}
        if args:  # a union, or annotated
            return self._value(rng.choice([arg for arg in args if isinstance(arg, type) or typing.get_args(arg)]), name)
        return self._scalar(kind)

    def _scalar(self, kind: Any) -> Any:
        rng = self.rng
        if kind is int:
            return rng.choice(NUMBERS)
        if kind is float:
            return rng.choice([0.0, 1.0, -1.0, 1e308, math.inf, math.nan])
        if kind is bool:
            return rng.random() < 0.5
        if kind is str:
            return rng.choice(["", "d", "p", "image", "x" * 1000])
        if kind is bytes:
            return rng.randbytes(rng.choice([0, 1, 16, 100]))
        if kind is type(None):
            return None
        if isinstance(kind, type) and issubclass(kind, Role.__mro__[1]):
            return rng.choice(list(kind))
        return [rng.choice(NUMBERS)]
