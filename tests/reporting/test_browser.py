"""The page in a real browser, where there is one."""

import re
import shutil
import subprocess

import pytest

from pretrain.reporting.page import render
from pretrain.reporting.run import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
]  # fmt: skip


def browse(folder, page, *, name="page.html"):
    """What Chromium made of a page: its document, and what its console said."""
    path = folder / name
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, f"--user-data-dir={folder / 'profile'}", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_page_without_a_complaint_or_a_request(troubled_run, tmp_path):
    page = render([read_run(troubled_run)])
    document, said = browse(tmp_path, page)
    assert said == []
    assert document.count("<svg") == page.count("<svg") > 5
    # a probe, so that silence above means something: the policy refuses and the console says so
    probe = page.replace("</main>", '<img src="https://x.invalid/a"><script>1</script></main>')
    _, said = browse(tmp_path, probe, name="probe.html")
    assert any("https://x.invalid/a" in line for line in said)
    assert any("inline script" in line for line in said)
