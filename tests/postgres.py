"""A PostgreSQL server of the tests' own, and a pooler before it, which end with them."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Final, Self

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from tests.waiting import wait_until

__all__ = ["PASSWORD", "PgBouncer", "Postgres", "pgbouncer_program", "programs"]

PASSWORD: Final = "correct/horse battery@staple"
"""Of the user `guest`, the only one that needs one."""

_POOLED: Final = "pooled"
_PORT: Final = 6432
"""Of the pooler; the number only names its socket."""
_SETTINGS: Final = {
    "autovacuum": "off",
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "max_connections": "50",
}


def programs() -> Path | None:
    """Return where the server's programs are; None: they are not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    # Debian keeps them off the PATH, in a folder for each version.
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), key=_number, default=None)


def pgbouncer_program() -> str | None:
    """Return the pooler's program; None: it is not installed."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Postgres:
    """A server on a socket in a temporary directory, killed should its tests be killed.

    Attributes:
        version: As the server tells it.
    """

    def __init__(self, kept: Path | None = None) -> None:
        """Set it up.

        Args:
            kept: Directory of its data, which stays for the next server; None: a temporary one.
        """
        self._kept = kept

    def __enter__(self) -> Self:
        found = programs()
        assert found is not None
        self._programs = found
        self.version = self._done("postgres", "--version")
        self.directory = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._numbers = count(1)
        if os.getuid() == 0:
            # It refuses to run as root; the package has made a user for it.
            shutil.chown(self.directory, "postgres")
        self._data = self._kept or self.directory / "data"
        if self._data.exists():
            self.start()
        else:
            self._initialize()
        return self

    def _initialize(self) -> None:
        self._data.mkdir()
        if os.getuid() == 0:
            shutil.chown(self._data, "postgres")
        # With an order of texts that is not that of their code points, where it has one of its own.
        order = ["--locale-provider=icu", "--icu-locale=und"] if _number(self.version) >= 15 else []
        self._done(
            *("initdb", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"),
            *("--username=postgres", f"--pgdata={self._data}", *order),
        )
        access = self._data / "pg_hba.conf"
        access.write_text("local all guest scram-sha-256\nlocal all all trust\n")
        self.start()
        self.execute(f"CREATE ROLE guest SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
        self.execute("CREATE ROLE reader LOGIN")

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start it from a thread that it may die with; return once it answers."""
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        socket = f"--unix_socket_directories={self.directory}"
        self._server = subprocess.Popen(
            self._command("postgres", "-D", str(self._data), socket, *settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._engine = sa.create_engine(self.url())
        wait_until(self._answers)

    def stop(self) -> None:
        """End it in the middle of whatever it does."""
        self._engine.dispose()
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait()

    def url(self, schema: str = "public") -> str:
        """Return the URL of one of its schemas."""
        url = sa.URL.create(
            "postgresql+psycopg",  # SQLAlchemy 2.0 takes another driver unless asked
            "postgres",
            database="postgres",
            query={"host": str(self.directory), "options": f"-csearch_path={schema}"},
        )
        return url.render_as_string()

    def new_url(self) -> str:
        """Return the URL of a place of its own, with nothing in it."""
        return self.place(f"s{next(self._numbers)}")

    def place(self, schema: str) -> str:
        """Return the URL of a schema, which is created unless it exists."""
        self.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        return self.url(schema)

    def execute(self, statement: str) -> list[object]:
        """Do something as the administrator; return the first column of what it tells."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            done = connection.exec_driver_sql(statement)
            return list(done.scalars()) if done.returns_rows else []

    def _answers(self) -> bool:
        assert self._server.poll() is None, "the server has ended"
        try:
            return self.execute("SELECT 1") == [1]
        except OperationalError:
            return False

    def _done(self, program: str, *arguments: str) -> str:
        command = self._command(program, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _command(self, program: str, *arguments: str) -> list[str]:
        return _as_its_user(str(self._programs / program), *arguments)


class PgBouncer:
    """A pooler before a server, on a socket in its directory, with a database of its own.

    After each transaction it gives the session of the server to whichever client is next.
    """

    def __init__(self, server: Postgres) -> None:
        self._server = server

    def __enter__(self) -> Self:
        program = pgbouncer_program()
        assert program is not None
        self._server.execute(f"CREATE DATABASE {_POOLED}")
        self._direct = sa.create_engine(self._url())
        directory = self._server.directory
        users = directory / "users.txt"
        users.write_text('"postgres" ""\n')
        config = directory / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={directory}\n"
            f"[pgbouncer]\npool_mode = transaction\ndefault_pool_size = 3\nlisten_port = {_PORT}\n"
            f"unix_socket_dir = {directory}\nauth_type = trust\nauth_file = {users}\n"
        )
        self._pooler = subprocess.Popen(
            _as_its_user(program, "--quiet", str(config)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until((directory / f".s.PGSQL.{_PORT}").exists)
        return self

    def __exit__(self, *error: object) -> None:
        self._direct.dispose()
        self._pooler.kill()  # signals mean something else in each version
        self._pooler.wait()

    def new_url(self) -> str:
        """Empty its database and return its URL; one test at a time uses it."""
        schema = "DROP SCHEMA public CASCADE", "CREATE SCHEMA public"
        with self._direct.begin() as connection:
            for statement in schema:
                connection.exec_driver_sql(statement)
        return self._url(port=str(_PORT))

    def _url(self, **query: str) -> str:
        query["host"] = str(self._server.directory)
        url = sa.URL.create("postgresql", "postgres", database=_POOLED, query=query)
        return url.render_as_string()


def _as_its_user(program: str, *arguments: str) -> list[str]:
    """Return the command of a program that refuses to run as root, and that ends with us."""
    us: list[str] = []
    if shutil.which("setpriv"):
        us = ["setpriv", "--pdeathsig=QUIT"]
        if os.getuid() == 0:
            us += ["--reuid=postgres", "--regid=postgres", "--init-groups"]
    return [*us, program, *arguments]


def _number(told: object) -> int:
    found = re.search(r"\d+", str(told))
    return int(found[0]) if found else 0
