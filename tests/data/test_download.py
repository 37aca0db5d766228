import hashlib
import io
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import download as download_module
from data.download import DownloadError, download

REPOSITORY = Path(__file__).parents[2]


class Publisher:
    """A local GroupLens: files by name, what was asked for, and how it misbehaves."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path, Range header
        self.cut_after: list[int] = []  # bytes after which the next answers break off
        self.ignore_range = False
        self.delay_s = 0.0

    def publish(self, name: str, content: bytes, md5: str | None = None) -> None:
        self.files[f"{name}.zip"] = content
        self.files[f"{name}.zip.md5"] = f"MD5 ({name}.zip) = {md5 or hashlib.md5(content).hexdigest()}\n".encode()

    def zip_requests(self) -> list[str | None]:
        return [range_ for path, range_ in self.requests if path.endswith(".zip")]


@pytest.fixture
def publisher(monkeypatch):
    publisher = Publisher()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            name = self.path.lstrip("/")
            publisher.requests.append((name, self.headers.get("Range")))
            if name not in publisher.files:
                self.send_error(404)
                return
            content, start = publisher.files[name], 0
            if (asked := self.headers.get("Range")) and not publisher.ignore_range:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            body = content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            time.sleep(publisher.delay_s)
            if name.endswith(".zip") and publisher.cut_after:
                self.wfile.write(body[: publisher.cut_after.pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SHARDREC_GROUPLENS_URL", f"http://127.0.0.1:{server.server_port}")
    yield publisher
    server.shutdown()
    server.server_close()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


RATINGS = os.urandom(300_000)
GOOD = zip_of({"ml-1m/": b"", "ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": b"1::Heat::Crime\n"})


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_complete_and_nothing_else(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    folder = download("ml-1m", tmp_path / "new" / "root")
    assert folder == tmp_path / "new" / "root" / "ml-1m"
    assert (folder / "ratings.dat").read_bytes() == RATINGS
    assert left_in(folder.parent) == ["ml-1m"]
    download("ml-1m", tmp_path / "new" / "root")
    assert len(publisher.zip_requests()) == 1


def test_the_folder_inside_may_have_another_name(publisher, tmp_path):
    publisher.publish("ml-10m", zip_of({"ml-10M100K/ratings.dat": b"1::2::3::4\n"}))
    assert (download("ml-10m", tmp_path) / "ratings.dat").exists()


def test_a_cut_connection_is_resumed(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    publisher.cut_after = [150_000, 80_000]
    folder = download("ml-1m", tmp_path)
    assert (folder / "ratings.dat").read_bytes() == RATINGS
    first, second, third = publisher.zip_requests()
    assert first is None
    assert 0 < int(second[len("bytes=") : -1]) <= 150_000
    assert int(second[len("bytes=") : -1]) < int(third[len("bytes=") : -1]) <= 230_000


def test_a_later_run_goes_on_where_an_earlier_one_stopped(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    publisher.cut_after = [150_000, 0]  # the second attempt brings nothing: give up
    with pytest.raises(DownloadError):
        download("ml-1m", tmp_path)
    assert left_in(tmp_path) == [".ml-1m.zip.part"]
    kept = (tmp_path / ".ml-1m.zip.part").stat().st_size
    assert (download("ml-1m", tmp_path) / "ratings.dat").read_bytes() == RATINGS
    assert publisher.zip_requests()[-1] == f"bytes={kept}-"
    assert left_in(tmp_path) == ["ml-1m"]


def test_a_server_without_ranges(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    publisher.ignore_range = True
    (tmp_path / ".ml-1m.zip.part").write_bytes(GOOD[:1000])
    assert (download("ml-1m", tmp_path) / "ratings.dat").read_bytes() == RATINGS
    assert len(publisher.zip_requests()) == 1


@pytest.mark.parametrize("stale", [b"of another version" * 100, GOOD, GOOD + b"too much"])
def test_a_stale_part_does_no_harm(publisher, tmp_path, stale):
    publisher.publish("ml-1m", GOOD)
    (tmp_path / ".ml-1m.zip.part").write_bytes(stale)
    assert (download("ml-1m", tmp_path) / "ratings.dat").read_bytes() == RATINGS


def test_wrong_checksum(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD, md5="0" * 32)
    with pytest.raises(DownloadError, match=f"md5 is {hashlib.md5(GOOD).hexdigest()}.*{'0' * 32}"):
        download("ml-1m", tmp_path)
    assert left_in(tmp_path) == []


def test_wrong_ratings_inside_a_good_archive(publisher, tmp_path):
    publisher.publish("ml-100k", zip_of({"ml-100k/u.data": b"1\t2\t3\t4\n"}))
    with pytest.raises(DownloadError, match=r"md5 of u\.data"):
        download("ml-100k", tmp_path)
    assert left_in(tmp_path) == []


def test_the_real_ratings_pass_their_checksum(publisher, tmp_path, data_root):
    real = data_root / "ml-100k" / "u.data"
    if not real.exists():
        pytest.skip(f"{real} is missing")
    publisher.publish("ml-100k", zip_of({"ml-100k/u.data": real.read_bytes()}))
    assert (download("ml-100k", tmp_path) / "u.data").exists()


def test_missing_checksum(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    del publisher.files["ml-1m.zip.md5"]
    with pytest.raises(DownloadError, match="404"):
        download("ml-1m", tmp_path)


@pytest.mark.parametrize("name", ["../escape", "ml-1m/../../escape", "/escape", "C:/escape", "ml-1m\\..\\..\\escape"])
def test_archives_cannot_write_elsewhere(publisher, tmp_path, name):
    publisher.publish("ml-1m", zip_of({"ml-1m/ratings.dat": b"", name: b"gotcha"}))
    with pytest.raises(DownloadError, match="outside the folder"):
        download("ml-1m", tmp_path / "root")
    assert left_in(tmp_path / "root") == []
    assert not list(tmp_path.rglob("*escape*"))


def test_archives_cannot_hold_links(publisher, tmp_path):
    link = zipfile.ZipInfo("ml-1m/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc")
    publisher.publish("ml-1m", buffer.getvalue())
    with pytest.raises(DownloadError, match="outside the folder"):
        download("ml-1m", tmp_path)


@pytest.mark.parametrize("content", [b"<html>moved</html>", zip_of({"other/ratings.dat": b""})])
def test_something_else_than_the_archive(publisher, tmp_path, content):
    publisher.publish("ml-1m", content)
    with pytest.raises(DownloadError, match="is not the archive of ml-1m"):
        download("ml-1m", tmp_path)
    assert left_in(tmp_path) == []


def test_a_killed_unpacking_leaves_the_dataset_absent(publisher, tmp_path, monkeypatch):
    publisher.publish("ml-1m", GOOD)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        patch.setattr(download_module.shutil, "rmtree", lambda *args, **kwargs: None)  # a kill cleans nothing
        (tmp_path / ".ml-1m.unpacking").mkdir()
        (tmp_path / ".ml-1m.unpacking" / "half").touch()
        with pytest.raises(KeyboardInterrupt):
            download("ml-1m", tmp_path)
    assert not (tmp_path / "ml-1m").exists()
    assert (download("ml-1m", tmp_path) / "ratings.dat").read_bytes() == RATINGS
    assert left_in(tmp_path) == ["ml-1m"]


def test_a_root_that_cannot_be_written(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    (tmp_path / "root").touch()
    with pytest.raises(DownloadError, match=r"cannot write to .*--data\.root"):
        download("ml-1m", tmp_path / "root")


def test_two_processes_download_once(publisher, tmp_path):
    publisher.publish("ml-1m", GOOD)
    publisher.delay_s = 1.0  # long enough for both to find the folder missing
    script = "import sys, pathlib, data.download as d; d.download('ml-1m', pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=50)
        assert process.returncode == 0, errors.decode()
    assert len(publisher.zip_requests()) == 1
    assert (tmp_path / "ml-1m" / "ratings.dat").read_bytes() == RATINGS
