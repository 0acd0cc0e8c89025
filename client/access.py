"""Who the client is and whom it trusts: a bearer token, and the authorities behind a server's certificate.

The token leaves this module only in the headers of a request. It is in no repr, message or log, and over
plain text it goes to this machine alone.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .errors import InvalidInput
from .transport import Endpoint

if TYPE_CHECKING:
    import ssl

# What RFC 6750 allows. Anything else is a file of another kind, or would end the header's line.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,4096}=*")
_TOKEN_FILE_BYTES = 1 << 14


class AccessOptions(TypedDict, total=False):
    """How a server that is not open to everyone is reached.

    `token` is sent as `Authorization: Bearer`; left out, it is ONECARD_TOKEN or the content of the file that
    ONECARD_TOKEN_FILE names. `ca` is a PEM file of the authorities to trust in place of the usual ones; left
    out, ONECARD_CA.
    """

    token: str | None
    ca: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Access:
    """A token, if there is one, and a file of authorities, if not the usual ones."""

    token: str | None = field(default=None, repr=False)
    ca: Path | None = None

    @classmethod
    def of(
        cls, endpoint: Endpoint, options: AccessOptions, environment: Mapping[str, str] | None = None
    ) -> Access:
        """From the caller's options, else the environment.

        Raises InvalidInput for a token or a file that cannot be one, and for a token that would go over plain
        text to another machine.
        """
        for name in options:
            if name not in AccessOptions.__annotations__:
                raise TypeError(f"unknown option {name}; known: {', '.join(AccessOptions.__annotations__)}")
        variables = os.environ if environment is None else environment
        token = _token(options.get("token"), variables)
        if token and not endpoint.tls and not is_loopback(endpoint.host):
            raise InvalidInput(
                f"the token would go to {endpoint.host} over plain text",
                next_step="write grpcs:// or https:// before the address",
            )
        ca = options.get("ca")
        if ca is not None and not endpoint.tls:
            raise InvalidInput(
                f"a CA file was given and {endpoint.url} is plain text",
                next_step="write grpcs:// or https:// before the address",
            )
        chosen = ca if ca is not None else variables.get("ONECARD_CA")
        access = cls(token, Path(chosen) if chosen and endpoint.tls else None)
        if access.ca is not None:
            access.context  # noqa: B018 - a file that cannot be used is named now, not as a failed connection
        return access

    def headers(self, request_id: str = "") -> dict[str, str]:
        """For every request: the token, and the request's id for the proxy's log."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        if request_id:
            headers["x-request-id"] = request_id
        return headers

    @cached_property
    def context(self) -> ssl.SSLContext:
        """Certificates and host names are checked, always."""
        import ssl

        try:
            return ssl.create_default_context(cafile=self.ca)
        except OSError as error:  # ssl.SSLError is one: a file that holds no certificate
            reason = error.strerror if not isinstance(error, ssl.SSLError) else "it holds no PEM certificate"
            raise InvalidInput(f"cannot use the CA file {self.ca}: {reason}") from None

    def channel_credentials(self) -> Any:
        """The same for gRPC."""
        import grpc

        return grpc.ssl_channel_credentials(self.ca.read_bytes() if self.ca else None)


def read_token(path: Path) -> str:
    """The token that a file holds, without the white space around it. Raises InvalidInput."""
    try:
        with path.open("rb") as file:
            content = file.read(_TOKEN_FILE_BYTES + 1)
        text = content.decode("ascii").strip()
    except OSError as error:
        raise InvalidInput(f"cannot read the token file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if not _TOKEN.fullmatch(text):
        raise InvalidInput(
            f"the token file {path} does not hold one bearer token",
            next_step="make one: openssl rand -hex 32",
        )
    return text


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _token(given: object, variables: Mapping[str, str]) -> str | None:
    if given is not None:
        where = "the token"
    elif variables.get("ONECARD_TOKEN"):
        given, where = variables["ONECARD_TOKEN"].strip(), "ONECARD_TOKEN"
    elif variables.get("ONECARD_TOKEN_FILE"):
        return read_token(Path(variables["ONECARD_TOKEN_FILE"]))
    else:
        return None
    if not isinstance(given, str) or not _TOKEN.fullmatch(given):
        raise InvalidInput(f"{where} is not a bearer token: letters, digits and ._~+/- are allowed")
    return given
