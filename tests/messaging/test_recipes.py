"""The manual's recipes for web frameworks, beyond running once: under forks."""

import re
import subprocess
import sys
from pathlib import Path

MANUAL = Path(__file__).parent.parent.parent / "docs" / "messaging.md"

# A prefork server in small: the parent has used the queue, its workers use it again.
_PREFORK = """
from django.test import Client

def post(name):
    assert Client().post("/mails", name, content_type="text/plain").status_code == 202

post(b"parent")
for number in range(3):
    if os.fork() == 0:
        try:
            post(b"worker %d" % number)
            mails().close()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0
post(b"parent again")
mails().close()
call_command(Command(), limit=5)
"""


def test_the_django_recipe_works_under_a_prefork_server(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", MANUAL.read_text(), re.MULTILINE | re.DOTALL)
    [recipe] = [block for block in blocks if "import django" in block]
    recipe = recipe.replace("sqlite:///tmp/", f"sqlite://{tmp_path}/")
    code = recipe[: recipe.index('if __name__ == "__main__"')] + _PREFORK

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    sent = ["parent", "worker 0", "worker 1", "worker 2", "parent again"]
    assert result.stdout.splitlines() == [f"to {name}" for name in sent]
