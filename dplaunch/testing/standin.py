"""The stand-in engine: vLLM's engine-core protocol without vLLM, a model or a device.

It answers with the tokens that `dplaunch.testing.expected_tokens` foretells, and misbehaves as its
`StandInPlan` says. One thread, so that nothing happens at a time that a test cannot know.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterable

import msgspec
import zmq

from dplaunch.backend import RankBoot
from dplaunch.channel import RankChannel
from dplaunch.testing import wire
from dplaunch.testing.fault_driver import FaultDriver
from dplaunch.testing.faults import StandInPlan, When
from dplaunch.testing.host import Host, host_of
from dplaunch.testing.scheduler import Scheduler, Sequence
from dplaunch.testing.sockets import Sockets, ready_payload
from dplaunch.testing.tokens import expected_tokens, seed_of
from dplaunch.testing.utilities import Utilities, call, stands_still

__all__ = ["LATE_TOKEN", "StandInPlan", "expected_tokens", "run"]

LATE_TOKEN = 1
"""The token of an answer that comes after the end was asked for; a reserved one, which is never expected."""

BUCKETS = ("dplaunch_take_bucket", "dplaunch_load_bucket")
"""The calls that `When.WEIGHTS` strikes at."""


def run(boot: RankBoot, channel: RankChannel) -> None:
    """Runs the engine until SIGTERM; `boot.payload` is a pickled `StandInPlan`."""
    plan: StandInPlan = pickle.loads(boot.payload)
    with host_of(boot, channel) as host:
        faults = FaultDriver(plan.fault_of(boot.rank, boot.incarnation), host)
        grandchild = faults.begin()
        with Sockets(boot.handshake_address) as sockets:
            if not sockets.say_hello(host):
                return
            channel.phase("loading")
            faults.load()
            if host.stopped():
                return
            channel.phase("warming")
            faults.strike(When.BEFORE_READY)
            sockets.say_ready(ready_payload(boot, plan, faults.fault))
            host.say(f"stand-in engine of rank {boot.rank} is ready")
            Server(boot, plan, host, sockets, faults, grandchild).serve()


class Server:
    """The loop: take what came, answer one token to each running request, again."""

    def __init__(
        self,
        boot: RankBoot,
        plan: StandInPlan,
        host: Host,
        sockets: Sockets,
        faults: FaultDriver,
        grandchild: int | None,
    ) -> None:
        delay = faults.fault.token_delay_s
        self._delay_s = plan.token_delay_s if delay is None else delay
        self._report_finished = plan.report_finished
        self._host = host
        self._sockets = sockets
        self._faults = faults
        self._scheduler = Scheduler(plan.max_num_seqs, plan.max_model_len)
        self._utilities = Utilities(boot, plan, host, self._abort_all, faults.change, grandchild)
        self._worker = -1 if grandchild is None else os.pidfd_open(grandchild)
        self._doomed: dict[str, int] = {}
        self._due = 0.0

    def serve(self) -> None:
        """Returns when the engine was asked to end, after the last answers."""
        if self._faults.fault.when is When.AFTER_READY:
            self._strike()
        poller = zmq.Poller()
        poller.register(self._host.stop.fileno(), zmq.POLLIN)
        for socket in self._sockets.inputs:
            poller.register(socket, zmq.POLLIN)
        if self._worker >= 0:
            poller.register(self._worker, zmq.POLLIN)
        while not self._host.stopped():
            ready = dict(poller.poll(self._timeout_ms()))
            if self._worker in ready:
                # As vLLM, whose engine cores end with their workers.
                raise RuntimeError("a worker process of the stand-in engine died")
            for socket in self._sockets.inputs:
                if socket in ready:
                    self._receive_all(socket)
            if self._has_work() and time.monotonic() >= self._due:
                self._step()
        self._finish()

    def _has_work(self) -> bool:
        return len(self._scheduler) > 0 and not stands_still(self._utilities)

    def _timeout_ms(self) -> int | None:
        return math.ceil(max(0.0, self._due - time.monotonic()) * 1000) if self._has_work() else None

    def _receive_all(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            kind, data, *_tensors = socket.recv_multipart()
            if kind == wire.ADD:
                self._add(msgspec.msgpack.decode(data, type=wire.Request))
            elif kind == wire.ABORT:
                self._abort(msgspec.msgpack.decode(data))
            elif kind == wire.UTILITY:
                client, call_id, method, arguments = msgspec.msgpack.decode(data)
                if method in BUCKETS and self._faults.fault.when is When.WEIGHTS:
                    self._spoil(self._faults.fault.error)
                answer = call(self._utilities, call_id, method, arguments)
                self._sockets.outputs[client].send(wire.encode_outputs(utility=answer))
                if method == "misbehave" and self._faults.fault.when is When.AFTER_READY:
                    self._strike()

    def _add(self, request: wire.Request) -> None:
        if self._faults.hits(request):
            if self._faults.fault.after_tokens == 0:
                self._strike()
            self._doomed[request.request_id] = self._faults.fault.after_tokens
        if len(self._scheduler) == 0:
            self._due = time.monotonic() + self._delay_s
        self._scheduler.add(request)

    def _abort(self, request_ids: list[str]) -> None:
        # As vLLM: a client that aborts has forgotten the request, and expects no answer.
        for client, sequences in _by_client(self._scheduler.remove(request_ids)):
            if self._report_finished:
                self._send(client, [], {sequence.request_id for sequence in sequences})

    def _step(self) -> None:
        self._due = time.monotonic() + self._delay_s
        for client, outputs in self._scheduler.step(seed_of(self._utilities.weights.checksum)).items():
            if self._faults.fault.deviates:
                for output in outputs:
                    output.new_token_ids = [LATE_TOKEN for _ in output.new_token_ids]
            finished = {output.request_id for output in outputs if output.finish_reason is not None}
            self._send(client, outputs, finished if self._report_finished else None)
            for output in outputs:
                if output.request_id in self._doomed:
                    self._doomed[output.request_id] -= len(output.new_token_ids)
        if any(left <= 0 for left in self._doomed.values()):
            self._strike()

    def _strike(self) -> None:
        if self._faults.fault.returncode is not None:
            # What was answered before the end has to arrive, or no test could count on it.
            self._sockets.close()
        self._faults.strike_now()

    def _spoil(self, error: str | None) -> None:
        if error is None:
            self._strike()
        else:
            self._utilities.weights.spoiled = error

    def _abort_all(self) -> None:
        self._end_all(lambda name: wire.Output(name, [], finish_reason=wire.FINISH_ABORT))

    def _finish(self) -> None:
        late_s = self._faults.fault.late_answer_s
        if late_s is None:
            self._abort_all()
        else:
            self._host.sleep(late_s)
            self._end_all(lambda name: wire.Output(name, [LATE_TOKEN], finish_reason=wire.FINISH_STOP))

    def _end_all(self, last_word: Callable[[str], wire.Output]) -> None:
        for client, sequences in _by_client(self._scheduler.remove()):
            names = [sequence.request_id for sequence in sequences]
            self._send(client, [last_word(name) for name in names], set(names))

    def _send(self, client: int, outputs: list[wire.Output], finished: set[str] | None) -> None:
        version = self._utilities.get_weight_version()
        self._sockets.outputs[client].send(wire.encode_outputs(outputs, finished=finished, version=version))


def _by_client(sequences: list[Sequence]) -> Iterable[tuple[int, list[Sequence]]]:
    grouped: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        grouped.setdefault(sequence.client, []).append(sequence)
    return grouped.items()
