"""Exit 0 when the server in this container may be sent requests (``/readyz`` answers 200), else 1."""

import os
import ssl
import sys
import urllib.error
import urllib.request

scheme = "https" if os.environ.get("NANN_TLS_CERT_FILE") else "http"
url = f"{scheme}://127.0.0.1:{os.environ.get('NANN_REST_PORT') or 8501}/readyz"
# The certificate is for the names that callers use, and this asks itself.
context = ssl._create_unverified_context() if scheme == "https" else None
try:
    with urllib.request.urlopen(url, timeout=2, context=context) as reply:
        print(reply.read().decode())
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"{url}: {error}")
