"""Run a real HAProxy, nginx or Caddy in front of gateways, with the file that is shipped for it."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from .certificates import Certificate
from .gateway import GatewayProcess
from .http_messages import Response, encode_head, read_response
from .ports import free_ports
from .processes import Process, find_children, find_descendants
from .stream import Stream
from .waiting import DEADLINE_S, until
from .ws import WsClient, handshake, upgrade_request

CONFIGURATIONS: Final = Path(__file__).parent.parent.parent / "haproxy"
OWN_PAGE: Final = "https://shop.example"
"""The origin that the shipped files let in."""


def find_program(name: str) -> str | None:
    """Return the path of a program; servers stand where the PATH of a user does not lead."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def replace_once(text: str, replacements: Mapping[str, str]) -> str:
    """Put a test's addresses and paths into a shipped file; each stands in it exactly once."""
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the file"
        text = text.replace(old, new)
    return text


class ProxyProcess:
    """Run a proxy until the context ends, and be a client of it.

    Args:
        command: stays in the foreground.
        folder: for its output.
        certificate: what it presents; the clients here trust nothing else.
        port: where it serves wss.
        environment: variables to add.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        certificate: Certificate,
        port: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = "127.0.0.1", port
        self._context = ssl.create_default_context(cafile=str(certificate.certificate))
        self._output = folder / f"proxy-{port}.log"
        self._streams: list[Stream] = []
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
        try:
            until(self._is_settled, what=f"{command[0]} listens")
            assert self.is_running, self.output
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ProxyProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disconnect_all()
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether its first process lives."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def _is_settled(self) -> bool:
        return not self.is_running or listens(self.address)

    def open_stream(self, source: str | None = None) -> Stream:
        """Open a TLS connection, from this local address."""
        sock = socket.create_connection(
            self.address, DEADLINE_S, source_address=(source, 0) if source else None
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(self._context.wrap_socket(sock, server_hostname="127.0.0.1"))
        except BaseException:
            sock.close()
            raise
        self._streams.append(stream)
        return stream

    def connect(
        self,
        client_id: str,
        headers: Mapping[str, str | None] | None = None,
        *,
        source: str | None = None,
    ) -> WsClient:
        """Open a WebSocket; the API must accept it."""
        return WsClient(self.open_stream(source), f"/{client_id}", headers)

    def handshake(
        self,
        client_id: str,
        headers: Mapping[str, str | None] | None = None,
        *,
        source: str | None = None,
    ) -> Response:
        """Ask for a WebSocket and return the answer, whatever it is."""
        request = upgrade_request(f"/{client_id}", headers)
        with contextlib.closing(self.open_stream(source)) as stream:
            return handshake(stream, request)

    def request(
        self, method: str, target: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send any request, and return the answer."""
        fields = {"Host": "gateway.example"} | dict(headers or {})
        with contextlib.closing(self.open_stream()) as stream:
            stream.write(encode_head(f"{method} {target} HTTP/1.1", fields))
            return read_response(stream, to_head=method == "HEAD")

    def disconnect_all(self) -> None:
        """Close every connection that was opened through this object."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it at once, with whatever it has started."""
        processes = find_descendants(self._process.pid) if self.is_running else []
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_S)
        finally:
            for process in processes:
                if process.is_alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)


class HaproxyProcess(ProxyProcess):
    """Run HAProxy with haproxy/haproxy.cfg as it is, or with the lines for several hosts in it.

    Args:
        gateways: one takes the file as it is; for several, the lines that are comments in it count.
        changes: what else to replace.
        settings: variables that stand at its top.
    """

    def __init__(
        self,
        gateways: Sequence[GatewayProcess],
        *,
        folder: Path,
        certificate: Certificate,
        changes: Mapping[str, str] | None = None,
        **settings: str,
    ) -> None:
        port, status_port = free_ports(2)
        self.status_address = "127.0.0.1", status_port
        self.socket = folder / f"{port}.sock"
        self.file = haproxy_file(folder, gateways, changes or {})
        environment = {
            "PROXY_BIND": f"127.0.0.1:{port}",
            "PROXY_CERTIFICATE": str(bundle(certificate)),
            "PROXY_STATUS": f"127.0.0.1:{status_port}",
            "PROXY_SOCKET": str(self.socket),
            "PROXY_LOG": "stdout",
            "PROXY_MAXCONN": "500",
            "PROXY_RATE": "100000",
            "GATEWAY": join_address(gateways[0].clients_address),
            "GATEWAY_ADMIN_PORT": str(gateways[0].admin_address[1]),
        }
        super().__init__(
            # Without SO_REUSEPORT (-dR), so that no gateway of another test is given the same port.
            [find_program("haproxy") or "haproxy", "-dR", "-W", "-f", str(self.file)],
            folder=folder,
            certificate=certificate,
            port=port,
            environment=environment | settings,
        )

    def command(self, line: str) -> str:
        """Send a line to the socket for commands, and return the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(self.socket))
            sock.sendall(f"{line}\n".encode())
            with sock.makefile() as answer:
                return answer.read()

    def status_of(self, server: str) -> str:
        """Return what HAProxy thinks of a server: UP, DOWN, DRAIN, no check, …"""
        lines = self.command("show stat").removeprefix("# ").splitlines()
        (row,) = [row for row in csv.DictReader(lines) if row["svname"] == server]
        return row["status"]

    def await_status(self, server: str, status: str) -> None:
        """Wait until HAProxy thinks so of a server."""
        until(
            lambda: self.status_of(server).startswith(status),
            timeout_s=2 * DEADLINE_S,
            what=f"{server} is {status}",
        )


def haproxy_file(
    folder: Path, gateways: Sequence[GatewayProcess], changes: Mapping[str, str]
) -> Path:
    """Return the shipped file, or a copy of it that has changes or the lines of several hosts."""
    shipped = CONFIGURATIONS / "haproxy.cfg"
    if len(gateways) == 1 and not changes and os.geteuid() == 0:
        return shipped
    text = replace_once(shipped.read_text(), changes)
    if os.geteuid() != 0:  # only root may be somebody else
        text = replace_once(text, {f"    {line}\n": "" for line in ROOT_LINES})
    if len(gateways) > 1:
        text = replace_once(text, dict.fromkeys(ONE_HOST_LINES, ""))
        for number, gateway in enumerate(gateways, 1):
            address = join_address(gateway.clients_address)
            example = f"10.0.0.1{number}:7001"
            lines = {
                f"    # server host{number}        {example} check port 7003":
                f"    server host{number} {address} check port {gateway.admin_address[1]}",
                f"    # server host{number}-backup {example} backup":
                f"    server host{number}-backup {address} backup",
            }  # fmt: skip
            text = replace_once(text, lines)
    copy = folder / f"haproxy-{len(list(folder.iterdir()))}.cfg"
    copy.write_text(text)
    return copy


ROOT_LINES: Final = ("user haproxy", "group haproxy", "chroot /var/lib/haproxy")
ONE_HOST_LINES: Final = (
    '    server host1        "${GATEWAY}" check port "${GATEWAY_ADMIN_PORT}"\n',
    '    server host1-backup "${GATEWAY}" backup\n',
)


NGINX_OWN_LINES: Final = {
    "listen 443 ssl backlog=4096;": "listen {address} ssl;",
    "/etc/nginx/certs/fullchain.pem": "{certificate}",
    "/etc/nginx/certs/privkey.pem": "{key}",
    "pid /run/nginx.pid;": "pid {folder}/nginx.pid;",
    "/var/log/nginx/error.log;\nworker": "stderr;\nworker",
    "/var/log/nginx/access.log;": "{folder}/access.log;",
    "listen 127.0.0.1:8405;": "listen {status};",
}
"""What a test changes in the file for nginx: addresses and paths."""


class NginxProcess(ProxyProcess):
    """Run nginx with haproxy/nginx.conf, in which addresses and paths are replaced.

    Args:
        gateways: the hosts.
        changes: what else to replace.
    """

    def __init__(
        self,
        gateways: Sequence[GatewayProcess],
        *,
        folder: Path,
        certificate: Certificate,
        changes: Mapping[str, str] | None = None,
    ) -> None:
        port, status_port = free_ports(2)
        self.status_address = "127.0.0.1", status_port
        self.folder = folder / f"nginx-{port}"
        self.folder.mkdir()
        self.file = self.folder / "nginx.conf"
        values = {
            "address": f"127.0.0.1:{port}",
            "status": f"127.0.0.1:{status_port}",
            "certificate": str(certificate.certificate),
            "key": str(certificate.key),
            "folder": str(self.folder),
        }
        own = {old: new.format(**values) for old, new in NGINX_OWN_LINES.items()}
        if os.geteuid() != 0:  # only root may be somebody else, and write where nginx would
            own |= {
                "user www-data;\n": "",
                "http {\n": "http {\n"
                + "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in TEMPORARY),
            }
        own["server 127.0.0.1:7001 max_fails=2 fail_timeout=10s;"] = "\n".join(
            f"server {join_address(gateway.clients_address)} max_fails=2 fail_timeout=10s;"
            for gateway in gateways
        )
        text = (CONFIGURATIONS / "nginx.conf").read_text()
        self.file.write_text(replace_once(text, own | dict(changes or {})))
        super().__init__(
            [*self.command, "-g", "daemon off;"],
            folder=self.folder,
            certificate=certificate,
            port=port,
        )

    @property
    def command(self) -> list[str]:
        """The start of every command line."""
        program = find_program("nginx") or "nginx"
        return [program, "-p", str(self.folder), "-e", "stderr", "-c", str(self.file)]

    def reload(self, changes: Mapping[str, str]) -> None:
        """Change the file, let nginx read it, and see the old processes accept no more."""
        self.file.write_text(replace_once(self.file.read_text(), changes))
        old = set(find_children(self._process.pid))
        self.signal(signal.SIGHUP)
        until(
            lambda: all(is_retiring(process) for process in old),
            what="the old processes of nginx retire",
        )


TEMPORARY: Final = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def is_retiring(process: Process) -> bool:
    """Tell whether a process of nginx accepts no more, by the title that it gives itself."""
    if not process.is_alive:
        return True
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"shutting down" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return True


class CaddyProcess(ProxyProcess):
    """Run Caddy with haproxy/Caddyfile, in which the line for a certificate counts.

    Args:
        gateways: have their admin ports in common, at addresses of their own.
    """

    def __init__(
        self, gateways: Sequence[GatewayProcess], *, folder: Path, certificate: Certificate
    ) -> None:
        port, command_port = free_ports(2)
        self.folder = folder / f"caddy-{port}"
        self.folder.mkdir()
        self.file = self.folder / "Caddyfile"
        example = "# tls /etc/caddy/certs/fullchain.pem /etc/caddy/certs/privkey.pem #"
        text = (CONFIGURATIONS / "Caddyfile").read_text()
        own = {example: f"tls {certificate.certificate} {certificate.key} #"}
        self.file.write_text(replace_once(text, own))
        (admin_port,) = {gateway.admin_address[1] for gateway in gateways}
        self.environment = {
            "CADDY_SITE": f"https://:{port}",
            "CADDY_ADMIN": f"127.0.0.1:{command_port}",
            "GATEWAYS": " ".join(join_address(gateway.clients_address) for gateway in gateways),
            "GATEWAY_ADMIN_PORT": str(admin_port),
            "HOME": str(self.folder),
            "XDG_DATA_HOME": str(self.folder / "data"),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
        }
        program = find_program("caddy") or "caddy"
        super().__init__(
            [program, "run", "--adapter", "caddyfile", "--config", str(self.file)],
            folder=self.folder,
            certificate=certificate,
            port=port,
            environment=self.environment,
        )


def bundle(certificate: Certificate) -> Path:
    """Write the certificate and its key into one file, as HAProxy reads them."""
    file = certificate.certificate.with_suffix(".bundle.pem")
    file.write_bytes(certificate.certificate.read_bytes() + certificate.key.read_bytes())
    return file


def join_address(address: tuple[str, int]) -> str:
    """Write host and port with the colon between them."""
    return f"{address[0]}:{address[1]}"


def listens(address: tuple[str, int]) -> bool:
    """Tell whether something accepts connections there."""
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0
