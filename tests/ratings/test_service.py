"""The whole service in real processes: starting, refusing, draining, being killed, restarting."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import psutil
import pytest

from tests.conftest import MolvaProcess, StartMolva, skip_without
from tests.ratings.fsync import failing_fsync


def send_raw(molva: MolvaProcess, data: bytes, *, wait: float = 5.0) -> bytes:
    """Send bytes as they are; return all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", molva.port), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while chunk := connection.recv(65_536):
                received += chunk
        return received


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class TestStarting:
    @pytest.mark.timed
    def test_the_first_rating_is_accepted_within_two_seconds(self, start_molva: StartMolva) -> None:
        started = time.monotonic()
        molva = start_molva(ready=False)
        while True:
            with contextlib.suppress(OSError):
                status, _, _ = molva.request("POST", "/rate?rate=7")
                break
            time.sleep(0.01)
        seconds = time.monotonic() - started

        assert status == 202
        assert seconds < 2.0 * _slowness(), f"{seconds:.2f} s"

    def test_it_says_what_to_open(self, start_molva: StartMolva) -> None:
        molva = start_molva()

        wait_until(lambda: f"http://localhost:{molva.port}/" in molva.log)
        wait_until(lambda: "survive: kill, power" in molva.log)

    def test_a_second_up_on_the_same_data_is_refused(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        # Refused at once: whoever waits for the lock does so for ten seconds. A busy machine may
        # take as long to start a process, but not three times.
        for _ in range(3):
            started = time.monotonic()
            second = start_molva(data=molva.data, ready=False)
            code = second.process.wait(60)
            seconds = time.monotonic() - started
            if seconds < 10:
                break

        assert code == 4
        assert seconds < 10
        assert "in use by another molva" in second.log
        assert molva.request("POST", "/rate?rate=7")[0] == 202

    def test_another_service_on_the_same_port_is_refused(
        self, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        second = start_molva(data=tmp_path / "other", port=molva.port, ready=False)

        assert second.process.wait(30) == 4
        assert "cannot listen" in second.log
        assert "is up" not in second.log

    @pytest.mark.parametrize("name", ["queue.db", "ledger.db", "catalog.db"])
    def test_a_file_of_a_newer_version_is_refused_untouched(
        self, start_molva: StartMolva, tmp_path: Path, name: str
    ) -> None:
        molva = start_molva()
        molva.stop()
        path = molva.data / name
        database = apsw.Connection(str(path))
        database.pragma("user_version", 999)
        database.pragma("wal_checkpoint(TRUNCATE)")
        database.close()
        before = path.read_bytes()

        again = start_molva(data=molva.data, ready=False)

        assert again.process.wait(30) == 5
        assert "version 999" in again.log
        assert path.read_bytes() == before

    def test_a_promise_that_is_not_met_is_refused(self, start_molva: StartMolva) -> None:
        molva = start_molva("--survive", "node", ready=False)

        assert molva.process.wait(30) == 6
        assert "node" in molva.log

    def test_a_broker_of_one_process_is_refused(self, start_molva: StartMolva) -> None:
        molva = start_molva("--broker", "memory://x", ready=False)

        assert molva.process.wait(30) == 2
        assert "lives in one process" in molva.log

    def test_a_host_may_be_a_name(self, start_molva: StartMolva) -> None:
        molva = start_molva("--host", "localhost", ready=False)
        wait_until(lambda: "is up" in molva.log)

        assert molva.process.poll() is None, molva.log

    def test_a_host_that_is_not_ours_is_refused(self, start_molva: StartMolva) -> None:
        molva = start_molva("--host", "nowhere.invalid", ready=False)

        assert molva.process.wait(30) == 4
        assert "cannot listen on nowhere.invalid" in molva.log

    def test_a_data_folder_may_have_an_odd_name(
        self, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva(data=tmp_path / "50% of ratings? #1")

        assert molva.request("POST", "/rate?rate=7")[0] == 202
        molva.wait_counted(1)


class TestRunning:
    @pytest.mark.timed
    def test_idle_it_is_small_and_uses_no_cpu(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        molva.request("POST", "/rate?rate=7")
        molva.wait_counted(1)
        time.sleep(1.0)
        every = [psutil.Process(molva.process.pid), *molva.children().values()]

        before = sum(sum(process.cpu_times()[:2]) for process in every)
        time.sleep(3.0)
        used = sum(sum(process.cpu_times()[:2]) for process in every) - before
        # Shared pages, of Python itself for one, count once.
        mebibytes = sum(process.memory_full_info().pss for process in every) / 2**20

        assert len(every) == 3
        assert mebibytes < 150
        assert used / 3.0 < 0.02

    def test_more_workers_share_the_work(self, start_molva: StartMolva) -> None:
        molva = start_molva("--workers", "0")
        for number in range(300):
            molva.request("POST", f"/rate?rate={number % 11}&item={number}")
        workers = [start_molva(command="work", data=molva.data, ready=False) for _ in range(2)]

        total = molva.wait_counted(300)

        assert total["count"] == 300
        wait_until(lambda: all("taking ratings" in worker.log for worker in workers))
        for worker in workers:
            assert worker.stop() == 0

    def test_one_command_runs_several_workers(self, start_molva: StartMolva) -> None:
        molva = start_molva("--workers", "0")
        for number in range(50):
            molva.request("POST", f"/rate?rate={number % 11}&item={number}")
        workers = start_molva("--workers", "3", command="work", data=molva.data, ready=False)

        assert molva.wait_counted(50)["count"] == 50
        wait_until(lambda: workers.log.count("taking ratings") == 3)
        assert len(psutil.Process(workers.process.pid).children()) == 3
        assert workers.stop() == 0

    def test_a_killed_child_is_started_again(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        time.sleep(1.6)  # it had been at work for a while
        for name in ("serve", "work"):
            molva.children()[name].kill()
        molva.wait_ready()

        assert molva.request("POST", "/rate?rate=3")[0] == 202
        assert molva.wait_counted(1)["average"] == 3

    def test_children_go_when_their_supervisor_is_killed(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        children = list(molva.children().values())

        molva.process.kill()

        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
        # And the folder is free again, without any cleaning up by hand.
        assert start_molva(data=molva.data).request("POST", "/rate?rate=7")[0] == 202

    def test_metrics_tell_what_happened(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        molva.request("POST", "/rate?rate=7")
        molva.request("POST", "/rate?rate=11")
        molva.wait_counted(1)

        _, headers, body = molva.request("GET", "/metrics")

        text = body.decode()
        assert headers["content-type"].startswith("text/plain")
        assert "molva_ratings_accepted_total 1.0" in text
        assert 'molva_requests_refused_total{reason="invalid-field"} 1.0' in text
        assert "molva_queue_capacity 1e+06" in text
        assert "process_resident_memory_bytes" in text


class TestSeveralProcesses:
    def test_they_share_one_port_and_one_count(self, start_molva: StartMolva) -> None:
        molva = start_molva("--processes", "3")
        wait_until(lambda: molva.log.count("molva serve: http") == 3)

        for number in range(60):  # a connection each: the kernel spreads these
            assert molva.request("POST", f"/rate?rate={number % 11}")[0] == 202

        assert molva.wait_counted(60)["count"] == 60
        # A process that stands still for a second is left out of a scrape.
        wait_until(lambda: sum(accepted_by_process(molva).values()) == 60)
        shares = accepted_by_process(molva)
        assert len([share for share in shares.values() if share]) >= 2, shares

    def test_one_scrape_tells_of_all_and_of_the_broker_once(self, start_molva: StartMolva) -> None:
        molva = start_molva("--processes", "2")
        wait_until(lambda: molva.log.count("molva serve: http") == 2)

        told_of_all: set[str] = set()

        def both_told_of_all() -> bool:
            text = molva.request("GET", "/metrics")[2].decode()
            assert text.count("# TYPE molva_ratings_accepted_total counter") == 1
            assert text.count("\nmolva_queue_capacity 1e+06") == 1
            processes = re.findall(r'^process_resident_memory_bytes{process="(\d)"}', text, re.M)
            # Whoever is asked comes first. It leaves out one that stands still for a second.
            if sorted(processes) == ["1", "2"]:
                told_of_all.add(processes[0])
            return len(told_of_all) == 2

        wait_until(both_told_of_all)

    def test_a_killed_one_is_started_again_while_the_others_serve(
        self, start_molva: StartMolva
    ) -> None:
        molva = start_molva("--processes", "2", "--workers", "0", command="up")
        wait_until(lambda: molva.log.count("molva serve: http") == 2)
        time.sleep(1.6)  # they had been at work for a while
        victim, _ = serving = http_processes(molva)

        victim.kill()
        victim.wait(30)

        assert molva.request("POST", "/rate?rate=3")[0] == 202
        wait_until(lambda: molva.log.count("molva serve: http") == 3)
        assert len(http_processes(molva)) == len(serving)
        assert molva.stop() == 0

    def test_another_service_on_the_same_port_is_refused(
        self, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva("--processes", "2", command="serve")
        for number in ("1", "2"):
            second = start_molva(
                "--processes", number, command="serve", port=molva.port,
                data=tmp_path / "other", ready=False,
            )  # fmt: skip

            assert second.process.wait(30) == 4
            assert "cannot listen" in second.log


def http_processes(molva: MolvaProcess) -> list[psutil.Process]:
    children = psutil.Process(molva.process.pid).children()
    return [child for child in children if child.cmdline()[3] == "serve"]


def accepted_by_process(molva: MolvaProcess) -> dict[str, float]:
    text = molva.request("GET", "/metrics")[2].decode()
    found = re.findall(r'^molva_ratings_accepted_total\{process="(\d)"\} (.+)$', text, re.MULTILINE)
    return {process: float(count) for process, count in found}


class TestBadRequests:
    def test_raw_nonsense_harms_nobody_else(
        self, start_molva: StartMolva, closing: contextlib.ExitStack
    ) -> None:
        molva = start_molva()
        good = http.client.HTTPConnection("127.0.0.1", molva.port, timeout=10)
        closing.callback(good.close)
        good.request("POST", "/rate?rate=1")
        good.getresponse().read()

        for data in (
            b"\x00\x01\x02\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /rate?rate=7 HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"POST /rate?rate=7 HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
            b"POST /rate?rate=7\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /rate HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n",
            b"POST /rate HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
            b"\r\n\r\nzz\r\n",
        ):
            answer = send_raw(molva, data, wait=2.0)
            assert b" 202 " not in answer.partition(b"\r\n")[0], data[:60]

        # The connection from before still works, and nothing but its rating was counted.
        good.request("POST", "/rate?rate=3")
        assert good.getresponse().status == 202
        assert molva.wait_counted(2)["distribution"] == {"1": 1, "3": 1}
        assert "Traceback" not in molva.log

    def test_a_body_of_two_megabytes_is_413(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        head = (
            b"POST /rate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 2000000\r\n\r\n"
        )

        answer = send_raw(molva, head + b"x" * 2_000_000)

        assert b" 413 " in answer.partition(b"\r\n")[0]
        assert molva.request("POST", "/rate?rate=7")[0] == 202

    def test_slow_and_half_sent_requests_hold_up_nobody(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        slow = []
        for _ in range(200):
            connection = socket.create_connection(("127.0.0.1", molva.port))
            connection.sendall(
                b"POST /rate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 20\r\n\r\n{"ra'
            )
            slow.append(connection)

        started = time.monotonic()
        statuses = [molva.request("POST", "/rate?rate=7")[0] for _ in range(50)]
        seconds = time.monotonic() - started

        assert statuses == [202] * 50
        assert seconds < 9, "until the slow ones were given up, after ten"
        slow[0].settimeout(15)
        assert b" 408 " in slow[0].recv(65_536).partition(b"\r\n")[0]
        for connection in slow:
            connection.close()

    def test_a_client_that_hangs_up_leaves_no_trace_in_the_log(
        self, start_molva: StartMolva
    ) -> None:
        molva = start_molva()
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", molva.port)) as connection:
                connection.sendall(b"POST /rate?rate=7 HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", molva.port)) as connection:
                connection.sendall(
                    b"POST /rate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 20\r\n\r\n"
                )
        time.sleep(0.5)

        assert molva.request("POST", "/rate?rate=7")[0] == 202
        assert "Traceback" not in molva.log
        assert len(molva.log.splitlines()) < 20


class TestOverload:
    def test_a_full_queue_refuses_and_recovers(self, start_molva: StartMolva) -> None:
        molva = start_molva("--workers", "0", "--capacity", "50")
        for _ in range(50):
            assert molva.request("POST", "/rate?rate=7")[0] == 202

        status, headers, body = molva.request("POST", "/rate?rate=7")

        assert status == 503
        assert json.loads(body)["type"] == "urn:molva:problem:overloaded"
        assert int(headers["retry-after"]) >= 1
        start_molva(command="work", data=molva.data, ready=False)
        molva.wait_counted(50)
        wait_until(lambda: molva.request("POST", "/rate?rate=7")[0] == 202)
        assert molva.wait_counted(51)["count"] == 51


class Sender(threading.Thread):
    """Sends ratings with ids of its own, and remembers what was answered with 2xx."""

    def __init__(self, molva: MolvaProcess, name: str) -> None:
        super().__init__(daemon=True)
        self.accepted: list[str] = []
        self.refused = 0
        self._molva = molva
        self._name = name
        self._enough = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._enough.is_set():
            number += 1
            id_ = f"{self._name}-{number}"
            try:
                status, _, _ = self._molva.request("POST", f"/rate?rate={number % 11}&id={id_}")
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)
                continue
            if status == 202:
                self.accepted.append(id_)
            else:
                self.refused += 1

    def stop(self) -> None:
        self._enough.set()
        self.join()


@contextlib.contextmanager
def sending(molva: MolvaProcess, number: int) -> Iterator[list[Sender]]:
    senders = [Sender(molva, f"{time.monotonic_ns()}-{at}") for at in range(number)]
    for sender in senders:
        sender.start()
    try:
        yield senders
    finally:
        for sender in senders:
            sender.stop()


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_under_load_loses_nothing(
        self, start_molva: StartMolva, number: signal.Signals
    ) -> None:
        molva = start_molva()
        with sending(molva, 4) as senders:
            wait_until(lambda: sum(len(sender.accepted) for sender in senders) > 50)
            started = time.monotonic()
            molva.process.send_signal(number)
            code = molva.process.wait(12)
            seconds = time.monotonic() - started

        assert code == 0, molva.log
        assert seconds < 10
        accepted = sum(len(sender.accepted) for sender in senders)
        again = start_molva(data=molva.data)
        # What was under way when it stopped may be counted too, at most one a sender.
        assert accepted <= again.wait_counted(accepted)["count"] <= accepted + len(senders)

    def test_open_live_streams_do_not_hold_it_up(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        with socket.create_connection(("127.0.0.1", molva.port)) as stream:
            stream.sendall(b"GET /api/campaigns/default/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"text/event-stream" in stream.recv(65_536)
            started = time.monotonic()
            assert molva.stop() == 0
            assert time.monotonic() - started < 7.5, "until they were cut off, after eight"


class TestStorageTrouble:
    @pytest.mark.root
    def test_a_full_disk_is_503_and_passes(self, start_molva: StartMolva, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            skip_without("mount", "mounting a small file system needs root")
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            skip_without("mount", "file systems cannot be mounted here")
        try:
            self.fill_and_free(start_molva, disk)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)

    def fill_and_free(self, start_molva: StartMolva, disk: Path) -> None:
        molva = start_molva(data=disk / "data")
        accepted = sum(molva.request("POST", "/rate?rate=7")[0] == 202 for _ in range(20))
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4_096):
                pass

        refused = 0
        deadline = time.monotonic() + 20
        while not refused and time.monotonic() < deadline:
            # Until the space that the files had in hand is used up.
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _, _ = molva.request("POST", "/rate?rate=7&comment=" + "x" * 1_900)
                accepted += status == 202
                refused += status == 503
        assert refused, "the disk never became full"
        ballast.unlink()

        deadline = time.monotonic() + 20
        recovered = False
        while not recovered and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                recovered = molva.request("POST", "/rate?rate=7")[0] == 202
            time.sleep(0.05)
        assert recovered, molva.log
        accepted += 1
        assert accepted <= molva.wait_counted(accepted)["count"] <= accepted + refused
        molva.stop()

    def test_an_fsync_error_is_503_and_a_new_process_goes_on(
        self, start_molva: StartMolva, tmp_path: Path
    ) -> None:
        molva = start_molva()
        before = [molva.request("POST", f"/rate?rate={n % 11}")[0] for n in range(20)]
        pid = molva.children()["serve"].pid
        with failing_fsync(pid, tmp_path):
            status, headers, _ = molva.request("POST", "/rate?rate=7&id=the-one")

        assert before == [202] * 20
        assert status == 503
        assert "retry-after" in headers
        wait_until(lambda: molva.children().get("serve", psutil.Process(1)).pid not in (1, pid))
        molva.wait_ready()
        # The same id makes the retry safe, whether or not the refused one reappeared.
        assert molva.request("POST", "/rate?rate=7&id=the-one")[0] == 202
        assert molva.wait_counted(21)["count"] == 21
        time.sleep(0.5)
        assert molva.total()["count"] == 21


class TestDeadLetters:
    def test_what_cannot_be_counted_stops_nobody(
        self, start_molva: StartMolva, run_molva: Any
    ) -> None:
        molva = start_molva()
        topic = f"sqlite://{molva.data}/queue.db?topic=ratings"
        bad = ["not json", "{}", '{"kind":"rating/9"}', "[" * 5_000]
        bad.append('{"kind":"rating/1","campaign":"nope","accepted_at_us":1,"rate":1}')
        bad.append('{"kind":"rating/1","campaign":"default","accepted_at_us":1,"rate":11}')

        result = run_molva("pub", topic, stdin="\n".join(bad) + "\n")
        assert result.returncode == 0, result.stderr
        assert molva.request("POST", "/rate?rate=7")[0] == 202

        assert molva.wait_counted(1)["average"] == 7
        wait_until(lambda: b"molva_dead_letters 6.0" in molva.request("GET", "/metrics")[2])
        shown = run_molva("dead", "--data", str(molva.data)).stdout
        assert "unknown campaign 'nope'" in shown
        assert len(shown.splitlines()) == 6

    def test_a_used_id_with_another_rating_is_kept_aside(self, start_molva: StartMolva) -> None:
        molva = start_molva()
        assert molva.request("POST", "/rate?rate=7&id=mine")[0] == 202
        molva.wait_counted(1)
        time.sleep(1.6)
        molva.children()["serve"].kill()  # and with it the memory of recent ids
        molva.wait_ready()

        assert molva.request("POST", "/rate?rate=1&id=mine")[0] == 202
        assert molva.request("POST", "/rate?rate=9")[0] == 202

        assert molva.wait_counted(2)["distribution"] == {"7": 1, "9": 1}
        wait_until(lambda: "its id was used for another rating" in molva.log)


def _slowness() -> float:
    """Return how much slower than usual this machine is now, at least 1."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import json, asyncio"], check=True)
    return max(1.0, (time.perf_counter() - started) / 0.15)
