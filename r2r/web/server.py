"""Serving the page: on this machine alone unless told, with nothing asked of any other."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from r2r.demo.restoring import CASES, write_cases
from r2r.model import R2R
from r2r.web.address import check_address

EXAMPLES = CASES[:-1]  # without the large one


@dataclass(frozen=True)
class Limits:
    """`bytes` of an upload, `pixels` of a photo, and `memory` as `r2r.restoration.Settings` has it."""

    bytes: int
    pixels: int
    memory: int | None = None


def serve(
    load: Callable[[], R2R], host: str, port: int, password: str | None, limits: Limits, ready: Callable[[str], object]
) -> None:
    """Serve the page until this thread is interrupted; `load` gives the model, `ready` is told the address. All files
    that the page needs and makes are in one temporary folder, which is gone afterwards. Raises InputError as
    `check_address` does."""
    check_address(host, port, password)

    with tempfile.TemporaryDirectory(prefix="r2r-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when Gradio is imported, which these modules do
        import gradio  # noqa: F401  # first, so that its absence is named
        from starlette.middleware import Middleware

        from r2r.web.guard import Guard
        from r2r.web.page import CSS, THEME, build_page
        from r2r.web.sessions import Sessions

        sessions = Sessions(load(), Path(folder), limits.memory, limits.pixels)
        examples = [Path(folder, "examples", case.file) for case in EXAMPLES]
        write_cases(Path(folder, "examples"), EXAMPLES)
        page = build_page(sessions, examples)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=limits.bytes,
                app_kwargs={"middleware": [Middleware(Guard, password=password)], "docs_url": None, "redoc_url": None},
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                theme=THEME,
                css=CSS,
            )
            ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            threading.Event().wait()
        finally:
            sessions.close_all()
            page.close(verbose=False)
