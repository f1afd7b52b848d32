"""The commands, run as commands: what they print, what they end with."""

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from tests.conftest import StartMolva

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

    def test_nothing_to_average_is_said(self, run_molva: Run, data: str) -> None:
        result = run_molva("total", "--data", data)

        assert (result.returncode, result.stdout) == (0, "")
        assert "nothing to average" in result.stderr

    def test_an_unknown_campaign_is_said(self, run_molva: Run, data: str) -> None:
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

    def test_what_is_wrong_is_said_without_secrets(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", "--data", data, "--broker", "kafka://ann:s3cret@host:9092")

        assert result.returncode == 3
        assert "unknown scheme 'kafka'" in result.stdout
        assert "s3cret" not in result.stdout + result.stderr

    def test_memory_survives_nothing_and_says_so(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", "--data", data, "--broker", "memory://x")

        assert result.returncode == 3
        assert "nothing" in result.stdout


class TestOptions:
    def test_options_may_be_variables(self, run_molva: Run, data: str) -> None:
        result = run_molva("doctor", environment={"MOLVA_DATA": data})

        assert result.returncode == 0
        assert data in result.stdout

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
