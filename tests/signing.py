"""Requests signed by botocore's own signer, and what tests break of them."""

import datetime as dates
from typing import Any
from unittest.mock import patch

from botocore import auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials


def signed(
    method: str,
    url: str,
    access_key_id: str,
    secret: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    late: float = 0,
) -> dict[str, str]:
    """The headers, those given included. late: seconds since it was signed; below 0 the clock of the client is fast."""
    request = AWSRequest(method, url, dict(headers or {}), body)
    now = dates.datetime.now(dates.UTC) - dates.timedelta(seconds=late)
    with patch.object(auth, "get_current_datetime", lambda *_: now.replace(tzinfo=None)):
        signer: Any = auth.SigV4Auth(Credentials(access_key_id, secret), "sagemaker", "us-east-1")
        signer.add_auth(request)
    return dict(request.headers.items())
