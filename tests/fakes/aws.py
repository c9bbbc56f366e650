"""AWS on loopback: moto's services behind a front that records requests, checks them by botocore's model, and fails on
demand."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple, TypeVar
from xml.sax.saxutils import escape

import boto3
import regex
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.httpsession import URLLib3Session
from botocore.model import OperationModel, Shape
from moto.core.parse import PROTOCOL_PARSERS
from moto.core.request import Request as MotoRequest
from moto.core.request import determine_request_protocol
from moto.core.routing import get_service_router
from moto.core.utils import get_service_model
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

ACCOUNT = "123456789012"
REGION = "eu-west-1"
# moto makes 648 machine images at each reset otherwise, and no test uses one. It reads the variable at a reset.
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"
# It makes an application for each service at its first request.
_MOTO = DomainDispatcherApplication(create_backend_app)
# Services that sign with a name other than boto3's.
_CLIENT_NAMES = {"servicequotas": "service-quotas", "monitoring": "cloudwatch"}


class Error(Exception):
    """An error that a service answers with."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


class Request(NamedTuple):
    """A recorded request: the principal that signed it, and its parameters with botocore's names."""

    principal: str
    service: str
    operation: str
    parameters: dict[str, Any]
    region: str


# Computes an answer from the parameters: JSON, or for query services the XML inside `<OperationResult>`.
Answer = Callable[[dict[str, Any]], Any]


@dataclass
class FakeAWS:
    """The recorded requests and the answers.

    Attributes:
        invalid: complaints about requests; empty at the end of a test, unless the test expects complaints.
        answers: replaces moto's answers, by service and operation.
        errors: errors on demand, by service and operation.
        keys: access key and secret, by principal.
    """

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)
    errors: dict[tuple[str, str], Error] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def fail(self, service: str, operation: str, code: str, message: str = "", status: int = 400) -> None:
        """Let the operation fail until `errors.pop((service, operation))`."""
        self.errors[service, operation] = Error(code, message, status)

    def forbid(self, service: str, operation: str) -> None:
        """Let the operation fail with AccessDenied."""
        code = "AccessDenied" if service in ("iam", "s3", "sts") else "AccessDeniedException"
        message = f"User: arn:aws:iam::{ACCOUNT}:user/launcher is not authorized to perform: {service}:{operation}"
        self.fail(service, operation, code, message, 403)

    def client(self, service: str, principal: str = "setup", region: str = REGION, **config: Any) -> Any:
        """A client that signs as a principal: launcher, job or scheduler. Requests of `setup` are not recorded."""
        key, secret = self.credentials(principal)
        # boto3's default session is not thread-safe while it creates clients.
        with self.lock:
            return boto3.client(
                service, region_name=region, endpoint_url=self.url, aws_access_key_id=key, aws_secret_access_key=secret,
                config=Config(retries={"total_max_attempts": 1}, **config),
            )  # fmt: skip

    def credentials(self, principal: str) -> tuple[str, str]:
        """Access key and secret of a principal."""
        return self.keys.setdefault(principal, (f"AKIA{principal.upper():0<16}", f"secret-key-of-{principal}"))

    def send(self, service: str, operation: str, parameters: dict[str, Any], principal: str) -> dict[str, Any]:
        """Send parameters to a JSON service without a check by a client, as EventBridge Scheduler does.

        Raises:
            Error: the service answers with an error.
        """
        model = get_service_model(service)
        key, secret = self.credentials(principal)
        headers = {
            "X-Amz-Target": f"{model.metadata['targetPrefix']}.{operation}",
            "Content-Type": f"application/x-amz-json-{model.metadata['jsonVersion']}",
        }
        request = AWSRequest("POST", f"{self.url}/", headers, json.dumps(parameters).encode())
        SigV4Auth(Credentials(key, secret), model.signing_name, REGION).add_auth(request)
        answer = URLLib3Session().send(request.prepare())
        body = json.loads(answer.content or b"{}")
        if answer.status_code != 200:
            raise Error(body["__type"], body["message"], answer.status_code)
        return body

    def asked(self, service: str, operation: str) -> list[dict[str, Any]]:
        """The parameters of all requests of an operation."""
        return [r.parameters for r in list(self.requests) if (r.service, r.operation) == (service, operation)]


Fake = TypeVar("Fake", bound=FakeAWS)


@contextmanager
def running_aws(fake: Fake) -> Iterator[Fake]:
    """Serve an empty AWS account until the block ends."""
    server = make_server("127.0.0.1", 0, _Front(fake, _MOTO), True, request_handler=_QuietHandler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        moto_api_backend.reset()
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        moto_api_backend.reset()


class _QuietHandler(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


class _Front:
    """A WSGI application in front of moto's."""

    def __init__(self, fake: FakeAWS, moto: Any) -> None:
        self._fake, self._moto = fake, moto

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        signed = _signature(environ)
        if signed is None:
            return self._moto(environ, start_response)
        key, region, service = signed
        model = get_service_model(_CLIENT_NAMES.get(service, service))
        try:
            operation, parameters = _parse(environ, model)
            complaints = [] if service == "s3" else list(complaints_about(parameters, operation.input_shape))
            principal = next((name for name, (own, _) in self._fake.keys.items() if own == key), key)
            if principal != "setup":
                self._fake.requests.append(Request(principal, service, operation.name, parameters, region))
                if (service, operation.name) in self._fake.errors:
                    raise self._fake.errors[service, operation.name]
            if complaints:
                raise Error("ValidationException", "; ".join(complaints))
            answer = self._fake.answers.get((service, operation.name))
            if answer is None:
                return self._moto(environ, start_response)
            body = _success(model.metadata["protocol"], operation, answer(parameters))
        except Error as error:
            if error.code == "ValidationException" and complaints:
                self._fake.invalid.append(f"{service} {operation.name}: {error.message}")
            sent = _answer_error(error, model.metadata["protocol"], start_response)
            return [] if environ["REQUEST_METHOD"] == "HEAD" else sent
        return _send(start_response, 200, body, model.metadata["protocol"])


def _signature(environ: dict[str, Any]) -> tuple[str, str, str] | None:
    """Access key, region and service of a signature version 4."""
    found = regex.search(r"Credential=([^/]+)/\d+/([^/]+)/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", ""))
    return found.groups() if found else None


def _parse(environ: dict[str, Any], model: Any) -> tuple[OperationModel, dict[str, Any]]:
    protocol = determine_request_protocol(model, environ.get("CONTENT_TYPE"))
    if protocol != "rest-xml":
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        environ["wsgi.input"] = BytesIO(body)
    if protocol == "json":
        name = environ["HTTP_X_AMZ_TARGET"].rsplit(".", 1)[-1]
        return model.operation_model(name), json.loads(body or b"{}")
    # A copy, because moto cannot parse a request a second time.
    copy = dict(environ) if protocol == "rest-xml" else {**environ, "wsgi.input": BytesIO(body)}
    if protocol == "rest-xml":
        copy |= {"wsgi.input": BytesIO(b""), "CONTENT_LENGTH": "0"}
    request = MotoRequest(copy)
    url: dict[str, Any] = {}
    if protocol in ("query", "ec2"):
        operation = model.operation_model(request.values["Action"])
    else:
        found, url = get_service_router(model.service_name).match(request)
        operation = model.operation_model(found.name)
    if protocol == "rest-xml":
        return operation, {**url, **request.args.to_dict()}
    asked = {
        "method": request.method, "values": request.values, "headers": request.headers, "body": request.data,
        "url_path": request.path, "url_params": url,
    }  # fmt: skip
    parameters = PROTOCOL_PARSERS[protocol](operation).parse(asked)
    if protocol == "rest-json" and body:
        # The parser drops members that the model does not know, but they must be checked.
        parameters |= {k: v for k, v in json.loads(body).items() if k not in parameters}
    return operation, parameters


def complaints_about(value: Any, shape: Shape | None, where: str = "") -> Iterator[str]:
    """What a service would refuse: missing and unknown members, wrong types, and values outside the model's limits."""
    if shape is None:
        return
    kind, limits = shape.type_name, shape.metadata
    here = where or shape.name
    expected = _TYPES.get(kind)
    if expected is not None and (not isinstance(value, expected) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{here} is {type(value).__name__}, not {kind}"
        return
    if "enum" in limits and value not in limits["enum"]:
        yield f"{here} is {value!r}, not one of {limits['enum'][:5]} …"
    if "pattern" in limits and not regex.fullmatch(limits["pattern"], value):
        yield f"{here} is {value!r}, which does not match {limits['pattern']}"
    size = len(value) if kind in ("string", "list", "map", "blob") else value if kind in ("integer", "long") else None
    if size is not None and not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{here} is {size} (long), not between {limits.get('min')} and {limits.get('max')}"
    if kind == "structure":
        missing = set(limits.get("required", ())) - set(value)
        yield from (f"{here}.{name} is missing" for name in sorted(missing))
        for name, part in value.items():
            if name not in shape.members:
                yield f"{here}.{name} is unknown"
            else:
                yield from complaints_about(part, shape.members[name], f"{here}.{name}")
    elif kind == "list":
        for part in value:
            yield from complaints_about(part, shape.member, f"{here}[]")
    elif kind == "map":
        for name, part in value.items():
            yield from complaints_about(name, shape.key, f"{here}.{name}")
            yield from complaints_about(part, shape.value, f"{here}.{name}")


_TYPES: dict[str, Any] = {
    "structure": dict, "map": dict, "list": list, "string": str, "integer": int, "long": int, "boolean": bool,
    "float": (int, float), "double": (int, float),
}  # fmt: skip


def _success(protocol: str, operation: OperationModel, answer: Any) -> bytes:
    if protocol == "query":
        space = operation.service_model.metadata["xmlNamespace"]
        inside = f"<{operation.name}Result>{answer}</{operation.name}Result>"
        return f'<{operation.name}Response xmlns="{space}">{inside}</{operation.name}Response>'.encode()
    return json.dumps(answer).encode()


def _answer_error(error: Error, protocol: str, start_response: Any) -> list[bytes]:
    if "json" in protocol:
        body = json.dumps({"__type": error.code, "message": error.message}).encode()
        return _send(start_response, error.status, body, protocol, ("x-amzn-errortype", error.code))
    inside = f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
    if protocol == "ec2":
        inside = f"<Response><Errors>{inside}</Errors></Response>"
    elif protocol == "query":
        inside = f"<ErrorResponse>{inside}</ErrorResponse>"
    return _send(start_response, error.status, inside.encode(), protocol)


def _send(start_response: Any, status: int, body: bytes, protocol: str, *headers: tuple[str, str]) -> list[bytes]:
    kind = "application/x-amz-json-1.1" if "json" in protocol else "text/xml"
    start_response(f"{status} -", [("Content-Type", kind), ("Content-Length", str(len(body))), *headers])
    return [body]
