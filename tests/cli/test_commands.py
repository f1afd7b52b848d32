"""The commands, run as commands: what they print, what they end with."""

import asyncio
import contextlib
import gzip
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from molva.cli.running import PARENT_PIPE, run_until_signal
from molva.cli.up import _welcome
from molva.ratings.importer import (
    Columns,
    Importer,
    ImportFailedError,
    ImportReport,
    Row,
    read_rows,
)
from tests.conftest import StartMolva, free_port

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(tmp_path / "data")


class TestMessages:
    def test_lines_travel_in_order(self, run_molva: Run, tmp_path: Path) -> None:
        url = f"sqlite://{tmp_path}/q.db?topic=lines"
        lines = [f"line {number} ü" for number in range(2_500)]

        sent = run_molva("pub", url, "--key", "k", stdin="\n".join(lines) + "\n")
        got = run_molva("sub", f"{url}&subscription=s", "--limit", "2500")
        none_left = run_molva(
            "doctor", "--data", str(tmp_path), "--broker", f"sqlite://{tmp_path}/q.db"
        )

        assert (sent.returncode, got.returncode) == (0, 0), sent.stderr + got.stderr
        assert got.stdout.splitlines() == lines
        assert none_left.returncode == 0

    def test_what_was_printed_is_not_printed_again(self, run_molva: Run, tmp_path: Path) -> None:
        url = f"sqlite://{tmp_path}/q.db?topic=lines"
        run_molva("pub", url, "--key", "k", stdin="a\nb\nc\n")

        first = run_molva("sub", f"{url}&subscription=s", "--limit", "2")
        second = run_molva("sub", f"{url}&subscription=s", "--limit", "1")

        assert first.stdout + second.stdout == "a\nb\nc\n"

    @pytest.mark.parametrize(
        ("url", "word"),
        [
            ("nonsense", "no broker URL"),
            ("sqlight:///tmp/x.db?topic=t", "did you mean 'sqlite'"),
            ("sqlite:///tmp/x.db?topic=t&lane=3", "did you mean 'lanes'"),
            ("sqlite:///tmp/x.db", "names no topic"),
        ],
    )
    def test_a_wrong_url_is_explained(self, run_molva: Run, url: str, word: str) -> None:
        result = run_molva("pub", url)

        assert result.returncode == 2
        assert word in result.stderr
        assert "Traceback" not in result.stderr

    def test_ctrl_c_ends_pub_and_what_was_typed_is_stored(
        self, run_molva: Run, tmp_path: Path
    ) -> None:
        url = f"sqlite://{tmp_path}/q.db?topic=lines"
        run_molva("pub", url)  # the file is there
        with subprocess.Popen(
            [sys.executable, "-m", "molva", "pub", url],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as pub:
            assert pub.stdin is not None
            pub.stdin.write(b"typed\n")
            pub.stdin.flush()

            # Its stdin is still open: the line does not wait for another.
            got = run_molva("sub", f"{url}&subscription=s", "--limit", "1")
            pub.send_signal(signal.SIGINT)

            assert pub.wait(30) == 130
            assert pub.stderr is not None
            assert pub.stderr.read() == b""
        assert got.stdout == "typed\n"

    def test_a_line_may_be_long_and_the_last_unended(self, run_molva: Run, tmp_path: Path) -> None:
        url = f"sqlite://{tmp_path}/q.db?topic=lines"
        lines = ["x" * 150_000, "", "end"]

        run_molva("pub", url, "--key", "k", stdin="\n".join(lines))
        got = run_molva("sub", f"{url}&subscription=s", "--limit", "3")

        assert got.stdout.splitlines() == lines


class Answers:
    """An HTTP server that answers what it is told to, in turn, and then 202."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, str]]] = []
        self.paths: list[float] = []  # when each request came
        self.silent = threading.Event()  # set: requests get no answer
        self.done = threading.Event()
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                answers.paths.append(time.monotonic())
                if answers.silent.is_set():
                    answers.done.wait(20)
                    return
                status, headers = answers.script.pop(0) if answers.script else (202, {})
                self.send_response(status)
                for name, value in {**headers, "content-length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def answers() -> Iterator[Answers]:
    found = Answers()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.done.set()
    found.server.shutdown()
    thread.join()
    found.server.server_close()


class TestImporter:
    def importer(self, url: str, *, connections: int = 2, patience: float = 10.0) -> Importer:
        return Importer(url, campaign="default", connections=connections, patience=patience)

    def rows(self, number: int) -> list[Row]:
        return [
            Row(number=at, id=bytes(16), rate="5", item=str(at), comment="", position=0)
            for at in range(1, number + 1)
        ]

    def send(self, importer: Importer, number: int) -> ImportReport:
        return importer.run(iter(self.rows(number)), lambda _: None)

    @pytest.mark.parametrize("status", [408, 425, 429, 503])
    def test_what_may_work_later_is_sent_again(self, answers: Answers, status: int) -> None:
        answers.script = [(status, {"retry-after": "1"})]

        report = self.send(self.importer(answers.url), 1)

        assert (report.stored, report.refused, report.repeated) == (1, 0, 1)
        assert answers.paths[1] - answers.paths[0] >= 1.0

    def test_other_refusals_are_not_sent_again(self, answers: Answers) -> None:
        answers.script = [(400, {})]

        report = self.send(self.importer(answers.url), 1)

        assert (report.stored, report.refused, report.repeated) == (0, 1, 0)

    def test_an_odd_retry_after_is_passed_over(self, answers: Answers) -> None:
        answers.script = [(429, {"retry-after": "\u00b2"}), (429, {"retry-after": "soon"})]

        assert self.send(self.importer(answers.url), 1).stored == 1

    @pytest.mark.timed
    @pytest.mark.parametrize("silent", [False, True])
    @pytest.mark.parametrize("problem", [KeyboardInterrupt, ImportFailedError])
    def test_it_ends_within_a_second(
        self, answers: Answers, problem: type[BaseException], silent: bool
    ) -> None:
        if silent:  # each connection is in the middle of a request
            answers.silent.set()

        def rows() -> Iterator[Row]:
            yield from self.rows(200)
            time.sleep(0.3)
            raise problem("x")

        importer = self.importer(answers.url, connections=64)
        started = time.monotonic()
        with pytest.raises(problem):
            importer.run(rows(), lambda _: None)

        # A second, and as much again for whatever else the machine does. Whoever waited for the
        # connections that answer nothing would need their time-out.
        assert time.monotonic() - started < 0.3 + 2.0

    @pytest.mark.parametrize(
        "url",
        [
            "http://ann:s3cret@localhost:8081",
            "ftp://ann:s3cret@localhost",
            "ann:s3cret@localhost:8081",
            "http://ann:s3cret@localhost:port",
            "http://ann@localhost",
        ],
    )
    def test_credentials_are_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(ImportFailedError) as caught:
            self.importer(url)

        assert "s3cret" not in str(caught.value)
        if url.startswith("http://") and "port" not in url:
            assert "user or password" in str(caught.value)

    def test_a_damaged_gzip_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv.gz"
        packed = bytearray(gzip.compress(b"rate\n" + b"5\n" * 50_000))
        packed[10:40] = b"\xff" * 30
        path.write_bytes(packed)

        with pytest.raises(ImportFailedError, match="is no CSV"):
            list(read_rows(path, Columns("rate"), campaign="default"))


class TestImport:
    CSV = "page,stars,words\n/a,5,good\n/b,3,\n/a,4,\n/a,4,\n"

    def write(self, tmp_path: Path, text: str) -> str:
        path = tmp_path / "ratings.csv"
        path.write_text(text)
        return str(path)

    def columns(self) -> list[str]:
        return ["--rate-column", "stars", "--item-column", "page"]

    def test_rows_count_once_however_often_they_are_sent(
        self, run_molva: Run, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        file = self.write(tmp_path, self.CSV)

        for _ in range(3):
            result = run_molva("import", file, "--to", molva.url, *self.columns())
            assert result.returncode == 0, result.stderr
            assert "4 ratings are stored, 0 rows were refused" in result.stdout

        assert molva.wait_counted(4)["distribution"] == {"3": 1, "4": 2, "5": 1}
        assert molva.total("?item=/a")["count"] == 3

    def test_a_file_that_has_grown_adds_its_new_rows(
        self, run_molva: Run, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        file = self.write(tmp_path, self.CSV)
        run_molva("import", file, "--to", molva.url, *self.columns())
        self.write(tmp_path, self.CSV + "/c,1,\n")

        run_molva("import", file, "--to", molva.url, *self.columns())

        assert molva.wait_counted(5)["count"] == 5

    def test_gzip_and_plain_are_the_same_file(
        self, run_molva: Run, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        packed = tmp_path / "ratings.csv.gz"
        packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + self.CSV.encode()))
        file = self.write(tmp_path, self.CSV)
        more = ["--comment-column", "words"]

        run_molva("import", str(packed), "--to", molva.url, *self.columns(), *more)
        run_molva("import", file, "--to", molva.url, *self.columns(), *more)

        assert molva.wait_counted(4)["count"] == 4

    def test_refused_rows_are_named_and_the_rest_is_stored(
        self, run_molva: Run, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        file = self.write(tmp_path, "page,stars\n/a,5\n/a,eleven\n/a,99\n/b,4\n")

        result = run_molva("import", file, "--to", molva.url, *self.columns())

        assert result.returncode == 1
        assert "row 2: 400" in result.stderr
        assert "2 ratings are stored, 2 rows were refused" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            (["--rate-column", "nope"], "has no column 'nope'"),
            (["--rate-column", "stars", "--campaign", "nope"], "no campaign 'nope'"),
            (["--rate-column", "stars", "--to", "localhost"], "no address of a service"),
        ],
    )
    def test_what_cannot_work_is_said_at_once(
        self,
        run_molva: Run,
        start_molva: StartMolva,
        tmp_path: Path,
        arguments: list[str],
        word: str,
    ) -> None:
        molva = start_molva()
        file = self.write(tmp_path, self.CSV)

        result = run_molva("import", file, "--to", molva.url, *arguments)

        assert result.returncode == 2
        assert word in result.stderr

    def test_nobody_there_ends_with_3(self, run_molva: Run, tmp_path: Path) -> None:
        file = self.write(tmp_path, self.CSV)

        result = run_molva(
            "import", file, "--to", "http://127.0.0.1:9", *self.columns(), "--patience", "0.3"
        )

        assert result.returncode == 3
        assert "run the same command again" in result.stderr


class TestLedger:
    def test_total_verify_and_rebuild_agree(
        self, run_molva: Run, start_molva: StartMolva, data: str
    ) -> None:
        molva = start_molva()
        for rate in (1, 2, 2):
            molva.request("POST", f"/rate?rate={rate}")
        molva.wait_counted(3)

        assert run_molva("total", "--data", data).stdout == "1.67\n"
        document = json.loads(run_molva("total", "--data", data, "--json", "-n", "2").stdout)
        assert (document["average"], document["count"], document["as_of"]) == (2.0, 3, 3)
        assert run_molva("verify", "--data", data).returncode == 0
        assert run_molva("rebuild", "--data", data).returncode == 0
        assert run_molva("verify", "--data", data).returncode == 0
        assert molva.total()["count"] == 3

    def test_verify_finds_a_number_that_was_changed_by_hand(
        self, run_molva: Run, start_molva: StartMolva, data: str
    ) -> None:
        molva = start_molva()
        molva.request("POST", "/rate?rate=7")
        molva.wait_counted(1)
        molva.stop()
        ledger = apsw.Connection(f"{data}/ledger.db")
        ledger.execute("UPDATE entry SET rate = 8 WHERE kind = (SELECT min(kind) FROM entry)")
        ledger.close()

        result = run_molva("verify", "--data", data, "--json")

        assert result.returncode == 1
        assert json.loads(result.stdout)["differences"] >= 1

    @pytest.mark.parametrize("command", ["total", "verify", "rebuild"])
    def test_without_a_ledger_nothing_is_made(
        self, run_molva: Run, tmp_path: Path, command: str
    ) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        for folder in (tmp_path / "none", empty):
            result = run_molva(command, "--data", str(folder))

            assert result.returncode == 2
            assert "holds no ledger; is --data right?" in result.stderr
        assert list(tmp_path.iterdir()) == [empty]
        assert list(empty.iterdir()) == []

    def test_a_ledger_elsewhere_is_read(self, run_molva: Run, tmp_path: Path) -> None:
        data = str(tmp_path / "data")
        run_molva("doctor", "--data", data)
        url = f"sqlite://{tmp_path}/data/ledger.db"

        result = run_molva("verify", "--data", str(tmp_path / "other"), "--ledger", url)

        assert result.returncode == 0, result.stderr

    def test_nothing_to_average_is_said(self, run_molva: Run, data: str) -> None:
        run_molva("doctor", "--data", data)  # the ledger is there
        result = run_molva("total", "--data", data)

        assert (result.returncode, result.stdout) == (0, "")
        assert "nothing to average" in result.stderr

    def test_an_unknown_campaign_is_said(self, run_molva: Run, data: str) -> None:
        run_molva("doctor", "--data", data)
        result = run_molva("total", "--data", data, "--campaign", "nope")

        assert result.returncode == 2
        assert "no campaign 'nope'" in result.stderr


class TestCampaign:
    def test_a_campaign_is_added_listed_and_changed(self, run_molva: Run, data: str) -> None:
        put = ["campaign", "put", "--data", data, "stars"]
        assert "was added" in run_molva(*put, "--scale", "1-5", "--question", "Good?").stdout
        assert "was changed" in run_molva(*put, "--window", "50").stdout

        listed = json.loads(run_molva("campaign", "list", "--data", data, "--json").stdout)

        assert {c["name"] for c in listed} == {"default", "stars"}
        [stars] = [c for c in listed if c["name"] == "stars"]
        assert stars == {
            "name": "stars",
            "question": "Good?",
            "minimum": 1,
            "maximum": 5,
            "window": 50,
        }

    def test_negative_scales_are_read(self, run_molva: Run, data: str) -> None:
        result = run_molva("campaign", "put", "--data", data, "csat", "--scale=-2-2")

        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("scale", ["5", "5-1", "a-b", "-", "1-1000", ""])
    def test_a_wrong_scale_is_refused(self, run_molva: Run, data: str, scale: str) -> None:
        result = run_molva("campaign", "put", "--data", data, "x", f"--scale={scale}")

        assert result.returncode == 2, result.stdout
        assert "Traceback" not in result.stderr

    def test_a_scale_cannot_become_narrower(self, run_molva: Run, data: str) -> None:
        result = run_molva("campaign", "put", "--data", data, "default", "--scale", "1-5")

        assert result.returncode == 2
        assert "wider" in result.stderr


class TestDoctor:
    def test_a_healthy_deployment(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", "--data", data, "--json")

        assert result.returncode == 0
        document = json.loads(result.stdout)
        assert document["ok"]
        found = {f["what"]: f["detail"] for f in document["findings"]}
        assert found["survives"] == "kill, power"

    @pytest.mark.parametrize(
        ("broker", "said"),
        [
            ("pulsar://ann:s3cret@host:6650", "unknown scheme 'pulsar'"),
            ("redis://ann:s3cret@127.0.0.1:1", "redis://127.0.0.1:1/0"),
            ("kafka://ann:s3cret@127.0.0.1:1", "kafka://ann:***@127.0.0.1:1"),
        ],
    )
    def test_what_is_wrong_is_said_without_secrets(
        self, run_molva: Run, data: str, broker: str, said: str
    ) -> None:
        result = run_molva("doctor", "--data", data, "--broker", broker)

        assert result.returncode == 3
        assert re.search(rf"^NO +broker .*{re.escape(said)}", result.stdout, re.MULTILINE)
        assert "s3cret" not in result.stdout + result.stderr

    def test_deep_reads_what_nobody_else_would(self, run_molva: Run, data: str) -> None:
        run_molva("doctor", "--data", data)
        ledger = Path(data) / "ledger.db"
        connection = apsw.Connection(str(ledger))
        size = connection.pragma("page_size")
        connection.pragma("wal_checkpoint(TRUNCATE)")
        [(page,)] = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'entry_by_item'"
        )
        connection.close()
        with ledger.open("r+b") as file:
            file.seek((page - 1) * size + 3)
            file.write(b"\x00\x09")  # so many cells, and there are none

        shallow = run_molva("doctor", "--data", data)
        deep = run_molva("doctor", "--data", data, "--deep")

        assert shallow.returncode == 0, shallow.stdout
        assert deep.returncode == 3
        assert f"{ledger}: damaged" in deep.stdout

    def test_a_broker_that_is_away_leaves_open_what_is_survived(
        self, run_molva: Run, data: str
    ) -> None:
        away = ("doctor", "--data", data, "--broker", "redis://127.0.0.1:1")
        result = run_molva(*away, "--when-broker-down", "spool")

        assert result.returncode == 3
        told = "not known, because the broker cannot be reached; ledger and spool: kill, power"
        assert f"NO  survives  {told}\n" in result.stdout

    def test_a_spool_that_nobody_may_lock_is_looked_into_all_the_same(
        self, run_molva: Run, data: str
    ) -> None:
        (Path(data) / "spool" / "2").mkdir(parents=True)
        (Path(data) / "spool" / "2.lock").mkdir()
        (Path(data) / "spool" / "2" / "queue.db").write_bytes(b"this is no database" * 400)
        result = run_molva("doctor", "--data", data)

        assert result.returncode == 3
        assert re.search(r"^NO +spool .*spool/2/queue\.db", result.stdout, re.MULTILINE)
        assert re.search(r"^ok +survives +kill, power$", result.stdout, re.MULTILINE)
        assert result.stderr == ""

    def test_memory_survives_nothing_and_says_so(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", "--data", data, "--broker", "memory://x")

        assert result.returncode == 3
        assert "nothing" in result.stdout


class TestOptions:
    def test_options_may_be_variables(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", environment={"MOLVA_DATA": data})

        assert result.returncode == 0
        assert data in result.stdout

    def test_a_variable_of_another_command_changes_nothing(self, run_molva: Run, data: str) -> None:
        put = ["campaign", "put", "--data", data, "stars"]

        run_molva(*put, environment={"MOLVA_WINDOW": "7", "MOLVA_PUT_SCALE": "1-5"})

        listed = json.loads(run_molva("campaign", "list", "--data", data, "--json").stdout)
        [stars] = [c for c in listed if c["name"] == "stars"]
        assert stars["window"] != 7
        assert stars["maximum"] == 5

    def test_the_help_names_the_variables(self, run_molva: Run) -> None:
        assert "MOLVA_PUB_KEY" in run_molva("pub", "--help").stdout
        assert "MOLVA_SUB_LIMIT" in run_molva("sub", "--help").stdout
        assert "MOLVA_RATE_COLUMN" in run_molva("import", "--help").stdout

    def test_a_folder_that_cannot_be_made_is_explained(self, run_molva: Run) -> None:
        result = run_molva("doctor", "--data", "/proc/nope")

        assert result.returncode == 2
        assert "cannot be made" in result.stderr

    def test_an_unknown_command_is_refused(self, run_molva: Run) -> None:
        assert run_molva("upp").returncode == 2

    def test_help_lists_every_command(self, run_molva: Run) -> None:
        text = run_molva("--help").stdout

        for name in ("up", "serve", "work", "import", "verify", "doctor"):
            assert f"  {name} " in text


class TestRunning:
    @pytest.mark.timed
    def test_draining_without_a_parent_takes_no_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reader, writer = os.pipe()
        monkeypatch.setenv(PARENT_PIPE, str(reader))
        used = 0.0

        async def main(stop: asyncio.Event) -> None:
            nonlocal used
            os.close(writer)
            await stop.wait()
            before = time.process_time()
            await asyncio.sleep(0.5)
            used = time.process_time() - before

        with contextlib.closing(os.fdopen(reader)):
            run_until_signal(main)

        assert used < 0.1

    def test_what_runs_after_it_can_be_interrupted(self) -> None:
        async def main(stop: asyncio.Event) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await stop.wait()

        run_until_signal(main)

        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    @pytest.mark.parametrize(
        ("host", "shown"),
        [("::1", "localhost"), ("fe80::2", "[fe80::2]"), ("10.0.0.1", "10.0.0.1")],
    )
    def test_the_printed_address_can_be_opened(
        self, host: str, shown: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _welcome(host, 8081, Path("data"), 1)

        assert f"open    http://{shown}:8081/\n" in capsys.readouterr().out

    def test_a_closed_stdout_ends_nothing(self, tmp_path: Path) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        port = free_port()
        with (
            os.fdopen(writer, "w") as stdout,
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "molva", "up"),
                    *("--port", str(port), "--data", str(tmp_path / "data")),
                ],
                stdout=stdout,
                stderr=log,
            ) as up,
        ):
            deadline = time.monotonic() + 60
            while "ratings survive" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3)
            assert up.poll() is None
            up.terminate()
            assert up.wait(12) == 0
