"""Settings of the local environment and both rendered definitions, once a process."""

from __future__ import annotations

import pytest

from pipelines.settings import Settings


@pytest.fixture(scope="session")
def settings() -> Settings:
    """config/local.yaml."""
    return Settings.load("local")


@pytest.fixture(scope="session")
def definitions(settings: Settings) -> dict[str, str]:
    """The rendered definitions by the pipeline's short name."""
    from pipelines import production, release

    return {
        "release": release.get_pipeline(settings).definition(),
        "production": production.get_pipeline(settings).definition(),
    }
