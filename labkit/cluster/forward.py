"""A port of this machine that leads to a port of a pod, as ``kubectl port-forward`` does, for many connections at once.

The official client's ``kubernetes.stream.portforward`` serves one connection, exchanges methods of the ApiClient
while it connects, and drops what has not been written when the other side closes. Here each connection has a
websocket and a thread of its own, and goes to a pod that is ready at that moment.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

HOST = "127.0.0.1"
CHUNK = 64 * 1024
PATIENCE_S = 10.0  # for a pod that is ready, and for the API server
PAUSE_S = 0.3
DATA, ERROR = 0, 1  # websocket channels of the first port


class PortForward:
    """Listens until closed, in a ``with`` block.

    url      ``http://127.0.0.1:PORT``
    port     the local port
    trouble  why the last connection failed, or None

    target   gives namespace, pod and port for each new connection; raises RuntimeError where there is none
    """

    def __init__(
        self, client: ApiClient, target: Callable[[], tuple[str, str, int]], local: int | None = None
    ) -> None:
        self._client, self._target = client, target
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.trouble: str | None = None
        try:
            self._listener = socket.create_server((HOST, local or 0), backlog=128)
        except (OSError, OverflowError) as error:
            raise OSError(f"port {local} of {HOST} cannot be used: {error}; choose another") from error
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://{HOST}:{self.port}"
        threading.Thread(target=self._accept, name=f"port-forward {self.port}", daemon=True).start()

    def close(self) -> None:
        """End all connections. May be called more than once."""
        with self._lock:
            self._closed = True
            ending = [*self._open, self._listener]
        for each in ending:
            _end(each)
        self._listener.close()

    def __enter__(self) -> PortForward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PortForward({self.url!r})"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, local: socket.socket) -> None:
        import websocket

        remote = None
        try:
            if self._keep(local):
                local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                remote = self._connect()
                if self._keep(remote.sock):
                    self.trouble = _pump(local, remote)
        except (OSError, RuntimeError, websocket.WebSocketException) as error:
            if not self._closed:
                self.trouble = str(error)
        finally:
            with self._lock:
                self._open -= {local, remote and remote.sock}
            if remote is not None:
                remote.shutdown()
            local.close()

    def _keep(self, each: socket.socket) -> bool:
        with self._lock:
            if not self._closed:
                self._open.add(each)
            return not self._closed

    def _connect(self) -> Any:
        """A websocket to a ready pod. Raises the last error when there was none for PATIENCE_S."""
        import websocket

        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return _dial(self._client, *self._target())
            except (OSError, RuntimeError, websocket.WebSocketException):
                if self._closed or time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)


def _dial(client: ApiClient, namespace: str, pod: str, port: int) -> Any:
    from kubernetes.stream.ws_client import create_websocket, get_websocket_url

    _, url, headers, *_ = client.param_serialize(
        "GET",
        f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward",
        query_params=[("ports", port)],
        auth_settings=["BearerToken"],
    )
    headers = {
        **{name.lower(): value for name, value in headers.items()},
        "sec-websocket-protocol": "v4.channel.k8s.io",
    }
    return create_websocket(client.configuration, get_websocket_url(url), headers)


def _pump(local: socket.socket, remote: Any) -> str | None:
    """Carry bytes both ways until one side ends; what the cluster said went wrong, or None.

    Either side's end ends both: the protocol cannot close one direction alone, and no HTTP client asks for it.
    """
    from websocket import ABNF

    begun = {DATA: False, ERROR: False}
    with selectors.DefaultSelector() as selector:
        selector.register(local, selectors.EVENT_READ)
        selector.register(remote.sock, selectors.EVENT_READ)
        while True:
            # TLS may hold decrypted bytes that the socket does not show.
            decrypted = isinstance(remote.sock, ssl.SSLSocket) and remote.sock.pending()
            ready = {key.fileobj for key, _ in selector.select(0 if decrypted else None)}
            if decrypted or remote.sock in ready:
                opcode, frame = remote.recv_data_frame(True)
                if opcode == ABNF.OPCODE_CLOSE:
                    return None
                if opcode == ABNF.OPCODE_BINARY and frame.data:
                    channel, data = frame.data[0], frame.data[1:]
                    if not begun.get(channel, True):
                        begun[channel] = True  # each channel begins with the port's number
                    elif channel == DATA:
                        local.sendall(data)
                    elif channel == ERROR:
                        return str(data.decode(errors="replace"))
            if local in ready:
                data = local.recv(CHUNK)
                if not data:
                    return None
                remote.send_binary(bytes([DATA]) + data)


def _end(each: socket.socket) -> None:
    # Of a TLS socket the plain one: its own shutdown would forget the encryption under another thread's hands.
    with suppress(OSError):
        socket.socket.shutdown(each, socket.SHUT_RDWR)
