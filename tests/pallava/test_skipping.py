import json
import multiprocessing
import pickle

import pytest

from pallava.skipping import SkipLog


def _write(path, worker):
    log = SkipLog(path)
    for i in range(50):
        log.record(f"{worker}-{i}", "a.png", "x" * 2000)


def test_nothing_skipped_leaves_no_file(tmp_path):
    log = SkipLog(tmp_path / "runs" / "skipped_samples.jsonl")
    assert log.read() == []
    assert not log.path.exists()


def test_records_are_read_back_once(tmp_path):
    log = SkipLog(tmp_path / "deep" / "skipped_samples.jsonl")
    for _ in range(2):
        log.record(7, tmp_path / "schädel\n.png", ValueError("truncated"))
    SkipLog(log.path).record(7, tmp_path / "schädel\n.png", "again, in another epoch")
    assert len(log.path.read_text().splitlines()) == 2
    (sample,) = log.read()
    assert (sample.id, sample.reason) == ("7", "truncated")
    assert sample.file == str(tmp_path / "schädel\n.png")


def test_a_name_that_is_no_text_is_recorded(tmp_path):
    log = SkipLog(tmp_path / "log.jsonl")
    log.record("1", "\udcff.png", "bad")
    assert len(log.read()) == 1


def test_lines_of_several_processes_never_mix(tmp_path):
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("fork")  # test modules cannot be imported by name
    workers = [context.Process(target=_write, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(SkipLog(path).read()) == 150


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"id": "1", "file": "f", "reason": "r"}) + "\n{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"):
        SkipLog(path).read()


def test_travels_to_a_worker(tmp_path):
    log = pickle.loads(pickle.dumps(SkipLog(tmp_path / "log.jsonl")))
    log.record("1", "f", "r")
    assert len(log.read()) == 1
