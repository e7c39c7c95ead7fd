"""Photos restored on a Ray cluster, of two nodes on this machine, and in object storage, a local S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
import skimage.data
import torch

from r2r import R2R, InputError, fast
from r2r.cli import main
from r2r.data.images import ACCEPTED, write_rgb
from r2r.frozen import inference_form
from r2r.inputs import plan_outputs
from r2r.report import REPORT, FileResult
from r2r.restoration import restore_files
from r2r.storage import Address
from tests.conftest import TINY, fill_randomly

PHOTO = skimage.data.astronaut() / np.float32(255)
PROGRAM = (sys.executable, "-c", "from r2r.cli import main; main()", "restore")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "NO_COLOR": "1", **more}


class Store:
    """A local S3 server. Of its buckets `photos` is open to whoever has the keys, save for `photos/out/locked`."""

    def __init__(self) -> None:
        self.server = pytest.importorskip("moto.server", reason="needs moto").ThreadedMotoServer(
            ip_address="127.0.0.1", port=0, verbose=False
        )
        self.server.start()
        self.address = "http://{}:{}".format(*self.server.get_host_and_port())
        keys = {"aws_access_key_id": "first", "aws_secret_access_key": "first", "region_name": "us-east-1"}
        import boto3

        self.client = boto3.client("s3", endpoint_url=self.address, **keys)
        for bucket in ("photos", "closed"):
            self.client.create_bucket(Bucket=bucket)
        iam = boto3.client("iam", endpoint_url=self.address, **keys)
        iam.create_user(UserName="user")
        key = iam.create_access_key(UserName="user")["AccessKey"]
        open_to_all = [f"arn:aws:s3:::{bucket}" for bucket in ("photos", "photos/*", "nowhere", "nowhere/*")]
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": open_to_all}
        denied = {"Effect": "Deny", "Action": "s3:PutObject", "Resource": "arn:aws:s3:::photos/out/locked/*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [allowed, denied]})
        iam.put_user_policy(UserName="user", PolicyName="policy", PolicyDocument=document)
        self.variables = {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        plain = {"Content-Type": "text/plain"}
        urlopen(Request(f"{self.address}/moto-api/reset-auth", b"0", plain)).close()  # from now on rights count
        self.client = boto3.client(
            "s3",
            endpoint_url=self.address,
            aws_access_key_id=key["AccessKeyId"],
            aws_secret_access_key=key["SecretAccessKey"],
            region_name="us-east-1",
        )

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="photos", Key=key, Body=content)

    def get(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket="photos", Key=key)["Body"].read()
        return content

    def keys(self, prefix: str) -> list[str]:
        listed = self.client.list_objects_v2(Bucket="photos", Prefix=prefix).get("Contents", [])
        return sorted(one["Key"] for one in listed)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    pytest.importorskip("pyarrow", reason="object storage needs pyarrow")
    made = Store()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.variables.items():
            patch.setenv(name, value)
        yield made
    made.server.stop()


@pytest.fixture(scope="module")
def cluster(store: Store) -> Iterator[Any]:
    """Two nodes of one core each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="a fleet needs Ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1").items():
            patch.setenv(name, value)
        head: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        head["_system_config"] = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def model() -> fast.R2R:
    torch.manual_seed(0)
    made = fast.R2R(tasks=("denoise", "derain", "dehaze"), **TINY)
    fill_randomly(made)
    return made.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as a worker has: with another number, sums are rounded in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Small ones that go through the network together, larger ones, two of one name, and files that are no photos."""
    folder = tmp_path / "photos"
    for number in range(12):
        write_rgb(folder / "a" / f"{number:02}.png", PHOTO[number : number + 40, : 40 + 8 * (number // 4)])
    write_rgb(folder / "b" / "00.png", PHOTO[:50, 100:170])
    write_rgb(folder / "b" / "large.jpg", PHOTO[:400, :500])
    (folder / "b" / "broken.png").write_bytes(b"no image")
    (folder / "b" / "cut.png").write_bytes((folder / "a" / "05.png").read_bytes()[:-500])
    (folder / "b" / "film.gif").touch()
    return folder


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def on_cluster(cluster: Any, model: fast.R2R) -> Iterator[Run]:
    """`restore_files` on the cluster."""
    from r2r.fleet import Fleet, connected

    def run(inputs: list[Any], out: Any, progress: Callable[[FileResult, int], object] | None = None) -> Any:
        return restore_files(inference_form(model), inputs, out, progress=progress, by=Fleet(model))

    with connected(cluster.address):
        yield run


def entries(out: Path) -> list[dict[str, Any]]:
    """Those of the report, without what may differ: times, and the folder of the outputs."""
    report = json.loads((out / REPORT).read_text())
    assert report["complete"] is True
    return [
        {
            **one,
            "seconds": 0,
            "output": one["output"].removeprefix(str(out)),
            "error": one["error"] and one["error"][:30],
        }
        for one in report["files"]
    ]


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != REPORT)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_two_machines_write_the_bytes_and_the_report_of_one(
    on_cluster: Run, model: fast.R2R, photos: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    restore_files(inference_form(model), [photos / "b", photos / "a"], one)
    seen: list[tuple[str, int]] = []
    report = on_cluster([photos / "b", photos / "a"], two, lambda result, total: seen.append((result.input, total)))
    assert (report.restored, report.failed, len(report.skipped)) == (14, 2, 1)
    assert contents(two) == contents(one)
    assert len(contents(two)) == 14
    assert entries(two) == entries(one)
    assert sorted(seen) == sorted((entry["input"], 16) for entry in entries(one))

    (two / "a" / "06.png").unlink()  # one that went with others
    again = on_cluster([photos / "b", photos / "a"], two)
    assert (again.unchanged, again.restored, again.failed) == (13, 1, 2)
    assert contents(two) == contents(one)


def entries_so_far(out: Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((out / REPORT).read_text())["files"]
    return files


@pytest.mark.slow
def test_an_interrupted_command_goes_on(cluster: Any, model: fast.R2R, tmp_path: Path) -> None:
    photos, one, two = (tmp_path / name for name in ("photos", "one", "two"))
    for number in range(40):
        write_rgb(photos / f"{number:02}.png", np.tile(PHOTO[number // 3 :], (1, 2, 1))[:300, :500])
    model.save_pretrained(tmp_path / "model")
    restore_files(inference_form(fast.R2R.from_pretrained(tmp_path / "model")), [photos], one)
    command = [*PROGRAM, "photos", "--out", "two", "--model", str(tmp_path / "model"), "--ray", cluster.address]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert running.stdout is not None
        assert "photos/" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=100)
    finally:
        running.kill()
    assert running.returncode == 130
    assert said.endswith("interrupted; what was done so far is kept\n")
    assert "Traceback" not in said
    stopped = json.loads((two / REPORT).read_text())
    assert stopped["complete"] is False
    assert 1 <= len(stopped["files"]) < 40
    before = {entry["output"]: (tmp_path / entry["output"]).stat().st_ino for entry in stopped["files"]}

    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    rest = 40 - len(before)
    assert done.stdout.endswith(f"{rest} restored, 0 failed, {len(before)} unchanged; two/report.json\n")
    assert {name: (tmp_path / name).stat().st_ino for name in before} == before
    assert contents(two) == contents(one)
    assert [entry["input"] for entry in entries(two)] == [f"photos/{number:02}.png" for number in range(40)]


def test_photos_in_object_storage(store: Store, on_cluster: Run, model: fast.R2R, photos: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    (photos / "b" / "ü #%20?.png").write_bytes((photos / "b" / "00.png").read_bytes())
    (photos / "locked").mkdir()
    shutil.copy(photos / "b" / "00.png", photos / "locked" / "00.png")
    restore_files(inference_form(model), [photos], one)
    for name, content in contents(photos).items():
        store.put(f"in/{name}", content)
    store.put("in/.hidden.png", b"")

    report = on_cluster(["s3://photos/in/"], "s3://photos/out")
    assert (report.restored, report.failed, len(report.skipped)) == (15, 3, 1)
    assert report.skipped[0].input == "s3://photos/in/b/film.gif"
    errors = {one.input.removeprefix("s3://photos/in/"): one.error for one in report.files if one.error}
    assert errors.keys() == {"b/broken.png", "b/cut.png", "locked/00.png"}
    assert errors["b/broken.png"] == f"not an image; {ACCEPTED}"
    assert errors["locked/00.png"].startswith("cannot write s3://photos/out/locked/00.png: ACCESS_DENIED")
    expected = {name: content for name, content in contents(one).items() if name != "locked/00.png"}
    assert {name: store.get(f"out/{name}") for name in expected} == expected
    assert store.keys("out") == sorted(["out/report.json", *(f"out/{name}" for name in expected)])

    local = {entry["input"].removeprefix(str(photos)): entry for entry in entries(one)}
    for stored in json.loads(store.get(f"out/{REPORT}"))["files"]:
        own = local[stored["input"].removeprefix("s3://photos/in")]
        same = ("scores", "height", "width", "tiles", "size") if stored["error"] is None else ("size",)
        assert {key: stored[key] for key in same} == {key: own[key] for key in same}

    store.put("in/a/03.png", (photos / "a" / "04.png").read_bytes())
    report = on_cluster(["s3://photos/in"], "s3://photos/out")
    assert (report.unchanged, report.restored, report.failed) == (14, 1, 3)


def test_what_object_storage_refuses_is_told_before_any_work(
    store: Store, model: fast.R2R, photos: Path, tmp_path: Path
) -> None:
    def nothing(*_: object) -> None:
        pytest.fail("work was done")

    store.put("some/a.png", (photos / "a" / "00.png").read_bytes())
    for source, out, line in (
        ("s3://closed/in", tmp_path / "out", "cannot read s3://closed/in: ACCESS_DENIED"),
        ("s3://nowhere/in", tmp_path / "out", "s3://nowhere/in: no such file or folder"),
        ("s3://photos/nothing", tmp_path / "out", "s3://photos/nothing: no such file or folder"),
        ("s3://photos/some", "s3://closed/out", "s3://closed/out/report.json: ACCESS_DENIED"),
        ("s3://photos/some", "s3://nowhere/out", "s3://nowhere/out/report.json: .*bucket does not exist"),
        ("s3://photos/some", "s3://photos/some", "some/a.png would be replaced by an output|no image in it"),
        ("carrier-pigeon://photos", tmp_path / "out", "carrier-pigeon://photos: .*[Uu]nrecognized"),
    ):
        with pytest.raises(InputError, match=line) as error:
            restore_files(inference_form(model), [source], out, by=nothing)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="s3://photos/some: object storage is reached through Ray; see --ray"):
        restore_files(inference_form(model), ["s3://photos/some"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_in_object_storage(store: Store, photos: Path) -> None:
    for key in ("x/one/a.png", "x/two/a.png", "x/two/b.jpg", "x/twofold/c.png", "x/out/d.png"):
        store.put(key, b"-")
    plan = plan_outputs(["s3://photos/x/one", "s3://photos/x/two/"], "s3://photos/x/out", "WEBP")
    assert [str(target) for _, target in plan.files] == [
        "s3://photos/x/out/one/a.png.webp",
        "s3://photos/x/out/two/a.png.webp",
        "s3://photos/x/out/two/b.jpg.webp",
    ]  # fmt: skip
    plan = plan_outputs(["s3://photos/x"], "s3://photos/x/out")
    assert "s3://photos/x/out/d.png" not in [str(source) for source, _ in plan.files]
    assert len(plan.files) == 4
    store.put("x/two/00.png", b"-")
    with pytest.raises(InputError, match="several drives"):
        plan_outputs(["s3://photos/x/two", photos / "a"], "s3://photos/y")
    plan = plan_outputs(["s3://photos/x/one/a.png", photos / "a" / "00.png"], photos.parent / "out")
    assert [str(source) for source, _ in plan.files] == ["s3://photos/x/one/a.png", str(photos / "a" / "00.png")]
    assert [target for _, target in plan.files] == [photos.parent / "out" / name for name in ("a.png", "00.png")]
    assert Address("s3://photos/x/one/a.png").stat().st_size == 1


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `r2r restore` says that does nothing."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["r2r", "restore", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ending:
            main()
        signal.signal(signal.SIGTERM, handler)
        out, said = capfd.readouterr()
        assert (ending.value.code, out) == (2, "")
        return said

    return run


def test_a_cluster_that_cannot_be_reached_is_told(
    store: Store, refused: Callable[..., str], photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="a fleet needs Ray")
    command = (photos / "a", "--out", tmp_path / "out", "--ray")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert re.fullmatch(
            f"error: --ray {address}: the cluster cannot be reached: .*refused\n", refused(*command, address)
        )
    assert "the cluster cannot be reached: what answers there is no Ray\n" in refused(
        *command, store.address.removeprefix("http://")
    )
    assert refused(*command, "here") == "error: --ray here: accepted are HOST:PORT, auto and local\n"
    assert "run it on a machine of the cluster, with --ray auto\n" in refused(*command, "ray://127.0.0.1:10001")
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(
    refused: Callable[..., str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    line = "error: this needs the package {}: pip install 'r2r-restore[ray]'\n"
    assert refused(photos, "--out", tmp_path / "out", "--ray", "local") == line.format("ray")
    assert "goes with --ray" in refused(photos, "--cores", "2")
    assert "without --ray" in refused("-", "--out", "-", "--ray", "local")
    assert "reached through Ray" in refused("s3://photos/in", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_ray_nothing_of_it_is_imported(photos: Path, model: fast.R2R, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    code = (
        "import sys\nfrom r2r.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ending:\n    assert not ending.code, ending.code\n"
        "assert not {'ray', 'pyarrow', 'fsspec'} & sys.modules.keys(), 'imported'"
    )
    command = [sys.executable, "-c", code, "restore", str(photos / "a"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "model")], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "12 restored" in done.stdout


def test_what_the_cluster_does_not_have_is_told(on_cluster: Run, model: R2R) -> None:
    from r2r.fleet import Fleet

    with pytest.raises(InputError, match="--device cuda: the cluster has no GPU"):
        Fleet(model, "cuda")
    with pytest.raises(InputError, match="--device cuda:1: with --ray accepted are auto, cpu and cuda"):
        Fleet(model, "cuda:1")
    with pytest.raises(InputError, match="--cores 3: the machines of the cluster have 1, 1"):
        Fleet(model, cores=3)


def workers_at_work() -> int:
    titles = (process.info["cmdline"] for process in psutil.process_iter(["cmdline"]))
    return sum(bool(title) and title[0].startswith("ray::MapWorker") and "submit" in title[0] for title in titles)


@pytest.mark.slow
def test_a_photo_that_kills_its_workers_fails(on_cluster: Run, photos: Path, tmp_path: Path) -> None:
    """As want of memory does it; Ray alone would try for ever."""
    deaths: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                title = process.info["cmdline"] or [""]
                if title[0].startswith("ray::MapWorker") and "submit" in title[0] and process.pid not in deaths:
                    deaths.append(process.pid)
                    process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        report = on_cluster([photos / "b" / "00.png"], tmp_path / "out")
    finally:
        over.set()
        killer.join()
    assert [one.error for one in report.files] == [
        "its worker died, 4 times, perhaps for want of memory; Ray's logs tell more"
    ]
    assert len(deaths) >= 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == [REPORT]


@pytest.mark.slow
def test_a_machine_that_dies_in_the_middle_loses_nothing(
    cluster: Any, on_cluster: Run, model: fast.R2R, tmp_path: Path
) -> None:
    photos, one, two = (tmp_path / name for name in ("photos", "one", "two"))
    for number in range(36):  # each is a batch
        write_rgb(photos / f"{number:02}.bmp", np.tile(PHOTO[number:], (1, 2, 1)))
    restore_files(inference_form(model), [photos], one)
    done: list[int] = []

    def kill(result: Any, total: int) -> None:
        if not done and workers_at_work() == 2:
            done.append(len(entries_so_far(two)))
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    report = on_cluster([photos], two, kill)
    assert done
    assert 0 < done[0] < 36
    assert (report.restored, report.failed) == (36, 0)
    assert len({entry["input"] for entry in entries(two)}) == len(entries(two)) == 36
    assert entries(two) == entries(one)
    assert contents(two) == contents(one)
