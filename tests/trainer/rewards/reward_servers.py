"""Servers on this machine that answer requests for rewards, some of them badly."""

from __future__ import annotations

import contextlib
import socket
import threading

import torch

CPU = torch.device("cpu")
QUICK = {"timeout": 0.4, "deadline": 2.0, "retries": 0, "backoff": 0.01}


def brightness(images, prompts, metadata):
    """Mean pixel plus the length of the prompt plus a number in the metadata."""
    extra = torch.tensor([float(len(prompt) + entry.get("bonus", 0)) for prompt, entry in zip(prompts, metadata)])
    return images.mean(dim=tuple(range(1, images.ndim))) + extra


class RawServer:
    """Accepts connections and gives each to ``behave(connection, number)``; closes it afterwards."""

    def __init__(self, behave):
        self.behave, self.requests, self.stopped = behave, [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.threads = [threading.Thread(target=self._accept, daemon=True)]

    def _accept(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self.threads[-1].start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            self.requests.append(None)
            self.behave(self, connection, len(self.requests))

    def read(self, connection) -> tuple[bytes, bytes]:
        """Head and body of the request."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more(connection)
        head, body = data.split(b"\r\n\r\n", 1)
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        while len(body) < length:
            body += self._more(connection)
        self.requests[-1] = (head, body)
        return head, body

    @staticmethod
    def _more(connection) -> bytes:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("the client hung up")
        return data

    def __enter__(self):
        self.threads[0].start()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        # wakes accept()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()


def response(body: bytes | str, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def answering(data: bytes):
    def behave(server, connection, number):
        server.read(connection)
        connection.sendall(data)

    return behave


def hang(server, connection, number):
    server.read(connection)
    server.stopped.wait(5)


def hang_before_reading(server, connection, number):
    server.stopped.wait(5)


def trickle_head(server, connection, number):
    server.read(connection)
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
        connection.sendall(bytes([letter]))
        if server.stopped.wait(0.05):
            return


def trickle_body(server, connection, number):
    server.read(connection)
    connection.sendall(response(b"", length=1000))
    while not server.stopped.wait(0.05):
        connection.sendall(b" ")


def trickle_chunks(server, connection, number):
    server.read(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not server.stopped.wait(0.05):
        connection.sendall(b"1\r\n \r\n")
