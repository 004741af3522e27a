"""Start each of the first APIs of docs/first-api, as its page tells to."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import pytest
from harness.ports import free_port

from .programs import ROOT, Program

SOURCES = ROOT / "docs" / "examples" / "first-api"
USERS = ("ann", "bob")
PUSH_TOKEN = "s3cret"  # the gateway's, which each of the APIs is told


def password(user: str) -> str:
    """Return what the examples have set for this user."""
    return f"secret-of-{user}"


@dataclass(frozen=True)
class Answer:
    """Hold what the API has answered to a request that was made without the gateway."""

    status: int
    text: str
    cookies: Mapping[str, str]


@dataclass
class FirstApi:
    """Hold a running example, and a browser's share of the cookies that it has set."""

    port: int
    program: Program
    log_in: Callable[[FirstApi, str], str]
    """Return the Cookie header of a user who has logged in."""
    cookies: dict[str, str] = field(default_factory=dict)

    def request(
        self, method: str, path: str, body: str = "", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Ask the API itself, without cookies unless the headers hold them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        with contextlib.closing(connection):
            connection.request(method, path, body.encode(), dict(headers or {}))
            response = connection.getresponse()
            set_cookies = response.headers.get_all("Set-Cookie") or []
            pairs = [line.split(";")[0].split("=", 1) for line in set_cookies]
            return Answer(response.status, response.read().decode(), dict(pairs))

    def post_form(self, path: str, fields: Mapping[str, str], cookie: str = "") -> Answer:
        """Send a form as a browser does."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        if cookie:
            headers["Cookie"] = cookie
        return self.request("POST", path, urlencode(fields), headers)


def cookie_header(cookies: Mapping[str, str]) -> str:
    """Join cookies as a browser does."""
    return "; ".join(f"{name}={value}" for name, value in cookies.items())


def log_in_by_form(api: FirstApi, user: str) -> str:
    """Log in where no token guards the form."""
    answer = api.post_form("/login", {"user": user, "password": password(user)})
    assert answer.status in (200, 302, 303), answer
    return cookie_header(answer.cookies)


def require(*names: str) -> None:
    """Skip the test unless these programs are there."""
    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command that has to succeed, and return what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextlib.contextmanager
def php_alone(folder: Path, push: str) -> Iterator[FirstApi]:
    """Run the PHP example with PHP's own server."""
    require("php")
    _require_php_module("pdo_sqlite", "php-sqlite3")
    port = free_port()
    command = ["php", "-d", f"session.save_path={folder}", "-S", f"127.0.0.1:{port}"]
    command.append(str(SOURCES / "php" / "index.php"))
    database = f"sqlite:{folder}/clients.sqlite"
    environment = {"PUSH": push, "PUSH_TOKEN": PUSH_TOKEN, "DATABASE": database}
    with Program(command, port=port, **environment) as program:
        yield FirstApi(port, program, log_in_by_form)


@contextlib.contextmanager
def php_fpm(folder: Path, push: str) -> Iterator[FirstApi]:
    """Run the PHP example with php-fpm behind nginx, with the files of the page."""
    _require_php_module("pdo_sqlite", "php-sqlite3")
    database = f"sqlite:{folder}/clients.sqlite"
    script = SOURCES / "php" / "index.php"
    with php_fpm_site(folder, script, PUSH=push, DATABASE=database) as api:
        yield api


@contextlib.contextmanager
def php_fpm_site(folder: Path, script: Path, **environment: str) -> Iterator[FirstApi]:
    """Run a PHP script behind nginx, with the configuration of the page on PHP."""
    found = sorted(glob.glob("/usr/sbin/php-fpm[0-9]*"))
    if not found:
        pytest.skip("php-fpm is not installed")
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not installed")
    port, sock, is_root = free_port(), str(folder / "fpm.sock"), os.getuid() == 0
    pool = (SOURCES / "php" / "pool.conf").read_text().replace("/run/first-api.sock", sock)
    if is_root:
        pool = pool.replace("www-data", "root")  # the test's folder is closed to others
    else:
        pool = re.sub(r"^(user|listen\.owner) = .*\n", "", pool, flags=re.MULTILINE)
    pool = re.sub(r"^env.*\n", "", pool, flags=re.MULTILINE)
    environment |= {"PUSH_TOKEN": PUSH_TOKEN}
    pool += "".join(f"env[{name}] = {value}\n" for name, value in environment.items())
    pool += f"php_value[session.save_path] = {folder}\n"
    (folder / "fpm.conf").write_text(f"[global]\nerror_log = /dev/stderr\n{pool}")
    server = (SOURCES / "php" / "nginx.conf").read_text()
    for name, value in (
        ("127.0.0.1:8000", f"127.0.0.1:{port}"),
        ("/srv/first-api/index.php", str(script)),
        ("/run/first-api.sock", sock),
        ("include fastcgi_params", "include /etc/nginx/fastcgi_params"),
    ):
        assert name in server
        server = server.replace(name, value)
    (folder / "nginx.conf").write_text(
        f"{'user root;' if is_root else ''} daemon off; pid {folder}/nginx.pid;\n"
        "error_log stderr; worker_processes 1; events {}\n"
        f"http {{ client_body_temp_path {folder}/b; fastcgi_temp_path {folder}/f;\n"
        f"proxy_temp_path {folder}/p; scgi_temp_path {folder}/s; uwsgi_temp_path {folder}/u;\n"
        f"{server}}}\n"
    )
    fpm = [found[-1], "-F", "-O", "-y", str(folder / "fpm.conf"), *(["-R"] if is_root else [])]
    nginx = ["/usr/sbin/nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with Program(fpm, port=None) as program, Program(nginx, port=port):
        program.wait_for_output("ready to handle connections")
        yield FirstApi(port, program, log_in_by_form)


def _require_php_module(name: str, package: str) -> None:
    modules = subprocess.run(["php", "-m"], capture_output=True, text=True, check=True).stdout
    if name not in modules.split():
        pytest.skip(f"{package} is not installed")


@contextlib.contextmanager
def express(folder: Path, push: str) -> Iterator[FirstApi]:
    """Run the Express example with the packages of its lock file."""
    require("node", "npm")
    shutil.copytree(SOURCES / "express", folder, dirs_exist_ok=True)
    (folder / "node_modules").symlink_to(_node_modules())
    port = free_port()
    command = ["node", str(folder / "server.mjs")]
    environment = {"PUSH": push, "PUSH_TOKEN": PUSH_TOKEN, "SECRET": "of the test"}
    environment |= {"PORT": str(port)}
    with Program(command, port=port, **environment) as program:
        yield FirstApi(port, program, log_in_by_form)


def _node_modules() -> Path:
    """Install what the lock file names, once for each state of it, in the ignored .venv."""
    lock = (SOURCES / "express" / "package-lock.json").read_bytes()
    cache = ROOT / ".venv" / "node" / hashlib.sha256(lock).hexdigest()[:16]
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache.parent))
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / "express" / name, fresh)
        try:
            run(["npm", "ci", "--no-audit", "--no-fund", "--fetch-retries=0"], fresh)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(fresh)
            pytest.skip(f"npm ci failed, so Express is not there: {error}")
        with contextlib.suppress(OSError):  # another test process was faster
            fresh.rename(cache)
    return cache / "node_modules"


@contextlib.contextmanager
def fastapi(folder: Path, push: str) -> Iterator[FirstApi]:
    """Run the FastAPI example with uvicorn, with the flags of the page."""
    require_module("fastapi", "uvicorn", "httpx", "itsdangerous", "python_multipart")
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(SOURCES / "fastapi"), "main:api"]
    command += ["--port", str(port), "--workers", "2", "--timeout-keep-alive", "75"]
    command += ["--backlog", "2048", "--no-access-log"]
    environment = {"PUSH": push, "PUSH_TOKEN": PUSH_TOKEN, "SECRET": "of the test"}
    environment |= {"DATABASE": f"{folder}/clients.sqlite"}
    with Program(command, port=port, PYTHONDONTWRITEBYTECODE="1", **environment) as program:
        program.wait_for_output("Application startup complete")
        yield FirstApi(port, program, log_in_by_form)


@contextlib.contextmanager
def django(folder: Path, push: str) -> Iterator[FirstApi]:
    """Make a project as the page tells to, and run it with gunicorn."""
    require_module("django", "gunicorn", "httpx")
    source = SOURCES / "django"
    manage = [sys.executable, "manage.py"]
    run([sys.executable, "-m", "django", "startproject", "project", "."], folder)
    run([*manage, "startapp", "chat"], folder)
    shutil.copytree(source / "chat", folder / "chat", dirs_exist_ok=True)
    shutil.copy(source / "project" / "urls.py", folder / "project")
    with (folder / "project" / "settings.py").open("a") as settings:
        settings.write((source / "project" / "settings_more.py").read_text())
        # Cheap hashes, and a log of what the views say; both are the test's own.
        settings.write('PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]\n')
        settings.write("LOGGING = {'version': 1, 'handlers': {'out': {'class': ")
        settings.write("'logging.StreamHandler'}}, 'root': {'handlers': ['out'], ")
        settings.write("'level': 'INFO'}}\n")
    run([*manage, "makemigrations", "chat"], folder)
    run([*manage, "migrate"], folder)
    for user in USERS:
        command = [*manage, "createsuperuser", "--noinput", "--username", user, "--email", ""]
        run(command, folder, DJANGO_SUPERUSER_PASSWORD=password(user))
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(folder)]
    command += ["-c", str(source / "gunicorn.conf.py"), "--bind", f"127.0.0.1:{port}"]
    environment = {"WS2API_PUSH": f"http://{push}", "PUSH_TOKEN": PUSH_TOKEN}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    with Program([*command, "project.wsgi"], port=port, **environment) as program:
        yield FirstApi(port, program, _log_in_to_the_admin)


def _log_in_to_the_admin(api: FirstApi, user: str) -> str:
    form = api.request("GET", "/admin/login/")
    token = form.cookies["csrftoken"]
    fields = {"username": user, "password": password(user), "csrfmiddlewaretoken": token}
    answer = api.post_form("/admin/login/?next=/admin/", fields, cookie_header(form.cookies))
    assert answer.status == 302, answer
    return cookie_header(answer.cookies)


@contextlib.contextmanager
def laravel(folder: Path, push: str) -> Iterator[FirstApi]:
    """Put the Laravel example into a small project made of Debian's packages."""
    require("php")
    for file, package in (
        ("Illuminate/Foundation/Application.php", "php-laravel-framework"),
        ("GuzzleHttp/autoload.php", "php-guzzlehttp-guzzle"),
    ):
        if not Path("/usr/share/php", file).exists():
            pytest.skip(f"{package} is not installed")
    _require_php_module("pdo_sqlite", "php-sqlite3")
    shutil.copytree(Path(__file__).parent / "laravel", folder, dirs_exist_ok=True)
    shutil.copytree(SOURCES / "laravel", folder, dirs_exist_ok=True)
    for name in ("bootstrap/cache", "storage/sessions", "storage/views", "storage/framework"):
        (folder / name).mkdir(parents=True)
    (folder / "db.sqlite").touch()
    run(["php", "artisan", "migrate", "--force"], folder)
    with php_fpm_site(folder, folder / "index.php", WS2API_PUSH=f"http://{push}") as api:
        yield api


def require_module(*names: str) -> None:
    """Skip the test unless these Python modules are there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the module {name} is not installed")
