"""What is imported when: nothing third-party before its use, and a clear word when it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEWLY_LOADED = """
import sys
before = set(sys.modules)  # what the interpreter, its site and a coverage run bring along is not ours
import {module}
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(roots - sys.stdlib_module_names - {{"tokenscope"}}))
"""

WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import {module}
except ImportError as error:
    print(type(error).__name__, error)
else:
    print("imported")
"""


def fresh(code: str) -> str:
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module", ["tokenscope", "tokenscope.background", "tokenscope.watch", "tokenscope.net", "tokenscope.sync"]
)
def test_the_library_alone_loads_nothing_third_party(module):
    """A program that uses scopes and tokens pays for the standard library and no more."""
    assert fresh(NEWLY_LOADED.format(module=module)) == ""


def test_the_check_sees_a_third_party_import():
    """The same look at a module that does load one finds it."""
    assert "requests" in fresh(NEWLY_LOADED.format(module="tokenscope.integrations.requests")).split()


def test_using_wsgi_needs_no_framework():
    """The middleware works for every WSGI application, so it loads none of them."""
    assert fresh(NEWLY_LOADED.format(module="tokenscope.integrations.wsgi")) == ""


@pytest.mark.parametrize(
    ("module", "library", "remedy"),
    [
        ("tokenscope.integrations.flask", "flask", "pip install tokenscope-threads[flask]"),
        ("tokenscope.integrations.django_db", "django", "pip install tokenscope-threads[django]"),
        ("tokenscope.integrations.httpx", "httpx", "pip install tokenscope-threads[httpx]"),
        ("tokenscope.integrations.httpx2", "httpx2", "pip install tokenscope-threads[httpx2]"),
        ("tokenscope.integrations.psycopg", "psycopg", "pip install tokenscope-threads[psycopg]"),
        ("tokenscope.integrations.botocore", "botocore", "pip install tokenscope-threads[botocore]"),
        ("tokenscope.integrations.psycopg2", "psycopg2", "pip install tokenscope-threads[psycopg2]"),
        ("tokenscope.integrations.grpc", "grpc", "pip install tokenscope-threads[grpc]"),
        ("tokenscope.integrations.redis", "redis", "pip install tokenscope-threads[redis]"),
        ("tokenscope.integrations.pymysql", "pymysql", "pip install tokenscope-threads[pymysql]"),
        ("tokenscope.integrations.sqlalchemy", "sqlalchemy", "pip install tokenscope-threads[sqlalchemy]"),
        ("tokenscope.integrations.openai", "openai", "pip install tokenscope-threads[openai]"),
        ("tokenscope.integrations.anthropic", "anthropic", "pip install tokenscope-threads[anthropic]"),
        ("tokenscope.integrations.requests", "requests", "pip install requests"),
        ("tokenscope.integrations.requests", "urllib3", "pip install urllib3"),
        ("tokenscope.integrations.urllib3", "urllib3", "pip install urllib3"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(module, library, remedy):
    """Whoever uses an integration without its library reads in one error what to install."""
    told = fresh(WITHOUT.format(module=module, library=library))
    assert told.startswith("ImportError"), told
    assert remedy in told.replace("'", "")


def test_the_library_itself_works_without_any_of_them():
    """The import of the front door survives the absence of everything that is not the standard library."""
    for library in ("flask", "requests", "urllib3", "typing_extensions"):
        assert fresh(WITHOUT.format(module="tokenscope", library=library)) == "imported"
