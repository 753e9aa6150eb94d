"""Every test is offline, sends no usage statistics, and leaves the user's own cache alone."""

import os
from collections.abc import Iterator

import pytest

from tests.s3 import s3_server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole run of tests: what is slow to find is found once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWEEP_CACHE_DIR", str(tmp_path_factory.mktemp("sweep-cache")))
        yield


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, bytes], list[str]]]:
    """An S3 server that the usual variables lead to: its objects, and the requests that it has had."""
    with s3_server() as (url, objects, requests):
        for name, value in {
            "ENDPOINT_URL": url,
            "ACCESS_KEY_ID": "id",
            "SECRET_ACCESS_KEY": "secret",
            "REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield objects, requests
