"""The server held against its own OpenAPI description, by schemathesis."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from server_fakes import FakeEngine, make_app

# Not among them: that what the description allows is accepted. No schema can say that prompt and output must fit into
# the context together, or that a chat template takes these messages.
CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]

schema = schemathesis.openapi.from_asgi(
    "/openapi.json", make_app(FakeEngine("abc", max_model_len=400, max_requests=2000))
)


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case):
    case.call_and_validate(checks=CHECKS)


def test_description():
    document = schema.raw_schema
    generation = ("/v1/completions", "/v1/chat/completions")
    assert {*generation, "/v1/models", "/health", "/metrics", "/version", "/tokenize"} <= set(document["paths"])
    for path in generation:
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "500", "503"} <= set(responses)
        assert "422" not in responses
        assert "text/event-stream" in responses["200"]["content"]
        error = responses["400"]["content"]["application/json"]["schema"]["$ref"]
        assert error.endswith("/ErrorResponse")
    assert document["components"]["schemas"]["CompletionRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 128


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_that_loads_scripts_from_elsewhere(path):
    assert path not in schema.raw_schema["paths"]
