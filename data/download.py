"""Fetch MovieLens from GroupLens: resumed when cut, verified, and complete in the data root or absent."""

import hashlib
import logging
import os
import re
import shutil
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import requests
from filelock import FileLock
from tqdm import tqdm

logger = logging.getLogger("shardrec")

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_TIMEOUT_S = (10, 60)  # to connect, and between two packets
_CHUNK_BYTES = 1 << 16


class DownloadError(RuntimeError):
    """The dataset could not be fetched, or what came is not what the publisher says it is."""


@dataclass(frozen=True)
class Archive:
    """A zip file of GroupLens."""

    folder: str  # the folder inside it that holds the data
    has_md5: bool = True  # the publisher keeps NAME.zip.md5 beside NAME.zip
    file_md5: dict[str, str] = field(default_factory=dict)  # of files inside the folder


ARCHIVES = {
    "ml-100k": Archive("ml-100k", file_md5={"u.data": "6e47046882bad158b0efbb84cd5cb987"}),
    "ml-1m": Archive("ml-1m"),
    "ml-10m": Archive("ml-10M100K"),
    "ml-20m": Archive("ml-20m"),
    "ml-32m": Archive("ml-32m"),
    "ml-latest-small": Archive("ml-latest-small", has_md5=False),
}


def download(name: str, root: Path) -> Path:
    """Folder `root/name` with the dataset in it, fetched if it is not there. Other processes wait meanwhile.

    The base address is $SHARDREC_GROUPLENS_URL when set. Raises DownloadError, with the reason.
    """
    folder = root / name
    url = f"{os.environ.get('SHARDREC_GROUPLENS_URL', _GROUPLENS).rstrip('/')}/{name}.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not folder.exists():  # else another process fetched it while this one waited
                archive = _fetch_verified(url, root / f".{name}.zip.part", ARCHIVES[name].has_md5)
                _unpack(archive, folder, ARCHIVES[name])
                archive.unlink()
                logger.info("%s is in %s; its README states the terms of use.", name, folder)
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {error}") from error
    except OSError as error:
        raise DownloadError(f"cannot write to {root} (--data.root chooses another folder): {error}") from error
    return folder


def _fetch_verified(url: str, path: Path, has_md5: bool) -> Path:
    expected = _published_md5(url) if has_md5 else None
    resumed = path.exists()
    _fetch(url, path)
    if expected is None or _md5(path) == expected:
        return path
    actual = _md5(path)
    path.unlink()
    if resumed:  # what was there before may be of another version of the file
        return _fetch_verified(url, path, has_md5)
    raise DownloadError(f"{url}: md5 is {actual}, the publisher says {expected}; the file was removed, try again.")


def _published_md5(url: str) -> str:
    response = requests.get(f"{url}.md5", timeout=_TIMEOUT_S)
    response.raise_for_status()
    found = re.search(r"\b[0-9a-f]{32}\b", response.text)
    if not found:
        raise DownloadError(f"{url}.md5 holds no md5 sum: {response.text[:100]!r}")
    return found.group()


def _fetch(url: str, path: Path) -> None:
    """Append what is missing; a cut connection is taken up again as long as each attempt brings something."""
    while True:
        size_before = path.stat().st_size if path.exists() else 0
        try:
            return _fetch_from(url, path, size_before)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if not path.exists() or path.stat().st_size <= size_before:
                raise


def _fetch_from(url: str, path: Path, start: int) -> None:
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is missing; the checksum decides
        response.raise_for_status()
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if resumes else 0
        length = response.headers.get("Content-Length")
        with (
            path.open("ab" if resumes else "wb") as file,
            tqdm(
                desc=url.rsplit("/", 1)[-1],
                total=start + int(length) if length else None,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=None,  # silent unless a terminal shows it
            ) as bar,
        ):
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))


def _unpack(archive: Path, folder: Path, expected: Archive) -> None:
    """Unpack beside the final place and rename, so that `folder` is complete or absent."""
    unpacking = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(unpacking, ignore_errors=True)  # left by a process that was killed; the lock is ours
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                _refuse_escape(member)
            file.extractall(unpacking)
        for name, md5 in expected.file_md5.items():
            if (actual := _md5(unpacking / expected.folder / name)) != md5:
                raise DownloadError(f"{archive.name}: md5 of {name} is {actual}, expected {md5}.")
        (unpacking / expected.folder).rename(folder)
    except (zipfile.BadZipFile, FileNotFoundError, DownloadError) as error:
        archive.unlink()  # the next attempt starts from nothing
        raise DownloadError(f"{archive.name} is not the archive of {folder.name}: {error}") from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _refuse_escape(member: zipfile.ZipInfo) -> None:
    parts = re.split(r"[/\\]", member.filename)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if ".." in parts or parts[0] == "" or ":" in parts[0] or is_link:
        raise DownloadError(f"{member.filename!r} would be written outside the folder of the dataset.")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
