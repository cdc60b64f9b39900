"""Corpora in an object store: a real S3 server, on this machine."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from conftest import copy_corpus
from moto.server import ThreadedMotoServer

from llada_train.config.errors import UserError
from llada_train.config.load import load_config
from llada_train.data import storage
from llada_train.data.corpus import Corpus
from llada_train.data.rows import PretrainingData


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    s3 = ThreadedMotoServer(port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        yield f"http://{host}:{port}"
    s3.stop()


@pytest.fixture
def bucket(server: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["boto3.resources.base.Bucket"]:
    """A bucket with a corpus under web/corpus."""
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    fsspec.filesystem("s3").clear_instance_cache()
    bucket = boto3.resource("s3", endpoint_url=server).create_bucket(Bucket="corpora")
    for suffix in (".bin", ".idx", ".json"):
        bucket.upload_file(str(tiny_data / f"corpus{suffix}"), f"web/corpus{suffix}")
    yield bucket
    bucket.objects.delete()
    bucket.delete()


def test_a_remote_corpus_is_the_local_one(bucket: object, tiny_data: Path, make_config: Callable[..., Path]) -> None:
    local, remote = (
        PretrainingData(load_config(make_config(data__corpora=[{"path": path, "validation_documents": 20}])))
        for path in (str(tiny_data / "corpus"), "s3://corpora/web/corpus")
    )
    remote.check()
    assert remote.identities == local.identities
    assert remote.names == ["corpus"]
    assert remote.corpora[0].manifest == local.corpora[0].manifest
    samples = np.arange(100)
    assert np.array_equal(remote.training_rows(samples), local.training_rows(samples))
    assert np.array_equal(remote.validation_rows, local.validation_rows)


def test_a_pattern_is_one_corpus_of_many_files(bucket: object, tiny_data: Path) -> None:
    for part in ("a", "b"):
        for suffix in (".bin", ".idx", ".json"):
            bucket.upload_file(str(tiny_data / f"corpus{suffix}"), f"web/part-{part}{suffix}")
    one, both = Corpus(tiny_data / "corpus"), Corpus("s3://corpora/web/part-*")
    assert (both.num_tokens, both.num_documents) == (2 * one.num_tokens, 2 * one.num_documents)
    assert np.array_equal(both.document(one.num_documents + 3), one.document(3))
    assert both.manifest is not None
    assert one.manifest is not None
    assert both.manifest.text_bytes == 2 * one.manifest.text_bytes
    assert both.manifest.checksums is None, "those of one file say nothing of both"
    with pytest.raises(UserError, match=r"s3://corpora/web/no-\*: no corpus: no file fits"):
        Corpus("s3://corpora/web/no-*")


def test_what_is_missing_is_named(bucket: object) -> None:
    with pytest.raises(UserError, match=r"s3://corpora/web/other\.bin and s3://corpora/web/other\.idx missing"):
        Corpus("s3://corpora/web/other")
    with pytest.raises(UserError, match=r"nofs://x/y.*: nofs:// cannot be read here: Protocol not known: nofs"):
        Corpus("nofs://x/y")


def test_an_object_that_was_replaced_by_a_shorter_one_is_a_user_error(bucket: object, tiny_data: Path) -> None:
    corpus = Corpus("s3://corpora/web/corpus")
    bucket.put_object(Key="web/corpus.bin", Body=b"12345678")
    with pytest.raises(UserError, match=r"s3://corpora/web/corpus\.bin: "):
        corpus.tokens(0, 100)


def test_a_storage_that_does_not_answer_is_asked_again(bucket: object, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus("s3://corpora/web/corpus")
    expected = corpus.tokens(5, 50).copy()
    system, _ = fsspec.core.url_to_fs("s3://corpora")
    answers, cat_file = [OSError("connection reset"), TimeoutError()], system.cat_file

    def unreliable(*arguments: object, **keywords: object) -> bytes:
        if answers:
            raise answers.pop()
        return cat_file(*arguments, **keywords)

    monkeypatch.setattr(system, "cat_file", unreliable)
    assert np.array_equal(corpus.tokens(5, 50), expected)
    answers += [OSError("connection reset")] * storage.ATTEMPTS
    with pytest.raises(UserError, match=r"corpus\.bin: cannot be read, after 6 attempts: OSError: connection reset"):
        corpus.tokens(5, 50)


def test_a_fault_is_not_a_missing_file(bucket: object, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = fsspec.core.url_to_fs("s3://corpora")

    def broken(*_: object, **__: object) -> object:
        raise OSError("connection reset")

    monkeypatch.setattr(system, "info", broken)
    with pytest.raises(UserError, match=r"corpus\.bin: cannot be read, after 6 attempts: OSError: connection reset"):
        Corpus("s3://corpora/web/corpus")


def test_a_server_that_ignores_ranges_is_refused(tiny_data: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tiny_data))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/corpus"
        with pytest.raises(UserError, match=r"corpus\.idx: its server ignores what range is asked for"):
            Corpus(url)
        with pytest.raises(UserError, match="a URL with a query has no place for"):
            Corpus(f"{url}?signature=x")
        web.shutdown()


def test_many_files_may_be_open(tiny_data: Path, tmp_path: Path) -> None:
    """More than the limit that shells set."""
    import resource

    for i in range(40):
        (tmp_path / f"{i:02}").mkdir()
        copy_corpus(tiny_data, tmp_path / f"{i:02}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        assert Corpus(tmp_path / "*" / "corpus").num_documents == 40 * 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
