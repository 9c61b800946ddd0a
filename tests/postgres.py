"""A PostgreSQL server of the tests' own, which ends with them."""

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

__all__ = ["PASSWORD", "Postgres", "programs"]

PASSWORD: Final = "correct/horse battery@staple"
"""Of the user `guest`, the only one that needs one."""

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


class Postgres:
    """A server on a socket in a temporary directory, killed should its tests be killed.

    Attributes:
        version: As the server tells it.
    """

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
        return self

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
        schema = f"s{next(self._numbers)}"
        self.execute(f"CREATE SCHEMA {schema}")
        return self.url(schema)

    def execute(self, statement: str) -> list[object]:
        """Do something as the administrator; return the first column of what it tells."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            done = connection.exec_driver_sql(statement)
            return list(done.scalars()) if done.returns_rows else []

    @property
    def _data(self) -> Path:
        return self.directory / "data"

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
        us: list[str] = []
        if shutil.which("setpriv"):
            us = ["setpriv", "--pdeathsig=QUIT"]
            if os.getuid() == 0:
                us += ["--reuid=postgres", "--regid=postgres", "--init-groups"]
        return [*us, str(self._programs / program), *arguments]


def _number(told: object) -> int:
    found = re.search(r"\d+", str(told))
    return int(found[0]) if found else 0
