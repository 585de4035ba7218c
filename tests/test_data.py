"""DEMUR_DATA, cache, pinned upstream: nothing unchecked is stored and nothing damaged is used."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from demur import data
from demur.errors import DataUnavailable, InputError

CSV = b"id,prompt\r\n1,one\r\n2,two\r\n"
PIN = hashlib.sha256(CSV.replace(b"\r\n", b"\n")).hexdigest()


class Upstream:
    """A web server on this machine with some files; counts what it served."""

    def __init__(self) -> None:
        self.files = {"/pinned.csv": CSV, "/free.jsonl": b'{"a": 1}\n{"a": 2}\n'}
        self.served: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.served.append(self.path)
                body = outer.files.get(self.path)
                self.send_response(200 if body is not None else 404)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Upstream]:
    up = Upstream()
    files = (
        data.DataFile(name="pinned.csv", url=f"{up.url}/pinned.csv", sha256=PIN, rows=2, also=("other.csv",)),
        data.DataFile(name="free.jsonl", url=f"{up.url}/free.jsonl", rows=2, note="not pinned"),
        data.DataFile(name="gone.csv", url=f"{up.url}/gone.csv", rows=2),
        data.DataFile(name="local.csv", note="derived by hand"),
    )
    about = {"title": "T", "license": "MIT", "terms": "be kind", "source": "here", "files": files}
    sets = {
        "toy": data.DataSet(slug="toy", **about),  # type: ignore[arg-type]
        "closed": data.DataSet(slug="closed", restricted=True, **about),  # type: ignore[arg-type]
    }
    monkeypatch.setattr(data, "_registry", lambda: sets)
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEMUR_DATA", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    yield up
    up.server.shutdown()
    up.server.server_close()


def test_fetches_once_then_uses_the_cache(upstream: Upstream) -> None:
    path = data.get("toy", "pinned.csv")
    assert path.read_bytes() == CSV
    assert data.get("toy", "pinned.csv") == path
    assert upstream.served == ["/pinned.csv"]
    assert {c.name: c.status for c in data.verify("toy")}["pinned.csv"] == "ok"


def test_says_what_it_fetches_and_under_which_licence(upstream: Upstream) -> None:
    said: list[str] = []
    data.get("toy", "pinned.csv", say=said.append)
    assert "toy/pinned.csv" in said[0]
    assert "MIT" in said[0]


@pytest.mark.parametrize("name", ["pinned.csv", "free.jsonl"])
def test_a_damaged_cache_is_fetched_again(upstream: Upstream, name: str) -> None:
    path = data.get("toy", name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert {c.name: c.status for c in data.verify("toy")}[name] == "damaged"
    assert data.get("toy", name).read_bytes() == whole
    assert len(upstream.served) == 2


def test_a_download_killed_before_its_checksum_is_fetched_again(upstream: Upstream) -> None:
    path = data.get("toy", "free.jsonl")
    path.with_name("free.jsonl.sha256").unlink()
    data.get("toy", "free.jsonl")
    assert len(upstream.served) == 2


def test_other_bytes_than_pinned_are_not_stored(upstream: Upstream) -> None:
    upstream.files["/pinned.csv"] = CSV.replace(b"two", b"owt")
    with pytest.raises(DataUnavailable, match="pinned is"):
        data.get("toy", "pinned.csv")
    assert {c.name: c.status for c in data.verify("toy")}["pinned.csv"] == "missing"


def test_newlines_alone_do_not_break_the_checksum(upstream: Upstream) -> None:
    upstream.files["/pinned.csv"] = CSV.replace(b"\r\n", b"\n")
    data.get("toy", "pinned.csv")


def test_a_wrong_number_of_rows_is_not_stored(upstream: Upstream) -> None:
    upstream.files["/free.jsonl"] = b'{"a": 1}\n'
    with pytest.raises(DataUnavailable, match="1 rows, expected 2"):
        data.get("toy", "free.jsonl")


def test_missing_upstream_file_says_what_to_do(upstream: Upstream) -> None:
    with pytest.raises(DataUnavailable, match=r"404.*Set DEMUR_DATA"):
        data.get("toy", "gone.csv")


def test_no_network_says_what_to_do(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.server.shutdown()
    upstream.server.server_close()
    with pytest.raises(DataUnavailable, match=r"ConnectError.*DEMUR_DATA"):
        data.get("toy", "pinned.csv")


def test_restricted_sets_show_their_terms_first(upstream: Upstream) -> None:
    with pytest.raises(DataUnavailable, match=r"be kind.*--accept-terms"):
        data.get("closed", "pinned.csv")
    assert upstream.served == []
    data.get("closed", "pinned.csv", accept_terms=True)
    data.get("closed", "pinned.csv")  # once it is here, nobody is asked again


def test_own_folder_comes_first(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    (folder / "pinned.csv").write_bytes(b"id\n1\n")  # a subset is welcome here
    (folder / "extra.txt").write_text("x")
    assert data.get("toy", "pinned.csv") == folder / "pinned.csv"
    assert data.get("toy", "extra.txt") == folder / "extra.txt"
    assert upstream.served == []
    checks = {c.name: c for c in data.verify("toy")}
    assert (checks["pinned.csv"].status, checks["pinned.csv"].where) == ("differs", "DEMUR_DATA")
    (folder / "pinned.csv").unlink()
    (folder / "other.csv").write_bytes(CSV)  # another name of the same file
    assert data.get("toy", "pinned.csv") == folder / "other.csv"


def test_upstream_layout_is_found_in_the_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path))
    upstream_form = tmp_path / "coconot" / "data" / "coconot_eval.jsonl"
    upstream_form.parent.mkdir(parents=True)
    upstream_form.write_text("{}")
    assert data.get("coconot", "original_eval.jsonl") == upstream_form


def test_files_without_upstream_form(upstream: Upstream) -> None:
    with pytest.raises(DataUnavailable, match="derived by hand"):
        data.get("toy", "local.csv")


@pytest.mark.parametrize("name", ["../secret", "a/b", "", ".hidden", "/etc/passwd"])
def test_names_cannot_leave_the_folder(upstream: Upstream, name: str) -> None:
    for args in ((name, "pinned.csv"), ("toy", name)):
        with pytest.raises(InputError):
            data.get(*args)


def test_unknown_set_and_file(upstream: Upstream) -> None:
    with pytest.raises(InputError, match="known are"):
        data.get("toys", "pinned.csv")
    with pytest.raises(DataUnavailable, match=r"pinned\.csv"):
        data.get("toy", "unknown.csv")


def test_every_shipped_entry_is_complete() -> None:
    sets = data.list_sets()
    assert {"coconot", "xstest", "refusal-tokens", "derta", "selfaware"} <= {s.slug for s in sets}
    for s in sets:
        assert s.title
        assert s.license
        assert s.terms
        assert s.source.startswith("https://")
        for f in s.files:
            assert f.sha256 or f.note, f"{s.slug}/{f.name}: neither a checksum nor a reason"
            if f.url:
                assert len(f.url.split("/")[5]) == 40, f"{f.url}: not at a full commit"


@pytest.mark.skipif(not os.environ.get("DEMUR_DATA"), reason="DEMUR_DATA is not set: no local public data")
def test_pinned_checksums_match_the_local_copies() -> None:
    pinned = [c for s in data.list_sets() for c in data.verify(s.slug) if c.status in ("ok", "differs")]
    if not pinned:
        pytest.skip("DEMUR_DATA holds no pinned file")
    assert [c.name for c in pinned if c.status == "differs"] == []
